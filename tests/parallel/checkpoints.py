"""Small checkpoints for tests: a model, its training, what was saved."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.parallel import checkpoint
from moesaic.parallel.apply import parallelize, start_engine
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.engine import Engine
from tests.parallel.parity import CPU, meshes_of, whole

pytestmark = pytest.mark.xdist_group("checkpoint")  # one process of pytest, so that ranks start once

CONFIG = ModelConfig(
    vocab_size=61, d_model=24, n_layers=2, n_heads=2, n_experts=4, d_expert=12, tie_embeddings=True,
    router=RouterConfig(top_k=2),
)  # fmt: skip


def started(expert: int = 1, replicate: int = 1, config: ModelConfig = CONFIG, seed: int = 1) -> Engine:
    parallel = ParallelConfig(expert_path="all_to_all" if expert > 1 else "local")
    meshes = meshes_of(expert, replicate)
    model = parallelize(config, parallel, meshes, seed=seed, device=CPU, compute=torch.float32)
    return start_engine(parallel, model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def train(engine: Engine, first: int, end: int) -> None:
    for step in range(first, end):
        tokens = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(step))
        engine.backward(engine.model(tokens[:, :-1], tokens[:, 1:]).loss / 32, last=True)
        engine.step(0.0)


def state_of(engine: Engine) -> dict[str, Tensor]:
    moments = {f"optim.{name}": t for name, t in whole(engine.moments()).items()}
    return {f"model.{name}": t for name, t in whole(engine.weights()).items()} | moments


def save(
    root: Path, steps: list[int], keep: int = 9, background: bool = False, **layout: int
) -> list[dict[str, Tensor]]:
    """The states that were saved, of an engine that makes a step before each."""
    engine = started(**layout)
    saver = checkpoint.Saver(root, keep, background)
    states = []
    for i, step in enumerate(steps):
        train(engine, i, i + 1)
        states.append(state_of(engine))
        saver.save(step, engine, {"step": step})
    saver.finish()
    return states


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(root: Path) -> tuple[str | None, list[str]]:
    """The name of the newest checkpoint that is whole, and what is said of others."""
    lines: list[str] = []
    path = checkpoint.newest(root, lines.append)
    return path and Path(path).name, lines


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ random.choice([1, 2, 4, 8, 16, 32, 64, 128])]))
