"""A checkpoint written in one layout is the same state in another; half a checkpoint is none."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.model import build
from moesaic.parallel import checkpoint
from moesaic.parallel.apply import parallelize
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.mesh import make_meshes
from tests.parallel.ranks import run_ranks

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=61, d_model=24, n_layers=2, n_heads=2, n_experts=4, d_expert=12, tie_embeddings=True,
    router=RouterConfig(top_k=2),
)  # fmt: skip


def trained(expert: int, steps: int, seed: int, replicate: int = 1) -> tuple[Any, torch.optim.Optimizer]:
    path = "all_to_all" if expert > 1 else "local"
    model = parallelize(
        CONFIG,
        ParallelConfig(expert_path=path),
        make_meshes("cpu", expert, replicate),
        seed=seed,
        device=CPU,
        compute=torch.float32,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(step))
        (model(tokens[:, :-1], tokens[:, 1:]).loss / 32).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state_of(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    def whole(tensor: Any) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()

    state = {}
    for name, parameter in model.named_parameters():
        state[name] = whole(parameter.detach())
        for key in ("exp_avg", "exp_avg_sq", "step"):
            state[f"{key}.{name}"] = whole(optimizer.state[parameter][key])
    return state


def write(root: Path, expert: int, replicate: int) -> dict[str, Tensor]:
    model, optimizer = trained(expert, 3, seed=1, replicate=replicate)
    torch.manual_seed(77)
    checkpoint.save(root, 3, model, optimizer, {"step": 3}, keep=2)
    return state_of(model, optimizer)


def read(root: Path, expert: int, replicate: int) -> tuple[dict[str, Tensor], float]:
    model, optimizer = trained(expert, 1, seed=9, replicate=replicate)  # other weights and moments, to be overwritten
    checkpoint.load(checkpoint.complete_checkpoints(root)[-1], model, optimizer)
    return state_of(model, optimizer), torch.rand(()).item()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# (ranks, parallel.expert, parallel.replicate), of the run that writes and the one that reads
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 2, 1), (2, 1, 1)), ((2, 1, 1), (4, 2, 1)), ((4, 2, 1), (1, 1, 1)), ((4, 4, 1), (2, 2, 1)),
        ((4, 2, 2), (2, 1, 1)), ((2, 1, 1), (4, 4, 2)), ((4, 1, 2), (4, 2, 2)),
    ],
)  # fmt: skip
def test_another_layout_loads_the_same_state(
    before: tuple[int, int, int], after: tuple[int, int, int], tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    (world, *layout), (to_world, *to_layout) = before, after
    written = run_ranks(write, world, make(tmp_path / "write"), root, *layout)[0]
    for got, random in run_ranks(read, to_world, make(tmp_path / "read"), root, *to_layout):
        assert same(got, written)
        if to_world <= world:  # this rank's random state was saved
            assert random == torch.rand((), generator=torch.Generator().manual_seed(77)).item()
    model = build(CONFIG, 5, CPU)
    checkpoint.load_model(root / "step_00000003", model)
    assert all(torch.equal(p, written[n]) for n, p in model.named_parameters())
    assert checkpoint.read_state(root / "step_00000003") == {"step": 3}


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def save_many(root: Path) -> list[str]:
    model, optimizer = trained(1, 1, seed=1)
    for step in (1, 2, 3, 12, 12):  # the last one again, as after a resume from an earlier checkpoint
        checkpoint.save(root, step, model, optimizer, {"step": step}, keep=2)
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
