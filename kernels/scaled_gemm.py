"""Grouped products of quantized matrices over rows sorted by expert: what moesaic.kernels.quantize specifies, on matrix units.

    varlen_m   for row r of expert e:   y[r] = b[e] + factor[e] sum over blocks b of the depth
                                               sx[source[r], b] sw[e, ·, b] (W_b[e] x_b[source[r]])
    varlen_k   for expert e:   dW[e] = factor sum over blocks b of its positions  (sl[·, b] sr[·, b]) (left_b right_b^T)

    fp8      e4m3 codes, fp32 scales: blocks 1x128 of x, 128x128 of W. Matrix units have no such scales: `tl.dot` sums 128 of
             the depth, then the sum is multiplied with both scales and added in fp32, which also keeps the sums of Hopper's
             matrix units, of fewer bits, short (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
    mxfp8    e4m3 codes, mxfp4 e2m1 codes, e8m0 scales of 1x32 (W: also 32x32); nvfp4 e2m1 codes, e4m3 scales of 1x16 (W: also
             16x16). `tl.dot_scaled`: the matrix units of sm_100a and gfx950 take the scales, nvfp4's those of sm_100a alone. For
             sm_90a, Triton makes bf16 of the mx formats' codes and scales first, which loses nothing but a scale of 2^-127,
             then 0; for gfx942, nothing.

W is (E, N, K): its depth is contiguous, as 8-bit matrix units want it. For the gradient of x pass transposed codes and scales
(`transposed`: square blocks are the same either way), or W cast along its columns (`by_column`, which copies nothing). varlen_k's
operands, (P, positions) and (Q, positions), are casts along columns of moesaic.kernels.quantize_triton: each expert's rows begin
at a multiple of TILE positions.

**e4m3 on gfx942** is another type, e4m3fnuz: the same bits stand for half the value, so the same codes are multiplied, and the
result counts 4 times; but 0x80, -0 elsewhere, is NaN there: `without_minus_zero` when a matrix has been quantized. What the bits
of NaN stand for there doesn't matter: whatever isn't finite has a scale of NaN.

Letters: R rows, E experts, K depth, N columns; P x Q the matrices of varlen_k; G the depth of a block; BM, BN, BK tile sizes.
"""

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.grouped_gemm import (
    GROUP,
    Schedule,
    all_registers,
    describe,
    find_tile,
    first_tile,
    load_rows,
    load_weight,
    row_pointers,
    schedule,
)
from moesaic.kernels.interpret import jit
from moesaic.kernels.quantize import Format, Packed
from moesaic.kernels.quantize_triton import TILE
from moesaic.kernels.scaled_formats import FORMATS, TARGETS_OF, Scaled, format_of
from moesaic.kernels.tiles import Tile, processors, target_name

__all__ = ["FORMATS", "TARGETS_OF", "Scaled", "format_of"]  # and what stands here

# ---------------------------------------------------------------- formats


def e4m3(device: torch.device) -> torch.dtype:
    """As what the matrix units of a device take the bits of e4m3 codes."""
    return torch.float8_e4m3fnuz if target_name(device) == "gfx942" else torch.float8_e4m3fn


def without_minus_zero(packed: Packed) -> Packed:
    """With 0 for -0 in e4m3 codes, the only difference that gfx942 makes; elsewhere as it is."""
    if packed.format.element != "e4m3" or e4m3(packed.codes.device) is torch.float8_e4m3fn:
        return packed
    bits = packed.codes.view(torch.uint8)
    return dataclasses.replace(packed, codes=bits.masked_fill(bits == 0x80, 0).view(packed.codes.dtype))


# ---------------------------------------------------------------- the specification


def scaled_varlen_m_reference(x: Packed, w: Packed, counts_E: Tensor, source_R: Tensor | None = None) -> Tensor:
    """fp64 (R, N): sums of exact products. Rows past the last expert's are zero."""
    x_RK, w_ENK = x.unpack().dequantize().double(), w.unpack().dequantize().double()
    x_RK = x_RK if source_R is None else x_RK[source_R]
    y_RN = x_RK.new_zeros(x_RK.shape[0], w_ENK.shape[1])
    ends = counts_E.cumsum(0).tolist()
    for start, end, w_NK in zip([0, *ends[:-1]], ends, w_ENK, strict=True):
        y_RN[start:end] = x_RK[start:end] @ w_NK.T
    return y_RN


# ---------------------------------------------------------------- the kernel


@jit
def multiply_scaled(
    acc_MN, x_MK, x_scales_M1, w, w_scales, expert, n, column, N, C, B, stride_e, stride_r, scale_e,
    BN: tl.constexpr, BC: tl.constexpr, G: tl.constexpr, WN: tl.constexpr, PACK: tl.constexpr, ELEMENT: tl.constexpr,
    SCALED: tl.constexpr, DESCRIBED: tl.constexpr, scale_r=None,
):  # fmt: skip
    """acc + x W^T for BC bytes of the depth from `column`, of C; B: blocks of the depth, and without scale_r what the scales of
    W's next rows are away; WN: rows of W that share a scale."""
    stride_s = B if scale_r is None else scale_r
    b_CN = load_weight(w, expert, n, column, N, C, stride_e, stride_r, BN, BC, DESCRIBED).T
    scales_e = w_scales + expert.to(tl.int64) * scale_e
    if SCALED:
        blocks = column * PACK // G + tl.arange(0, BC * PACK // G)
        ns = n + tl.arange(0, BN)
        real = (blocks < B)[None, :]
        x_scales = tl.load(x_scales_M1 + blocks[None, :], mask=real, other=0.0)
        places = scales_e + (ns // WN)[:, None] * stride_s + blocks[None, :]
        b_scales = tl.load(places, mask=real & (ns < N)[:, None], other=0.0)
        acc_MN = tl.dot_scaled(x_MK, x_scales, ELEMENT, b_CN, b_scales, ELEMENT, acc_MN)
    else:
        block = column // G
        x_scales = tl.load(x_scales_M1 + block)
        acc_MN += tl.dot(x_MK, b_CN) * (x_scales * tl.load(scales_e + n // WN * stride_s + block))
    return acc_MN


@jit
def _scaled_varlen_m_kernel(
    x, x_scales, source_R, w, w_scales, factor_E, bias_EN, y_RN, counts_E, starts_E, tile_ends_E, E, N, C, B,
    stride_x, stride_s, stride_e, stride_r, scale_e, scale_r,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr, G: tl.constexpr, WN: tl.constexpr,
    PACK: tl.constexpr, ELEMENT: tl.constexpr, SCALED: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr,
    DESCRIBED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(N, BN)
    tiles = tl.load(tile_ends_E + E - 1) * n_tiles
    for tile in range(first_tile(XCDS), tiles, tl.num_programs(0)):
        expert, row, end, n_tile = find_tile(tile, n_tiles, counts_E, starts_E, tile_ends_E, E, BM, BE, GROUP)
        x_M1, rows, real = row_pointers(x, source_R, row, end, stride_x, BM, source_R is not None)
        x_scales_M1, _, _ = row_pointers(x_scales, source_R, row, end, stride_s, BM, source_R is not None)
        n = n_tile * BN
        acc_MN = tl.zeros([BM, BN], tl.float32)
        for column in range(0, C, BC):
            x_MK = load_rows(x_M1, column, C, BC, EVEN)
            acc_MN = multiply_scaled(
                acc_MN, x_MK, x_scales_M1, w, w_scales, expert, n, column, N, C, B, stride_e, stride_r, scale_e,
                BN, BC, G, WN, PACK, ELEMENT, SCALED, DESCRIBED, scale_r,
            )  # fmt: skip
        acc_MN *= tl.load(factor_E + expert)
        ns = n + tl.arange(0, BN)
        if bias_EN is not None:
            acc_MN += tl.load(bias_EN + expert.to(tl.int64) * N + ns, mask=ns < N, other=0.0).to(tl.float32)[None, :]
        places = y_RN + rows[:, None] * N + ns[None, :]
        tl.store(places, acc_MN.to(y_RN.dtype.element_ty), mask=real[:, None] & (ns < N)[None, :])


@functools.partial(jit, any_value=("scale_l", "scale_r"))  # they follow from the number of rows
def _scaled_varlen_k_kernel(
    left, left_scales, right, right_scales, factor, out_EPQ, counts_E, tile_ends_E, order_E, E, P, Q, C,
    stride_l, stride_r, scale_l, scale_r,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, DEPTH: tl.constexpr, G: tl.constexpr, PACK: tl.constexpr,
    ELEMENT: tl.constexpr, SCALED: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    p_tiles = tl.cdiv(P, BM)
    q_tiles = tl.cdiv(Q, BN)
    for tile in range(first_tile(XCDS), E * p_tiles * q_tiles, tl.num_programs(0)):
        expert = tl.load(order_E + tile // (p_tiles * q_tiles))
        local = tile % (p_tiles * q_tiles)
        p_tile, q_tile = tl.swizzle2d(local // q_tiles, local % q_tiles, p_tiles, q_tiles, GROUP)
        p, q = p_tile * BM, q_tile * BN
        ps = p + tl.arange(0, BM)
        qs = q + tl.arange(0, BN)
        steps = tl.cdiv(tl.load(counts_E + expert), DEPTH).to(tl.int32)
        first = tl.load(tile_ends_E + expert) - steps
        # Rows past the last read the scales of some row, and are not stored.
        l_scales_M = left_scales + tl.where(ps < P, ps, 0).to(tl.int64) * scale_l
        r_scales_N = right_scales + tl.where(qs < Q, qs, 0).to(tl.int64) * scale_r
        acc_MN = tl.zeros([BM, BN], tl.float32)
        for column in range(first * (DEPTH // PACK), (first + steps) * (DEPTH // PACK), BC):
            a_MC = load_weight(left, expert * 0, p, column, P, C, 0, stride_l, BM, BC, DESCRIBED)
            b_NC = load_weight(right, expert * 0, q, column, Q, C, 0, stride_r, BN, BC, DESCRIBED)
            if SCALED:
                blocks = (column * PACK // G + tl.arange(0, BC * PACK // G))[None, :]
                l_scales, r_scales = tl.load(l_scales_M[:, None] + blocks), tl.load(r_scales_N[:, None] + blocks)
                acc_MN = tl.dot_scaled(a_MC, l_scales, ELEMENT, b_NC.T, r_scales, ELEMENT, acc_MN)
            else:
                l_scales, r_scales = tl.load(l_scales_M + column // G), tl.load(r_scales_N + column // G)
                acc_MN += tl.dot(a_MC, b_NC.T) * (l_scales[:, None] * r_scales[None, :])
        acc_MN *= tl.load(factor)
        places = out_EPQ + expert.to(tl.int64) * P * Q + ps.to(tl.int64)[:, None] * Q + qs[None, :]
        tl.store(places, acc_MN.to(out_EPQ.dtype.element_ty), mask=(ps < P)[:, None] & (qs < Q)[None, :])


# ---------------------------------------------------------------- launchers


def scaled_tile(target: str | torch.device, name: str) -> Tile:
    """The tile for a format; k counts values. Its M is TILE on every target, so that casts and products share a schedule."""
    if target_name(target) == "cpu":
        return Tile(TILE, 64, 128)
    # Codes and scales of mxfp8 become bf16 in registers of sm_90a, where for 128 columns there aren't quite enough.
    n = 64 if name == "mxfp8" and target_name(target) == "sm_90a" else 128
    return Tile(TILE, n, 128, stages=1 if target_name(target).startswith("gfx") else 3)


def gradient_tile(target: str | torch.device, name: str) -> Tile:
    """Of `scaled_varlen_k`. Of fp8 on sm_100a, whose matrix units leave sums in a memory of their own: to be scaled in fp32 they
    come to registers, beside those before, of which there aren't enough for 128 columns."""
    tile = scaled_tile(target, name)
    return dataclasses.replace(tile, n=64) if name == "fp8" and target_name(target) == "sm_100a" else tile


def _aligned(codes: Tensor) -> Tensor:
    """Codes whose rows begin at multiples of 16 bytes, if need be with zeros behind: single bytes would take all registers."""
    spare = -codes.shape[-1] % 16
    if spare or codes.stride(-1) != 1 or any(stride % 16 for stride in codes.stride()[:-1]):
        codes = F.pad(codes.view(torch.uint8), (0, spare)).view(codes.dtype).contiguous()
    return codes


def transposed(w: Packed) -> Packed:
    """(E, N, K) as (E, K, N), of square blocks of 8-bit or 4-bit codes: a copy, for the depth must be contiguous."""
    assert w.format.block[0] == w.format.block[1], w.format
    if w.codes.dtype is torch.uint8:
        nibbles = torch.stack((w.codes & 15, w.codes >> 4), dim=-1).flatten(-2)[..., : w.columns].mT
        nibbles = F.pad(nibbles, (0, nibbles.shape[-1] % 2))
        codes = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    else:
        codes = w.codes.view(torch.uint8).mT.contiguous().view(w.codes.dtype)
    scales = w.scales.view(torch.uint8).mT.contiguous().view(w.scales.dtype) if w.scales.itemsize == 1 else w.scales.mT
    return Packed(w.format, codes, scales, w.factor, w.codes.shape[-2])


def by_column(w: Packed, n_experts: int, columns: int) -> Packed:
    """E matrices (`columns`, N) of which the rows, one below the other, were cast along columns in one schedule of E experts: as
    codes (E, N, columns and the zeros behind them), without a copy."""
    depth = -(-columns // TILE) * TILE

    def each(x: Tensor, per: int) -> Tensor:
        return x[:, : n_experts * depth // per].unflatten(1, (n_experts, depth // per)).transpose(0, 1)

    known = FORMATS[format_of(w)]
    return Packed(w.format, each(w.codes, known.pack), each(w.scales, known.group), w.factor, columns)


def one_format(x: Packed, w: Packed) -> tuple[str, Scaled]:
    """The format of both; raises ValueError where they have none together, or the device's matrix units don't have it."""
    name = format_of(x)
    if name != format_of(w) or x.format.block[0] != 1:
        raise ValueError(f"{x.format} times {w.format}: must be one format, and that of x with a scale for each row")
    target = target_name(x.codes.device)
    if target not in TARGETS_OF[name]:
        raise ValueError(
            f"element={x.format.element}, scale={x.format.scale}: {name} doesn't run on {target}, only on "
            f"{', '.join(TARGETS_OF[name])}"
        )
    return name, FORMATS[name]


def for_units(packed: Packed, known: Scaled) -> tuple[Tensor, Tensor, float]:
    """(codes in aligned rows, scales, both of the type that the device's matrix units take; what the codes count too little)."""
    codes, scales, device = packed.codes, packed.scales, packed.codes.device
    if scales.stride(-1) != 1:
        scales = (
            scales.contiguous() if scales.itemsize > 1 else scales.view(torch.uint8).contiguous().view(scales.dtype)
        )
    codes = _aligned(codes)
    if known.scale is torch.float8_e8m0fnu:
        scales = scales.view(torch.uint8)
    if known.element != "e4m3":
        return codes, scales, 1.0
    kind = e4m3(device) if known.group == 128 else torch.float8_e4m3fn
    return codes.view(kind), scales, 2.0 if kind is torch.float8_e4m3fnuz else 1.0


def product_options(x: Packed, w: Packed, tile: Tile, width: int, size: int) -> dict[str, Any]:
    """Constants of a kernel that multiplies x and w, for results of `width` columns of `size` bytes. Raises ValueError as
    `one_format`."""
    name, known = one_format(x, w)
    programs, target = processors(x.codes.device), target_name(x.codes.device)
    assert name != "fp8" or tile.k == known.group, tile
    return all_registers(target) | {
        "BM": tile.m, "BN": min(tile.n, 64) if width * size % 16 else tile.n,  # rows at odd addresses take registers
        "BC": tile.k // known.pack, "G": known.group, "PACK": known.pack, "ELEMENT": known.element, "SCALED": name != "fp8",
        "GROUP": GROUP, "XCDS": 8 if target.startswith("gfx") and programs % 8 == 0 else 1, "num_warps": tile.warps,
        "num_stages": tile.stages,
    }  # fmt: skip


def weight_rows(w: Packed, bn: int) -> int:
    """Rows of w that share a scale; of fp8, a tile of bn columns has one."""
    assert w.format.scale not in ("fp32", "pow2") or w.format.block[0] % bn == 0, (w.format, bn)
    return w.format.block[0]


def scaled_varlen_m(
    x: Packed,
    w: Packed,
    plan: Schedule,
    tile: Tile,
    *,
    source_R: Tensor | None = None,
    bias_EN: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """y (R, N) of `dtype`.

    x   codes (R, K), or (inputs, K) read through source_R, int64 (R,)
    w   codes (E, N, K), or more than K, of which the others are 0; both of one of FORMATS, their factor for all of x and for
        each expert of w
    bias_EN   added to the rows of each expert
    Rows of codes that aren't whole multiples of 16 bytes are copied first.
    Rows past the last expert's are left as they are in memory. Raises ValueError where the formats cannot be multiplied.
    """
    (n_experts, n, _), blocks, device = w.codes.shape, x.scales.shape[1], x.codes.device
    options = product_options(x, w, tile, n, dtype.itemsize)
    (x_codes, x_scales, one), (w_codes, w_scales, other) = (for_units(v, FORMATS[format_of(x)]) for v in (x, w))
    assert x.codes.shape[1] <= w.codes.shape[2] and plan.m == tile.m, (x.codes.shape, w.codes.shape)
    columns = x_codes.shape[1]
    factor_E = (x.factor * w.factor).expand(n_experts).mul(one * other).contiguous()
    y_RN = torch.empty((x.codes if source_R is None else source_R).shape[0], n, dtype=dtype, device=device)
    described, is_described = describe(w_codes, options["BN"], options["BC"])
    _scaled_varlen_m_kernel[processors(device),](
        x_codes, x_scales, source_R, described, w_scales, factor_E, bias_EN, y_RN,
        plan.counts_E, plan.starts_E, plan.tile_ends_E, n_experts, n, columns, blocks,
        x_codes.stride(0), x_scales.stride(0), w_codes.stride(0), w_codes.stride(1), w_scales.stride(0), w_scales.stride(1),
        BE=triton.next_power_of_2(n_experts), WN=weight_rows(w, options["BN"]), DESCRIBED=is_described,
        EVEN=columns % options["BC"] == 0, **options,
    )  # fmt: skip
    return y_RN


def scaled_varlen_k(
    left: Packed, right: Packed, plan: Schedule, tile: Tile, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """dW (E, P, Q) of `dtype`: of each expert, left (P, positions) times right (Q, positions) over its positions.

    Both with a scale for each row of codes, of one of FORMATS, and with a factor for all. Zeros for an expert without rows.
    Raises ValueError where the formats cannot be multiplied.
    """
    options, known = product_options(left, right, tile, right.codes.shape[0], dtype.itemsize), FORMATS[format_of(left)]
    assert right.format.block[0] == 1 and plan.m == TILE and left.codes.shape[1] == right.codes.shape[1], (left, right)
    (l_codes, l_scales, one), (r_codes, r_scales, other) = (for_units(v, known) for v in (left, right))
    (p, columns), q, n_experts = l_codes.shape, r_codes.shape[0], plan.counts_E.numel()
    factor = left.factor * right.factor * (one * other)
    out_EPQ = torch.empty(n_experts, p, q, dtype=dtype, device=l_codes.device)
    (a, described), (b, _) = (describe(codes[None], options[size], options["BC"])
                              for codes, size in ((l_codes, "BM"), (r_codes, "BN")))  # fmt: skip
    if not described:
        a, b = l_codes, r_codes
    _scaled_varlen_k_kernel[processors(l_codes.device),](
        a, l_scales, b, r_scales, factor, out_EPQ, plan.counts_E, plan.tile_ends_E, plan.order_E, n_experts, p, q, columns,
        l_codes.stride(0), r_codes.stride(0), l_scales.stride(0), r_scales.stride(0), DEPTH=TILE, DESCRIBED=described, **options,
    )  # fmt: skip
    return out_EPQ


# ---------------------------------------------------------------- ahead of time


def compile_cases(target: str) -> Any:
    """What moesaic.kernels.targets compiles: products of a layer of D 1536, F 256, 128 experts, and one of odd widths."""
    from moesaic.kernels.targets import meta

    def packed(name: str, *shape: int, block_rows: int = 1) -> Packed:
        known = FORMATS[name]
        scale = {torch.float32: "fp32", torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3"}[known.scale]
        code = torch.float8_e4m3fn if known.pack == 1 else torch.uint8
        form = Format(known.element, (block_rows, known.group), scale, "amax")
        *lead, n, k = shape
        codes = meta(*lead, n, -(-k // known.pack), dtype=code)
        scales = meta(*lead, -(-n // block_rows), -(-k // known.group), dtype=known.scale)
        return Packed(form, codes, scales, meta(*lead[:1], dtype=torch.float32), k)

    def by_rows(name: str, rows: int, d: int, f: int) -> None:
        source, plan = meta(8 * 24576, dtype=torch.int64), schedule(meta(128, dtype=torch.int64), TILE)
        x, w = packed(name, 24576, d), packed(name, 128, f, d, block_rows=rows)
        scaled_varlen_m(x, w, plan, scaled_tile(target, name), source_R=source)
        if rows == 1:  # of a weight cast along its columns
            w = by_column(packed(name, f, 128 * TILE * -(-d // TILE)), 128, d)
            scaled_varlen_m(x, w, plan, scaled_tile(target, name), bias_EN=meta(128, f, dtype=torch.float32))

    def by_experts(name: str, d: int, f: int) -> None:
        positions = 8 * 24576 + 128 * TILE
        left, right = (
            dataclasses.replace(packed(name, width, positions), factor=meta(dtype=torch.float32)) for width in (d, f)
        )
        scaled_varlen_k(left, right, schedule(meta(128, dtype=torch.int64), TILE), gradient_tile(target, name))

    names = [name for name in FORMATS if target in TARGETS_OF[name]]
    rows = {"fp8": 128, "mxfp8": 1, "mxfp4": 1, "nvfp4": 16}
    cases: dict[str, Any] = {}
    for d, f in ((1536, 256), (7168, 2048), (1408, 2048), (1001, 333)):
        cases |= {f"D {d}, F {f}, {name}": functools.partial(by_rows, name, rows[name], d, f) for name in names}
        cases |= {f"D {d}, F {f}, {name}, weights": functools.partial(by_experts, name, d, f) for name in names}
    return cases
