"""Runs whose processes are killed: what they leave, and how they go on."""

import contextlib
import os
import shutil
import signal
import socket
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


@needs_proc
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(
    place: Place, reference: tuple[Path, str], tmp_path: Path, name: str
) -> None:
    """The agent passes the signal on; it returns 1 though its ranks end with 0."""
    uninterrupted, _ = reference
    run_dir = tmp_path / "run"
    knobs = place.knobs(run_dir, "train.checkpoint_every=30", "train.eval_every=30")
    with launch(tmp_path, knobs, "--signals-to-handle=SIGTERM,SIGUSR1") as running:
        until(lambda: len(losses(run_dir)) > 4)
        os.kill(running.agent.pid, getattr(signal, name))
        assert running.wait() == 1
        assert not processes(running.tag), "the agent did not have to wait for them"
        text = running.text()
    step = losses(run_dir)[-1][0]
    saved = checkpoint.step_folder(run_dir / "checkpoints", step)
    assert step < STEPS and f"asked to stop: the last checkpoint is {saved}; the same command goes on" in text
    assert checkpoint.read_state(saved)["step"] == step
    if name == "SIGTERM":
        assert f"resumed from {saved}" in finished(tmp_path, knobs)
        assert losses(run_dir) == losses(uninterrupted)
        assert evaluations(run_dir) == evaluations(uninterrupted)
        assert_same_end(run_dir, uninterrupted)


@needs_proc
def test_a_rank_that_is_stopped_is_named(place: Place, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    knobs = place.knobs(run_dir, *"train.steps=100000 train.eval_every=0 parallel.timeout=2".split())
    with launch(tmp_path, knobs) as running:
        until(lambda: len(losses(run_dir)) > 2)
        victim = next(p for p in running.ranks() if b"\0RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes())
        os.kill(victim, signal.SIGSTOP)
        until(lambda: "  rank 1: is silent since " in running.text())
        kill(victim)  # as the agent does after half a minute
        assert running.wait() == 1
        text = running.text()
    assert "error: parallel.timeout=2: rank 1 did not come to " in text
    assert "  rank 0: since " in text
    assert "exitcode  : 4" in text
    assert (run_dir / "hang" / "gloo" / "rank_0").stat().st_size > 1000


NOTED = """
import os, runpy, sys, time
from moesaic.launch import data, guards

real = data.train_batch

def train_batch(stream, seed, first, count):
    if not isinstance(stream, data.Ahead):  # read, but maybe never taken
        return real(stream, seed, first, count)
    world, step = int(os.environ["WORLD_SIZE"]), first // 4
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{os.getpid()} {os.environ['RANK']} {world} {first} {count}\\n")
    # Two wait until one of them is killed; one alone, at its first step and after that, until another comes. However long a busy
    # machine takes.
    gone = os.path.exists(os.environ["GONE"])
    while not gone and (world, step) == (2, 8) or (world, step) == (1, 12 * gone) and not guards.asked():
        gone = os.path.exists(os.environ["GONE"])
        time.sleep(0.02)
    return real(stream, seed, first, count)

data.train_batch = train_batch
program, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(program, run_name="__main__")
"""


@needs_proc
def test_ranks_come_and_go(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of one rank, of which one dies and comes back: the run goes on by itself on one rank, and again on two, with the
    same samples in the same order. The loss of a node costs what came after the last checkpoint; its return nothing."""
    program, notes, gone, run_dir = tmp_path / "noted.py", tmp_path / "notes", tmp_path / "gone", tmp_path / "run"
    program.write_text(NOTED)
    monkeypatch.setenv("NOTES", str(notes))
    monkeypatch.setenv("GONE", str(gone))
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # docs/survival.md says why
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = "--nnodes=1:2 --nproc-per-node=1 --max-restarts=3 --rdzv-backend=c10d --rdzv-id=one".split()
    nodes += [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=last_call_timeout=1,join_timeout=100"]
    knobs = [str(PROGRAM), *place.knobs(run_dir, "train.checkpoint_every=5", "train.eval_every=0")]

    def worlds() -> list[tuple[int, int]]:
        """World size and step, from 0, of each batch that rank 0 read. The first node may have begun before the second came."""
        lines = [list(map(int, line.split())) for line in notes.read_text().splitlines()] if notes.exists() else []
        read = [(world, first // 4) for _, rank, world, first, _ in lines if rank == 0]
        return read[1:] if read[:1] == [(1, 0)] else read

    with launch(tmp_path, knobs, program=program, nodes=nodes) as one:
        until(lambda: len(one.ranks()) == 1)
        with launch(tmp_path, knobs, program=program, nodes=nodes) as other:
            until(
                lambda: (
                    (2, 8) in worlds() and checkpoint.is_checkpoint(checkpoint.step_folder(run_dir / "checkpoints", 5))
                )
            )
            victims = [other.agent.pid, *other.ranks()]
            for pid in victims:
                kill(pid)
            gone.touch()
        until(lambda: (1, 12) in worlds())
        with launch(tmp_path, knobs, program=program, nodes=nodes) as other:
            assert one.wait() == 0 and other.wait() == 0
        text = one.text()

    generations: list[list[int]] = []  # the steps of each, rank 0
    sizes: list[int] = []
    for world, step in worlds():
        if not generations or step != generations[-1][-1] + 1 or world != sizes[-1]:
            generations.append([])
            sizes.append(world)
        generations[-1].append(step)
    assert sizes == [2, 1, 2]
    two, alone, again = generations
    assert two[0] in (0, 1) and two[-1] == 8 and alone[0] == 5 and again == list(range(alone[-1] + 1, STEPS))
    for line in notes.read_text().splitlines():
        _, rank, world, first, count = map(int, line.split())
        assert count == 4 // world and first % 4 == rank * count
    assert [step for step, *_ in losses(run_dir)] == list(range(1, STEPS + 1))
    assert f"step {alone[0]}, " in text and f"step {again[0]}, " in text
    assert checkpoint.read_state(checkpoint.step_folder(run_dir / "checkpoints", STEPS))["samples"] == STEPS * 4


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
