"""What a run would need and take, before it is paid for: memory, time and communication, from formulas. No GPU needed.

    python launch/plan.py recipe=7b_moe hardware=h100_sxm nodes=8
    python launch/plan.py recipe=qwen3_235b hardware=gb200_nvl72 nodes=16 price=6 search=true
    python launch/plan.py recipe=7b_moe hardware=mine.yaml nodes=2 parallel.remat=full dry_run=true

Every override of launch/train.py works. Times are those of a simulation, fitted to published runs of other frameworks
(benchmarks/plan_accuracy.py); this framework was not measured on a GPU. Bytes are held to the real model: docs/planning.md.
"""

import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from moesaic.launch import cli, options
from moesaic.launch.batches import micro_batch
from moesaic.launch.schema import Config
from moesaic.moe.config import require
from moesaic.moe.flops import flops_per_token, parameter_counts
from moesaic.moe.low import check_low
from moesaic.parallel import hardware as machines
from moesaic.parallel.apart import all_apart, products_inside
from moesaic.parallel.hardware import Hardware
from moesaic.parallel.layout import Layout, collectives, layout_of
from moesaic.parallel.memory_plan import Memory, memory_of
from moesaic.parallel.plan_search import WHAT, Candidate, gone, largest_batch, reasons, search, with_batch
from moesaic.parallel.time_plan import EFFICIENCY, Timing, time_of

GIB = 2**30


@dataclass
class PlanOptions:
    """hardware    a file of recipes/hardware, or the path of one, such as launch/comm_bench.py writes
    nodes       hosts, each with the hardware's `node` devices
    price       of one device and hour, in any currency (0: none)
    imbalance   rows of the fullest rank's experts over those of an even load
    products    what if matrix products of experts, attention and dense layers ran in fp8 or fp4 (auto: what precision says)
    efficiency  of the simulated time, as a fraction (0: the middle of published runs)
    search      true: rank layouts
    dry_run     true: run the real model without memory, and compare
    json        true: one JSON object instead of text
    picture     a PNG file to draw memory and time into (needs matplotlib)
    """

    hardware: str = "h100_sxm"
    nodes: int = 1
    price: float = 0.0
    imbalance: float = 1.0
    products: str = "auto"
    efficiency: float = 0.0
    search: str = "false"
    dry_run: str = "false"
    json: str = "false"
    picture: str = ""

    def __post_init__(self) -> None:
        require(self.nodes >= 1, f"nodes={self.nodes}: must be at least 1")
        require(0 <= self.price < math.inf, f"price={self.price}: must be a number, not negative")
        require(1 <= self.imbalance <= 1e3, f"imbalance={self.imbalance}: must be at least 1, an even load")
        require(self.products in ("auto", "fp8", "fp4"), f"products={self.products}: must be one of auto, fp8, fp4")
        require(0 <= self.efficiency <= 1, f"efficiency={self.efficiency}: must lie in 0..1")
        for name in ("search", "dry_run", "json"):
            value = getattr(self, name)
            require(value in ("true", "false"), f"{name}={value}: must be true or false")


@dataclass(frozen=True)
class Plan:
    config: Config
    machine: Hardware
    layout: Layout
    precision: str
    efficiency: float
    memory: Memory
    timing: Timing


def make_plan(config: Config, chosen: PlanOptions) -> Plan:
    """Raises ValueError, one line, where the run can't be spread that way."""
    machine, train = machines.load(chosen.hardware), config.train
    world = chosen.nodes * machine.node
    require(train.global_batch >= world,
            f"train.global_batch={train.global_batch}: leaves some of {world} ranks without a sequence")  # fmt: skip
    micro = micro_batch(train, -(-train.global_batch // world))
    compute = config.precision.compute
    if compute == "auto":
        compute = "fp32" if machine.target == "cpu" else "bf16"
    low = config.precision
    precision = compute if chosen.products == "auto" else chosen.products
    if low.quantized and chosen.products == "auto":
        element = low.fprop.x.element or low.fprop.w.element or low.dgrad.dy.element or low.wgrad.dy.element or ""
        precision = "fp4" if element in ("e2m1", "int4") else "fp8"
        check_low(low, config.model)
        require(precision in machine.tflops,
                f"precision={low.recipe}: hardware={machine.name} has products of {', '.join(machine.tflops)}, none of "
                f"{precision}; a run emulates them, which is not planned: products={compute} has the rest")  # fmt: skip
    machine.rate(precision)
    layout = layout_of(config.model, config.parallel, world, machine.node, micro, 1, train.seq_len, compute)
    kernels = config.parallel.expert_path == "fused" and low.quantizes("experts")
    inside = kernels and products_inside(low, machine.target)
    layout = dataclasses.replace(with_batch(layout, micro, train.global_batch), imbalance=chosen.imbalance,
                                 dispatch=low.dispatch, combine=low.combine, target=machine.target,
                                 low=inside, apart=kernels and not inside,
                                 numbers=low.quantizes("experts") and low.chance)  # fmt: skip
    if kernels and all_apart(low, machine.target):
        layout = dataclasses.replace(layout, keep=True)
    if low.quantized and chosen.products == "auto":
        high = low.high_first, low.high_last, low.high_tail
        layout = dataclasses.replace(layout, quantized=tuple(low.layers), high=high)
    efficiency = chosen.efficiency or EFFICIENCY["cpu" if machine.target == "cpu" else "gpu"]
    timing = time_of(config.model, layout, machine, precision, efficiency=efficiency)
    return Plan(config, machine, layout, precision, efficiency, memory_of(config.model, layout), timing)


# ---------------------------------------------------------------- told as text


def describe(plan: Plan, chosen: PlanOptions) -> list[str]:
    config, machine, layout, memory, timing = plan.config, plan.machine, plan.layout, plan.memory, plan.timing
    counts, train = parameter_counts(config.model), config.train
    tokens = train.global_batch * train.seq_len
    fits = memory.total <= machine.memory
    lines = [
        f"{config.name} on {chosen.nodes} x {machine.node} {machine.part}. A simulation: no clock was read.",
        "",
        f"model    {counts.total / 1e9:.2f}B parameters, {counts.active / 1e9:.2f}B active a token, "
        f"{flops_per_token(config.model, train.seq_len) / 1e9:.2f} GFLOP a token of {train.seq_len}",
        f"layout   {layout.world} ranks, parallel.expert={layout.expert} ({layout.hops}), parallel.replicate="
        f"{layout.replicate}, dense weights sharded over {layout.shard}, experts over {layout.expert} x "
        f"{layout.expert_shard}, parallel.remat={layout.remat}, parallel.reshard={layout.reshard}",
        f"batch    {train.global_batch} sequences, {layout.micro_batches} micro-batches of {layout.micro_batch} on a rank; "
        f"{plan.precision} products"
        + (
            ", as if the recipe had kernels here; docs/precision.md says where"
            if plan.precision[:3] in ("fp8", "fp4")
            else ""
        ),
        "",
        f"memory of a rank, GiB: {memory.total / GIB:.1f} of {machine.memory_gib:g}: "
        + ("fits" if fits else "DOES NOT FIT")
        + f"; largest train.micro_batch that fits: {largest_batch(config.model, layout, machine)}",
    ]
    lines += [f"  {name:20} {size / GIB:8.2f}" for name, size in memory.categories().items() if size]
    dense = config.model.n_dense_layers
    kinds = (("dense layer", memory.kept[:dense]), ("MoE layer", memory.kept[dense:]))
    lines += [f"  kept by each {name}: {part[0] / GIB:.3f}, {len(part)} of them" for name, part in kinds if part]
    lines += ["", f"time of a step: {timing.step:.3f} s, MFU {timing.mfu:.1%} of the {peak_name(plan)} peak"]
    lines += time_table(timing)
    a_day = tokens / timing.step * 86400
    days = train.steps * timing.step / 86400
    lines.append(
        f"  {tokens / timing.step:,.0f} tokens/s, {a_day / 1e9:.2f}B tokens a day; {train.steps:,} steps take {days:.1f} days"
    )
    if chosen.price:
        cost = chosen.price * layout.world * train.steps * timing.step / 3600
        lines.append(
            f"  at {chosen.price:g} a device and hour: {cost:,.0f} for the run, {cost / train.steps:.4g} a step"
        )
    sent: Counter[str] = Counter()
    for c in collectives(config.model, layout):
        sent[c.operation] += round(c.sent * (1 if c.last else layout.micro_batches))
    told = ", ".join(f"{operation} {size / 1e9:.2f} GB" for operation, size in sorted(sent.items()))
    lines += [f"  a rank sends in a step: {told or 'nothing'}", "", "what to change"]
    return [*lines, *(f"  {advice}" for advice in advise(plan, fits)), "", *what_if(plan)]


def peak_name(plan: Plan) -> str:
    return "fp32" if plan.precision == "fp32" else "bf16"


def time_table(timing: Timing) -> list[str]:
    """Seconds of a step by layers and phase, then by what they go to."""
    parts = timing.step_parts()
    lines = [f"  {'':12} {'phase':10} {'products':>9} {'memory':>9} {'issuing':>9} {'exposed':>9} {'s':>9}"]
    for where, phase in dict.fromkeys(key[:2] for key in parts):
        columns = [
            sum(s for (a, b, c), s in parts.items() if (a, b) == (where, phase) and c.startswith(what))
            for what in ("product", "memory", "issuing", "exposed")
        ]
        shown = " ".join(f"{s:9.4f}" for s in [*columns, sum(columns)])
        lines.append(f"  {where:12} {phase:10} {shown}")
    if timing.bubble:
        lines.append(f"  pipeline bubble {timing.bubble:.4f}")
    total = sum(parts.values())
    largest = sorted(parts.items(), key=lambda item: -item[1])[:8]
    lines.append("  most of it: " + ", ".join(f"{c} ({a}, {b}) {s / total:.0%}" for (a, b, c), s in largest))
    return lines


def advise(plan: Plan, fits: bool) -> list[str]:
    """At most three changes, each with what the simulation gives for it."""
    layout, machine = plan.layout, plan.machine
    tried: list[tuple[str, str, Any]] = [("parallel.remat", "remat", mode) for mode in ("none", "selective", "full")]
    tried += [("parallel.reshard", "reshard", value) for value in ("auto", "never")]
    tried += [("parallel.replicate", "replicate", copies) for copies in (1, max(1, layout.world // machine.domain))]
    if layout.path == "auto":
        tried.append(("parallel.expert", "expert", 1))
    if layout.expert > layout.node:
        tried += [("parallel.expert", "expert", layout.node), ("parallel.expert_path", "path", "two_hop")]
    layouts = [(knob, value, dataclasses.replace(layout, **{name: value})) for knob, name, value in dict.fromkeys(tried)
               if getattr(layout, name) != value]  # fmt: skip
    sequences = plan.config.train.global_batch
    layouts += [
        ("train.micro_batch", micro, with_batch(layout, micro, sequences))
        for micro in {max(1, layout.micro_batch // 2), 2 * layout.micro_batch} - {layout.micro_batch}
        if micro <= -(-sequences // layout.world)
    ]
    better = []
    for knob, value, other in layouts:
        size = memory_of(plan.config.model, other).total
        if plan.config.model.n_experts % other.expert or other.world % other.replicate or size > machine.memory:
            continue
        step = time_of(plan.config.model, other, machine, plan.precision, efficiency=plan.efficiency).step
        if not fits or step < 0.99 * plan.timing.step:
            change = f"{step / plan.timing.step - 1:+.0%}"
            better += [(step, f"{knob}={value}: {step:.3f} s a step ({change}), {size / GIB:.1f} GiB")]
    return [told for _, told in sorted(better)[:3]] or [
        "nothing of one knob alone" + ("" if fits else "; search=true, or more nodes")
    ]


def what_if(plan: Plan) -> list[str]:
    """An uneven load, and no token rounding or the nearest."""
    model, lines = plan.config.model, ["what if"]
    for imbalance in (1.0, 1.25, 1.5, 2.0) if plan.layout.expert > 1 else ():  # no rank is fuller than another
        layout = dataclasses.replace(plan.layout, imbalance=imbalance)
        step = time_of(model, layout, plan.machine, plan.precision, efficiency=plan.efficiency).step
        size = memory_of(model, layout).total / GIB
        lines.append(f"  the fullest rank has {imbalance:g} x an even load: {step:.3f} s a step, {size:.1f} GiB")
    for rounding in ("none", "nearest"):
        if model.router.groups > 1 or model.router.capacity_factor:
            break  # can't be joined with rounding
        other = dataclasses.replace(model, router=dataclasses.replace(model.router, rounding=rounding))
        step = time_of(other, plan.layout, plan.machine, plan.precision, efficiency=plan.efficiency).step
        lines.append(f"  model.router.rounding={rounding}: {step:.3f} s a step")
    for precision in ("fp8", "fp4"):
        if precision in plan.machine.tflops and plan.precision != "fp32":
            step = time_of(model, plan.layout, plan.machine, precision, efficiency=plan.efficiency).step
            lines.append(f"  products in {precision}, where docs/precision.md has kernels: {step:.3f} s a step")
    return lines


def describe_search(found: list[Candidate], plan: Plan) -> list[str]:
    fitting = [c for c in found if c.timing]
    lines = ["", f"search: {len(found)} layouts, {len(fitting)} fit"]
    if not fitting:
        return [
            *lines,
            f"  none fits; the smallest needs {found[0].memory.total / GIB:.1f} GiB: {found[0].overrides()}",
        ]
    for place, c in enumerate(fitting[:10], 1):
        assert c.timing is not None
        lines.append(
            f"  {place:2} {c.timing.step:8.3f} s  MFU {c.timing.mfu:5.1%}  {c.memory.total / GIB:6.1f} GiB  {c.overrides()}"
        )
    lines += ["why the first", *(f"  {line}" for line in reasons(found))]
    for kind in ("fp8", "fp4"):
        if kind in plan.machine.tflops and plan.precision == "bf16" and not plan.layout.shared:
            step, best = min(
                (time_of(plan.config.model, c.layout, plan.machine, kind, efficiency=plan.efficiency).step, i)
                for i, c in enumerate(fitting) if c.precision == "bf16"
            )  # fmt: skip
            lines.append(f"  with products in {kind}, where docs/precision.md has kernels, the best were {step:.3f} s a step: "
                         f"{dataclasses.replace(fitting[best], precision=kind).overrides()}")  # fmt: skip
    return lines


def describe_dry_run(plan: Plan) -> list[str]:
    """The real model without memory, beside the formulas."""
    from moesaic.parallel.dry_run import dry_run  # torch's distributed parts take seconds to import

    layout = dataclasses.replace(
        plan.layout, micro_batches=1, low=False, apart=False, numbers=False
    )  # its products are bf16
    counted, planned = dry_run(plan.config.model, layout, plan.config.parallel), memory_of(plan.config.model, layout)
    want = Counter((c.phase, c.operation, c.ranks, c.size) for c in collectives(plan.config.model, layout)
                   if c.operation != "fused")  # fmt: skip
    issued = counted.issued.copy()
    del issued["optimizer", "all_reduce", layout.world, 4]  # the gradient's norm
    size, total = (sum(key[3] * n for key, n in counts.items()) for counts in (want, issued))
    same = "the same" if want == issued else "NOT THE SAME"
    return [
        "",
        f"dry run of one micro-batch at {layout.world} ranks, the real model without memory",
        f"  collectives: {want.total()} planned, {issued.total()} issued; {size:,} and {total:,} bytes: {same}",
        f"  peak of tensors: {planned.tensors / GIB:.2f} GiB planned, {counted.peak / GIB:.2f} counted "
        f"({planned.tensors / counted.peak - 1:+.1%})",
        f"  kept by layers: {sum(planned.kept) / GIB:.2f} GiB planned, {sum(counted.kept) / GIB:.2f} counted",
    ]


def short(layout: Layout) -> str:
    """A layout in two lines of a picture; knobs without their groups."""
    return (f"expert={layout.expert} replicate={layout.replicate} reshard={layout.reshard}\n"
            f"{layout.hops} remat={layout.remat} micro_batch={layout.micro_batch}")  # fmt: skip


def draw(rows: list[tuple[str, Memory, Timing]], machine: Hardware, path: str) -> None:
    """A bar for each layout: memory by category beside the device's, and a step's seconds by what they go to."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12.5, 1.6 + 0.5 * len(rows)), layout="constrained")
    names = [name for name, _, _ in rows]
    for axis, parts in (
        (left, [{k: v / GIB for k, v in memory.categories().items()} for _, memory, _ in rows]),
        (right, [{name: gone(timing, name) for name in WHAT} for _, _, timing in rows]),
    ):
        start = [0.0] * len(rows)
        for kind in parts[0]:
            widths = [part[kind] for part in parts]
            if any(widths):
                axis.barh(names, widths, left=start, label=kind)
            start = [a + b for a, b in zip(start, widths, strict=True)]
        axis.invert_yaxis()
        axis.legend(fontsize=7)
    left.tick_params(axis="y", labelsize=8)
    right.set_yticks([])
    left.axvline(machine.memory_gib, color="black", linestyle="--")
    left.set_xlabel(f"GiB of a rank; dashed: {machine.part}")
    right.set_xlabel("seconds of a step, simulated")
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:  # a folder that isn't there, an ending that is no format
        raise ValueError(f"picture={path}: can't be written ({error})") from None
    pyplot.close(figure)


def as_json(plan: Plan) -> str:
    """Bytes and seconds; of a rank, or of all for tokens."""
    model, train, memory, timing = plan.config.model, plan.config.train, plan.memory, plan.timing
    counts, sent = parameter_counts(model), Counter[str]()
    for c in collectives(model, plan.layout):
        sent[c.operation] += round(c.sent * (1 if c.last else plan.layout.micro_batches))
    told = {
        "simulated": True, "recipe": plan.config.name, "hardware": plan.machine.name, "precision": plan.precision,
        "layout": dataclasses.asdict(plan.layout), "parameters": counts.total, "active": counts.active,
        "flops_per_token": flops_per_token(model, train.seq_len), "memory": memory.categories(), "kept_by_layer": memory.kept,
        "fits": memory.total <= plan.machine.memory, "largest_micro_batch": largest_batch(model, plan.layout, plan.machine),
        "step_s": timing.step, "tokens_per_s": train.global_batch * train.seq_len / timing.step, "mfu": timing.mfu,
        "parts_s": {"/".join(key): s for key, s in timing.step_parts().items()}, "sent_bytes": sent,
    }  # fmt: skip
    return json.dumps(told)


def main(arguments: Sequence[str]) -> None:
    names = {field.name for field in dataclasses.fields(PlanOptions)}
    own = [a for a in arguments if a.partition("=")[0] in names]
    chosen = options.parse(PlanOptions, own)
    plan = make_plan(cli.compose([a for a in arguments if a not in own]), chosen)
    if chosen.json == "true":
        print(as_json(plan))
        return
    lines = describe(plan, chosen)
    rows = [(f"as asked: {short(plan.layout)}", plan.memory, plan.timing)]
    if chosen.search == "true":
        # fp8 and fp4, emulated in places, are ranked where they are asked for, else told apart.
        kinds = [kind for kind in dict.fromkeys((plan.precision, "bf16", "fp32")) if kind in plan.machine.tflops]
        found = search(
            plan.config.model, plan.layout, plan.machine, kinds, plan.config.train.global_batch, plan.efficiency
        )
        lines += describe_search(found, plan)
        rows += [(f"{i}: {short(c.layout)}", c.memory, c.timing) for i, c in enumerate(found[:5], 1) if c.timing]
    if chosen.dry_run == "true":
        lines += describe_dry_run(plan)
    print("\n".join(lines))
    if chosen.picture:
        draw(rows, plan.machine, chosen.picture)


def program(arguments: Sequence[str] | None = None) -> NoReturn:
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        print(PlanOptions.__doc__)
        sys.exit(0)
    try:
        main(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    program()
