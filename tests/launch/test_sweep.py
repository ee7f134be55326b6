"""Sweeps by hydra-submitit-launcher: what is refused, and a real one of processes on this machine. Slurm: test_slurm.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.launch import cli, sweep
from tests.launch.launches import PROGRAM, Place, losses

LOCAL = "hydra/launcher=submitit_local"


@pytest.fixture(autouse=True)
def no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def test_which_launcher() -> None:
    assert sweep.launcher(["a=1", "hydra/launcher=submitit_slurm"]) == "submitit_slurm"
    assert sweep.launcher(["a=1"]) is sweep.launcher(["hydra/launcher=basic"]) is None


def test_what_is_typed_wins_over_what_is_added() -> None:
    typed = ["--multirun", "hydra/launcher=submitit_slurm", "hydra.launcher.signal_delay_s=7", "optim.lr=1e-4,3e-4"]
    found = sweep.prepare("submitit_slurm", typed)
    assert found == ["--multirun", *sweep.ON_SLURM, *typed[1:]]
    assert sweep.prepare("submitit_local", ["-m", LOCAL, "train.steps=1,2"]) == ["-m", LOCAL, "train.steps=1,2"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([LOCAL], f"{LOCAL}: needs --multirun"),
        (["-m", LOCAL, "parallel.expert=1,3"], "parallel.expert=3: must divide model.n_experts=8"),
        (["-m", LOCAL, "train.stpes=1,3"], "train.stpes: unknown; nearest: train.steps"),
    ],
)
def test_a_mistake_in_any_point_is_told_before_anything_is_queued(arguments: list[str], line: str) -> None:
    with pytest.raises(cli.UserError) as caught:
        sweep.prepare("submitit_local", arguments)
    assert str(caught.value) == line


def test_a_port_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "here")
    with pytest.raises(cli.UserError, match=r"^PORT=here: must be a whole number$"):
        sweep.prepare("submitit_local", ["-m", LOCAL])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        cli.UserError, match=r"^hydra/launcher=submitit_local: needs hydra-submitit-launcher: pip install"
    ):
        sweep.prepare("submitit_local", ["-m", LOCAL])


def test_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(cli.UserError, match=r"starts torchrun itself: python launch/train.py --multirun"):
        sweep.prepare("submitit_local", ["-m", LOCAL])


@pytest.mark.parametrize(
    ("times", "preempted"),
    [
        ("StartTime=2026-11-28T10:00:00 PreemptTime=2026-11-28T10:05:00", True),
        ("StartTime=2026-11-28T10:00:00 PreemptTime=None", False),
        ("StartTime=2026-11-28T10:00:00 PreemptTime=2026-11-28T09:00:00", False),  # it went on since
    ],
)
def test_what_a_preemption_looks_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: str, preempted: bool
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "JobId=$4 {times} PreemptEligibleTime=2027-01-01T00:00:00"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert not sweep.was_preempted(), "no job of Slurm"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert sweep.was_preempted() == preempted


def test_points_of_this_machine(place: Place, tmp_path: Path) -> None:
    """One point trains, in a folder of its own; of one whose data are missing a line tells, and it isn't started again."""
    run_dir = tmp_path / "sweep"
    ends = ["train.steps=2", f"data.files=[{place.folder}/held_out.txt],[{tmp_path}/none.txt]", "train.eval_every=0"]
    knobs = [word for word in place.knobs(run_dir) if not word.startswith(("data.files", "train.steps"))]
    done = subprocess.run(
        [sys.executable, PROGRAM, "--multirun", LOCAL, "recipe=tiny_moe", *knobs, *ends],
        cwd=tmp_path, env=os.environ | {"RANKS_PER_NODE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert [step for step, *_ in losses(run_dir / "0")] == [1, 2]
    assert done.returncode == 2 and done.stdout.startswith("2 jobs; ")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: run_dir={run_dir}/1: its ranks failed; see {run_dir}/.submitit/")
    told = Path(line.partition("; see ")[2]).read_text()
    assert told.count(f"error: data.files={tmp_path}/none.txt") == 1
