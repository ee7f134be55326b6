"""Runs whose processes are killed: what they leave, and how they go on."""

import contextlib
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore

from moesaic.parallel import checkpoint
from moesaic.parallel.mesh import meet
from tests.launch.launches import (
    KEPT,
    PROGRAM,
    STEPS,
    Place,
    assert_same_end,
    evaluations,
    finished,
    kill,
    launch,
    losses,
    processes,
    until,
)

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in Linux's /proc")


def past_the_checkpoint(run_dir: Path) -> bool:
    """Training has gone past step KEPT, and its checkpoint is complete."""
    kept = checkpoint.step_folder(run_dir / "checkpoints", KEPT)
    return any(step > KEPT + 1 for step, *_ in losses(run_dir)) and checkpoint.is_checkpoint(kept)


@needs_proc
def test_a_killed_run_goes_on_bit_for_bit(place: Place, reference: tuple[Path, str], tmp_path: Path) -> None:
    """Steps 1.., SIGKILL to all processes between the checkpoint of step 20 and the end, and the same command again."""
    uninterrupted, _ = reference
    run_dir = tmp_path / "run"
    knobs = place.knobs(run_dir, "train.checkpoint_every=20", "train.eval_every=30", "wandb.mode=offline")
    checkpoints = run_dir / "checkpoints"
    for _ in range(3):
        shutil.rmtree(run_dir, ignore_errors=True)
        with launch(tmp_path, knobs) as running:
            until(lambda: past_the_checkpoint(run_dir) or running.agent.poll() is not None)
            victims = [running.agent.pid, *running.ranks()]
            for pid in victims:
                kill(pid)
            until(lambda: not set(victims[1:]) & set(processes(running.tag)), 10)
            assert len(victims) == 3 and running.wait() == -signal.SIGKILL
        if not checkpoint.is_checkpoint(checkpoint.step_folder(checkpoints, STEPS)):
            break
    else:
        pytest.fail("three runs ended before the kill")
    assert checkpoint.complete_checkpoints(checkpoints) == [checkpoint.step_folder(checkpoints, KEPT)]
    # What a kill during a save leaves; and a line that a kill cut short.
    (checkpoints / "step_00000033").mkdir()
    (checkpoints / "step_00000033" / "shard_00000.safetensors").write_text("half")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')

    text = finished(tmp_path, knobs)
    assert f"resumed from {checkpoint.step_folder(checkpoints, KEPT)}: step {KEPT}, {KEPT * 4 * 64:,} tokens" in text
    assert losses(run_dir) == losses(uninterrupted)
    assert evaluations(run_dir) == evaluations(uninterrupted)
    assert_same_end(run_dir, uninterrupted)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000020", "step_00000040"]
    assert [path for path in run_dir.glob("wandb/**/offline-run-*/*.wandb") if path.stat().st_size > 0]


@needs_proc
def test_torchrun_restarts_a_run_whose_rank_was_killed(
    place: Place, reference: tuple[Path, str], tmp_path: Path
) -> None:
    uninterrupted, _ = reference
    run_dir = tmp_path / "run"
    knobs = place.knobs(run_dir, *"train.checkpoint_every=20 train.keep_checkpoints=1 train.eval_every=0".split())
    with launch(tmp_path, [*knobs, "resume=never"], "--max-restarts=1") as running:
        until(lambda: past_the_checkpoint(run_dir))
        victim = running.ranks()[-1]
        kill(victim)
        until(lambda: victim not in processes(running.tag), 10)
        assert losses(run_dir)[-1][0] < STEPS, "killed too late"
        assert running.wait() == 0
        text = running.text()
    assert f"resumed from {checkpoint.step_folder(run_dir / 'checkpoints', KEPT)}: step {KEPT}, " in text
    assert losses(run_dir) == losses(uninterrupted)
    assert_same_end(run_dir, uninterrupted)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000040"]
    assert evaluations(run_dir) == [] and "val_loss" not in text, "train.eval_every=0 means never"


def test_a_restarted_rank_meets_none_of_the_dead() -> None:
    """Ranks on one store, as torchrun keeps it: the second three find the words of the first, one of whom died early."""
    store = HashStore()
    store.set("word/2", "the word of one that never got its answer")
    names = []
    for _ in range(2):
        with ThreadPoolExecutor(3) as ranks:
            one, two, three = ranks.map(lambda rank: meet(store, rank, 3), range(3))
        assert one == two == three
        names.append(one)
    assert names[0] != names[1]


@needs_proc
@pytest.mark.parametrize("moment", ["importing", "training"])
def test_ranks_end_with_their_agent(place: Place, tmp_path: Path, moment: str) -> None:
    run_dir = tmp_path / "run"
    knobs = place.knobs(run_dir, "train.steps=1000000", "train.eval_every=0", "train.checkpoint_every=0")

    def is_importing(pid: int) -> bool:
        with contextlib.suppress(OSError):
            return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
        return False

    with launch(tmp_path, knobs) as running:
        until(lambda: len(running.ranks()) == 2)
        ranks = running.ranks()
        if moment == "importing":
            until(lambda: all(is_importing(pid) for pid in ranks))
        else:
            until(lambda: len(losses(run_dir)) > 2)
        kill(running.agent.pid)
        assert running.wait() == -signal.SIGKILL
        until(lambda: not set(ranks) & set(processes(running.tag)), 120 if moment == "importing" else 20)


SLOW_THREADS = """
import glob, os, runpy, sys
from moesaic.launch import metrics

class Meter(metrics.Meter):
    def __init__(self):  # the loop begins: the threads exist
        super().__init__()
        for comm in glob.glob("/proc/self/task/*/comm"):
            if "gloo" in open(comm).read():
                os.sched_setscheduler(int(comm.split("/")[4]), os.SCHED_IDLE, os.sched_param(0))

metrics.Meter = Meter
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
program, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(program, run_name="__main__")
"""


@needs_proc
def test_a_busy_machine_does_not_abort_a_run_at_its_end(place: Place, tmp_path: Path) -> None:
    """Threads of the process group run only when the main thread waits, and so still hold the last tensors when it ends."""
    program = tmp_path / "slow_threads.py"
    program.write_text(SLOW_THREADS)
    knobs = place.knobs(tmp_path / "run", "train.steps=2", "train.eval_every=2", "train.sample=5")
    assert "files: " in finished(tmp_path, [str(PROGRAM), *knobs], program=program)
