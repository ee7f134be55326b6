"""Token rounding in two launches, without a sort of all scores: the same choices as moesaic.kernels.rounding, to the token.

    1  select     for each expert, the n tokens that it changes first: the best it lacks (n = M - over) where its count goes up,
                  the worst it has (n = over) where it goes down; both, and the sums of their scores, for the rule `score`.
                  A radix selection: four passes over an expert's scores find, eight bits at a time from the top, the bits of the
                  n-th; a fifth takes what lies above it, and as many of its equals as are left, the earlier tokens first
    2  order      decides again, `score` with the sums; puts the list in order, by counting for each token how many come before
                  it, and changes who is a member

The decision needs the counts of all experts, which each program reads: `balance` is sums over the experts up to this one (see
`rounded_counts`). It moves 20 T E bytes of scores, mostly from L2, and 5 T E of membership.

Letters: T tokens, E experts, K experts per token, M tile rows, A = min(M - 1, T) additions that an expert may need at most.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.interpret import jit
from moesaic.kernels.rounding import RULES, Rounding, check_rule

BLOCK_T = 512


@jit
def _mix(x):
    # `>>` copies the sign bit; the masks clear what it brings in.
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@jit
def _rises(chosen_E, seed, above, below, e, E, T, M, RULE: tl.constexpr, BE: tl.constexpr):
    """(whether expert e takes one tile more than its whole ones, tokens over these). above, below: sums of scores, of `score`."""
    count = tl.load(chosen_E + e)
    over = count % M
    may = (over > 0) & (count - over + M <= T)
    up = may
    if RULE == "down":
        up = over < 0
    elif RULE == "nearest":
        up = may & (M - over < over)
    elif RULE == "balance":
        i = tl.arange(0, BE)
        counts = tl.load(chosen_E + i, mask=i < E, other=0)
        overs = counts % M
        can = (overs > 0) & (counts - overs + M <= T)
        lost = tl.sum(tl.where(can, 0, overs), axis=0)
        until = tl.sum(tl.where(can & (i < e), overs, 0), axis=0) + lost
        steps = tl.sum((can & (i < e)).to(tl.int64), axis=0)
        before = tl.minimum((2 * until + M - 1) // (2 * M), steps)
        up = may & (tl.minimum((2 * (until + over) + M - 1) // (2 * M), steps + 1) > before)
    elif RULE == "stochastic" or RULE == "score":
        chance = over.to(tl.float64) / M
        if RULE == "score":
            whole = above + below
            chance = tl.where(whole > 0, above / tl.where(whole > 0, whole, 1.0), chance)
        golden: tl.constexpr = -7046029254386353131
        drawn = _mix(_mix(tl.load(seed) + golden) + (e + 1).to(tl.int64) * golden) & 0x7FFFFFFF
        up = may & (drawn.to(tl.float64) < chance * 2147483648.0)
    return up, over


@jit
def _keys(scores):
    """int64 from 0 to 2^32 - 1 of the order of the scores; 0.0 and -0.0 are equal."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648


@jit
def _candidates(scores_ET, member_ET, e, t, T, ADD):
    """(keys, scores, which tokens an expert may change); the first to change has the largest key."""
    scores = tl.load(scores_ET + e.to(tl.int64) * T + t, mask=t < T, other=0.0)
    has = tl.load(member_ET + e.to(tl.int64) * T + t, mask=t < T, other=0) != 0
    keys = _keys(scores)
    return tl.where(ADD, keys, 4294967295 - keys), scores, (t < T) & (has != ADD)


@jit
def _select_kernel(
    scores_ET, member_ET, chosen_E, seed, list_E2A, keys_E2A, sums_E2, E, T, M, A, RULE: tl.constexpr, BE: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    e, side = tl.program_id(0), tl.program_id(1)
    up, over = _rises(chosen_E, seed, 0.0, 0.0, e, E, T, M, "down" if RULE == "score" else RULE, BE)
    ADD = side == 1 if RULE == "score" else up
    n = tl.where(ADD, tl.where(over > 0, M - over, 0), over)
    count = tl.load(chosen_E + e)
    n = tl.minimum(n, tl.where(ADD, T - count, count)).to(tl.int32)

    digit = tl.arange(0, 256)
    prefix, left, equal = tl.zeros((1,), tl.int64), n, n
    for position in tl.static_range(4):
        shift = 24 - 8 * position
        histogram = tl.zeros((256,), tl.int32)
        for first in range(0, T, BT):
            keys, _, candidate = _candidates(scores_ET, member_ET, e, first + tl.arange(0, BT), T, ADD)
            candidate = candidate & ((keys >> (shift + 8)) == prefix)
            histogram += tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=candidate)
        # At least `left` have this digit or a larger one, but not a larger digit alone.
        from_here = tl.sum(histogram, axis=0) - tl.cumsum(histogram, axis=0) + histogram
        found = tl.max(tl.where(from_here >= left, digit, 0), axis=0)
        equal = tl.sum(tl.where(digit == found, histogram, 0), axis=0)
        left -= tl.sum(tl.where(digit > found, histogram, 0), axis=0)
        prefix = prefix * 256 + found

    total, place_of, equals = tl.zeros((1,), tl.float64), tl.zeros((1,), tl.int32), tl.zeros((1,), tl.int32)
    out = (e * 2 + tl.where(ADD, 1, 0)).to(tl.int64) * A
    if n > 0:
        for first in range(0, T, BT):
            t = first + tl.arange(0, BT)
            keys, scores, candidate = _candidates(scores_ET, member_ET, e, t, T, ADD)
            same = (candidate & (keys == prefix)).to(tl.int32)
            number = equals + tl.cumsum(same, axis=0) - same
            # Among equals, the earlier token goes first into a tile and last out of it.
            wins = (same > 0) & tl.where(ADD, number < left, number >= equal - left)
            taken = (candidate & (keys > prefix)) | wins
            place = place_of + tl.cumsum(taken.to(tl.int32), axis=0) - 1
            tl.store(list_E2A + out + place, t, mask=taken)
            tl.store(keys_E2A + out + place, keys, mask=taken)
            total += tl.sum(tl.where(taken, scores.to(tl.float64), 0.0), axis=0)
            place_of += tl.sum(taken.to(tl.int32), axis=0)
            equals += tl.sum(same, axis=0)
    tl.store(sums_E2 + e * 2 + tl.where(ADD, 1, 0) + tl.arange(0, 1), total)


@jit
def _order_kernel(
    chosen_E, seed, list_E2A, keys_E2A, sums_E2, member_ET, token_EA, added_EA, counts_E, E, T, M, A, RULE: tl.constexpr,
    BE: tl.constexpr, BA: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0)
    above, below = 0.0, 0.0
    if RULE == "score":
        above, below = tl.load(sums_E2 + e * 2), tl.load(sums_E2 + e * 2 + 1)
    up, over = _rises(chosen_E, seed, above, below, e, E, T, M, RULE, BE)
    n = tl.where(up, M - over, over)
    tl.store(counts_E + e, tl.load(chosen_E + e) - over + tl.where(up, M, 0))
    a = tl.arange(0, BA)
    listed = (e * 2 + tl.where(up, 1, 0)).to(tl.int64) * A
    token = tl.load(list_E2A + listed + a, mask=a < n, other=0)
    tl.store(member_ET + e.to(tl.int64) * T + token, tl.where(up & (a < n), 1, 0).to(tl.int8), mask=a < n)
    key = tl.load(keys_E2A + listed + a, mask=a < n, other=0)
    place = tl.zeros((BA,), tl.int32)
    for first in range(0, A, BJ):
        j = first + tl.arange(0, BJ)
        other = tl.load(keys_E2A + listed + j, mask=j < n, other=-1)
        others = tl.load(list_E2A + listed + j, mask=j < n, other=0)
        ahead = (other[None, :] > key[:, None]) | (
            (other[None, :] == key[:, None]) & (others[None, :] < token[:, None])
        )
        place += tl.sum((ahead & (j < n)[None, :]).to(tl.int32), axis=1)
    added = up & (a < n)
    place = tl.where(added, place, a)  # what nobody is added to stays at its own place, behind
    row = e.to(tl.int64) * A
    tl.store(token_EA + row + place, tl.where(added, token, 0).to(tl.int64), mask=a < A)
    tl.store(added_EA + row + place, tl.where(added, 1, 0).to(tl.int8), mask=a < A)


def _run(
    scores_ET: Tensor, chosen_ET: Tensor, seed: Tensor, tile: int, rule: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(member_ET, added_token_EA, added_EA, counts_E); bool as int8."""
    n_experts, tokens = scores_ET.shape
    member_ET, token_EA, added_EA, counts_E = _empty(scores_ET, tile)
    member_ET.copy_(chosen_ET)
    if not tokens:
        return member_ET, token_EA, added_EA, counts_E.zero_()
    chosen_E, width = chosen_ET.sum(dim=1), token_EA.shape[1]
    list_E2A = scores_ET.new_empty(n_experts, 2, width, dtype=torch.int32)
    keys_E2A = scores_ET.new_empty(n_experts, 2, width, dtype=torch.int64)
    sums_E2 = scores_ET.new_empty(n_experts, 2, dtype=torch.float64)
    sizes, block_e = (n_experts, tokens, tile, width), triton.next_power_of_2(n_experts)
    _select_kernel[n_experts, 2 if rule == "score" else 1](
        scores_ET, member_ET, chosen_E, seed, list_E2A, keys_E2A, sums_E2, *sizes, RULE=rule, BE=block_e,
        BT=min(BLOCK_T, max(16, triton.next_power_of_2(tokens))),
    )  # fmt: skip
    block_a = max(16, triton.next_power_of_2(width))
    _order_kernel[(n_experts,)](
        chosen_E, seed, list_E2A, keys_E2A, sums_E2, member_ET, token_EA, added_EA, counts_E, *sizes, RULE=rule, BE=block_e,
        BA=block_a, BJ=max(1, min(16, 2048 // block_a)),
    )  # fmt: skip
    return member_ET, token_EA, added_EA, counts_E


def _empty(scores_ET: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_experts, tokens = scores_ET.shape
    width = min(tile - 1, tokens)
    return (
        scores_ET.new_empty(n_experts, tokens, dtype=torch.int8),
        scores_ET.new_empty(n_experts, width, dtype=torch.int64),
        scores_ET.new_empty(n_experts, width, dtype=torch.int8),
        scores_ET.new_empty(n_experts, dtype=torch.int64),
    )


_op = torch.library.custom_op("moesaic::round_routing", _run, mutates_args=())


@_op.register_fake
def _(
    scores_ET: Tensor, chosen_ET: Tensor, seed: Tensor, tile: int, rule: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(scores_ET, tile)


def round_routing(
    scores_TE: Tensor, experts_TK: Tensor, *, tile: int, rule: str, seed: int | Tensor | None = None
) -> Rounding:
    """As moesaic.kernels.rounding.round_routing."""
    tokens, n_experts = scores_TE.shape
    assert scores_TE.dtype == torch.float32 and experts_TK.dtype == torch.int64, (scores_TE.dtype, experts_TK.dtype)
    assert experts_TK.shape[0] == tokens < 2**31, (experts_TK.shape, tokens)
    check_rule(tile, rule, seed)
    device = scores_TE.device
    seed = torch.as_tensor(0 if seed is None else seed, dtype=torch.int64).to(device, non_blocking=True)
    chosen_ET = torch.zeros(n_experts, tokens, dtype=torch.int8, device=device).scatter_(0, experts_TK.T, 1)
    scores_ET = scores_TE.detach().T.contiguous()
    member_ET, added_token_EA, added_EA, counts_E = _op(scores_ET, chosen_ET, seed, tile, rule)
    member_TE = member_ET.bool().T
    more_E = counts_E - chosen_ET.sum(dim=1)
    return Rounding(
        member_TE, member_TE.gather(1, experts_TK), added_token_EA, added_EA.bool(), counts_E, (-more_E).clamp(min=0).sum(),
        more_E.clamp(min=0).sum(),
    )  # fmt: skip


def compile_cases(target: str) -> dict[str, Any]:
    """For moesaic.kernels.targets."""

    def case(rule: str) -> None:
        scores_ET = torch.empty(128, 32_768, device="meta")
        seed = torch.empty((), dtype=torch.int64, device="meta")
        _run(scores_ET, scores_ET.to(torch.int8), seed, 128, rule)

    return {f"E 128, T 32768, {rule}": lambda rule=rule: case(rule) for rule in RULES}
