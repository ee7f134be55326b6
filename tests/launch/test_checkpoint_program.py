"""launch/checkpoint.py, on a run's checkpoints."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesaic.launch import checkpoint as program
from moesaic.launch import cli, export
from moesaic.moe.hf import Checkpoint
from moesaic.moe.model import build
from moesaic.parallel import checkpoint
from tests.launch.launches import ROOT, STEPS, Place, here, losses, tensors


@pytest.fixture
def run_dir(reference: tuple[Path, str], tmp_path: Path) -> Path:
    shutil.copytree(reference[0], tmp_path / "run")
    return tmp_path / "run"


def test_list_and_verify(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run_dir / "checkpoints"
    program.list_checkpoints(program.Options(str(run_dir)))
    older, newer = capsys.readouterr().out.splitlines()
    assert f"{root}/step_00000030: step 30, {30 * 4 * 64:,} tokens; " in older and "2 files, " in older
    assert f"{root}/step_00000040: step 40, " in newer
    program.verify(program.Options(str(run_dir)))
    assert capsys.readouterr().out.count(": whole, 2 files, ") == 2

    damaged = root / "step_00000030" / "shard_00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (root / "step_00000050").mkdir()
    with pytest.raises(SystemExit) as stop:
        program.verify(program.Options(str(run_dir)))
    first, second, third = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1 and f"{damaged}: has " in first and "step_00000040: whole" in second
    assert "step_00000050: is no complete checkpoint" in third
    program.verify(program.Options(f"{root}/step_00000040/"))
    with pytest.raises(ValueError, match="run_dir=/nowhere: must be a run that holds checkpoints"):
        program.verify(program.Options("/nowhere"))


@pytest.mark.parametrize("files", [1, 3])
def test_reshard(run_dir: Path, place: Place, tmp_path: Path, files: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The same tensors in other files, from which a run goes on as from the first."""
    out = tmp_path / "elsewhere"
    program.reshard(program.ReshardOptions(str(run_dir / "checkpoints" / "step_00000030"), str(out), files))
    path, original = out / "step_00000030", run_dir / "checkpoints" / "step_00000030"
    assert len(list(path.glob("*.safetensors"))) == files
    one, other = tensors(path), tensors(original)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert checkpoint.read_state(path) == checkpoint.read_state(original)
    assert f"{path}: {files} file" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"out={out}: holds {path} already"):
        program.reshard(program.ReshardOptions(str(original), str(out), files))
    if files == 1:
        here(*place.knobs(tmp_path / "new", f"resume={out}", "train.eval_every=0"))
        assert f"resumed from {out}/step_00000030" in capsys.readouterr().out
        for ours, theirs in zip(losses(tmp_path / "new"), losses(run_dir)[30:], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)


def test_export_and_mistakes_on_the_command_line(run_dir: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, ROOT / "launch" / "checkpoint.py", *arguments], capture_output=True, text=True, timeout=100
        )

    done = run("export", f"run_dir={run_dir}", f"out={tmp_path}/hf", "family=qwen3_moe", "dtype=fp32")
    assert done.returncode == 0, done.stderr
    path = checkpoint.step_folder(run_dir / "checkpoints", STEPS)
    model = build(cli.from_dict(checkpoint.read_state(path)["config"]).model, 1, torch.device("cpu"))
    checkpoint.load_model(path, model)
    exported = Checkpoint(tmp_path / "hf")
    for name, parameter in model.named_parameters():
        assert torch.equal(exported.read(name), parameter), name
    assert program.COMMANDS["export"] == (export.main, export.Options)
    for arguments, line in (
        (["lits"], "error: lits: must be one of list, verify, reshard, export"),
        (["reshard", f"run_dir={run_dir}", "out=x", "files=0"], "error: files=0: must be at least 1"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stderr.strip()) == (2, line)


def test_a_run_whose_checkpoints_are_elsewhere(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the memory of this process, which is no folder."""
    where = f"memory://{tmp_path.name}"
    knobs = place.knobs(
        tmp_path / "run", f"train.checkpoint_dir={where}", "train.checkpoint_every=20", "train.eval_every=0"
    )
    here(*knobs, "train.steps=20")
    here(*knobs)
    assert f"resumed from {where}/step_00000020: step 20" in capsys.readouterr().out
    assert [step for step, *_ in losses(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert checkpoint.complete_checkpoints(where) == [f"{where}/step_00000020", f"{where}/step_00000040"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.yaml",
        "events.jsonl",
        "metrics.jsonl",
        "report.html",
    ]
    program.list_checkpoints(program.Options(str(tmp_path / "run")))
    assert f"{where}/step_00000040: step 40" in capsys.readouterr().out
    here(*place.knobs(tmp_path / "other", f"resume={where}/step_00000020", "train.eval_every=0"))
    assert losses(tmp_path / "other") == losses(tmp_path / "run")[20:]
