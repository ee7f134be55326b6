"""DeepSpeed's ZeRO and the experts beside it. That they compute what one process computes is in test_parity.py."""

import gc
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist

from moesaic.launch import cli
from moesaic.parallel import zero
from moesaic.parallel.apply import parallelize, start_engine
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.engine import Engine
from moesaic.parallel.fragment import Fragment, boxes
from moesaic.parallel.layout import dense_held, layout_of
from moesaic.parallel.memory_plan import BUCKET, memory_of
from moesaic.parallel.mesh import make_meshes
from tests.parallel.ranks import run_ranks
from tests.parallel.shapes import CPU, SEQUENCE, config_of


def start(stage: int | None, shape: str, expert: int) -> Engine:
    """Of FSDP2 where there is no stage."""
    engine, path = "fsdp" if stage is None else "deepspeed", "all_to_all" if expert > 1 else "auto"
    layout = ParallelConfig(engine=engine, zero_stage=stage, expert_path=path)
    meshes = make_meshes("cpu", expert)
    model = parallelize(config_of(shape), layout, meshes, seed=2, device=CPU, compute=torch.float32)
    return start_engine(layout, model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3))


# ---------------------------------------------------------------- experts


def experts_of_ranks() -> list[int]:
    """How many ranks hold experts, or a part of them, that no other holds, by stage and degree."""
    counts = []
    for stage, expert in itertools.product(range(4), (2, dist.get_world_size())):
        engine = start(stage, "shared_dense_tied", expert)
        assert isinstance(engine, zero.ZeroEngine)
        assert not any("experts" in name for name, _ in engine.model.named_modules())
        counts.append(len(set(zero.checksums(engine.experts.values()).tolist())))
    return counts


@pytest.mark.parametrize("world", [2, 4])
def test_experts_differ_across_ranks_at_every_stage(world: int, tmp_path: Path) -> None:
    assert run_ranks(experts_of_ranks, world, tmp_path) == [[world] * 8] * world


def overwritten(stage: int) -> str:
    deepspeed = zero.import_deepspeed(CPU)
    initialize = deepspeed.initialize

    def overwriting(model: Any, **arguments: Any) -> Any:
        for layer in model.moe_layers():
            for p in layer.experts.parameters():
                dist.broadcast(p.to_local().detach(), src=0)
        return initialize(model=model, **arguments)

    deepspeed.initialize = overwriting
    try:
        start(stage, "plain", 2)
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("stage", [2, 3])
def test_overwritten_experts_are_noticed_on_every_rank(stage: int, tmp_path: Path) -> None:
    for line in run_ranks(overwritten, 2, tmp_path, stage):
        assert "experts of rank 1" in line and "those of ranks [0]" in line


def fsdp_alone() -> list[str]:
    engine = start(None, "plain", 2)
    engine.backward(engine.model(*torch.zeros(2, 1, SEQUENCE, dtype=torch.int64)).loss, last=True)
    engine.step(1.0)
    return [name for name in sys.modules if name.split(".")[0] == "deepspeed"]


def test_a_run_with_fsdp_does_without_deepspeed(tmp_path: Path) -> None:
    assert run_ranks(fsdp_alone, 2, tmp_path) == [[], []]
    code = "import sys, moesaic.launch.train; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def every_stage() -> str:
    import torch.utils.cpp_extension as extensions

    for stage in range(4):
        engine = start(stage, "plain", 2)
        for last in (False, True):
            engine.backward(engine.model(*torch.randint(0, 61, (2, 2, 9))).loss, last)
        engine.step(1.0)
        with torch.no_grad():
            engine.model(torch.randint(0, 61, (2, 9)))
    return extensions._get_build_directory("name", verbose=False)


def test_nothing_is_said_and_nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would compile collectives over shared memory on first use, and tell of it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    used = run_ranks(every_stage, 2, tmp_path)
    assert set(used) == {str(tmp_path / "extensions" / "name")}  # where it would be built
    assert [path.name for path in (tmp_path / "extensions").iterdir()] == ["name"]
    for rank in range(2):
        said = (tmp_path / f"output{rank}").read_text()
        assert "deepspeed" not in said.lower() and "deprecated" not in said


# ---------------------------------------------------------------- fragments


@hypothesis.given(st.data())
def test_boxes_make_up_a_run_of_values(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple))
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    start = data.draw(st.integers(0, tensor.numel()))
    end = data.draw(st.integers(start, tensor.numel()))
    found = list(boxes(shape, start, end))
    values = [
        tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].flatten()
        for offsets, sizes in found
    ]
    assert torch.cat([tensor.new_empty(0), *values]).tolist() == list(range(start, end))
    assert len(found) <= 2 * len(shape) - 1 and all(len(v) for v in values)


def test_a_fragment_does_nothing_by_itself() -> None:
    piece = Fragment(torch.arange(3.0), 2, torch.Size((2, 4)))
    assert piece.shape == (2, 4) and repr(piece) == "Fragment(3 values from 2 of (2, 4))"
    with pytest.raises(NotImplementedError, match="full_tensor"):
        piece + 1
    with pytest.raises(AssertionError):
        Fragment(torch.arange(3.0), 6, torch.Size((2, 4)))


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        (dict(engine="zero"), "parallel.engine=zero: must be one of fsdp, deepspeed"),
        (dict(engine="deepspeed", zero_stage=4), "parallel.zero_stage=4: must be one of 0, 1, 2, 3"),
        (dict(engine="deepspeed", replicate=2), "parallel.replicate=2: must be 1 with parallel.engine=deepspeed"),
        (
            dict(engine="deepspeed", reshard="never"),
            "parallel.reshard=never: must be auto with parallel.engine=deepspeed",
        ),
        (dict(zero_stage=2), "parallel.zero_stage=2: must be null with parallel.engine=fsdp"),
    ],
)
def test_a_mistake_is_one_line(knobs: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        ParallelConfig(**knobs)
    assert "\n" not in str(error.value)


def test_the_stage_is_two_unless_said() -> None:
    assert ParallelConfig(engine="deepspeed").zero_stage == 2
    assert ParallelConfig(engine="deepspeed", zero_stage=0).zero_stage == 0


# ---------------------------------------------------------------- the planner's bytes


def at_rest(stage: int) -> tuple[int, int]:
    """(bytes of all fp32 tensors that a rank has before a step, those that the planner counts: weights and moments, and at
    stage 3 the share of dense gradients and a bucket, which are there from the beginning)."""
    parallel = ParallelConfig(engine="deepspeed", zero_stage=stage, expert="2")
    config = cli.compose(["recipe=tiny_moe", "model.n_layers=2"]).model

    def living() -> dict[int, int]:
        found: dict[int, int] = {}
        gc.collect()
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.dtype == torch.float32:
                found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        return found

    before = set(living())
    model = parallelize(config, parallel, make_meshes("cpu", 2), seed=0, device=CPU, compute=torch.float32)
    engine = start_engine(parallel, model, torch.optim.AdamW(model.parameters()))
    layout = layout_of(config, parallel, 2, 2, 1, 1, 16, "fp32")
    planned = memory_of(config, layout)
    more = 4 * (zero.BUCKET + dense_held(config, layout)) if stage == 3 else 0
    assert zero.BUCKET == BUCKET
    found = sum(size for at, size in living().items() if at not in before)
    assert engine.steps() is not None
    return found, planned.weights + planned.moments + more


@pytest.mark.parametrize("stage", range(4))
def test_the_planner_knows_what_a_stage_keeps(stage: int, tmp_path: Path) -> None:
    for found, planned in run_ranks(at_rest, 2, tmp_path, stage):
        bucket = 4 * BUCKET * (stage == 3)
        assert found - bucket == pytest.approx(planned - bucket, rel=0.05)
