"""The all-to-all expert path: tokens travel to the ranks that hold their experts, and sums of expert outputs travel back.

    1. tell each peer how much will come: rows, and slots of each of its experts; the host waits for these numbers, once
    2. send the slots: for each, which row it belongs to and the router's weight
    3. send the rows: a token goes once to every rank on which it has experts, however many
    4. the rank's experts compute; their operation gathers by index and adds up what a row gets from several experts
    5. these sums go back the same way and are added up per token

Step 3 and step 5 are each other's adjoint, so the gradient of dispatch is combine and the reverse, with weights' gradients
beside the rows'. `AllToAllPath` does it in one leg, an exchange among all ranks of the group; moesaic.parallel.two_hop in two.

**The order of sums** is fixed: a token's outputs are added by expert on each rank, then by rank within each node, then by node.
The rows of an expert stand in the order of their source ranks. So the same inputs give the same bits on every run, and one leg
gives the same bits as two: outputs, and all gradients. `LocalPath` adds in another order and differs in the last bits.

**Bytes on the wire**, sent by one rank to others, itself left out; `AllToAllPath.sent` counts them by hop (inter: to another
node, intra: within one) and phase. With n_w of this rank's tokens visiting rank w with s_w slots, m_w and r_w the same from
rank w to this one, e experts a rank, b bytes a row (D times those of a number), for each other rank w:

    counts    8 (e + 1)       slots     8 s_w     dispatch        n_w b     combine         m_w b       forward
              and 8 n_w for dispatch, the numbers of tokens, where a recipe rounds by chance
    combine_grad    n_w b     dispatch_grad     m_w b     slots_grad      4 r_w                         backward

What a limit on the load gathers, 8 bytes of each rank or 8 W, is left out: how it travels is the backend's choice.

Letters: T tokens of this rank, D model width, E experts in all, e on this rank, W ranks of the group, S slots, G targets of a
leg, I inputs of a leg, R rows sent, N rows received.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.kernels.permute import Rows, sum_bags
from moesaic.moe.dispatch import slots_by_expert
from moesaic.moe.experts import Experts
from moesaic.moe.layer import MoE
from moesaic.moe.replay import once
from moesaic.moe.router import Routing
from moesaic.parallel import shared, trace
from moesaic.parallel.overload import Limit, slots_to_keep, without

Sent = Counter[tuple[str, str]]


def hops(ranks: Sequence[int], own: int, node_size: int) -> tuple[str, ...]:
    """The hop to each of `ranks` of an expert group, as `Link` tells them."""
    return tuple("" if r == own else "intra" if r // node_size == own // node_size else "inter" for r in ranks)


class Codec(Protocol):
    """Another form of rows for the way out, such as fp8 values and their scales, or for the way back. Gradients travel as they
    are: as if nothing had been encoded.

    encode: x_TD -> payload tensors, each with T rows, of types the backend carries (fp8 viewed as uint8 for gloo); each token
    alone, for rows are picked from them. decode: those of N rows -> x_ND of type `dtype`.
    """

    def encode(self, x_TD: Tensor) -> Sequence[Tensor]: ...

    def decode(self, payload: Sequence[Tensor], dtype: torch.dtype) -> Tensor: ...


# ---------------------------------------------------------------- one leg of the way


@dataclass(frozen=True)
class Link:
    """The ranks of an exchange. hops[w]: `inter` where rank w of the group is in another node, `intra` in this one, ``
    itself. `layer` is whose rows they exchange, by name."""

    group: dist.ProcessGroup
    hops: tuple[str, ...]
    layer: str = ""

    def start(
        self, rows: Tensor, send: list[int], receive: list[int], phase: str, sent: Sent | None
    ) -> Callable[[], Tensor]:
        """Begins an uneven all-to-all over dimension 0: `send[w]` rows go to rank w, `receive[w]` come from it, in rank order.
        Adds their bytes to `sent`. What it returns waits for the rows that came."""
        if sent is not None:
            bytes_of_row = rows.element_size() * rows.shape[1:].numel()
            for hop, count in zip(self.hops, send, strict=True):
                if hop:
                    sent[hop, phase] += count * bytes_of_row
        result = rows.new_empty(sum(receive), *rows.shape[1:])
        with trace.within(f"{self.layer} {phase}"):
            work = shared.all_to_all_single(result, rows.contiguous(), receive, send, group=self.group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return result

        return wait

    def tell(self, told_G: Tensor, sent: Sent | None) -> Callable[[], Tensor]:
        """Row w of `told_G` for rank w. What it returns waits for what they told this one."""
        return self.start(told_G, [1] * len(self.hops), [1] * len(self.hops), "counts", sent)


@dataclass(frozen=True)
class Leg:
    """One exchange of a call: each of its inputs goes as a row to some of G targets, and its sum comes back.

    source_R    int64, the input that each row copies; rows are sorted by target, then by input
    sums        one or two sums in turn that make an input's result of its rows': (bag, starts) of `sum_bags`
    slot_S      int64, the slots that travel with the rows, sorted by target, of `slots` in all
    rows_out, rows_in, slots_out, slots_in    to and from each target
    """

    link: Link
    source_R: Tensor
    sums: list[tuple[Tensor, Tensor]]
    slot_S: Tensor
    slots: int
    rows_out: list[int]
    rows_in: list[int]
    slots_out: list[int]
    slots_in: list[int]
    sent: Sent | None

    def go(self, x_ID: Tensor, phase: str) -> Callable[[], Tensor]:
        return self.link.start(x_ID.index_select(0, self.source_R), self.rows_out, self.rows_in, phase, self.sent)

    def come_back(self, y_ND: Tensor, phase: str, codec: Codec | None = None) -> Tensor:
        payload = codec.encode(y_ND) if codec else [y_ND]
        waits = [self.link.start(part, self.rows_in, self.rows_out, phase, self.sent) for part in payload]
        payload = [wait() for wait in waits]
        y_RD = codec.decode(payload, y_ND.dtype) if codec else payload[0]
        for bag, starts in self.sums:
            y_RD = sum_bags(y_RD, bag, starts)
        return y_RD

    def send_slots(self, row_S: Tensor, weights_S: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Of each slot that travels: its row, counted from the first row for its target, and its weight."""
        packed_S2 = torch.stack([row_S.int(), weights_S.float().view(torch.int32)], dim=1)
        wait = self.link.start(packed_S2, self.slots_out, self.slots_in, "slots", self.sent)

        def came() -> tuple[Tensor, Tensor]:
            packed_S2 = wait()
            return packed_S2[:, 0].long(), packed_S2[:, 1].contiguous().view(torch.float32)

        return came

    def slots_come_back(self, values_S: Tensor) -> Callable[[], Tensor]:
        wait = self.link.start(values_S, self.slots_in, self.slots_out, "slots_grad", self.sent)

        def came() -> Tensor:
            values_S = wait()
            return values_S.new_zeros(self.slots).index_copy_(0, self.slot_S, values_S)

        return came


def reached(target_S: Tensor, input_S: Tensor, targets: int, inputs: int) -> Tensor:
    """bool (G, I): whether the input has a slot with the target. Target G stands for none."""
    has = torch.zeros((targets + 1) * inputs, dtype=torch.bool, device=target_S.device)
    return has.index_fill_(0, target_S * inputs + input_S, True).view(targets + 1, inputs)[:targets]


def fan_out(has_GI: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A row for each of the `rows` pairs in `has_GI`, sorted by target, then input. The host knows their number already: to ask
    for it again would be a wait for the device.

    Returns source_R, the input of each row; place_GI, the row of each pair, counted from the target's first; and (bag, starts),
    with which `sum_bags` makes each input's sum, by target.
    """
    input_GI = torch.arange(has_GI.shape[1], device=has_GI.device).expand_as(has_GI)
    row_GI = (has_GI.flatten().cumsum(0) - 1).view_as(has_GI)
    rows_G = has_GI.sum(dim=1)
    source_R = compact(input_GI.flatten(), has_GI.flatten(), rows)
    bag = compact(row_GI.T.flatten(), has_GI.T.flatten(), rows)
    return source_R, row_GI - (rows_G.cumsum(0) - rows_G)[:, None], bag, ends(has_GI.sum(dim=0))


def compact(values: Tensor, keep: Tensor, kept: int) -> Tensor:
    """values[keep], whose number is known."""
    place = torch.where(keep, keep.cumsum(0) - 1, kept)
    return values.new_zeros(kept + 1).scatter_(0, place, values)[:kept]


def ends(counts: Tensor) -> Tensor:
    """0 and the running sums: where each part begins, and where the last one ends."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def read(*tensors: Tensor) -> list[list[int]]:
    """Integers on the host, in one wait for the device."""
    values = torch.cat([t.flatten() for t in tensors]).tolist()
    stops = list(itertools.accumulate(t.numel() for t in tensors))
    return [values[stop - t.numel() : stop] for stop, t in zip(stops, tensors, strict=True)]


def absolute(row_S: Tensor, rows_in_G: Tensor, slots_in_G: Tensor) -> Tensor:
    """Rows counted from each source's first -> counted from the first of all."""
    first_G = rows_in_G.cumsum(0) - rows_in_G
    return row_S + first_G.repeat_interleave(slots_in_G, output_size=row_S.numel())


def moved(size_B: Tensor, order_B: Tensor, values: int) -> Tensor:
    """Of `values` that lie in blocks of these sizes, the places from which to take them so that blocks lie in `order_B`."""
    sizes = size_B[order_B]
    shift_B = ends(size_B)[order_B] - ends(sizes)[:-1]
    return torch.arange(values, device=size_B.device) + shift_B.repeat_interleave(sizes, output_size=values)


def arrived(
    row_S: Tensor, block_expert_B: Tensor, block_source_B: Tensor, slots_B: Tensor, experts: int, inputs: int
) -> Rows:
    """Slots as they arrive, blocks of one expert and source rank -> sorted by expert, then source: the same however they came.

    `row_S` is the input row of each. A row's outputs are added by expert.
    """
    slots, blocks = row_S.numel(), slots_B.numel()
    order_B = (block_expert_B * (blocks + 1) + block_source_B).argsort(stable=True)
    order_R = moved(slots_B, order_B, slots)
    source_R = row_S[order_R]
    counts_E = torch.zeros(experts, dtype=torch.int64, device=row_S.device).scatter_add_(0, block_expert_B, slots_B)
    expert_R = block_expert_B[order_B].repeat_interleave(slots_B[order_B], output_size=slots)
    per_row = torch.zeros(inputs, dtype=torch.int64, device=row_S.device)
    starts = ends(per_row.scatter_add_(0, source_R, torch.ones_like(source_R)))
    return Rows(source_R, order_R, expert_R, source_R.argsort(stable=True), starts, counts_E)


# ---------------------------------------------------------------- the way, with its gradient


class _Dispatch(torch.autograd.Function):
    """(x_TD, weights_S) -> (x_ND, weights of the slots that arrived, which were sent already when the legs were planned)."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_S: Tensor, plan: "Plan", codec: Codec | None) -> tuple[Tensor, Tensor]:
        ctx.legs = plan.legs
        payload = codec.encode(x_TD) if codec else [x_TD]
        for leg in plan.legs:
            travelling = [leg.go(part, "dispatch") for part in payload]
            if leg is plan.legs[-1]:
                came_S, _ = plan.arrive()
            payload = [wait() for wait in travelling]
        return codec.decode(payload, x_TD.dtype) if codec else payload[0], came_S.clone()

    @staticmethod
    def backward(ctx: Any, dx_ND: Tensor, dweights_S: Tensor) -> tuple[Tensor, Tensor, None, None]:
        for leg in reversed(ctx.legs):
            dweights = leg.slots_come_back(dweights_S)
            dx_ND, dweights_S = leg.come_back(dx_ND, "dispatch_grad"), dweights()
        return dx_ND, dweights_S, None, None


class _Combine(torch.autograd.Function):
    """y_ND -> y_TD, the sum of each token's rows; the adjoint of `_Dispatch`."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, legs: list[Leg], codec: Codec | None) -> Tensor:
        ctx.legs = legs
        for leg in reversed(legs):
            y_ND = leg.come_back(y_ND, "combine", codec)
        return y_ND

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None, None]:
        for leg in ctx.legs:
            dy_TD = leg.go(dy_TD, "combine_grad")()
        return dy_TD, None, None


@dataclass(frozen=True)
class Plan:
    """The legs of a call; `arrive` waits for the slots that come to this rank and gives their weights, and the rows that its
    experts compute, the same each time. Rows travel meanwhile."""

    legs: list[Leg]
    arrive: Callable[[], tuple[Tensor, Rows]]


class AllToAllPath:
    """Experts divided over the ranks of `group`, rank w holding experts w * e to (w + 1) * e, in one exchange among all of
    them.

    Every `node_size` neighbouring ranks of the group are in one node (null: all); it divides the group. It decides how bytes
    are counted and the order of sums, nothing else. Every rank of the group must call the path equally often, with a batch of
    any size, even an empty one. The host waits once a call: NCCL and gloo take the sizes of an uneven exchange from the host.

    `sent` counts bytes by (hop, phase) since it was last cleared, of calls whose experts are in training mode.
    """

    shared: Any = None

    def __init__(
        self,
        group: dist.ProcessGroup,
        node_size: int | None = None,
        codec: Codec | None = None,
        limit: Limit | None = None,
        layer: str = "",
    ) -> None:
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.node_size, self.codec, self.limit = node_size or self.ranks, codec, limit
        self.group = group  # all ranks that divide the experts
        self.back: Codec | None = None
        assert self.ranks % self.node_size == 0, (self.ranks, self.node_size)
        self.link = Link(group, hops(range(self.ranks), self.rank, self.node_size), layer)
        self.exchanged: Sent = Counter()

    @property
    def sent(self) -> Sent:
        return self.exchanged

    def admit(self, routing: Routing) -> Routing:
        limit = self.limit
        if limit is None or limit.overload != "drop":
            return routing

        def keep_S() -> Tensor:
            ranks = dist.get_world_size(self.group)
            slots_W = routing.counts_E.view(ranks, -1).sum(dim=1)
            slots_WW = slots_W.new_empty(ranks * ranks)
            dist.all_gather_single(slots_WW, slots_W, group=self.group)
            return slots_to_keep(routing, slots_WW.view(ranks, -1), dist.get_rank(self.group), limit.factor)

        return without(routing, once("admitted", keep_S))

    def all_loads(self, load: Tensor, training: bool) -> Tensor:
        """The slots that come to each rank of the run, from those that come to this one; none where no limit asks for them."""
        if self.limit is None or self.limit.overload != "error" or not training:
            return load.new_empty(0)
        loads = load.new_empty(dist.get_world_size())
        dist.all_gather_single(loads, load.view(1))
        return loads

    def check(self, loads: list[int]) -> None:
        if loads and self.limit:
            self.limit.check(loads, self.ranks)

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        return self.travel(x_TD, routing, experts, experts)

    def travel(self, x_TD: Tensor, routing: Routing, experts: Experts, compute: Callable[..., Tensor]) -> Tensor:
        """Out, through `compute`, called as the experts are, and back."""
        plan = once("plan", lambda: self.plan(x_TD, routing, experts))
        ids_N = experts.numbers(x_TD.shape[0], x_TD.device)
        for leg in plan.legs if ids_N is not None else ():
            ids_N = leg.go(ids_N, "dispatch")()  # type: ignore[arg-type]
        x_ND, weights_S = _Dispatch.apply(x_TD, routing.weights_S, plan, self.codec)
        _, rows = plan.arrive()
        y_ND = compute(x_ND, weights_S.index_select(0, rows.slot_R), rows, ids_N)
        return _Combine.apply(y_ND, plan.legs, self.back)

    def plan(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Plan:
        """Tells the others what will come, and begins to send the slots. Raises OverloadError where `limit` asks for it."""
        ranks, tokens, training = self.ranks, routing.tokens, experts.training
        sent = self.exchanged if training else None
        counts_We = routing.counts_E.view(ranks, -1)
        each = counts_We.shape[1]  # experts of a rank
        rank_S = routing.expert_S // each  # W where unused
        has_WT = reached(rank_S, routing.token_S, ranks, tokens)
        told = self.link.tell(torch.cat([has_WT.sum(dim=1, keepdim=True), counts_We], dim=1), sent)
        slot_S = slots_by_expert(routing, experts, x_TD)
        told_W = told()
        rows_in_W, slots_in_W = told_W[:, 0], told_W[:, 1:].sum(dim=1)
        node_NT = has_WT.view(ranks // self.node_size, self.node_size, tokens).any(dim=1)
        loads = self.all_loads(slots_in_W.sum(), training)
        out, slots_out, rows_in, slots_in, (node_rows,), loads_here = read(
            has_WT.sum(dim=1), counts_We.sum(dim=1), rows_in_W, slots_in_W, node_NT.sum(), loads
        )
        self.check(loads_here)

        source_R, place_WT, bag, starts = fan_out(has_WT, sum(out))
        sums = [(bag, starts)]
        if 1 < self.node_size < ranks:  # as two legs add: within each node, then over nodes
            in_node = has_WT.view(ranks // self.node_size, self.node_size, tokens).sum(dim=1).T.flatten()
            within = ends(compact(in_node, in_node > 0, node_rows))
            sums = [(bag, within), (torch.arange(node_rows, device=bag.device), ends(node_NT.sum(dim=0)))]
        slot_S = slot_S[: sum(slots_out)]
        leg = Leg(self.link, source_R, sums, slot_S, rank_S.numel(), out, rows_in, slots_out, slots_in, sent)
        slots = leg.send_slots(place_WT[rank_S[slot_S], routing.token_S[slot_S]], routing.weights_S[slot_S])

        @functools.cache
        def arrive() -> tuple[Tensor, Rows]:
            row_S, weights_S = slots()
            blocks = torch.arange(told_W[:, 1:].numel(), device=row_S.device)
            row_S = absolute(row_S, rows_in_W, slots_in_W)
            rows = arrived(row_S, blocks % each, blocks // each, told_W[:, 1:].flatten(), each, sum(rows_in))
            return weights_S, rows

        return Plan([leg], arrive)


def wire_figures(layers: Iterable[MoE], steps: int, device: torch.device) -> dict[str, float]:
    """Bytes that all ranks together sent to others, a step: the mean of the last `steps`, after which counting begins anew.

    moe/wire_inter_bytes, moe/wire_intra_bytes   between nodes, within nodes; of all MoE layers, and of the l-th as
    moe/layer<l>/...

    Forward and backward, rows and metadata, in training; see the head of this file. Collective. None where nothing travels.
    """
    paths = [layer.path for layer in layers]
    if not all(isinstance(path, AllToAllPath) for path in paths) or not paths:
        return {}
    bytes_LH = torch.zeros(len(paths), 2, dtype=torch.float64, device=device)
    for i, path in enumerate(paths):
        assert isinstance(path, AllToAllPath)
        for j, hop in enumerate(("inter", "intra")):
            bytes_LH[i, j] = sum(count for (h, _), count in path.sent.items() if h == hop)
        path.sent.clear()
    dist.all_reduce(bytes_LH)
    rows = [("moe/", bytes_LH.sum(dim=0))] + [(f"moe/layer{i}/", row) for i, row in enumerate(bytes_LH)]
    return {
        f"{prefix}wire_{hop}_bytes": value / steps
        for prefix, row in rows
        for hop, value in zip(("inter", "intra"), row.tolist(), strict=True)
    }
