"""Routed experts as one operation of grouped products (moesaic.kernels.grouped_gemm) with what surrounds them in their epilogues.

    forward     for row r of expert e, x = input[source[r]]:
      up          h_r = W_up[e] x + b_up[e]      G values: gate, then up, for the gated kinds (G = 2F); relu2: G = F
                  a_r = act(h_r)                 swiglu silu(gate) up; geglu gelu(gate) up; reglu relu(gate) up; relu2 relu(h)^2
      down        y_r = W_down[e] a_r + b_down[e]
      combine     output[n] = sum over input n's rows, in slot order, of w_r y_r
    backward    for row r, dy = doutput[source[r]]:
      dact        da_r = W_down[e]^T dy;  a_r again from h_r;  a'_r = w_r a_r;  dh_r = act'(h_r) w_r da_r
                  dw_r = <da_r, a_r> + <dy, b_down[e]>       in parts, one a column tile
      dx          dx~_r = W_up[e]^T dh_r;  dw_r = the sum of its parts, in a fixed order
      dw_down     dW_down[e] = sum over its rows of dy a'_r^T;  db_down[e] = sum of w_r dy
      dw_up       dW_up[e] = sum over its rows of dh_r x^T;  db_up[e] = sum of dh_r
      combine     dinput[n] = sum over input n's rows of dx~_r

Eight launches, and one a direction for the schedule. Kept for backward: the input, h, and the rows' indices and weights. Neither
the gathered input, nor a, nor y: <da_r, a_r> is the gradient of w_r because y is linear in a (SonicMoE, arXiv 2512.14080,
equation 10). Products are added in fp32, and act and its derivative are computed in fp32 from h as it is stored. y and dx~ are
made in column chunks, where they would be large.

Letters: N input rows, R routed rows, E experts, D model width, F expert width, G width of h, P column tiles of da.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.combine import combine
from moesaic.kernels.grouped_gemm import (
    Schedule,
    describe,
    find_tile,
    first_tile,
    launch_options,
    load_rows,
    row_pointers,
    rows_by_weight,
    schedule,
    varlen_k,
    varlen_m,
)
from moesaic.kernels.interpret import jit
from moesaic.kernels.tiles import Tile, gemm_tile, target_name

GATED = ("swiglu", "geglu", "reglu")
ACTIVATIONS = (*GATED, "relu2")

# ---------------------------------------------------------------- the specification


def up_reference(
    x_ND: Tensor, source_R: Tensor, w_up_EGD: Tensor, b_up_EG: Tensor | None, counts_E: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """(h_RG, a_RF) in plain differentiable torch of any floating type; rows past the last expert's are not there."""
    parts = source_R[: int(counts_E.sum())].split(counts_E.tolist())
    h_RG = torch.cat([x_ND[part] @ w.T for part, w in zip(parts, w_up_EGD, strict=True)])
    if b_up_EG is not None:
        h_RG = h_RG + b_up_EG.repeat_interleave(counts_E, dim=0)
    if activation == "relu2":
        return h_RG, h_RG.relu().square()
    gate, up = h_RG.chunk(2, dim=1)
    gates: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}
    return h_RG, gates[activation](gate) * up


def experts_reference(
    x_ND: Tensor, weights_R: Tensor, w_up_EGD: Tensor, w_down_EDF: Tensor, b_up_EG: Tensor | None, b_down_ED: Tensor | None,
    source_R: Tensor, counts_E: Tensor, activation: str,
) -> Tensor:  # fmt: skip
    """The whole operation; sums over an input's rows in any order."""
    _, a_RF = up_reference(x_ND, source_R, w_up_EGD, b_up_EG, counts_E, activation)
    y_RD = torch.cat([a @ w.T for a, w in zip(a_RF.split(counts_E.tolist()), w_down_EDF, strict=True)])
    if b_down_ED is not None:
        y_RD = y_RD + b_down_ED.repeat_interleave(counts_E, dim=0)
    used = y_RD.shape[0]
    return torch.zeros_like(x_ND).index_add(0, source_R[:used], y_RD * weights_R[:used, None].to(y_RD.dtype))


# ---------------------------------------------------------------- kernels


@jit
def _activation(gate, KIND: tl.constexpr):
    """(value, slope) at a gate, fp32."""
    if KIND == "swiglu":
        s = tl.sigmoid(gate)
        value = gate * s
        slope = s + value * (1 - s)
    elif KIND == "geglu":
        cdf = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
        value = gate * cdf
        slope = cdf + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    elif KIND == "reglu":
        value = tl.maximum(gate, 0.0)
        slope = tl.where(gate > 0, 1.0, 0.0)
    else:
        relu = tl.maximum(gate, 0.0)
        value = relu * relu
        slope = 2 * relu
    return value, slope


@jit
def store_activated(
    gate_MN, up_MN, h_RG, a_RF, rows, exists, fs, F, G, KIND: tl.constexpr, PAIR: tl.constexpr
):  # fmt: skip
    """Columns fs of h, and of a as it follows from h as it is stored, where they exist."""
    places = h_RG + rows[:, None] * G + fs[None, :]
    gate = gate_MN.to(h_RG.dtype.element_ty)
    tl.store(places, gate, mask=exists)
    a_MN, _ = _activation(gate.to(tl.float32), KIND)
    if PAIR:
        up = up_MN.to(h_RG.dtype.element_ty)
        tl.store(places + F, up, mask=exists)
        a_MN *= up.to(tl.float32)
    tl.store(a_RF + rows[:, None] * F + fs[None, :], a_MN.to(a_RF.dtype.element_ty), mask=exists)


@jit
def _up_kernel(
    x_ND, source_R, w_up, b_up_EG, h_RG, a_RF, counts_E, starts_E, tile_ends_E, E, F, D, G, stride_x, stride_e, stride_r,
    KIND: tl.constexpr, PAIR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr,
    GROUP: tl.constexpr, XCDS: tl.constexpr, DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(F, BN)
    tiles = tl.load(tile_ends_E + E - 1) * n_tiles
    for tile in range(first_tile(XCDS), tiles, tl.num_programs(0)):
        expert, row, end, n_tile = find_tile(tile, n_tiles, counts_E, starts_E, tile_ends_E, E, BM, BE, GROUP)
        x_M1, rows, real = row_pointers(x_ND, source_R, row, end, stride_x, BM, True)
        f = n_tile * BN
        gate_MN, up_MN = rows_by_weight(
            x_M1, w_up, expert, f, F + f, G, D, stride_e, stride_r, BM, BN, BK, PAIR, False, DESCRIBED, EVEN, PRECISION
        )
        fs = f + tl.arange(0, BN)
        exists = real[:, None] & (fs < F)[None, :]
        if b_up_EG is not None:
            biases = b_up_EG + expert.to(tl.int64) * G + fs
            gate_MN += tl.load(biases, mask=fs < F, other=0.0).to(tl.float32)[None, :]
            if PAIR:
                up_MN += tl.load(biases + F, mask=fs < F, other=0.0).to(tl.float32)[None, :]
        store_activated(gate_MN, up_MN, h_RG, a_RF, rows, exists, fs, F, G, KIND, PAIR)


@jit
def _halves(x_MN, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right columns."""
    return x_MN.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()


@jit
def _dact_columns(
    da_MN, w_M1, h, dh, a, count, f, F, G, KIND: tl.constexpr, PAIR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WHOLE: tl.constexpr, STORED: tl.constexpr = "a'",
):  # fmt: skip
    """What follows from da in columns f of a tile with `count` rows, to the first of which h, dh and a point: dh, stored, with
    a', a or neither, as STORED says, and sums <da, a>."""
    fs = f + tl.arange(0, BN)
    row = tl.arange(0, BM)
    inside = row[:, None] < count if WHOLE else (row[:, None] < count) & (fs < F)[None, :]
    # Rows past the end load the last one's values instead of a mask's, which takes registers; nobody stores what comes of it.
    places = tl.minimum(row, count - 1)[:, None] * G + fs[None, :]
    gate = (tl.load(h + places) if WHOLE else tl.load(h + places, mask=(fs < F)[None, :], other=0.0)).to(tl.float32)
    a_MN, slope_MN = _activation(gate, KIND)
    dgate_MN = da_MN * w_M1
    if PAIR:
        up = tl.load(h + places + F) if WHOLE else tl.load(h + places + F, mask=(fs < F)[None, :], other=0.0)
        tl.store(dh + places + F, (dgate_MN * a_MN).to(dh.dtype.element_ty), mask=inside)
        dgate_MN *= up.to(tl.float32)
        a_MN *= up.to(tl.float32)
    tl.store(dh + places, (dgate_MN * slope_MN).to(dh.dtype.element_ty), mask=inside)
    if STORED != "":
        kept_MN = a_MN * w_M1 if STORED == "a'" else a_MN
        tl.store(a + row[:, None] * F + fs[None, :], kept_MN.to(a.dtype.element_ty), mask=inside)
    return tl.sum(da_MN * a_MN, axis=1)  # past column F, both are 0


@jit
def dact_quarters(
    da_MN, w_M1, h, dh, a, count, f, F, G, KIND: tl.constexpr, PAIR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WHOLE: tl.constexpr, STORED: tl.constexpr = "a'",
):  # fmt: skip
    """`_dact_columns` of a whole tile, a few columns at a time: for all at once, what is around the product doesn't fit into
    registers."""
    part_M = tl.zeros([BM], tl.float32)
    low, high = _halves(da_MN, BM, BN)
    for half in tl.static_range(2):
        one, two = _halves(high if half else low, BM, BN // 2)
        for quarter in tl.static_range(2):
            part_M += _dact_columns(
                two if quarter else one, w_M1, h, dh, a, count, f + (2 * half + quarter) * (BN // 4), F, G, KIND, PAIR, BM,
                BN // 4, WHOLE, STORED,
            )  # fmt: skip
    return part_M


@jit
def _dact_kernel(
    dy_ND, source_R, w_down, b_down_ED, h_RG, weights_R, dh_RG, a_RF, parts_RP, counts_E, starts_E, tile_ends_E,
    E, F, D, G, stride_dy, stride_e, stride_r,
    KIND: tl.constexpr, PAIR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr,
    GROUP: tl.constexpr, XCDS: tl.constexpr, DESCRIBED: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(F, BN)
    tiles = tl.load(tile_ends_E + E - 1) * n_tiles
    for tile in range(first_tile(XCDS), tiles, tl.num_programs(0)):
        expert, row, end, n_tile = find_tile(tile, n_tiles, counts_E, starts_E, tile_ends_E, E, BM, BE, GROUP)
        dy_M1, rows, real = row_pointers(dy_ND, source_R, row, end, stride_dy, BM, True)
        f = n_tile * BN
        da_MN, _ = rows_by_weight(
            dy_M1, w_down, expert, f, f, F, D, stride_e, stride_r, BM, BN, BK, False, True, DESCRIBED, EVEN, PRECISION
        )
        w_M1 = tl.load(weights_R + rows, mask=real, other=0.0)[:, None]
        part_M = dact_quarters(
            da_MN, w_M1, h_RG + row * G, dh_RG + row * G, a_RF + row * F, (end - row).to(tl.int32), f, F, G, KIND, PAIR, BM, BN,
            WHOLE,
        )  # fmt: skip
        if b_down_ED is not None and n_tile == 0:
            for k in range(0, D, BK):
                dy_MK = load_rows(dy_M1, k, D, BK, EVEN).to(tl.float32)
                ks = k + tl.arange(0, BK)
                b_K = tl.load(b_down_ED + expert.to(tl.int64) * D + ks, mask=ks < D, other=0.0).to(tl.float32)
                part_M += tl.sum(dy_MK * b_K[None, :], axis=1)
        tl.store(parts_RP + rows * n_tiles + n_tile, part_M, mask=real)


# ---------------------------------------------------------------- launchers


def up(
    x_ND: Tensor, source_R: Tensor, w_up_EGD: Tensor, b_up_EG: Tensor | None, plan: Schedule, tile: Tile, activation: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(h_RG, a_RF) of the rows x_ND[source_R]; rows past the last expert's are left as they are in memory."""
    pair = activation != "relu2"
    n_rows, n_experts, (g, d) = source_R.numel(), w_up_EGD.shape[0], w_up_EGD.shape[1:]
    f = g // 2 if pair else g
    h_RG, a_RF = x_ND.new_empty(n_rows, g), x_ND.new_empty(n_rows, f)
    grid, options = launch_options(tile, x_ND, w_up_EGD)
    if pair:  # two accumulators of half the columns
        options["BN"] //= 2
    w, described = describe(w_up_EGD, options["BN"], options["BK"])
    _up_kernel[grid](
        x_ND, source_R, w, b_up_EG, h_RG, a_RF, plan.counts_E, plan.starts_E, plan.tile_ends_E, n_experts, f, d, g,
        x_ND.stride(0), w_up_EGD.stride(0), w_up_EGD.stride(1), KIND=activation, PAIR=pair,
        BE=triton.next_power_of_2(n_experts), DESCRIBED=described, EVEN=d % options["BK"] == 0, **options,
    )  # fmt: skip
    return h_RG, a_RF


def dact(
    dy_ND: Tensor, source_R: Tensor, w_down_EDF: Tensor, b_down_ED: Tensor | None, h_RG: Tensor, weights_R: Tensor,
    plan: Schedule, tile: Tile, activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dh_RG, a'_RF, parts_RP of the gradients of weights_R, fp32)."""
    n_rows, (n_experts, d, f) = source_R.numel(), w_down_EDF.shape
    grid, options = launch_options(tile, dy_ND, w_down_EDF)
    dh_RG, a_RF = torch.empty_like(h_RG), h_RG.new_empty(n_rows, f)
    parts_RP = weights_R.new_empty(n_rows, triton.cdiv(f, options["BN"]))
    w, described = describe(w_down_EDF, options["BK"], options["BN"])
    _dact_kernel[grid](
        dy_ND, source_R, w, b_down_ED, h_RG, weights_R, dh_RG, a_RF, parts_RP, plan.counts_E, plan.starts_E, plan.tile_ends_E,
        n_experts, f, d, h_RG.shape[1], dy_ND.stride(0), w_down_EDF.stride(0), w_down_EDF.stride(1), KIND=activation,
        PAIR=activation != "relu2", BE=triton.next_power_of_2(n_experts), DESCRIBED=described, EVEN=d % options["BK"] == 0,
        WHOLE=f % options["BN"] == 0, **options,
    )  # fmt: skip
    return dh_RG, a_RF, parts_RP


def _forward(
    x_ND: Tensor, weights_R: Tensor, w_up_EGD: Tensor, w_down_EDF: Tensor, b_up_EG: Tensor | None, b_down_ED: Tensor | None,
    source_R: Tensor, bag: Tensor, starts: Tensor | None, counts_E: Tensor, activation: str, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (up_tile, _, down_tile), d = _tiles(x_ND, w_up_EGD, w_down_EDF, activation), x_ND.shape[1]
    plan = schedule(counts_E, up_tile.m)
    h_RG, a_RF = up(x_ND, source_R, w_up_EGD, b_up_EG, plan, up_tile, activation)
    out = []
    for c in (slice(first, min(first + chunk, d)) for first in range(0, d, chunk)):
        bias = None if b_down_ED is None else b_down_ED[:, c].contiguous()
        y_Rd, _ = varlen_m(a_RF, w_down_EDF[:, c], plan, down_tile, bias_EN=bias)
        out.append(combine(y_Rd, bag, starts, weights_R))
    return (out[0] if len(out) == 1 else torch.cat(out, dim=1)), h_RG


def _backward(
    dy_ND: Tensor, x_ND: Tensor, h_RG: Tensor, weights_R: Tensor, w_up_EGD: Tensor, w_down_EDF: Tensor, b_down_ED: Tensor | None,
    source_R: Tensor, bag: Tensor, starts: Tensor | None, counts_E: Tensor, activation: str, chunk: int,
) -> list[Tensor]:  # fmt: skip
    """[dx_ND, dweights_R, dw_up_EGD, dw_down_EDF] and, with biases, [db_up_EG, db_down_ED]."""
    (_, act_tile, dx_tile), d = _tiles(x_ND, w_up_EGD, w_down_EDF, activation), x_ND.shape[1]
    k_tile, biased = gemm_tile(x_ND.device, "varlen_k", d), b_down_ED is not None
    plan = schedule(counts_E, act_tile.m)
    dh_RG, a_RF, parts_RP = dact(dy_ND, source_R, w_down_EDF, b_down_ED, h_RG, weights_R, plan, act_tile, activation)
    dw_down, db_down = varlen_k(dy_ND, a_RF, plan, k_tile, source_R, gather="left", sums=biased, weights_R=weights_R)
    del a_RF
    dw_up, db_up = varlen_k(dh_RG, x_ND, plan, k_tile, source_R, gather="right", sums=biased)
    out, dweights_R = [], weights_R
    for first in range(0, d, chunk):
        w = w_up_EGD[:, :, first : first + chunk]
        dx_Rd, sums = varlen_m(dh_RG, w, plan, dx_tile, transposed=True, parts_RP=None if first else parts_RP)
        dweights_R = dweights_R if sums is None else sums
        out.append(combine(dx_Rd, bag, starts))
    dx_ND = out[0] if len(out) == 1 else torch.cat(out, dim=1)
    return [dx_ND, dweights_R, dw_up, dw_down] + ([db_up, db_down] if db_up is not None and db_down is not None else [])


def _tiles(x_ND: Tensor, w_up_EGD: Tensor, w_down_EDF: Tensor, activation: str) -> tuple[Tile, Tile, Tile]:
    """Of varlen_m products with results as wide as h, a and x. One M for all: the schedule counts in it.

    Around dact's product there is more to hold than registers for 128 columns: on AMD, and of fp32, it gets the narrow tile. The
    constants of erf take AMD's scalar registers, until one stage is left.
    """
    amd = target_name(x_ND.device).startswith("gfx")
    widths = (w_up_EGD.shape[1], 0 if amd or x_ND.dtype == torch.float32 else w_down_EDF.shape[2], x_ND.shape[1])
    h, a, x = (gemm_tile(x_ND.device, "varlen_m", width) for width in widths)
    return h, dataclasses.replace(a, stages=1) if amd and activation == "geglu" else a, x


# ---------------------------------------------------------------- one operation for autograd, torch.compile and FSDP

_op = torch.library.custom_op("moesaic::experts", _forward, mutates_args=())
_op_backward = torch.library.custom_op("moesaic::experts_backward", _backward, mutates_args=())


@_op.register_fake
def _(x_ND: Tensor, weights_R: Tensor, w_up_EGD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_ND), x_ND.new_empty(weights_R.shape[0], w_up_EGD.shape[1])


@_op_backward.register_fake
def _(
    dy_ND: Tensor, x_ND: Tensor, h_RG: Tensor, weights_R: Tensor, w_up_EGD: Tensor, w_down_EDF: Tensor, b_down_ED: Tensor | None,
    *rest: Any,
) -> list[Tensor]:  # fmt: skip
    grads = [torch.empty_like(like) for like in (x_ND, weights_R, w_up_EGD, w_down_EDF)]
    return grads if b_down_ED is None else [*grads, w_up_EGD.new_empty(w_up_EGD.shape[:2]), torch.empty_like(b_down_ED)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_ND, weights_R, w_up, w_down, _, b_down, source_R, bag, starts, counts_E, ctx.activation, ctx.chunk = inputs
    ctx.save_for_backward(x_ND, output[1], weights_R, w_up, w_down, b_down, source_R, bag, starts, counts_E)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dy_ND: Tensor, _dh: Any) -> tuple[Tensor | None, ...]:
    grads = _op_backward(dy_ND.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.chunk)
    return (*grads, *[None] * (12 - len(grads)))


_op.register_autograd(_differentiate, setup_context=_save)


def experts(
    x_ND: Tensor, weights_R: Tensor, w_up_EGD: Tensor, w_down_EDF: Tensor, b_up_EG: Tensor | None, b_down_ED: Tensor | None,
    source_R: Tensor, bag: Tensor, starts: Tensor | None, counts_E: Tensor, activation: str, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """output_ND. Differentiable in the first six.

    x_ND, weights and biases of one type: bf16, fp16 or fp32; weights_R of any. Biases: both or none. source_R, bag, starts and
    counts_E as in moesaic.kernels.permute.Rows. chunk: columns of y and dx~ made at a time, a multiple of 8; all, if None.
    """
    assert x_ND.dtype in (torch.bfloat16, torch.float16, torch.float32), x_ND.dtype
    assert activation in ACTIVATIONS and (b_up_EG is None) == (b_down_ED is None), activation
    y_ND, _ = _op(
        x_ND.contiguous(), weights_R.float().contiguous(), w_up_EGD.contiguous(), w_down_EDF.contiguous(), b_up_EG, b_down_ED,
        source_R, bag, starts, counts_E, activation, chunk or x_ND.shape[1],
    )  # fmt: skip
    return y_ND


# ---------------------------------------------------------------- ahead of time


def compile_cases(target: str) -> Any:
    """What moesaic.kernels.targets compiles, of a layer of D 1536, F 256, 128 experts, and one of odd widths."""
    from moesaic.kernels.targets import meta

    def case(activation: str, dtype: torch.dtype, biased: bool, d: int = 1536, f: int = 256) -> None:
        n_experts, rows, g = 128, 8 * 24576, f if activation == "relu2" else 2 * f
        x, source, weights = meta(24576, d, dtype=dtype), meta(rows, dtype=torch.int64), meta(rows, dtype=torch.float32)
        w_up, w_down, h = (meta(*shape, dtype=dtype) for shape in ((n_experts, g, d), (n_experts, d, f), (rows, g)))
        b_up, b_down = (meta(n_experts, width, dtype=dtype) if biased else None for width in (g, d))
        up_tile, act_tile, _ = _tiles(x, w_up, w_down, activation)
        plan = schedule(meta(n_experts, dtype=torch.int64), up_tile.m)
        up(x, source, w_up, b_up, plan, up_tile, activation)
        dact(x, source, w_down, b_down, h, weights, plan, act_tile, activation)

    cases = {f"{kind}, bf16": functools.partial(case, kind, torch.bfloat16, False) for kind in ACTIVATIONS}
    cases |= {f"swiglu, {name}": functools.partial(case, "swiglu", dtype, False) for name, dtype in
              (("fp16", torch.float16), ("fp32", torch.float32))}  # fmt: skip
    cases["geglu, bf16, biases"] = functools.partial(case, "geglu", torch.bfloat16, True)
    cases["swiglu, bf16, D 7168, F 2048"] = functools.partial(case, "swiglu", torch.bfloat16, False, 7168, 2048)
    cases["swiglu, bf16, D 1001, F 333"] = functools.partial(case, "swiglu", torch.bfloat16, False, 1001, 333)
    return cases
