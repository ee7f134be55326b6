"""Layers of low precision on matrix units: what moesaic.moe.low emulates, by kernels that read codes and scales.

The same casts of the same tensors in the same order as there, and products by moesaic.kernels.scaled_gemm: what goes in is equal
bit by bit, sums are in another order. In what hardware reads, not in fp32, are: every operand of a product; a, which the product
before writes as codes where its tile holds whole blocks; what backward reads of a recipe with source=fprop. h and, on its way to
its casts, dh are of the compute type, where the emulation keeps fp32.

A cast is one launch, and serves every product that reads it: x of N inputs is cast before it is gathered; dh along rows and
columns at once; a weight's square blocks both ways. **Cast by the emulation's torch functions**, then multiplied natively: rules
quest and four_six, rounding eden, and casts of 4-bit casts (quartet, quartet2). The host waits for nothing.

Letters: as in moesaic.moe.low.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.kernels.combine import combine
from moesaic.kernels.grouped_gemm import Schedule, schedule
from moesaic.kernels.permute import Rows
from moesaic.kernels.quantize import Format, Packed, key_of, pack
from moesaic.kernels.quantize_triton import TILE, quantize_squares, quantize_tiles, supported
from moesaic.kernels.scaled_experts import expert_sums, fits, scaled_dact, scaled_up
from moesaic.kernels.scaled_formats import name_of
from moesaic.kernels.scaled_gemm import (
    by_column,
    gradient_tile,
    scaled_tile,
    scaled_varlen_k,
    scaled_varlen_m,
    transposed,
)
from moesaic.moe.experts import activate, activate_backward
from moesaic.moe.low import Low, Weight, pack_bits, unpack_bits

# ---------------------------------------------------------------- casts


class Cast(NamedTuple):
    """What is multiplied, and what its cast did not clip, where it tells."""

    packed: Packed
    trusted: Tensor | None = None


class Plan(NamedTuple):
    """Of R rows sorted by expert: their schedule, the expert of each, and the numbers that chance depends on, int64 (R,)."""

    schedule: Schedule
    expert_R: Tensor
    ids_R: Tensor

    def real(self) -> Tensor:
        """bool (R, 1), the rows of an expert: what is behind them is padding, whose memory nobody wrote."""
        return (torch.arange(self.ids_R.numel(), device=self.ids_R.device) < self.schedule.counts_E.sum())[:, None]


def one_group(ids_N: Tensor) -> Plan:
    """Of N rows without experts."""
    counts = torch.full((1,), ids_N.numel(), dtype=torch.int64, device=ids_N.device)
    return Plan(schedule(counts, TILE), torch.zeros_like(ids_N), ids_N)


def groups(e: int, n: int, device: torch.device) -> Schedule:
    """Of E matrices of N rows each."""
    return schedule(torch.full((e,), n, dtype=torch.int64, device=device), TILE)


def of_emulation(low: Low) -> Cast:
    assert low.quantized is not None
    return Cast(pack(low.quantized), low.quantized.trusted_NK)


def how(weight: Weight, product: str, side: str, device: torch.device) -> tuple[Format, bool, int, dict[str, Any]]:
    """(format, whether there is a kernel for rows in it, key of its chance, rotation as `quantize_tiles` takes it)."""
    p, precision = weight.precision.products[product], weight.precision
    form = p.sides[side].form
    assert form is not None, (product, side)
    key = key_of(precision.seed, weight.name, product, side, precision.step) if form.rounding != "even" else 0
    signs = weight.signs(product, device) if p.rotation else None
    return form, supported(form) and form.block[0] == 1, key, {"size": p.rotation, "signs_n": signs}


def cast_inputs(weight: Weight, x_NK: Tensor, plan: Plan) -> Cast:
    """x of fprop, once for all layers that read the same tensor."""
    casts, form = weight.precision.casts, weight.precision.products["fprop"].sides["x"].form
    # Held by `casts`, its memory can't have become another tensor's.
    mark = ("native", form, x_NK.data_ptr(), x_NK._version, x_NK.shape, x_NK.stride(), x_NK.dtype)
    for other, _, cast in casts:
        if other == mark:
            return cast
    cast = cast_rows(weight, "fprop", "x", x_NK, plan)
    if form is not None and form.rounding == "even":
        casts[:] = [*casts[-1:], (mark, x_NK, cast)]
    return cast


def cast_rows(weight: Weight, product: str, side: str, x_RK: Tensor, plan: Plan) -> Cast:
    """Codes (R, K)."""
    form, native, key, rotation = how(weight, product, side, x_RK.device)
    if not native:
        return of_emulation(weight.cast(product, side, torch.where(plan.real(), x_RK, 0), plan.ids_R))
    packed, _ = quantize_tiles(x_RK, form, plan.schedule, keys=(key, 0), ids_N=plan.ids_R, **rotation)
    assert packed is not None
    return Cast(packed)


def cast_columns(
    weight: Weight, product: str, side: str, x: Tensor | Packed, plan: Plan, source_R: Tensor | None = None,
    weights_R: Tensor | None = None,
) -> Packed:  # fmt: skip
    """Codes (K, positions) of rows x, or of those read through source_R, each times its weight."""
    form, native, key, rotation = how(weight, product, side, plan.ids_R.device)
    if isinstance(x, Packed):
        readable = x.codes.dtype is torch.float8_e4m3fn and x.scales.itemsize == 4
        if not (native and readable) or x.format.rule == "shrink":  # whose factor the kernel would leave out
            x = x.unpack().dequantize()
    if native:
        _, packed = quantize_tiles(
            x, form, plan.schedule, rows=False, columns=True, source_N=source_R, weights_N=weights_R, keys=(0, key),
            ids_N=plan.ids_R, **rotation,
        )  # fmt: skip
        assert packed is not None
        return packed
    assert isinstance(x, Tensor)
    rows_RK = x.float() if source_R is None else x[source_R].float()
    rows_RK = rows_RK if weights_R is None else rows_RK * weights_R[:, None]
    s, n_experts, count = plan.schedule, plan.schedule.counts_E.numel(), rows_RK.shape[0]
    total = (count // TILE + n_experts) * TILE
    first_E = (s.tile_ends_E.long() - -(-s.counts_E // TILE)) * TILE - s.starts_E
    place_R = torch.arange(count, device=rows_RK.device) + first_E[plan.expert_R.clamp(max=n_experts - 1)]
    place_R = torch.where(plan.real()[:, 0], place_R, total)  # padding comes behind, and is cut off
    rows_PK = rows_RK.new_zeros(total + 1, rows_RK.shape[1]).index_copy_(0, place_R, rows_RK)[:total]
    ids_P = (-1 - torch.arange(total + 1, device=rows_RK.device)).index_copy_(0, place_R, plan.ids_R)[:total]
    return of_emulation(weight.cast(product, side, rows_PK.T.contiguous(), columns=ids_P)).packed


def cast_weights(weight: Weight, w_ENK: Tensor, first: int) -> Cast:
    """Of fprop: codes (E, N, K). first: experts before these."""
    (e, n, _), device = w_ENK.shape, w_ENK.device
    form, native, key, rotation = how(weight, "fprop", "w", device)
    if native:
        ids = torch.arange(first * n, (first + e) * n, device=device)
        packed, _ = quantize_tiles(
            w_ENK.flatten(0, 1), form, groups(1, e * n, device), keys=(key, 0), ids_N=ids, **rotation
        )
        assert packed is not None
        codes, scales = packed.codes.unflatten(0, (e, n)), packed.scales.unflatten(0, (e, n))
        return Cast(replace(packed, codes=codes, scales=scales, factor=packed.factor.expand(e)))
    if supported(form) and not rotation["size"]:
        return Cast(quantize_squares(w_ENK, form))
    return of_emulation(weight.cast("fprop", "w", w_ENK, first=first))


def weights_again(weight: Weight, w: Tensor | Packed, shape: tuple[int, ...], first: int) -> Packed:
    """Of dgrad: codes (E, K, N or more), of weights (E, N, K) or of their cast in fprop."""
    side = weight.precision.products["dgrad"].sides["w"]
    if side.form is None:
        assert isinstance(w, Packed)
        return transposed(w)
    if isinstance(w, Packed):
        return of_emulation(weight.again("dgrad", "w", Low.of(w.unpack()), first=first)).packed
    form, native, _, rotation = how(weight, "dgrad", "w", w.device)
    e, n, _ = shape
    if not native or form.rounding != "even":
        return of_emulation(weight.again("dgrad", "w", w, first=first)).packed
    plan = groups(e, n, w.device)
    _, packed = quantize_tiles(w.flatten(0, 1), form, plan, rows=False, columns=True, **rotation)
    assert packed is not None
    return replace(by_column(packed, e, n), factor=packed.factor.expand(e))


# ---------------------------------------------------------------- what is kept for backward


class Kept:
    """Tensors for `save_for_backward`, and how to get back what they were."""

    def __init__(self) -> None:
        self.tensors: list[Tensor | None] = []
        self.forms: list[tuple[Format, int] | None] = []

    def keep(self, high: Tensor | None, cast: Cast, packed: bool) -> None:
        """`high`, or the cast; and what that did not clip, where it tells."""
        p = cast.packed
        self.tensors += [p.codes, p.scales, p.factor] if packed else [high, None, None]
        self.tensors.append(None if cast.trusted is None else pack_bits(cast.trusted))
        self.forms.append((p.format, p.columns) if packed else None)


def kept(tensors: Iterator[Any], form: tuple[Format, int] | None, shape: tuple[int, ...]) -> tuple[Any, Tensor | None]:
    """(tensor or cast, what was not clipped); `shape` of x, of which the last is rounded up where it was rotated."""
    codes, scales, factor, trusted = (next(tensors) for _ in range(4))
    if form is not None:
        shape = (*shape[:-1], form[1])
    flags = None if trusted is None else unpack_bits(trusted, shape)
    return codes if form is None else Packed(form[0], codes, scales, factor, form[1]), flags


def product(
    x: Packed, w: Packed, plan: Plan, dtype: torch.dtype, source_R: Tensor | None = None, bias_EN: Tensor | None = None
) -> Tensor:
    return scaled_varlen_m(
        x,
        w,
        plan.schedule,
        scaled_tile(x.codes.device, name_of(x.format)),
        source_R=source_R,
        bias_EN=bias_EN,
        dtype=dtype,
    )


def weight_gradient(left: Packed, right: Packed, plan: Plan) -> Tensor:
    return scaled_varlen_k(left, right, plan.schedule, gradient_tile(left.codes.device, name_of(left.format)))


# ---------------------------------------------------------------- linear


class NativeLinear(torch.autograd.Function):
    """`moesaic.moe.low.LowLinear`: a product of one group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, weight: Weight, ids_T: Tensor) -> Tensor:
        x_TD, plan = in_rows(x.reshape(-1, x.shape[-1])), one_group(ids_T)
        xq, wq = cast_inputs(weight, x_TD, plan), cast_weights(weight, w[None], 0)
        keep = Kept()
        keep.keep(x_TD, xq, weight.reads_fprop("wgrad", "x"))
        keep.keep(w, wq, weight.reads_fprop("dgrad", "w"))
        ctx.save_for_backward(*keep.tensors)
        ctx.forms, ctx.weight, ctx.ids_T, ctx.shape, ctx.w_shape = keep.forms, weight, ids_T, x.shape, w.shape
        return product(xq.packed, wq.packed, plan, x.dtype).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        tensors, weight = iter(ctx.saved_tensors), ctx.weight
        (f, d), dy_TF, plan = ctx.w_shape, in_rows(dy.reshape(-1, ctx.w_shape[0])), one_group(ctx.ids_T)
        x, trusted_x = kept(tensors, ctx.forms[0], (dy_TF.shape[0], d))
        w, trusted_w = kept(tensors, ctx.forms[1], (1, f, d))
        dx = dw = None
        if ctx.needs_input_grad[0]:
            w = w if isinstance(w, Packed) else w[None]
            again = weights_again(weight, w, (1, f, d), 0)
            turned = trusted_x is not None or rotated(weight)
            dx = product(
                cast_rows(weight, "dgrad", "dy", dy_TF, plan).packed, again, plan, torch.float32 if turned else dy.dtype
            )
            dx = weight.straight_back(dx, "dgrad", "w", trusted_x, d).view(ctx.shape).to(dy.dtype)
        if ctx.needs_input_grad[1]:
            left, right = cast_columns(weight, "wgrad", "dy", dy_TF, plan), cast_columns(weight, "wgrad", "x", x, plan)
            trusted_w = None if trusted_w is None else trusted_w[0]
            dw = weight.straight_back(weight_gradient(left, right, plan)[0], "wgrad", "x", trusted_w, d)
        return dx, dw, None, None


def in_rows(x_NK: Tensor) -> Tensor:
    """With the values of a row side by side, as kernels read them: of an expanded or transposed tensor a copy."""
    return x_NK if x_NK.stride(-1) == 1 else x_NK.contiguous()


def rotated(weight: Weight) -> bool:
    return weight.precision.products["fprop"].rotation > 0


# ---------------------------------------------------------------- experts


class NativeExperts(torch.autograd.Function):
    """What moesaic.moe.low computes for routed experts. chunk: columns of y and dx made at a time."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weights_R: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, b_down: Tensor | None,
        rows: Rows, activation: str, up: Weight, down: Weight, ids_N: Tensor, first: int, experts: int, chunk: int,
    ) -> Tensor:  # fmt: skip
        x_ND, weights_R = x_ND.contiguous(), weights_R.float().contiguous()
        plan = plan_of(rows, ids_N, first, experts)
        form = down.precision.products["fprop"].sides["x"].form
        assert form is not None
        xq, upq = cast_inputs(up, x_ND, one_group(ids_N)), cast_weights(up, w_up, first)
        if fits(form, w_down.shape[2], activation) and form.rounding == "even" and not rotated(down):
            h_RG, packed = scaled_up(
                xq.packed, rows.source_R, upq.packed, b_up, rows.counts_E, plan.schedule, form, activation, x_ND.dtype
            )
            aq = Cast(packed)
        else:
            h_RG = product(xq.packed, upq.packed, plan, x_ND.dtype, rows.source_R, b_up)
            aq = cast_rows(down, "fprop", "x", activate(activation, h_RG.float()), plan)
        downq = cast_weights(down, w_down, first)
        y_ND = summed(aq.packed, downq.packed, plan, rows, x_ND.dtype, chunk, weights_R, b_down)
        keep = Kept()
        keep.keep(x_ND, xq, up.reads_fprop("wgrad", "x"))
        keep.keep(w_up, upq, up.reads_fprop("dgrad", "w"))
        keep.keep(None, aq, down.reads_fprop("wgrad", "x"))  # a itself is made again from h
        keep.keep(w_down, downq, down.reads_fprop("dgrad", "w"))
        ctx.save_for_backward(h_RG, weights_R, b_down, ids_N, rows.source_R, rows.expert_R, rows.bag, rows.starts,
                              rows.counts_E, *keep.tensors)  # fmt: skip
        ctx.forms, ctx.up, ctx.down, ctx.activation, ctx.chunk = keep.forms, up, down, activation, chunk
        ctx.shapes, ctx.first, ctx.experts = (x_ND.shape, w_up.shape, w_down.shape), first, experts
        ctx.has_bias = b_up is not None
        return y_ND

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        h_RG, weights_R, b_down, ids_N, source_R, expert_R, bag, starts, counts_E = (next(tensors) for _ in range(9))
        rows, (x_shape, up_shape, down_shape) = Rows(source_R, source_R, expert_R, bag, starts, counts_E), ctx.shapes
        plan, up, down = plan_of(rows, ids_N, ctx.first, ctx.experts), ctx.up, ctx.down
        (n, d), f, dtype, r = x_shape, down_shape[2], dy_ND.dtype, source_R.numel()
        x, trusted_x = kept(tensors, ctx.forms[0], (n, d))
        w_up, trusted_up = kept(tensors, ctx.forms[1], tuple(up_shape))
        a, trusted_a = kept(tensors, ctx.forms[2], (r, f))
        w_down, trusted_down = kept(tensors, ctx.forms[3], tuple(down_shape))
        dy_ND = dy_ND.contiguous()

        dyq = cast_rows(down, "dgrad", "dy", dy_ND, one_group(ids_N)).packed
        w = weights_again(down, w_down, tuple(down_shape), ctx.first)
        if rotated(down) or trusted_a is not None:
            da_RF = product(dyq, w, plan, torch.float32, source_R)
            da_RF = down.straight_back(da_RF, "dgrad", "w", trusted_a, f)
            gate_RF, h = torch.empty_like(da_RF), h_RG.float()
            a_RF: Tensor | None = activate(ctx.activation, h, gate_RF)
            dweights_R = torch.where(plan.real()[:, 0], torch.linalg.vecdot(da_RF, a_RF), 0)
            dh_RG = activate_backward(ctx.activation, da_RF * weights_R[:, None], h, gate_RF)
        else:
            stored = "" if isinstance(a, Packed) else "a"
            dh_RG, a_RF, parts_RP = scaled_dact(
                dyq, source_R, w, h_RG, weights_R, plan.schedule, ctx.activation, stored
            )
            dweights_R = parts_RP.sum(dim=1)
        of_a = a if isinstance(a, Packed) else a_RF
        assert of_a is not None
        right = cast_columns(down, "wgrad", "x", of_a, plan)
        left = cast_columns(down, "wgrad", "dy", dy_ND, plan, source_R, weights_R)
        dw_down = down.straight_back(weight_gradient(left, right, plan), "wgrad", "x", trusted_down, f)
        db_up = db_down = None
        if b_down is not None:
            by_expert_NE = dy_ND.float() @ b_down.float().T
            bias_R = by_expert_NE[source_R, expert_R.clamp(max=b_down.shape[0] - 1)]
            dweights_R = dweights_R + torch.where(plan.real()[:, 0], bias_R, 0)
            db_up = expert_sums(dh_RG, plan.schedule)
            db_down = expert_sums(dy_ND, plan.schedule, source_R, weights_R)

        dhq, left = cast_both(up, dh_RG, plan)
        right = cast_columns(up, "wgrad", "x", x, plan, source_R)
        dw_up = up.straight_back(weight_gradient(left, right, plan), "wgrad", "x", trusted_up, d)
        w = weights_again(up, w_up, tuple(up_shape), ctx.first)
        turned = rotated(up) or trusted_x is not None
        dx_ND = summed(dhq, w, plan, rows, torch.float32 if turned else dtype, ctx.chunk)
        dx_ND = up.straight_back(dx_ND, "dgrad", "w", trusted_x, d).to(dtype)
        return (dx_ND, dweights_R, dw_up, dw_down, db_up, db_down, *[None] * 8)


def plan_of(rows: Rows, ids_N: Tensor, first: int, experts: int) -> Plan:
    ids_R = ids_N[rows.source_R] * experts + rows.expert_R + first
    return Plan(schedule(rows.counts_E, TILE), rows.expert_R, ids_R)


def cast_both(weight: Weight, dy_RN: Tensor, plan: Plan) -> tuple[Packed, Packed]:
    """dy of dgrad along rows and of wgrad along columns: in one launch, where both are of one format and not rotated."""
    products = weight.precision.products
    form, native, key, _ = how(weight, "dgrad", "dy", dy_RN.device)
    other, _, other_key, _ = how(weight, "wgrad", "dy", dy_RN.device)
    if not native or form != other or products["dgrad"].rotation or products["wgrad"].rotation:
        return cast_rows(weight, "dgrad", "dy", dy_RN, plan).packed, cast_columns(weight, "wgrad", "dy", dy_RN, plan)
    rows, columns = quantize_tiles(dy_RN, form, plan.schedule, columns=True, keys=(key, other_key), ids_N=plan.ids_R)
    assert rows is not None and columns is not None
    return rows, columns


def summed(
    x: Packed, w: Packed, plan: Plan, rows: Rows, dtype: torch.dtype, chunk: int, weights_R: Tensor | None = None,
    bias_EN: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(N, columns of w's result): the products of a row with its expert's matrix, weighted and added up over each input's rows,
    `chunk` columns at a time, a multiple of a block."""
    n, out, step = w.codes.shape[1], [], -(-chunk // TILE) * TILE
    per = w.format.block[0]
    for a in range(0, n, step):
        b = min(a + step, n)
        part = replace(w, codes=w.codes[:, a:b], scales=w.scales[:, a // per : -(-b // per)])
        bias = None if bias_EN is None else bias_EN[:, a:b].contiguous()
        y_Rd = product(x, part, plan, dtype, None, bias)
        out.append(combine(y_Rd, rows.bag, rows.starts, weights_R))
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)
