"""Seconds of a step, by layer, phase and what they go to. A simulation: no clock is read.

    a product            FLOPs of the tiles it is cut into, over peak * PRODUCT[precision]; last waves count whole; or the time to
                         move its operands, where that is longer
    a pass over memory   bytes / (bandwidth * MEMORY)
    a collective         bytes by hop / bandwidth of the hop, the slower hop counting, and its latencies
    a layer              the device's work, or the time to issue it where that is longer; on a CPU both
    exposed              exchanges of rows but for what the shared expert hides, of stored rows what the products don't; of
                         weights and gradients what a layer's own work doesn't hide
    a step               micro-batches, those of a pipeline's bubble among them, the optimizer, and what is issued once
    work of a device     divided by `efficiency`, which is fitted (benchmarks/plan_accuracy.py) and not part of the model; links
                         have an efficiency of their own (moesaic.parallel.hardware), so collectives are not

Letters as in moesaic.moe.work.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field

from moesaic.kernels.tiles import TILES
from moesaic.moe.attention import QUERIES
from moesaic.moe.config import ModelConfig
from moesaic.moe.flops import flops_per_token
from moesaic.moe.work import Product, block_products, block_traffic, head_product, head_traffic
from moesaic.parallel.hardware import Hardware
from moesaic.parallel.layout import Collective, Layout, collectives, groups_by_kind, load_of, root_group

# Between the time that the model gives for computing and what published frameworks take: the middle of their releases, see
# benchmarks/plan_accuracy.py. This framework was not measured on a GPU.
EFFICIENCY = {"cpu": 1.0, "gpu": 0.62}
# Of the peak: what large products reach, by precision; and attention, which is in bf16 whatever the rest is in.
PRODUCT = {"fp32": 0.9, "tf32": 0.75, "bf16": 0.8, "fp8": 0.7, "fp4": 0.6}
ATTENTION, MEMORY = 0.55, 0.8
LOW = ("fp8", "fp4")
LAUNCHES = {"forward": 120, "backward": 110}  # operations that a block issues, views left out: counted
# On a CPU, and more for each head of a sequence and block of its queries, multiplied one by one; and more where rows travel.
ON_CPU, TRAVELLING = {"forward": (150, 4.0), "backward": (200, 8.5)}, 95
AFTER_WAIT = 20  # those that the device waits for after the host waited for it, as it does for the sizes of an exchange
SENDING = (
    0.15  # of a device that copies for a collective while it computes: 20 of 132 processors (arXiv 2505.09343, 4.4)
)
NARROW = 128  # heads that are less wide spend as long on softmax as on products, and proportionally more


@dataclass(frozen=True)
class Pipeline:
    """stages of a pipeline, each of `virtual` parts, between which ranks of `micro_batches` pass activations (1F1B)."""

    stages: int = 1
    virtual: int = 1


@dataclass
class Timing:
    """Seconds of a rank. parts: by (where, phase, what), of one micro-batch of the whole model; where: `dense layer`, `MoE
    layer`, each of all such layers together, `head`, `step`. `exposed`, of collectives that nothing hides, is among them;
    `hidden` is not."""

    parts: dict[tuple[str, str, str], float] = field(default_factory=lambda: defaultdict(float))
    hidden: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    batches: int = 1
    micro_batch: float = 0.0
    once: float = 0.0
    bubble: float = 0.0
    step: float = 0.0
    tokens_per_s: float = 0.0
    mfu: float = 0.0

    def step_parts(self) -> dict[tuple[str, str, str], float]:
        """`parts`, of a whole step."""
        return {key: s * (1 if key[0] == "step" else self.batches) for key, s in self.parts.items()}

    def share(self, what: str) -> float:
        """Of a step, the part that goes to parts whose name begins with `what`."""
        parts = self.step_parts()
        return sum(s for (_, _, name), s in parts.items() if name.startswith(what)) / sum(parts.values())


def product_seconds(p: Product, hardware: Hardware, precision: str, width: int, ragged: bool = True) -> float:
    """Of one product. `ragged`: groups whose rows no rounding made multiples of the tile; half a tile of each is padding."""
    if p.m == 0:
        return 0.0
    tile = TILES[hardware.target]["varlen_m" if p.kind == "grouped" else "dense"]
    rate = hardware.rate(precision) * (ATTENTION if p.kind == "attention" else PRODUCT[precision])
    moved = width * (p.m * p.k + p.groups * p.k * p.n + p.m * p.n) / (hardware.bandwidth * MEMORY)
    if p.kind == "attention":
        return p.flops / rate * max(1.0, NARROW / p.groups)
    if hardware.target == "cpu":  # whose tiles are a choice of the rounding, not of the product
        return max(p.flops / rate, moved)
    rows = p.m + p.groups * tile.m / 2 if p.kind == "grouped" and ragged else math.ceil(p.m / tile.m) * tile.m
    tiles = rows / tile.m * math.ceil(p.n / tile.n)
    waves = math.ceil(tiles / hardware.processors - 1e-9)
    return max(2 * waves * hardware.processors * tile.m * tile.n * p.k / rate, moved)


def quantized_share(p: Product, model: ModelConfig, layout: Layout, dense: bool) -> float:
    """Of a product of dense or of MoE layers: the part of these blocks, and of the steps, that has it quantized."""
    layer = "experts" if p.kind == "grouped" else "dense" if p.name.split()[0] in ("dense", "shared") else "attention"
    if p.kind not in ("dense", "grouped") or layer not in layout.quantized:
        return 0.0
    first, last, tail = layout.high
    blocks = range(model.n_dense_layers) if dense else range(model.n_dense_layers, model.n_layers)
    return (1 - tail) * sum(first <= i < model.n_layers - last for i in blocks) / len(blocks)


def launches(model: ModelConfig, layout: Layout, phase: str, cpu: bool, dense: bool = False) -> float:
    """Operations that the host issues for a block."""
    if not cpu:
        return LAUNCHES[phase]
    fixed, each = ON_CPU[phase]
    heads = model.n_heads if model.attention == "mla" else model.kv_heads
    each *= layout.micro_batch * heads * math.ceil(layout.seq_len / QUERIES)
    again = launches(model, layout, "forward", cpu, dense) if phase == "backward" and layout.remat != "none" else 0
    travelling = TRAVELLING if phase == "forward" and layout.hops != "local" and not dense else 0
    return fixed + each + travelling + again


def collective_seconds(c: Collective, hardware: Hardware) -> float:
    """The ranks of a group are `stride` apart: `near` of them share a domain, each with a link of its own to other domains."""
    near = min(c.ranks, max(1, hardware.domain // c.stride))
    while c.ranks % near:
        near -= 1
    domains = c.ranks // near
    intra, inter = hardware.hops["intra"], hardware.hops["inter"]
    twice = 2 if c.operation == "all_reduce" else 1
    own = {"all_reduce": hardware.sums, "all_gather": hardware.gathers, "reduce_scatter": hardware.gathers}.get(
        c.operation
    )
    if own is not None:
        return twice * own.seconds(c.size * (c.ranks - 1) / c.ranks, math.ceil(math.log2(c.ranks)))
    if c.operation in ("all_to_all", "fused"):
        inside, outside = c.size * (near - 1) / c.ranks, c.size * (c.ranks - near) / c.ranks
    else:
        inside, outside = c.size * (c.ranks - 1) / c.ranks, c.size * (domains - 1) / domains / near
    slow = max(inside / intra.bytes_s if near > 1 else 0.0, outside / inter.bytes_s if domains > 1 else 0.0)
    steps = math.ceil(math.log2(near)) * intra.latency + math.ceil(math.log2(domains)) * inter.latency
    return twice * (slow + steps)


def time_of(
    model: ModelConfig, layout: Layout, hardware: Hardware, precision: str, *, efficiency: float = 1.0,
    pipeline: Pipeline | None = None, router: str = "fp32", overlapped: float = 0.0, attended: float | None = None,
    sums: int = 4,
) -> Timing:  # fmt: skip
    """Of one step. Raises ValueError where the hardware lacks the precision.

    precision   of products: fp32, bf16, fp8 or fp4; attention and head are in bf16 at most. router: of its product
    overlapped  the part of the exchange of rows that something hides, beside the shared expert
    attended    positions of the sequence that attention spans (null: all)
    efficiency  part of the rates above that computing reaches, collectives left out
    sums        bytes of a gradient on its way between copies
    """
    pipeline = pipeline or Pipeline()
    t, load, b = layout.tokens, load_of(model, layout), layout.width
    rows = load.computed
    travelled = 0 if layout.hops == "local" else load.received
    wide = "fp32" if precision == "fp32" else "bf16"
    ragged = model.router.rounding == "none"
    plain = wide if precision in LOW else precision
    kinds = {"dense": plain, "grouped": plain, "attention": wide, "head": wide,
             "router": router if router in hardware.tflops else "fp32"}  # fmt: skip
    again = {"none": 0.0, "selective": 1.0, "full": 1.0}[layout.remat]
    timing, layers = Timing(), {True: model.n_dense_layers, False: model.n_layers - model.n_dense_layers}
    share, once = seconds_by_kind(model, layout, hardware)
    for dense in (True, False):
        if not layers[dense]:
            continue
        where, count = ("dense layer" if dense else "MoE layer"), layers[dense]
        products = block_products(model, t, attended or layout.seq_len, dense, rows, model.n_experts // layout.expert)
        traffic = block_traffic(model, t, dense, rows, travelled, b)
        low = [quantized_share(p, model, layout, dense) if precision in LOW else 0.0 for p in products]
        if any(low):  # operands read, and written with their scales, once for each side they are used on
            traffic["quantize"] = sum(1.5 * b * p.m * p.k * part for p, part in zip(products, low, strict=True))
        for phase, times, attention in (("forward", 1.0, 1.0), ("backward", 2.0, 2.5)):
            work: dict[str, float] = defaultdict(float)
            for p, part in zip(products, low, strict=True):
                one = product_seconds(p, hardware, kinds[p.kind], b, ragged)
                if part:
                    one = part * product_seconds(p, hardware, precision, b, ragged) + (1 - part) * one
                in_kernel = layout.shared and p.name.startswith("shared")
                saved = layout.remat == "selective" and (p.kind == "grouped" or in_kernel)
                repeated = again if phase == "backward" and not saved else 0
                work[f"product {p.name}"] += one * ((attention if p.kind == "attention" else times) + repeated)
            for name, size in traffic.items():
                repeated = again if phase == "backward" else 0
                work[f"memory {name}"] += size * (times + repeated) / (hardware.bandwidth * MEMORY)
            for name in work:
                work[name] /= efficiency
            launch = hardware.launch_us * 1e-6 / efficiency
            cpu = hardware.target == "cpu"
            issue, busy = launches(model, layout, phase, cpu, dense) * launch, sum(work.values())
            if hardware.target == "cpu":
                work["issuing"] = issue
            elif issue > busy:
                work["issuing"] = issue - busy
            gathers, exchanged, stored = share[dense, phase]
            exchanges = exchanged + stored
            shared = sum(s for name, s in work.items() if name.startswith("product shared"))
            hidden = min(shared, exchanged * 0.5) if hardware.target != "cpu" else 0.0
            if (
                stored and not layout.apart and hardware.target != "cpu"
            ):  # one kernel: tiles are computed while others travel
                inside = ("product experts", "product shared") if layout.shared else ("product experts",)
                hidden += min(sum(s for name, s in work.items() if name.startswith(inside)), stored)
            hidden += overlapped * (exchanges - hidden)
            if (exchanged or layout.apart) and phase == "forward" and hardware.target != "cpu":
                work["issuing"] += AFTER_WAIT * launch
            work["exposed exchange of rows"] = exchanges - hidden * (1 - SENDING)
            kept = gathers if hardware.target == "cpu" else max(0.0, gathers - max(busy, issue))
            work["exposed weights and gradients"] = kept + SENDING * (gathers - kept)
            timing.hidden["exchange of rows"] += count * hidden
            timing.hidden["weights and gradients"] += count * (gathers - kept)
            for name, seconds in work.items():
                timing.parts[where, phase, name] += count * seconds
    head = 3 * product_seconds(head_product(model, t), hardware, wide, b)
    timing.parts["head", "forward", "product head"] += head / efficiency
    timing.parts["head", "forward", "memory head"] += (
        head_traffic(model, t) / (hardware.bandwidth * MEMORY) / efficiency
    )
    timing.parts["head", "forward", "exposed weights and gradients"] += sum(share[None, "forward"])

    held = root_group(model, layout).held + sum(
        sum(g.held for g in groups) * layers[dense] for dense, groups in groups_by_kind(model, layout).items()
    )
    stages = pipeline.stages
    timing.micro_batch, timing.batches = sum(timing.parts.values()) / stages, layout.micro_batches
    # The norm, and weights, moments and gradients in and out. Half of a micro-batch hides the sums, of a CPU nothing.
    optimizer = 32 * held / stages / (hardware.bandwidth * MEMORY) / efficiency
    hides = 0.0 if hardware.target == "cpu" else timing.micro_batch / 2
    exposed = max(0.0, once / stages * sums / 4 - hides)
    timing.once = optimizer + exposed
    timing.parts["step", "optimizer", "memory optimizer"] = optimizer
    timing.parts["step", "optimizer", "exposed sums over copies"] = exposed
    timing.bubble = (stages - 1) / pipeline.virtual * timing.micro_batch
    timing.step = layout.micro_batches * timing.micro_batch + timing.bubble + timing.once
    timing.tokens_per_s = layout.micro_batches * t / timing.step / stages
    peak = hardware.rate("fp32" if precision == "fp32" else "bf16")
    timing.mfu = timing.tokens_per_s * flops_per_token(model, layout.seq_len) / peak
    return timing


def seconds_by_kind(
    model: ModelConfig, layout: Layout, hardware: Hardware
) -> tuple[dict[tuple[bool | None, str], tuple[float, float, float]], float]:
    """Seconds of (weights and gradients, rows by all-to-all, rows that kernels store) of one layer by kind, None for the root,
    and phase, of the fullest rank; and of all that is issued once a step."""
    layers = {True: model.n_dense_layers, False: model.n_layers - model.n_dense_layers}
    first = {model.n_dense_layers: False} if layers[False] else {}
    first |= {0: True} if layers[True] else {}
    sums: dict[tuple[bool | None, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    once = 0.0
    for c in collectives(model, layout, first):
        kind, seconds = first.get(c.layer), collective_seconds(c, hardware)
        if c.last:
            once += seconds * (1 if kind is None else layers[kind])
        else:
            what = {"all_to_all": 1, "fused": 2}.get(c.operation, 0)
            phase = "forward" if kind is None else c.phase
            sums[kind, phase][what] += seconds * (layout.imbalance if what else 1.0)
    return defaultdict(lambda: (0.0, 0.0, 0.0), {key: (a, b, c) for key, (a, b, c) in sums.items()}), once
