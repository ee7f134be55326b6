"""The fused expert path: dispatch, experts and combine of a layer in one persistent kernel, forward and backward (docs/fused.md).

    1. sort this rank's slots by expert, as the local path does
    2. one launch: rows travel into the memory of the ranks that hold their experts, are computed there, and travel back
    3. autograd calls the other one, with where the rows went, h, and the rows that came, if `parallel.fused_keep`

All layers of a run use one symmetric heap for each expert group, in the order in which they run, which is the same on all ranks,
and on one stream. It has room for what a call may bring at most; nothing is dropped, and the host waits for nothing. The other
collectives of the run never wait inside a launch: every rank issues both in the same order.

Where the group spans several nodes there are two hops, `TwoHopFusedPath`: between nodes by all-to-all, as the first leg of
moesaic.parallel.two_hop; inside each, by the kernels, which see the node's ranks and experts alone and have a heap of their own.

**Low precision**: with `precision.dispatch=fp8` rows of X travel as the codes and scales of moesaic.parallel.codec; with
`precision=fp8_block` products are of fp8, of a cast of each weight that is made once a forward pass and kept for backward. Of
other recipes, and on AMD, products are apart from the kernels: moesaic.parallel.apart.

**A shared expert** of width n F (`parallel.fused_shared`) is the sum of n experts of width F that each rank has for its own
tokens alone: `with_shared` gives each token n more slots, of weight 1, to the first n of the e + n experts of its rank. Dispatch
and combine of them stay on the rank, and they are the first in its queue after dispatch, before those that wait for rows of
other ranks. Nothing is told to the kernels but where their matrices are.

**Bytes on the wire** are counted by the kernels, by (rank, phase), and told as those of moesaic.parallel.expert:
`FusedPath.sent`.

Letters: T tokens of this rank, D model width, E experts that the ranks of a heap have in all, e on this rank, n shared ones on
each, F width of an expert, W ranks of a heap, S slots, P phases, I rows that came to this rank from all nodes.
"""

import contextlib
import dataclasses
import functools
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels.permute import Rows
from moesaic.kernels.quantize import pack
from moesaic.kernels.symmetric import Exchange, FusedError, LostError, Regions, make_heap, shared_memory
from moesaic.kernels.tiles import fused_tile, rounding_tile
from moesaic.moe.config import ModelConfig
from moesaic.moe.dispatch import sorted_rows
from moesaic.moe.experts import Experts
from moesaic.moe.low import LowExperts, Weight
from moesaic.moe.model import Transformer
from moesaic.moe.router import Routing
from moesaic.parallel.apart import apart
from moesaic.parallel.config import ParallelConfig, check_shared, shared_experts
from moesaic.parallel.expert import AllToAllPath, Sent
from moesaic.parallel.mesh import Meshes
from moesaic.parallel.overload import Limit, limit_of
from moesaic.parallel.trace import short, unhurried
from moesaic.parallel.two_hop import node_ranks, nodes_mesh

# Polls of a wait a second: an interpreted one's; on CUDA so few that the wait ends before the watchdog ends the process, which
# looks on from outside there. How long a poll takes is not measured; one of an L2 cache takes more than a microsecond.
POLLS = {"cpu": 2_000, "cuda": 300_000}


def most_slots(config: ModelConfig, tokens: int, tile: int) -> int:
    """Slots that a router makes of `tokens` at most."""
    router, experts = config.router, config.n_experts
    slots = tokens * router.top_k
    if router.kind == "expert_choice":
        slots = min(tokens, -(-slots // experts)) * experts
    elif router.rounding != "none":
        slots = min(tokens * experts, slots + experts * (tile - 1))
    return slots


def heap_regions(
    config: ModelConfig,
    parallel: ParallelConfig,
    ranks: int,
    tokens: int,
    compute: torch.dtype,
    target: str | torch.device,
    low: bool = False,
    nodes: int = 1,
    numbers: bool = False,
) -> Regions:
    """Of the heap of a rank that gives and takes the rows of calls of `tokens` at most, among `ranks` in `nodes`, of which those
    of a node share heaps. low: where layers have products of fp8. numbers: where those of tokens travel. Rows of shared experts
    are beside what bounds the others."""
    from moesaic.kernels import fused_ep  # only here: without a GPU it starts Triton's interpreter
    from moesaic.kernels.fused_protocol import regions

    tile, factor = fused_tile(target, low), parallel.max_recv_tokens_factor
    d, f, gated = config.d_model, config.d_expert, config.activation != "relu2"
    slots = most_slots(config, tokens, rounding_tile(target, config.router.rounding_tile))
    rows = ranks * min(slots, tokens * config.n_experts // ranks)
    if factor is not None:
        rows = min(rows, int(factor * slots) + 1)
    ranks, n_experts = ranks // nodes, config.n_experts // nodes
    own = tokens * shared_experts(config, parallel)
    if nodes > 1:  # a rank passes on what the ranks of its place in all nodes have for its own
        slots = nodes * min(slots, tokens * n_experts)
    n_experts += ranks * shared_experts(config, parallel)
    tiles = fused_ep.room(ranks, n_experts, rows + own, tile.m)
    return regions(
        ranks, n_experts, d, compute, slots + own, tiles, tile.m, fused_ep.most_columns(d, tile),
        fused_ep.most_columns(f, tile, gated), not parallel.fused_keep, numbers=numbers,
    )  # fmt: skip


class Space:
    """The heap of an expert group, or of those of its ranks that are in a node, and what all launches in it share.

    group: the ranks that share it; whole: all those that divide the experts (None: the same). low: whether products of fp8 are
    inside the kernels; numbers: whether those of tokens travel.
    """

    def __init__(
        self, group: dist.ProcessGroup, config: ModelConfig, parallel: ParallelConfig, compute: torch.dtype,
        device: torch.device, low: bool = False, whole: dist.ProcessGroup | None = None, numbers: bool = False,
    ) -> None:  # fmt: skip
        from moesaic.kernels.fused_ep import grid_programs  # only here: without a GPU it starts Triton's interpreter

        self.group, self.config, self.parallel, self.compute, self.device = group, config, parallel, compute, device
        self.whole, self.low, self.numbers = whole or group, low, numbers
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.nodes = dist.get_world_size(self.whole) // self.ranks
        self.shared = shared_experts(config, parallel)
        self.experts = config.n_experts // self.nodes + self.ranks * self.shared
        self.programs = grid_programs(device, parallel.comm_sms)
        self.tokens = -1
        self.setting: Any = None  # moesaic.kernels.fused_ep.Setting, when there is room
        self.watched: list[tuple[Any, Tensor, str]] = []
        self.calls = itertools.count()  # of layers
        self.carried = -1  # the layer's call whose rows, and where they belong, are in the heap, of products apart
        self.stream: int | None = None

    def reserve(self, tokens: int) -> None:
        """Room for calls of `tokens` on any rank, the largest number that one of them gives. Collective; no call may be under
        way, and none between its forward and its backward."""
        from moesaic.kernels import fused_ep

        self.finish()
        tokens = max(self.exchange(tokens, self.whole))
        if tokens <= self.tokens:
            return
        config, device = self.config, self.device
        ranks = self.ranks * self.nodes
        shapes = heap_regions(
            config, self.parallel, ranks, tokens, self.compute, device, self.low, self.nodes, self.numbers
        )
        allocate = shared_memory if self.device.type == "cpu" else self.device_memory
        heap = make_heap(self.rank, shapes, self.exchange, allocate)
        spins = min(int(self.parallel.timeout * POLLS[self.device.type]), 2**30)
        self.setting = fused_ep.Setting(
            heap, self.experts, fused_tile(device, self.low), self.parallel.fused_once, spins, self.programs
        )
        self.tokens = tokens

    def exchange(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        group = group or self.group
        values: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(values, value, group=group)
        return values

    def device_memory(self, size: int, exchange: Exchange) -> tuple[Tensor, list[Any], list[int]]:
        """What moesaic.kernels.symmetric.shared_memory gives, of memory that GPUs map over NVLink."""
        if self.ranks == 1:
            memory = torch.zeros(size, dtype=torch.uint8, device=self.device)
            return memory, [memory], [memory.data_ptr()]
        import torch.distributed._symmetric_memory as symmetric

        memory = symmetric.empty(size, dtype=torch.uint8, device=self.device)
        handle = symmetric.rendezvous(memory, self.group)
        memory.zero_()
        torch.cuda.synchronize(self.device)
        exchange(None)  # nobody stores before everybody's memory is zero
        offset = memory.data_ptr() - handle.buffer_ptrs[self.rank]  # a tensor may lie inside what was mapped
        return memory, [handle], [pointer + offset for pointer in handle.buffer_ptrs]

    def finish(self) -> None:
        """Wait for the launches of this rank: none may be under way when memory is given back."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def one_stream(self) -> None:
        """Raises RuntimeError for a second stream: a launch begins when the one before has ended on its rank."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self.stream = stream if self.stream is None else self.stream
        if stream != self.stream:
            raise RuntimeError("parallel.expert_path=fused: all launches of a group must be on one stream")

    def check(self, what: str) -> None:
        """Raises FusedError on every rank if one of them failed: on a CPU in this launch, on CUDA in one that has ended."""
        failed = self.setting.heap.view("failed")
        event = None
        if failed.is_cuda:
            failed, event = failed.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self.watched.append((event, failed, what))
        self.look()

    def look(self) -> None:
        """At the launches that `check` was told of and that have ended. Raises FusedError."""
        from moesaic.kernels.fused_protocol import failures

        while self.watched and (self.watched[0][0] is None or self.watched[0][0].query()):
            _, failed, what = self.watched.pop(0)
            if failed[:, 0].any():
                end = time.monotonic() + 10  # launches under way end, too; what is behind them may never
                while any(event and not event.query() for event, *_ in self.watched) and time.monotonic() < end:
                    time.sleep(0.01)
                found = failures(failed)
                told = "; ".join(map(str, found))
                if self.nodes > 1:
                    what += f", group of ranks {short(dist.get_process_group_ranks(self.group))}"
                kind = FusedError if any(failure.wait in ("room", "call") for failure in found) else LostError
                raise kind(f"parallel.expert_path=fused, {what}: {told}")


class _Sent(Sent):
    """Bytes by (hop, phase), read from the kernels' counters and from those between nodes; to clear it clears them."""

    def __init__(self, counters_WP: Tensor, own: int, exchanged: Sent) -> None:
        from moesaic.kernels.fused_ep import PHASES

        super().__init__(exchanged)
        self.counters_WP, self.exchanged = counters_WP, exchanged
        others = counters_WP.sum(dim=0) - counters_WP[own]
        self.update({("intra", phase): count for phase, count in zip(PHASES, others.tolist(), strict=True) if count})

    def clear(self) -> None:
        super().clear()
        self.exchanged.clear()
        self.counters_WP.zero_()


class FusedPath(AllToAllPath):
    """Experts divided over the ranks of a group that can store into each other's memory, rank w holding experts w * e to (w +
    1) * e.

    Every rank of the group must call it equally often, with a batch of any size that the heap has room for, even an empty one.
    The first call reserves room, if nobody did before. Raises ValueError for more tokens than that, and FusedError, on all
    ranks, where one of them waited in vain for `parallel.timeout` seconds.
    """

    def __init__(
        self, space: Space, limit: Limit | None = None, layer: str = "", exchange: dist.ProcessGroup | None = None
    ) -> None:
        """exchange: the ranks with which rows are exchanged by all-to-all, for `TwoHopFusedPath`."""
        from moesaic.kernels.fused_ep import PHASES

        self.space, self.layer, self.number, self.counting = space, layer, next(_numbers), True
        self.call = 2 * next(space.calls)
        self.low: LowExperts | None = None
        super().__init__(exchange or space.group, node_size=1 if exchange else None, limit=limit, layer=layer)
        self.group = space.whole
        self.counters_WP = torch.zeros(space.ranks, len(PHASES), dtype=torch.int64, device=space.device)
        self.uncounted_WP = torch.zeros_like(self.counters_WP)
        _paths[self.number] = self

    @property
    def counters(self) -> Tensor:
        """To which the kernels add the bytes of this call."""
        return self.counters_WP if self.counting else self.uncounted_WP

    @contextlib.contextmanager
    def launched(self, what: str) -> Iterator[None]:
        """Around a launch."""
        self.space.one_stream()
        with unhurried():  # the kernel's own waits end, and tell who did not come
            yield
        self.space.check(f"{what} of {self.layer}")

    @property
    def sent(self) -> Sent:
        return _Sent(self.counters_WP, self.space.rank, self.exchanged)

    def begin(self, routing: Routing, experts: Experts) -> Routing:
        """`routing` without what there is no room for, in an evaluation too. Raises ValueError for more tokens than fit."""
        tokens = routing.tokens
        if self.space.tokens < 0:
            self.space.reserve(tokens)
        if tokens > self.space.tokens:
            raise ValueError(
                f"parallel.expert_path=fused: {tokens:,} tokens in a call of {self.layer}, its memory is made for "
                f"{self.space.tokens:,}; reserve more, on all ranks"
            )
        self.counting = experts.training
        self.low = experts.low if experts.low is not None and experts.low.active else None
        return routing if experts.training else self.admit(routing)

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        routing = self.begin(routing, experts)
        if self.shared is not None:
            routing = with_shared(routing, self.space.shared, self.space.ranks, self.space.rank)
        rows = sorted_rows(routing, experts, x_TD)
        weights_S = routing.weights_S.index_select(0, rows.slot_R)
        return self.compute(experts, x_TD, weights_S, rows, experts.numbers(routing.tokens, x_TD.device))

    def compute(
        self, experts: Experts, x_TD: Tensor, weights_S: Tensor, rows: Rows, numbers_T: Tensor | None
    ) -> Tensor:  # fmt: skip
        """What all experts of the heap's ranks make of x_TD, each token's rows added up."""
        if self.low is None or self.space.low:
            return experts(x_TD, weights_S, rows, operation=self.fused)
        return apart(self, experts, x_TD, weights_S, rows, numbers_T)

    def fused(
        self, x_TD: Tensor, weights_S: Tensor, rows: Rows, w_up: Tensor, w_down: Tensor, b_up: Tensor | None,
        b_down: Tensor | None, activation: str,
    ) -> Tensor:  # fmt: skip
        low: tuple[Tensor | None, ...] = (None,) * 4
        if self.low is not None:
            low = *coded(self.low.up, w_up), *coded(self.low.down, w_down)
        shared: tuple[Tensor | None, ...] = (None, None)
        if self.shared is not None:
            shared = self.shared.w_up.weight, self.shared.w_down.weight
            if b_up is not None and b_down is not None:
                b_up, b_down = (F.pad(b, (0, 0, self.space.shared, 0)) for b in (b_up, b_down))
        return _op(
            x_TD.contiguous(), weights_S.float().contiguous(), w_up.contiguous(), w_down.contiguous(), rows.source_R,
            rows.expert_R, rows.bag, rows.starts, rows.counts_E, activation, self.number, self.codec is not None, *low, b_up,
            b_down, *shared,
        )[0]  # fmt: skip


class TwoHopFusedPath(FusedPath):
    """`FusedPath` of a group whose ranks are in several nodes, `space` that of its ranks in this one. Three steps:

    1. a token goes once to each node that it needs, to the rank of the same place there, with its slots: all-to-all among
       `across`, the ranks of this place in all nodes; for its sizes the host waits, once a call
    2. that rank calls the kernel with the rows that came as its tokens, and the experts of its node as all there are
    3. each node's sum for a token comes back, and the sums are added up by node

    So it is `AllToAllPath` with nodes for ranks, and the fused operation for the experts'. The rows of an expert and the slots of
    a token stand in an order that the routing alone decides: the same bits on every run.
    """

    def __init__(self, space: Space, across: dist.ProcessGroup, limit: Limit | None = None, layer: str = "") -> None:
        super().__init__(space, limit, layer, across)

    def all_loads(self, load: Tensor, training: bool) -> Tensor:
        """None: what comes here is for all ranks of the node, and the kernel knows how much there is room for."""
        return load.new_empty(0)

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        return self.travel(x_TD, self.begin(routing, experts), experts, functools.partial(self.compute, experts))


def with_shared(routing: Routing, n: int, ranks: int, rank: int) -> Routing:
    """`routing` in which every token visits the n shared experts of its rank as well, of weight 1. Of a rank's experts they are
    the first, of a token's slots the last."""
    experts, tokens = routing.counts_E.numel(), routing.tokens
    counts_We = F.pad(routing.counts_E.view(ranks, -1), (n, 0))
    counts_We[rank, :n] = tokens
    each = counts_We.shape[1]
    expert_S = (routing.expert_S + n * (routing.expert_S // (experts // ranks) + 1)).clamp(max=counts_We.numel())
    own_Tn = torch.arange(rank * each, rank * each + n, device=expert_S.device).expand(tokens, n)
    token_Tn = torch.arange(tokens, device=expert_S.device)[:, None].expand(tokens, n)
    k, weights_Tn = routing.per_token, routing.weights_S.new_ones(tokens, n)
    pairs = ((routing.token_S, token_Tn), (expert_S, own_Tn), (routing.weights_S, weights_Tn))
    if k:
        slots = [torch.cat([routed.view(tokens, k), own], dim=1).flatten() for routed, own in pairs]
        k += n
    else:
        slots = [torch.cat([routed, own.flatten()]) for routed, own in pairs]
    token_S, expert_S, weights_S = slots
    return dataclasses.replace(
        routing, token_S=token_S, expert_S=expert_S, weights_S=weights_S, counts_E=counts_We.flatten(), per_token=k
    )


def as_experts(up: Tensor, down: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(w_up_nGD, w_down_nDF) of a shared expert's matrices, (2nF, D) and (D, nF): the same memory if n = 1, unless cast."""
    n, d = down.shape[1] // width, down.shape[0]
    up, down = up.to(dtype).view(2, n, width, d).transpose(0, 1), down.to(dtype).view(d, n, width).transpose(0, 1)
    return up.reshape(n, 2 * width, d), down.contiguous()


def as_shared(up_nGD: Tensor, down_nDF: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse, of gradients, in the type of `like`."""
    n, g, d = up_nGD.shape
    up, down = up_nGD.view(n, 2, g // 2, d).transpose(0, 1), down_nDF.transpose(0, 1)
    return up.reshape(n * g, d).to(like.dtype), down.reshape(d, -1).to(like.dtype)


@torch.no_grad()
def coded(weight: Weight, w: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, fp32 scales of their blocks) of an expert matrix, as the device's matrix units take them."""
    from moesaic.kernels.quantize_triton import quantize_squares
    from moesaic.kernels.scaled_gemm import e4m3

    form, kind = weight.precision.products["fprop"].sides["w"].form, e4m3(w.device)
    assert form is not None
    if weight.precision.native(w.device):
        packed = quantize_squares(w, form)
    else:  # the same; on a CPU the kernel would be interpreted
        quantized = weight.cast("fprop", "w", w).quantized
        assert quantized is not None
        packed = pack(quantized)
    return packed.codes.view(kind), packed.scales.float() * (2 if kind is torch.float8_e4m3fnuz else 1)


def check_fused(parallel: ParallelConfig, degree: int, device: torch.device) -> None:
    """Raises ValueError where experts divided over `degree` ranks can't have the fused path."""
    from moesaic.kernels.fused_ep import grid_programs

    if parallel.fused_shared:
        check_shared(degree // node_ranks(parallel.node_size, degree))
    grid_programs(device, parallel.comm_sms)


def fused_paths(
    config: ModelConfig, parallel: ParallelConfig, meshes: Meshes, compute: torch.dtype, device: torch.device,
    tokens: int | None, low: bool = False, numbers: bool = False,
) -> Callable[[str], FusedPath]:  # fmt: skip
    """What makes the path of each layer, given the layer's name. Collective.

    low: some layers have products of fp8 in the kernels. numbers: those of tokens travel with their rows.
    tokens: of a call of any rank, at most; None: of the first call.
    """
    group, degree = meshes.experts.get_group("expert"), meshes.expert_parallel
    node = node_ranks(parallel.node_size, degree)
    check_fused(parallel, degree, device)
    if node == degree:
        space = Space(group, config, parallel, compute, device, low, numbers=numbers)
    else:
        mesh = nodes_mesh(meshes, node)
        space = Space(mesh.get_group("place"), config, parallel, compute, device, low, group, numbers)
        across = mesh.get_group("node")
    if tokens is not None:
        space.reserve(tokens)
    if node == degree:
        return lambda layer: FusedPath(space, limit_of(parallel, layer), layer)
    return lambda layer: TwoHopFusedPath(space, across, limit_of(parallel, layer), layer)


def settle(model: Transformer) -> None:
    """Where the host has waited for the device: raises FusedError if a launch failed, before what it computed is used."""
    for layer in model.moe_layers():
        if isinstance(layer.path, FusedPath):
            layer.path.space.look()


# ---------------------------------------------------------------- one operation for autograd and FSDP

_numbers = itertools.count()
_paths: weakref.WeakValueDictionary[int, "FusedPath"] = (
    weakref.WeakValueDictionary()
)  # an operation takes their numbers


def _rows(source: Tensor, expert: Tensor, bag: Tensor, starts: Tensor | None, counts: Tensor) -> Rows:
    return Rows(source, source, expert, bag, starts, counts)


def _low(up_scales: Tensor | None, down_scales: Tensor | None, a_scales: Tensor) -> Any:
    from moesaic.kernels.fused_low import Low

    return None if up_scales is None or down_scales is None else Low(up_scales, down_scales, a_scales)


def _shared(up: Tensor | None, down: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Arranged in forward, and again in backward: kept are the parameters, which FSDP2 lets go between them."""
    return None if up is None or down is None else as_experts(up, down, like.shape[2], like.dtype)


def _new_a_scales(x_TD: Tensor, rows: int, w_down_eDF: Tensor, down_scales: Tensor | None) -> Tensor:
    return x_TD.new_empty(0 if down_scales is None else rows, -(-w_down_eDF.shape[2] // 128), dtype=torch.uint8)


def _forward(
    x_TD: Tensor, weights_S: Tensor, w_up_eGD: Tensor, w_down_eDF: Tensor, source: Tensor, expert: Tensor, bag: Tensor,
    starts: Tensor | None, counts_E: Tensor, activation: str, path: int, coded: bool, up_codes: Tensor | None,
    up_scales: Tensor | None, down_codes: Tensor | None, down_scales: Tensor | None, b_up_eG: Tensor | None,
    b_down_eD: Tensor | None, shared_up: Tensor | None, shared_down: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from moesaic.kernels.fused_ep import forward

    caller = _paths[path]
    setting = caller.space.setting
    a_scales = _new_a_scales(x_TD, setting.heap.regions["rows"][0][0], w_down_eDF, down_scales)
    up, down = (w if codes is None else codes for w, codes in ((w_up_eGD, up_codes), (w_down_eDF, down_codes)))
    with caller.launched("forward"):
        y_TD, h_RG, tables, kept = forward(
            x_TD, weights_S, up, down, _rows(source, expert, bag, starts, counts_E), activation, setting, caller.counters,
            caller.space.parallel.fused_keep, caller.call, coded=coded, low=_low(up_scales, down_scales, a_scales),
            b_up=b_up_eG, b_down=b_down_eD, shared=_shared(shared_up, shared_down, w_down_eDF),
        )  # fmt: skip
    return y_TD, h_RG, tables, x_TD.new_empty(0) if kept is None else kept, a_scales


def _backward(
    dy_TD: Tensor, x_TD: Tensor, h_RG: Tensor, kept: Tensor, tables: Tensor, weights_S: Tensor, up: Tensor, down: Tensor,
    up_scales: Tensor | None, down_scales: Tensor | None, a_scales: Tensor, source: Tensor, expert: Tensor, bag: Tensor,
    starts: Tensor | None, counts_E: Tensor, b_down_eD: Tensor | None, shared_up: Tensor | None, shared_down: Tensor | None,
    activation: str, path: int, coded: bool,
) -> list[Tensor]:  # fmt: skip
    """up, down: the experts' matrices, or their codes. Gradients of weights are of shared experts, then of the others."""
    from moesaic.kernels.fused_ep_backward import backward

    caller = _paths[path]
    with caller.launched("backward"):
        return backward(
            dy_TD, x_TD, h_RG, kept if kept.numel() else None, tables, weights_S, up, down,
            _rows(source, expert, bag, starts, counts_E), activation, caller.space.setting, caller.counters_WP,
            caller.call + 1, coded=coded, low=_low(up_scales, down_scales, a_scales), b_down=b_down_eD,
            shared=_shared(shared_up, shared_down, down),
        )  # fmt: skip


_op = torch.library.custom_op("moesaic::fused_experts", _forward, mutates_args=())
_op_backward = torch.library.custom_op("moesaic::fused_experts_backward", _backward, mutates_args=())


@_op.register_fake
def _(
    x_TD: Tensor, weights_S: Tensor, w_up_eGD: Tensor, w_down_eDF: Tensor, source: Tensor, expert: Tensor, bag: Tensor,
    starts: Tensor | None, counts_E: Tensor, activation: str, path: int, coded: bool, *low: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from moesaic.kernels.fused_low import new_kept
    from moesaic.kernels.fused_protocol import tables_size

    space = _paths[path].space
    rows = space.setting.heap.regions["rows"][0][0]
    tables = weights_S.new_empty(tables_size(space.ranks, space.experts), dtype=torch.int32)
    kept = new_kept(x_TD, rows, coded) if space.parallel.fused_keep else x_TD.new_empty(0)
    a_scales = _new_a_scales(x_TD, rows, w_down_eDF, low[3])
    return torch.empty_like(x_TD), x_TD.new_empty(rows, w_up_eGD.shape[1]), tables, kept, a_scales


@_op_backward.register_fake
def _(
    dy_TD: Tensor, x_TD: Tensor, h_RG: Tensor, kept: Tensor, tables: Tensor, weights_S: Tensor, up: Tensor, down: Tensor,
    *rest: Any,
) -> list[Tensor]:  # fmt: skip
    b_down, n_experts = rest[-6], up.shape[0] + _paths[rest[-2]].space.shared
    biases = [] if b_down is None else [b_down.new_empty(n_experts, up.shape[1]), torch.empty_like(b_down)]
    dw_up, dw_down = (x_TD.new_empty(n_experts, *w.shape[1:]) for w in (up, down))
    return [torch.empty_like(x_TD), torch.empty_like(weights_S), dw_up, dw_down, *biases]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, weights_S, w_up, w_down, source, expert, bag, starts, counts_E, ctx.activation, ctx.path, ctx.coded, *rest = (
        inputs
    )
    *low, _, b_down, shared_up, shared_down = rest
    _, h_RG, tables, kept, a_scales = output
    up, up_scales, down, down_scales = low if low[0] is not None else (w_up, None, w_down, None)
    ctx.save_for_backward(
        x_TD,
        h_RG,
        kept,
        tables,
        weights_S,
        up,
        down,
        up_scales,
        down_scales,
        a_scales,
        source,
        expert,
        bag,
        starts,
        counts_E,
        b_down,
        shared_up,
        shared_down,
    )
    ctx.mark_non_differentiable(h_RG, tables, kept, a_scales)
    ctx.set_materialize_grads(False)  # else backward is given zeros as large as h and kept


def _differentiate(ctx: Any, dy_TD: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dx_TD, dweights_S, dw_up, dw_down, *biases = _op_backward(
        dy_TD.contiguous(), *saved, ctx.activation, ctx.path, ctx.coded
    )
    shared: tuple[Tensor | None, ...] = (None, None)
    if saved[-1] is not None:
        n = dw_up.shape[0] - saved[6].shape[0]
        shared = as_shared(dw_up[:n], dw_down[:n], saved[-1])
        dw_up, dw_down = dw_up[n:], dw_down[n:]
    return dx_TD, dweights_S, dw_up, dw_down, *[None] * 12, *(biases or (None, None)), *shared


_op.register_autograd(_differentiate, setup_context=_save)
