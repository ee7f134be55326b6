"""Launches of launch/train.py that start in a moment: a process that has imported everything forks the ranks.

A rank is a process of its own, in a session of its own, that finds what torchrun would have told it and a store that outlives it.
What it lacks is torchrun: who restarts it, and passes signals on, is the test. `Forks` starts the server, `python -m
tests.launch.forks`, and speaks to it.
"""

import ctypes
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self


@dataclass
class Run:
    """A launch. `codes`: exit codes of its ranks, negative for signals, once `wait` has returned."""

    forks: "Forks"
    pids: list[int]
    output: Path
    codes: list[int] = field(default_factory=list)

    def wait(self, seconds: float = 60) -> list[int]:
        """Until all ranks have ended; those that have not after `seconds` are killed."""
        self.codes = self.forks.ask({"wait": self.pids, "seconds": seconds})["codes"]
        return self.codes

    def kill(self, number: int = signal.SIGKILL, ranks: list[int] | None = None) -> None:
        for rank, pid in enumerate(self.pids):
            if ranks is None or rank in ranks:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def running(self) -> bool:
        """Whether all ranks still live."""
        return not any(self.forks.ask({"ended": self.pids})["ended"])

    def text(self) -> str:
        return self.output.read_text(errors="replace")


class Forks:
    """A server whose launches write into `folder`. `root`: another checkout than this one, whose code it has."""

    def __init__(self, folder: Path, root: Path | None = None) -> None:
        self.folder, self.started = folder, 0
        root = root or Path(__file__).resolve().parents[2]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.forks"], cwd=folder, env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def launch(self, knobs: list[str], world: int = 2, fault: dict[str, Any] | None = None, **env: str) -> Run:
        """Start `world` ranks of launch/train.py with `knobs`; see tests.launch.faults for `fault`."""
        self.started += 1
        output = self.folder / f"launch{self.started}.log"
        job = {"knobs": knobs, "world": world, "fault": fault, "output": str(output), "env": env}
        return Run(self, self.ask(job)["pids"], output)

    def program(self, path: str, arguments: list[str], world: int = 0, **env: str) -> Run:
        """Start `world` ranks of the program at `path` in `folder`, or with 0 one process that is no rank."""
        self.started += 1
        output = self.folder / f"launch{self.started}.log"
        job = {"program": path, "arguments": arguments, "world": world, "output": str(output), "env": env}
        return Run(self, self.ask(job)["pids"], output)

    def ask(self, question: dict[str, Any]) -> Any:
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(question) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.kill()  # and with it the ranks: the kernel sees to that
        self.server.wait()
        for pipe in (self.server.stdin, self.server.stdout):
            assert pipe
            pipe.close()


# ---------------------------------------------------------------- the server


def _serve() -> None:
    # What takes time, most of it torch._dynamo, which a model's first tensor on the meta device would import.
    import torch
    import torch._dynamo
    import torch.distributed as dist

    from moesaic.launch import cli, train

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    stores: dict[int, Any] = {}
    codes: dict[int, int] = {}
    for line in sys.stdin:
        job = json.loads(line)
        if "output" in job:
            if "knobs" in job:
                job["config"] = cli.compose(job["knobs"])
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            pids = [_fork(train, job, rank, store.port) for rank in range(max(1, job["world"]))]
            stores[pids[0]] = store
            answer: dict[str, Any] = {"pids": pids}
        elif "ended" in job:
            _reap(codes)
            answer = {"ended": [pid in codes for pid in job["ended"]]}
        else:
            end, pids = time.monotonic() + job["seconds"], job["wait"]
            while not all(pid in codes for pid in pids):
                _reap(codes)
                if time.monotonic() > end:
                    for pid in set(pids) - set(codes):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)
            stores.pop(pids[0], None)
            answer = {"codes": [codes[pid] for pid in pids]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _reap(codes: dict[int, int]) -> None:
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            codes[pid] = os.waitstatus_to_exitcode(status)


def _fork(train: Any, job: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # with the server
        os.setsid()
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        world = str(job["world"])
        os.environ |= job["env"] if job["world"] == 0 else {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        } | job["env"]  # fmt: skip
        _program(job) if "program" in job else _rank(train, job)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(70)


def _program(job: dict[str, Any]) -> None:
    """What `python PATH ARGUMENTS` does."""
    from moesaic.launch import metrics

    metrics.peak_flops = lambda *_: (1e12, "not measured")  # 0.3 s in each rank
    sys.argv = [job["program"], *job["arguments"]]
    sys.path[0] = str(Path(job["program"]).resolve().parent)
    code = 0
    try:
        runpy.run_path(job["program"], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _rank(train: Any, job: dict[str, Any]) -> None:
    """What launch/train.py does when it is started, but for the imports and Hydra."""
    from moesaic.launch import cli
    from moesaic.parallel.mesh import leave_after
    from tests.launch import faults

    cli.GRACE = 0.0  # nobody ends the others when the first has spoken
    train.peak_flops = lambda *_: (1e12, "not measured")
    if job["fault"]:
        faults.plant(job["fault"], train)

    def program() -> None:
        try:
            train.main(job["config"])
        except cli.UserError as error:
            cli._exit(str(error), error.code)
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None

    leave_after(program)


if __name__ == "__main__":
    _serve()
