"""Parts of both fused kernels (moesaic.kernels.fused_ep, fused_ep_backward): which task has a number of the queue, which rows it
is about, what it waits for, and where its results go. docs/fused.md has the protocol.

Letters: T tokens, D model width, E experts in all, e on a rank, W ranks, S slots, P phases, FT and NT column tiles of the
experts' width and of D.
"""

import triton.language as tl

from moesaic.kernels.fused_protocol import (
    ALIAS,
    ARRIVED,
    BACK,
    COMBINE,
    CONTROL,
    DISPATCH,
    DOWN,
    EPOCH,
    ORIGIN,
    PLAN,
    PLANNED,
    QUEUE,
    READY,
    SLOT_GRADS,
    SLOTS,
    address,
    count_bytes,
    expert_of,
    firsts,
    fragments,
    has_failed,
    meet,
    once,
    places,
    publish,
    raise_flags,
    record,
    scan,
    sources_of,
    wait_for,
    wait_ready,
)
from moesaic.kernels.grouped_gemm import rows_by_weight
from moesaic.kernels.interpret import jit


@jit
def begin(
    counts_E, table, tables, sent_WP, me, call, TILES, spins, first, W: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
    BW: tl.constexpr, BM: tl.constexpr, TRACE: tl.constexpr, AMD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The plan, of the program that takes task 0; the others wait for it. counts_E: None where `tables` are there already, from a
    launch before with the same slots.

    Returns (run, the pointer to this rank's words, the next task, whether no rank has failed, dispatch tasks, row tiles)."""
    control = address(table, CONTROL, me, W, tl.int32)
    program = tl.program_id(0) + first
    run = (table, me, tl.load(control + EPOCH) + 1, spins, program, AMD)
    task, alive = take(control), 1 - has_failed(run, W, BW).to(tl.int32)
    zero = tl.zeros([1], tl.int32)
    if task == 0:
        if alive != 0:
            record(0, -1, task, -1, PLAN, once(), run, W, TRACE)
            rank = tl.arange(0, BW)
            others = (rank < W) & (rank != me)
            if counts_E is not None:
                publish(counts_E, run, W, E, BE)
                count_bytes(sent_WP, rank, 0, rank * 0 + 4 * E, others, P)
            count_bytes(sent_WP, rank, 4, rank * 0 + 8, others, P)
            fine = meet(call, run, W, BW, TRACE)
            if fine:
                record(1, -1, -1, -1, PLAN, once(), run, W, TRACE)
                if counts_E is not None:
                    fine = scan(tables, TILES, run, W, E, BE, BM, TRACE)
            if fine:
                raise_flags(control + PLANNED + tl.arange(0, 1), once(), 4, -1, -1, me, run, W, TRACE)
        task = take(control)
    sending, tiles = 0, 0
    if alive != 0:
        alive = wait_for(control + PLANNED + zero, once(), 1, 5, zero - 1, zero - 1, zero + me, run, W, BW, TRACE).to(
            tl.int32
        )
    if alive != 0:
        sending, tiles = tl.load(tables), tl.load(tables + 1)
    return run, control, task, alive, sending, tiles


@jit
def take(control):
    return tl.atomic_add(control + QUEUE, 1, sem="relaxed", scope="gpu")


@jit
def fragment(task, tables, me, W: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr):
    """Of a dispatch task: (owner, row tile there, places in it, which are this rank's, their slots)."""
    e: tl.constexpr = E // W
    x = tl.arange(0, BE)
    upto = tl.load(fragments(tables, E) + x, mask=x < E, other=2**31 - 1)
    i = tl.sum((upto <= task).to(tl.int32), axis=0)
    begun = tl.max(tl.where(x < i, upto, 0), axis=0)
    expert = (me * e + i) % E
    place = tl.load(places(tables, E) + expert)
    first = tl.load(firsts(tables, E) + expert)
    end = place + tl.load(firsts(tables, E) + expert + 1) - first
    tile = place // BM + task - begun
    rows = tile * BM + tl.arange(0, BM)
    real = (rows >= place) & (rows < end)
    return expert // e, tile, rows, real, tl.where(real, first + rows - place, 0)


@jit
def bag_of(token, known, starts, K):
    """(where the slots of tokens begin in `bag`, how many there are)."""
    if starts is None:
        low, n = token * K, tl.where(known, K, 0)
    else:
        low = tl.load(starts + token, mask=known, other=0)
        n = tl.load(starts + token + 1, mask=known, other=0) - low
    return low, n.to(tl.int32)


@jit
def holders(
    owner, rows, real, slot, token, expert_R, bag, starts, K, tables, E: tl.constexpr, W: tl.constexpr, ONCE: tl.constexpr
):  # fmt: skip
    """(the place at the owner that holds the values of each row, which rows' values travel)."""
    if ONCE:
        e: tl.constexpr = E // W
        low = tl.load(firsts(tables, E) + owner * e)
        high = tl.load(firsts(tables, E) + owner * e + e)
        at, n = bag_of(token, real, starts, K)
        best = slot
        for k in range(tl.max(n, axis=0)):
            other = tl.load(bag + at + k, mask=real & (k < n), other=2**31 - 1).to(tl.int32)
            best = tl.where((other >= low) & (other < high), tl.minimum(best, other), best)
        expert = tl.load(expert_R + best, mask=real, other=0)
        holder = tl.load(places(tables, E) + expert) + best - tl.load(firsts(tables, E) + expert)
        carried = real & (best == slot)
        holder = tl.where(real, holder, rows)
    else:
        holder, carried = rows, real
    return holder, carried


@jit
def begin_dispatch(
    task, source_S, expert_S, bag, starts, K, tables, run, W: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr,
    ONCE: tl.constexpr, TRACE: tl.constexpr,
):  # fmt: skip
    """`fragment`, then the tokens of the slots and what `holders` says."""
    _, me, _, _, _, _ = run
    record(0, -1, task, -1, DISPATCH, once(), run, W, TRACE)
    owner, tile, rows, real, slot = fragment(task - 1, tables, me, W, E, BE, BM)
    token = tl.load(source_S + slot, mask=real, other=0)
    holder, carried = holders(owner, rows, real, slot, token, expert_S, bag, starts, K, tables, E, W, ONCE)
    record(1, tile, -1, owner, DISPATCH, once(), run, W, TRACE)
    return owner, tile, rows, real, slot, token, holder, carried


@jit
def end_dispatch(
    owner, tile, rows, real, slot, holder, carried, row_bytes, slot_bytes, sent_WP, run, W: tl.constexpr, TRACE: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Say where the rows that were sent belong, and that they are there."""
    _, me, _, _, _, _ = run
    send_places(owner, rows, real, slot, holder, run, W)
    raise_arrived(owner, tile, run, W, TRACE)
    count_bytes(sent_WP, owner, 1, tl.sum(carried.to(tl.int32), axis=0) * row_bytes, owner != me, P)
    count_bytes(sent_WP, owner, 2, tl.sum(real.to(tl.int32), axis=0) * slot_bytes, owner != me, P)
    count_bytes(sent_WP, owner, 4, tile * 0 + 4, owner != me, P)


@jit
def send_places(owner, rows, real, slot, holder, run, W: tl.constexpr):
    table, me, _, _, _, _ = run
    origin = (tl.zeros_like(slot) + me).to(tl.int64) * 4294967296 + slot
    tl.store(address(table, ORIGIN, owner, W, tl.int64) + rows, origin, mask=real)
    tl.store(address(table, ALIAS, owner, W, tl.int32) + rows, holder, mask=real)


@jit
def raise_arrived(owner, tile, run, W: tl.constexpr, TRACE: tl.constexpr):
    table, me, _, _, _, _ = run
    word = address(table, ARRIVED, owner, W, tl.int32) + tile * W + me + tl.arange(0, 1)
    raise_flags(word, once(), 6, tile, -1, owner, run, W, TRACE)


@jit
def raise_ready(tile, f, FT, run, W: tl.constexpr, TRACE: tl.constexpr):
    table, me, _, _, _, _ = run
    word = address(table, READY, me, W, tl.int32) + tile * FT + f + tl.arange(0, 1)
    raise_flags(word, once(), 8, tile, f, me, run, W, TRACE)


@jit
def wave_task(task, tiles, FT, NT, WAVE):
    """(whether it is an up task, its row tile, its column tile) of the task-th task of the waves."""
    per_wave = WAVE * (FT + NT)
    wave = task // per_wave
    height = tl.minimum(WAVE, tiles - wave * WAVE)
    task -= wave * per_wave
    is_up = task < height * FT
    local = tl.where(is_up, task, task - height * FT)
    return is_up, wave * WAVE + local % height, local // height


@jit
def begin_down(task, tile, column, FT, run, W: tl.constexpr, BW: tl.constexpr, BF: tl.constexpr, TRACE: tl.constexpr):
    """Whether what the up tasks of a tile computed came to be there."""
    record(0, -1, task, -1, DOWN, once(), run, W, TRACE)
    fine = wait_ready(tile, FT, run, W, BW, BF, TRACE)
    if fine:
        record(1, tile, column, -1, DOWN, once(), run, W, TRACE)
    return fine


@jit
def rows_of(tile, tables, W: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr):
    """Of a tile: (expert, ranks, rows of each, the end of the expert's rows, the tile's rows, the last for none)."""
    j = expert_of(tile, tables, E // W, E, BE)
    rank, rows_of_rank, end = sources_of(tile, j, tables, W, E, BW, BM)
    return j, rank, rows_of_rank, end, tl.minimum(tile * BM + tl.arange(0, BM), end - 1).to(tl.int64)


@jit
def rows_by_expert(
    x_M1, w, shared, j, n, n2, N, K, stride_e, stride_r, SHARED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PAIR: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIBED: tl.constexpr, SHARED_DESCRIBED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`rows_by_weight` of a rank's expert j: the first SHARED of them are in `shared`, the others in w."""
    if SHARED == 0:
        acc_MN, acc2_MN = rows_by_weight(
            x_M1, w, j, n, n2, N, K, stride_e, stride_r, BM, BN, BK, PAIR, TRANSPOSED, DESCRIBED, EVEN, PRECISION
        )
    elif not (DESCRIBED or SHARED_DESCRIBED):  # one loop: with two, AMD's backward has too few registers
        w, j = tl.where(j < SHARED, shared, w), tl.where(j < SHARED, j, j - SHARED)
        acc_MN, acc2_MN = rows_by_weight(
            x_M1, w, j, n, n2, N, K, stride_e, stride_r, BM, BN, BK, PAIR, TRANSPOSED, False, EVEN, PRECISION
        )
    elif j < SHARED:
        acc_MN, acc2_MN = rows_by_weight(
            x_M1, shared, j, n, n2, N, K, stride_e, stride_r, BM, BN, BK, PAIR, TRANSPOSED, SHARED_DESCRIBED, EVEN, PRECISION
        )  # fmt: skip
    else:
        acc_MN, acc2_MN = rows_by_weight(
            x_M1, w, j - SHARED, n, n2, N, K, stride_e, stride_r, BM, BN, BK, PAIR, TRANSPOSED, DESCRIBED, EVEN, PRECISION
        )  # fmt: skip
    return acc_MN, acc2_MN


@jit
def row_return(
    values_MN, tile, n, end, rank, rows_of_rank, sent_WP, size, TILES, run, NT: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TRACE: tl.constexpr, P: tl.constexpr, TYPE: tl.constexpr,
    WIDE: tl.constexpr = True,
):  # fmt: skip
    """Store columns n of a tile's results into the slots they belong to, wherever; raise `back` there."""
    table, me, _, _, _, _ = run
    place = tile * BM + tl.arange(0, BM)
    ns = n * BN + tl.arange(0, BN)
    origin = tl.load(address(table, ORIGIN, me, W, tl.int64) + tl.minimum(place, end - 1), cache_modifier=".cg")
    to = address(table, SLOTS, origin >> 32, W, TYPE, WIDE) + (origin & 4294967295) * D
    mask = (place < end)[:, None] if D % BN == 0 else (place < end)[:, None] & (ns < D)[None, :]
    tl.store(to[:, None] + ns[None, :], values_MN.to(TYPE), mask=mask)
    raise_back(tile, n, rank, rows_of_rank, NT, TILES, run, W, TRACE)
    width = tl.minimum(BN, D - n * BN) * size
    others = (rows_of_rank > 0) & (rank != me)
    count_bytes(sent_WP, rank, 3, rows_of_rank * width, others, P)
    count_bytes(sent_WP, rank, 4, rows_of_rank * 0 + 4, others, P)


@jit
def raise_back(tile, n, rank, rows_of_rank, NT, TILES, run, W: tl.constexpr, TRACE: tl.constexpr):
    table, me, _, _, _, _ = run
    need = rows_of_rank > 0
    words = address(table, BACK, tl.where(need, rank, 0), W, tl.int32) + (me * TILES + tile) * NT + n
    raise_flags(words, need, 10, tile, n, rank, run, W, TRACE)


@jit
def wait_back(
    slot, expert_R, n, need, tables, NT, TILES, run, W: tl.constexpr, E: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr,
    TRACE: tl.constexpr,
):  # fmt: skip
    """Until columns n of slots are there."""
    table, me, _, _, _, _ = run
    expert = tl.load(expert_R + slot, mask=need, other=0).to(tl.int32)
    owner = expert // (E // W)
    place = tl.load(places(tables, E) + expert) + slot - tl.load(firsts(tables, E) + expert)
    tile = tl.where(need, place // BM, 0)
    words = address(table, BACK, me, W, tl.int32) + (owner * TILES + tile) * NT + n
    return wait_for(words, need, 4, 11, tile, tl.zeros_like(tile) + n, owner, run, W, BW, TRACE)


@jit
def wait_slots(
    bag, at, n, expert_S, tile, column, tables, TILES, run, NT: tl.constexpr, W: tl.constexpr, E: tl.constexpr, BW: tl.constexpr,
    BM: tl.constexpr, TRACE: tl.constexpr,
):  # fmt: skip
    """Until all slots of a combine task are there. Whether they are."""
    alive = 1
    for k in range(tl.max(n, axis=0)):
        if alive != 0:
            need = k < n
            slot = tl.load(bag + at + k, mask=need, other=0).to(tl.int32)
            alive = wait_back(slot, expert_S, column, need, tables, NT, TILES, run, W, E, BW, BM, TRACE).to(tl.int32)
    if alive != 0:
        record(1, tile, column, -1, COMBINE, once(), run, W, TRACE)
    return alive


@jit
def combine(
    task, local, to_TD, weights_S, dweights_S, expert_S, bag, starts, K, T, tables, TILES, run, D: tl.constexpr, NT: tl.constexpr,
    W: tl.constexpr, E: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, TRACE: tl.constexpr,
    WIDE: tl.constexpr = True,
):  # fmt: skip
    """Add up the slots of each token: forward by weight; backward as they are, and take their dS. Whether they were there."""
    table, me, _, _, _, _ = run
    TYPE: tl.constexpr = to_TD.dtype.element_ty
    record(0, -1, task, -1, COMBINE, once(), run, W, TRACE)
    tile, column = local // NT, local % NT
    token = tile * BT + tl.arange(0, BT)
    ns = column * BN + tl.arange(0, BN)
    at, n = bag_of(token, token < T, starts, K)
    alive = wait_slots(bag, at, n, expert_S, tile, column, tables, TILES, run, NT, W, E, BW, BM, TRACE)
    total_TN = tl.zeros([BT, BN], tl.float32)
    slots = address(table, SLOTS, me, W, TYPE, WIDE)
    for k in range(tl.max(n, axis=0)):
        if alive != 0:
            # T x 1: of one dimension, with `starts`, Triton 3.7.1 fails to give pointers and masks one layout.
            need = (k < n)[:, None]
            slot = tl.load(bag + at[:, None] + k, mask=need, other=0)
            mask = need if D % BN == 0 else need & (ns < D)[None, :]
            values = slots + slot.to(tl.int64) * D + ns[None, :]
            values_TN = tl.load(values, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
            if weights_S is not None:
                values_TN *= tl.load(weights_S + slot, mask=need, other=0.0)
            total_TN += values_TN
            if dweights_S is not None:  # noqa: SIM102 - the compiler decides this one, the kernel the next
                if column == 0:
                    grads = address(table, SLOT_GRADS, me, W, tl.float32) + slot
                    tl.store(dweights_S + slot, tl.load(grads, mask=need, other=0.0, cache_modifier=".cg"), mask=need)
    to = to_TD + token.to(tl.int64)[:, None] * D + ns[None, :]
    tl.store(to, total_TN.to(TYPE), mask=(token < T)[:, None] & (ns < D)[None, :])
    return alive
