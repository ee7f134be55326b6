"""A limit on the rows a rank computes: an imbalance becomes one line, or a counted drop, instead of an out-of-memory kill.

Of a call of one layer, over the W ranks of an expert group:

    load_w = slots that go to rank w: a token counts once for each of its experts there
    limit  = ceil(parallel.max_recv_tokens_factor * (sum of load_w) / W)

A factor of 1 is what perfect balance brings, W all slots on one rank. Nothing is ever allocated for the limit; it only says
where memory may end. It holds in training: an evaluation keeps nothing for backward (but moesaic.parallel.fused has no more
memory for it, and drops there, too).

`parallel.overload=error`: the run ends, on every rank with the same line. `drop`: each source rank gets its share of an
overloaded rank's limit, in proportion to what it would send there, and keeps its slots of highest router weight, of equal ones
the earlier. So a source drops before it sends, and the rule is a function of the W routings alone:

    share of source s = floor(limit * (slots of sources 0..s) / load_w) - floor(limit * (slots of sources 0..s-1) / load_w)

Weights of the kept slots stay as they are; a dropped one gets no gradient and counts as `dropped` among the routing's figures.

Letters: W ranks of the group, S slots, E experts, e on this rank.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.moe.router import Routing, count_rows
from moesaic.parallel.config import ParallelConfig


class OverloadError(ValueError):
    """A rank's load is above the limit. Raised on every rank with the same line."""


@dataclass(frozen=True)
class Limit:
    """`factor` and `overload` are the knobs; `layer` names the layer in an error."""

    factor: float
    overload: str
    layer: str = "a layer"

    def check(self, loads: list[int], ranks: int) -> None:
        """Raises OverloadError where one of `loads`, those of all ranks in order, is above the limit of its group of `ranks`."""
        worst: tuple[float, int] | None = None
        for rank, load in enumerate(loads):
            first = rank // ranks * ranks
            mean = sum(loads[first : first + ranks]) / ranks
            if load > math.ceil(self.factor * mean - 1e-6) and (worst is None or load / mean > worst[0]):
                worst = load / mean, rank
        if worst:
            times, rank = worst
            raise OverloadError(
                f"parallel.max_recv_tokens_factor={self.factor:g}: rank {rank} would receive {loads[rank]:,} rows in "
                f"{self.layer}, {times:.2f} times an even load; raise it, or leave rows out with parallel.overload=drop"
            )


def limit_of(parallel: ParallelConfig, layer: str) -> Limit | None:
    """The limit that the knobs set, if they do."""
    factor = parallel.max_recv_tokens_factor
    return None if factor is None else Limit(factor, parallel.overload, layer)


def shed(routing: Routing, slots_WW: Tensor, rank: int, factor: float) -> Routing:
    """`routing` of source `rank` without the slots that overloaded ranks can't take. slots_WW[s, w], int64: from s to w."""
    return without(routing, slots_to_keep(routing, slots_WW, rank, factor))


def slots_to_keep(routing: Routing, slots_WW: Tensor, rank: int, factor: float) -> Tensor:
    """bool (S,): the used slots of source `rank` that `shed` leaves."""
    ranks = len(slots_WW)
    experts = routing.counts_E.numel()
    limit = (slots_WW.sum().double() * factor / ranks - 1e-6).ceil().long()
    load_W = slots_WW.sum(dim=0)
    upto_WW = slots_WW.cumsum(0) * torch.minimum(load_W, limit) // load_W.clamp(min=1)
    kept_W = upto_WW[rank] - (upto_WW[rank - 1] if rank else 0)

    rank_S = routing.expert_S // (experts // ranks)  # W where unused
    slot_S = routing.weights_S.detach().argsort(descending=True, stable=True)
    slot_S = slot_S[rank_S[slot_S].argsort(stable=True)]
    start_W = slots_WW[rank].cumsum(0) - slots_WW[rank]
    # A column for unused slots, of which none is kept.
    start_W, kept_W = (torch.cat([t, t.new_zeros(1)]) for t in (start_W, kept_W))
    place_S = torch.arange(slot_S.numel(), device=slot_S.device) - start_W[rank_S[slot_S]]
    keep_S = torch.zeros_like(rank_S, dtype=torch.bool)
    return keep_S.scatter_(0, slot_S, place_S < kept_W[rank_S[slot_S]])


def without(routing: Routing, keep_S: Tensor) -> Routing:
    """`routing` with the slots of `keep_S` alone; the used ones that it loses count as dropped."""
    experts = routing.counts_E.numel()
    expert_S = routing.expert_S.masked_fill(~keep_S, experts)
    counts_E = count_rows(expert_S, experts + 1)[:-1]
    return dataclasses.replace(
        routing, expert_S=expert_S, weights_S=routing.weights_S * keep_S, counts_E=counts_E, per_token=0,
        dropped=routing.dropped + (routing.counts_E - counts_E).sum(),
    )  # fmt: skip
