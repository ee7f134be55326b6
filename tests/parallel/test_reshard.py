"""A checkpoint of any layout, loaded into any other: the same state to the bit, the same losses after it, the same data."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from moesaic.launch.data import TokenStream, train_batch
from moesaic.launch.optim import learning_rate, set_lr
from moesaic.launch.schema import Config
from moesaic.launch.train import train_step
from moesaic.moe.balance import update_bias
from moesaic.parallel import checkpoint
from moesaic.parallel.apply import total
from moesaic.parallel.engine import Engine
from tests.parallel.cells import LAYOUTS, Cell, Layout
from tests.parallel.parity import CPU, make_engine, pools, whole
from tests.parallel.pool import Pool

pytestmark = pytest.mark.xdist_group("reshard")  # one process of pytest, so that ranks start once
BY_NAME = {layout.name: layout for layout in LAYOUTS}
MATRIX = ["one rank", "FSDP 2", "EP 2", "EP 2 x FSDP 2", "EP 4, 2 experts a rank", "ZeRO-1", "ZeRO-3"]
WIDE = [layout.name for layout in LAYOUTS if layout.experts == 8]
STEPS, BATCH = 3, 8


class Windows:
    """A stream of random tokens, each window a function of its number. Keeps which were asked for."""

    windows = 1_000_000
    rows = TokenStream.rows  # in the order of a run

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.asked: list[int] = []

    def gather(self, windows: np.ndarray) -> np.ndarray:
        self.asked += windows.tolist()
        rows = [np.random.default_rng(window).integers(0, 61, self.sequence + 1) for window in windows.tolist()]
        return np.stack(rows) if rows else np.empty((0, self.sequence + 1), np.int64)


def config_of(cell: Cell) -> Config:
    """The same global batch whatever the number of ranks. The balance loss, of a rank's micro-batch, is left out."""
    config = cell.config()
    router = replace(config.model.router, balance_coef=0.0, z_coef=0.0)
    config.model = replace(config.model, router=router)
    config.train = replace(config.train, global_batch=BATCH, micro_batch=None, steps=10)
    return config


def train(engine: Engine, model: Any, config: Config, first: int, end: int) -> tuple[list[float], list[int]]:
    """Losses of steps, and the windows of data that all ranks read, in order."""
    stream: Any = Windows(config.train.seq_len)
    losses, windows = [], []
    for step in range(first, end):
        set_lr(engine.optimizer, learning_rate(step, 10, config.optim))
        loss, rows_LE, *_ = train_step(engine, stream, config.train, step * BATCH, CPU, None)
        engine.step(config.optim.clip)
        update_bias(model, total(rows_LE))
        losses.append(total(loss).item())
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, stream.asked)
        windows += [window for asked in everyone for window in asked]
        stream.asked = []
    return losses, windows


def digests(engine: Engine) -> dict[str, str]:
    """A hash of every bit of each weight, buffer and moment."""
    state = whole(engine.weights()) | whole(engine.moments()) | {"steps": engine.steps()}
    return {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in state.items()}


def write(root: Path, cell: Cell) -> Any:
    """What is saved after three steps; then the losses of two more, and their data."""
    config = config_of(cell)
    model, engine = make_engine(cell, config)
    train(engine, model, config, 0, STEPS)
    checkpoint.Saver(root, keep=1, background=False).save(STEPS, engine, {"step": STEPS}, wait=True)
    return digests(engine), train(engine, model, config, STEPS, STEPS + 2)


def read(roots: list[Path], cell: Cell) -> list[Any]:
    """The same, from each of these. The first is loaded into a new engine, the others into one that has gone on."""
    config = config_of(replace(cell, seed=99))
    model, engine = make_engine(cell, config)
    config.train.seed = cell.seed
    results = []
    for root in roots:
        path = checkpoint.newest(root, print)
        assert path
        checkpoint.load(path, engine)
        results.append((digests(engine), train(engine, model, config, STEPS, STEPS + 2)))
    return results


@pytest.fixture(scope="module")
def pool() -> Iterator[Callable[[int], Pool]]:
    with pools() as pool:
        yield pool


def check(pool: Callable[[int], Pool], root: Path, layouts: list[Layout], **cell: Any) -> None:
    """Every layout's checkpoint, loaded into every layout."""
    cells = [Cell(layout, router="sigmoid_bias", **cell) for layout in layouts]
    roots = [root / str(i) for i in range(len(cells))]
    written = [pool(cell.layout.world).run(write, path, cell)[0] for path, cell in zip(roots, cells, strict=True)]
    expected: Any = Windows(16)
    train_batch(expected, cells[0].seed, STEPS * BATCH, 2 * BATCH)
    for reader in cells:
        found = pool(reader.layout.world).run(read, roots, reader)
        assert all(rank == found[0] for rank in found), "ranks differ"
        for writer, (saved, (losses, data)), (loaded, (losses_here, data_here)) in zip(
            cells, written, found[0], strict=True
        ):
            pair = f"{writer.layout.name} -> {reader.layout.name}"
            assert loaded == saved, (pair, [name for name in saved if loaded.get(name) != saved[name]])
            assert data == data_here == expected.asked, pair
            assert losses_here == pytest.approx(losses, rel=1e-6), pair
            if writer.layout == reader.layout:
                assert losses_here == losses, pair


def test_matrix(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    check(pool, tmp_path, [BY_NAME[name] for name in MATRIX])


def test_shapes_that_nothing_divides(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    """Three experts a rank of odd widths, over two shards."""
    odd = BY_NAME["EP 2 x FSDP 2, 3 experts a rank"]
    layouts = [odd, replace(BY_NAME["FSDP 2"], experts=6), replace(BY_NAME["ZeRO-2, EP 2 x FSDP 2"], experts=6)]
    check(pool, tmp_path, layouts, model="odd")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_layout(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    check(pool, tmp_path, [BY_NAME[name] for name in WIDE])
