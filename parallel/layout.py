"""A layout of a run, and what its ranks send each other: by formula, no process group is made.

`Layout` is the knobs of a run that decide its cost, as numbers. `Load` is how an even routing spreads a rank's rows, and
`collectives` lists what one micro-batch and one optimizer step issue, with bytes and groups. moesaic.parallel.dry_run holds this
list to what the real model issues, to the byte.

**Bytes** of a collective are those that a rank sends to others, in the cheapest algorithm: of n ranks, all-gather of a result of
B bytes and reduce-scatter of B bytes send B (n - 1) / n, all-reduce twice that, an all-to-all what is not for itself.

Letters: T tokens of a micro-batch on a rank, K experts per token, E experts in all, e on a rank, W ranks of an expert group, N
nodes of one, L of its ranks in a node, D model width.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from moesaic.moe.config import ModelConfig, RouterConfig, require
from moesaic.moe.model import Block
from moesaic.moe.precision import LAYERS
from moesaic.parallel.config import ParallelConfig, check_shared, shared_experts
from moesaic.parallel.mesh import check_degrees, expert_degree

BYTES = {"fp32": 4, "bf16": 2}
ZERO_LIVE = 10**9  # values that ZeRO-3 keeps gathered for another use (stage3_max_live_parameters, DeepSpeed's default)


@dataclass(frozen=True)
class Layout:
    """world ranks, `node` of them neighbours in a node. The rest as in ParallelConfig and TrainConfig, resolved.

    micro_batch   sequences of seq_len tokens of a rank's micro-batch, of which it computes micro_batches a step
    compute       type of weights where they are used, and of activations: fp32 or bf16
    imbalance     rows of the fullest rank's experts over those of an even load
    dispatch, combine   how rows travel out and back: precision.dispatch and precision.combine
    zero          stage of DeepSpeed's ZeRO, which then has the dense parameters; FSDP2 has the experts (None: FSDP2 has all)
    keep, once, limit, target   of the fused path: parallel.fused_keep, fused_once, max_recv_tokens_factor; the key of
                  moesaic.kernels.tiles.TILES, whose tiles decide how much room its heap has
    shared        experts that the shared one is in the fused kernels, 0 where it is beside them (parallel.fused_shared)
    low           whether the fused kernels' products are of fp8, which have other tiles
    apart         whether the fused path's experts are computed apart from its kernels
    numbers       whether those of tokens travel with their rows, for chance depends on them
    quantized, high   precision.layers; precision.high_first, high_last and high_tail: what products of fp8 or fp4 there are
    """

    world: int
    node: int
    expert: int
    replicate: int
    path: str
    reshard: str
    remat: str
    micro_batch: int
    micro_batches: int
    seq_len: int
    compute: str = "bf16"
    imbalance: float = 1.0
    dispatch: str = "high"
    combine: str = "high"
    zero: int | None = None
    keep: bool = False
    once: bool = True
    limit: float | None = None
    target: str = "sm_90a"
    shared: int = 0
    low: bool = False
    apart: bool = False
    numbers: bool = False
    quantized: tuple[str, ...] = LAYERS
    high: tuple[int, int, float] = (0, 0, 0.0)

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.seq_len

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.compute]

    @property
    def shard(self) -> int:
        return self.world // self.replicate

    @property
    def expert_replicate(self) -> int:
        return math.gcd(self.replicate, self.world // self.expert)

    @property
    def expert_shard(self) -> int:
        return self.world // self.expert // self.expert_replicate

    @property
    def expert_node(self) -> int:
        """L: ranks of an expert group that always share a node."""
        return math.gcd(self.expert, self.node)

    @property
    def nodes(self) -> int:
        """N."""
        return self.expert // self.expert_node

    @property
    def hops(self) -> str:
        """How rows travel: local, fused, all_to_all or two_hop; see moesaic.parallel.two_hop.communicating_path."""
        if self.path == "fused":
            return "fused"
        if self.path != "two_hop" or self.expert_node in (1, self.expert):
            return "local" if self.expert == 1 and self.path in ("auto", "local") else "all_to_all"
        return "two_hop"


def layout_of(
    model: ModelConfig, parallel: ParallelConfig, world: int, node: int, micro_batch: int, micro_batches: int, seq_len: int,
    compute: str,
) -> Layout:  # fmt: skip
    """Raises ValueError, naming the knob, where the layout can't be."""
    local = parallel.expert_path == "local"
    expert = expert_degree("1" if local else parallel.expert, model.n_experts, world)
    check_degrees(expert, parallel.replicate, world)
    if parallel.node_size != "auto":
        node = int(parallel.node_size)
        require(expert % node == 0 or node % expert == 0,
                f"parallel.node_size={node}: must divide the expert degree, {expert}, or be a multiple of it")  # fmt: skip
    # Beside ZeRO below stage 3, FSDP2 keeps the experts that it gathered.
    reshard = "never" if parallel.zero_stage in (0, 1, 2) else parallel.reshard
    layout = Layout(
        world, node, expert, parallel.replicate, parallel.expert_path, reshard, parallel.remat, micro_batch,
        micro_batches, seq_len, compute, zero=parallel.zero_stage, keep=parallel.fused_keep, once=parallel.fused_once,
        limit=parallel.max_recv_tokens_factor, shared=shared_experts(model, parallel),
    )  # fmt: skip
    if layout.shared:
        check_shared(layout.nodes)
    return layout


# ---------------------------------------------------------------- rows


def visited(router: RouterConfig, experts: int, part: int) -> float:
    """Probability that a token has one of its K experts among `part` neighbouring ones of `experts`, under uniform routing: over
    all, or over the groups_kept of groups that it keeps, each choice of groups as likely."""
    group, kept, k = experts // router.groups, router.groups_kept, router.top_k
    covered, inside = (
        (part // group, group) if part >= group else (1, part)
    )  # groups that hold of the part, experts in each

    def missed(open_experts: int) -> float:
        within = kept * group
        return math.comb(within - open_experts, k) / math.comb(within, k)

    return sum(
        math.comb(covered, i) * math.comb(router.groups - covered, kept - i) / math.comb(router.groups, kept)
        * (1 - missed(i * inside))
        for i in range(max(0, kept - router.groups + covered), min(covered, kept) + 1)
    )  # fmt: skip


@dataclass(frozen=True)
class Load:
    """Rows and slots of a rank's micro-batch in one layer, whole numbers, the same to and from each peer.

    rows       tokens that visit a given rank of the expert group
    node_rows  tokens that visit a given node of it
    slots      pairs of a token and an expert that go to a given rank
    received   rows that come to the fullest rank, `computed` the slots that it computes: `imbalance` times an even load
    """

    rows: int
    node_rows: int
    slots: int
    received: int
    computed: int


def load_of(model: ModelConfig, layout: Layout) -> Load:
    ranks, nodes = layout.expert, layout.nodes
    rows = round(layout.tokens * visited(model.router, model.n_experts, model.n_experts // ranks))
    node_rows = round(layout.tokens * visited(model.router, model.n_experts, model.n_experts // nodes))
    slots = -(-layout.tokens * model.router.top_k // ranks)
    more = layout.imbalance if ranks > 1 else 1.0  # one rank has all rows, whichever experts they go to
    return Load(rows, node_rows, slots, math.ceil(rows * ranks * more), math.ceil(slots * ranks * more))


# ---------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Group:
    """Parameters that FSDP2 gathers at once: `shapes` of this rank's experts or of the whole, sharded over `ranks` by the first
    dimension that divides where `experts`, else by dimension 0 with padding."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    ranks: int
    copies: int
    compute: str
    experts: bool = False

    @functools.cached_property
    def dims(self) -> list[int]:
        """The dimension along which each is cut."""
        divides = ([d for d, size in enumerate(shape) if size % self.ranks == 0] for shape in self.shapes)
        return [next(iter(found), 0) if self.experts else 0 for found in divides]

    @functools.cached_property
    def padded(self) -> int:
        """Numbers of the whole group, as gathered."""
        return sum(
            -(-shape[dim] // self.ranks) * self.ranks * math.prod(shape) // shape[dim]
            for shape, dim in zip(self.shapes, self.dims, strict=True)
        )

    @property
    def held(self) -> int:
        """Numbers that one rank keeps."""
        return self.padded // self.ranks


def block_groups(model: ModelConfig, layout: Layout, layer: int) -> list[Group]:
    """The groups of a block in the order of gathering: its own, the router's where it needs another type, the experts'."""
    own, name = shapes_of_block(model, layer < model.n_dense_layers).copy(), f"layer {layer}"
    groups = []
    experts = [own.pop(n) for n in list(own) if n.startswith("ffn.experts.")]
    if experts:
        mine = tuple((shape[0] // layout.expert, *shape[1:]) for shape in experts)
        groups.append(
            Group(f"{name} experts", mine, layout.expert_shard, layout.expert_replicate, layout.compute, True)
        )
        if layout.compute != "fp32" and layout.zero is None:
            router = tuple(own.pop(n) for n in list(own) if n.startswith("ffn.router."))
            groups.append(Group(f"{name} router", router, layout.shard, layout.replicate, "fp32"))
    return [_dense_group(f"{name} block", tuple(own.values()), layout), *reversed(groups)]


def _dense_group(name: str, shapes: tuple[tuple[int, ...], ...], layout: Layout) -> Group:
    """ZeRO's stage 3 divides each parameter flat; below that every rank has all. It sees fp32 alone."""
    if layout.zero is None:
        return Group(name, shapes, layout.shard, layout.replicate, layout.compute)
    divided = layout.zero == 3
    flat = tuple((math.prod(shape),) for shape in shapes)
    return Group(name, flat, layout.world if divided else 1, 1 if divided else layout.world, "fp32")


_SHAPES: dict[tuple[str, bool], dict[str, tuple[int, ...]]] = {}


def shapes_of_block(model: ModelConfig, dense: bool) -> dict[str, tuple[int, ...]]:
    """Of the parameters of a block, by name: of the real one, on the meta device."""
    key = repr(model), dense
    if key not in _SHAPES:
        with torch.device("meta"):
            block = Block(model, 0 if dense else model.n_dense_layers)
        _SHAPES[key] = {name: tuple(p.shape) for name, p in block.named_parameters()}
    return _SHAPES[key]


def groups_by_kind(model: ModelConfig, layout: Layout) -> dict[bool, list[Group]]:
    """Those of a dense block (True) and of a MoE one (False), as far as the model has them."""
    first = {True: 0, False: model.n_dense_layers}
    last = {True: model.n_dense_layers, False: model.n_layers}
    return {dense: block_groups(model, layout, first[dense]) for dense in first if first[dense] < last[dense]}


def root_group(model: ModelConfig, layout: Layout) -> Group:
    """Embedding, last norm and head."""
    d, v = model.d_model, model.vocab_size
    shapes = ((v, d), (d,)) if model.tie_embeddings else ((v, d), (d,), (v, d))
    return _dense_group("root", shapes, layout)


def dense_held(model: ModelConfig, layout: Layout) -> int:
    """Numbers of dense parameters that a rank keeps, whoever has them."""
    kinds = groups_by_kind(model, layout)
    count = {True: model.n_dense_layers, False: model.n_layers - model.n_dense_layers}
    blocks = sum(count[dense] * g.held for dense, groups in kinds.items() for g in groups if not g.experts)
    return root_group(model, layout).held + blocks


# ---------------------------------------------------------------- collectives


@dataclass(frozen=True)
class Collective:
    """`layer` -1 stands for the root. phase: forward, backward, or optimizer, once a step. size: bytes of the whole result
    (all-gather), of the whole input (reduce-scatter, all-reduce), or of the rows for all peers, this rank among them
    (all-to-all; `fused`: what kernels store into the memory of others, without a collective). `last`: issued in a step's last
    micro-batch alone. ranks: of the group, `stride` apart."""

    layer: int
    phase: str
    purpose: str
    operation: str
    ranks: int
    stride: int
    size: int
    last: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a rank sends to others."""
        factor = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1, "fused": 1}[self.operation]
        return factor * self.size * (self.ranks - 1) / self.ranks

    @property
    def gathered(self) -> bool:
        return self.operation == "all_gather"


def collectives(model: ModelConfig, layout: Layout, layers: Iterable[int] | None = None) -> Iterator[Collective]:
    """What a rank issues in one micro-batch, and once a step: for the root and `layers`, or all of them.

    Left out: the few numbers of the gradient's norm, of the loss and of figures.
    """
    kinds = groups_by_kind(model, layout)
    yield from _gathers(-1, [root_group(model, layout)], layout)
    for layer in range(model.n_layers) if layers is None else layers:
        dense = layer < model.n_dense_layers
        yield from _gathers(layer, kinds[dense], layout, model.n_layers)
        if not dense and layout.hops != "local":
            yield from _exchanges(layer, model, layout)


def _gathers(layer: int, groups: list[Group], layout: Layout, layers: int = 1) -> Iterator[Collective]:
    """Of weights and gradients. Experts' groups are `expert` ranks apart, those of the rest are neighbours.

    ZeRO joins dense parameters of several layers in one collective: bytes are those of each layer, calls are fewer."""
    for g in groups:
        zero = None if g.experts else layout.zero
        stride = layout.expert if g.experts else 1
        if g.ranks > 1:
            size = g.padded * BYTES[g.compute]
            again = layout.reshard == "always" or (layout.reshard == "auto" and layer >= 0)
            again = again and (zero is None or g.padded * layers > ZERO_LIVE)
            for phase in ("forward", "backward") if again else ("forward",):
                yield Collective(layer, phase, f"weights {g.name}", "all_gather", g.ranks, stride, size)
            yield Collective(layer, "backward", f"gradients {g.name}", "reduce_scatter", g.ranks, stride, 4 * g.padded)
        if g.copies > 1:
            apart = stride * g.ranks
            yield Collective(
                layer, "backward", f"gradients {g.name}", "all_reduce", g.copies, apart, 4 * g.held, last=zero != 2
            )
        if zero in (1, 2) and g.copies > 1:  # each rank updates its share
            yield Collective(
                layer, "optimizer", f"weights {g.name}", "all_gather", g.copies, 1, 4 * g.padded, last=True
            )


def row_bytes(kind: str, width: int, high: int) -> list[int]:
    """Of a row of `width` values, of each tensor that travels; see moesaic.parallel.codec."""
    blocks = -(-width // 128)
    return {
        "high": [high * width], "bf16": [2 * width], "fp8": [width, blocks], "logfmt8": [128 * blocks, 8 * blocks],
        "logfmt10": [160 * blocks, 8 * blocks],
    }[kind]  # fmt: skip


def _exchanges(layer: int, model: ModelConfig, layout: Layout) -> Iterator[Collective]:
    """Of rows, and of what must be known of them; see the heads of moesaic.parallel.expert, two_hop and fused."""
    load, row = load_of(model, layout), model.d_model * layout.width
    e, ranks, places, nodes = model.n_experts // layout.expert, layout.expert, layout.expert_node, layout.nodes
    # (ranks, stride, numbers told to each, rows and slots to each)
    legs = [(ranks, 1, e + 1, load.rows, load.slots)]
    if layout.hops == "fused":  # inside a node
        rows, slots = nodes * (load.rows if layout.once else load.slots), nodes * load.slots
        x = sum(row_bytes(layout.dispatch, model.d_model, layout.width))
        there = [
            ("counts", 4 * (e + layout.shared) * places),
            ("dispatch", rows * x),
            ("slots", (12 + 4 * layout.apart + 8 * layout.numbers) * slots),
            ("combine", slots * row),
        ]
        back = [
            ("dispatch", rows * (row + (0 if layout.keep or layout.apart else x))),
            ("slots", (12 if layout.apart else 16) * slots),
            ("combine", slots * (row + 4)),
        ]
        again = there[:-1] if layout.apart else there  # what is computed again ends with the experts
        for phase, parts in (("forward", there), ("backward", [*again, *back] if layout.remat == "full" else back)):
            for purpose, size in parts:
                yield Collective(layer, phase, purpose, "fused", places, 1, places * size)
        legs = [(nodes, places, 1 + places * e, load.node_rows, load.slots * places)] if nodes > 1 else []
    elif layout.hops == "two_hop":
        legs = [
            (nodes, places, 1 + places + places * e, load.node_rows, load.slots * places),
            (places, 1, nodes * (1 + e), load.rows * nodes, load.slots * nodes),
        ]
    for n, stride, told, rows, slots in legs:
        sizes = [8] * layout.numbers + row_bytes(layout.dispatch, model.d_model, layout.width)
        out = [("dispatch", rows * size) for size in sizes]
        back = [("combine", rows * size) for size in row_bytes(layout.combine, model.d_model, layout.width)]
        forward = [("counts", 8 * told), ("slots", 8 * slots), *out, *back]
        backward = [("combine_grad", rows * row), ("dispatch_grad", rows * row), ("slots_grad", 4 * slots)]
        if layout.remat == "full":
            backward = [*out, *backward]
        for phase, parts in (("forward", forward), ("backward", backward)):
            for purpose, size in parts:
                yield Collective(layer, phase, purpose, "all_to_all", n, stride, n * size)
