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
    SCALES,
    Format,
    Packed,
    factor_of,
    key_of,
    line_hash,
    room_of,
)
from moesaic.kernels.quantize_tile import as_bytes, cast_rows, coarse_cast, codes_of, fine_cast, rotated
from moesaic.kernels.scaled_formats import STORED, TARGETS_OF
from moesaic.kernels.tiles import product_precision, target_name

TILE = 128  # rows of one program, and at most its columns


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
    tl.atomic_max(largest, tl.max(x_MK.to(tl.int32, bitcast=True) & 0x7FFFFFFF), sem="relaxed")


@functools.partial(
    jit, any_value=("N", "BC")
)  # else there is other code for other numbers of rows, in the middle of a run
def _quantize_kernel(
    x_NK, x_scales, x_factor, weights_N, source_N, factor, largest, trusted, row_codes, row_scales, row_hash_N, column_hash_K,
    row_rotation, CR, BR, column_codes, column_scales, row_hash_K, column_hash_N, column_rotation, CC, BC,
    counts_E, starts_E, tile_ends_E, E, N, K, stride, stride_s,
    GX: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
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
        # A part of the tile at a time, of PART x TILE values, and each cast from memory or L1 anew: registers hold no more.
        if ROWS:
            ks = k_tile * BK + tl.arange(0, BK)
            there = ks < K
            k_hash = tl.zeros([BK], tl.int32)
            if ROUNDING != "even":
                k_hash = tl.load(column_hash_K + k_tile * BK + tl.arange(0, BK // H) * H)
            for part in range(0, BM, BM * PART // BK):
                rows = row + part + tl.arange(0, BM * PART // BK)
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
                    x_MK = rotated(x_MK, row_rotation, BM * PART // BK, BK, SIZE, PRECISION)
                    _remember(largest, x_MK)
                else:
                    cast_rows(
                        x_MK, m_hash, k_hash, row_rotation, row_codes, row_scales, rows, real, k_tile * BK, CR, BR,
                        BM * PART // BK, BK, G, RULE, BYTES, ROUNDING, SIZE, EXPONENT, MANTISSA, LEAST, LARGEST, NAN, PACK,
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
            for part in range(0, BK, PART):
                cs = k_tile * BK + part + tl.arange(0, PART)
                inside = cs < K
                x_KM = _values(
                    x_NK, x_scales, x_factor, weights_N, places[None, :], rows[None, :], cs[:, None],
                    inside[:, None] & real[None, :], stride, stride_s, GX,
                )  # fmt: skip
                c_hash = tl.load(row_hash_K + cs) if ROUNDING != "even" else tl.zeros_like(cs)
                if largest is not None:
                    _remember(largest, rotated(x_KM, column_rotation, PART, BM, SIZE, PRECISION))
                else:
                    cast_rows(
                        x_KM, c_hash, m_hash, column_rotation, column_codes, column_scales, cs.to(tl.int64), inside, position,
                        CC, BC, PART, BM, G, RULE, BYTES, ROUNDING, SIZE, EXPONENT, MANTISSA, LEAST, LARGEST, NAN, PACK,
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
            x, stored, _ = coarse_cast(x, largest, 0, SIDE, G, RULE, BYTES, False, EXPONENT, MANTISSA, LEAST, LARGEST)
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
    side = TILE // 2 if form.rule == "four_six" else TILE  # registers hold no more
    _squares_kernel[triton.cdiv(n, side) * triton.cdiv(k, side), e](
        w_ENK, factor_E, codes, scales, n, k, w_ENK.stride(0), w_ENK.stride(1), codes.shape[2], *scales.shape[1:], BN=side,
        num_warps=8, enable_fp_fusion=form.scale != "e4m3", **constants,
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
    first    if given, x are the E matrices of the plan, of N / E rows each, and cast as `quantize_each` casts them or their
             transposes, each with a factor of its own, as (E,), which a packed x has too. first: how many are before these
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
    assert ids_N is None or ids_N.numel() == n, (ids_N, n)
    pack = 2 if form.element == "e2m1" else 1
    width = max(g, size, 64)
    m_tiles, k_tiles = n // TILE + n_experts, triton.cdiv(k, width)
    matrix, part = rotation(size, signs_n, device) if size else None, 64
    if not size and form.rule in ("quest", "four_six"):
        # What is to be added up is not in one thread, as it is after a product.
        part = 32 if x_NK.stride(0) * x_NK.element_size() % 16 == 0 else 16

    def hashes(along: int) -> tuple[Tensor | None, Tensor | None]:
        if form.rounding == "even":
            return None, None
        key = key_of(keys[along], "scales") if form.rounding == "eden" else keys[along]
        of_rows, of_columns = numbers(n, k, k_tiles * width, n_experts, ids_N, first, device)[along]
        return line_hash(key, of_rows, 0), line_hash(key, of_columns, 1)

    def outputs(along: int, n_rows: int, depth: int) -> tuple[Any, ...]:
        if not (rows, columns)[along]:
            return None, None, None, None, 0, 0
        codes = torch.empty(n_rows, -(-depth // pack), dtype=torch.uint8, device=device)
        scales = torch.empty(n_rows, -(-depth // g), dtype=scale_bytes(form), device=device)
        return codes, scales, *hashes(along), codes.shape[1], scales.shape[1]

    depth, positions = k + -k % max(size, 1), m_tiles * TILE
    by_row, by_column = outputs(0, n, depth), outputs(1, k, positions)
    trusted = None
    if form.rule == "quest":
        trusted = torch.empty(n, -(-depth // 8), dtype=torch.uint8, device=device)

    def launch(factor: Tensor | None, largest: Tensor | None) -> None:
        _quantize_kernel[m_tiles * k_tiles,](
            x_NK, x_scales, x_factor, weights_N, source_N, factor, largest, trusted, *by_row[:4], matrix, *by_row[4:],
            *by_column[:4], matrix, *by_column[4:], plan.counts_E, plan.starts_E, plan.tile_ends_E, n_experts, n, k,
            x_NK.stride(0), 0 if x_scales is None else x_scales.stride(0), GX=gx, BE=triton.next_power_of_2(n_experts), BM=TILE,
            BK=width, PART=part, ROWS=rows, COLUMNS=columns, MATRICES=first is not None, SIZE=size, ROUNDING=form.rounding,
            PRECISION=product_precision(device, torch.float32), num_warps=8, num_stages=2 if size == 128 else 3,
            enable_fp_fusion=False, **cast_constants(form, device),
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

    return packed(by_row, depth, trusted), packed(by_column, positions)


def numbers(
    n: int, k: int, width: int, n_experts: int, ids_N: Tensor | None, first: int | None, device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of a cast along rows and of one along columns: those of its rows and of its columns, as `_quantize_kernel` reads them."""
    along, behind = torch.arange(width, device=device), torch.arange(TILE, device=device)
    if first is None:
        ids_N = torch.arange(n, device=device) if ids_N is None else ids_N
        # What a rotation makes of an expert's last rows and the zeros behind them has numbers that nobody else has.
        return (ids_N, along), (along, torch.cat((ids_N, -1 - behind)))
    each = torch.arange(first, first + n_experts, device=device)[:, None]
    rows = torch.arange(n // n_experts, device=device)
    of_columns = torch.cat((rows.repeat(n_experts), len(rows) + behind))
    return ((each * len(rows) + rows).flatten(), along), (each * k + along, of_columns)


def compile_cases(target: str) -> Any:
    """What moesaic.kernels.targets compiles: casts along rows and columns of 24576 inputs and 8 times as many rows, D 1536, and
    of the weights of 128 experts, F 512."""
    from moesaic.kernels.targets import meta

    x, source, w = meta(24576, 1536), meta(8 * 24576, dtype=torch.int64), meta(128, 512, 1536, dtype=torch.float32)

    def plan(n_experts: int = 128) -> Schedule:
        return schedule(meta(n_experts, dtype=torch.int64), TILE)

    def case(form: Format, size: int) -> None:
        quantize_tiles(meta(8 * 24576, 1536), form, plan(), columns=True, size=size)

    def forward(form: Format, size: int = 0) -> None:
        quantize_tiles(x, form, plan(1), size=size)
        quantize_tiles(w.flatten(0, 1), form, plan(), size=size, first=0)

    def codes(form: Format, rows: int, *lead: int) -> Packed:
        pack = 1 if form.element == "e4m3" else 2
        kind = torch.float8_e4m3fn if pack == 1 else torch.uint8
        scales = meta(rows, 1536 // form.block[1], dtype=STORED[form.scale])
        return Packed(form, meta(rows, 1536 // pack, dtype=kind), scales, meta(*lead, dtype=torch.float32), 1536)

    def again(first: Format, form: Format, size: int) -> None:
        quantize_tiles(codes(first, 24576), form, plan(), rows=False, columns=True, source_N=source, size=size)
        if size:
            quantize_tiles(codes(first, 128 * 512, 128), form, plan(), rows=False, columns=True, size=size, first=0)

    def weighted(form: Format) -> None:
        weights = meta(8 * 24576, dtype=torch.float32)
        quantize_tiles(x, form, plan(), rows=False, columns=True, source_N=source, weights_N=weights)

    def squares(*form: Any) -> Any:
        return lambda: quantize_squares(w, Format(*form))

    fp8, fine = Format("e4m3", (1, 128), "pow2", "rceil"), Format("e2m1", (1, 16), "e4m3", "amax", "stochastic")
    four_six, eden = (
        dataclasses.replace(fine, rule=a, rounding=b) for a, b in (("four_six", "even"), ("amax", "eden"))
    )
    mx, quest = Format("e2m1", (1, 32), "e8m0", "shrink", "stochastic"), Format("e2m1", (1, 32), "e8m0", "quest")
    nvfp4: Any = {} if target not in TARGETS_OF["nvfp4"] else {
        "nvfp4, rotated, stochastic": functools.partial(case, fine, 16),
        "nvfp4, 4 or 6": functools.partial(forward, four_six),
        "nvfp4, MS-EDEN": functools.partial(case, eden, 128),
        "nvfp4, MS-EDEN, of codes": functools.partial(again, four_six, eden, 128),
        "nvfp4, 16 x 16": squares("e2m1", (16, 16), "e4m3", "amax"),
        "nvfp4, 4 or 6, 16 x 16": squares("e2m1", (16, 16), "e4m3", "four_six"),
    }  # fmt: skip
    mxfp4: Any = {} if target not in TARGETS_OF["mxfp4"] else {
        "mxfp4, QuEST, rotated": functools.partial(forward, quest, 32),
        "mxfp4, of codes, rotated, stochastic": functools.partial(again, quest, mx, 32),
    }  # fmt: skip
    return nvfp4 | mxfp4 | {
        "fp8, fp32 scales": functools.partial(case, Format("e4m3", (1, 128), "fp32", "amax"), 0),
        "fp8": functools.partial(case, fp8, 0),
        "fp8, of codes": functools.partial(again, fp8, fp8, 0),
        "fp8, of weighted rows": functools.partial(weighted, fp8),
        "mxfp8": functools.partial(case, Format("e4m3", (1, 32), "e8m0", "rceil"), 0),
        "mxfp4, rotated, stochastic": functools.partial(case, mx, 32),
        "fp8, 128 x 128": squares("e4m3", (128, 128), "pow2", "rceil"),
        "mxfp4, 32 x 32": squares("e2m1", (32, 32), "e8m0", "even"),
    }  # fmt: skip
