"""A checkpoint written in one layout is the same state in another; half a checkpoint is none."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.model import build
from moesaic.parallel import checkpoint
from moesaic.parallel.apply import parallelize, start_engine
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.engine import Engine
from moesaic.parallel.mesh import make_meshes
from tests.parallel.ranks import run_ranks

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=61, d_model=24, n_layers=2, n_heads=2, n_experts=4, d_expert=12, tie_embeddings=True,
    router=RouterConfig(top_k=2),
)  # fmt: skip


class Layout(NamedTuple):
    expert: int
    replicate: int = 1
    stage: int | None = None  # of ZeRO; None: FSDP2


def started(layout: Layout, seed: int) -> Engine:
    parallel = ParallelConfig(
        engine="fsdp" if layout.stage is None else "deepspeed",
        zero_stage=layout.stage,
        expert_path="all_to_all" if layout.expert > 1 else "local",
    )
    meshes = make_meshes("cpu", layout.expert, layout.replicate)
    model = parallelize(CONFIG, parallel, meshes, seed=seed, device=CPU, compute=torch.float32)
    return start_engine(parallel, model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def train(engine: Engine, first: int, end: int) -> None:
    for step in range(first, end):
        tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(step))
        engine.backward(engine.model(tokens[:, :-1], tokens[:, 1:]).loss / 32, last=True)
        engine.step(0.0)


def state_of(engine: Engine) -> dict[str, Tensor]:
    def whole(tensor: Any) -> Tensor:
        return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()

    state = {name: whole(tensor) for name, tensor in [*engine.weights().items(), *engine.moments().items()]}
    return state | {"steps": engine.steps().clone()}


def write(root: Path, layouts: list[Layout]) -> list[list[dict[str, Tensor]]]:
    """Of each layout: the state that is saved, after three steps, and that after two more."""
    results = []
    for i, layout in enumerate(layouts):
        engine = started(layout, seed=1)
        train(engine, 0, 3)
        torch.manual_seed(77)
        checkpoint.save(root / str(i), 3, engine, {"step": 3}, keep=2)
        saved = state_of(engine)
        train(engine, 3, 5)
        results.append([saved, state_of(engine)])
    return results


def read(root: Path, layouts: list[Layout]) -> list[tuple[list[dict[str, Tensor]], float]]:
    """The same, and a random number, from these checkpoints; into an engine that has made a step of its own, or a new one."""
    results = []
    for i, layout in enumerate(layouts):
        engine = started(layout, seed=9)
        train(engine, 0, i % 2)
        checkpoint.load(checkpoint.complete_checkpoints(root / str(i))[-1], engine)
        random = torch.rand(()).item()
        loaded = state_of(engine)
        train(engine, 3, 5)
        results.append(([loaded, state_of(engine)], random))
    return results


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        (one[name] - other[name]).abs().max() <= 1e-4 * other[name].abs().max() for name in one
    )


def zero(stage: int, expert: int) -> Layout:
    return Layout(expert, stage=stage)


# Numbers of ranks that write and that read, and their layouts.
LAYOUTS = {
    (2, 2): [
        (Layout(2), Layout(1)), (Layout(2), Layout(2)), (zero(0, 2), zero(3, 1)), (zero(1, 2), zero(1, 2)),
        (zero(2, 1), zero(2, 1)), (zero(2, 2), Layout(2)), (zero(3, 2), zero(3, 2)), (zero(3, 1), zero(3, 1)),
        (Layout(1), zero(0, 2)), (zero(0, 2), zero(0, 2)),
    ],
    (2, 4): [(Layout(1), Layout(2)), (Layout(1), Layout(4, 2)), (zero(2, 1), zero(1, 4))],
    (4, 1): [(Layout(2), Layout(1)), (zero(3, 4), zero(2, 1))],
    (4, 2): [(Layout(4), Layout(2)), (Layout(2, 2), Layout(1)), (zero(3, 2), zero(2, 1)), (zero(1, 2), zero(3, 2))],
    (4, 4): [(Layout(1, 2), Layout(2, 2)), (Layout(2, 2), zero(3, 4))],
}  # fmt: skip


@pytest.mark.parametrize(("world", "to_world"), LAYOUTS)
def test_another_layout_loads_the_same_state(world: int, to_world: int, tmp_path: Path) -> None:
    root, pairs = tmp_path / "checkpoints", LAYOUTS[world, to_world]
    written = run_ranks(write, world, make(tmp_path / "write"), root, [layout for layout, _ in pairs])[0]
    for results in run_ranks(read, to_world, make(tmp_path / "read"), root, [to_layout for _, to_layout in pairs]):
        for pair, (saved, later), ((got, got_later), random) in zip(pairs, written, results, strict=True):
            assert same(got, saved), pair
            if world == to_world:  # the loss, a sum over ranks that all have the same batch, depends on their number
                equal = same if pair[0] == pair[1] else close
                assert equal(got_later, later), pair
            if to_world <= world:  # this rank's random state was saved
                assert random == torch.rand((), generator=torch.Generator().manual_seed(77)).item()
    for i, (saved, _) in enumerate(written):
        model = build(CONFIG, 5, CPU)
        checkpoint.load_model(root / str(i) / "step_00000003", model)
        assert all(torch.equal(p, saved[n]) for n, p in model.named_parameters())
    assert checkpoint.read_state(root / "0" / "step_00000003") == {"step": 3}


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def save_many(root: Path) -> list[str]:
    engine = started(Layout(1), seed=1)
    train(engine, 0, 1)
    for step in (1, 2, 3, 12, 12):  # the last one again, as after a resume from an earlier checkpoint
        checkpoint.save(root, step, engine, {"step": step}, keep=2)
    return sorted(path.name for path in root.iterdir())


def test_only_the_newest_are_kept_and_only_complete_ones_count(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert checkpoint.complete_checkpoints(root) == []
    names = run_ranks(save_many, 1, make(tmp_path / "job"), root)[0]
    assert names == ["step_00000003", "step_00000012"]
    shutil.copytree(root / "step_00000012", root / "step_00000020.tmp")
    (root / "step_00000030").mkdir()  # no state.json
    (root / "notes").mkdir()
    assert [path.name for path in checkpoint.complete_checkpoints(root)] == names
    checkpoint.remove_leftovers(root)
    assert not (root / "step_00000020.tmp").exists() and (root / "notes").exists()
