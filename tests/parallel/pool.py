"""Gloo ranks that stay: start once, run one function after another.

A worker is this file as a program. It gets jobs, (function, arguments), over a socket from the process that started it, and
answers each. It ends when that process does, whatever it is doing then: a thread of its own watches the socket. Ranks meet in a
file, so that there is no port to collide on.
"""

import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self


class Mistake(NamedTuple):
    """What an exception on a rank was."""

    kind: str
    message: str
    trace: str


class RanksFailed(AssertionError):
    """A job that did not end well. `mistakes`: the exceptions, by rank; ranks that died or did not answer are `lost`."""

    def __init__(self, mistakes: dict[int, Mistake], lost: dict[int, str]) -> None:
        self.mistakes, self.lost = mistakes, lost
        told = [f"rank {rank}: {mistake.trace}" for rank, mistake in mistakes.items()]
        super().__init__("\n".join([*told, *(f"rank {rank} {why}" for rank, why in lost.items())]))

    def refusal(self) -> str | None:
        """The one line of a ValueError that every rank raised, or None."""
        if self.lost or {mistake.kind for mistake in self.mistakes.values()} != {"ValueError"}:
            return None
        lines = {mistake.message for mistake in self.mistakes.values()}
        line = lines.pop()
        return line if not lines and "\n" not in line else None


class Pool:
    """`world` ranks. `run` gives every rank a job and returns what they returned.

    A job that raises on some rank becomes RanksFailed. The ranks go on if the group is still sound: all have answered, and then
    meet in a collective. If not, or if a rank died or took longer than the timeout, all are started anew.
    """

    def __init__(self, world: int, timeout: float = 120, patience: float = 10) -> None:
        """timeout: seconds of a job; patience: seconds more for the other ranks after one has failed."""
        self.world, self.timeout, self.patience = world, timeout, patience
        self.folder = tempfile.TemporaryDirectory(prefix="moesaic-pool-")
        self.starts = 0
        self._start()

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None) -> list[Any]:
        """What `function(*arguments)`, a top-level function of an importable module, returned on each rank."""
        self.send(function, *arguments)
        return self.receive(timeout)

    def send(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Start a job; `receive` must follow. Meanwhile this process may do something else."""
        job = pickle.dumps((function, arguments))
        for connection in self.connections:
            with suppress(OSError):  # died while idle: `receive` tells
                connection.send_bytes(job)

    def receive(self, timeout: float | None = None) -> list[Any]:
        answers, lost = self._answers(timeout or self.timeout)
        mistakes = {rank: answer for rank, answer in answers.items() if isinstance(answer, Mistake)}
        if not mistakes and not lost:
            return [answers[rank] for rank in range(self.world)]
        if lost or not self._sound():
            self.stop()
            self._start()
        raise RanksFailed(mistakes, lost)

    def stop(self) -> None:
        for connection, process in zip(self.connections, self.processes, strict=True):
            process.kill()
            process.wait()
            connection.close()
        self.connections, self.processes = [], []

    def close(self) -> None:
        self.stop()
        self.folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        self.starts += 1
        folder = Path(self.folder.name) / str(self.starts)
        folder.mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {"WORLD_SIZE": str(self.world), "LOCAL_WORLD_SIZE": str(self.world)}
        self.connections: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(self.world):
            mine, theirs = Pipe()
            command = [sys.executable, __file__, str(theirs.fileno()), str(folder)]
            with (folder / f"output{rank}").open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
            theirs.close()
            self.connections.append(mine)

    def _answers(self, timeout: float) -> tuple[dict[int, Any], dict[int, str]]:
        answers: dict[int, Any] = {}
        lost: dict[int, str] = {}
        open_ranks = dict(enumerate(self.connections))
        end = time.monotonic() + timeout
        while open_ranks and (left := end - time.monotonic()) > 0:
            for connection in wait(list(open_ranks.values()), left):
                rank = next(r for r, c in open_ranks.items() if c is connection)
                del open_ranks[rank]
                try:
                    answers[rank] = connection.recv()
                    failed = isinstance(answers[rank], Mistake)
                except (EOFError, OSError):
                    lost[rank] = f"died\n{self._output(rank)}"
                    failed = True
                if failed:  # others may wait for it in a collective for ever
                    end = min(end, time.monotonic() + self.patience)
        why = "did not answer" if lost or any(isinstance(a, Mistake) for a in answers.values()) else "took too long"
        lost |= {rank: f"{why}\n{self._output(rank)}" for rank in open_ranks}
        return answers, lost

    def _sound(self) -> bool:
        self.send(_meet, self.world)
        answers, lost = self._answers(self.patience)
        return not lost and all(answer is True for answer in answers.values())

    def _output(self, rank: int) -> str:
        return (Path(self.folder.name) / str(self.starts) / f"output{rank}").read_text(errors="replace")[-4000:]


def _meet(world: int) -> bool:
    import torch
    import torch.distributed as dist

    from moesaic.parallel import shared

    ranks = torch.full((), 2 ** dist.get_rank())
    dist.all_reduce(ranks)
    each = torch.empty(world, dtype=ranks.dtype)
    shared.all_gather_single(each, torch.full((1,), 2 ** dist.get_rank()))  # which counts its exchanges by itself
    return ranks.item() == each.sum().item() == 2**world - 1


def _worker(connection: Connection, folder: Path) -> None:
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        while True:
            try:
                jobs.put(connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(1)

    threading.Thread(target=listen, daemon=True).start()

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world)
    while True:
        job = jobs.get()
        try:
            function, arguments = pickle.loads(job)
            answer = pickle.dumps(function(*arguments))
        except BaseException as error:
            answer = pickle.dumps(Mistake(type(error).__name__, str(error), traceback.format_exc()))
        connection.send_bytes(answer)


if __name__ == "__main__":
    # The functions it is sent, and Mistake, belong to the module of this name.
    from tests.parallel import pool

    pool._worker(Connection(int(sys.argv[1])), Path(sys.argv[2]))
