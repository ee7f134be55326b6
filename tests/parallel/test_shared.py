"""Exchanges through shared memory: torch.distributed's bits, whatever is outstanding; ranks that are gone, or far."""

import gc
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.parallel import shared, trace
from tests.parallel.pool import Pool, RanksFailed

TYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@pytest.fixture(scope="module")
def three() -> Iterator[Pool]:
    with Pool(3) as pool:
        yield pool


def sizes_of(generator: torch.Generator, ranks: int, most: int) -> list[list[int]]:
    """[from][to] rows, many of them none."""
    drawn = torch.randint(0, most, (ranks, ranks), generator=generator)
    return (drawn * torch.randint(0, 2, (ranks, ranks), generator=generator)).tolist()


def content(generator: torch.Generator, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 2 if dtype == torch.bool else 200, (rows, width), generator=generator).to(dtype)


def exchange_at_random(rounds: int) -> int:
    """Of two groups in turn, several outstanding, waited for in any order; each against torch.distributed's."""
    rank = dist.get_rank()
    pair = dist.new_group([0, 2])  # of which rank 1 is none
    same, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(rank)
    waiting: list[tuple[Any, Tensor, Tensor]] = []
    for i in range(rounds):
        dtype, width = TYPES[i % len(TYPES)], int(torch.randint(1, 9, (), generator=same))
        most = int(torch.randint(1, 20_000 if i % 5 == 0 else 30, (), generator=same))
        group: Any = pair if i % 3 == 0 else dist.group.WORLD
        members = dist.get_process_group_ranks(group)
        n = len(members)
        out_WW = sizes_of(same, n, most)
        kind, wait = int(torch.randint(0, 3, (), generator=same)), int(torch.randint(0, 4, (), generator=same))
        if rank in members:
            me = members.index(rank)
            if kind == 0:
                x = content(own, sum(out_WW[me]), width, dtype)
                received = [out_WW[w][me] for w in range(n)]
                got, want = (torch.full((sum(received), width), 7).to(dtype) for _ in range(2))
                work = shared.all_to_all_single(got, x, received, out_WW[me], group=group, async_op=True)
                dist.all_to_all_single(want, x, received, out_WW[me], group=group)
            elif kind == 1:
                x = content(own, most, width, dtype)
                got, want = (torch.full((n * most, width), 7).to(dtype) for _ in range(2))
                work = shared.all_gather_single(got, x, group=group, async_op=True)
                dist.all_to_all_single(want, x.repeat(n, 1), group=group)
            else:
                x = torch.randn(n * most, width, generator=own)
                got, came = torch.full((most, width), torch.nan), torch.empty_like(x)
                work = shared.reduce_scatter_single(got, x, group=group)
                dist.all_to_all_single(came, x, group=group)
                want, *others = came.chunk(n)
                for other in others:
                    want = want + other
            x.zero_()  # it was taken when the exchange began
            waiting.append((work, got, want))
        while len(waiting) > wait:
            work, got, want = waiting.pop(int(torch.randint(0, len(waiting), (), generator=own)))
            assert work is None or work.wait()
            assert torch.equal(got, want), (i, got, want)
    for work, got, want in waiting:
        assert work is None or work.wait()
        assert torch.equal(got, want)
    return rounds


def test_any_exchanges_give_the_bits_of_torchs(three: Pool) -> None:
    assert three.run(exchange_at_random, 60) == [60] * 3


def room_and_traces() -> tuple[int, int, int, set[str]]:
    before, named = len(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))
    group = dist.new_group()
    n = dist.get_world_size()
    forgotten = shared.all_gather_single(torch.empty(n * 9), torch.ones(9), group=group, async_op=True)
    for size in (10, 400_000, 10) * 20:
        x, y = torch.ones(n * size), torch.empty(n * size)
        shared.all_to_all_single(y, x, group=group)
    dist.barrier()
    shared.all_to_all_single(y, x, group=group)  # hears what was read
    channel = shared.channel_of(group, x)
    assert channel and forgotten.finish
    descriptors = len(os.listdir("/proc/self/fd")) - before
    return channel.box.numel(), len(channel.live), descriptors, set(os.listdir("/dev/shm")) - named


def test_room_is_used_again_and_nothing_is_left(three: Pool) -> None:
    for box, live, descriptors, named in three.run(room_and_traces):
        assert box <= 4 * 2 * 2 * 400_000  # twice what an exchange lays down for two others
        assert live <= 3  # the last ones, and one that nobody waits for
        assert descriptors < 20 and not named  # sockets of this group and gloo's


def is_noted() -> tuple[list[Any], int]:
    group = dist.new_group()
    shared.channel_of(group, torch.empty(0))
    before = trace._state.counts.get(group.group_name, 0)
    with trace.within("blocks.7.ffn dispatch"):
        work = shared.all_to_all_single(torch.empty(4), torch.ones(4), group=group, async_op=True)
        call = trace.last_call()
        work.wait()
    assert call is not None
    return [call.operation, call.purpose, call.ended], trace._state.counts[group.group_name] - before


def test_an_exchange_is_noted_once() -> None:
    with Pool(2) as pool:
        assert pool.run(is_noted) == [(["all_to_all_single", "blocks.7.ffn dispatch", 0.0], 1)] * 2


def refused(*arguments: Any, **names: Any) -> Any:
    raise PermissionError(1, "Operation not permitted")


def far_away() -> list[float]:
    """Rank 1 says that it is on another machine, or its container refuses something: all of them use gloo."""
    rank, found = dist.get_rank(), []
    asked = {
        "machine": (shared, "machine", lambda: "elsewhere"),
        "boot_id": (shared, "machine", refused),
        "socket": (shared.socket.socket, "bind", refused),
        "reach": (shared.socket.socket, "connect", refused),
        "memory": (os, "memfd_create", refused),
    }
    for patched in asked.values():
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(*patched)
            group: Any = dist.new_group()
            assert shared.channel_of(group, torch.empty(0)) is None
        got, total = torch.empty(3), torch.empty(1)
        shared.all_gather_single(got, torch.full((1,), float(rank)), group=group, async_op=True).wait()
        shared.reduce_scatter_single(total, torch.arange(3.0), group=group)
        found += [*got.tolist(), total.item()]
    return found


def test_ranks_that_cannot_share_memory_use_gloo(three: Pool) -> None:
    assert three.run(far_away) == [[0, 1, 2, 3.0 * rank] * 5 for rank in range(3)]


def far_ahead(exchanges: int) -> bool:
    """Ranks begin more exchanges than a socket has room for, come late in turn, wait in other orders, and go on to gloo."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.new_group()
    for slow in range(ranks):
        time.sleep(0.2 * (rank == slow))
        waiting = []
        for i in range(exchanges):
            got = torch.empty(ranks)
            waiting.append((shared.all_gather_single(got, torch.tensor([rank + 10.0 * i]), group, True), got, i))
        time.sleep(0.2 * (rank == slow))
        for work, got, i in waiting[:: -1 if rank == 1 else 1]:
            work.wait()
            assert got.tolist() == [other + 10.0 * i for other in range(ranks)]
        dist.barrier(group)
    # Each hears that earlier ones were read; some 250 fit into a socket at a time.
    for _ in range(12):
        shared.all_gather_single(got, torch.ones(1), group)
    channel = shared.channel_of(group, got)
    assert channel
    return len(channel.live) < 3 and not channel.laid


def test_more_exchanges_than_messages_fit_in_a_socket(three: Pool) -> None:
    assert three.run(far_ahead, 700) == [True] * 3


def evaluated_first() -> list[float]:
    group: Any = dist.new_group()
    got = torch.empty(3)
    with torch.inference_mode():
        shared.all_gather_single(torch.empty(3), torch.ones(1), group)
    shared.all_gather_single(got, torch.ones(1), group)
    return got.tolist()


def test_memory_made_in_an_evaluation_serves_afterwards(three: Pool) -> None:
    assert three.run(evaluated_first) == [[1, 1, 1]] * 3


def groups_come_and_go() -> list[int]:
    """Descriptors that are open after each group."""
    counts = []
    for _ in range(4):
        group: Any = dist.new_group()
        shared.all_gather_single(torch.empty(3), torch.ones(1), group)
        dist.barrier(group)
        dist.destroy_process_group(group)
        del group
        gc.collect()
        counts.append(len(os.listdir("/proc/self/fd")))
    return counts


def test_a_group_that_is_gone_leaves_nothing_open(three: Pool) -> None:
    for first, *others in three.run(groups_come_and_go):
        assert others == [first] * 3


def leaves(how: str) -> str:
    group, x = dist.new_group(), torch.ones(4)
    shared.all_to_all_single(torch.empty(4), x, group=group)
    channel = shared.channel_of(group, x)
    assert channel
    if dist.get_rank() == 0 and how == "late":
        channel.be_patient(0.5)
    if dist.get_rank() == 1:
        if how == "late":
            return ""
        shared.all_to_all_single(torch.empty(4), x, group=group, async_op=True)  # this one still comes
        os._exit(3)
    shared.all_to_all_single(torch.empty(4), x, group=group)
    shared.all_to_all_single(torch.empty(4), x, group=group)
    return ""


@pytest.mark.parametrize(("how", "kind", "words"), [
    ("gone", "ConnectionError", "rank 1 has ended"), ("late", "TimeoutError", "rank 1 did not come to an exchange for 0.5 s"),
])  # fmt: skip
def test_a_rank_that_does_not_come_is_named(how: str, kind: str, words: str) -> None:
    with Pool(2) as pool, pytest.raises(RanksFailed) as failure:
        pool.run(leaves, how, timeout=60)
    mistake = failure.value.mistakes[0]
    assert (mistake.kind, mistake.message) == (kind, words)
