"""What keeps a run from going wrong unseen, or being lost: steps without a finite gradient, losses that jump, data that changes
under it, signals that ask it to stop.

Every rank decides from the same numbers, so all decide alike. What must outlive the process, `Health.state`, is in checkpoints.
"""

import signal
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from moesaic.launch.cli import UserError
from moesaic.launch.data import Data, Shard
from moesaic.launch.schema import TrainConfig
from moesaic.parallel.apply import total
from moesaic.parallel.clip import norm
from moesaic.parallel.engine import Engine
from moesaic.parallel.trace import HUNG

SIGNALS = ("SIGTERM", "SIGUSR1")
WINDOW = 128  # losses that a new one is held against
FEWEST = 32  # below so many there is no saying what a jump is


class RunEndedError(UserError):
    """A guard ends the run: one line, exit code 3 on every rank. What is wrong is in numbers, data or the machine."""

    code = 3


class HungError(UserError):
    """A rank waited in vain for another one: one line, exit code 4 on every rank, as for a collective that hung."""

    code = HUNG


# ---------------------------------------------------------------- being asked to stop

_asked = False
_handlers: dict[int, Any] = {}  # what the signals did before


def listen() -> None:
    """From now on SIGTERM, and SIGUSR1, which schedulers send ahead of it, end nothing; they are remembered. Main thread only."""
    for name in SIGNALS:
        number = getattr(signal, name)
        _handlers.setdefault(number, signal.getsignal(number))
        signal.signal(number, _remember)


def end_listening() -> None:
    while _handlers:
        signal.signal(*_handlers.popitem())


def asked() -> bool:
    """Whether this process was asked to stop. Others may not have been: ranks must agree before they act on it."""
    return _asked


def _remember(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True


def agree(loss: torch.Tensor, asked: bool) -> tuple[float, bool]:
    """The loss of all ranks, from each one's part, and whether any was asked to stop. Collective, and waits for the device."""
    # fp64: the loss must come out the same, however it travels.
    both = total(torch.stack([loss.double(), loss.new_tensor(float(asked)).double()]))
    whole, count = both.tolist()
    return whole, count > 0


# ---------------------------------------------------------------- numbers


class Health:
    """What a run remembers of its steps, finite or not.

    skipped   steps that changed nothing, for their loss or gradient was not finite; `in_a_row` of them up to now
    spikes    losses that jumped
    """

    def __init__(self, config: TrainConfig, saved: dict[str, Any]) -> None:
        """`saved`: what `state` gave, or nothing."""
        self.config = config
        self.restore(saved)
        self.rewinds: dict[int, int] = {}  # since this process began, by the step that was gone back to

    def restore(self, saved: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = saved.get("skipped", 0), saved.get("in_a_row", 0)
        self.spikes = saved.get("spikes", 0)
        self.losses = deque(saved.get("losses", []), WINDOW)

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "spikes": self.spikes, "losses": list(self.losses)}

    def see(self, loss: float, finite: bool) -> float | None:
        """Take note of a step. Returns by how many deviations its loss lies above the ones before, where that is a jump."""
        if not finite:
            self.skipped += 1
            self.in_a_row += 1
            return None
        self.in_a_row = 0
        height = deviations(loss, self.losses)
        self.losses.append(loss)
        if self.config.spike == 0 or height <= self.config.spike:
            return None
        self.spikes += 1
        return height

    def check(self, step: int, last_good: Callable[[], str]) -> None:
        """Raises RunEndedError after too many skipped steps in a row."""
        if self.in_a_row >= self.config.max_skipped:
            raise RunEndedError(
                f"train.max_skipped={self.config.max_skipped}: loss or gradient was not finite in {self.in_a_row} steps "
                f"in a row, up to step {step}, which changed nothing; {last_good()}"
            )

    def rewind(self, step: int) -> None:
        """Count a return to `step`. Raises RunEndedError when they are too many: then it is not the data."""
        self.rewinds[step] = self.rewinds.get(step, 0) + 1
        if self.rewinds[step] > self.config.max_rewinds:
            raise RunEndedError(
                f"train.max_rewinds={self.config.max_rewinds}: the loss jumped again after so many returns to step {step}, "
                "on other data each time; lower optim.lr, or set train.on_spike=log"
            )


def deviations(loss: float, before: Sequence[float] | deque[float]) -> float:
    """How far `loss` lies above the median of those before it, in their standard deviations, estimated so that a few wild ones
    don't matter: 1.4826 times the median distance from the median, and at least 1% of it. 0 where there are too few."""
    if len(before) < FEWEST:
        return 0.0
    middle = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in before)
    return (loss - middle) / max(spread, 0.01 * abs(middle), 1e-12)


def check_finite(engine: Engine, step: int, last_good: Callable[[], str]) -> None:
    """Raises RunEndedError, on all ranks, where a weight or moment is not finite: such a checkpoint must not replace a good one.
    Collective."""
    tensors = [*engine.weights().values(), *engine.moments().values()]
    if not norm(t for t in tensors if t.dtype.is_floating_point).isfinite():
        raise RunEndedError(
            f"step {step}: a weight or moment is not finite, so no checkpoint is written; {last_good()}"
        )


# ---------------------------------------------------------------- data


class DataWatch:
    """Notices that a file of token data is no longer what it was when the run began: asks the system for size, times and place
    of each, and reads only those where one of these is another one."""

    def __init__(self, data: Data) -> None:
        self.shards: list[Shard] = data.shards()
        self.seen = [_identity(shard.path) for shard in self.shards]

    def check(self) -> None:
        """Raises RunEndedError that names the file."""
        for i, shard in enumerate(self.shards):
            try:
                now = _identity(shard.path)
                if now == self.seen[i]:
                    continue
                # Touched, copied back, linked: as long as it holds the same tokens, nothing happened.
                if shard.digest_now() != shard.digest:
                    raise RunEndedError(
                        f"data.files: {shard.path} was changed while the run read it; checkpoints up to now are of the old data"
                    )
                self.seen[i] = now
            except (OSError, ValueError) as error:
                if isinstance(error, RunEndedError):
                    raise
                told = (error.strerror if isinstance(error, OSError) else None) or str(error)
                raise RunEndedError(f"data.files: {shard.path} can't be read any more ({told})") from error


def _identity(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
