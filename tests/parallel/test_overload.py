"""A limit on the rows of a rank: which go, that nothing else changes, and the line that ends a run instead."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moesaic.moe.config import RouterConfig
from moesaic.moe.dispatch import LocalPath
from moesaic.moe.router import Routing, topk_routing
from moesaic.parallel.apply import parallelize
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.expert import AllToAllPath
from moesaic.parallel.mesh import make_meshes
from moesaic.parallel.overload import Limit, OverloadError, shed
from moesaic.parallel.two_hop import TwoHopPath
from tests.parallel.ranks import run_ranks
from tests.parallel.test_expert import CONFIG, difference, experts_of, run

SKEWED = ["uniform", "zipf", "one_expert", "idle_rank", "no_tokens", "unused_slots", "capacity", "rounding"]


def test_by_hand() -> None:
    # Two ranks of one expert. Source 0 sends three slots to rank 0, source 1 one; the limit is 6 / 2 = 3. Of rank 0's load of 4,
    # source 0 keeps 3 * 3 // 4 = 2 and source 1 the other.
    weights = torch.tensor([[0.3, 0.1], [0.5, 0.2], [0.3, 0.9]], requires_grad=True)
    ids = torch.tensor([[0, 1], [0, 1], [0, 1]])
    routing = topk_routing(ids[:, :1], weights[:, :1], 2)
    kept = shed(routing, torch.tensor([[3, 0], [1, 2]]), 0, 1.0)
    assert kept.expert_S.tolist() == [0, 0, 2]  # of the two of weight 0.3 the later one goes
    assert (kept.counts_E.tolist(), kept.dropped.item(), kept.per_token) == ([2, 0], 1, 0)
    assert torch.equal(kept.chosen_S, routing.chosen_S)  # balance sees what was chosen
    kept.weights_S.sum().backward()
    assert weights.grad.tolist() == [[1, 0], [1, 0], [0, 0]]
    # 4 / 3 of an even load is 4, which is what comes: nothing goes.
    assert torch.equal(shed(routing, torch.tensor([[3, 0], [1, 2]]), 0, 4 / 3).expert_S, routing.expert_S)


@given(st.integers(0, 2**31), st.integers(1, 5), st.sampled_from([1.0, 1.1, 1.5, 3.0]))
def test_what_is_kept(seed: int, ranks: int, factor: float) -> None:
    """An overloaded rank gets exactly the limit, another one all of its slots; no source keeps a slot and drops a heavier one."""
    generator = torch.Generator().manual_seed(seed)
    experts = 2 * ranks
    routings = []
    for _ in range(ranks):
        tokens = int(torch.randint(0, 12, (), generator=generator))
        likely = torch.rand(experts, generator=generator).square().expand(tokens, experts) + 1e-3
        ids = torch.multinomial(likely, 2, generator=generator) if tokens else torch.zeros(0, 2, dtype=torch.int64)
        weights = (torch.rand(tokens, 2, generator=generator) * 4).ceil()  # with ties
        routings.append(topk_routing(ids, weights, experts))
    slots_WW = torch.stack([r.counts_E.view(ranks, 2).sum(dim=1) for r in routings])
    kept = [shed(r, slots_WW, rank, factor) for rank, r in enumerate(routings)]
    limit = -(-(slots_WW.sum().item() * factor - 1e-5) // ranks)
    load_W = sum(r.counts_E.view(ranks, 2).sum(dim=1) for r in kept)
    assert load_W.tolist() == slots_WW.sum(dim=0).clamp(max=int(limit)).tolist()
    for before, after in zip(routings, kept, strict=True):
        assert after.dropped == (after.expert_S != before.expert_S).sum()
        assert torch.equal(after.counts_E, torch.bincount(after.expert_S, minlength=experts + 1)[:-1])
        for rank in range(ranks):
            there = before.expert_S // 2 == rank
            gone = there & (after.expert_S == experts)
            stays = there & ~gone
            if gone.any() and stays.any():
                assert before.weights_S[gone].max() <= before.weights_S[stays].min()


class Replay(LocalPath):
    """One rank's call on one process, told what all ranks would send."""

    def __init__(self, slots_WW: Tensor, rank: int, factor: float) -> None:
        self.known = slots_WW, rank, factor

    def admit(self, routing: Routing) -> Routing:
        return shed(routing, *self.known)


def admitted(path: Any) -> Any:
    """The path as a layer calls it in training."""
    return lambda x, routing, experts: path(x, path.admit(routing), experts)


def compare(names: list[str]) -> list[dict[str, float]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    group, limit, results = dist.group.WORLD, Limit(1.25, "drop"), []
    paths = [
        AllToAllPath(group, 2, limit=limit), TwoHopPath(group, init_device_mesh("cpu", (2, 2)), limit=limit),
    ]  # fmt: skip
    for name in names:
        whole, part = experts_of(False), experts_of(False, world, rank)
        routings: list[Routing] = []

        def noted(x: Tensor, routing: Routing, experts: Any) -> Tensor:
            routings.append(routing)
            return LocalPath()(x, routing, experts)

        plain = run(noted, whole, name, rank)
        slots_WW = torch.zeros(world * world, dtype=torch.int64)
        dist.all_gather_single(slots_WW, routings[0].counts_E.view(world, -1).sum(dim=1))
        slots_WW = slots_WW.view(world, world)
        want = run(admitted(Replay(slots_WW, rank, 1.25)), whole, name, rank)
        for n, parameter in whole.named_parameters():
            dist.all_reduce(parameter.grad)
            want[n] = parameter.grad.chunk(world)[rank]
        got = [run(admitted(path), part, name, rank) for path in paths]
        again = [run(admitted(path), part, name, rank) for path in paths]
        errors = {f"{i} {key}": difference(got[i][key], want[key]) for i in (0, 1) for key in want}
        errors |= {f"bits {key}": 0.0 if torch.equal(got[0][key], got[1][key]) else 1.0 for key in want}
        errors |= {
            f"again {key}": 0.0 if torch.equal(again[i][key], got[i][key]) else 1.0 for i in (0, 1) for key in want
        }
        lost = ((plain["dweights"] != 0) & (got[0]["dweights"] == 0)).sum().item()
        errors["dropped"] = float(lost != routings[0].counts_E.sum() - paths[0].admit(routings[0]).counts_E.sum())
        errors["none dropped"] = float(name in ("one_expert", "zipf") and rank == 3 and lost == 0)
        results.append(errors)
    return results


def test_a_drop_is_what_one_process_computes_without_these_rows(tmp_path: Path) -> None:
    for rank, results in enumerate(run_ranks(compare, 4, tmp_path, SKEWED)):
        for name, errors in zip(SKEWED, results, strict=True):
            wrong = {key: error for key, error in errors.items() if not error < 2e-6}
            assert not wrong, (rank, name, wrong)


def in_a_model() -> list[Any]:
    """Counts and dropped of the layers, with no limit and with one; the line of an error in training: an evaluation has none."""
    results: list[Any] = []
    model_config = dataclasses.replace(CONFIG, vocab_size=31, n_layers=2, router=RouterConfig(top_k=1))
    meshes = make_meshes("cpu", 2)
    rank = dist.get_rank()
    # The ranks of one expert group alone have an uneven load: their tokens are all the same.
    tokens = torch.full((2, 14), 3) if rank < 2 else torch.arange(28).view(2, 14)
    for knobs in ({}, dict(max_recv_tokens_factor=1.1, overload="drop"), dict(max_recv_tokens_factor=1.9)):
        model = parallelize(
            model_config, ParallelConfig(**knobs), meshes, seed=3, device=torch.device("cpu"), compute=torch.float32
        )
        try:
            with torch.no_grad():
                model.eval()(tokens[:, :-1], tokens[:, 1:])
            model.reshard()
            out = model.train()(tokens[:, :-1], tokens[:, 1:])
            results.append((out.counts, out.figures[:, 2]))
        except OverloadError as error:
            results.append(str(error))
    return results


def recomputed(expert_path: str) -> list[dict[str, Tensor]]:
    """Gradients with rows dropped: nothing recomputed, then all but the experts, then all."""
    model_config = dataclasses.replace(CONFIG, vocab_size=31, n_layers=2, d_shared=8)
    meshes, results = make_meshes("cpu", 4), []
    tokens = torch.randint(0, 31, (2, 14), generator=torch.Generator().manual_seed(dist.get_rank()))
    for remat in ("none", "selective", "full"):
        knobs = ParallelConfig(
            expert_path=expert_path, node_size="2", max_recv_tokens_factor=1.0, overload="drop", remat=remat
        )
        model = parallelize(model_config, knobs, meshes, seed=3, device=torch.device("cpu"), compute=torch.float32)
        out = model(tokens[:, :-1], tokens[:, 1:])
        assert out.figures[:, 2].sum() > 0
        out.loss.backward()
        results.append({n: p.grad.full_tensor() for n, p in model.named_parameters()})
    return results


def test_a_drop_is_decided_once(tmp_path: Path) -> None:
    """Where activations are computed again, the same rows are missing."""
    for want, selective, full in run_ranks(recomputed, 4, tmp_path, "two_hop"):
        for name, value in want.items():
            assert max(difference(selective[name], value), difference(full[name], value)) < 1e-6, name


def test_a_drop_is_counted_and_an_error_is_one_line_on_all_ranks(tmp_path: Path) -> None:
    ranks = run_ranks(in_a_model, 4, tmp_path)
    lines = set()
    for (plain_counts, none), (counts, _), line in ranks:
        assert torch.equal(counts[0], plain_counts[0])  # what the first layer's tokens chose
        assert none.tolist() == [0, 0]
        lines.add(line)
    assert sum(dropped[0] for _, (_, dropped), _ in ranks[:2]) > 0
    (line,) = lines
    assert line.startswith("parallel.max_recv_tokens_factor=1.9: rank ") and "in blocks.0.ffn, " in line
    assert line.endswith("times an even load; raise it, or leave rows out with parallel.overload=drop")


def test_which_rank_is_named() -> None:
    Limit(1.5, "error").check([3, 1, 2, 2], 2)
    # Groups of two: even loads of 2 and 10. Rank 3 has 1.6 times its own, and only in its group is that too much.
    with pytest.raises(
        OverloadError, match=r"=1.5: rank 3 would receive 16 rows in blocks.7.ffn, 1.60 times an even load"
    ):
        Limit(1.5, "error", "blocks.7.ffn").check([3, 1, 4, 16], 2)


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        (dict(max_recv_tokens_factor=0.5), "parallel.max_recv_tokens_factor=0.5: must be at least 1"),
        (dict(overload="drop"), "parallel.overload=drop: needs a limit, parallel.max_recv_tokens_factor"),
        (dict(max_recv_tokens_factor=2.0, overload="stop"), "parallel.overload=stop: must be one of error, drop"),
    ],
)
def test_mistakes(knobs: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        ParallelConfig(**knobs)
