"""Casts of moesaic.kernels.quantize in one launch: a tile comes from memory once, and is written along rows, columns, or both.

    along rows      codes (N, K), scales (N, K / g): for products whose depth is K
    along columns   codes (K, P), scales (K, P / g): for weight gradients, whose depth are each expert's rows. Experts begin at
                    multiples of TILE positions, and what lies between is 0: expert e at TILE (tile_ends[e] - tiles[e])

    of squares      codes (E, N, K), scales (E, N / g, K / g): of weights, `quantize_squares`, one cast for both directions

What is cast may have weights of rows, or be codes, cast before along rows: they are multiplied with their scales and their factor
while they are loaded.

Elements e4m3 and e2m1, all scales, rules and roundings of `quantize`; but quest along rows alone, and squares are not rounded by
chance. Scales e4m3 take two launches: the first finds the tensor's largest magnitude, after the rotation, and in what is read
through source_N. Codes, scales and what was not clipped are equal to those of `quantize` bit by bit, as sums within a block are
made in one order (so none is fused with a product); with a rotation (moesaic.kernels.hadamard), where its fp32 sums are. But on
gfx942, e4m3 has 0 for -0, whose bits are NaN there.

Letters: N rows, K columns, P positions, E matrices; g the depth of a block.
"""

import dataclasses
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.grouped_gemm import Schedule, find_tile, schedule
from moesaic.kernels.hadamard import rotation
from moesaic.kernels.interpret import jit
from moesaic.kernels.quantize import (
    ELEMENTS,
    GAUSSIAN_CLIP,
    SCALES,
    Format,
    Packed,
    factor_of,
    key_of,
    line_hash,
    room_of,
)
from moesaic.kernels.scaled_formats import STORED, TARGETS_OF
from moesaic.kernels.tiles import product_precision, target_name

TILE = 128  # rows of one program, and at most its columns
INFINITE = tl.constexpr(0x7F800000)  # the bits of fp32's infinity; NaN's are larger
CLIP = tl.constexpr(GAUSSIAN_CLIP)


@jit
def on_grid(x, bits, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, STOCHASTIC: tl.constexpr):
    """`quantize.cast`: fp32 x on the grid of an element; `bits`: a random int32 for each. NaN stays."""
    nan = x != x
    x = tl.minimum(tl.maximum(tl.where(nan, 0.0, x), -LARGEST), LARGEST)
    power = (x.to(tl.int32, bitcast=True) & INFINITE).to(tl.float32, bitcast=True)
    power = tl.maximum(power, 2.0**LEAST)
    x *= ((254 << 23) - power.to(tl.int32, bitcast=True)).to(
        tl.float32, bitcast=True
    ) * 2.0**MANTISSA  # exact, as 1 / power is
    negative = x.to(tl.int32, bitcast=True) < 0
    if STOCHASTIC:
        low = tl.floor(x)
        x = low + ((bits >> 8 & 0xFFFFFF).to(tl.float32) * 2.0**-24 < x - low).to(tl.float32)
        negative = x < 0
    else:
        x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23, where fp32 has whole numbers: to the nearest, ties to even
    value = (tl.abs(x) * power * 2.0**-MANTISSA).to(tl.int32, bitcast=True) | (negative.to(tl.int32) << 31)
    return tl.where(nan, float("nan"), value.to(tl.float32, bitcast=True))


@jit
def codes_of(
    x, MANTISSA: tl.constexpr, LEAST: tl.constexpr, NAN: tl.constexpr, SIGNED_ZERO: tl.constexpr, PACK: tl.constexpr
):  # fmt: skip
    """uint8: the codes of fp32 x on the grid; PACK neighbours a byte."""
    nan, negative = x != x, x.to(tl.int32, bitcast=True) < 0
    value = tl.where(nan, 0.0, tl.abs(x))
    # Of a normal number fp32's exponent and first bits, less the difference in bias; of a subnormal one the multiple of the step.
    normal = (value.to(tl.int32, bitcast=True) >> (23 - MANTISSA)) - (126 + LEAST << MANTISSA)
    subnormal = (value * 2.0 ** (MANTISSA - LEAST)).to(tl.int32)
    sign = negative.to(tl.int32) * (64 if NAN else 4) * 2
    code = tl.where(value >= 2.0**LEAST, normal, subnormal)
    code |= sign if SIGNED_ZERO else tl.where(code == 0, 0, sign)
    code = tl.where(nan, NAN, code).to(tl.uint8)
    if PACK == 2:
        first, second = tl.split(code.reshape(x.shape[0], x.shape[1] // 2, 2))
        code = first | (second << 4)
    return code


# ---------------------------------------------------------------- scales


@jit
def sums(x_MK, COUNT: tl.constexpr):
    """COUNT sums of each row: of neighbours, then of neighbouring sums, as `quantize.block_sums`."""
    for _ in tl.static_range(7):
        if x_MK.shape[1] > COUNT:
            first, second = tl.split(x_MK.reshape(x_MK.shape[0], x_MK.shape[1] // 2, 2))
            x_MK = first + second
    return x_MK


@jit
def square_sums(x_MK, SIDE: tl.constexpr, G: tl.constexpr):
    """The sum of squares of each block of SIDE x G."""
    total = sums(x_MK * x_MK, x_MK.shape[1] // G)
    if SIDE > 1:
        total = tl.trans(sums(tl.trans(total), x_MK.shape[0] // SIDE))
    return total


@jit
def spread(scale, SIDE: tl.constexpr, G: tl.constexpr):
    """The scale of its block, SIDE x G, for each value."""
    R: tl.constexpr = scale.shape[0]
    B: tl.constexpr = scale.shape[1]
    if SIDE == 1:
        each = tl.broadcast_to(scale[:, :, None], (R, B, G))
    else:
        each = tl.broadcast_to(scale[:, None, :, None], (R, SIDE, B, G))
    return each.reshape(R * SIDE, B * G)


@jit
def scales_of(
    amax, RULE: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, LARGEST: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    """(fp32: of rule amax the scales, else their inverses; the scales as they are stored) of blocks of which amax has
    the bits of the largest magnitude; of rule quest, of what is to be rounded down to a power of two."""
    finite = amax < INFINITE
    value = amax.to(tl.float32, bitcast=True)
    if RULE == "amax":
        scale = tl.where(amax == 0, 1.0, tl.div_rn(value, LARGEST))
        scale = tl.where(scale == 0, 1.0, scale)
        by, byte = scale, amax
    else:
        bits = amax
        if RULE == "rceil":
            bits = tl.div_rn(value, LARGEST).to(tl.int32, bitcast=True)
        elif RULE == "even":
            bits += 1 << (22 - MANTISSA)
        byte = bits >> 23
        if RULE == "rceil" or RULE == "ceil":
            rest = bits & 0x7FFFFF
            byte += tl.where(byte == 0, rest > 0x400000, rest != 0).to(tl.int32)
        if RULE != "rceil" and RULE != "quest":
            byte -= EXPONENT
        byte = tl.minimum(tl.maximum(byte, 0), 254)
        scale = tl.where(byte == 0, 1 << 22, byte << 23).to(tl.float32, bitcast=True)
        by = tl.where(byte == 254, 1 << 22, (254 - byte) << 23).to(tl.float32, bitcast=True)
    stored = tl.where(finite, byte, 255).to(tl.uint8) if BYTES else tl.where(finite, scale, float("nan"))
    return tl.where(finite, by, float("nan")), stored


@jit
def gaussian_clip(x_MK, column, depth, G: tl.constexpr, LARGEST: tl.constexpr):
    """The bits of quest's clip over the largest element, of each G of a row from `column`; there are `depth` columns."""
    B: tl.constexpr = x_MK.shape[1] // G
    count = tl.minimum(tl.maximum(depth - column - tl.arange(0, B) * G, 1), G).to(tl.float32)[None, :]
    mean, square = tl.div_rn(sums(x_MK, B), count), tl.div_rn(square_sums(x_MK, 1, G), count)
    variance = square - mean * mean
    std = tl.sqrt_rn(tl.where(variance < 0, 0.0, variance))  # NaN stays
    return (std * (CLIP / LARGEST) + 1e-8).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def fine(x):
    """Rounded to e4m3, saturated, as fp32."""
    return tl.where(x != x, x, tl.minimum(x, 448.0)).to(tl.float8e4nv).to(tl.float32)


@jit
def over_scale(x, scale, SIDE: tl.constexpr, G: tl.constexpr):
    """x over the scale of its block; a scale of 0 divides as 1."""
    return tl.div_rn(x, spread(tl.where(scale == 0, 1.0, scale), SIDE, G))


@jit
def fine_cast(
    x, amax, bits, one, SIDE: tl.constexpr, G: tl.constexpr, RULE: tl.constexpr, STOCHASTIC: tl.constexpr, MANTISSA: tl.constexpr,
    LEAST: tl.constexpr, LARGEST: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """(x on the grid, scales on that of e4m3, x) over a factor (NVFP4): a scale is amax times SHARE; of four_six, a fourth of amax
    where that errs less."""
    x, amax = tl.div_rn(x, one), tl.div_rn(amax.to(tl.float32, bitcast=True), one)
    scale = fine(amax * SHARE)
    value = on_grid(over_scale(x, scale, SIDE, G), bits, MANTISSA, LEAST, LARGEST, STOCHASTIC)
    if RULE == "four_six":
        four = fine(amax * 0.25)
        other = on_grid(over_scale(x, four, SIDE, G), bits, MANTISSA, LEAST, LARGEST, STOCHASTIC)
        error = square_sums(value * spread(scale, SIDE, G) - x, SIDE, G)
        less = square_sums(other * spread(four, SIDE, G) - x, SIDE, G) < error
        scale = tl.where(less, four, scale)
        value = tl.where(spread(less.to(tl.int32), SIDE, G) != 0, other, value)
    return value, scale, x


@jit
def coarse_cast(
    x, amax, bits, SIDE: tl.constexpr, G: tl.constexpr, RULE: tl.constexpr, BYTES: tl.constexpr, STOCHASTIC: tl.constexpr,
    EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """(x on the grid, scales as they are stored, x over its scale)."""
    by, stored = scales_of(amax, RULE, EXPONENT, MANTISSA, LARGEST, BYTES)
    by = spread(by, SIDE, G)
    x = tl.div_rn(x, by) if RULE == "amax" else x * by
    if RULE == "shrink":
        x *= 0.75
    return on_grid(x, bits, MANTISSA, LEAST, LARGEST, STOCHASTIC), stored, x


@jit
def as_bytes(scale):
    """Of scales on the grid of e4m3."""
    return scale.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@jit
def corrected(scale, value, x, bits, SIZE: tl.constexpr, G: tl.constexpr):
    """Scales times eden's correction of their run of SIZE, <x, x> / <x, its cast>, rounded stochastically to e4m3."""
    R: tl.constexpr = x.shape[1] // SIZE
    under, over = sums(value * spread(scale, 1, G) * x, R), square_sums(x, 1, SIZE)
    correction = tl.where(under > 0, tl.div_rn(over, under), 1.0)
    return on_grid(scale * spread(correction, 1, SIZE // G), bits, 3, -6, 448.0, True)


@jit
def random_bits(row_hash_M, column_hash_K):
    """int32 (M, K) of the hashes of rows and columns."""
    mixed = (row_hash_M[:, None] + column_hash_K[None, :]).to(tl.uint32, bitcast=True)
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
    return (mixed ^ (mixed >> 16)).to(tl.int32, bitcast=True)


# ---------------------------------------------------------------- tiles


@jit
def rotated(x_MK, rotation_nn, BM: tl.constexpr, BK: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Runs of SIZE columns times the matrix."""
    if SIZE:
        n = tl.arange(0, SIZE)
        matrix = tl.load(rotation_nn + n[:, None] * SIZE + n[None, :])
        x_MK = tl.dot(x_MK.reshape(BM * BK // SIZE, SIZE), matrix, input_precision=PRECISION).reshape(BM, BK)
    return x_MK


@jit
def cast_rows(
    x_MK, row_hash_M, column_hash_K, rotation_nn, codes, scales, places_M, real_M, column, C, B, BM: tl.constexpr,
    BK: tl.constexpr, G: tl.constexpr, RULE: tl.constexpr, BYTES: tl.constexpr, ROUNDING: tl.constexpr,
    SIZE: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr,
    NAN: tl.constexpr, PACK: tl.constexpr, PRECISION: tl.constexpr, SIGNED_ZERO: tl.constexpr = True, SHARE: tl.constexpr = 0.0,
    factor=None, trusted=None, depth=0,
):  # fmt: skip
    """Casts a tile along its rows, and writes it at rows places_M, from `column`; C bytes and B scales a row. column_hash_K: of each
    column; of rounding eden, of each block. factor: of scales e4m3, points to the tensor's. trusted: of rule quest, what was not
    clipped; `depth` columns are there."""
    x_MK = rotated(x_MK, rotation_nn, BM, BK, SIZE, PRECISION)
    if RULE == "quest":
        amax = gaussian_clip(x_MK, column, depth, G, LARGEST)
    else:
        magnitude = x_MK.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        amax = tl.max(magnitude.reshape(BM, BK // G, G), axis=2)
    bits = 0
    if ROUNDING != "even":
        bits = random_bits(row_hash_M, column_hash_K)
    STOCHASTIC: tl.constexpr = ROUNDING == "stochastic"
    if factor is not None:
        value, scale, x_MK = fine_cast(
            x_MK, amax, bits, tl.load(factor), 1, G, RULE, STOCHASTIC, MANTISSA, LEAST, LARGEST, SHARE
        )
        if ROUNDING == "eden":
            scale = corrected(scale, value, x_MK, bits, SIZE, G)
        stored = as_bytes(scale)
    else:
        value, stored, x_MK = coarse_cast(
            x_MK, amax, bits, 1, G, RULE, BYTES, STOCHASTIC, EXPONENT, MANTISSA, LEAST, LARGEST
        )
    cs = column // PACK + tl.arange(0, BK // PACK)
    code = codes_of(value, MANTISSA, LEAST, NAN, SIGNED_ZERO, PACK)
    tl.store(codes + places_M[:, None] * C + cs[None, :], code, mask=real_M[:, None] & (cs < C)[None, :])
    bs = column // G + tl.arange(0, BK // G)
    tl.store(scales + places_M[:, None] * B + bs[None, :], stored, mask=real_M[:, None] & (bs < B)[None, :])
    if trusted is not None:
        kept = (tl.abs(x_MK) < LARGEST) & (column + tl.arange(0, BK) < depth)[None, :]
        byte = tl.sum(kept.to(tl.int32).reshape(BM, BK // 8, 8) << tl.arange(0, 8)[None, None, :], axis=2)
        bs, T = column // 8 + tl.arange(0, BK // 8), tl.cdiv(depth, 8)
        tl.store(
            trusted + places_M[:, None] * T + bs[None, :], byte.to(tl.uint8), mask=real_M[:, None] & (bs < T)[None, :]
        )


@jit
def _values(x_NK, x_scales, x_factor, weights_N, places, rows, ks, inside, stride, stride_s, GX: tl.constexpr):
    """fp32: what is at these rows and columns, times its scale, the factor and the row's weight; 0 where nothing is inside."""
    if x_NK.dtype.element_ty == tl.uint8:  # two codes e2m1
        code = tl.load(x_NK + places * stride + ks // 2, mask=inside, other=0).to(tl.int32) >> (ks % 2 * 4)
        # Of 1 to 6 the exponent and first bit of fp32, less the difference in bias; 0 and 1/2 count halves.
        normal = ((code & 7) + (126 << 1) << 22).to(tl.float32, bitcast=True)
        x = tl.where(code & 7 < 2, (code & 7) * 0.5, normal)
        x = tl.where(code & 8 != 0, -x, x)
    else:
        x = tl.load(x_NK + places * stride + ks, mask=inside, other=0.0).to(tl.float32)
    if x_scales is not None:
        blocks = x_scales + places * stride_s + ks // GX
        if x_scales.dtype.element_ty == tl.uint8:  # e8m0
            byte = tl.load(blocks, mask=inside, other=0).to(tl.int32)
            # 255, NaN, becomes infinite: what is under it is 0 or NaN, and NaN after.
            x *= tl.where(byte == 0, 1 << 22, byte << 23).to(tl.float32, bitcast=True)
        else:
            x *= tl.load(blocks, mask=inside, other=0.0).to(tl.float32)
        if x_factor is not None:
            x *= tl.load(x_factor)
    if weights_N is not None:
        x *= tl.load(weights_N + rows, mask=inside, other=0.0).to(tl.float32)
    return x


@jit
def _remember(largest, x_MK):
    """The bits of the largest magnitude; of integers, so that the order doesn't matter."""
    # Over both axes at once: one by one, of a rotation's product, Triton 3.7.1 fails for sm_100a.
    tl.atomic_max(largest, tl.max(x_MK.to(tl.int32, bitcast=True) & 0x7FFFFFFF))


@jit
def _quantize_kernel(
    x_NK, x_scales, x_factor, weights_N, source_N, factor, largest, trusted, row_codes, row_scales, row_hash_N, column_hash_K,
    row_rotation, CR, BR, column_codes, column_scales, row_hash_K, column_hash_N, column_rotation, CC, BC,
    counts_E, starts_E, tile_ends_E, E, N, K, stride, stride_s,
    GX: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MATRICES: tl.constexpr, G: tl.constexpr, RULE: tl.constexpr, BYTES: tl.constexpr,
    ROUNDING: tl.constexpr, SIZE: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr,
    LARGEST: tl.constexpr, NAN: tl.constexpr, PACK: tl.constexpr, PRECISION: tl.constexpr, SIGNED_ZERO: tl.constexpr,
    SHARE: tl.constexpr,
):  # fmt: skip
    H: tl.constexpr = G if ROUNDING == "eden" else 1  # columns that one hash is of
    tile, k_tiles = tl.program_id(0), tl.cdiv(K, BK)
    if tile < tl.load(tile_ends_E + E - 1) * k_tiles:
        expert, row, end, k_tile = find_tile(tile, k_tiles, counts_E, starts_E, tile_ends_E, E, BM, BE, 1)
        if MATRICES:  # each with factors and numbers of its own
            if x_factor is not None:
                x_factor += expert
            if factor is not None:
                factor += expert
            if largest is not None:
                largest += expert
            if COLUMNS and ROUNDING != "even":
                row_hash_K += expert * k_tiles * BK
        # A part of the tile at a time, of 64 x TILE values, and each cast from memory or L1 anew: registers hold no more.
        if ROWS:
            ks = k_tile * BK + tl.arange(0, BK)
            there = ks < K
            k_hash = tl.zeros([BK], tl.int32)
            if ROUNDING != "even":
                k_hash = tl.load(column_hash_K + k_tile * BK + tl.arange(0, BK // H) * H)
            for part in range(0, BM, BM * 64 // BK):
                rows = row + part + tl.arange(0, BM * 64 // BK)
                real = rows < end
                places = tl.load(source_N + rows, mask=real, other=0) if source_N is not None else rows
                x_MK = _values(
                    x_NK, x_scales, x_factor, weights_N, places[:, None], rows[:, None], ks[None, :],
                    real[:, None] & there[None, :], stride, stride_s, GX,
                )  # fmt: skip
                m_hash = tl.zeros_like(rows).to(tl.int32)
                if ROUNDING != "even":
                    m_hash = tl.load(row_hash_N + rows, mask=real, other=0)
                if largest is not None:
                    x_MK = rotated(x_MK, row_rotation, BM * 64 // BK, BK, SIZE, PRECISION)
                    _remember(largest, x_MK)
                else:
                    cast_rows(
                        x_MK, m_hash, k_hash, row_rotation, row_codes, row_scales, rows, real, k_tile * BK, CR, BR,
                        BM * 64 // BK, BK, G, RULE, BYTES, ROUNDING, SIZE, EXPONENT, MANTISSA, LEAST, LARGEST, NAN, PACK,
                        PRECISION, SIGNED_ZERO, SHARE, factor, trusted, tl.cdiv(K, SIZE) * SIZE if SIZE else K,
                    )  # fmt: skip
        if COLUMNS:
            rows = row + tl.arange(0, BM)
            real = rows < end
            places = tl.load(source_N + rows, mask=real, other=0) if source_N is not None else rows
            m_hash = tl.zeros([BM], tl.int32)
            if ROUNDING != "even":
                ms = row + tl.arange(0, BM // H) * H
                m_hash = tl.load(column_hash_N + tl.where(ms < end, ms, N + ms - end))
            first = tl.load(tile_ends_E + expert) - tl.cdiv(tl.load(counts_E + expert), BM).to(tl.int32)
            position = first * BM + (row - tl.load(starts_E + expert)).to(tl.int32)
            for part in range(0, BK, 64):
                cs = k_tile * BK + part + tl.arange(0, 64)
                inside = cs < K
                x_KM = _values(
                    x_NK, x_scales, x_factor, weights_N, places[None, :], rows[None, :], cs[:, None],
                    inside[:, None] & real[None, :], stride, stride_s, GX,
                )  # fmt: skip
                c_hash = tl.load(row_hash_K + cs) if ROUNDING != "even" else tl.zeros_like(cs)
                if largest is not None:
                    _remember(largest, rotated(x_KM, column_rotation, 64, BM, SIZE, PRECISION))
                else:
                    cast_rows(
                        x_KM, c_hash, m_hash, column_rotation, column_codes, column_scales, cs.to(tl.int64), inside, position,
                        CC, BC, 64, BM, G, RULE, BYTES, ROUNDING, SIZE, EXPONENT, MANTISSA, LEAST, LARGEST, NAN, PACK,
                        PRECISION, SIGNED_ZERO, SHARE, factor,
                    )  # fmt: skip


@jit
def _part(w, row, ks, N, K, stride_n):
    """64 rows of a tile, fp32."""
    rows = row + tl.arange(0, 64)
    inside = (rows < N)[:, None] & (ks < K)[None, :]
    return tl.load(w + rows.to(tl.int64)[:, None] * stride_n + ks[None, :], mask=inside, other=0.0).to(tl.float32)


@jit
def _amax_of_squares(x, BN: tl.constexpr, SIDE: tl.constexpr, G: tl.constexpr):
    """The bits of the largest magnitude of each SIDE x G."""
    magnitude = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF).reshape(64 // SIDE, SIDE, BN // G, G)
    return tl.max(tl.max(magnitude, axis=3), axis=1)


@jit
def _squares_kernel(
    w, factor_E, codes, scales, N, K, stride_e, stride_n, C, BR, B, BN: tl.constexpr, G: tl.constexpr, RULE: tl.constexpr,
    BYTES: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr,
    NAN: tl.constexpr, PACK: tl.constexpr, SIGNED_ZERO: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    k_tiles = tl.cdiv(K, BN)
    e = tl.program_id(1).to(tl.int64)
    row, column = tl.program_id(0) // k_tiles * BN, tl.program_id(0) % k_tiles * BN
    ks = column + tl.arange(0, BN)
    cs = column // PACK + tl.arange(0, BN // PACK)
    SIDE: tl.constexpr = G if G < 64 else 64  # rows of a block in one part of the tile
    w += e * stride_e
    amax = tl.zeros([64 // SIDE, BN // G], tl.int32)
    if SIDE < G:  # the block is read twice: first for its scale
        for part in range(0, BN, 64):
            x = _part(w, row + part, ks, N, K, stride_n)
            amax = tl.maximum(amax, _amax_of_squares(x, BN, SIDE, G))
    for part in range(0, BN, 64):
        x = _part(w, row + part, ks, N, K, stride_n)
        largest = amax if SIDE < G else _amax_of_squares(x, BN, SIDE, G)
        if factor_E is not None:
            one = tl.load(factor_E + e)
            x, scale, _ = fine_cast(x, largest, 0, one, SIDE, G, RULE, False, MANTISSA, LEAST, LARGEST, SHARE)
            stored = as_bytes(scale)
        else:
            x, stored, _ = coarse_cast(
                x, largest, 0, SIDE, G, RULE, BYTES, False, EXPONENT, MANTISSA, LEAST, LARGEST
            )
        code = codes_of(x, MANTISSA, LEAST, NAN, SIGNED_ZERO, PACK)
        rows = row + part + tl.arange(0, 64)
        tl.store(codes + (e * N + rows)[:, None] * C + cs[None, :], code, mask=(rows < N)[:, None] & (cs < C)[None, :])
        rs = (row + part) // G + tl.arange(0, 64 // SIDE)
        bs = column // G + tl.arange(0, BN // G)
        there = (rs < BR)[:, None] & (bs < B)[None, :]
        tl.store(scales + (e * BR + rs)[:, None] * B + bs[None, :], stored, mask=there)


# ---------------------------------------------------------------- launchers


def supported(form: Format) -> bool:
    """Whether a cast is made here: of blocks of one row, or square."""
    square, even = form.block[0] == form.block[1], form.rounding == "even"
    return (
        form.element in ("e4m3", "e2m1")
        and (form.block[0] == 1 or (square and even and form.rule != "quest"))
        and TILE % form.block[1] == 0
        and form.rule in SCALES[form.scale]
        and (even or form.rule not in ("quest", "four_six"))
        and (form.rounding != "eden" or form.scale == "e4m3")
    )


def cast_constants(form: Format, device: torch.device) -> dict[str, Any]:
    """What `cast_rows` and `codes_of` must know of a format."""
    kind, pack = ELEMENTS[form.element], 2 if form.element == "e2m1" else 1
    return {
        "G": form.block[1], "RULE": form.rule, "BYTES": form.scale == "e8m0", "EXPONENT": kind.exponent,
        "MANTISSA": kind.mantissa, "LEAST": kind.least, "LARGEST": kind.largest, "NAN": 0 if pack == 2 else 0x7F, "PACK": pack,
        "SIGNED_ZERO": pack == 2 or target_name(device) != "gfx942", "SHARE": room_of(form) / kind.largest,
    }  # fmt: skip


def scale_bytes(form: Format) -> torch.dtype:
    """As what a kernel stores scales."""
    return torch.uint8 if form.scale in ("e8m0", "e4m3") else torch.float32


def packed_like(
    form: Format, codes: Tensor, scales: Tensor, columns: int, factor: Tensor | None = None, trusted: Tensor | None = None
) -> Packed:  # fmt: skip
    """Codes and scales, as a kernel stored them, in their types, with the tensor's factor, or the format's."""
    codes = codes if form.element == "e2m1" else codes.view(torch.float8_e4m3fn)
    if factor is None:
        factor = torch.full((), 4 / 3 if form.rule == "shrink" else 1.0, device=codes.device)
    return Packed(form, codes, scales.view(STORED[form.scale]), factor, columns, trusted)


def quantize_squares(w_ENK: Tensor, form: Format) -> Packed:
    """Each of E matrices, of any floating type, its rows contiguous, in square blocks: codes (E, N, K), scales (E, N / g, K / g).

    Raises ValueError for a format that is not `supported`.
    """
    if not supported(form) or form.block[0] != form.block[1]:
        raise ValueError(f"{form}: must have e4m3 or e2m1, square blocks, any rule but quest, rounding even")
    assert w_ENK.stride(-1) == 1, w_ENK.stride()
    (e, n, k), g, device = w_ENK.shape, form.block[1], w_ENK.device
    constants = cast_constants(form, device)
    codes = torch.empty(e, n, -(-k // constants["PACK"]), dtype=torch.uint8, device=device)
    scales = torch.empty(e, -(-n // g), -(-k // g), dtype=scale_bytes(form), device=device)
    factor_E = (
        factor_of(torch.linalg.vector_norm(w_ENK, torch.inf, (1, 2), dtype=torch.float32), form)
        if form.scale == "e4m3"
        else None
    )
    _squares_kernel[triton.cdiv(n, TILE) * triton.cdiv(k, TILE), e](
        w_ENK, factor_E, codes, scales, n, k, w_ENK.stride(0), w_ENK.stride(1), codes.shape[2], *scales.shape[1:], BN=TILE,
        num_warps=8, enable_fp_fusion=False, **constants,
    )  # fmt: skip
    packed = packed_like(form, codes, scales, k, factor_E)
    return dataclasses.replace(packed, factor=packed.factor.expand(e))


def quantize_tiles(
    x_NK: Tensor | Packed, form: Format, plan: Schedule, *, rows: bool = True, columns: bool = False,
    source_N: Tensor | None = None, weights_N: Tensor | None = None,
    keys: tuple[int, int] = (0, 0), ids_N: Tensor | None = None, size: int = 0, signs_n: Tensor | None = None,
    first: int | None = None,
) -> tuple[Packed | None, Packed | None]:  # fmt: skip
    """(cast along rows, cast along columns), those that are asked for.

    x_NK     of any floating type, rows contiguous; or read through source_N, int64 (N,); or codes of them, cast along rows
    weights_N   what a row is multiplied with, any floating type
    plan     of the rows of each expert, in tiles of TILE rows
    keys     of chance, along rows and along columns; ids_N: the global numbers of rows, int64 (default: from 0)
    size     of the rotation, 0 for none, with its signs; eden needs one of whole blocks
    first    if given, x are the E matrices of the plan, of N / E rows each, cast as `quantize_each` casts them or their transposes,
             of which so many come before these: each has a factor (E,) and numbers of its own, and x, if packed, too
    Raises ValueError for a format that is not `supported`.
    """
    if not supported(form) or form.block[0] != 1 or (columns and form.rule == "quest"):
        raise ValueError(
            f"{form}: must have e4m3 or e2m1, one row a block, rounding even with quest and four_six; quest along rows alone"
        )
    assert form.rounding != "eden" or (size and size % form.block[1] == 0), (form, size)
    if rows and columns and form.scale == "e4m3":  # each with a factor of its own
        given: Any = {
            "source_N": source_N,
            "weights_N": weights_N,
            "keys": keys,
            "ids_N": ids_N,
            "size": size,
            "signs_n": signs_n,
            "first": first,
        }
        return quantize_tiles(x_NK, form, plan, **given)[0], quantize_tiles(
            x_NK, form, plan, rows=False, columns=True, **given
        )[1]
    device, n_experts, g = plan.counts_E.device, plan.counts_E.numel(), form.block[1]
    x_scales, x_factor, gx = None, None, 1
    if isinstance(x_NK, Packed):
        x, gx, k = x_NK, x_NK.format.block[1], x_NK.columns
        assert x.format.block[0] == 1 and x.format.element in ("e4m3", "e2m1"), x.format
        x_NK, x_scales = x.codes, x.scales.view(torch.uint8) if x.format.scale == "e8m0" else x.scales
        if x.format.scale == "e4m3" or x.format.rule == "shrink":  # else it is 1
            x_factor = x.factor.contiguous()
    else:
        k = x_NK.shape[1]
    assert plan.m == TILE and x_NK.stride(-1) == 1, (plan.m, x_NK.stride())
    n = (x_NK if source_N is None else source_N).shape[0]
    pack = 2 if form.element == "e2m1" else 1
    width = max(g, size, 64)
    m_tiles, k_tiles = n // TILE + n_experts, triton.cdiv(k, width)
    matrix = rotation(size, signs_n, device) if size else None

    def outputs(
        wanted: bool, n_rows: int, depth: int, row_ids: Tensor, column_ids: Tensor, key: int
    ) -> tuple[Any, ...]:
        if not wanted:
            return None, None, None, None, 0, 0
        depth += -depth % max(size, 1)
        codes = torch.empty(n_rows, -(-depth // pack), dtype=torch.uint8, device=device)
        scales = torch.empty(n_rows, -(-depth // g), dtype=scale_bytes(form), device=device)
        hashes: tuple[Any, Any] = (None, None)
        if form.rounding != "even":
            key = key_of(key, "scales") if form.rounding == "eden" else key
            hashes = line_hash(key, row_ids, 0), line_hash(key, column_ids, 1)
        return codes, scales, *hashes, codes.shape[1], scales.shape[1]

    # What a rotation makes of an expert's last rows and the zeros behind them has numbers that nobody else has.
    numbers, behind = torch.arange(k_tiles * width, device=device), -1 - torch.arange(TILE, device=device)
    column_rows, ids_N = numbers, torch.arange(n, device=device) if ids_N is None else ids_N
    positions = ids_N
    if first is not None:
        each = torch.arange(first, first + n_experts, device=device)[:, None]
        per = n // n_experts
        ids_N, column_rows, behind = ids_N + first * per, each * k + numbers, per - 1 - behind
        positions = torch.arange(per, device=device).expand(n_experts, per).flatten()
    by_row = outputs(rows, n, k, ids_N, numbers, keys[0])
    by_column = outputs(columns, k, m_tiles * TILE, column_rows, torch.cat((positions, behind)), keys[1])
    depth = k + -k % max(size, 1)
    trusted = None
    if form.rule == "quest":
        trusted = torch.empty(n, -(-depth // 8), dtype=torch.uint8, device=device)

    def launch(factor: Tensor | None, largest: Tensor | None) -> None:
        _quantize_kernel[m_tiles * k_tiles,](
            x_NK, x_scales, x_factor, weights_N, source_N, factor, largest, trusted, *by_row[:4], matrix, *by_row[4:],
            *by_column[:4], matrix, *by_column[4:], plan.counts_E, plan.starts_E, plan.tile_ends_E, n_experts, n, k,
            x_NK.stride(0), 0 if x_scales is None else x_scales.stride(0), GX=gx, BE=triton.next_power_of_2(n_experts), BM=TILE,
            BK=width, ROWS=rows, COLUMNS=columns, MATRICES=first is not None, SIZE=size, ROUNDING=form.rounding, num_warps=8,
            PRECISION=product_precision(device, torch.float32), enable_fp_fusion=False, **cast_constants(form, device),
        )  # fmt: skip

    factor = None
    if form.scale == "e4m3":
        largest = torch.zeros(() if first is None else n_experts, dtype=torch.int32, device=device)
        launch(None, largest)
        factor = factor_of(largest.view(torch.float32), form)
    launch(factor, None)

    def packed(made: tuple[Any, ...], depth: int, trusted: Tensor | None = None) -> Packed | None:
        if made[0] is None:
            return None
        result = packed_like(form, made[0], made[1], depth, factor, trusted)
        return result if first is None else dataclasses.replace(result, factor=result.factor.expand(n_experts))

    return packed(by_row, depth, trusted), packed(by_column, m_tiles * TILE)


def compile_cases(target: str) -> Any:
    """What moesaic.kernels.targets compiles: casts along rows and columns of 8 x 24576 rows of 128 experts, D 1536."""
    from moesaic.kernels.targets import meta

    def case(form: Format, size: int) -> None:
        plan = schedule(meta(128, dtype=torch.int64), TILE)
        quantize_tiles(meta(8 * 24576, 1536), form, plan, columns=True, size=size)

    def again(form: Format) -> None:
        plan, source = schedule(meta(128, dtype=torch.int64), TILE), meta(8 * 24576, dtype=torch.int64)
        x = Packed(
            form, meta(24576, 1536, dtype=torch.float8_e4m3fn), meta(24576, 12, dtype=torch.float32), meta(), 1536
        )
        quantize_tiles(x, form, plan, rows=False, columns=True, source_N=source)
        weights = meta(8 * 24576, dtype=torch.float32)
        quantize_tiles(meta(24576, 1536), form, plan, rows=False, columns=True, source_N=source, weights_N=weights)

    fp8, fine = Format("e4m3", (1, 128), "pow2", "rceil"), Format("e2m1", (1, 16), "e4m3", "amax", "stochastic")
    nvfp4: Any = {} if target not in TARGETS_OF["nvfp4"] else {
        "nvfp4, rotated, stochastic": functools.partial(case, fine, 16),
        "nvfp4, 16 x 16": lambda: quantize_squares(
            meta(128, 512, 1536, dtype=torch.float32), Format("e2m1", (16, 16), "e4m3", "amax")
        ),
    }  # fmt: skip
    return nvfp4 | {
        "fp8, fp32 scales": functools.partial(case, Format("e4m3", (1, 128), "fp32", "amax"), 0),
        "fp8": functools.partial(case, fp8, 0),
        "fp8, of codes; of weighted rows": functools.partial(again, fp8),
        "mxfp8": functools.partial(case, Format("e4m3", (1, 32), "e8m0", "rceil"), 0),
        "mxfp4, rotated, stochastic": functools.partial(
            case, Format("e2m1", (1, 32), "e8m0", "shrink", "stochastic"), 32
        ),
        "fp8, 128 x 128": lambda: quantize_squares(
            meta(128, 512, 1536, dtype=torch.float32), Format("e4m3", (128, 128), "pow2", "rceil")
        ),
        "mxfp4, 32 x 32": lambda: quantize_squares(
            meta(128, 512, 1536, dtype=torch.float32), Format("e2m1", (32, 32), "e8m0", "even")
        ),
    }
