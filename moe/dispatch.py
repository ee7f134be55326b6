"""From a routing to rows sorted by expert, and the path on one device.

Letters: T tokens, N rows a call starts from (T, or what other ranks sent), D model width, E experts, e experts held here,
K slots per row, R routed rows.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moesaic.moe.experts import Experts
from moesaic.moe.router import Routing


@dataclass(frozen=True)
class Rows:
    """R rows sorted by expert, and the way there and back.

    source_R      int64, row r is a copy of input row source_R[r]
    position_NK   int64, the K places of input row n among the R, in slot order: a sum over them has one fixed order
    counts_e      int64, rows of each expert held here; sums to R
    """

    source_R: Tensor
    position_NK: Tensor
    counts_e: Tensor


def sort_rows(expert_NK: Tensor, counts_e: Tensor) -> Rows:
    """Stable sort of the N * K slots by expert id, so that an expert's rows keep the order of their tokens."""
    k = expert_NK.shape[1]
    slot_R = expert_NK.flatten().argsort(stable=True)
    position_NK = torch.empty_like(slot_R).scatter_(0, slot_R, torch.arange(slot_R.numel(), device=slot_R.device))
    return Rows(slot_R // k, position_NK.view(-1, k), counts_e)


class ExpertPath(Protocol):
    """The way of tokens through the experts: dispatch, compute, combine. One call, so that one kernel can replace all of it.

    x_TD and a routing of its T tokens -> y_TD = sum_k weights_TK[:, k] * expert_{experts_TK[:, k]}(x_TD), summed in k order.
    """

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor: ...


class LocalPath:
    """All experts on this device: nothing travels."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        rows = sort_rows(routing.experts_TK, routing.counts_E)
        return experts(x_TD, routing.weights_TK, rows)
