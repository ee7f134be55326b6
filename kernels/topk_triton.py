"""Router scores in one launch each way: the K best experts, their weights, and the shares. moesaic.kernels.topk says which.

    s = softmax(z), or sigmoid(z);  i_1..i_K = the K best;  w_k = scale s[i_k] (/ sum of the K s);  shares = s / sum of s
    dscore = dw scattered to i_k (of divided weights: (dw_k - <dw, w>) / sum), plus what dshares gives
    dz     = score (dscore - <dscore, score>) of softmax, score (1 - score) dscore of sigmoid

A token's scores are in registers, and each of the K passes takes the largest key that is left. A key is an int64 of the
preference's bits and, below them, the reversed id: no two are equal. Backward makes the scores from the logits again.
Bytes moved: forward 8 T E and 12 T K, backward 12 T E and 12 T K.

Letters: T tokens, E experts, K experts per token, G groups, P experts per group.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.interpret import jit
from moesaic.kernels.topk import MOST_EXPERTS, MOST_K

# ---------------------------------------------------------------- kernels


@jit
def _keys(values, ids):
    """int64 that rise with the values and, among equal ones, fall with the ids; above all, greater than the least int64."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) + (0x7FFFFFFF - ids)


@jit
def _scores(logits, real, SIGMOID: tl.constexpr):
    """(scores, their sum over a token's experts); 0 for what isn't real."""
    if SIGMOID:
        scores = tl.where(real, 1 / (1 + tl.exp(-logits)), 0.0)
    else:
        largest = tl.max(tl.where(real, logits, float("-inf")), axis=1)
        powers = tl.where(real, tl.exp(logits - largest[:, None]), 0.0)
        scores = powers / tl.sum(powers, axis=1)[:, None]
    return scores, tl.sum(scores, axis=1)


@jit
def _topk_kernel(
    logits_TE, bias_E, given_TK, experts_TK, weights_TK, shares_TE, T, scale, E: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    KEPT: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr, GIVEN: tl.constexpr, RENORMALIZE: tl.constexpr,
    BT: tl.constexpr, BG: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    least: tl.constexpr = -(2**63)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    # Experts by group, each group filled up to a power of two.
    column = tl.arange(0, BG * BP)
    e = column // BP * P + column % BP
    exists = (column % BP < P) & (e < E)
    real = (t < T)[:, None] & exists[None, :]
    logits = tl.load(logits_TE + t[:, None] * E + e[None, :], mask=real, other=0.0)
    scores, total = _scores(logits, real, SIGMOID)
    shares = scores / total[:, None] if SIGMOID else scores
    tl.store(shares_TE + t[:, None] * E + e[None, :], shares, mask=real)

    keys = tl.zeros((BT, BG * BP), tl.int64)
    if not GIVEN:
        wanted = scores if SIGMOID else logits
        if BIASED:
            wanted += tl.load(bias_E + e, mask=exists, other=0.0)[None, :]
        keys = tl.where(real, _keys(wanted, e[None, :]), least)
        if BG > 1:
            groups: tl.constexpr = E // P
            g = tl.arange(0, BG)
            grouped, values = (
                tl.reshape(keys, (BT, BG, BP)),
                tl.reshape(tl.where(real, wanted, float("-inf")), (BT, BG, BP)),
            )
            best = tl.max(values, axis=2)
            if P > 1:
                first = tl.max(grouped, axis=2)
                best += tl.max(tl.where(grouped == first[:, :, None], float("-inf"), values), axis=2)
            group_keys = tl.where((g < groups)[None, :], _keys(best, g[None, :]), least)
            keep = tl.zeros((BT, BG), tl.int1)
            for _ in range(KEPT):
                top = group_keys == tl.max(group_keys, axis=1)[:, None]
                keep = keep | top
                group_keys = tl.where(top, least, group_keys)
            # What the others are worth is minus infinity: a choice of more than the kept groups hold goes on with them, by id.
            outside = _keys(tl.full((BT, BG * BP), float("-inf"), tl.float32), e[None, :])
            inside = tl.reshape(tl.broadcast_to(keep[:, :, None], (BT, BG, BP)), (BT, BG * BP))
            keys = tl.where(real & (inside == 0), outside, keys)

    k_K = tl.arange(0, BK)
    ids, weights = tl.zeros((BT, BK), tl.int64), tl.zeros((BT, BK), tl.float32)
    for k in range(K):
        if GIVEN:
            chosen = e[None, :] == tl.load(given_TK + t * K + k, mask=t < T, other=0)[:, None]
        else:
            chosen = keys == tl.max(keys, axis=1)[:, None]
            keys = tl.where(chosen, least, keys)
        chosen = chosen & real
        ids = tl.where((k_K == k)[None, :], tl.sum(tl.where(chosen, e[None, :], 0), axis=1).to(tl.int64)[:, None], ids)
        weights = tl.where((k_K == k)[None, :], tl.sum(tl.where(chosen, scores, 0.0), axis=1)[:, None], weights)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=1) + 1e-20)[:, None]
    written = (t < T)[:, None] & (k_K < K)[None, :]
    place = t[:, None] * K + k_K[None, :]
    tl.store(experts_TK + place, ids, mask=written)
    tl.store(weights_TK + place, weights * scale, mask=written)


@jit
def _topk_backward_kernel(
    logits_TE, experts_TK, dweights_TK, dshares_TE, dlogits_TE, T, scale, E: tl.constexpr, K: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    t, e = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BE)
    real = (t < T)[:, None] & (e < E)[None, :]
    place = t[:, None] * E + e[None, :]
    logits = tl.load(logits_TE + place, mask=real, other=0.0)
    dshares = tl.load(dshares_TE + place, mask=real, other=0.0)
    scores, total = _scores(logits, real, SIGMOID)
    taken, dscores = tl.zeros((BT, BE), tl.int1), tl.zeros((BT, BE), tl.float32)
    for k in range(K):
        chosen = e[None, :] == tl.load(experts_TK + t * K + k, mask=t < T, other=0)[:, None]
        taken = taken | chosen
        dscores = tl.where(chosen, tl.load(dweights_TK + t * K + k, mask=t < T, other=0.0)[:, None] * scale, dscores)
    if RENORMALIZE:
        chosen_sum = tl.sum(tl.where(taken, scores, 0.0), axis=1)[:, None] + 1e-20
        mean = tl.sum(dscores * (scores / chosen_sum), axis=1)[:, None]
        dscores = tl.where(taken, (dscores - mean) / chosen_sum, 0.0)
    if SIGMOID:
        shares = scores / total[:, None]
        dscores += (dshares - tl.sum(dshares * shares, axis=1)[:, None]) / total[:, None]
        # 1 - score would lose the digits of a score next to 1.
        dlogits = scores / (1 + tl.exp(logits)) * dscores
    else:
        dscores += dshares
        dlogits = scores * (dscores - tl.sum(dscores * scores, axis=1)[:, None])
    tl.store(dlogits_TE + place, dlogits, mask=real)


# ---------------------------------------------------------------- launchers


def _rows(columns: int) -> dict[str, int]:
    """Tokens that a program takes, and its warps: a few thousand scores."""
    return {"BT": max(1, min(16, 2048 // columns)), "num_warps": 8 if columns >= 2048 else 4}


def _run(
    logits_TE: Tensor, bias_E: Tensor | None, given_TK: Tensor | None, k: int, sigmoid: bool, renormalize: bool, scale: float,
    groups: int, kept: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (tokens, n_experts), logits_TE = logits_TE.shape, logits_TE.contiguous()
    experts_TK = logits_TE.new_empty(tokens, k, dtype=torch.int64)
    weights_TK, shares_TE = logits_TE.new_empty(tokens, k), torch.empty_like(logits_TE)
    if tokens:
        per_group = n_experts // groups
        blocks = {"BG": triton.next_power_of_2(groups), "BP": triton.next_power_of_2(per_group)}
        options = blocks | _rows(blocks["BG"] * blocks["BP"])
        bias_E, given = logits_TE if bias_E is None else bias_E, given_TK is not None
        _topk_kernel[(triton.cdiv(tokens, options["BT"]),)](
            logits_TE, bias_E, given_TK.contiguous() if given_TK is not None else experts_TK, experts_TK, weights_TK, shares_TE,
            tokens, scale, E=n_experts, K=k, P=per_group, KEPT=kept, SIGMOID=sigmoid, BIASED=bias_E is not logits_TE, GIVEN=given,
            RENORMALIZE=renormalize, BK=triton.next_power_of_2(k), **options,
        )  # fmt: skip
    return experts_TK, weights_TK, shares_TE


def _run_backward(
    dweights_TK: Tensor, dshares_TE: Tensor, logits_TE: Tensor, experts_TK: Tensor, sigmoid: bool, renormalize: bool, scale: float
) -> Tensor:  # fmt: skip
    (tokens, n_experts), logits_TE = logits_TE.shape, logits_TE.contiguous()
    dlogits_TE = torch.empty_like(logits_TE)
    if tokens:
        block = triton.next_power_of_2(n_experts)
        options = _rows(block)
        _topk_backward_kernel[(triton.cdiv(tokens, options["BT"]),)](
            logits_TE, experts_TK, dweights_TK.contiguous(), dshares_TE.contiguous(), dlogits_TE, tokens, scale, E=n_experts,
            K=experts_TK.shape[1], SIGMOID=sigmoid, RENORMALIZE=renormalize, BE=block, **options,
        )  # fmt: skip
    return dlogits_TE


_op = torch.library.custom_op("moesaic::topk", _run, mutates_args=())
_op_backward = torch.library.custom_op("moesaic::topk_backward", _run_backward, mutates_args=())


@_op.register_fake
def _(
    logits_TE: Tensor, bias_E: Tensor | None, given_TK: Tensor | None, k: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = logits_TE.shape[0], k
    return logits_TE.new_empty(shape, dtype=torch.int64), logits_TE.new_empty(shape), torch.empty_like(logits_TE)


@_op_backward.register_fake
def _(dweights_TK: Tensor, dshares_TE: Tensor, logits_TE: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits_TE)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits_TE, _, _, _, ctx.sigmoid, ctx.renormalize, ctx.scale, _, _ = inputs
    ctx.mark_non_differentiable(output[0])
    ctx.save_for_backward(logits_TE, output[0])


def _differentiate(ctx: Any, _: Any, dweights_TK: Tensor, dshares_TE: Tensor) -> tuple[Tensor | None, ...]:
    logits_TE, experts_TK = ctx.saved_tensors
    dlogits_TE = _op_backward(dweights_TK, dshares_TE, logits_TE, experts_TK, ctx.sigmoid, ctx.renormalize, ctx.scale)
    return dlogits_TE, *[None] * 8


_op.register_autograd(_differentiate, setup_context=_save)


def topk(
    logits_TE: Tensor, bias_E: Tensor | None, k: int, *, sigmoid: bool, renormalize: bool, scale: float = 1.0,
    groups: int = 1, kept: int = 1, given_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(experts_TK, weights_TK, shares_TE): int64, fp32, fp32. Differentiable in logits_TE, through weights and shares.

    logits_TE  fp32
    bias_E     fp32, added to the sigmoid's scores for the choice alone; None: nothing
    given_TK   int64, the experts, where they have been chosen before; None: they are chosen
    """
    n_experts = logits_TE.shape[1]
    if n_experts > MOST_EXPERTS or k > MOST_K:
        raise ValueError(
            f"n_experts={n_experts}, k={k}: the kernel chooses up to {MOST_K} of up to {MOST_EXPERTS} experts"
        )
    assert logits_TE.dtype == torch.float32 and k <= n_experts and n_experts % groups == 0, (logits_TE.dtype, k, groups)
    return _op(logits_TE, bias_E, given_TK, k, sigmoid, renormalize, float(scale), groups, kept)


def compile_cases(target: str) -> dict[str, Any]:
    """For moesaic.kernels.targets."""

    def case(t: int, e: int, k: int, sigmoid: bool, groups: int = 1) -> None:
        logits_TE = torch.empty(t, e, device="meta")
        experts_TK, weights_TK, shares_TE = _run(
            logits_TE, logits_TE[0] if sigmoid else None, None, k, sigmoid, True, 2.5, groups, max(1, groups // 2)
        )
        _run_backward(weights_TK, shares_TE, logits_TE, experts_TK, sigmoid, True, 2.5)

    return {
        "E 64, K 8": lambda: case(4096, 64, 8, False),
        "E 256 in 8 groups, K 8, sigmoid": lambda: case(4096, 256, 8, True, 8),
        "E 4096, K 32": lambda: case(4096, 4096, 32, False),
    }
