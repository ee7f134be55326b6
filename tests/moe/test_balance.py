"""Balance losses against their definitions, and the load figures on cases worked by hand."""

import math

import pytest
import torch

from moesaic.moe.balance import balance_loss, load_figures, z_loss


def test_balance_loss_is_one_when_even_and_grows_with_imbalance() -> None:
    even = torch.full((12, 4), 0.25)
    assert balance_loss(even, torch.tensor([6, 6, 6, 6])).item() == pytest.approx(1.0)
    # All rows to expert 0, which has probability 0.7: 4 * 1 * 0.7.
    skewed = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).expand(12, 4)
    assert balance_loss(skewed, torch.tensor([12, 0, 0, 0])).item() == pytest.approx(2.8)


def test_balance_loss_definition_and_gradient() -> None:
    logits = torch.randn(19, 6, dtype=torch.float64, requires_grad=True)
    probs = logits.softmax(dim=1)
    ids = probs.topk(2, dim=1).indices
    counts = torch.bincount(ids.flatten(), minlength=6)
    loss = balance_loss(probs, counts)
    naive = 6 * sum(counts[e] / 38 * sum(probs[t, e] for t in range(19)) / 19 for e in range(6))
    torch.testing.assert_close(loss, naive)
    (mine,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(naive, logits)
    torch.testing.assert_close(mine, theirs)


def test_z_loss_definition() -> None:
    logits = torch.randn(13, 5, dtype=torch.float64)
    naive = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 13
    assert z_loss(logits).item() == pytest.approx(naive)


def test_losses_of_no_tokens_are_zero() -> None:
    assert balance_loss(torch.zeros(0, 4), torch.zeros(4, dtype=torch.int64)).item() == 0
    assert z_loss(torch.zeros(0, 4)).item() == 0


def test_load_figures_by_hand() -> None:
    # Layer 0 even; layer 1: one expert has all 8 rows, so max/mean 4, standard deviation/mean sqrt(3), entropy 0.
    figures = load_figures(torch.tensor([[2, 2, 2, 2], [0, 8, 0, 0]]))
    assert figures["moe/load_max_over_mean"] == pytest.approx(4.0)
    assert figures["moe/load_cv"] == pytest.approx(math.sqrt(3) / 2)
    assert figures["moe/dead_fraction"] == pytest.approx(3 / 8)
    assert figures["moe/load_entropy"] == pytest.approx(0.5)
