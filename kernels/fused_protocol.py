"""How ranks tell each other what is done, inside the fused kernels: flags, waits that end, failure, the trace, and the tables
that say where every row goes. docs/fused.md has the protocol and why it neither hangs nor loses a row.

Letters: W ranks, E experts in all, e on a rank, D model width, S slots (rows that a rank sends), M rows of a tile, P parts.
"""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from moesaic.kernels.interpret import jit, pause
from moesaic.kernels.symmetric import Heap, Regions

# ---------------------------------------------------------------- the regions of the heap, by number

NAMES = ("control", "counts", "met", "calls", "rows", "again", "origin", "alias", "weight", "numbers", "arrived", "slots",
         "slot_grads", "back", "ready", "failed", "trace")  # fmt: skip
(CONTROL, COUNTS, MET, CALLS, ROWS, AGAIN, ORIGIN, ALIAS, WEIGHT, NUMBERS, ARRIVED, SLOTS, SLOT_GRADS, BACK, READY, FAILED,
 TRACED) = (tl.constexpr(i) for i in range(len(NAMES)))  # fmt: skip
# Words of `control`, each on a cache line of its own.
QUEUE, DONE, EPOCH, PLANNED, CLAIMED, TICKET, RECORDS = (tl.constexpr(32 * i) for i in range(7))
FAILURE = 8  # words of a failure: 1, wait, tile, index, peer, expected, seen, epoch
FIELDS = tl.constexpr(9)  # of a record of the trace
WAITS = ("met", "planned", "arrived", "ready", "back", "room", "call")
EVENTS = ("taken", "reads", "met raised", "met", "planned raised", "planned", "arrived raised", "arrived", "ready raised",
          "ready", "back raised", "back", "in vain", "done")  # fmt: skip
PLAN, DISPATCH, UP, DOWN, WEIGHTS, COMBINE, NONE = (tl.constexpr(i) for i in range(7))


def regions(
    ranks: int, experts: int, width: int, dtype: torch.dtype, slots: int, tiles: int, m: int, columns: int, up_columns: int,
    again: bool, trace: int = 0, numbers: bool = False,
) -> Regions:  # fmt: skip
    """Of a heap for `tiles` row tiles of m rows, and `slots` rows that a rank sends at most; `columns` column tiles of D,
    `up_columns` of an expert's width. again: room for X beside dO in backward. trace: events recorded at most. numbers: room
    for those of tokens."""
    rows, word = tiles * m, torch.int32
    shapes = {
        "control": ((32 * 7,), word), "counts": ((2, ranks, experts), word), "met": ((2, ranks), word),
        "calls": ((2, ranks), word),
        "rows": ((rows, width), dtype), "again": ((rows if again else 0, width), dtype), "origin": ((rows,), torch.int64),
        "alias": ((rows,), word), "weight": ((rows,), torch.float32),
        "numbers": ((rows if numbers else 0,), torch.int64), "arrived": ((tiles, ranks), word),
        "slots": ((slots, width), dtype), "slot_grads": ((slots,), torch.float32), "back": ((ranks, tiles, columns), word),
        "ready": ((tiles, up_columns), word), "failed": ((ranks, FAILURE), word), "trace": ((trace, 9), torch.int64),
    }  # fmt: skip
    assert tuple(shapes) == NAMES
    return shapes


@dataclass(frozen=True)
class Failure:
    """What rank `rank` waited for in vain: word `wait` of tile, index and peer, -1 where there is none, polled `spins` times."""

    rank: int
    wait: str
    tile: int
    index: int
    peer: int
    expected: int
    seen: int
    epoch: int

    def __str__(self) -> str:
        if self.wait == "room":
            told = f"{self.seen} tiles of rows come to rank {self.peer}, {self.expected} fit"
            return f"rank {self.rank} of the group has no room: {told}"
        if self.wait == "call":
            mine, other = (f"call {n // 2} {'backward' if n % 2 else 'forward'}" for n in (self.expected, self.seen))
            return (
                f"launch {self.epoch} of rank {self.rank} of the group is {mine}, that of rank {self.peer} is {other}: all ranks "
                "must call the same layers in the same order"
            )
        places = [f"{name} {value}" for name, value in (("tile", self.tile), ("index", self.index)) if value >= 0]
        return (
            f"rank {self.rank} of the group waited in vain for `{self.wait}` of rank {self.peer}"
            f"{''.join(', ' + place for place in places)} in launch {self.epoch}: expected {self.expected}, saw {self.seen}"
        )


def failures(failed_W8: Tensor) -> list[Failure]:
    """From the heap's region `failed`, on the host."""
    return [Failure(rank, WAITS[row[1]], *row[2:]) for rank, row in enumerate(failed_W8.tolist()) if row[0]]


def records(heap: Heap) -> list[list[int]]:
    """The trace of one rank's programs, on the host; AssertionError where it didn't fit."""
    count, room = int(heap.view("control")[RECORDS.value]), heap.view("trace")
    assert count <= len(room), f"{count} events, room for {len(room)}"
    return room[:count].tolist()


# ---------------------------------------------------------------- memory of any rank


@jit
def address(table, REGION: tl.constexpr, rank, W: tl.constexpr, TYPE: tl.constexpr, WIDE: tl.constexpr = True):
    """A pointer to a region of `rank`, or pointers, of a block of ranks.

    WIDE: the compiler is told how it is aligned, which it doesn't see through a conversion: else rows would be read and stored
    two bytes at a time. Said outside of this function it would be lost. (Of `slots`, backward spills with it on AMD.)
    """
    where = tl.load(table + REGION * W + rank).to(tl.pointer_type(TYPE))
    return tl.multiple_of(where, 16) if WIDE else where


@jit
def record(kind, tile, index, peer, value, need, run, W: tl.constexpr, TRACE: tl.constexpr):
    """One event for every lane of `need`. TRACE: room for how many, 0 for none."""
    if TRACE:
        table, me, epoch, _, program, _ = run
        n = tl.sum(need.to(tl.int32), axis=0)
        place = tl.cumsum(need.to(tl.int32), axis=0) - 1
        ticket = tl.atomic_add(address(table, CONTROL, 0, W, tl.int32) + TICKET, n) + place
        own = address(table, CONTROL, me, W, tl.int32)
        place += tl.atomic_add(own + RECORDS, n)
        to = address(table, TRACED, me, W, tl.int64) + place.to(tl.int64) * FIELDS
        mask, zero = need & (place < TRACE), place * 0
        tl.store(to, (ticket).to(tl.int64), mask=mask)
        tl.store(to + 1, (zero + me).to(tl.int64), mask=mask)
        tl.store(to + 2, (zero + program).to(tl.int64), mask=mask)
        tl.store(to + 3, (zero + epoch).to(tl.int64), mask=mask)
        tl.store(to + 4, (zero + kind).to(tl.int64), mask=mask)
        tl.store(to + 5, (zero + tile).to(tl.int64), mask=mask)
        tl.store(to + 6, (zero + index).to(tl.int64), mask=mask)
        tl.store(to + 7, (zero + peer).to(tl.int64), mask=mask)
        tl.store(to + 8, (zero + value).to(tl.int64), mask=mask)


@jit
def once():
    """One lane that is true: the mask of what there is one of."""
    return tl.arange(0, 1) == 0


# ---------------------------------------------------------------- flags


@jit
def drain():
    """On AMD, each wave waits until its own stores are where other devices see them: the release of the wave that raises a flag
    speaks for that wave alone, and the barrier before it waits for no store of the others."""
    tl.inline_asm_elementwise(
        "s_waitcnt vmcnt(0)\n\tbuffer_wbl2 sc0 sc1\n\ts_waitcnt vmcnt(0)\n\tv_mov_b32 $0, $1", "=v,v,~{memory}",
        [tl.arange(0, 1)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def raise_flags(words, need, kind, tile, index, peer, run, W: tl.constexpr, TRACE: tl.constexpr):
    """What this program has stored so far is seen by whoever sees one of `words`, of any rank, hold the epoch."""
    _, _, epoch, _, _, AMD = run
    record(kind, tile, index, peer, epoch, need, run, W, TRACE)
    if AMD:
        drain()
    tl.debug_barrier()
    tl.atomic_xchg(words, tl.zeros_like(need.to(tl.int32)) + epoch, mask=need, sem="release", scope="sys")


@jit
def has_failed(run, W: tl.constexpr, BW: tl.constexpr):
    """Whether any rank has."""
    table, me, _, _, _, _ = run
    rank = tl.arange(0, BW)
    words = address(table, FAILED, me, W, tl.int32) + rank * 8
    return (
        tl.sum(
            (tl.atomic_add(words, 0, mask=rank < W, sem="relaxed", scope="sys") != 0).to(tl.int32) * (rank < W), axis=0
        )
        > 0
    )


@jit
def fail(wait, tile, index, peer, expected, seen, run, W: tl.constexpr, TRACE: tl.constexpr):
    """Tell all ranks that this one ends, and why."""
    table, me, epoch, _, _, AMD = run
    record(12, tile, index, peer, seen, once(), run, W, TRACE)
    if tl.atomic_cas(address(table, CONTROL, me, W, tl.int32) + CLAIMED, 0, 1) == 0:
        for rank in range(W):
            row = address(table, FAILED, rank, W, tl.int32) + me * 8
            tl.store(row + 1, wait)
            tl.store(row + 2, tile)
            tl.store(row + 3, index)
            tl.store(row + 4, peer)
            tl.store(row + 5, expected)
            tl.store(row + 6, seen)
            tl.store(row + 7, epoch)
            if AMD:
                drain()
            tl.debug_barrier()
            tl.atomic_xchg(row, 1, sem="release", scope="sys")


@jit
def pick(values, here):
    """The value in the one lane that is true."""
    return tl.sum(tl.where(here, values, 0), axis=0).to(tl.int32)


@jit
def wait_for(words, need, wait, kind, tile, index, peer, run, W: tl.constexpr, BW: tl.constexpr, TRACE: tl.constexpr):
    """Whether all of this rank's `words` where `need` came to hold the epoch, before any rank failed. Then all that their writers
    had stored may be read. wait, kind: numbers in WAITS and EVENTS."""
    _, _, epoch, spins, _, _ = run
    seen = tl.atomic_add(words, 0, mask=need, sem="acquire", scope="sys")
    missing = tl.sum((need & (seen != epoch)).to(tl.int32), axis=0)
    polls = 0
    while (missing > 0) & (polls < spins):
        pause()
        look = polls % 32 == 31
        if look:
            polls = tl.where(has_failed(run, W, BW), spins, polls)
        seen = tl.atomic_add(words, 0, mask=need, sem="acquire", scope="sys")
        missing = tl.sum((need & (seen != epoch)).to(tl.int32), axis=0)
        polls += 1
    if missing > 0:
        if polls == spins:  # not ended by another's failure
            late = need & (seen != epoch)
            here = late & (tl.cumsum(late.to(tl.int32), axis=0) == 1)
            fail(wait, pick(tile, here), pick(index, here), pick(peer, here), epoch, pick(seen, here), run, W, TRACE)
    else:
        record(kind, tile, index, peer, seen, need, run, W, TRACE)
    tl.debug_barrier()
    return missing == 0


# ---------------------------------------------------------------- the tables of a launch
#
# int32, in one tensor: dispatch tasks, row tiles of this rank; then, for each expert x: `fragments`, dispatch tasks up to and
# with it, in the order they are taken; `place`, where this rank's first row of x goes at its owner; `first` [E + 1], this
# rank's first slot of x; `tile_ends`, row tiles up to and with this rank's expert; `begin` [e][W + 1], where each source's rows
# of it begin.


def tables_size(ranks: int, experts: int) -> int:
    return 2 + 4 * experts + 1 + experts // ranks * (ranks + 1)


@jit
def fragments(tables, E: tl.constexpr):
    return tables + 2


@jit
def places(tables, E: tl.constexpr):
    return tables + 2 + E


@jit
def firsts(tables, E: tl.constexpr):
    return tables + 2 + 2 * E


@jit
def tile_ends(tables, E: tl.constexpr):
    return tables + 3 + 3 * E


@jit
def begins(tables, E: tl.constexpr):
    return tables + 3 + 4 * E


@jit
def publish(counts_E, run, W: tl.constexpr, E: tl.constexpr, BE: tl.constexpr):
    """Store this rank's counts at every rank."""
    table, me, epoch, _, _, _ = run
    x = tl.arange(0, BE)
    count = tl.load(counts_E + x, mask=x < E, other=0).to(tl.int32)
    for rank in range(W):
        to = address(table, COUNTS, rank, W, tl.int32) + ((epoch % 2) * W + me) * E
        tl.store(to + x, count, mask=x < E)


@jit
def meet(call, run, W: tl.constexpr, BW: tl.constexpr, TRACE: tl.constexpr):
    """Raise `met` at every rank and wait for all of them. Whether they came, and all with the same call."""
    table, me, epoch, _, _, _ = run
    rank = tl.arange(0, BW)
    real, at = rank < W, (epoch % 2) * W
    tl.store(address(table, CALLS, tl.where(real, rank, 0), W, tl.int32) + at + me, rank * 0 + call, mask=real)
    words = address(table, MET, tl.where(real, rank, 0), W, tl.int32) + at + me
    raise_flags(words, real, 2, -1, epoch % 2, rank, run, W, TRACE)
    words = address(table, MET, me, W, tl.int32) + at + rank
    parity = tl.zeros_like(rank) + epoch % 2
    fine = wait_for(words, real, 0, 3, tl.zeros_like(rank) - 1, parity, rank, run, W, BW, TRACE)
    if fine:
        theirs = tl.load(address(table, CALLS, me, W, tl.int32) + at + rank, mask=real, other=0, cache_modifier=".cg")
        wrong = real & (theirs != call)
        if tl.sum(wrong.to(tl.int32), axis=0) > 0:
            here = wrong & (tl.cumsum(wrong.to(tl.int32), axis=0) == 1)
            fail(6, -1, -1, pick(rank, here), call, pick(theirs, here), run, W, TRACE)
            fine = fine & (tl.sum(wrong.to(tl.int32), axis=0) == 0)
    return fine


@jit
def scan(
    tables, tiles_room, run, W: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, TRACE: tl.constexpr
):
    """Fill the tables from the counts of all ranks. Whether there is room for the rows of every rank."""
    table, me, epoch, _, _, _ = run
    e: tl.constexpr = E // W
    x = tl.arange(0, BE)
    real = x < E
    counts = address(table, COUNTS, me, W, tl.int32) + (epoch % 2) * W * E
    total, before = tl.zeros([BE], tl.int32), tl.zeros([BE], tl.int32)
    for s in range(W):
        count = tl.load(counts + s * E + x, mask=real, other=0)
        total += count
        before += tl.where(s < me, count, 0)
    tiles = tl.cdiv(total, BM)
    owner = x // e
    ends = tl.cumsum(tiles, axis=0)
    most, busiest = 0, 0
    skip = tl.zeros([BE], tl.int32)
    for w in range(W):
        skip += tl.where(owner == w, tl.sum(tl.where(x < w * e, tiles, 0), axis=0), 0)
        here = tl.sum(tl.where(owner == w, tiles, 0), axis=0)
        busiest = tl.where(here > most, w, busiest)
        most = tl.maximum(most, here)
        if w == me:
            tl.store(tables + 1, here)
    ends -= skip
    own = tl.load(counts + me * E + x, mask=real, other=0)
    place = (ends - tiles) * BM + before
    tl.store(places(tables, E) + x, place, mask=real)
    upto = tl.cumsum(own, axis=0)
    tl.store(firsts(tables, E) + x, upto - own, mask=real)
    tl.store(firsts(tables, E) + E + x, upto, mask=x == 0)
    tl.store(firsts(tables, E) + x + 1, upto, mask=x == E - 1)
    pieces = tl.where(own > 0, (place + own - 1) // BM - place // BM + 1, 0)
    n, mine = tl.sum(pieces, axis=0), tl.sum(tl.where(x < me * e, pieces, 0), axis=0)
    taken = tl.cumsum(pieces, axis=0) - mine + tl.where(x < me * e, n, 0)
    tl.store(fragments(tables, E) + (x - me * e + E) % E, taken, mask=real)
    tl.store(tables, n)
    local, j = real & (owner == me), x - me * e
    tl.store(tile_ends(tables, E) + j, ends, mask=local)
    row = (ends - tiles) * BM
    for s in range(W):
        tl.store(begins(tables, E) + j * (W + 1) + s, row, mask=local)
        row += tl.load(counts + s * E + x, mask=real, other=0)
    tl.store(begins(tables, E) + j * (W + 1) + W, row, mask=local)
    if most > tiles_room:
        fail(5, -1, -1, busiest, tiles_room, most, run, W, TRACE)
    return most <= tiles_room


@jit
def finish(run, programs, W: tl.constexpr, TRACE: tl.constexpr):
    """The last of a rank's programs leaves the heap as the next launch expects it."""
    table, me, epoch, _, _, AMD = run
    control = address(table, CONTROL, me, W, tl.int32)
    before = tl.atomic_add(control + DONE, 1, sem="acq_rel", scope="gpu")
    record(13, -1, -1, -1, before, once(), run, W, TRACE)
    if before == programs - 1:
        tl.store(control + QUEUE, 0)
        tl.store(control + DONE, 0)
        if AMD:
            drain()
        tl.debug_barrier()
        tl.atomic_xchg(control + EPOCH, epoch, sem="release", scope="gpu")


# ---------------------------------------------------------------- which rows


@jit
def sources_of(tile, j, tables, W: tl.constexpr, E: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr):
    """(ranks, a block; rows that each of them has in the tile; the end of the rows of expert j, this tile's)."""
    rank = tl.arange(0, BW)
    begin = begins(tables, E) + j * (W + 1)
    low = tl.load(begin + rank, mask=rank < W, other=0)
    high = tl.load(begin + rank + 1, mask=rank < W, other=0)
    rows = tl.minimum(high, (tile + 1) * BM) - tl.maximum(low, tile * BM)
    return rank, tl.where(rank < W, tl.maximum(rows, 0), 0), tl.load(begin + W)


@jit
def expert_of(tile, tables, e: tl.constexpr, E: tl.constexpr, BE: tl.constexpr):
    """This rank's expert whose rows tile `tile` has."""
    j = tl.arange(0, BE)
    return tl.sum((tl.load(tile_ends(tables, E) + j, mask=j < e, other=2**31 - 1) <= tile).to(tl.int32), axis=0)


@jit
def wait_rows(tile, tables, run, W: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr,
              ONCE: tl.constexpr, TRACE: tl.constexpr):  # fmt: skip
    """Until the rows of a tile are there. (whether they are, expert, places that hold their values, the end of its rows)."""
    table, me, _, _, _, _ = run
    j = expert_of(tile, tables, E // W, E, BE)
    rank, rows, end = sources_of(tile, j, tables, W, E, BW, BM)
    arrived = address(table, ARRIVED, me, W, tl.int32)
    flags, none = arrived + tile * W + rank, tl.zeros_like(rank) - 1
    fine = wait_for(flags, rows > 0, 2, 7, none + 1 + tile, none, rank, run, W, BW, TRACE)
    place = tile * BM + tl.arange(0, BM)
    known = tl.minimum(place, end - 1)
    if ONCE:  # values may stand with another expert's row of the same token, from the same source
        holder = tl.load(address(table, ALIAS, me, W, tl.int32) + known, cache_modifier=".cg")
        source = (tl.load(address(table, ORIGIN, me, W, tl.int64) + known, cache_modifier=".cg") >> 32).to(tl.int32)
        holder = tl.where(fine, holder, known)
        source = tl.where(fine, source, 0)
        other = (holder != known) & fine
        flags = arrived + holder // BM * W + source
        fine = fine & wait_for(flags, other, 2, 7, holder // BM, tl.zeros_like(holder) - 1, source, run, W, BW, TRACE)
    else:
        holder = known
    return fine, j, holder, end


@jit
def wait_ready(tile, FT, run, W: tl.constexpr, BW: tl.constexpr, BF: tl.constexpr, TRACE: tl.constexpr):
    """Until this rank's up tasks of a tile are done."""
    table, me, _, _, _, _ = run
    f = tl.arange(0, BF)
    flags = address(table, READY, me, W, tl.int32) + tile * FT + f
    zero = tl.zeros_like(f)
    return wait_for(flags, f < FT, 3, 9, zero + tile, f, zero + me, run, W, BW, TRACE)


@jit
def count_bytes(sent_WP, rank, phase, size, need, P: tl.constexpr):
    """Add up what goes to other ranks. Integers: the sum is the same in any order."""
    tl.atomic_add(sent_WP + rank * P + phase, size.to(tl.int64), mask=need, sem="relaxed", scope="gpu")
