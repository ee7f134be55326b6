"""Balance losses against their definitions, and the load figures on cases worked by hand."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.moe.balance import balance_loss, load_figures, z_loss
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.layer import MoE
from moesaic.moe.model import initialize
from moesaic.moe.router import Routing, count_rows, topk_routing


def alone(counts: Tensor) -> Tensor:
    return counts


def routing_of(ids: Tensor, experts: int) -> Routing:
    return topk_routing(ids, torch.rand(ids.shape), experts)


def test_balance_loss_is_one_when_even_and_grows_with_imbalance() -> None:
    even = torch.full((12, 4), 0.25)
    everywhere = torch.tensor([[0, 1], [2, 3]]).repeat(6, 1)
    for over in ("micro_batch", "sequence", "global"):
        assert balance_loss(routing_of(everywhere, 4), even, over, 3, alone).item() == pytest.approx(1.0)
        # All rows to expert 0, which has probability 0.7: 4 * 1 * 0.7.
        skewed = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).expand(12, 4)
        assert balance_loss(routing_of(torch.zeros(12, 1).long(), 4), skewed, over, 3, alone).item() == pytest.approx(
            2.8
        )


@pytest.mark.parametrize(("over", "sequences"), [("micro_batch", 1), ("sequence", 1), ("sequence", 5), ("global", 5)])
def test_balance_loss_definition_and_gradient(over: str, sequences: int) -> None:
    logits = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    shares = logits.softmax(dim=1)
    ids = shares.topk(2, dim=1).indices
    elsewhere = torch.tensor([3, 0, 1, 7, 0, 9])  # what other ranks route, for `global`
    loss = balance_loss(routing_of(ids, 6), shares, over, sequences, lambda counts: counts + elsewhere)
    parts = torch.arange(20).chunk(sequences if over == "sequence" else 1)
    naive = torch.zeros((), dtype=torch.float64)
    for part in parts:
        counts = torch.bincount(ids[part].flatten(), minlength=6) + (elsewhere if over == "global" else 0)
        for e in range(6):
            mean = sum(shares[t, e] for t in part) / len(part)
            naive = naive + 6 * counts[e] / counts.sum() * mean / len(parts)
    torch.testing.assert_close(loss, naive)
    (mine,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(naive, logits)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("over", ["micro_batch", "sequence", "global"])
def test_the_loss_sees_what_was_chosen_before_drops(over: str) -> None:
    """Capacity and rounding change who computes, not who was wanted: else the loss would vanish where most is dropped."""
    shares = torch.rand(8, 3).softmax(dim=1)
    full = routing_of(torch.tensor([[0], [0], [1], [2], [2], [1], [1], [0]]), 3)
    expert_S = torch.cat((full.expert_S.masked_fill(torch.arange(8) < 5, 3), torch.tensor([2, 1])))
    token_S = torch.cat((full.token_S, torch.tensor([0, 7])))
    counts_E = count_rows(expert_S[expert_S < 3], 3)
    assert counts_E.tolist() != full.counts_E.tolist()
    changed = dataclasses.replace(full, expert_S=expert_S, token_S=token_S, counts_E=counts_E, per_token=0)
    assert torch.equal(balance_loss(changed, shares, over, 2, alone), balance_loss(full, shares, over, 2, alone))


def test_z_loss_definition() -> None:
    logits = torch.randn(13, 5, dtype=torch.float64)
    naive = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 13
    assert z_loss(logits).item() == pytest.approx(naive)


@pytest.mark.parametrize("over", ["micro_batch", "sequence", "global"])
def test_losses_of_no_tokens_are_zero(over: str) -> None:
    routing = routing_of(torch.zeros(0, 2, dtype=torch.int64), 4)
    assert balance_loss(routing, torch.zeros(0, 4), over, 0, alone).item() == 0
    assert z_loss(torch.zeros(0, 4)).item() == 0


def test_load_figures_by_hand() -> None:
    # Layer 0 even; layer 1: one expert has all 8 rows, so max/mean 4, standard deviation/mean sqrt(3), entropy 0.
    counts = torch.tensor([[2, 2, 2, 2], [0, 8, 0, 0]])
    # 4 tokens; the entropy of scores is log 4 a token in layer 0, half of it in layer 1; one drop, two additions.
    sums = torch.tensor([[4, 4 * math.log(4), 0, 0, 4, 0], [4, 2 * math.log(4), 1, 2, 1, 3]])
    figures = load_figures(counts, sums)
    assert figures["moe/load_max_over_mean"] == pytest.approx(4.0)
    assert figures["moe/load_cv"] == pytest.approx(math.sqrt(3) / 2)
    assert figures["moe/dead_fraction"] == pytest.approx(3 / 8)
    assert figures["moe/load_entropy"] == pytest.approx(0.5)
    assert figures["moe/router_entropy"] == pytest.approx(0.75)
    assert figures["moe/dropped"] == pytest.approx(1 / 8) and figures["moe/layer1/dropped"] == pytest.approx(1 / 4)
    assert figures["moe/layer1/added"] == pytest.approx(1 / 2) and figures["moe/unrouted"] == pytest.approx(3 / 8)
    # Tiles add 4 rows to the 8 of layer 0, and 1 to the 8 - 1 + 2 of layer 1.
    assert figures["moe/layer0/padding"] == pytest.approx(0.5) and figures["moe/layer1/padding"] == pytest.approx(1 / 9)
    assert figures["moe/layer0/load_max_over_mean"] == pytest.approx(1.0)
    unknown = sums.clone()
    unknown[:, 4] = torch.nan
    known = {key: value for key, value in figures.items() if "padding" not in key}
    assert load_figures(counts, unknown) == known


def layer(**router: Any) -> MoE:
    config = ModelConfig(d_model=16, n_heads=2, n_experts=6, d_expert=8, init_std=0.5, router=RouterConfig(**router))
    made = MoE(config)
    initialize(made, "ffn.", config, 0, torch.device("cpu"))
    return made


def test_a_layer_tells_what_was_chosen_and_what_tiles_add() -> None:
    x = torch.randn(40, 16)
    free, capped = layer(rounding_tile=16), layer(rounding_tile=16, capacity_factor=0.5)
    chosen = free(x)[1]["counts"]
    aux = capped(x)[1]
    assert torch.equal(aux["counts"], chosen)
    kept = chosen.clamp(max=7)  # 0.5 * 40 * 2 / 6, rounded up
    tokens, _, dropped, added, padding, _ = aux["figures"].tolist()
    assert (tokens, dropped, added) == (40, (chosen - kept).sum().item(), 0)
    assert padding == sum(-n % 16 for n in kept.tolist())
    assert free(x)[1]["figures"][4].item() == sum(-n % 16 for n in chosen.tolist())


@pytest.mark.parametrize(
    "router",
    [dict(), dict(kind="expert_choice", top_k=1), dict(capacity_factor=0.25), dict(rounding="down", rounding_tile=16)],
    ids=str,
)
def test_tokens_without_an_expert_are_counted(router: dict[str, Any]) -> None:
    made, x = layer(**router), torch.randn(40, 16)
    routing, _ = made.router(x)
    visited = {
        token for token, expert in zip(routing.token_S.tolist(), routing.expert_S.tolist(), strict=True) if expert < 6
    }
    unrouted = made(x)[1]["figures"][5].item()
    assert unrouted == 40 - len(visited) and (unrouted > 0) == bool(router)


@pytest.mark.parametrize(("over", "calls"), [("global", 1), ("micro_batch", 0), ("sequence", 0)])
def test_only_training_and_only_global_asks_other_ranks(over: str, calls: int) -> None:
    made, asked = layer(balance_over=over), []
    made.reduce = lambda counts: (asked.append(counts), counts)[1]
    made(torch.randn(8, 16))
    assert len(asked) == calls
    made.eval()(torch.randn(8, 16))
    assert len(asked) == calls
