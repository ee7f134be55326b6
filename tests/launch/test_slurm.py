"""Slurm for real: its daemons on this machine with a configuration of their own, two nodes of one rank. `make test-slurm`."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch.launches import ROOT, Place, evaluations, kill, losses, processes, until

SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
DAEMONS = [shutil.which(name, path=SBIN) for name in ("munged", "slurmctld", "slurmd")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(DAEMONS) or os.getuid() != 0, reason="needs root, slurm-wlm and munge: apt install"),
]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


@dataclass
class Cluster:
    folder: Path
    environment: dict[str, str]

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        fields = self.ask("scontrol", "show", "job", "-o", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)


def config(folder: Path, ports: list[int]) -> str:
    host = socket.gethostname()
    return f"""
ClusterName=moesaic
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=60
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=low Nodes=n0,n1 Default=YES PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE State=UP
PartitionName=high Nodes=n0,n1 PriorityTier=10 PreemptMode=OFF State=UP
"""


def holders(folder: Path) -> list[int]:
    """Processes that have a file of the folder open, or stand in it; not this one."""

    def holds(process: Path) -> bool:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            return any(
                os.readlink(link).startswith(f"{folder}/") for link in (process / "cwd", *(process / "fd").iterdir())
            )
        return False

    found = [int(process.name) for process in Path("/proc").glob("[0-9]*") if holds(process)]
    return [pid for pid in found if pid != os.getpid()]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: the name of a socket is
    started: list[subprocess.Popen[bytes]] = []
    try:
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "key").write_bytes(secrets.token_bytes(128))
        (folder / "key").chmod(0o400)
        ports = free_ports(4)
        (folder / "slurm.conf").write_text(config(folder, ports))
        # No cgroups are used: the plugin's v1 asks for nothing then. Slurm 22.05 does not know `disabled` yet.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        environment = inherited | {
            "SLURM_CONF": f"{folder}/slurm.conf",
            "HEAD": "127.0.0.1",
            "PORT": str(ports[3]),
            "RANKS_PER_NODE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
        }
        munged, slurmctld, slurmd = map(str, DAEMONS)
        munge = [munged, "--foreground", "--force", "--num-threads=1", f"--socket={folder}/munge.socket"]
        munge += [f"--key-file={folder}/key", f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/seed"]
        munge += [f"--log-file={folder}/munge.log"]
        for command in (munge, [slurmctld, "-D"], [slurmd, "-D", "-N", "n0"], [slurmd, "-D", "-N", "n1"]):
            with (folder / "daemons.log").open("ab") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if command is munge:
                until(lambda: (folder / "munge.socket").exists(), 10)
        found = Cluster(folder, environment)

        def idle() -> bool:
            assert all(daemon.poll() is None for daemon in started)
            done = subprocess.run(["sinfo", "-h", "-p", "low", "-o", "%D %T"], env=environment, capture_output=True)
            return done.stdout.decode().split() == ["2", "idle"]

        until(idle, 40)
        yield found
        subprocess.run(["scancel", "-s", "KILL", "--me"], env=environment, timeout=30, capture_output=True)
    except BaseException:
        for path in sorted(folder.glob("*.log")):
            print(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}")
        raise
    finally:
        for daemon in reversed(started):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(started):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # srun, which looks for its controller for long, and slurmstepd, which overwrites its environment.
        for pid in {*processes(f"SLURM_CONF={folder}/slurm.conf"), *holders(folder)}:
            kill(pid)
        shutil.rmtree(folder, ignore_errors=True)


def preempt(cluster: Cluster, number: str) -> None:
    cluster.ask("sbatch", "-p", "high", "-N", "2", "-o", "/dev/null", "--wrap", "sleep 1")


def time_is_over(cluster: Cluster, number: str) -> None:
    """What --signal=B:USR1@300 sends."""
    cluster.ask("scancel", "--batch", "--signal=USR1", number)


@pytest.mark.parametrize("how", [preempt, time_is_over])
def test_two_ranks_are_queued_again_and_go_on(
    place: Place, reference: tuple[Path, str], tmp_path: Path, cluster: Cluster, how: Callable[[Cluster, str], None]
) -> None:
    """The job stops with a checkpoint of the very step, waits its turn, and ends as if nothing had happened."""
    uninterrupted, _ = reference
    run_dir = tmp_path / "run"
    knobs = [k for k in place.knobs(run_dir, "train.checkpoint_every=30", "train.eval_every=30") if k[:8] != "run_dir="]
    cluster.environment["RUN_DIR"] = str(run_dir)
    log = tmp_path / "job.log"
    script = "launch/clusters/slurm/train.sbatch"
    number = cluster.ask("sbatch", "--parsable", "--output", str(log), script, *knobs).strip()
    try:
        until(lambda: len(losses(run_dir)) > 4, 120)
        how(cluster, number)
        until(lambda: "asked to stop: the last checkpoint is " in log.read_text(), 60)
        stopped = losses(run_dir)[-1][0]
        until(lambda: cluster.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "PREEMPTED"), 280)
        text = log.read_text()
        job = cluster.job(number)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), text
        assert f": step {stopped}, " in text and "resumed from " in text
        assert losses(run_dir) == losses(uninterrupted)
        assert evaluations(run_dir) == evaluations(uninterrupted)
    except BaseException:
        print(cluster.job(number), log.read_text()[-5000:] if log.exists() else "no log")
        raise


def test_a_job_that_is_cancelled_saves_and_is_not_queued_again(place: Place, tmp_path: Path, cluster: Cluster) -> None:
    run_dir = tmp_path / "run"
    knobs = [k for k in place.knobs(run_dir, "train.steps=100000", "train.eval_every=0") if k[:8] != "run_dir="]
    cluster.environment["RUN_DIR"] = str(run_dir)
    log = tmp_path / "job.log"
    script = "launch/clusters/slurm/train.sbatch"
    number = cluster.ask("sbatch", "--parsable", "--output", str(log), script, *knobs).strip()
    until(lambda: len(losses(run_dir)) > 4, 120)
    cluster.ask("scancel", number)
    try:
        until(lambda: "asked to stop: the last checkpoint is " in log.read_text(), 40)
        until(lambda: cluster.ask("squeue", "-h", "-t", "all", "-j", number, "-o", "%T").strip() == "CANCELLED", 40)
        assert cluster.job(number)["Restarts"] == "0"
    except BaseException:
        print(cluster.job(number), log.read_text()[-5000:])
        raise


@pytest.mark.timeout(800)
def test_points_of_a_sweep_are_queued_again_and_go_on(
    place: Place, reference: tuple[Path, str], tmp_path: Path, cluster: Cluster
) -> None:
    """Two points of two nodes, by hydra-submitit-launcher; the first is preempted. Both end as if nothing had happened."""
    uninterrupted, _ = reference
    run_dir = tmp_path / "sweep"
    knobs = place.knobs(run_dir, "train.checkpoint_every=30", "train.eval_every=30", "train.keep_checkpoints=2,3")
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.nodes=2", "hydra.launcher.timeout_min=60"]
    with (tmp_path / "sweep.log").open("wb") as log:
        command = [sys.executable, "launch/train.py", "--multirun", *launcher, "recipe=tiny_moe", *knobs]
        sweep = subprocess.Popen(command, cwd=ROOT, env=cluster.environment, stdout=log, stderr=log)
    try:
        until(lambda: len(losses(run_dir / "0")) > 4, 150)
        preempt(cluster, "")
        assert sweep.wait(500) == 0
        queued_again = [path.read_text() for path in run_dir.glob(".submitit/*/*_0_log.err")]
        assert sum("this job is preempted" in text for text in queued_again) == 1
        for number in ("0", "1"):
            assert losses(run_dir / number) == losses(uninterrupted)
            assert evaluations(run_dir / number) == evaluations(uninterrupted)
        starts = [(run_dir / number / "events.jsonl").read_text().count('"start"') for number in ("0", "1")]
        assert starts == [2, 1]
    except BaseException:
        for path in [tmp_path / "sweep.log", *run_dir.glob(".submitit/*/*.err"), *run_dir.glob(".submitit/*/*.out")]:
            print(f"== {path}", path.read_text()[-4000:])
        raise
    finally:
        sweep.kill()
        sweep.wait()
