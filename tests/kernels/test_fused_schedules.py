"""A few schedules of the fused kernels, of those that `make fused-schedules` draws; and that a bad one is noticed."""

import dataclasses
import os
import time
from collections import Counter

import pytest

from moesaic.kernels import fused_protocol
from moesaic.kernels.fused_protocol import EVENTS
from moesaic.kernels.inspection import parse_amdgcn, parse_ptx, system_flags
from tests.kernels.schedules import Schedule, ScheduleFailed, drawn, run

ONE_LAYER = ((0, 0, False), (0, 0, True))
SMALL = Schedule(7, 2, 2, 4, 2, (5, 3), 0.0, True, False, 2, 1e-4, ONE_LAYER)


@pytest.mark.parametrize("seed", [1, 4, 9])
def test_drawn(seed: int) -> None:
    run(drawn(seed))


@pytest.mark.parametrize("seed", [1, 2])
def test_drawn_with_products_apart(seed: int) -> None:
    run(dataclasses.replace(drawn(seed), apart=True))


def test_trace() -> None:
    events = run(SMALL, trace=4000)
    assert [event[0] for event in events] == list(range(len(events)))  # one order, nothing lost
    kinds = Counter(EVENTS[event[4]] for event in events)
    assert kinds["planned raised"] == 4 and kinds["met raised"] == kinds["met"] == 8 and kinds["done"] == 8
    assert kinds["in vain"] == 0
    raised: set[tuple[int, ...]] = set()
    for _, rank, _, epoch, kind, tile, index, peer, value in events:
        name = EVENTS[kind]
        if name in ("arrived raised", "back raised"):
            raised.add((epoch, kind, rank, peer, tile, index))
        if name in ("arrived", "back"):  # seen of `peer` here: raised before, by it, for this rank
            assert value == epoch and (epoch, kind - 1, peer, rank, tile, index) in raised


def test_a_failure_is_noticed() -> None:
    def exits(rank: int, number: int) -> None:
        if rank == 1:
            os._exit(7)

    with pytest.raises(ScheduleFailed, match="exit codes"):
        run(SMALL, change=exits)

    def sleeps(rank: int, number: int) -> None:
        if rank == 1:
            time.sleep(60)

    with pytest.raises(ScheduleFailed, match="rank 0 of the group waited in vain for `met` of rank 1"):
        run(dataclasses.replace(SMALL, programs=1), change=sleeps, spins=50, timeout=8)


def test_a_flag_that_is_not_raised_is_noticed() -> None:
    """Owners that don't raise `ready`."""

    def forgets(rank: int, number: int) -> None:
        from moesaic.kernels import fused_ep

        fused_ep.raise_ready = lambda *arguments: None

    with pytest.raises(ScheduleFailed, match="waited in vain for `ready`"):
        run(dataclasses.replace(SMALL, delay=0.0), change=forgets, spins=3000)
    assert fused_protocol.WAITS[3] == "ready"


PTX = """
$L__BB0_1:
    st.global.v4.b32 [%rd1], {%r1, %r2, %r3, %r4};
    bar.sync 0;
    @%p1 atom.global.sys.release.exch.b32 %r5, [%rd2], %r6;
    @%p3 bra $L__BB0_3;
    @%p2 st.global.b32 [%rd1], %r1;
    bra.uni $L__BB0_4;
$L__BB0_3:
    bar.sync 0;
$L__BB0_4:
    @%p1 atom.global.sys.release.exch.b32 %r5, [%rd2], %r6;
    atom.global.sys.acquire.add.u32 %r7, [%rd3], 0;
    @%p4 bra $L__BB0_1;
    ret;
"""
# The second block is run last but one, as compilers place what is rare.
AMD = """
k:
    s_branch .LBB0_2
.LBB0_1:
    s_waitcnt vmcnt(0)
    buffer_wbl2 sc0 sc1
    s_waitcnt vmcnt(0)
    s_barrier
    buffer_wbl2 sc0 sc1
    global_atomic_swap v[0:1], v2, off sc1
    global_store_short v[0:1], v2, off
    s_barrier
    buffer_wbl2 sc0 sc1
    s_waitcnt vmcnt(0)
    global_atomic_swap v[0:1], v2, off sc1
    s_endpgm
.LBB0_2:
    global_store_dwordx4 v[0:1], v[2:5], off
    buffer_inv sc0 sc1
    s_branch .LBB0_1
.Lfunc_end0:
"""


def test_flags_before_their_stores_are_noticed() -> None:
    assert system_flags(parse_ptx(PTX), False) == {"flags": 2, "polls": 1, "undrained": 1}
    assert system_flags(parse_amdgcn(AMD), True) == {"flags": 2, "polls": 1, "undrained": 1}
