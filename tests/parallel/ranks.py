"""Run a function on several gloo ranks, each a process of its own."""

import importlib.util
import inspect
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_ranks(
    function: Callable[..., Any], world: int, folder: Path, *arguments: Any, timeout: float = 120
) -> list[Any]:
    """What `function(*arguments)` returned on each of `world` ranks. It is a top-level function of a test file, and finds
    torch.distributed initialised. An exception on any rank ends all of them and becomes an AssertionError with its traceback.
    """
    job = folder / "job"
    job.write_bytes(pickle.dumps((inspect.getfile(function), function.__name__, arguments)))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(world):
            with (folder / f"output{rank}").open("w") as output:
                command = [sys.executable, __file__, str(folder)]
                variables = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(
                    subprocess.Popen(
                        command, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )
        for process in processes:
            process.wait(timeout)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    failed = [rank for rank, process in enumerate(processes) if process.returncode != 0]
    text = "\n".join(f"--- rank {rank}\n{(folder / f'output{rank}').read_text()[-4000:]}" for rank in failed)
    assert not failed, f"ranks {failed} failed\n{text}"
    return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world)]


def _worker(folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    path, name, arguments = pickle.loads((folder / "job").read_bytes())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world)
    spec = importlib.util.spec_from_file_location("ranks_job", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = getattr(module, name)(*arguments)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    from moesaic.parallel.mesh import leave_after  # a thread of gloo may abort the interpreter's own shutdown

    leave_after(lambda: _worker(Path(sys.argv[1])))
