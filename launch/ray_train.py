"""Ray Train starts the ranks: a TorchTrainer each of whose workers runs launch/train.py as one rank.

    RUN_DIR=/shared/runs/long RECIPE=7b_moe NODES=2 RANKS_PER_NODE=8 launch/clusters/ray/train.sh data.files=data/corpus \\
      data.tokenizer=data/corpus

Arguments are knobs of launch/train.py, settings those of launch/clusters/settings.sh. A rank is a process of its own under its
worker, for it has signals, a working directory and a main thread to itself. A rank that dies ends the attempt; Ray starts all
anew, MAX_RESTARTS times at most, and the run goes on from its newest checkpoint. Mistakes and guards (exit codes 2 and 3) end it.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from moesaic.launch import cli

TRAIN = Path(__file__).resolve().parent / "train.py"
FINAL = (0, 2, 3)  # exit codes after which to start anew would come to the same


def settings() -> dict[str, Any]:
    """What launch/clusters/settings.sh set. Raises UserError."""
    found: dict[str, Any] = {name: os.environ.get(name, "") for name in ("RUN_DIR", "RECIPE", "RANKS_PER_NODE")}
    if not found["RUN_DIR"]:
        raise cli.UserError("RUN_DIR=: must name the run's folder, the same at every restart")
    for name, least in (("NODES", 1), ("MAX_RESTARTS", 0)):
        value = os.environ.get(name, "")
        if not value.isascii() or not value.isdigit() or int(value) < least:
            raise cli.UserError(f"{name}={value}: must be a whole number{' above 0' if least else ''} for Ray")
        found[name] = int(value)
    ranks = str(found["RANKS_PER_NODE"])
    if ranks != "gpu" and not (ranks.isascii() and ranks.isdigit() and int(ranks) > 0):
        raise cli.UserError(f"RANKS_PER_NODE={ranks}: must be gpu or a number above 0")
    return found


def one_rank(job: dict[str, Any]) -> None:
    """A worker: its rank from start to end. Raises RuntimeError where starting anew may help."""
    import ray.train
    import torch.distributed as dist

    context = ray.train.get_context()
    rank = context.get_world_rank()
    with socket.socket() as free:  # Ray's own port is taken by the group that tells this one to all
        free.bind(("", 0))
        meeting = [(ray.util.get_node_ip_address(), free.getsockname()[1])]
    dist.broadcast_object_list(meeting)
    (address, port), local = meeting[0], context.get_local_world_size()
    environment = os.environ | {
        "RANK": str(rank), "WORLD_SIZE": str(context.get_world_size()), "MASTER_ADDR": address, "MASTER_PORT": str(port),
        "LOCAL_RANK": str(context.get_local_rank()), "LOCAL_WORLD_SIZE": str(local), "GROUP_RANK": str(context.get_node_rank()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, str(TRAIN), *job["knobs"]], cwd=job["folder"], env=environment)
    code = process.wait()  # where Ray ends this worker the rank ends by itself, as one whose torchrun has died
    if code not in FINAL:
        raise RuntimeError(f"rank {rank} ended with {code}")
    ray.train.report({"code": code})


def main(knobs: list[str]) -> int:
    """The exit code of the ranks; 1 where Ray gave up."""
    told = settings()
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise cli.UserError(f"Ray: must be installed: pip install 'moesaic[ray]' ({error})") from error
    knobs = [f"recipe={told['RECIPE']}", f"run_dir={told['RUN_DIR']}", *knobs]
    config = cli.compose(knobs)
    if config.resume == "never" and told["MAX_RESTARTS"]:
        raise cli.UserError("resume=never: must be auto for Ray, which starts ranks anew, unless MAX_RESTARTS=0")
    ray.init(log_to_driver=True)
    gpu = told["RANKS_PER_NODE"] == "gpu"
    each = ray.cluster_resources().get("GPU", 0) / len(ray.nodes()) if gpu else told["RANKS_PER_NODE"]
    if gpu and (each < 1 or each != int(each)):
        raise cli.UserError(
            "RANKS_PER_NODE=gpu: must be a number where Ray's nodes do not have the same number of GPUs"
        )
    trainer = TorchTrainer(
        one_rank,
        train_loop_config={"knobs": knobs, "folder": os.getcwd()},
        torch_config=TorchConfig(backend="gloo"),  # what tells the ranks' address; they make their own groups
        scaling_config=ScalingConfig(
            num_workers=int(told["NODES"]) * int(each),
            use_gpu=bool(ray.cluster_resources().get("GPU", 0)),
            placement_strategy="PACK" if told["NODES"] == 1 else "SPREAD",
        ),
        run_config=RunConfig(
            name=Path(config.run_dir).name,
            storage_path=str(Path(config.run_dir).resolve() / "ray"),
            failure_config=FailureConfig(max_failures=int(told["MAX_RESTARTS"])),
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        raise cli.UserError(
            f"Ray gave up after MAX_RESTARTS={told['MAX_RESTARTS']}: {str(error).splitlines()[0]}"
        ) from error
    return int((result.metrics or {}).get("code", 0))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except cli.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
