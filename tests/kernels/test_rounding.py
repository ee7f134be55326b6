"""Token rounding against its definition: full sorts and loops over experts, and the invariants that make it token rounding.

Letters: T tokens, E experts, K experts per token, M tile rows, A additions that an expert may need at most.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.kernels import rounding as module
from moesaic.kernels.rounding import RULES, Rounding, round_routing, rounded_counts, token_weights

PROFILE = settings(deadline=None, max_examples=150, derandomize=True)
every_rule = pytest.mark.parametrize("rule", RULES)


@dataclass(frozen=True)
class Case:
    scores_TE: Tensor
    experts_TK: Tensor
    tile: int
    seed: int

    def round(self, rule: str) -> Rounding:
        return round_routing(self.scores_TE, self.experts_TK, tile=self.tile, rule=rule, seed=self.seed)

    @property
    def counts(self) -> list[int]:
        n_experts = self.scores_TE.shape[1]
        return torch.bincount(self.experts_TK.flatten(), minlength=n_experts).tolist()


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    return scores_TE.argsort(dim=1, descending=True, stable=True)[:, :k]


@st.composite
def cases(draw: Callable) -> Case:
    tokens, n_experts, tile = draw(st.integers(0, 40)), draw(st.integers(1, 8)), draw(st.integers(1, 12))
    k = draw(st.integers(1, n_experts))
    seed = draw(st.integers(0, 2**62))
    kind = draw(st.sampled_from(["softmax", "sigmoid", "ties", "one expert", "biased"]))
    logits = torch.randn(tokens, n_experts, generator=torch.Generator().manual_seed(seed))
    if kind == "one expert":  # chosen by all; the scores of the others underflow to 0 here and there
        logits = logits * 20
        logits[:, n_experts // 2] += 200
    if kind == "sigmoid":
        scores = logits.sigmoid()
    elif kind == "ties":
        scores = (logits.abs() * 2).round().clamp(max=4) / 4
    elif kind == "biased":  # preferences of a router with a bias on its scores: some below 0
        scores = logits.sigmoid() - 0.5
    else:
        scores = logits.softmax(dim=1)
    return Case(scores, top_k(scores, k), tile, seed)


# The definition, in plain Python.


def naive_order(case: Case, expert: int) -> list[int]:
    """All tokens, the most preferred by this expert first."""
    chose = (case.experts_TK == expert).any(dim=1).tolist()
    score = case.scores_TE[:, expert].tolist()
    return sorted(range(len(score)), key=lambda t: (not chose[t], -score[t], t))


def naive_random(seed: int, expert: int) -> float:
    """The expert's uniform number in [0, 1). SplitMix64 on unsigned numbers."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    return (mix(mix(seed + golden & mask) + (expert + 1) * golden & mask) & 0x7FFFFFFF) / 2**31


def naive_balance(counts: list[int], tokens: int, tile: int) -> list[int]:
    """Algorithm 6; experts that can't go up come first, then the others in order of their ids."""
    targets = list(counts)
    z = 0
    stuck = [-(-f // tile) * tile > tokens for f in counts]
    for e in sorted(range(len(counts)), key=lambda e: not stuck[e]):
        down = -(counts[e] % tile)
        up = down + tile if down else 0
        change = up if abs(up + z) < abs(down + z) and not stuck[e] else down
        targets[e] += change
        z += change
    return targets


def naive_targets(case: Case, rule: str) -> list[int]:
    tokens, tile, counts = len(case.scores_TE), case.tile, case.counts
    if rule == "balance":
        return naive_balance(counts, tokens, tile)
    targets = []
    for e, f in enumerate(counts):
        floor, ceil = f // tile * tile, -(-f // tile) * tile
        if rule == "nearest":
            up = ceil - f < f - floor
        elif rule in ("up", "down"):
            up = rule == "up"
        else:
            chance = (f - floor) / tile
            if rule == "score" and ceil <= tokens:
                s = [case.scores_TE[t, e].item() for t in naive_order(case, e)]
                whole = math.fsum(s[floor:ceil])
                chance = math.fsum(s[floor:f]) / whole if whole > 0 else chance
            up = naive_random(case.seed, e) < chance
        targets.append(ceil if up and ceil <= tokens else floor)
    return targets


@every_rule
@given(case=cases())
@PROFILE
def test_equals_the_definition(rule: str, case: Case) -> None:
    result = case.round(rule)
    tokens, n_experts = case.scores_TE.shape
    targets = naive_targets(case, rule)
    assert result.counts_E.tolist() == targets
    assert result.added_EA.shape == result.added_token_EA.shape == (n_experts, min(case.tile - 1, tokens))
    member = torch.zeros(tokens, n_experts, dtype=torch.bool)
    for e, (f, target) in enumerate(zip(case.counts, targets, strict=True)):
        order = naive_order(case, e)
        member[order[:target], e] = True
        # Additions come first in their row, the best first; the rest of the row is 0.
        added = order[f:target]
        rest = result.added_EA.shape[1] - len(added)
        assert result.added_token_EA[e].tolist() == added + [0] * rest
        assert result.added_EA[e].tolist() == [True] * len(added) + [False] * rest
    assert result.member_TE.equal(member)
    assert result.keep_TK.equal(member.gather(1, case.experts_TK))
    assert int(result.dropped) == sum(max(f - target, 0) for f, target in zip(case.counts, targets, strict=True))
    assert int(result.added) == sum(max(target - f, 0) for f, target in zip(case.counts, targets, strict=True))


# The invariants, whatever the definition above says.


@every_rule
@given(case=cases())
@PROFILE
def test_invariants(rule: str, case: Case) -> None:
    result = case.round(rule)
    tokens, n_experts = case.scores_TE.shape
    assert result.counts_E.equal(result.member_TE.sum(dim=0))
    assert int(result.keep_TK.sum()) + int(result.added) == int(result.counts_E.sum())
    assert int(result.keep_TK.sum()) + int(result.dropped) == case.experts_TK.numel()
    for e, (f, count) in enumerate(zip(case.counts, result.counts_E.tolist(), strict=True)):
        assert count % case.tile == 0 and 0 <= count <= tokens
        assert abs(count - f) < case.tile
        assert count in (f // case.tile * case.tile, -(-f // case.tile) * case.tile)  # at most one tile changes
        score = case.scores_TE[:, e].tolist()
        chose = (case.experts_TK == e).any(dim=1).tolist()
        member = result.member_TE[:, e].tolist()
        kept, lost, gained, left = (
            [(-score[t], t) for t in range(tokens) if (chose[t], member[t]) == kind]
            for kind in ((True, True), (True, False), (False, True), (False, False))
        )
        assert not (lost and gained)  # every choice is taken before any addition
        assert not (kept and lost) or max(kept) < min(lost)  # those kept have the highest scores, ties to the earlier
        assert not (gained and left) or max(gained) < min(left)  # and so have those added
        assert sorted(gained) == sorted((-score[t], t) for t in result.added_token_EA[e][result.added_EA[e]].tolist())


@given(case=cases())
@PROFILE
def test_up_and_down_go_one_way(case: Case) -> None:
    tokens = len(case.scores_TE)
    assert int(case.round("down").added) == 0
    for f, count in zip(case.counts, case.round("up").counts_E.tolist(), strict=True):
        assert count >= f or f // case.tile * case.tile + case.tile > tokens


@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=40),
    tile=st.sampled_from([1, 2, 3, 7, 16, 128]),
    spare=st.integers(0, 200),
)
@PROFILE
def test_balance_keeps_the_sum(counts: list[int], tile: int, spare: int) -> None:
    tokens = max(counts) + spare
    targets = rounded_counts(torch.tensor(counts), tokens, tile, "balance").tolist()
    assert targets == naive_balance(counts, tokens, tile)
    floors = [f // tile * tile for f in counts]
    most = [
        floor + tile if floor < f and floor + tile <= tokens else floor for f, floor in zip(counts, floors, strict=True)
    ]
    if spare >= tile:
        assert most == [-(-f // tile) * tile for f in counts]  # nobody lacks tokens to go up
    if 2 * (sum(counts) - sum(most)) <= tile:
        assert 2 * abs(sum(targets) - sum(counts)) <= tile
    else:  # not even all upward steps there are can make up for experts that had to go down
        assert targets == most


def test_balance_by_hand() -> None:
    # z: -3 (3 down: |5| > |-3|), then 3 + 3 = 6 are missing: up, +2; then |7| > |-1|: down, -1; then |4| = |-4|: a tie, down.
    counts = torch.tensor([11, 19, 3, 3, 16])
    assert rounded_counts(counts, 100, 8, "balance").tolist() == [8, 24, 0, 0, 16]


def test_nearest_by_hand() -> None:
    counts = torch.tensor([0, 1, 3, 4, 5, 7, 8, 12, 13])
    assert rounded_counts(counts, 100, 8, "nearest").tolist() == [0, 0, 0, 0, 8, 8, 8, 8, 16]  # ties go down
    assert rounded_counts(counts, 15, 8, "nearest").tolist() == [0, 0, 0, 0, 8, 8, 8, 8, 8]  # no 16 among 15 tokens


# Chance.


@given(case=cases())
@PROFILE
def test_the_same_call_gives_the_same_result(case: Case) -> None:
    for rule in RULES:
        first, again = case.round(rule), case.round(rule)
        tensor_seed = torch.tensor(case.seed)
        third = round_routing(case.scores_TE, case.experts_TK, tile=case.tile, rule=rule, seed=tensor_seed)
        for field in fields(Rounding):
            value = getattr(first, field.name)
            assert value.equal(getattr(again, field.name)) and value.equal(getattr(third, field.name)), field.name


def share_up(seed: int, chance: float, n: int = 20_000) -> float:
    """How many of n experts go up, which all have 5 tokens over at a tile of 16 and the given chance under `score`."""
    counts = torch.full((n,), 21)
    up = rounded_counts(counts, 100, 16, "score", seed, torch.full((n,), chance, dtype=torch.float64)) == 32
    return up.double().mean().item()


def test_chances_are_those_of_the_rules() -> None:
    """Within four standard deviations, over experts of one seed and over seeds of one expert."""

    def close(share: float, chance: float, n: int) -> bool:
        return abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / n)

    counts = torch.full((20_000,), 21)
    up = rounded_counts(counts, 100, 16, "stochastic", 3) == 32
    assert close(up.double().mean().item(), 5 / 16, 20_000)
    assert close((up[1:] & up[:-1]).double().mean().item(), (5 / 16) ** 2, 20_000)  # neighbours are independent
    for chance in (0.001, 0.25, 0.9):
        assert close(share_up(4, chance), chance, 20_000)
    assert share_up(5, 0.0) == 0 and share_up(5, 1.0) == 1

    seeds = range(1_000)
    by_seed = torch.stack([rounded_counts(counts[:3], 100, 16, "stochastic", seed) == 32 for seed in seeds]).double()
    assert all(close(share, 5 / 16, len(seeds)) for share in by_seed.mean(dim=0).tolist())
    assert close((by_seed[1:, 0] * by_seed[:-1, 1]).mean().item(), (5 / 16) ** 2, len(seeds))


@pytest.mark.parametrize("rule", ["stochastic", "score"])
def test_seeds_matter_where_chance_decides(rule: str) -> None:
    scores = torch.rand(64, 32)
    results = [round_routing(scores, top_k(scores, 4), tile=8, rule=rule, seed=seed).counts_E for seed in range(5)]
    assert len({tuple(counts.tolist()) for counts in results}) == 5


def test_score_weighs_the_boundary_tile() -> None:
    # Expert 0 was chosen by token 0 with 0.9; the best other has 0.3: at a tile of 2, it takes both with chance 0.9 / 1.2.
    scores = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8]])
    taken = [
        int(round_routing(scores, top_k(scores, 1), tile=2, rule="score", seed=seed).counts_E[0]) for seed in range(500)
    ]
    assert abs(taken.count(2) / 500 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 500)


def test_score_of_nothing_falls_back_to_counts() -> None:
    # Every expert is chosen by two tokens and has scores of 0: at a tile of 4, half of the experts go up.
    experts = torch.cat((torch.arange(400).view(8, 50), torch.arange(400).roll(50).view(8, 50)), dim=1)
    counts = round_routing(torch.zeros(8, 400), experts, tile=4, rule="score", seed=1).counts_E
    assert abs((counts == 4).double().mean().item() - 0.5) < 4 * math.sqrt(0.25 / 400)


# Shapes at the edge.


@every_rule
def test_fewer_tokens_than_the_tile_leaves_nothing(rule: str) -> None:
    scores = torch.rand(15, 4)
    result = round_routing(scores, top_k(scores, 2), tile=16, rule=rule, seed=0)
    assert result.counts_E.tolist() == [0] * 4 and int(result.dropped) == 30 and not result.keep_TK.any()


@every_rule
def test_few_tokens_of_an_expert_become_a_tile_or_none(rule: str) -> None:
    scores = torch.rand(16, 40)
    result = round_routing(scores, top_k(scores, 2), tile=16, rule=rule, seed=0)
    assert set(result.counts_E.tolist()) <= {0, 16}
    assert result.counts_E.max() == (0 if rule in ("down", "nearest") else 16)


@every_rule
@pytest.mark.parametrize(("n_experts", "k"), [(1, 1), (5, 5)])
@pytest.mark.parametrize(("tokens", "expected"), [(24, 24), (29, 24), (3, 0)])
def test_experts_that_take_every_token_can_only_drop(
    rule: str, n_experts: int, k: int, tokens: int, expected: int
) -> None:
    scores = torch.rand(tokens, n_experts)
    result = round_routing(scores, top_k(scores, k), tile=8, rule=rule, seed=0)
    assert result.counts_E.tolist() == [expected] * n_experts
    assert int(result.added) == 0 and int(result.dropped) == (tokens - expected) * n_experts


@every_rule
def test_all_tokens_to_one_expert(rule: str) -> None:
    scores = torch.rand(20, 6) / 2
    scores[:, 4] = torch.linspace(1, 0.6, 20)
    result = round_routing(scores, top_k(scores, 1), tile=8, rule=rule, seed=0)
    assert result.counts_E.tolist() == [0, 0, 0, 0, 16, 0]
    assert result.keep_TK.flatten().tolist() == [True] * 16 + [False] * 4


@every_rule
def test_a_tile_of_one_row_changes_nothing(rule: str) -> None:
    scores = torch.rand(20, 6)
    result = round_routing(scores, top_k(scores, 2), tile=1, rule=rule, seed=0)
    assert result.keep_TK.all() and int(result.added) == int(result.dropped) == 0
    assert result.added_token_EA.shape == (6, 0)


@every_rule
def test_no_tokens(rule: str) -> None:
    result = round_routing(torch.rand(0, 6), torch.zeros(0, 2, dtype=torch.int64), tile=8, rule=rule, seed=0)
    assert result.counts_E.tolist() == [0] * 6 and result.added_token_EA.shape == (6, 0)
    weights, added = token_weights(torch.rand(0, 6), torch.zeros(0, 2, dtype=torch.int64), result, True)
    assert weights.shape == (0, 2) and added.shape == (6, 0)


def test_ties_among_a_million_tokens_go_to_the_earlier() -> None:
    n = 2**20
    scores = torch.full((n + 25, 2), 0.5)
    experts = torch.zeros(n + 25, 1, dtype=torch.int64)
    experts[n + 5 :] = 1
    up = round_routing(scores, experts, tile=16, rule="up")
    assert up.counts_E.tolist() == [n + 16, 32]
    assert up.added_token_EA[0].tolist() == [*range(n + 5, n + 16), 0, 0, 0, 0]
    assert up.added_token_EA[1].tolist() == [*range(12), 0, 0, 0]
    down = round_routing(scores, experts, tile=16, rule="down")
    assert (~down.keep_TK).nonzero()[:, 0].tolist() == [*range(n, n + 5), *range(n + 21, n + 25)]


def test_orders_every_float() -> None:
    values = torch.tensor([-0.0, 1e-45, -1e-45, 3e38, -3e38, 1e-30, 1.0, -1.0, 1.0000001, 0.0])
    scores = torch.stack([values, torch.zeros(10)], dim=1)
    order = sorted(range(10), key=lambda t: (-values[t].item(), t))
    for chosen in range(1, 8):
        experts = torch.ones(10, 1, dtype=torch.int64)
        experts[order[:chosen]] = 0
        result = round_routing(scores, experts, tile=8, rule="up")
        assert result.added_token_EA[0, : 8 - chosen].tolist() == order[chosen:8]
    everything = torch.zeros(10, 1, dtype=torch.int64)
    dropped = ~round_routing(scores, everything, tile=7, rule="down").keep_TK[:, 0]
    assert sorted(order[7:]) == dropped.nonzero()[:, 0].tolist()


def test_groups_of_experts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(33, 7)
    for rule in RULES:
        whole = round_routing(scores, top_k(scores, 2), tile=4, rule=rule, seed=9)
        for chunk in (1, 66, 33 * 7):
            monkeypatch.setattr(module, "CHUNK", chunk)
            parts = round_routing(scores, top_k(scores, 2), tile=4, rule=rule, seed=9)
            assert all(getattr(whole, f.name).equal(getattr(parts, f.name)) for f in fields(Rounding))
        monkeypatch.undo()


# Weights and gradients.


def naive_weights(scores_TE: Tensor, result: Rounding, renormalize: bool) -> Tensor:
    """(T, E) weights, a token at a time."""
    rows = []
    for t in range(scores_TE.shape[0]):
        experts = result.member_TE[t].nonzero()[:, 0].tolist()
        row = [scores_TE[t, 0] * 0] * scores_TE.shape[1]
        for e in experts:
            row[e] = scores_TE[t, e] / sum(scores_TE[t, i] for i in experts) if renormalize else scores_TE[t, e]
        rows.append(torch.stack(row))
    return torch.stack(rows)


@every_rule
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("tokens", "n_experts", "k", "tile"), [(37, 6, 2, 8), (12, 5, 1, 8), (9, 4, 4, 2), (5, 3, 2, 8)]
)
def test_weights_and_gradients_equal_fp64(
    rule: str, renormalize: bool, tokens: int, n_experts: int, k: int, tile: int
) -> None:
    logits = torch.randn(tokens, n_experts)
    experts = top_k(logits.softmax(dim=1), k)
    result = round_routing(logits.softmax(dim=1), experts, tile=tile, rule=rule, seed=1)
    factors = torch.randn(tokens, n_experts, dtype=torch.float64)

    exact_logits = logits.double().requires_grad_()
    exact = naive_weights(exact_logits.softmax(dim=1), result, renormalize)
    (exact * factors).sum().backward()
    own_E1 = torch.arange(n_experts)[:, None]
    exact_EA = torch.where(result.added_EA, exact[result.added_token_EA, own_E1], 0.0)

    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        own_logits = logits.to(dtype).requires_grad_()
        weights_TK, weights_EA = token_weights(own_logits.softmax(dim=1), experts, result, renormalize)
        assert weights_TK.dtype == weights_EA.dtype == dtype
        close = {"rtol": rtol, "atol": rtol * 1e-2}
        torch.testing.assert_close(weights_TK.double(), exact.gather(1, experts), **close)
        torch.testing.assert_close(weights_EA.double(), exact_EA, **close)
        assert (weights_TK[~result.keep_TK] == 0).all() and (weights_EA[~result.added_EA] == 0).all()
        # Each weight times the factor of its token and expert, wherever the weight stands.
        added = factors[result.added_token_EA, own_E1]
        ((weights_TK * factors.gather(1, experts)).sum() + (weights_EA * added).sum()).backward()
        assert own_logits.grad is not None and exact_logits.grad is not None
        torch.testing.assert_close(own_logits.grad.double(), exact_logits.grad, rtol=10 * rtol, atol=rtol)


@pytest.mark.parametrize("renormalize", [False, True])
def test_gradients_reach_the_scores_of_the_routing_and_no_other(renormalize: bool) -> None:
    scores = torch.rand(40, 8).requires_grad_()
    experts = top_k(scores, 2)
    result = round_routing(scores, experts, tile=8, rule="nearest")
    assert int(result.added) > 0 and int(result.dropped) > 0 and not result.member_TE.any(dim=1).all()
    weights_TK, weights_EA = token_weights(scores, experts, result, renormalize)
    (weights_TK.square().sum() + weights_EA.square().sum()).backward()
    assert scores.grad is not None and scores.grad.isfinite().all()
    alone_T1 = (result.member_TE.sum(dim=1) == 1)[:, None]  # divided by itself, a lone weight is 1 whatever the score
    moved = result.member_TE & ~alone_T1 if renormalize else result.member_TE
    assert (scores.grad != 0).equal(moved)
    if renormalize:
        total_T = weights_TK.sum(dim=1).index_add(0, result.added_token_EA.flatten(), weights_EA.flatten())
        torch.testing.assert_close(total_T, result.member_TE.any(dim=1).float())


# Devices.


@every_rule
def test_does_not_wait_for_the_device(rule: str) -> None:
    """Reading a value, or a shape that depends on one, is an error on fake tensors."""
    real = torch.rand(50, 8)
    expected = round_routing(real, top_k(real, 2), tile=16, rule=rule, seed=0)
    with FakeTensorMode():
        scores = torch.rand(50, 8, requires_grad=True)
        experts = torch.zeros(50, 2, dtype=torch.int64)
        result = round_routing(scores, experts, tile=16, rule=rule, seed=0)
        weights_TK, weights_EA = token_weights(scores, experts, result, True)
        (weights_TK.sum() + weights_EA.sum()).backward()
        for field in fields(Rounding):
            fake, there = getattr(result, field.name), getattr(expected, field.name)
            assert (fake.shape, fake.dtype) == (there.shape, there.dtype), field.name


@pytest.mark.gpu
@every_rule
def test_a_gpu_decides_as_the_cpu_does(rule: str) -> None:
    scores = torch.rand(2000, 64).softmax(dim=1)
    experts = top_k(scores, 8)
    expected = round_routing(scores, experts, tile=128, rule=rule, seed=11)
    scores, experts = scores.cuda(), experts.cuda()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = round_routing(scores, experts, tile=128, rule=rule, seed=11)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert all(getattr(result, f.name).cpu().equal(getattr(expected, f.name)) for f in fields(Rounding))


def test_mistakes_are_told_in_one_line() -> None:
    scores, experts = torch.rand(8, 4), torch.zeros(8, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="^model.router.rounding=nearby: must be one of nearest, stochastic, score, "):
        round_routing(scores, experts, tile=8, rule="nearby")
    with pytest.raises(ValueError, match="^model.router.rounding_tile=0: must be at least 1$"):
        round_routing(scores, experts, tile=0, rule="up")
    for rule in ("stochastic", "score"):
        with pytest.raises(ValueError, match=f"^model.router.rounding={rule}: draws random numbers, and no seed"):
            round_routing(scores, experts, tile=8, rule=rule)
