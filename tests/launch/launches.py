"""Launches of `torchrun --standalone --nproc-per-node 2 launch/train.py ...`, and what they leave behind."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.launch import cli, train
from moesaic.parallel import checkpoint

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "launch" / "train.py"
STEPS = 40
STANDALONE = ("--standalone", "--nproc-per-node", "2")
KEPT = 20  # the step of the checkpoint that a killed run goes on from


@dataclass(frozen=True)
class Place:
    """A corpus of its own, and the knobs of a model that trains on it at a hundred steps a second."""

    folder: Path

    def knobs(self, run_dir: Path | str, *more: str) -> list[str]:
        return [
            f"run_dir={run_dir}",
            f"data.files={self.folder}/corpus/*.txt",
            f"data.val_files={self.folder}/held_out.txt",
            f"data.cache={self.folder}/cache",
            *"model.d_model=32 model.n_layers=2 model.n_heads=2 model.n_experts=4 model.d_expert=32".split(),
            *"train.seq_len=64 train.global_batch=4 train.eval_batches=2 train.log_every=1 train.sample=0".split(),
            *f"train.steps={STEPS} optim.warmup=10 wandb.mode=disabled".split(),
            *more,
        ]


@dataclass
class Launch:
    """A running torchrun: `agent`, and what its ranks and itself print, in `output`. `tag` is in the environment of all."""

    agent: subprocess.Popen[bytes]
    output: Path
    tag: str

    def ranks(self) -> list[int]:
        """Process ids of the ranks that live: children of the agent."""
        return [pid for pid in processes(self.tag) if parent(pid) == self.agent.pid]

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait(self, seconds: float = 150) -> int:
        return self.agent.wait(seconds)


@contextlib.contextmanager
def launch(
    folder: Path, knobs: list[str], *options: str, program: Path = PROGRAM, nodes: Sequence[str] = STANDALONE
) -> Iterator[Launch]:
    """`torchrun OPTIONS launch/train.py KNOBS` in `folder`. All processes it starts are gone when the block ends."""
    tag = f"MOESAIC_TEST_LAUNCH={uuid.uuid4().hex}"
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = inherited | {"OMP_NUM_THREADS": "1", "MOESAIC_TEST_LAUNCH": tag.partition("=")[2]}
    torchrun = [sys.executable, "-m", "torch.distributed.run", *nodes, *options]
    output = folder / f"{tag[-8:]}.log"
    with output.open("wb") as file:
        agent = subprocess.Popen(
            [*torchrun, str(program), *knobs], cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )  # fmt: skip
    running = Launch(agent, output, tag)
    try:
        yield running
    except BaseException:
        print(running.text()[-6000:])
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()
        for pid in processes(tag):  # the agent's death does not end ranks of broken code
            kill(pid)


def finished(folder: Path, knobs: list[str], *options: str, program: Path = PROGRAM) -> str:
    """What a launch that succeeds prints."""
    with launch(folder, knobs, *options, program=program) as running:
        assert running.wait() == 0
        return running.text()


def processes(tag: str) -> list[int]:
    """Process ids, zombies not counted, of all whose environment holds `tag`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if tag.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def until(condition: Callable[[], bool], seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; none before there is one."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(run_dir) if "loss" in r]


def evaluations(run_dir: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["val_loss"]) for r in records(run_dir) if "val_loss" in r]


def tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, whole, put together from its safetensors files by its manifest."""
    manifest = json.loads((Path(path) / "manifest.json").read_text())
    values = {file["name"]: (Path(path) / file["name"]).read_bytes() for file in manifest["files"]}
    whole = {}
    for name, entry in manifest["tensors"].items():
        dtype = {"F32": torch.float32, "U8": torch.uint8}[entry["dtype"]]
        whole[name] = torch.zeros(entry["shape"], dtype=dtype)
        for file, start, offsets, sizes in entry["pieces"]:
            data = values[manifest["files"][file]["name"]]
            piece = torch.frombuffer(bytearray(data[start : start + math.prod(sizes) * dtype.itemsize]), dtype=dtype)
            whole[name][tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] = piece.view(sizes)
    return whole


def assert_same_end(run_dir: Path, other: Path) -> None:
    """The last checkpoints of two runs: parameters, moments, random states and position are equal bit for bit."""
    paths = [checkpoint.step_folder(run / "checkpoints", STEPS) for run in (run_dir, other)]
    left, right = map(tensors, paths)
    assert left.keys() == right.keys()
    for kind in ("model.", "optim.exp_avg.", "optim.exp_avg_sq.", "rng."):
        assert any(name.startswith(kind) for name in left)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    states = [checkpoint.read_state(path) for path in paths]
    for knob in ("step", "samples", "tokens", "data", "world"):
        assert states[0][knob] == states[1][knob]
    assert states[0]["samples"] == STEPS * 4


def here(*knobs: str) -> None:
    """A whole run in this process, the only rank of it."""
    train.main(cli.compose(knobs))
