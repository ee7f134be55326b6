"""What a run reports: metrics.jsonl, W&B, the progress line, and the clock and peak rate behind tokens/s and MFU.

A record is a flat dict. Training records hold step (steps done), tokens (seen so far), loss, grad_norm, lr,
tokens_per_s, mfu (0..1), memory_gib (of the rank that has held most) and moe/... figures, of which the progress line
shows moe/load_max_over_mean: rows of the busiest expert over the mean; data/wait (0..1), the share of the time in which the
rank that waited most stood still for data; data/tokens_per_s, at which all ranks read; data/passed_over, records of streamed
sets that had no text; of a mixture data/NAME/tokens and data/NAME/loss,
the loss of that source's share of the step.
Evaluation records hold step, val_loss, and val_loss/NAME.
"""

import contextlib
import errno
import json
import math
import os
import re
import resource
import secrets
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

import torch

from moesaic.kernels.products import mm
from moesaic.launch.schema import Config

Record = dict[str, Any]

# Published dense bf16 peaks in FLOP/s, by the name the driver gives. PCIe and NVL cards of these chips run slower, and
# are measured instead; the A100 is rated the same on either.
PUBLISHED_PEAKS = {
    r"\bA100\b": 312e12,
    r"\bH100\b(?!.*(PCIe|NVL))": 989e12,
    r"\bH200\b(?!.*NVL)": 989e12,
    r"\bB200\b": 2250e12,
    r"\bMI300X\b": 1307e12,
    r"\bMI325X\b": 1307e12,
    r"\bMI355X\b": 2500e12,
}
# Records that a resumed run hands to W&B again: a kill takes those of the last second, and SIGTERM to all of a job's processes,
# as Slurm sends it, those since. Points that W&B has already come to lie on themselves.
TOLD_AGAIN = 64
SHORT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class MetricsLog:
    """run_dir/metrics.jsonl: one JSON object a line, in the file as soon as `write` returns. For rank 0 only.

    Continues the file of an earlier launch when resuming from its checkpoint of step `step`: records past it are
    dropped, for those steps will be done again, and so is a line cut short by a kill. At step 0 nothing is kept.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        path = run_dir / "metrics.jsonl"
        if path.exists():
            lines = path.read_bytes().splitlines() if step > 0 else []
            # Renaming a whole file over the old one: a kill in the middle leaves one of the two, not half of one.
            new = run_dir / "metrics.jsonl.tmp"
            with new.open("wb") as file:
                file.writelines(line + b"\n" for line in lines if _step_of(line) <= step)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        self._path, self._events = path, run_dir / "events.jsonl"
        self._failed = False

    def write(self, record: Record) -> None:
        """Append `record`. NaN and infinities, which JSON cannot hold, become null. Where it can't be written, on a full disk, it
        is lost, and the first of such losses is a warning: they must not end the training."""
        self._append(self._path, record)

    def newest(self, count: int) -> list[Record]:
        """The last `count` records that the file holds."""
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        return [json.loads(line) for line in lines[-count:]]

    def note(self, event: str, step: int, **more: Any) -> None:
        """Append to run_dir/events.jsonl that `event` happened now, after `step` steps. Nothing is ever dropped from that file:
        it tells how the run went, also what was done again."""
        self._append(self._events, {"time": time.time(), "event": event, "step": step, **more})

    def _append(self, path: Path, record: Record) -> None:
        line = json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        try:
            with path.open("ab", buffering=0) as file:
                written = file.write(line)
                if written < len(line):
                    file.truncate(file.tell() - written)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._failed = False
        except OSError as error:
            if not self._failed:
                _warn(f"{path}: records are lost from step {record.get('step')} on ({error.strerror})")
            self._failed = True


def _step_of(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinite where the line is not a whole record."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class WandbRun:
    """A W&B run that never ends or holds up the training it watches: its first failure is one warning, and its last.

    `run` is what wandb.init returned, or None for a run that records nothing.
    """

    def __init__(self, run: Any | None) -> None:
        self._run = run

    def log(self, record: Record) -> None:
        """Hand `record` to W&B's own process; returns at once."""
        self._try("log", record)

    def finish(self) -> None:
        """Close the run; waits up to 20 s for an upload."""
        self._try("finish")
        self._run = None

    def _try(self, method: str, *args: Any) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, method)(*args)
        except Exception as error:
            self._run = None
            _warn(f"W&B stopped recording: {_one_line(error)}")


def start_wandb(config: Config, run_dir: Path, resolved: Record) -> WandbRun:
    """Start the W&B run of `run_dir`, which keeps it in run_dir/wandb; `resolved` is shown as its configuration.

    The run's id is kept in run_dir/wandb/id, so a resumed training continues the same W&B run. `online` falls back to
    `offline`, and that to nothing, with one line of warning and within about 30 s. `disabled` does not import wandb.
    """
    if config.wandb.mode == "disabled":
        return WandbRun(None)
    try:
        run_id = _wandb_id(run_dir / "wandb" / "id")
        if config.wandb.mode == "online":
            try:
                return WandbRun(_init_wandb("online", config, run_dir, resolved, run_id))
            except Exception as error:
                _warn(f"wandb.mode=online: {_one_line(error)}; recording offline, `wandb sync` can send it later")
                _forget_wandb()
        return WandbRun(_init_wandb("offline", config, run_dir, resolved, run_id))
    except Exception as error:
        _warn(f"wandb.mode={config.wandb.mode}: {_one_line(error)}; going on without W&B")
        return WandbRun(None)


def _wandb_id(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _init_wandb(
    mode: Literal["online", "offline"], config: Config, run_dir: Path, resolved: Record, run_id: str
) -> Any:
    """The started `wandb.Run`. Raises whatever W&B does, within about 30 s."""
    # Read by wandb when it is imported, and not among its settings.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_CACHE_DIR", str((run_dir / "wandb" / "cache").absolute()))
    import wandb

    settings = wandb.Settings(
        mode=mode,
        init_timeout=15,
        finish_timeout=20,
        x_service_wait=15,
        x_transaction_log_flush_interval=1,  # what a SIGKILL can take: at wandb's own 15 s a short run loses everything
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        symlink=False,
    )
    wandb.setup(settings)
    # First, because wandb.init would ask for a key on a terminal, and a failed init leaves a run folder behind.
    if mode == "online" and not wandb.login(prompt=False, verify=True):
        raise RuntimeError("no API key (`wandb login` or WANDB_API_KEY)")
    run = wandb.init(
        project=config.wandb.project,
        name=config.wandb.name,
        dir=run_dir,
        config=resolved,
        id=run_id,
        resume="allow",
    )
    # W&B drops records whose step it has passed, as those between a checkpoint and a kill. So its own step counts
    # records, and ours is a value among others that serves as the x axis.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def _forget_wandb(patience: float = 5.0) -> None:
    """End W&B's process: while it lives, it holds the id of a run that failed to start, and the login that failed.

    Asked to end, it first tries for minutes to reach a server that does not answer, and teardown waits for it without limit:
    after `patience` seconds it is killed.
    """
    import wandb

    teardown = threading.Thread(target=wandb.teardown, daemon=True)
    teardown.start()
    teardown.join(patience)
    if teardown.is_alive():
        for pid in _children_named("wandb-core"):
            os.kill(pid, signal.SIGKILL)
        teardown.join(patience)


def _children_named(name: str) -> list[int]:
    """This process's children whose program is `name` (Linux; elsewhere none are found)."""
    found: list[int] = []
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                    found.append(int(pid))
    return found


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


_COLUMNS = "{:>15}  {:>7}  {:>11}  {:>6}  {:>8}  {:>9}  {:>8}  {:>10}"


def progress_header() -> str:
    """The heading of progress lines."""
    return _COLUMNS.format("step", "loss", "tokens/s", "MFU", "max load", "grad norm", "lr", "time left")


def progress_line(record: Record, steps: int) -> str:
    """One line of under 120 columns for a training record, in the columns of `progress_header`; "-" for what it lacks.

    Max load is the rows of the busiest expert over the mean. Time left (h:mm:ss) is of training at the present speed,
    evaluations and checkpoints not counted.
    """

    def cell(key: str, spec: str) -> str:
        return format(record[key], spec) if record.get(key) is not None else "-"

    left = "-"
    if record["step"] > 0 and record.get("tokens") and record.get("tokens_per_s"):
        tokens_left = (steps - record["step"]) * record["tokens"] / record["step"]
        seconds = round(tokens_left / record["tokens_per_s"])
        left = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return _COLUMNS.format(
        f"{record['step']}/{steps}",
        cell("loss", ".4f"),
        cell("tokens_per_s", ",.0f"),
        cell("mfu", ".1%"),
        cell("moe/load_max_over_mean", ".2f"),
        cell("grad_norm", ".3g"),
        cell("lr", ".2e"),
        left,
    )


class Meter:
    """A stopwatch of training alone: `stop` before an evaluation or a checkpoint, `start` after it, `lap` when logging.

    On a GPU, wait for the device first (reading the loss does).
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None  # None: stopped

    def start(self) -> None:
        assert self._since is None
        self._since = time.perf_counter()

    def stop(self) -> None:
        assert self._since is not None
        self._seconds += time.perf_counter() - self._since
        self._since = None

    def lap(self) -> float:
        """Seconds the watch ran since the last lap, or since it was made; goes on from 0."""
        running = self._since is not None
        if running:
            self.stop()
        seconds, self._seconds = self._seconds, 0.0
        if running:
            self.start()
        return seconds


def memory_gib(device: torch.device) -> torch.Tensor:
    """The most memory that this process has held, GiB: of the GPU's, what tensors took; on a CPU, all of the process's."""
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.tensor(held, dtype=torch.float64, device=device)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that matrix products of `dtype` on this device could reach at best, and where the figure comes from.

    The published dense bf16 peak of a known GPU, for bf16 and fp16; otherwise what this process measures in about 0.3 s
    with its present number of threads. A CPU is measured in fp32, whatever `dtype`: many only emulate bf16.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for pattern, peak in PUBLISHED_PEAKS.items():
            if (match := re.search(pattern, name)) and "MIG" not in name:  # MIG: a slice of a GPU
                return peak, f"published dense bf16 peak of {match[0]}"
    if device.type == "cpu":
        dtype = torch.float32
    return _measured_flops(device, dtype), f"measured {SHORT_NAMES.get(dtype, str(dtype))} matrix product"


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of several square matrix products; the first, which warms up, does not count."""
    n = 1024 if device.type == "cpu" else 8192  # a GPU needs more work to be busy
    random = torch.Generator(device).manual_seed(0)  # its own, for the run's must not move
    a, b = (torch.randn(n, n, device=device, generator=random).to(dtype) for _ in range(2))
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < 4 or time.perf_counter() - began < 0.3:
        start = time.perf_counter()
        mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds[1:])
