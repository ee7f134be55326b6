"""The all-to-all path against the local one, on workloads that uneven exchanges get wrong."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.dispatch import LocalPath
from moesaic.moe.experts import Experts
from moesaic.moe.router import count_rows, topk_routing
from moesaic.parallel.expert import AllToAllPath, received_rows
from tests.parallel.ranks import run_ranks

EXPERTS, D, F, K = 8, 16, 12, 2
CONFIG = ModelConfig(d_model=D, n_heads=2, n_experts=EXPERTS, d_expert=F, router=RouterConfig(top_k=K))


def test_received_rows_by_hand() -> None:
    # Two sources, two local experts; what arrives, as source/expert/number: a0 a0 a1 | b1 b1 b1, rows 0..5.
    rows = received_rows(torch.tensor([[2, 1], [0, 3]]), 6)
    assert rows.counts_E.tolist() == [2, 4]
    assert rows.source_R.tolist() == [0, 1, 2, 3, 4, 5]
    # Source a: one row of each; b: two and one. Arrival: a/0 a/1 b/0 b/0 b/1; by expert: 0 2 3 | 1 4.
    rows = received_rows(torch.tensor([[1, 1], [2, 1]]), 5)
    assert rows.source_R.tolist() == [0, 2, 3, 1, 4]
    assert rows.bag.flatten().tolist() == [0, 3, 1, 2, 4]


def workload(name: str, rank: int) -> Tensor:
    """Expert ids (T, K) of a rank, distinct in a row."""
    generator = torch.Generator().manual_seed(100 * rank + len(name))
    tokens = {
        "uniform": 33,
        "unused_slots": 29,
        "zipf": 47,
        "one_expert": 21,
        "idle_rank": 19,
        "no_tokens": 0 if rank == 0 else 17,
    }.get(name, 1)
    if name == "one_expert":
        return torch.tensor([[5, 2]]).repeat(tokens, 1)
    if name == "idle_rank":  # nothing for experts of the last rank
        weights = torch.tensor([1.0] * 4 + [0.0] * 4)
    elif name == "zipf":
        weights = 1 / torch.arange(1, EXPERTS + 1)
    else:
        weights = torch.ones(EXPERTS)
    if tokens == 0:
        return torch.zeros(0, K, dtype=torch.int64)
    return torch.multinomial(weights.expand(tokens, EXPERTS), K, generator=generator)


WORKLOADS = ["uniform", "unused_slots", "zipf", "one_expert", "idle_rank", "no_tokens", "single_token"]


def compare(names: list[str]) -> list[dict[str, float]]:
    """The largest relative differences of output and gradients on this rank, per workload."""
    rank, world = dist.get_rank(), dist.get_world_size()
    results = []
    for name in names:
        torch.manual_seed(1)
        whole = Experts(CONFIG)
        for parameter in whole.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        part = Experts(
            ModelConfig(d_model=D, n_heads=2, n_experts=EXPERTS // world, d_expert=F, router=RouterConfig(top_k=1))
        )
        share = slice(rank * EXPERTS // world, (rank + 1) * EXPERTS // world)
        with torch.no_grad():
            part.w_up_EGD.copy_(whole.w_up_EGD[share])
            part.w_down_EDF.copy_(whole.w_down_EDF[share])

        ids = workload(name, rank)
        torch.manual_seed(2 + rank)
        x, weights, gradient = torch.randn(len(ids), D), torch.rand(len(ids), K), torch.randn(len(ids), D)

        def run(path: Any, experts: Experts) -> tuple[Tensor, Tensor, Tensor]:
            leaf, scale = x.clone().requires_grad_(), weights.clone().requires_grad_()
            routing = topk_routing(ids, scale, EXPERTS)
            if (
                name == "unused_slots"
            ):  # as capacity and rounding leave them: a token without any, others with one or two
                unused_S = torch.arange(ids.numel()) % 3 == 0
                unused_S[:K] = True
                expert_S = routing.expert_S.masked_fill(unused_S, EXPERTS)
                counts_E = count_rows(expert_S[~unused_S], EXPERTS)
                weights_S = routing.weights_S * ~unused_S
                routing = dataclasses.replace(
                    routing, expert_S=expert_S, counts_E=counts_E, weights_S=weights_S, per_token=0
                )
            y = path(leaf, routing, experts)
            y.backward(gradient)
            return y.detach(), leaf.grad, scale.grad

        want = run(LocalPath(), whole)
        got = run(AllToAllPath(dist.group.WORLD), part)
        again_part = {n: p.grad.clone() for n, p in part.named_parameters()}
        part.zero_grad()
        again = run(AllToAllPath(dist.group.WORLD), part)
        same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        same &= all(torch.equal(p.grad, again_part[n]) for n, p in part.named_parameters())
        errors = {"bits_differ": 0.0 if same else 1.0}
        for key, mine, theirs in zip(("y", "dx", "dweights"), got, want, strict=True):
            errors[key] = difference(mine, theirs)
        for n, parameter in whole.named_parameters():
            dist.all_reduce(parameter.grad)
            errors[n] = difference(getattr(part, n).grad, parameter.grad[share])
        results.append(errors)
    return results


def difference(mine: Tensor, theirs: Tensor) -> float:
    if theirs.numel() == 0:
        return 0.0 if mine.shape == theirs.shape else 1.0
    return ((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9)).item()


@pytest.mark.parametrize("world", [2, 4])
def test_equals_local_path(world: int, tmp_path: Path) -> None:
    for rank, results in enumerate(run_ranks(compare, world, tmp_path, WORKLOADS)):
        for name, errors in zip(WORKLOADS, results, strict=True):
            assert max(errors.values()) < 2e-6, (rank, name, errors)
