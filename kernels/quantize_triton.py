"""Casts of moesaic.kernels.quantize in one launch: a tile comes from memory once, and is written along rows, columns, or both.

    along rows      codes (N, K), scales (N, K / g): for products whose depth is K
    along columns   codes (K, P), scales (K, P / g): for weight gradients, whose depth are each expert's rows. Experts begin at
                    multiples of TILE positions, and what lies between is 0: expert e at TILE (tile_ends[e] - tiles[e])

    of squares      codes (E, N, K), scales (E, N / g, K / g): of weights, `quantize_squares`, one cast for both directions

What is cast may have weights of rows, or be codes with fp32 scales, cast before: they are multiplied while they are loaded.

Elements e4m3 and e2m1; scales fp32, pow2 and e8m0 with the rules amax, floor, ceil, rceil, even and shrink, e4m3 with amax;
rounding to nearest even or stochastic. Scales e4m3 take two launches: the first finds the tensor's largest magnitude, after the
rotation, and in what is read through source_N. Codes and scales are equal to those of `quantize` bit by bit; with a rotation
(moesaic.kernels.hadamard), where its fp32 sums are. But on gfx942, e4m3 has 0 for -0, whose bits are NaN there.

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
from moesaic.kernels.quantize import E4M3_HEADROOM, ELEMENTS, SCALES, Format, Packed, line_hash
from moesaic.kernels.scaled_formats import STORED, TARGETS_OF
from moesaic.kernels.tiles import product_precision, target_name

TILE = 128  # rows of one program, and at most its columns
INFINITE = tl.constexpr(0x7F800000)  # the bits of fp32's infinity; NaN's are larger


@jit
def codes_of(
    x, bits, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, STOCHASTIC: tl.constexpr, NAN: tl.constexpr,
    SIGNED_ZERO: tl.constexpr = True,
):  # fmt: skip
    """uint8: the codes of fp32 x; `bits`: a random int32 for each."""
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
    value = tl.abs(x) * power * 2.0**-MANTISSA
    # Of a normal number fp32's exponent and first bits, less the difference in bias; of a subnormal one the multiple of the step.
    normal = (value.to(tl.int32, bitcast=True) >> (23 - MANTISSA)) - (126 + LEAST << MANTISSA)
    subnormal = (value * 2.0 ** (MANTISSA - LEAST)).to(tl.int32)
    sign = negative.to(tl.int32) * (64 if NAN else 4) * 2
    code = tl.where(value >= 2.0**LEAST, normal, subnormal)
    code |= sign if SIGNED_ZERO else tl.where(code == 0, 0, sign)
    return tl.where(nan, NAN, code).to(tl.uint8)


@jit
def scales_of(
    amax, RULE: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, LARGEST: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    """(fp32: of rule amax the scales, else their inverses; the scales as they are stored) of blocks of which amax has
    the bits of the largest magnitude."""
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
        if RULE != "rceil":
            byte -= EXPONENT
        byte = tl.minimum(tl.maximum(byte, 0), 254)
        scale = tl.where(byte == 0, 1 << 22, byte << 23).to(tl.float32, bitcast=True)
        by = tl.where(byte == 254, 1 << 22, (254 - byte) << 23).to(tl.float32, bitcast=True)
    stored = tl.where(finite, byte, 255).to(tl.uint8) if BYTES else tl.where(finite, scale, float("nan"))
    return tl.where(finite, by, float("nan")), stored


@jit
def fine_scales(amax, factor, SHARE: tl.constexpr):
    """(fp32 scales, the same as e4m3) over a factor: amax times SHARE, rounded (NVFP4). A scale of 0 divides as 1."""
    value = tl.div_rn(amax.to(tl.float32, bitcast=True), factor) * SHARE
    stored = tl.where(value != value, value, tl.minimum(value, 448.0)).to(tl.float8e4nv)
    scale = stored.to(tl.float32)
    return tl.where(scale == 0, 1.0, scale), stored.to(tl.uint8, bitcast=True)


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
    BK: tl.constexpr, G: tl.constexpr, RULE: tl.constexpr, BYTES: tl.constexpr, STOCHASTIC: tl.constexpr,
    SIZE: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr,
    NAN: tl.constexpr, PACK: tl.constexpr, PRECISION: tl.constexpr, SIGNED_ZERO: tl.constexpr = True, SHARE: tl.constexpr = 0.0,
    factor=None,
):  # fmt: skip
    """Casts a tile along its rows, and writes it at rows places_M, from `column`; C bytes and B scales a row. factor: of scales
    e4m3, points to the tensor's."""
    x_MK = rotated(x_MK, rotation_nn, BM, BK, SIZE, PRECISION)
    if factor is not None:
        one = tl.load(factor)
    magnitude = x_MK.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax = tl.max(magnitude.reshape(BM, BK // G, G), axis=2)
    if factor is not None:
        by, stored = fine_scales(amax, one, SHARE)
        x_MK = tl.div_rn(x_MK, one)
    else:
        by, stored = scales_of(amax, RULE, EXPONENT, MANTISSA, LARGEST, BYTES)
    x, by = x_MK.reshape(BM, BK // G, G), tl.broadcast_to(by[:, :, None], (BM, BK // G, G))
    x = (tl.div_rn(x, by) if RULE == "amax" else x * by).reshape(BM, BK)
    if RULE == "shrink":
        x *= 0.75
    bits = tl.zeros([BM, BK], tl.int32)
    if STOCHASTIC:
        mixed = (row_hash_M[:, None] + column_hash_K[None, :]).to(tl.uint32, bitcast=True)
        mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
        mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
        bits = (mixed ^ (mixed >> 16)).to(tl.int32, bitcast=True)
    code = codes_of(x, bits, MANTISSA, LEAST, LARGEST, STOCHASTIC, NAN, SIGNED_ZERO)
    if PACK == 2:
        first, second = tl.split(code.reshape(BM, BK // 2, 2))
        code = first | (second << 4)
    cs = column // PACK + tl.arange(0, BK // PACK)
    tl.store(codes + places_M[:, None] * C + cs[None, :], code, mask=real_M[:, None] & (cs < C)[None, :])
    bs = column // G + tl.arange(0, BK // G)
    tl.store(scales + places_M[:, None] * B + bs[None, :], stored, mask=real_M[:, None] & (bs < B)[None, :])


@jit
def _values(x_NK, x_scales, weights_N, places, rows, ks, inside, stride, stride_s, GX: tl.constexpr):
    """fp32: what is at these rows and columns, times its scale and the row's weight; 0 where nothing is inside."""
    x = tl.load(x_NK + places * stride + ks, mask=inside, other=0.0).to(tl.float32)
    if x_scales is not None:
        x *= tl.load(x_scales + places * stride_s + ks // GX, mask=inside, other=0.0)
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
    x_NK, x_scales, weights_N, source_N, factor, largest, row_codes, row_scales, row_hash_N, column_hash_K, row_rotation, CR, BR,
    column_codes, column_scales, row_hash_K, column_hash_N, column_rotation, CC, BC,
    counts_E, starts_E, tile_ends_E, E, N, K, stride, stride_s,
    GX: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, G: tl.constexpr, RULE: tl.constexpr, BYTES: tl.constexpr, STOCHASTIC: tl.constexpr,
    SIZE: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr,
    NAN: tl.constexpr, PACK: tl.constexpr, PRECISION: tl.constexpr, SIGNED_ZERO: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    tile, k_tiles = tl.program_id(0), tl.cdiv(K, BK)
    if tile < tl.load(tile_ends_E + E - 1) * k_tiles:
        expert, row, end, k_tile = find_tile(tile, k_tiles, counts_E, starts_E, tile_ends_E, E, BM, BE, 1)
        # A part of the tile at a time, of 64 x TILE values, and each cast from memory or L1 anew: registers hold no more.
        if ROWS:
            ks = k_tile * BK + tl.arange(0, BK)
            there = ks < K
            k_hash = tl.load(column_hash_K + ks) if STOCHASTIC else tl.zeros([BK], tl.int32)
            for part in range(0, BM, BM * 64 // BK):
                rows = row + part + tl.arange(0, BM * 64 // BK)
                real = rows < end
                places = tl.load(source_N + rows, mask=real, other=0) if source_N is not None else rows
                x_MK = _values(
                    x_NK, x_scales, weights_N, places[:, None], rows[:, None], ks[None, :], real[:, None] & there[None, :],
                    stride, stride_s, GX,
                )  # fmt: skip
                m_hash = (
                    tl.load(row_hash_N + rows, mask=real, other=0) if STOCHASTIC else tl.zeros_like(rows).to(tl.int32)
                )
                if largest is not None:
                    x_MK = rotated(x_MK, row_rotation, BM * 64 // BK, BK, SIZE, PRECISION)
                    _remember(largest, x_MK)
                else:
                    cast_rows(
                        x_MK, m_hash, k_hash, row_rotation, row_codes, row_scales, rows, real, k_tile * BK, CR, BR,
                        BM * 64 // BK, BK, G, RULE, BYTES, STOCHASTIC, SIZE, EXPONENT, MANTISSA, LEAST, LARGEST, NAN, PACK,
                        PRECISION, SIGNED_ZERO, SHARE, factor,
                    )  # fmt: skip
        if COLUMNS:
            rows = row + tl.arange(0, BM)
            real = rows < end
            places = tl.load(source_N + rows, mask=real, other=0) if source_N is not None else rows
            m_hash = tl.zeros([BM], tl.int32)
            if STOCHASTIC:
                m_hash = tl.load(column_hash_N + tl.where(real, rows, N + rows - end))
            first = tl.load(tile_ends_E + expert) - tl.cdiv(tl.load(counts_E + expert), BM).to(tl.int32)
            position = first * BM + (row - tl.load(starts_E + expert)).to(tl.int32)
            for part in range(0, BK, 64):
                cs = k_tile * BK + part + tl.arange(0, 64)
                inside = cs < K
                x_KM = _values(
                    x_NK, x_scales, weights_N, places[None, :], rows[None, :], cs[:, None], inside[:, None] & real[None, :],
                    stride, stride_s, GX,
                )  # fmt: skip
                c_hash = tl.load(row_hash_K + cs) if STOCHASTIC else tl.zeros_like(cs)
                if largest is not None:
                    _remember(largest, rotated(x_KM, column_rotation, 64, BM, SIZE, PRECISION))
                else:
                    cast_rows(
                        x_KM, c_hash, m_hash, column_rotation, column_codes, column_scales, cs.to(tl.int64), inside, position,
                        CC, BC, 64, BM, G, RULE, BYTES, STOCHASTIC, SIZE, EXPONENT, MANTISSA, LEAST, LARGEST, NAN, PACK,
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
            by, stored = fine_scales(largest, one, SHARE)
            x = tl.div_rn(x, one)
        else:
            by, stored = scales_of(largest, RULE, EXPONENT, MANTISSA, LARGEST, BYTES)
        by = tl.broadcast_to(by[:, None, :, None], (64 // SIDE, SIDE, BN // G, G)).reshape(64, BN)
        x = tl.div_rn(x, by) if RULE == "amax" else x * by
        if RULE == "shrink":
            x *= 0.75
        code = codes_of(x, 0, MANTISSA, LEAST, LARGEST, False, NAN, SIGNED_ZERO)
        if PACK == 2:
            first, second = tl.split(code.reshape(64, BN // 2, 2))
            code = first | (second << 4)
        rows = row + part + tl.arange(0, 64)
        tl.store(codes + (e * N + rows)[:, None] * C + cs[None, :], code, mask=(rows < N)[:, None] & (cs < C)[None, :])
        rs = (row + part) // G + tl.arange(0, 64 // SIDE)
        bs = column // G + tl.arange(0, BN // G)
        there = (rs < BR)[:, None] & (bs < B)[None, :]
        tl.store(scales + (e * BR + rs)[:, None] * B + bs[None, :], stored, mask=there)


# ---------------------------------------------------------------- launchers


def supported(form: Format) -> bool:
    """Whether a cast is made here: of blocks of one row, or square."""
    return (
        form.element in ("e4m3", "e2m1")
        and (form.block[0] == 1 or (form.block[0] == form.block[1] and form.rounding == "even"))
        and TILE % form.block[1] == 0
        and form.rule in SCALES[form.scale]
        and form.rule not in ("quest", "four_six")
        and form.rounding != "eden"
    )


def cast_constants(form: Format, device: torch.device) -> dict[str, Any]:
    """What `cast_rows` and `codes_of` must know of a format."""
    kind, pack = ELEMENTS[form.element], 2 if form.element == "e2m1" else 1
    return {
        "G": form.block[1], "RULE": form.rule, "BYTES": form.scale == "e8m0", "EXPONENT": kind.exponent,
        "MANTISSA": kind.mantissa, "LEAST": kind.least, "LARGEST": kind.largest, "NAN": 0 if pack == 2 else 0x7F, "PACK": pack,
        "SIGNED_ZERO": pack == 2 or target_name(device) != "gfx942", "SHARE": room_of(form) / kind.largest,
    }  # fmt: skip


def room_of(form: Format) -> float:
    return E4M3_HEADROOM if form.rounding == "stochastic" else 1.0


def factor_of(amax: Tensor, form: Format) -> Tensor:
    """Of scales e4m3, for a largest magnitude."""
    room = amax * room_of(form)
    factor = room / (ELEMENTS[form.element].largest * ELEMENTS["e4m3"].largest)
    return torch.where(amax.isfinite(), torch.where(factor == 0, 1.0, factor), torch.nan)


def scale_bytes(form: Format) -> torch.dtype:
    """As what a kernel stores scales."""
    return torch.uint8 if form.scale in ("e8m0", "e4m3") else torch.float32


def packed_like(form: Format, codes: Tensor, scales: Tensor, columns: int, factor: Tensor | None = None) -> Packed:
    """Codes and scales, as a kernel stored them, in their types, with the tensor's factor, or the format's."""
    codes = codes if form.element == "e2m1" else codes.view(torch.float8_e4m3fn)
    if factor is None:
        factor = torch.full((), 4 / 3 if form.rule == "shrink" else 1.0, device=codes.device)
    return Packed(form, codes, scales.view(STORED[form.scale]), factor, columns)


def quantize_squares(w_ENK: Tensor, form: Format) -> Packed:
    """Each of E matrices, of any floating type, its rows contiguous, in square blocks: codes (E, N, K), scales (E, N / g, K / g).

    Raises ValueError for a format that is not `supported`.
    """
    if not supported(form) or form.block[0] != form.block[1]:
        raise ValueError(f"{form}: must have e4m3 or e2m1, square blocks, any rule but quest and four_six")
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
        num_warps=8, **constants,
    )  # fmt: skip
    packed = packed_like(form, codes, scales, k, factor_E)
    return dataclasses.replace(packed, factor=packed.factor.expand(e))


def quantize_tiles(
    x_NK: Tensor | Packed, form: Format, plan: Schedule, *, rows: bool = True, columns: bool = False,
    source_N: Tensor | None = None, weights_N: Tensor | None = None,
    keys: tuple[int, int] = (0, 0), ids_N: Tensor | None = None, size: int = 0, signs_n: Tensor | None = None,
) -> tuple[Packed | None, Packed | None]:  # fmt: skip
    """(cast along rows, cast along columns), those that are asked for.

    x_NK     of any floating type, rows contiguous; or read through source_N, int64 (N,); or such e4m3 codes, cast along rows
             with fp32 scales: without their factor
    weights_N   what a row is multiplied with, any floating type
    plan     of the rows of each expert, in tiles of TILE rows
    keys     of chance, along rows and along columns; ids_N: the global numbers of rows, int64 (default: from 0)
    size     of the rotation, 0 for none, with its signs
    Raises ValueError for a format that is not `supported`.
    """
    if not supported(form) or form.block[0] != 1:
        raise ValueError(
            f"{form}: must have e4m3 or e2m1, one row a block, any rule but quest and four_six, rounding even or stochastic"
        )
    if rows and columns and form.scale == "e4m3":  # each with a factor of its own
        given: Any = {
            "source_N": source_N,
            "weights_N": weights_N,
            "keys": keys,
            "ids_N": ids_N,
            "size": size,
            "signs_n": signs_n,
        }
        return quantize_tiles(x_NK, form, plan, **given)[0], quantize_tiles(
            x_NK, form, plan, rows=False, columns=True, **given
        )[1]
    x_scales, gx = None, 1
    if isinstance(x_NK, Packed):
        first, x_scales, x_NK = x_NK.format, x_NK.scales, x_NK.codes
        assert first.block[0] == 1 and x_NK.dtype is torch.float8_e4m3fn and x_scales.dtype is torch.float32, first
        gx = first.block[1]
    assert plan.m == TILE and x_NK.stride(-1) == 1, (plan.m, x_NK.stride())
    device, (_, k) = x_NK.device, x_NK.shape
    n, n_experts, g = (x_NK if source_N is None else source_N).shape[0], plan.counts_E.numel(), form.block[1]
    pack = 2 if form.element == "e2m1" else 1
    width = max(g, size, 64)
    m_tiles, k_tiles = n // TILE + n_experts, triton.cdiv(k, width)
    ids_N = torch.arange(n, device=device) if ids_N is None else ids_N
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
        if form.rounding == "stochastic":
            hashes = line_hash(key, row_ids, 0), line_hash(key, column_ids, 1)
        return codes, scales, *hashes, codes.shape[1], scales.shape[1]

    numbers = torch.arange(k_tiles * width, device=device)
    by_row = outputs(rows, n, k, ids_N, numbers, keys[0])
    # What a rotation makes of an expert's last rows and the zeros behind them has numbers that nobody else has.
    positions = torch.cat((ids_N, -1 - torch.arange(TILE, device=device)))
    by_column = outputs(columns, k, m_tiles * TILE, numbers, positions, keys[1])

    def launch(factor: Tensor | None, largest: Tensor | None) -> None:
        _quantize_kernel[m_tiles * k_tiles,](
            x_NK, x_scales, weights_N, source_N, factor, largest, *by_row[:4], matrix, *by_row[4:], *by_column[:4], matrix,
            *by_column[4:], plan.counts_E, plan.starts_E, plan.tile_ends_E, n_experts, n, k, x_NK.stride(0),
            0 if x_scales is None else x_scales.stride(0), GX=gx, BE=triton.next_power_of_2(n_experts), BM=TILE, BK=width,
            ROWS=rows, COLUMNS=columns, SIZE=size, PRECISION=product_precision(device, torch.float32), num_warps=8,
            STOCHASTIC=form.rounding == "stochastic", **cast_constants(form, device),
        )  # fmt: skip

    factor = None
    if form.scale == "e4m3":
        largest = torch.zeros(1, dtype=torch.int32, device=device)
        launch(None, largest)
        factor = factor_of(largest.view(torch.float32)[0], form)
    launch(factor, None)

    def packed(made: tuple[Any, ...], depth: int) -> Packed | None:
        return None if made[0] is None else packed_like(form, made[0], made[1], depth + -depth % max(size, 1), factor)

    return packed(by_row, k), packed(by_column, m_tiles * TILE)


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
