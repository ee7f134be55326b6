"""The router against plain definitions: which experts, in which order, with what weight."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.moe.balance import update_bias
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.model import build
from moesaic.moe.router import Router, count_rows, stable_topk


def naive_topk(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 1, 1), (17, 5, 5), (63, 33, 4), (40, 256, 8)])
def test_topk_breaks_ties_by_lower_id(tokens: int, experts: int, k: int) -> None:
    # Few distinct values, so that almost every row has ties; negative ones, as biased scores will be.
    scores = torch.randint(-3, 4, (tokens, experts)) / 8.0
    assert stable_topk(scores, k).tolist() == [naive_topk(row, k) for row in scores.tolist()]


def test_topk_orders_every_float() -> None:
    extremes = torch.tensor([[0.0, 1e-45, -1e-45, 3e38, -3e38, 1e-30, 1.0, -1.0, 1.0000001]])
    assert stable_topk(extremes, 9)[0].tolist() == naive_topk(extremes[0].tolist(), 9)


@pytest.mark.parametrize("renormalize", [False, True])
def test_weights_are_the_softmax_of_the_chosen(renormalize: bool) -> None:
    config = ModelConfig(d_model=24, n_experts=7, n_heads=2, router=RouterConfig(top_k=3, renormalize=renormalize))
    router = Router(config)
    torch.nn.init.normal_(router.weight_ED)
    x = torch.randn(29, 24)
    routing, _ = router(x)
    experts = routing.expert_S.view(29, 3)
    exact = (x.double() @ router.weight_ED.double().T).softmax(dim=1)
    weights = exact.gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    torch.testing.assert_close(routing.weights_S.view(29, 3).double(), weights, rtol=1e-5, atol=0)
    assert (weights.diff(dim=1) <= 0).all()
    assert routing.counts_E.tolist() == torch.bincount(routing.expert_S, minlength=7).tolist()


def test_router_computes_in_fp32_whatever_it_is_given() -> None:
    router = Router(ModelConfig(d_model=16, n_heads=2, n_experts=4)).bfloat16()
    torch.nn.init.normal_(router.weight_ED)
    routing, scores = router(torch.randn(5, 16, dtype=torch.bfloat16))
    assert {t.dtype for t in (routing.weights_S, scores.logits_TE, scores.shares_TE)} == {torch.float32}


@pytest.mark.parametrize("knobs", [
    dict(), dict(kind="sigmoid_bias", groups=2), dict(kind="expert_choice"), dict(capacity_factor=1.0), dict(rounding="score"),
], ids=str)  # fmt: skip
def test_no_tokens(knobs: dict[str, Any]) -> None:
    router = Router(ModelConfig(d_model=16, n_heads=2, n_experts=4, router=RouterConfig(**knobs)))
    torch.nn.init.normal_(router.weight_ED)
    routing, _ = router(torch.randn(0, 16))
    assert routing.expert_S.shape == (0,) and routing.counts_E.tolist() == [0] * 4


def made(kind: str = "softmax_topk", tokens: int = 50, experts: int = 8, **knobs: Any) -> tuple[Router, Tensor]:
    config = ModelConfig(d_model=16, n_heads=2, n_experts=experts, router=RouterConfig(kind=kind, **knobs))
    router = Router(config)
    torch.nn.init.normal_(router.weight_ED)
    return router, torch.randn(tokens, 16)


@pytest.mark.parametrize(("groups", "kept", "renormalize"), [(1, 1, True), (4, 2, True), (2, 1, False)])
def test_sigmoid_bias_as_deepseek_v3(groups: int, kept: int, renormalize: bool) -> None:
    """Token by token: the bias decides who is chosen, and nothing else; groups count by their two best."""
    router, x = made("sigmoid_bias", groups=groups, groups_kept=kept, top_k=3, renormalize=renormalize, scale=2.5)
    router.bias_E.copy_(torch.randn(8))
    routing, scores = router(x)
    size = 8 // groups
    for t, row in enumerate((x.double() @ router.weight_ED.double().T).sigmoid().tolist()):
        biased = [s + b for s, b in zip(row, router.bias_E.tolist(), strict=True)]
        by_group = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        best = naive_topk(by_group, kept)
        allowed = [b if e // size in best else -math.inf for e, b in enumerate(biased)]
        chosen = naive_topk(allowed, 3)
        assert routing.expert_S.view(-1, 3)[t].tolist() == chosen
        total = sum(row[e] for e in chosen) if renormalize else 1.0
        want = [2.5 * row[e] / total for e in chosen]
        assert routing.weights_S.view(-1, 3)[t].tolist() == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(scores.shares_TE.sum(dim=1), torch.ones(50))
    assert "bias_E" in dict(router.named_buffers()) and "bias_E" not in dict(router.named_parameters())


def test_bias_moves_against_the_load() -> None:
    config = ModelConfig(d_model=16, n_heads=2, n_layers=3, n_dense_layers=1, d_dense=8, n_experts=4, d_expert=8, vocab_size=9,
                         router=RouterConfig(kind="sigmoid_bias", bias_rate=0.25))  # fmt: skip
    model = build(config, 0, torch.device("cpu"))
    update_bias(model, torch.tensor([[10, 0, 5, 5], [2, 2, 2, 2]]))
    first, second = (layer.router.bias_E.tolist() for layer in model.moe_layers())
    assert first == [-0.25, 0.25, 0.0, 0.0] and second == [0.0] * 4


def test_expert_choice_takes_each_experts_best_tokens() -> None:
    router, x = made("expert_choice", tokens=21, top_k=2)
    routing, scores = router(x)
    capacity = -(-21 * 2 // 8)
    assert routing.counts_E.tolist() == [capacity] * 8 and routing.per_token == 0
    for e in range(8):
        mine = routing.expert_S == e
        assert routing.token_S[mine].tolist() == naive_topk(scores.shares_TE[:, e].tolist(), capacity)
        torch.testing.assert_close(routing.weights_S[mine], scores.shares_TE[routing.token_S[mine], e])
    with pytest.raises(ValueError, match=r"model\.router\.kind=expert_choice: .*later tokens"):
        router.eval()(x)


def test_expert_choice_renormalizes_over_the_experts_that_took_the_token() -> None:
    router, x = made("expert_choice", tokens=21, top_k=3, renormalize=True, scale=2.0)
    routing, scores = router(x)
    for t in range(21):
        mine = routing.token_S == t
        chosen = scores.shares_TE[t, routing.expert_S[mine]]
        torch.testing.assert_close(routing.weights_S[mine], 2 * chosen / chosen.sum())


@pytest.mark.parametrize("factor", [0.482, 0.5, 1.0, 1.12, 1.25, 8.0])
def test_capacity_drops_the_lowest_scores(factor: float) -> None:
    router, x = made(capacity_factor=factor, top_k=3, renormalize=True)
    routing, scores = router(x)
    full = stable_topk(scores.shares_TE, 3)
    capacity = math.ceil(Fraction(str(factor)) * 50 * 3 / 8)
    kept = [set() for _ in range(50)]
    for e in range(8):
        rows = [(-scores.shares_TE[t, e].item(), t) for t in range(50) if e in full[t].tolist()]
        for _, t in sorted(rows)[:capacity]:
            kept[t].add(e)
    for t in range(50):
        mine = (routing.token_S == t) & (routing.expert_S < 8)
        assert set(routing.expert_S[mine].tolist()) == kept[t]
        if kept[t]:
            assert routing.weights_S[mine].sum().item() == pytest.approx(1.0, rel=1e-5)
    assert routing.dropped.item() == 150 - sum(map(len, kept)) == 150 - routing.counts_E.sum().item()
    assert (routing.weights_S[routing.expert_S == 8] == 0).all()
    plain, _ = router.eval()(x)
    assert plain.dropped.item() == 0 and plain.per_token == 3


@pytest.mark.parametrize("kind", ["softmax_topk", "sigmoid_bias"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "score", "balance", "up", "down"])
def test_rounding_in_training_only(kind: str, rounding: str) -> None:
    router, x = made(kind, tokens=61, rounding=rounding, rounding_tile=4, top_k=2, renormalize=True)
    torch.manual_seed(3)
    routing, scores = router(x)
    torch.manual_seed(3)
    again, _ = router(x)
    assert torch.equal(routing.expert_S, again.expert_S) and torch.equal(routing.weights_S, again.weights_S)
    assert (routing.counts_E % 4 == 0).all()
    used = routing.expert_S < 8
    assert torch.equal(count_rows(routing.expert_S[used], 8), routing.counts_E)
    assert used.sum() == 61 * 2 - routing.dropped + routing.added
    per_token = torch.zeros(61).index_add_(0, routing.token_S, routing.weights_S.detach())
    visited = torch.zeros(61).index_add_(0, routing.token_S[used], torch.ones(int(used.sum()))) > 0
    torch.testing.assert_close(per_token[visited], torch.ones(int(visited.sum())))
    routing.weights_S.sum().backward()
    plain, _ = router.eval()(x)
    assert plain.per_token == 2 and torch.equal(plain.expert_S.view(61, 2)[:, 0], scores.shares_TE.argmax(dim=1))


def test_counts_without_a_row() -> None:
    assert count_rows(torch.tensor([[1, 3], [3, 1]]), 5).tolist() == [0, 2, 0, 2, 0]
