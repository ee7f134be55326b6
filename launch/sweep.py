"""Sweeps whose points are jobs of their own, by hydra-submitit-launcher: on Slurm, or as processes of this machine.

    python launch/train.py --multirun hydra/launcher=submitit_slurm hydra.launcher.nodes=2 recipe=7b_moe \\
      run_dir=/shared/runs/sweep optim.lr=1e-4,3e-4

The program that is given this command, without torchrun, looks at every point's knobs, submits them, and waits for all. A job has
one task a node, `start_ranks`, which starts the node's ranks with launch/clusters/launch.sh, and so with what
launch/clusters/settings.sh and the environment say. Point N writes to run_dir/N, and its output is in run_dir/.submitit.

Told to stop, 300 s before its time is over or by a preemption, a job saves, queues itself again, and goes on later: what
launch/clusters/slurm/train.sbatch does, too. A job that is cancelled saves, and stays so.
"""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from moesaic.launch import cli

LAUNCH = Path(__file__).resolve().parent / "clusters" / "launch.sh"
KINDS = ("submitit_slurm", "submitit_local")

# Put before what was typed, which wins. A job may be queued again as often as MAX_RESTARTS of settings.sh lets torchrun mend it.
ON_SLURM = ("hydra.launcher.signal_delay_s=300", "hydra.launcher.max_num_timeout=100", "hydra.launcher.name=moesaic")


def launcher(arguments: Sequence[str]) -> str | None:
    """Which of `KINDS` a command line asks for."""
    found = [word.partition("=")[2] for word in arguments if word.startswith("hydra/launcher=")]
    return found[-1] if found and found[-1] in KINDS else None


def prepare(kind: str, arguments: list[str]) -> list[str]:
    """The arguments for Hydra of a sweep by launcher `kind`. Raises UserError where it, or any of its points, can't be."""
    if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        raise cli.UserError(f"hydra/launcher={kind}: needs hydra-submitit-launcher: pip install 'moesaic[sweep]'")
    if not {"-m", "--multirun"} & set(arguments):
        raise cli.UserError(f"hydra/launcher={kind}: needs --multirun")
    if "RANK" in os.environ:
        raise cli.UserError(f"hydra/launcher={kind}: starts torchrun itself: python launch/train.py --multirun ...")
    port = os.environ.get("PORT") or "29400"
    if not (port.isascii() and port.isdigit()):
        raise cli.UserError(f"PORT={port}: must be a whole number")
    first = next(i for i, word in enumerate(arguments) if re.match(r"[^-][^=]*=", word))
    words = arguments[first:]
    if not any(word.startswith("-") for word in arguments if word not in ("-m", "--multirun")):
        overrides = OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")])
        (points,) = BasicSweeper.split_arguments(overrides, None)
        for point in points:
            cli.compose([word for word in point if not word.startswith(("hydra.", "hydra/"))])
        print(f"{len(points)} jobs; their output: RUN_DIR/.submitit", flush=True)
    return [*arguments[:first], *(ON_SLURM if kind == "submitit_slurm" else ()), *words]


@contextlib.contextmanager
def one_line(kind: str | None) -> Iterator[None]:
    """What submitit raises, as a UserError: such as sbatch's answer. Without a launcher of `KINDS`, nothing."""
    if not kind:
        yield
        return
    from submitit.core.utils import UncompletedJobError

    try:
        yield
    except (UncompletedJobError, RuntimeError) as error:
        told = next((line for line in str(error).splitlines()[::-1] if line.strip()), type(error).__name__)
        raise cli.UserError(f"hydra/launcher={kind}: {told.strip()}") from error


def start_ranks(composed: DictConfig) -> None:
    """A task of a point's job: this node's ranks, from start to end. Raises UserError where they fail.

    Slurm sends its signals to every process of a job. The ranks' own, SIGUSR1, comes from here; SIGUSR2, submitit's, they ignore.
    """
    import submitit

    config, hydra, job = cli.checked(composed), HydraConfig.get(), submitit.JobEnvironment()
    run_dir = f"{config.run_dir}/{hydra.job.num}"
    port = int(os.environ.get("PORT") or 29400) + hydra.job.num  # a node may be the first one of several jobs
    settings = {
        "RUN_DIR": run_dir,
        "RECIPE": hydra.runtime.choices["recipe"],
        "NODES": str(job.num_nodes),
        "HEAD": os.environ.get("HEAD") or job.hostnames[0],
        "JOB_ID": f"{job.job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}",
        "PORT": str(port),
        "PYTHON": os.environ.get("PYTHON") or sys.executable,
    }
    knobs = [word for word in hydra.overrides.task if word.partition("=")[0] not in ("recipe", "run_dir")]
    again: Any = signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # submitit's way to queue a job again
    ranks = subprocess.Popen([LAUNCH, *knobs], env=os.environ | settings)
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        ranks.send_signal(signal.SIGUSR1)

    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, stop)
    code = ranks.wait()
    if code and (signal.SIGUSR2 in asked or (asked and was_preempted())):
        again(signal.SIGUSR2, None)  # ends the first node's task; Slurm ends the others
        time.sleep(600)
    if code:
        raise cli.UserError(
            f"run_dir={run_dir}: its ranks {'were told to stop' if asked else 'failed'}; see {job.paths.stderr}"
        )


def was_preempted() -> bool:
    """Whether Slurm has preempted this job since it started. A job that ends before its GraceTime is over is not queued again by
    Slurm itself."""
    number = os.environ.get("SLURM_JOB_ID")
    if not number:
        return False
    done = subprocess.run(["scontrol", "show", "job", "-o", number], capture_output=True, text=True)
    times = dict(re.findall(r" (StartTime|PreemptTime)=(\d\S*)", done.stdout))
    return times.get("PreemptTime", "") >= times.get("StartTime", "~")
