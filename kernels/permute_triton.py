"""Slots to rows sorted by expert, and the tiles of grouped products, by counting: moesaic.kernels.permute in two launches.

    1  count      for a chunk c of slots and expert e: count[c, e], and total[e], added up by integer atomics
    2  place      of a slot of expert e in chunk c: sum of total[e'] over e' < e, plus sum of count[c', e] over c' < c, plus how
                  many slots of e come before it in its chunk: a running sum down the one-hot columns of its experts
       tiles      expert e has ceil(total[e] / M) tiles; the running sum of that, and the expert of each tile

A program takes a chunk of slots and 128 experts, so slots are read ceil((E + 1) / 128) times: 8 S bytes each, and 4 C E bytes of
counts are written and read. Nothing waits for the host: sizes are bounds that it knows. Where inputs have any number of rows, the
order of slots by token comes from torch's stable sort.

Letters: N input rows, E experts, S slots, K slots per input row, M tile rows, C chunks.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.interpret import jit
from moesaic.kernels.permute import Rows, Tiles, bags_by_token

MOST_CHUNKS = 128
BLOCK_E = 128  # experts of a program
# Slots at a time. With more, the masks of the one-hot matrix don't fit the scalar registers of AMD's targets.
BLOCK_S = 16
LEAST_CHUNK = 64  # slots, in all but the last chunk


@jit
def _one_hot(expert_S, s, stop, e):
    """(expert of each slot, int32 matrix: whether it is the expert of this column)."""
    expert = tl.load(expert_S + s, mask=s < stop, other=-1).to(tl.int32)
    return expert, (expert[:, None] == e[None, :]).to(tl.int32)


@jit
def _count_kernel(expert_S, counts_CE, total_E, S, chunk, BUCKETS, BS: tl.constexpr, BE: tl.constexpr):
    c, e = tl.program_id(0), tl.program_id(1) * BE + tl.arange(0, BE)
    stop = tl.minimum((c + 1) * chunk, S)
    count = tl.zeros((BE,), tl.int32)
    for first in range(c * chunk, stop, BS):
        _, hot = _one_hot(expert_S, first + tl.arange(0, BS), stop, e)
        count += tl.sum(hot, axis=0)
    tl.store(counts_CE + c * BUCKETS + e, count, mask=e < BUCKETS)
    tl.atomic_add(total_E + e, count, mask=(e < BUCKETS) & (count > 0))


@jit
def _sums_before(total_E, first, M, BE: tl.constexpr):
    """(rows, tiles) of the experts before `first`, a multiple of BE."""
    rows, tiles = tl.zeros((BE,), tl.int64), tl.zeros((BE,), tl.int64)
    for start in range(0, first, BE):
        total = tl.load(total_E + start + tl.arange(0, BE)).to(tl.int64)
        rows += total
        tiles += (total + M - 1) // M
    return tl.sum(rows, axis=0), tl.sum(tiles, axis=0)


@jit
def _place_kernel(
    token_S, expert_S, counts_CE, total_E, source_R, slot_R, expert_R, row_S, counts_E, starts_E, ends_E, tile_expert, S, N,
    chunk, E, tiles, tiles_each, M, K: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    c, first = tl.program_id(0), tl.program_id(1) * BE
    e, buckets = first + tl.arange(0, BE), E + 1
    total = tl.load(total_E + e, mask=e < buckets, other=0).to(tl.int64)
    rows_before, tiles_before = _sums_before(total_E, first, M, BE)
    start = rows_before + tl.cumsum(total, axis=0) - total
    if c == 0:
        tl.store(counts_E + e, total, mask=e < E)
        tl.store(starts_E + e, start, mask=e < buckets)
        tl.store(ends_E + e, tiles_before + tl.cumsum((total + M - 1) // M, axis=0), mask=e < E)

    # The expert of a tile: how many experts end at it, or before.
    if first == 0:
        for begin in range(c * tiles_each, tl.minimum((c + 1) * tiles_each, tiles), BT):
            tile = begin + tl.arange(0, BT)
            passed, so_far = tl.zeros((BT,), tl.int32), tl.zeros((1,), tl.int64)
            for other in range(0, E, BE):
                f = other + tl.arange(0, BE)
                cut = (tl.load(total_E + f, mask=f < E, other=0).to(tl.int64) + M - 1) // M
                end = so_far + tl.cumsum(cut, axis=0)
                passed += tl.sum((end[None, :] <= tile[:, None]).to(tl.int32), axis=1)
                so_far += tl.sum(cut, axis=0)
            tl.store(tile_expert + tile, tl.minimum(passed, E), mask=tile < tl.minimum((c + 1) * tiles_each, tiles))

    start = start.to(tl.int32)
    for before in range(c):
        start += tl.load(counts_CE + before * buckets + e, mask=e < buckets, other=0)
    stop = tl.minimum((c + 1) * chunk, S)
    for begin in range(c * chunk, stop, BS):
        s = begin + tl.arange(0, BS)
        expert, hot = _one_hot(expert_S, s, stop, e)
        place = start[None, :] + tl.cumsum(hot, axis=0) - hot
        row = tl.sum(tl.where(hot > 0, place, 0), axis=1)
        mine = tl.sum(hot, axis=1) > 0
        token = s.to(tl.int64) // (K if K > 0 else 1)
        if K == 0:
            token = tl.minimum(tl.load(token_S + s, mask=mine, other=0), tl.maximum(N - 1, 0))
        tl.store(source_R + row, token, mask=mine)
        tl.store(slot_R + row, s.to(tl.int64), mask=mine)
        tl.store(expert_R + row, expert.to(tl.int64), mask=mine)
        tl.store(row_S + s, row.to(tl.int64), mask=mine)
        start += tl.sum(hot, axis=0)


def _run(
    token_S: Tensor, expert_S: Tensor, n_experts: int, inputs: int, per_input: int, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    slots, buckets = expert_S.numel(), n_experts + 1
    new = _empty(expert_S, n_experts, tile)
    source_R, slot_R, expert_R, row_S, counts_E, starts_E, ends_E, tile_expert = new
    chunks = max(1, min(MOST_CHUNKS, triton.cdiv(slots, LEAST_CHUNK)))
    chunk = triton.cdiv(triton.cdiv(slots, chunks), BLOCK_S) * BLOCK_S
    grid = chunks, triton.cdiv(buckets, BLOCK_E)
    counts_CE = expert_S.new_empty(chunks, buckets, dtype=torch.int32)
    total_E = expert_S.new_zeros(grid[1] * BLOCK_E, dtype=torch.int32)
    tiles = tile_expert.numel()
    _count_kernel[grid](expert_S, counts_CE, total_E, slots, chunk, buckets, BS=BLOCK_S, BE=BLOCK_E)
    _place_kernel[grid](
        token_S, expert_S, counts_CE, total_E, source_R, slot_R, expert_R, row_S, counts_E, starts_E, ends_E, tile_expert, slots,
        inputs, chunk, n_experts, tiles, triton.cdiv(triton.cdiv(tiles, chunks), 4) * 4, tile, K=per_input, BS=BLOCK_S,
        BE=BLOCK_E, BT=4,
    )  # fmt: skip
    return new


def _empty(
    expert_S: Tensor, n_experts: int, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    slots = expert_S.numel()
    source_R, slot_R, expert_R, row_S = (torch.empty_like(expert_S) for _ in range(4))
    counts_E, starts_E, ends_E = (expert_S.new_empty(size) for size in (n_experts, n_experts + 1, n_experts))
    tile_expert = expert_S.new_empty(triton.cdiv(slots, tile) + n_experts, dtype=torch.int32)
    return source_R, slot_R, expert_R, row_S, counts_E, starts_E, ends_E, tile_expert


_op = torch.library.custom_op("moesaic::sort_slots", _run, mutates_args=())


@_op.register_fake
def _(token_S: Tensor, expert_S: Tensor, n_experts: int, inputs: int, per_input: int, tile: int) -> tuple[Tensor, ...]:
    return _empty(expert_S, n_experts, tile)


def sort_slots(
    token_S: Tensor, expert_S: Tensor, n_experts: int, inputs: int, per_input: int, tile: int
) -> tuple[Rows, Tiles]:
    """The rows that moesaic.kernels.permute.sort_slots gives on a GPU, unused slots as padding at the end, and their tiles.

    token_S, expert_S   int64; expert E marks an unused slot. Fewer than 2^31 slots
    inputs, per_input   N and K, as there
    tile                M
    """
    assert expert_S.numel() < 2**31, expert_S.numel()
    out = _op(token_S.contiguous(), expert_S.contiguous(), n_experts, inputs, per_input, tile)
    source_R, slot_R, expert_R, row_S, counts_E, starts_E, ends_E, tile_expert = out
    if per_input:
        bag, starts = row_S.view(-1, per_input), None
    else:
        bag, starts = bags_by_token(row_S, token_S, expert_S == n_experts, inputs)
    return Rows(source_R, slot_R, expert_R, bag, starts, counts_E), Tiles(starts_E, ends_E, tile_expert)


def compile_cases(target: str) -> dict[str, Any]:
    """For moesaic.kernels.targets."""

    def case(experts: int, per_input: int) -> None:
        slots = torch.empty(262_144, dtype=torch.int64, device="meta")
        _run(slots, slots, experts, 32_768, per_input, 128)

    return {"E 128, K 8": lambda: case(128, 8), "E 512, slots of any token": lambda: case(512, 0)}
