"""Token rounding: after top-K, make the rows of every expert a multiple of the GEMM's tile, so that no tile is padded.

SonicMoE, arXiv 2512.14080: Algorithm 4 and appendix F. Scores S (T, E), the top-K choice (T, K) and a tile M, over one
**routing domain**, the tokens that are routed together:

    for each expert e, by itself:
        f       = number of tokens that chose e;  floor, ceil = f rounded down and up to a multiple of M
        order   = the tokens that chose e by falling S[t, e], then all others by falling S[t, e]; ties to the lower token
        target  = floor or ceil, as the rule says; f where it is a multiple of M already
        e takes the first `target` tokens of `order`

So less than M of the choices of e are dropped, its worst, or less than M others are added, the best: a top-K choice always
goes before an addition, and one tile changes at most. An expert that gets rows from several domains still gets a multiple
of M. The rules:

    nearest      ceil if ceil - f < f - floor                                          (NR-f; a tie goes down)
    stochastic   ceil with probability (f - floor) / M                                 (SR-f; the expected count is f)
    score        ceil with probability (s(f) - s(floor)) / (s(ceil) - s(floor))        (NR-s)
                 s(n) = sum of S[t, e] over the first n tokens of `order`; 0 / 0 becomes (f - floor) / M, as at equal scores
    balance      z = 0; for e in order of ids: ceil if |ceil - f + z| < |floor - f + z|; z += target - f
                 (Balance-f, Algorithm 6; |sum of targets - sum of f| <= M / 2)
    up, down     ceil, floor                                                           (down only drops)

No expert can take more than the T tokens there are: where ceil > T, every rule goes down. That is so for all experts if T < M,
and for those chosen by nearly every token. `balance` charges what they lose to z before it begins, so its bound holds whenever
enough others can go up; where too few can, all of them do, which is as close as any choice comes.

This is meant for training: which tokens an expert takes depends on later tokens of the domain. Evaluation uses the plain top K.
Nothing here synchronises with the host, and all shapes are static. No full sort: `topk` finds the boundary tile alone.

Letters: T tokens, E experts, K experts per token, M tile rows, A = min(M - 1, T) additions that an expert may need at most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels.topk import ordered_keys

RULES = ("nearest", "stochastic", "score", "balance", "up", "down")
SEEDED = ("stochastic", "score")

# The keys of so many scores are in memory at a time, 8 bytes each in a few copies: experts are taken in groups.
CHUNK = 2**23


@dataclass(frozen=True)
class Rounding:
    """The tokens of each expert after rounding.

    member_TE        bool, expert e takes token t
    keep_TK          bool, the top-K choice that stays
    added_token_EA   int64, the tokens that expert e adds, best first; 0 where nothing is added
    added_EA         bool, where something is added
    counts_E         int64, tokens per expert, all multiples of M
    dropped, added   int64 scalars, choices lost and gained over all experts
    """

    member_TE: Tensor
    keep_TK: Tensor
    added_token_EA: Tensor
    added_EA: Tensor
    counts_E: Tensor
    dropped: Tensor
    added: Tensor


def round_routing(
    scores_TE: Tensor, experts_TK: Tensor, *, tile: int, rule: str, seed: int | Tensor | None = None
) -> Rounding:
    """Round the rows of every expert to a multiple of `tile`.

    scores_TE    fp32, by which an expert prefers tokens: any finite numbers, but `score` expects none below 0. No gradient
    experts_TK   int64, the top-K choice, distinct within a token
    seed         for the rules of chance; int64 scalar or int. The same on every device. Draw anew for each layer and step
    """
    tokens, n_experts = scores_TE.shape
    # 31 bits of a key hold the token; below bf16 or fp64, the other bits would hold something else than the score.
    assert scores_TE.dtype == torch.float32 and experts_TK.dtype == torch.int64, (scores_TE.dtype, experts_TK.dtype)
    assert experts_TK.shape[0] == tokens < 2**31, (experts_TK.shape, tokens)
    check_rule(tile, rule, seed)
    device = scores_TE.device
    scores_ET = scores_TE.detach().T.contiguous()
    chosen_ET = torch.zeros(n_experts, tokens, dtype=torch.bool, device=device).scatter_(0, experts_TK.T, True)
    chosen_E = chosen_ET.sum(dim=1)
    place_A = torch.arange(min(tile - 1, tokens), device=device)

    if rule == "score":
        everyone = torch.ones_like(chosen_E, dtype=torch.bool)
        add_EA = _changed_first(scores_ET, chosen_ET, everyone, place_A.numel())
        drop_EA = _changed_first(scores_ET, chosen_ET, ~everyone, place_A.numel())
        over_E = chosen_E % tile
        # s(f) - s(floor) and s(ceil) - s(f). Summed in fp64, so that a device's order of summation does not decide.
        above_E = _sum_first(scores_ET, drop_EA, over_E)
        below_E = _sum_first(scores_ET, add_EA, tile - over_E)
        whole_E = above_E + below_E
        by_count_E = over_E.double() / tile
        up_probability_E = torch.where(whole_E > 0, above_E / torch.where(whole_E > 0, whole_E, 1.0), by_count_E)
        counts_E = rounded_counts(chosen_E, tokens, tile, rule, seed, up_probability_E)
        first_EA = torch.where((counts_E > chosen_E)[:, None], add_EA, drop_EA)
    else:
        counts_E = rounded_counts(chosen_E, tokens, tile, rule, seed)
        first_EA = _changed_first(scores_ET, chosen_ET, counts_E > chosen_E, place_A.numel())

    more_E = counts_E - chosen_E
    changed_EA = place_A < more_E.abs()[:, None]
    added_EA = changed_EA & (more_E > 0)[:, None]
    # A row of first_EA names no token twice, so what it names without changing is left alone by the exclusive or.
    member_ET = torch.zeros_like(chosen_ET).scatter_(1, first_EA, changed_EA) ^ chosen_ET
    return Rounding(
        member_TE=member_ET.T,
        keep_TK=member_ET.T.gather(1, experts_TK),
        added_token_EA=first_EA.masked_fill(~added_EA, 0),
        added_EA=added_EA,
        counts_E=counts_E,
        dropped=(-more_E).clamp(min=0).sum(),
        added=more_E.clamp(min=0).sum(),
    )


def rounded_counts(
    counts_E: Tensor,
    tokens: int,
    tile: int,
    rule: str,
    seed: int | Tensor | None = None,
    up_probability_E: Tensor | None = None,
) -> Tensor:
    """What each expert's number of tokens becomes. int64 (E,) -> int64 (E,), multiples of `tile`, none above `tokens`.

    up_probability_E   fp64, for the rule `score`, whose chances depend on more than counts
    """
    check_rule(tile, rule, seed)
    over_E = counts_E % tile
    may_rise_E = (over_E > 0) & (counts_E - over_E + tile <= tokens)
    if rule == "up":
        up_E = may_rise_E
    elif rule == "down":
        up_E = torch.zeros_like(may_rise_E)
    elif rule == "nearest":
        up_E = may_rise_E & (tile - over_E < over_E)
    elif rule == "balance":
        # With d = -z, tokens dropped so far less those added, the rule is: go up if d + over > M / 2, which takes M off d. So d
        # stays in (-M / 2, M / 2], and how often it went up follows from the tokens that were over until then:
        # ceil((over so far - M / 2) / M), though not more often than it could. So no loop over experts, each a launch on a GPU.
        lost = torch.where(may_rise_E, 0, over_E).sum()
        so_far_E = torch.where(may_rise_E, over_E, 0).cumsum(0) + lost
        times_E = torch.minimum((2 * so_far_E + tile - 1) // (2 * tile), may_rise_E.cumsum(0))
        up_E = times_E.diff(prepend=torch.zeros_like(times_E[:1])) > 0
    else:
        if rule == "score":
            assert up_probability_E is not None, "rule=score: needs up_probability_E"
            chance_E = up_probability_E.double()
        else:
            chance_E = over_E.double() / tile
        assert seed is not None
        up_E = may_rise_E & (_random_31_bits(seed, over_E) < chance_E * 2**31)
    return counts_E - over_E + torch.where(up_E, tile, 0)


def token_weights(
    scores_TE: Tensor, experts_TK: Tensor, rounding: Rounding, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """What each expert's output is multiplied with: (weights_TK, weights_EA), 0 where dropped and where nothing is added.

    The score itself, or divided by the sum of scores over all experts that take the token. A token without any has weights 0.
    The gradient reaches the scores of every pair of the routing, added ones too. Any floating-point type.
    """
    taken_TE = torch.where(rounding.member_TE, scores_TE, 0.0)
    if renormalize:
        # Over whole rows, not over kept and added separately: adding the latter up by token would be in no fixed order on CUDA.
        total_T1 = taken_TE.sum(dim=1, keepdim=True)
        taken_TE = taken_TE / torch.where(total_T1 > 0, total_T1, 1.0)
    weights_EA = taken_TE.T.gather(1, rounding.added_token_EA)
    return taken_TE.gather(1, experts_TK), torch.where(rounding.added_EA, weights_EA, 0.0)


def check_rule(tile: int, rule: str, seed: int | Tensor | None) -> None:
    if rule not in RULES:
        raise ValueError(f"model.router.rounding={rule}: must be one of {', '.join(RULES)}")
    if tile < 1:
        raise ValueError(f"model.router.rounding_tile={tile}: must be at least 1")
    if rule in SEEDED and seed is None:
        raise ValueError(f"model.router.rounding={rule}: draws random numbers, and no seed was given")


def _changed_first(scores_ET: Tensor, chosen_ET: Tensor, up_E: Tensor, width: int) -> Tensor:
    """int64 (E, width): the tokens that an expert changes first. Going up, the best it lacks; else, the worst it has.

    Where there are fewer than `width`, others follow, in any order; no token twice. Score and reversed token are packed into
    one int64, for `torch.topk` leaves the order of ties open: no two candidates of an expert have equal keys.
    """
    n_experts, tokens = scores_ET.shape
    last_first_T = torch.arange(tokens - 1, -1, -1, device=scores_ET.device)
    flip_E = up_E.long() - 1  # exclusive or with 0 changes nothing; with -1, it reverses the order
    rows = max(1, CHUNK // max(1, tokens))
    parts = []
    for i in range(0, n_experts, rows):
        part = slice(i, i + rows)
        keys = ordered_keys(scores_ET[part]).mul_(2**31).add_(last_first_T).bitwise_xor_(flip_E[part, None])
        keys.masked_fill_(chosen_ET[part] == up_E[part, None], torch.iinfo(torch.int64).min)
        parts.append(keys.topk(width, dim=1).indices)
    return torch.cat(parts)


def _sum_first(scores_ET: Tensor, token_EA: Tensor, n_E: Tensor) -> Tensor:
    """fp64 (E,): the sum of an expert's scores of the first n tokens listed; n may be past the list's end."""
    listed_EA = scores_ET.gather(1, token_EA).double()
    place_A = torch.arange(token_EA.shape[1], device=token_EA.device)
    return torch.where(place_A < n_E[:, None], listed_EA, 0.0).sum(dim=1)


def _random_31_bits(seed: int | Tensor, like_E: Tensor) -> Tensor:
    """int64 (E,), uniform in [0, 2^31): a hash of the seed and the expert's id, so that devices agree.

    SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014), with the seed hashed first: else
    the streams of two seeds could be the same numbers, shifted. Products wrap around.
    """
    if not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=like_E.device)
    golden = 0x9E3779B97F4A7C15 - 2**64
    ids_E = torch.arange(1, like_E.numel() + 1, device=like_E.device)
    return _mix(_mix(seed + golden) + ids_E * golden) & 0x7FFFFFFF


def _mix(x: Tensor) -> Tensor:
    # `>>` copies the sign bit; the masks clear what it brings in.
    x = (x ^ (x >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ (x >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
    return x ^ (x >> 31 & 2**33 - 1)
