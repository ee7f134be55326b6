"""The symmetric heap between processes of this machine."""

import gc
import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moesaic.kernels.symmetric import ALIGN, HeapError, make_heap, process_table, shared_memory, starts
from tests.parallel.pool import Pool, RanksFailed

REGIONS: Any = {"a": ((3, 5), torch.int32), "none": ((0, 7), torch.float32), "b": ((2, 2), torch.bfloat16)}


def exchange(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def named() -> set[str]:
    """Files of /dev/shm that this process maps. Others come and go there: those of other tests, running at the same time."""
    with open("/proc/self/maps") as maps:
        return {line.split(maxsplit=5)[5].strip() for line in maps if "/dev/shm/" in line}


def test_where_the_system_tells_nothing_hosts_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(process_table())

    def hidden(path: str) -> str:
        raise PermissionError(path)

    monkeypatch.setattr(os, "readlink", hidden)
    assert process_table() == (socket.gethostname(), "")


def test_regions_are_apart() -> None:
    assert starts(REGIONS) == ([0, ALIGN, ALIGN], 2 * ALIGN)
    assert starts({})[1] > 0


def write_and_read() -> tuple[list[list[int]], int, bool]:
    """Each rank stores into every rank by address, as a kernel does, and reads its own."""
    import ctypes

    before, files = descriptors(), named()
    heap = make_heap(dist.get_rank(), REGIONS, exchange)
    for rank in range(heap.ranks):
        place = int(heap.table[0, rank]) + 4 * (5 * heap.rank + 2)
        ctypes.c_int32.from_address(place).value = 10 * heap.rank + rank
    dist.barrier()
    assert heap.view("b").dtype == torch.bfloat16 and heap.view("none").shape == (0, 7)
    rows = heap.view("a").tolist()
    nameless = named() == files  # so that a rank that dies can't leave a name
    del heap
    gc.collect()
    return rows, descriptors() - before, nameless


def cannot_open() -> None:
    def elsewhere(value: Any) -> list[Any]:
        if isinstance(value, tuple) and dist.get_rank() == 1:  # says a process that isn't here
            value = ("elsewhere", 2**22 + 1, *value[2:])
        return exchange(value)

    shared_memory(64, elsewhere)


def same_number_elsewhere() -> None:
    """Each rank has the number that the other one's process has there: containers begin to count at 1."""
    shared_memory(64, lambda value: [
        ("pod", os.getpid(), value[2], ("another boot", "pid:[1]")) if rank != dist.get_rank() else value
        for rank in range(2)
    ] if isinstance(value, tuple) else [value, value])  # fmt: skip


def die_holding() -> None:
    make_heap(dist.get_rank(), REGIONS, exchange).view("a").fill_(1)
    os._exit(9)


def test_ranks_store_into_each_other_and_leave_nothing() -> None:
    with Pool(3) as pool:
        for rank, (rows, left_open, nameless) in enumerate(pool.run(write_and_read)):
            assert rows == [[0, 0, 10 * source + rank, 0, 0] for source in range(3)]
            assert left_open == 0 and nameless
        with pytest.raises(RanksFailed) as failed:
            pool.run(cannot_open)
        assert {m.kind for m in failed.value.mistakes.values()} == {HeapError.__name__} and len(
            failed.value.mistakes
        ) == 3
        assert all("process 4194305 on elsewhere" in m.message for m in failed.value.mistakes.values())
        with pytest.raises(RanksFailed, match="on pod: it is on another machine, or in a container"):
            pool.run(same_number_elsewhere)
        with pytest.raises(RanksFailed):
            pool.run(die_holding)
