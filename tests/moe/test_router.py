"""The router against plain definitions: which experts, in which order, with what weight."""

import pytest
import torch

from moesaic.moe.config import ModelConfig, RouterConfig
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
    routing, logits, _ = router(x)
    exact = (x.double() @ router.weight_ED.double().T).softmax(dim=1)
    weights = exact.gather(1, routing.experts_TK)
    if renormalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    torch.testing.assert_close(routing.weights_TK.double(), weights, rtol=1e-5, atol=0)
    assert (weights.diff(dim=1) <= 0).all()
    assert routing.counts_E.tolist() == torch.bincount(routing.experts_TK.flatten(), minlength=7).tolist()


def test_router_computes_in_fp32_whatever_it_is_given() -> None:
    router = Router(ModelConfig(d_model=16, n_heads=2, n_experts=4)).bfloat16()
    torch.nn.init.normal_(router.weight_ED)
    routing, logits, probs = router(torch.randn(5, 16, dtype=torch.bfloat16))
    assert {t.dtype for t in (routing.weights_TK, logits, probs)} == {torch.float32}


def test_no_tokens() -> None:
    router = Router(ModelConfig(d_model=16, n_heads=2, n_experts=4))
    torch.nn.init.normal_(router.weight_ED)
    routing, _, _ = router(torch.randn(0, 16))
    assert routing.experts_TK.shape == (0, 2) and routing.counts_E.tolist() == [0] * 4


def test_counts_without_a_row() -> None:
    assert count_rows(torch.tensor([[1, 3], [3, 1]]), 5).tolist() == [0, 2, 0, 2, 0]
