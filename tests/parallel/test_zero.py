"""DeepSpeed's ZeRO, with our experts, computes what one process computes. The cases are those of test_equal.py."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.parallel import zero
from moesaic.parallel.apply import parallelize, start_engine, total
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.engine import Engine
from moesaic.parallel.fragment import Fragment, boxes
from moesaic.parallel.mesh import make_meshes
from tests.parallel.ranks import run_ranks
from tests.parallel.test_equal import CPU, SEQUENCE, alone, config_of, micro_batches, whole

Case = tuple[int, str, int, int, bool, str]  # ZeRO stage, shape, expert, accumulation, unequal, remat


def start(stage: int | None, shape: str, expert: int, remat: str = "none") -> Engine:
    """Of FSDP2 where there is no stage."""
    engine, path = "fsdp" if stage is None else "deepspeed", "all_to_all" if expert > 1 else "auto"
    layout = ParallelConfig(engine=engine, zero_stage=stage, expert_path=path, remat=remat)
    meshes = make_meshes("cpu", expert)
    model = parallelize(config_of(shape), layout, meshes, seed=2, device=CPU, compute=torch.float32)
    return start_engine(layout, model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3))


def steps(engine: Engine, mine: list[Tensor], all_tokens: int, n: int, first: int = 0) -> dict[str, Any]:
    """`n` steps on the same batch; gradients of the first."""
    result: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(first, first + n):
        torch.manual_seed(100 * dist.get_rank() + step)
        loss_of_step = torch.zeros(())
        for i, batch in enumerate(mine, 1):
            out = engine.model(batch[:, :-1], batch[:, 1:])
            loss = out.loss / all_tokens + out.aux * (batch.shape[0] * SEQUENCE / all_tokens)
            engine.backward(loss, last=i == len(mine))
            loss_of_step += loss.detach()
        result["losses"].append(total(loss_of_step))
        if step == 0:
            result["gradients"] = {name: whole(g) for name, g in engine.gradients().items()}
        result["norms"].append(engine.step(0.5))
    result["weights"] = {name: whole(w) for name, w in engine.weights().items()}
    result["moments"] = {name: whole(m) for name, m in engine.moments().items()}
    return result | {key: torch.stack(result[key]) for key in ("losses", "norms")}


def spread(cases: list[Case]) -> list[dict[str, Any]]:
    results = []
    for stage, shape, expert, accumulation, unequal, remat in cases:
        rank, world = dist.get_rank(), dist.get_world_size()
        batches = micro_batches(world, accumulation, unequal)
        tokens = sum(b.shape[0] for row in batches for b in row) * SEQUENCE
        engine = start(stage, shape, expert, remat)
        if isinstance(engine, zero.ZeroEngine):  # each rank holds other experts, or another part of them
            assert len(set(zero.checksums(engine.experts.values()).tolist())) == world
            assert not any("experts" in name for name, _ in engine.model.named_modules())
        results.append(steps(engine, batches[rank], tokens, 3))
    return results


# Every stage meets every degree of expert parallelism, accumulation and an empty micro-batch.
CASES: dict[int, list[Case]] = {
    1: [(2, "plain", 1, 1, False, "none")],
    2: [
        case
        for stage in range(4)
        for case in [
            (stage, "shared_dense_tied", 1, 2, True, "none"),
            (stage, "shared_dense_tied", 2, 1 + stage % 2, False, ("none", "selective", "full", "full")[stage]),
            (
                stage,
                ("plain", "top1_renormalized", "global_and_biases", "layers")[stage],
                2,
                2 - stage % 2,
                True,
                "none",
            ),
        ]
    ],
    4: [
        (stage, "shared_dense_tied", expert, 1 + (stage + expert // 2) % 2, True, "none")
        for stage in range(4)
        for expert in (2, 4)
    ],
}


@pytest.mark.parametrize("world", CASES)
def test_equal_to_one_process(world: int, tmp_path: Path) -> None:
    ranks = run_ranks(spread, world, tmp_path, CASES[world])
    for i, case in enumerate(CASES[world]):
        _, shape, _, accumulation, unequal, _ = case
        want = alone(shape, world, accumulation, unequal)
        for results in ranks:
            got = results[i]
            torch.testing.assert_close(
                got["losses"], want["losses"], rtol=1e-5, atol=0, msg=lambda m, c=case: f"{c}: {m}"
            )
            torch.testing.assert_close(
                got["norms"], want["norms"], rtol=1e-5, atol=0, msg=lambda m, c=case: f"{c}: {m}"
            )
            for kind in ("gradients", "weights", "moments"):
                assert got[kind].keys() == want[kind].keys()
                for name, value in want[kind].items():
                    error = (got[kind][name] - value).abs().max() / value.abs().max()
                    assert error < 1e-5, (case, kind, name, error)
            assert all(torch.equal(got["weights"][n], ranks[0][i]["weights"][n]) for n in got["weights"])


# ---------------------------------------------------------------- experts


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
    steps(engine, [torch.zeros(1, SEQUENCE + 1, dtype=torch.int64)], SEQUENCE, 1)
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
