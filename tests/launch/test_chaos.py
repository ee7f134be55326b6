"""A short campaign of faults, see tests.launch.chaos; and that a campaign sees what it must."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.chaos import Campaign, Case, Strike, differences, newest, resumed_from
from tests.launch.forks import Forks

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")


def campaign(*options: str) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.launch.chaos", *options],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout.splitlines()


def test_ten_faults_lose_nothing_and_none_is_silent():
    assert campaign("faults=10", "seed=5")[-1] == "10 faults, 0 lost, 0 silent"


def test_a_campaign_sees_what_is_lost_and_what_is_silent(tmp_path: Path) -> None:
    """A run whose checkpoints all vanish has lost what was promised; one that read other data ends with other bits."""
    with Forks(tmp_path) as forks:
        here = Campaign(tmp_path, forks)
        layout = "all sharded"
        reference = here.reference(layout, None)
        assert differences(reference, reference) == [] and newest(reference) == 16
        run_dir = tmp_path / "other"
        run = forks.launch([*here.knobs(run_dir, layout, tmp_path), "train.seed=1"])
        assert run.wait() == [0, 0]
        found = differences(run_dir, reference)
        assert any(line.startswith("loss") for line in found) and any(
            line.startswith("tensor model.") for line in found
        )

        case, knobs = Case("", layout), here.knobs(tmp_path / "new", layout, tmp_path)
        strike = Strike(here, case, tmp_path / "new", knobs, random.Random(0))
        strike.promised, strike.expect_again = 16, lambda text: "is not used" in text
        here.go_on(case, tmp_path / "new", knobs, strike)
        assert case.lost == ["step 16 was promised, 0 is where it went on"] and len(case.silent) == 1
        assert resumed_from("resumed from x/step_00000012: step 12, 1,536 tokens\n") == 12
