"""The K best experts of each token, and their weights, in plain torch: what moesaic.kernels.topk_triton is held to.

    for token t, logits z over E experts:
        score    = softmax(z), or sigmoid(z)
        order    = experts by falling preference, ties to the lower id. Of softmax: z, which falls as the score does, but is
                   not rounded once more; of sigmoid: score + bias, within the token's best groups
        i_1..i_K = the first K of order
        w_k      = scale score[i_k], or scale score[i_k] / sum of the K scores
        shares   = softmax(z), or score / sum of scores: what balance losses look at

Groups (DeepSeek-V3, arXiv 2412.19437, which limits the nodes a token reaches this way): E experts in G equal groups, of which a
token uses the best `kept`; a group is as good as the sum of its two best preferences, ties to the lower group.

Letters: T tokens, E experts, K experts per token.
"""

import torch
from torch import Tensor

# What the kernels take; beyond, torch does it.
MOST_EXPERTS, MOST_K = 4096, 32


def ordered_keys(scores: Tensor) -> Tensor:
    """int64 of the same order as the fp32 scores, in a range of 2^32, so that a tie-breaker fits beside it."""
    # + 0.0: -0.0 becomes 0.0, which it equals
    bits = (scores.detach().float() + 0.0).contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # the bits of negative floats rise as the numbers fall


def stable_topk(scores_TE: Tensor, k: int) -> Tensor:
    """Ids of the k largest scores of each row, largest first, ties to the lower id. fp32 (T, E) -> int64 (T, k).

    `torch.topk` leaves the order of ties open, and backends differ. So score and reversed id are packed into one int64: no two
    keys of a row are equal.
    """
    reversed_ids = torch.arange(scores_TE.shape[1] - 1, -1, -1, device=scores_TE.device)
    return (ordered_keys(scores_TE) * 2**30 + reversed_ids).topk(k, dim=1).indices


def keep_best_groups(scores_TE: Tensor, groups: int, kept: int) -> Tensor:
    """`scores_TE` with -inf outside each token's `kept` best groups of experts."""
    if groups == 1:
        return scores_TE
    grouped = scores_TE.unflatten(1, (groups, scores_TE.shape[1] // groups))
    best = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(dim=2)
    keep = torch.zeros_like(best, dtype=torch.bool).scatter_(1, stable_topk(best, kept), True)
    return grouped.masked_fill(~keep[:, :, None], -torch.inf).flatten(1)


def topk_reference(
    logits_TE: Tensor, bias_E: Tensor | None, k: int, *, sigmoid: bool, renormalize: bool, scale: float = 1.0,
    groups: int = 1, kept: int = 1, given_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(experts_TK, weights_TK, shares_TE) in plain differentiable torch of any floating type."""
    if sigmoid:
        scores_TE = logits_TE.sigmoid()
        shares_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True)
        preference_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    else:
        scores_TE = shares_TE = logits_TE.softmax(dim=1)
        preference_TE = logits_TE
    experts_TK = stable_topk(keep_best_groups(preference_TE, groups, kept), k) if given_TK is None else given_TK
    weights_TK = scores_TE.gather(1, experts_TK)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=1, keepdim=True) + 1e-20)
    return experts_TK, weights_TK * scale, shares_TE
