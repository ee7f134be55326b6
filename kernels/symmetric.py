"""A symmetric heap: the same regions in every rank's memory, and the address of each of them in every rank.

A kernel gets one int64 table (regions x ranks) of addresses, and stores into another rank's memory as into its own.

    CPU     memory that the processes of a machine share. It has no name, neither in /dev/shm nor elsewhere (Linux's memfd): a
            process lends its descriptor to the others, which open it through /proc, and nothing is left of it when the last
            process is gone, however it ended. It is also not held to the size of /dev/shm, which containers keep at 64 MiB.
            Pages that nobody has written take no memory
    CUDA    memory that peers map over NVLink: `allocate`, given by moesaic.parallel.fused, asks torch's symmetric memory for it

Whoever makes a heap gives it `exchange`, through which ranks tell each other: a value in, those of all ranks in order out.

Letters: W ranks.
"""

import math
import mmap
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Exchange = Callable[[Any], list[Any]]
Regions = dict[str, tuple[tuple[int, ...], torch.dtype]]
ALIGN = 256  # bytes at which a region begins: more than any load or cache line needs


class HeapError(RuntimeError):
    """Ranks that cannot share memory. Raised on all of them."""


class FusedError(RuntimeError):
    """There is no room for the rows that come, or ranks call different layers. Raised on every rank of the group."""


class LostError(FusedError):
    """A rank waited in vain for another one, which died or stands still. Raised on every rank of the group."""


@dataclass(frozen=True)
class Heap:
    """rank, ranks: of the group. memory: this rank's bytes. mapped: what keeps the other ranks' memory mapped. table: int64
    (regions, W), the address of each region in each rank, in the order of `regions`."""

    rank: int
    ranks: int
    regions: Regions
    memory: Tensor
    mapped: list[Any]
    table: Tensor

    def view(self, name: str, rank: int | None = None) -> Tensor:
        """A region of this rank as a tensor; on a CPU also another rank's, for tests."""
        memory = self.memory if rank is None else self.mapped[rank]
        shape, dtype = self.regions[name]
        start, size = starts(self.regions)[0][list(self.regions).index(name)], math.prod(shape) * dtype.itemsize
        return memory[start : start + size].view(dtype).view(shape)


def starts(regions: Regions) -> tuple[list[int], int]:
    """(offset of each region in bytes, bytes in all)."""
    offsets, total = [], 0
    for shape, dtype in regions.values():
        offsets.append(total)
        total += -(-math.prod(shape) * dtype.itemsize // ALIGN) * ALIGN
    return offsets, max(total, ALIGN)


def process_table() -> tuple[str, str]:
    """Equal where a number is the same process: of one running system, in one namespace of processes. Where a container hides
    these, by the host's name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname(), ""


def shared_memory(size: int, exchange: Exchange) -> tuple[Tensor, list[Any], list[int]]:
    """(this rank's bytes, all ranks' bytes, their addresses), of memory that processes of one machine share, zeroed. Collective.

    Raises HeapError, on all ranks, where one of them cannot open another's memory: ranks on several machines, or in containers
    that count their processes by themselves.
    """
    if not hasattr(os, "memfd_create"):
        raise HeapError("parallel.expert_path=fused: needs memory that processes share without a name, as Linux has it")
    fd = os.memfd_create("moesaic-heap")
    try:
        os.ftruncate(fd, size)
        table = process_table()
        lent, opened, error = exchange((socket.gethostname(), os.getpid(), fd, table)), [], ""
        for host, pid, other, theirs in lent:
            try:
                if theirs != table:  # where the same number is another process, or even this one
                    raise OSError("it is on another machine, or in a container that counts processes anew")
                peer = os.open(f"/proc/{pid}/fd/{other}", os.O_RDWR) if pid != os.getpid() else os.dup(fd)
            except OSError as failure:
                own_name = f"process {os.getpid()} on {socket.gethostname()}"
                error = f"{own_name} cannot open memory of process {pid} on {host}: {failure}"
                break
            with os.fdopen(peer) as file:
                opened.append(torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8))
        errors = [text for text in exchange(error) if text]  # and all have opened this one's, which may be closed now
    finally:
        os.close(fd)
    if errors:
        raise HeapError(f"parallel.expert_path=fused: its ranks must be on one machine; {errors[0]}")
    own = [pid for _, pid, *_ in lent].index(os.getpid())
    return opened[own], opened, [memory.data_ptr() for memory in opened]


def make_heap(
    rank: int, regions: Regions, exchange: Exchange,
    allocate: Callable[[int, Exchange], tuple[Tensor, list[Any], list[int]]] = shared_memory,
) -> Heap:  # fmt: skip
    """A heap of zeros, of the same `regions` on every rank. Collective."""
    offsets, size = starts(regions)
    asked = exchange([(name, tuple(shape), str(dtype)) for name, (shape, dtype) in regions.items()])
    assert all(other == asked[0] for other in asked), asked
    memory, mapped, addresses = allocate(size, exchange)
    table = torch.tensor([[address + offset for address in addresses] for offset in offsets], dtype=torch.int64)
    return Heap(rank, len(addresses), dict(regions), memory, mapped, table.to(memory.device))
