"""Grouped products of quantized matrices over rows sorted by expert: what moesaic.kernels.quantize specifies, on matrix units.

    for row r of expert e:   y[r] = factor[e] sum over blocks b of the depth  sx[source[r], b] sw[e, ·, b] (W_b[e] x_b[source[r]])

    fp8      e4m3 codes, fp32 scales: blocks 1x128 of x, 128x128 of W. Matrix units have no such scales: `tl.dot` sums 128 of
             the depth, then the sum is multiplied with both scales and added in fp32, which also keeps the sums of Hopper's
             matrix units, of fewer bits, short (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
    mxfp8    e4m3 codes, mxfp4 e2m1 codes, e8m0 scales of 1x32 (W: also 32x32); nvfp4 e2m1 codes, e4m3 scales of 1x16 (W: also
             16x16). `tl.dot_scaled`: the matrix units of sm_100a and gfx950 take the scales, nvfp4's those of sm_100a alone. For
             sm_90a, Triton makes bf16 of the mx formats' codes and scales first, which loses nothing; for gfx942, nothing.

W is (E, N, K): its depth is contiguous, as 8-bit matrix units want it. For the gradient of x pass transposed codes and scales:
square blocks are the same either way.

**e4m3 on gfx942** is another type, e4m3fnuz: the same bits stand for half the value, so the same codes are multiplied, and the
result counts 4 times; but 0x80, -0 elsewhere, is NaN there: `without_minus_zero` when a matrix has been quantized. What the bits
of NaN stand for there doesn't matter: whatever isn't finite has a scale of NaN.

Letters: R rows, E experts, K depth, N columns; G the depth of a block; BM, BN, BK tile sizes.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.grouped_gemm import (
    GROUP,
    Schedule,
    describe,
    find_tile,
    first_tile,
    load_rows,
    load_weight,
    row_pointers,
    schedule,
)
from moesaic.kernels.interpret import jit
from moesaic.kernels.quantize import Packed
from moesaic.kernels.tiles import Tile, processors, target_name

# ---------------------------------------------------------------- formats


@dataclass(frozen=True)
class Scaled:
    """element: of codes, as `tl.dot_scaled` names it. group: columns that share a scale. scale: its type."""

    element: str
    group: int
    scale: torch.dtype

    @property
    def pack(self) -> int:
        """Codes a byte."""
        return 2 if self.element == "e2m1" else 1


FORMATS = {
    "fp8": Scaled("e4m3", 128, torch.float32),
    "mxfp8": Scaled("e4m3", 32, torch.float8_e8m0fnu),
    "mxfp4": Scaled("e2m1", 32, torch.float8_e8m0fnu),
    "nvfp4": Scaled("e2m1", 16, torch.float8_e4m3fn),
}
TARGETS_OF = {
    "fp8": ("sm_90a", "sm_100a", "gfx942", "gfx950", "cpu"),
    "mxfp8": ("sm_90a", "sm_100a", "gfx950", "cpu"),
    "mxfp4": ("sm_90a", "sm_100a", "gfx950", "cpu"),
    "nvfp4": ("sm_100a", "cpu"),
}


def format_of(packed: Packed) -> str:
    """The name of the format that a matrix has; raises ValueError where matrix units have none such."""
    form = packed.format
    for name, known in FORMATS.items():
        if (form.element, form.block[1], packed.scales.dtype) == (known.element, known.group, known.scale):
            return name
    raise ValueError(
        f"element={form.element}, block={form.block[0]}x{form.block[1]}, scale={form.scale}: no matrix unit multiplies it; "
        "those that do: e4m3 with fp32 scales of 128 columns, e4m3 or e2m1 with e8m0 scales of 32, e2m1 with e4m3 scales of 16"
    )


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
    SCALED: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """acc + x W^T for BC bytes of the depth from `column`, of C; B: blocks of the depth; WN: rows of W that share a scale."""
    b_CN = load_weight(w, expert, n, column, N, C, stride_e, stride_r, BN, BC, DESCRIBED).T
    scales_e = w_scales + expert.to(tl.int64) * scale_e
    if SCALED:
        blocks = column * PACK // G + tl.arange(0, BC * PACK // G)
        ns = n + tl.arange(0, BN)
        real = (blocks < B)[None, :]
        x_scales = tl.load(x_scales_M1 + blocks[None, :], mask=real, other=0.0)
        places = scales_e + (ns // WN)[:, None] * B + blocks[None, :]
        b_scales = tl.load(places, mask=real & (ns < N)[:, None], other=0.0)
        acc_MN = tl.dot_scaled(x_MK, x_scales, ELEMENT, b_CN, b_scales, ELEMENT, acc_MN)
    else:
        block = column // G
        x_scales = tl.load(x_scales_M1 + block)
        acc_MN += tl.dot(x_MK, b_CN) * (x_scales * tl.load(scales_e + n // WN * B + block))
    return acc_MN


@jit
def _scaled_varlen_m_kernel(
    x, x_scales, source_R, w, w_scales, factor_E, y_RN, counts_E, starts_E, tile_ends_E, E, N, C, B,
    stride_x, stride_e, stride_r, scale_e,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr, G: tl.constexpr, WN: tl.constexpr,
    PACK: tl.constexpr, ELEMENT: tl.constexpr, SCALED: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr,
    DESCRIBED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(N, BN)
    tiles = tl.load(tile_ends_E + E - 1) * n_tiles
    for tile in range(first_tile(XCDS), tiles, tl.num_programs(0)):
        expert, row, end, n_tile = find_tile(tile, n_tiles, counts_E, starts_E, tile_ends_E, E, BM, BE, GROUP)
        x_M1, rows, real = row_pointers(x, source_R, row, end, stride_x, BM, source_R is not None)
        x_scales_M1, _, _ = row_pointers(x_scales, source_R, row, end, B, BM, source_R is not None)
        n = n_tile * BN
        acc_MN = tl.zeros([BM, BN], tl.float32)
        for column in range(0, C, BC):
            x_MK = load_rows(x_M1, column, C, BC, EVEN)
            acc_MN = multiply_scaled(
                acc_MN, x_MK, x_scales_M1, w, w_scales, expert, n, column, N, C, B, stride_e, stride_r, scale_e,
                BN, BC, G, WN, PACK, ELEMENT, SCALED, DESCRIBED,
            )  # fmt: skip
        acc_MN *= tl.load(factor_E + expert)
        ns = n + tl.arange(0, BN)
        places = y_RN + rows[:, None] * N + ns[None, :]
        tl.store(places, acc_MN.to(y_RN.dtype.element_ty), mask=real[:, None] & (ns < N)[None, :])


# ---------------------------------------------------------------- launchers


def scaled_tile(target: str | torch.device, name: str) -> Tile:
    """The tile for a format; k counts values. Its M is that of `tiles.gemm_tile`'s."""
    if target_name(target) == "cpu":
        return Tile(16, 64, 128)
    return Tile(128, 128, 128, stages=1 if target_name(target).startswith("gfx") else 3)


def _aligned(codes: Tensor) -> Tensor:
    """Codes whose rows begin at multiples of 16 bytes, if need be with zeros behind: single bytes would take all registers."""
    codes = codes.contiguous()
    spare = -codes.shape[-1] % 16
    return codes if not spare else F.pad(codes.view(torch.uint8), (0, spare)).view(codes.dtype)


def scaled_varlen_m(
    x: Packed,
    w: Packed,
    plan: Schedule,
    tile: Tile,
    *,
    source_R: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """y (R, N) of `dtype`.

    x   codes (R, K), or (inputs, K) read through source_R, int64 (R,)
    w   codes (E, N, K); both of one of FORMATS, their factor for all of x and for each expert of w
    Rows of codes that aren't whole multiples of 16 bytes are copied first.
    Rows past the last expert's are left as they are in memory. Raises ValueError where the formats cannot be multiplied.
    """
    name = format_of(x)
    if name != format_of(w) or x.format.block[0] != 1:
        raise ValueError(f"{x.format} times {w.format}: must be one format, and that of x with a scale for each row")
    known, device = FORMATS[name], x.codes.device
    target = target_name(device)
    if target not in TARGETS_OF[name]:
        raise ValueError(
            f"element={x.format.element}, scale={x.format.scale}: {name} doesn't run on {target}, only on "
            f"{', '.join(TARGETS_OF[name])}"
        )
    (n_experts, n, columns), blocks = w.codes.shape, x.scales.shape[1]
    assert x.codes.shape[1] == columns and plan.m == tile.m, (x.codes.shape, w.codes.shape)
    codes, scales = [_aligned(v.codes) for v in (x, w)], [v.scales.contiguous() for v in (x, w)]
    columns = codes[0].shape[1]
    factor_E = (x.factor * w.factor).expand(n_experts).contiguous()
    if known.element == "e4m3":
        kind = e4m3(device) if name == "fp8" else torch.float8_e4m3fn
        codes = [v.view(kind) for v in codes]
        factor_E = factor_E * 4 if kind is torch.float8_e4m3fnuz else factor_E
    if known.scale is torch.float8_e8m0fnu:
        scales = [v.view(torch.uint8) for v in scales]
    rows_of_block = w.format.block[0]
    # Rows of y at odd addresses take registers.
    bn, bc = min(tile.n, 64) if n * dtype.itemsize % 16 else tile.n, tile.k // known.pack
    if name == "fp8":
        assert rows_of_block % bn == 0 and tile.k == known.group, (rows_of_block, tile)
    y_RN = torch.empty((x.codes if source_R is None else source_R).shape[0], n, dtype=dtype, device=device)
    described, is_described = describe(codes[1], bn, bc)
    programs = processors(device)
    _scaled_varlen_m_kernel[programs,](
        codes[0], scales[0], source_R, described, scales[1], factor_E, y_RN,
        plan.counts_E, plan.starts_E, plan.tile_ends_E, n_experts, n, columns, blocks,
        codes[0].stride(0), codes[1].stride(0), codes[1].stride(1), scales[1].stride(0),
        BM=tile.m, BN=bn, BC=bc, BE=triton.next_power_of_2(n_experts), G=known.group, WN=rows_of_block,
        PACK=known.pack, ELEMENT=known.element, SCALED=name != "fp8", GROUP=GROUP,
        XCDS=8 if target.startswith("gfx") and programs % 8 == 0 else 1, DESCRIBED=is_described,
        EVEN=columns % bc == 0, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y_RN


# ---------------------------------------------------------------- ahead of time


def compile_cases(target: str) -> Any:
    """What moesaic.kernels.targets compiles: products of a layer of D 1536, F 256, 128 experts, and one of odd widths."""
    from moesaic.kernels.quantize import Format
    from moesaic.kernels.targets import meta

    def case(name: str, rows: int, d: int, f: int) -> None:
        known, n_experts = FORMATS[name], 128
        tile = scaled_tile(target, name)
        scale = {torch.float32: "fp32", torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3"}[known.scale]
        code = torch.float8_e4m3fn if known.pack == 1 else torch.uint8

        def packed(*shape: int, block_rows: int) -> Packed:
            form = Format(known.element, (block_rows, known.group), scale, "amax")
            *lead, n, k = shape
            codes = meta(*lead, n, -(-k // known.pack), dtype=code)
            scales = meta(*lead, -(-n // block_rows), -(-k // known.group), dtype=known.scale)
            return Packed(form, codes, scales, meta(*lead[:1], dtype=torch.float32), k)

        source, counts = meta(8 * 24576, dtype=torch.int64), meta(n_experts, dtype=torch.int64)
        x, w = packed(24576, d, block_rows=1), packed(n_experts, f, d, block_rows=rows)
        scaled_varlen_m(x, w, schedule(counts, tile.m), tile, source_R=source)

    names = [name for name in FORMATS if target in TARGETS_OF[name]]
    rows = {"fp8": 128, "mxfp8": 1, "mxfp4": 1, "nvfp4": 16}
    cases = {f"D 1536, F 256, {name}": functools.partial(case, name, rows[name], 1536, 256) for name in names}
    return cases | {f"D 1001, F 333, {name}": functools.partial(case, name, rows[name], 1001, 333) for name in names}
