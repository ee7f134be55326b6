"""Routed experts of quantized numbers: the products of moesaic.kernels.scaled_gemm with what surrounds them in their epilogues.

    up      h_r = factor[e] W_up[e] x_n + b_up[e], n = source[r];  a_r = act(h_r);  a_r cast along its row    codes and scales
    dact    da_r = factor[e] W_down[e]^T dy_n;  dh_r = act'(h_r) w_r da_r;  dw_r = <da_r, a_r> in parts, one a column tile
    sums    db[e] = sum over the rows of e of w_r v_n

`up` writes a in the numbers that the next product reads, never in high precision, where a column tile holds whole blocks of a row
(`fits`): a block's largest magnitude is then in the registers of one program. What is around these products, casts of inputs and
weights and the order of a layer, is in moesaic.moe.native.

Letters: R rows, E experts, D model width, F expert width, G width of h, P column tiles of da; as in moesaic.kernels.experts.
"""

import dataclasses
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.experts import ACTIVATIONS, _activation, dact_quarters
from moesaic.kernels.grouped_gemm import Schedule, describe, find_tile, first_tile, load_rows, row_pointers, schedule
from moesaic.kernels.interpret import jit
from moesaic.kernels.quantize import Format, Packed
from moesaic.kernels.quantize_tile import cast_rows
from moesaic.kernels.quantize_triton import TILE, cast_constants, packed_like, scale_bytes, supported
from moesaic.kernels.scaled_gemm import (
    FORMATS,
    TARGETS_OF,
    for_units,
    format_of,
    multiply_scaled,
    product_options,
    scaled_tile,
    weight_rows,
)
from moesaic.kernels.tiles import Tile, processors, target_name

# ---------------------------------------------------------------- kernels


@jit
def _scaled_up_kernel(
    x, x_scales, source_R, w, w_scales, factor_E, b_up_EG, h_RG, a_codes, a_scales, counts_E, starts_E, tile_ends_E,
    E, F, H, C, B, AC, AB, stride_x, stride_s, stride_e, stride_r, scale_e, scale_r,
    KIND: tl.constexpr, PAIR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr,
    G: tl.constexpr, WN: tl.constexpr, PACK: tl.constexpr, ELEMENT: tl.constexpr, SCALED: tl.constexpr, GROUP: tl.constexpr,
    XCDS: tl.constexpr, DESCRIBED: tl.constexpr, EVEN: tl.constexpr,
    RULE: tl.constexpr, BYTES: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr,
    LARGEST: tl.constexpr, NAN: tl.constexpr, SIGNED_ZERO: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(F, BN)
    tiles = tl.load(tile_ends_E + E - 1) * n_tiles
    for tile in range(first_tile(XCDS), tiles, tl.num_programs(0)):
        expert, row, end, n_tile = find_tile(tile, n_tiles, counts_E, starts_E, tile_ends_E, E, BM, BE, GROUP)
        x_M1, rows, real = row_pointers(x, source_R, row, end, stride_x, BM, True)
        x_scales_M1, _, _ = row_pointers(x_scales, source_R, row, end, stride_s, BM, True)
        f = n_tile * BN
        gate_MN = tl.zeros([BM, BN], tl.float32)
        up_MN = tl.zeros([BM, BN], tl.float32)
        for column in range(0, C, BC):
            x_MK = load_rows(x_M1, column, C, BC, EVEN)
            gate_MN = multiply_scaled(
                gate_MN, x_MK, x_scales_M1, w, w_scales, expert, f, column, H, C, B, stride_e, stride_r, scale_e,
                BN, BC, G, WN, PACK, ELEMENT, SCALED, DESCRIBED, scale_r,
            )  # fmt: skip
            if PAIR:
                up_MN = multiply_scaled(
                    up_MN, x_MK, x_scales_M1, w, w_scales, expert, F + f, column, H, C, B, stride_e, stride_r, scale_e,
                    BN, BC, G, WN, PACK, ELEMENT, SCALED, DESCRIBED, scale_r,
                )  # fmt: skip
        factor = tl.load(factor_E + expert)
        fs = f + tl.arange(0, BN)
        exists = real[:, None] & (fs < F)[None, :]
        places = h_RG + rows[:, None] * H + fs[None, :]
        gate_MN *= factor
        if b_up_EG is not None:
            biases = b_up_EG + expert.to(tl.int64) * H + fs
            gate_MN += tl.load(biases, mask=fs < F, other=0.0).to(tl.float32)[None, :]
        gate = gate_MN.to(h_RG.dtype.element_ty)
        tl.store(places, gate, mask=exists)
        a_MN, _ = _activation(gate.to(tl.float32), KIND)
        if PAIR:
            up_MN *= factor
            if b_up_EG is not None:
                up_MN += tl.load(biases + F, mask=fs < F, other=0.0).to(tl.float32)[None, :]
            up = up_MN.to(h_RG.dtype.element_ty)
            tl.store(places + F, up, mask=exists)
            a_MN *= up.to(tl.float32)
        # Past column F, W has no up rows, and a is 0.
        cast_rows(
            a_MN, rows, fs, rows, a_codes, a_scales, rows, real, f, AC, AB, BM, BN, G, RULE, BYTES, "even", 0, EXPONENT,
            MANTISSA, LEAST, LARGEST, NAN, PACK, "ieee", SIGNED_ZERO,
        )  # fmt: skip


@jit
def _scaled_dact_kernel(
    dy, dy_scales, source_R, w, w_scales, factor_E, h_RG, weights_R, dh_RG, a_RF, parts_RP, counts_E, starts_E, tile_ends_E,
    E, F, H, C, B, stride_y, stride_s, stride_e, stride_r, scale_e, scale_r,
    KIND: tl.constexpr, PAIR: tl.constexpr, STORED: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr,
    G: tl.constexpr, WN: tl.constexpr, PACK: tl.constexpr, ELEMENT: tl.constexpr, SCALED: tl.constexpr, GROUP: tl.constexpr,
    XCDS: tl.constexpr, DESCRIBED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(F, BN)
    tiles = tl.load(tile_ends_E + E - 1) * n_tiles
    for tile in range(first_tile(XCDS), tiles, tl.num_programs(0)):
        expert, row, end, n_tile = find_tile(tile, n_tiles, counts_E, starts_E, tile_ends_E, E, BM, BE, GROUP)
        dy_M1, rows, real = row_pointers(dy, source_R, row, end, stride_y, BM, True)
        dy_scales_M1, _, _ = row_pointers(dy_scales, source_R, row, end, stride_s, BM, True)
        f = n_tile * BN
        da_MN = tl.zeros([BM, BN], tl.float32)
        for column in range(0, C, BC):
            dy_MK = load_rows(dy_M1, column, C, BC, EVEN)
            da_MN = multiply_scaled(
                da_MN, dy_MK, dy_scales_M1, w, w_scales, expert, f, column, F, C, B, stride_e, stride_r, scale_e,
                BN, BC, G, WN, PACK, ELEMENT, SCALED, DESCRIBED, scale_r,
            )  # fmt: skip
        da_MN *= tl.load(factor_E + expert)
        w_M1 = tl.load(weights_R + rows, mask=real, other=0.0)[:, None]
        part_M = dact_quarters(
            da_MN, w_M1, h_RG + row * H, dh_RG + row * H, a_RF + row * F, (end - row).to(tl.int32), f, F, H, KIND, PAIR, BM, BN,
            WHOLE, STORED,
        )  # fmt: skip
        tl.store(parts_RP + rows * n_tiles + n_tile, part_M, mask=real)


@jit
def _sums_kernel(
    v, source_R, weights_R, out_EP, counts_E, starts_E, P, stride, BR: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    ps = tl.program_id(0) * BP + tl.arange(0, BP)
    start = tl.load(starts_E + expert)
    count = tl.load(counts_E + expert).to(tl.int32)
    total_P = tl.zeros([BP], tl.float32)
    for r in range(0, count, BR):
        real = r + tl.arange(0, BR) < count
        rows = start + r + tl.arange(0, BR)
        places = tl.load(source_R + rows, mask=real, other=0) if source_R is not None else rows
        values = tl.load(v + places[:, None] * stride + ps[None, :], mask=real[:, None] & (ps < P)[None, :], other=0.0)
        values = values.to(tl.float32)
        if weights_R is not None:
            values *= tl.load(weights_R + rows, mask=real, other=0.0)[:, None]
        total_P += tl.sum(values, axis=0)
    tl.store(out_EP + expert * P + ps, total_P, mask=ps < P)


# ---------------------------------------------------------------- launchers


def up_tile(target: str | torch.device, name: str, even: bool) -> Tile:
    """Of `up`: as wide as a block of a's row, and with two accumulators for the gated kinds. even: whether rows of h begin at
    multiples of 16 bytes; if not, their addresses take registers."""
    tile = scaled_tile(target, name)
    if name == "fp8":
        return dataclasses.replace(tile, m=tile.m if target_name(target) == "cpu" else 64, n=128)
    return dataclasses.replace(tile, n=64 if even else 32)


def fits(form: Format, f: int, activation: str) -> bool:
    """Whether `up` casts a of F columns to this format: natively, in whole blocks of a tile. Of fp8, a tile of W_up's gate rows
    and one of its up rows must each have one scale."""
    whole = supported(form) and form.block[0] == 1 and form.scale != "e4m3" and form.rule != "quest"
    return whole and (form.block[1] < 128 or activation == "relu2" or f % 128 == 0)


def scaled_up(
    x: Packed, source_R: Tensor, w: Packed, b_up_EG: Tensor | None, counts_E: Tensor, plan: Schedule, form: Format,
    activation: str, dtype: torch.dtype,
) -> tuple[Tensor, Packed]:  # fmt: skip
    """(h_RG of `dtype`, a cast along its rows to `form`, of x's format).

    x of inputs, read through source_R; w (E, G, D). Rows past the last expert's are left as they are in memory. Raises ValueError
    as `scaled_varlen_m`.
    """
    (n_experts, g, _), device, pair = w.codes.shape, x.codes.device, activation != "relu2"
    f, n_rows = g // 2 if pair else g, source_R.numel()
    name = format_of(x)
    assert fits(form, f, activation) and activation in ACTIVATIONS and FORMATS[name].group == form.block[1], (form, f)
    tile = up_tile(device, name, f * dtype.itemsize % 16 == 0)
    plan = plan if plan.m == tile.m else schedule(counts_E, tile.m)
    options = product_options(x, w, tile, 16, 16)
    (x_codes, x_scales, one), (w_codes, w_scales, other) = (for_units(v, FORMATS[name]) for v in (x, w))
    factor_E = (x.factor * w.factor).expand(n_experts).mul(one * other).contiguous()
    constants = cast_constants(form, device)
    h_RG = torch.empty(n_rows, g, dtype=dtype, device=device)
    codes = torch.empty(n_rows, -(-f // constants["PACK"]), dtype=torch.uint8, device=device)
    scales = torch.empty(n_rows, -(-f // form.block[1]), dtype=scale_bytes(form), device=device)
    described, is_described = describe(w_codes, options["BN"], options["BC"])
    _scaled_up_kernel[processors(device),](
        x_codes, x_scales, source_R, described, w_scales, factor_E, b_up_EG, h_RG, codes, scales,
        plan.counts_E, plan.starts_E, plan.tile_ends_E, n_experts, f, g, x_codes.shape[1], x.scales.shape[1], *codes.shape[1:],
        *scales.shape[1:], x_codes.stride(0), x_scales.stride(0), w_codes.stride(0), w_codes.stride(1), w_scales.stride(0),
        w_scales.stride(1), KIND=activation, PAIR=pair, BE=triton.next_power_of_2(n_experts), WN=weight_rows(w, options["BN"]),
        DESCRIBED=is_described, EVEN=x_codes.shape[1] % options["BC"] == 0, **constants | options,
    )  # fmt: skip
    return h_RG, packed_like(form, codes, scales, f)


def dact_tile(target: str | torch.device, name: str, activation: str) -> Tile:
    """Around dact's product there is more to hold than registers for 128 columns on AMD, and of fp8, which adds up in fp32, with
    two halves of h."""
    tile = scaled_tile(target, name)
    narrow = target_name(target).startswith("gfx") or (name == "fp8" and activation != "relu2")
    return dataclasses.replace(tile, n=64) if narrow else tile


def scaled_dact(
    dy: Packed,
    source_R: Tensor,
    w: Packed,
    h_RG: Tensor,
    weights_R: Tensor,
    plan: Schedule,
    activation: str,
    stored: str,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dh_RG as h, a_RF if `stored` is a, parts_RP of the gradients of weights_R, fp32).

    dy of inputs, read through source_R; w (E, F, D) or deeper. Rows past the last expert's are left as they are in memory, but 0
    in parts. Raises ValueError as `scaled_varlen_m`.
    """
    (n_experts, f, _), device = w.codes.shape, dy.codes.device
    name, h = format_of(dy), h_RG.shape[1]
    tile = dact_tile(device, name, activation)
    options = product_options(dy, w, tile, f, h_RG.element_size())
    (dy_codes, dy_scales, one), (w_codes, w_scales, other) = (for_units(v, FORMATS[name]) for v in (dy, w))
    factor_E = (dy.factor * w.factor).expand(n_experts).mul(one * other).contiguous()
    dh_RG, a_RF = torch.empty_like(h_RG), h_RG.new_empty(h_RG.shape[0], f) if stored else None
    bn, columns = options["BN"], dy_codes.shape[1]
    parts_RP = torch.zeros(h_RG.shape[0], triton.cdiv(f, bn), device=device)
    described, is_described = describe(w_codes, bn, options["BC"])
    _scaled_dact_kernel[processors(device),](
        dy_codes, dy_scales, source_R, described, w_scales, factor_E, h_RG, weights_R, dh_RG, h_RG if a_RF is None else a_RF,
        parts_RP, plan.counts_E, plan.starts_E, plan.tile_ends_E, n_experts, f, h, columns, dy.scales.shape[1],
        dy_codes.stride(0), dy_scales.stride(0), w_codes.stride(0), w_codes.stride(1), w_scales.stride(0), w_scales.stride(1),
        KIND=activation, PAIR=activation != "relu2", STORED=stored, WHOLE=f % bn == 0, BE=triton.next_power_of_2(n_experts),
        WN=weight_rows(w, bn), DESCRIBED=is_described, EVEN=columns % options["BC"] == 0, **options,
    )  # fmt: skip
    return dh_RG, a_RF, parts_RP


def expert_sums(v: Tensor, plan: Schedule, source_R: Tensor | None = None, weights_R: Tensor | None = None) -> Tensor:
    """fp32 (E, P): of the rows v (R, P), or of those read through source_R, each times its weight. In a fixed order."""
    n_experts, p = plan.counts_E.numel(), v.shape[1]
    out_EP = torch.empty(n_experts, p, device=v.device)
    _sums_kernel[triton.cdiv(p, 64), n_experts](
        v, source_R, weights_R, out_EP, plan.counts_E, plan.starts_E, p, v.stride(0), BR=64, BP=64, num_warps=4
    )
    return out_EP


# ---------------------------------------------------------------- ahead of time


def compile_cases(target: str) -> Any:
    """What moesaic.kernels.targets compiles, of a layer of D 1536, F 256, 128 experts, and one of odd widths."""
    from moesaic.kernels.targets import meta

    def case(name: str, activation: str, biased: bool, d: int = 1536, f: int = 256) -> None:
        known, n_experts, rows, g = FORMATS[name], 128, 8 * 24576, f if activation == "relu2" else 2 * f
        scale, rule = ("pow2", "rceil") if name == "fp8" else ("e8m0", "rceil")
        code = torch.float8_e4m3fn if known.pack == 1 else torch.uint8
        square = 128 if name == "fp8" else 1

        def packed(*shape: int, block_rows: int = 1) -> Packed:
            *lead, n, k = shape
            codes, scales = (n, -(-k // known.pack)), (-(-n // block_rows), -(-k // known.group))
            form = Format(known.element, (block_rows, known.group), scale, rule)
            return Packed(form, meta(*lead, *codes, dtype=code), meta(*lead, *scales, dtype=known.scale),
                          meta(*lead[:1], dtype=torch.float32), k)  # fmt: skip

        source, weights = meta(rows, dtype=torch.int64), meta(rows, dtype=torch.float32)
        plan = schedule(meta(n_experts, dtype=torch.int64), TILE)
        form = Format(known.element, (1, known.group), scale, rule)
        b_up = meta(n_experts, g, dtype=torch.float32) if biased else None
        w_up, w_down = packed(n_experts, g, d, block_rows=square), packed(n_experts, f, d, block_rows=square)
        if fits(form, f, activation):
            scaled_up(packed(24576, d), source, w_up, b_up, plan.counts_E, plan, form, activation, torch.bfloat16)
        h = meta(rows, g)
        stored = "" if name == "fp8" and d < 2048 else "a"
        scaled_dact(packed(24576, d), source, w_down, h, weights, plan, activation, stored)
        if biased:
            expert_sums(h, plan, source, weights)

    names = [name for name in ("fp8", "mxfp8", "mxfp4") if target in TARGETS_OF[name]]
    cases = {f"swiglu, {name}": functools.partial(case, name, "swiglu", False) for name in names}
    cases |= {f"{kind}, fp8": functools.partial(case, "fp8", kind, False) for kind in ACTIVATIONS if kind != "swiglu"}
    cases |= {
        f"swiglu, {name}, D 1001, F 333": functools.partial(case, name, "swiglu", False, 1001, 333) for name in names
    }
    # Widths of DeepSeek-V3, and of a smaller model, of which 1408 is no power of two times a tile.
    for d, f in ((7168, 2048), (2048, 1408)):
        cases |= {
            f"swiglu, {name}, D {d}, F {f}": functools.partial(case, name, "swiglu", False, d, f) for name in names
        }
    return cases | {"geglu, fp8, biases": functools.partial(case, "fp8", "geglu", True)}
