"""The router: which experts a token visits, and with what weight.

Letters: T tokens, D model width, E experts, K experts per token.

The routing domain is one rank's micro-batch: `counts_E` and the losses of moesaic.moe.balance are taken over the tokens of
one call. Everything here runs in fp32 whatever the model computes in: a bf16 score decides ties by rounding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.moe.config import ModelConfig


@dataclass(frozen=True)
class Routing:
    """What a router decides, and all that an expert path may know of it.

    experts_TK   int64, expert ids by falling probability; equal probabilities by rising id
    weights_TK   fp32, what each expert's output is multiplied with; carries the gradient to the router
    counts_E     int64, rows of each expert; sums to T * K
    """

    experts_TK: Tensor
    weights_TK: Tensor
    counts_E: Tensor


def stable_topk(scores_TE: Tensor, k: int) -> Tensor:
    """Ids of the k largest scores of each row, largest first, ties to the lower id. fp32 (T, E) -> int64 (T, k).

    `torch.topk` leaves the order of ties open, and backends differ. So the score, as an integer of the same order, and the
    reversed id are packed into one int64: no two keys of a row are equal.
    """
    bits = scores_TE.detach().contiguous().view(torch.int32).long()
    # Two's complement orders positive floats rightly and negative ones backwards. Adding 0.0 first would make -0.0 equal 0.0;
    # a softmax yields no negative number at all.
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    reversed_ids = torch.arange(scores_TE.shape[1] - 1, -1, -1, device=scores_TE.device)
    return (ordered * 2**20 + reversed_ids).topk(k, dim=1).indices


def count_rows(experts_TK: Tensor, n_experts: int) -> Tensor:
    """Rows per expert, int64 (E,). Unlike `bincount`, needs no synchronisation with the host."""
    ids = experts_TK.flatten()
    return torch.zeros(n_experts, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))


class Router(nn.Module):
    """Linear scores, softmax, top-K. x_TD -> (Routing, logits_TE fp32, probabilities_TE fp32)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.router
        self.weight_ED = nn.Parameter(torch.empty(config.n_experts, config.d_model))

    def forward(self, x_TD: Tensor) -> tuple[Routing, Tensor, Tensor]:
        logits_TE = F.linear(x_TD.float(), self.weight_ED.float())
        probs_TE = logits_TE.softmax(dim=1)
        experts_TK = stable_topk(probs_TE, self.config.top_k)
        weights_TK = probs_TE.gather(1, experts_TK)
        if self.config.renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
        counts_E = count_rows(experts_TK, logits_TE.shape[1])
        return Routing(experts_TK, weights_TK, counts_E), logits_TE, probs_TE
