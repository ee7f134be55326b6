"""A step whose gradient norm is not finite changes nothing, on any rank, whichever engine, dense parameters and experts alike."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.parallel.apply import parallelize, start_engine
from moesaic.parallel.clip import local
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.engine import Engine
from moesaic.parallel.mesh import make_meshes
from tests.parallel.pool import Pool
from tests.parallel.shapes import CPU, config_of, whole

pytestmark = pytest.mark.xdist_group("skip")
LAYOUTS: list[dict[str, Any]] = [{"engine": "fsdp"}, *({"engine": "deepspeed", "zero_stage": i} for i in range(4))]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2) as pool:
        yield pool


def spoil(engine: Engine, experts: bool) -> None:
    """One value of one parameter's gradient on the last rank, of what that rank holds of it, becomes NaN."""
    gradients = engine.gradients()
    if dist.get_rank() == dist.get_world_size() - 1:
        mine = [local(t) for name, t in gradients.items() if ("experts" in name) == experts and local(t).numel()]
        mine[len(mine) // 2].view(-1)[0] = torch.nan


def run(layout: dict[str, Any], steps: list[str]) -> tuple[dict[str, Tensor], list[float]]:
    """All that is kept after these steps, and their norms. Steps are good, or bad in a way; good ones have the same batches in
    any run: those of their number among the good."""
    parallel = ParallelConfig(expert_path="all_to_all", **layout)
    model = parallelize(config_of("plain"), parallel, make_meshes("cpu", 2), seed=2, device=CPU, compute=torch.float32)
    engine = start_engine(parallel, model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3))
    norms = []
    for i, kind in enumerate(steps):
        generator = torch.Generator().manual_seed(100 * steps[:i].count("good") + dist.get_rank())
        for last in (False, True):
            loss = engine.model(*torch.randint(0, 61, (2, 2, 9), generator=generator)).loss
            assert loss is not None
            wrong = kind == "infinite loss" and last and dist.get_rank() == 0
            engine.backward(loss / 72 * (torch.inf if wrong else 1), last)
        if kind in ("dense", "experts"):
            spoil(engine, experts=kind == "experts")
        norms.append(engine.step(0.1, skip=kind == "told to").item())
        assert not any(p.grad is not None for p in model.parameters())
    kept = engine.weights() | engine.moments() | {"steps": engine.steps()}
    return {name: whole(t) for name, t in kept.items()}, norms


def skipped(layout: dict[str, Any]) -> list[str]:
    """What differs where steps that must be skipped come between the others."""
    want, _ = run(layout, ["good", "good"])
    got, norms = run(layout, ["dense", "good", "experts", "infinite loss", "told to", "good"])
    assert [norm == norm and norm < torch.inf for norm in norms] == [False, True, False, False, True, True], norms
    assert want["steps"] == 2
    none, _ = run(layout, ["told to"])  # there are moments to be saved all the same
    assert none.keys() == want.keys() and none["steps"] == 0
    assert not any(value.any() for name, value in none.items() if name.startswith("exp_avg"))
    return [name for name in want.keys() | got.keys() if not torch.equal(want[name], got[name])]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda knobs: "-".join(map(str, knobs.values())))
def test_a_norm_that_is_not_finite_changes_nothing(layout: dict[str, Any], pool: Pool) -> None:
    assert pool.run(skipped, layout) == [[], []]
