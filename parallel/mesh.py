"""Processes, devices and the device meshes of a run.

Two meshes cover the same W ranks. Each groups neighbours innermost, for they share a node and its fast links.

    dense     (replicate, shard)                         W / replicate neighbours hold one copy of the dense parameters, sharded
    experts   (expert_replicate, expert_shard, expert)   `expert` neighbours divide the experts of a layer, and dispatch stays
                                                         among them; the W / expert ranks that hold the same ones shard them
                                                         over expert_shard, in expert_replicate copies

expert_replicate is the largest common divisor of `replicate` and W / expert. Where `expert` divides W / replicate, a copy of the
experts lies within the ranks of one dense copy: as many copies as of the rest, and only sums of gradients cross between them.
Where `expert` is larger, it spans several dense copies. There are then fewer copies of the experts, or one; as many ranks
as before share a layer's experts, so each holds less, but rows travel between dense copies.

    8 ranks, replicate 2, expert 2:   expert_replicate 2, expert_shard 2      ranks 0 1 | 2 3 and 4 5 | 6 7
    8 ranks, replicate 2, expert 4:   expert_replicate 2, expert_shard 1      ranks 0 1 2 3 and 4 5 6 7
    8 ranks, replicate 4, expert 4:   expert_replicate 2, expert_shard 1      the same: an expert group spans two dense copies
    8 ranks, replicate 2, expert 8:   expert_replicate 1, expert_shard 1      one copy of the experts, two of the rest

Dimensions of replicas are left out where there is one, for each dimension costs process groups. Pipeline stages would be a
further dimension outside of both meshes, each stage with these two over its ranks; ranks of context parallelism would be a
dimension inside `shard`, part of the ranks over which dense parameters are sharded and of those over which experts are divided.
"""

import ctypes
import math
import os
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from moesaic.parallel import trace


@dataclass(frozen=True)
class Meshes:
    """dense: ([replicate,] shard) over all ranks; experts: ([expert_replicate,] expert_shard, expert) over the same."""

    dense: DeviceMesh
    experts: DeviceMesh

    @property
    def expert_parallel(self) -> int:
        """Ranks over which the experts of a layer are divided."""
        return self.experts["expert"].size()

    @property
    def expert_copies(self) -> DeviceMesh:
        """The ranks that hold the same experts as this one: ([expert_replicate,] expert_shard)."""
        names = self.experts.mesh_dim_names
        assert names is not None
        return self.experts[names[:-1]]


def end_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies, or end it if it is no longer the child of `parent`.

    torchrun puts every rank in a session of its own: killing the agent alone would leave the ranks running and holding
    their ports, or waiting half an hour to meet. Linux only; elsewhere nothing happens.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and hasattr(signal, "SIGKILL") and os.uname().sysname == "Linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def leave_after(program: Callable[[], None]) -> NoReturn:
    """Run `program` and end the process with its exit code, without the interpreter's own shutdown.

    A thread of gloo may still hold tensors of the last collective, also after the group is destroyed; if it frees one that Python
    knows while the interpreter shuts down, the process aborts (github.com/pytorch/pytorch/pull/179291). A busy machine shows it.
    And after an error, NCCL's communicators would wait for other ranks there: see `end`.
    """
    code: object = 0
    try:
        program()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def start() -> torch.device:
    """Join the process group torchrun describes, or make one of a single process. Returns this rank's device.

    NCCL carries CUDA tensors and gloo CPU tensors; without a GPU there is gloo alone.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    trace.observe()
    trace.record_flights()
    if "RANK" in os.environ:
        find_store()
        store, rank, world = next(rendezvous("env://"))
        dist.init_process_group(
            backend, store=dist.PrefixStore(meet(store, rank, world), store), rank=rank, world_size=world
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def end(device: torch.device) -> None:
    """Leave the process group; not on a GPU after an error, of which other ranks may not know: NCCL's communicators are destroyed
    together (docs.pytorch.org/docs/stable/distributed.html#shutdown), which would wait for those that stand in a collective, and
    nobody would read of the error. `leave_after` ends the process as it is."""
    if device.type == "cpu" or sys.exception() is None:
        dist.destroy_process_group()


def find_store(seconds: float = 60.0) -> None:
    """End the process unless the store of torchrun's agent answers within `seconds`.

    An agent that died before this process ran its first line leaves no other trace: its parent is then another one from the
    start. Nobody else will open that store, and a rendezvous would wait half an hour for it.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                print(
                    f"error: torchrun's store at {host}:{port} does not answer ({error}); is its agent dead?",
                    file=sys.stderr,
                )
                raise SystemExit(1) from error
        time.sleep(0.2)


def meet(store: dist.Store, rank: int, world: int) -> str:
    """A name that these processes have for themselves, and no earlier ones of the same ranks. Collective.

    torchrun keeps one store over its restarts of a launch, where a process finds the addresses of dead ones and calls them
    (github.com/pytorch/pytorch/issues/135712). TORCHELASTIC_RESTART_COUNT would not do for a name: nodes count differently. So
    each rank says a word of its own, and rank 0 answers with the name, again when the word changes, until the rank thanks for it.

    Raises TimeoutError on rank 0, and what the store raises on the others, after the store's own timeout.
    """
    name = secrets.token_hex(8)
    if rank > 0:
        store.set(f"word/{rank}", name)
        name = store.get(f"answer/{name}").decode()
        store.set(f"thanks/{name}/{rank}", "")
        return name
    missing = set(range(1, world))
    patience: timedelta = store.timeout  # type: ignore[attr-defined]  # which torch's stubs leave out
    end = time.monotonic() + patience.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise TimeoutError(f"ranks {sorted(missing)} of {world} did not come within {patience}")
        for other in list(missing):
            if store.check([f"thanks/{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"word/{other}"]):
                store.set(f"answer/{store.get(f'word/{other}').decode()}", name)
        time.sleep(0.02)
    return name


def expert_degree(expert: str, n_experts: int, world: int) -> int:
    """`parallel.expert` as a number; auto: the largest divisor of both the world size and the number of experts.

    Raises ValueError where the experts, or the ranks, can't be divided evenly.
    """
    if expert == "auto":
        return max(d for d in range(1, world + 1) if world % d == 0 and n_experts % d == 0)
    degree = int(expert)
    check_degrees(degree, 1, world)
    if n_experts % degree:
        raise ValueError(f"parallel.expert={degree}: must divide model.n_experts={n_experts}")
    return degree


def check_degrees(expert: int, replicate: int, world: int) -> None:
    """Raises ValueError where the ranks can't be divided evenly."""
    for name, degree in (("expert", expert), ("replicate", replicate)):
        if degree < 1 or world % degree:
            raise ValueError(f"parallel.{name}={degree}: must divide the number of ranks, {world}")


def make_meshes(device_type: str, expert: int, replicate: int = 1) -> Meshes:
    """The meshes of `expert` ranks that divide a layer's experts and `replicate` copies of the dense parameters.

    Collective: every rank calls it with the same degrees. Raises ValueError where they don't divide the number of ranks.
    """
    world = dist.get_world_size()
    check_degrees(expert, replicate, world)
    copies = math.gcd(replicate, world // expert)

    def mesh(names: tuple[str, ...], sizes: tuple[int, ...]) -> DeviceMesh:
        skip = int(sizes[0] == 1)
        return init_device_mesh(device_type, sizes[skip:], mesh_dim_names=names[skip:])

    return Meshes(
        dense=mesh(("replicate", "shard"), (replicate, world // replicate)),
        experts=mesh(("expert_replicate", "expert_shard", "expert"), (copies, world // expert // copies, expert)),
    )
