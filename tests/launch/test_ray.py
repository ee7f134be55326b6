"""Ray Train as what starts the ranks: mistakes without it, and a real run on two CPU workers where it is installed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.launch import cli, ray_train
from tests.launch.launches import ROOT, Place, losses, processes, until

SCRIPT = ROOT / "launch" / "clusters" / "ray" / "train.sh"


def started(folder: Path, *knobs: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "RANKS_PER_NODE": "1"} | settings
    return subprocess.run([SCRIPT, *knobs], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"RUN_DIR": ""}, "RUN_DIR=: must name the run's folder, the same at every restart"),
        ({"NODES": "2:4"}, "NODES=2:4: must be a whole number above 0 for Ray"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1: must be a whole number for Ray"),
        ({"RANKS_PER_NODE": "0"}, "RANKS_PER_NODE=0: must be gpu or a number above 0"),
    ],
)
def test_settings(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], line: str) -> None:
    right = {"RUN_DIR": "r", "RECIPE": "tiny_moe", "NODES": "2", "RANKS_PER_NODE": "8", "MAX_RESTARTS": "3"}
    for name, value in (right | settings).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(cli.UserError) as caught:
        ray_train.settings()
    assert str(caught.value) == line
    for name, value in right.items():
        monkeypatch.setenv(name, value)
    assert ray_train.settings() == right | {"NODES": 2, "MAX_RESTARTS": 3}


def test_the_script_takes_its_settings_from_the_one_place(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$RUN_DIR" "$RECIPE" "$NODES" "$MAX_RESTARTS" "$@"\n')
    python.chmod(0o755)
    done = started(tmp_path, "data.files=a b", PYTHON=str(python), RUN_DIR="runs/x", NODES="3")
    assert done.stdout.splitlines() == [
        "runs/x",
        "tiny_moe",
        "3",
        "100",
        f"{ROOT}/launch/ray_train.py",
        "data.files=a b",
    ]


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_it_is_one_line(tmp_path: Path) -> None:
    done = started(tmp_path, RUN_DIR="runs/x")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: Ray: must be installed: pip install 'moesaic[ray]'")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_two_workers_train_and_are_started_anew(place: Place, reference: tuple[Path, str], tmp_path: Path) -> None:
    """A rank is killed: both start again from the newest checkpoint, and the run ends as one that nothing interrupted."""
    uninterrupted, _ = reference
    run_dir = tmp_path / "run"
    knobs = [k for k in place.knobs(run_dir, "train.checkpoint_every=10", "train.eval_every=30") if k[:8] != "run_dir="]
    tag = "MOESAIC_TEST_RAY=1"
    environment = {"PYTHON": sys.executable, "RUN_DIR": str(run_dir), "RANKS_PER_NODE": "2", "MOESAIC_TEST_RAY": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with (tmp_path / "ray.log").open("wb") as log:
        ray = subprocess.Popen([SCRIPT, *knobs], cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log)
    try:
        until(lambda: len(losses(run_dir)) > 12, 400)  # a busy machine takes minutes to start Ray
        ranks = [
            p for p in processes(tag) if f"run_dir={run_dir}" in Path(f"/proc/{p}/cmdline").read_text().split("\0")
        ]
        ranks = [p for p in ranks if "RANK=1" in Path(f"/proc/{p}/environ").read_text().split("\0")]
        os.kill(ranks[0], signal.SIGKILL)
        assert ray.wait(400) == 0
    except BaseException:
        print((tmp_path / "ray.log").read_text()[-6000:])
        raise
    finally:
        ray.kill()
        ray.wait()
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [event["ranks"] for event in events if event["event"] == "start"] == [2, 2]
    assert losses(run_dir) == losses(uninterrupted)
