"""Layers of low precision on matrix units: what moesaic.moe.low emulates, by kernels that read codes and scales.

The same casts of the same tensors in the same order as there, and products by moesaic.kernels.scaled_gemm: what goes in is equal
bit by bit, sums are in another order. In what hardware reads, not in fp32, are: every operand of a product; a, which the product
before writes as codes where its tile holds whole blocks; what backward reads of a recipe with source=fprop. h and, on its way to
its casts, dh are of the compute type, where the emulation keeps fp32.

A cast is one launch (of e4m3 scales two, the first for the tensor's factor), and serves every product that reads it: x of N
inputs is cast before it is gathered; dh along rows and columns at once; a weight's square blocks both ways. **Cast by the
emulation's torch functions**, then multiplied natively, is of no shipped recipe: a weight in square blocks with a rotation, by
chance or of rule quest, and one that dgrad casts in square blocks of its own. The host waits for nothing.

Letters: as in moesaic.moe.low.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.kernels.combine import combine
from moesaic.kernels.grouped_gemm import Schedule, schedule
from moesaic.kernels.permute import Rows
from moesaic.kernels.quantize import Format, Packed, key_of, pack, unpack_bits
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
    without_minus_zero,
)
from moesaic.moe.experts import activate, activate_backward
from moesaic.moe.low import Low, Weight, mark_of

# ---------------------------------------------------------------- casts


class Plan(NamedTuple):
    """Of R rows sorted by expert: their schedule, and the numbers that chance depends on, int64 (R,)."""

    schedule: Schedule
    ids_R: Tensor

    def real(self) -> Tensor:
        """bool (R, 1), the rows of an expert: what is behind them is padding, whose memory nobody wrote."""
        return (torch.arange(self.ids_R.numel(), device=self.ids_R.device) < self.schedule.counts_E.sum())[:, None]


def one_group(ids_N: Tensor) -> Plan:
    """Of N rows without experts."""
    counts = torch.full((1,), ids_N.numel(), dtype=torch.int64, device=ids_N.device)
    return Plan(schedule(counts, TILE), ids_N)


def groups(e: int, n: int, device: torch.device) -> Schedule:
    """Of E matrices of N rows each."""
    return schedule(torch.full((e,), n, dtype=torch.int64, device=device), TILE)


def how(weight: Weight, product: str, side: str, device: torch.device) -> tuple[Format, int, dict[str, Any]]:
    """(format, key of its chance, rotation as `quantize_tiles` takes it)."""
    p, precision = weight.precision.products[product], weight.precision
    form = p.sides[side].form
    assert form is not None, (product, side)
    key = key_of(precision.seed, weight.name, product, side, precision.step) if form.rounding != "even" else 0
    signs = weight.signs(product, device) if p.rotation else None
    return form, key, {"size": p.rotation, "signs_n": signs}


def cast_inputs(weight: Weight, x_NK: Tensor, plan: Plan) -> Packed:
    """x of fprop, once for all layers that read the same tensor."""
    casts, form = weight.precision.casts, weight.precision.products["fprop"].sides["x"].form
    mark = ("native", form, *mark_of(x_NK))
    for other, _, cast in casts:
        if other == mark:
            return cast
    cast = cast_rows(weight, "fprop", "x", x_NK, plan)
    if form is not None and form.rounding == "even":
        casts[:] = [*casts[-1:], (mark, x_NK, cast)]
    return cast


def cast_rows(weight: Weight, product: str, side: str, x_RK: Tensor, plan: Plan) -> Packed:
    """Codes (R, K)."""
    form, key, rotation = how(weight, product, side, x_RK.device)
    packed, _ = quantize_tiles(x_RK, form, plan.schedule, keys=(key, 0), ids_N=plan.ids_R, **rotation)
    assert packed is not None
    return packed


def cast_columns(
    weight: Weight, product: str, side: str, x: Tensor | Packed, plan: Plan, source_R: Tensor | None = None,
    weights_R: Tensor | None = None,
) -> Packed:  # fmt: skip
    """Codes (K, positions) of rows x, or of those read through source_R, each times its weight."""
    form, key, rotation = how(weight, product, side, plan.ids_R.device)
    _, packed = quantize_tiles(
        x, form, plan.schedule, rows=False, columns=True, source_N=source_R, weights_N=weights_R, keys=(0, key),
        ids_N=plan.ids_R, **rotation,
    )  # fmt: skip
    assert packed is not None
    return packed


def cast_weights(weight: Weight, w_ENK: Tensor, first: int) -> Packed:
    """Of fprop: codes (E, N, K). first: experts before these."""
    (e, n, _), device = w_ENK.shape, w_ENK.device
    form, key, rotation = how(weight, "fprop", "w", device)
    if not supported(form) or (form.block[0] > 1 and rotation["size"]):
        low = weight.cast("fprop", "w", w_ENK, first=first)
        assert low.quantized is not None
        return without_minus_zero(pack(low.quantized))
    if form.block[0] > 1:
        return quantize_squares(w_ENK, form)
    packed, _ = quantize_tiles(w_ENK.flatten(0, 1), form, groups(e, n, device), keys=(key, 0), first=first, **rotation)
    assert packed is not None
    return each_of(packed, lambda x: x.unflatten(0, (e, n)))


def each_of(packed: Packed, change: Callable[[Tensor], Tensor]) -> Packed:
    """With its codes, its scales and what it tells of them changed."""
    trusted = None if packed.trusted is None else change(packed.trusted)
    return replace(packed, codes=change(packed.codes), scales=change(packed.scales), trusted=trusted)


def weights_again(weight: Weight, w: Tensor | Packed, first: int) -> Packed:
    """Of dgrad: codes (E, K, N or more), of weights (E, N, K) or of their cast in fprop."""
    if weight.precision.products["dgrad"].sides["w"].form is None:
        assert isinstance(w, Packed)
        return transposed(w)
    w_ENK = w.codes if isinstance(w, Packed) else w
    (e, n, _), device = w_ENK.shape, w_ENK.device
    form, key, rotation = how(weight, "dgrad", "w", device)
    if form.block[0] > 1:
        low = weight.again("dgrad", "w", Low.of(w.unpack()) if isinstance(w, Packed) else w, first=first)
        assert low.quantized is not None
        return without_minus_zero(pack(low.quantized))
    if isinstance(w, Packed) and w.format.block[0] > 1:
        w = w.unpack().dequantize()
    flat = each_of(w, lambda x: x.flatten(0, 1)) if isinstance(w, Packed) else w.flatten(0, 1)
    _, packed = quantize_tiles(
        flat, form, groups(e, n, device), rows=False, columns=True, keys=(0, key), first=first, **rotation
    )
    assert packed is not None
    return by_column(packed, e, n)


# ---------------------------------------------------------------- what is kept for backward


class Kept:
    """Tensors for `save_for_backward`, and how to get back what they were."""

    def __init__(self) -> None:
        self.tensors: list[Tensor | None] = []
        self.forms: list[tuple[Format | None, int]] = []

    def keep(self, high: Tensor | None, cast: Packed, packed: bool) -> None:
        """`high`, or the cast; and what that did not clip, where it tells."""
        self.tensors += [cast.codes, cast.scales, cast.factor] if packed else [high, None, None]
        self.tensors.append(cast.trusted)
        self.forms.append((cast.format if packed else None, cast.columns))


def kept(tensors: Iterator[Any], form: tuple[Format | None, int]) -> tuple[Any, Tensor | None]:
    """(the tensor or its cast; what that, of so many columns, did not clip)."""
    codes, scales, factor, trusted = (next(tensors) for _ in range(4))
    if form[0] is not None:
        codes = Packed(form[0], codes, scales, factor, form[1])
    return codes, None if trusted is None else unpack_bits(trusted, form[1])


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
        return product(xq, wq, plan, x.dtype).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        tensors, weight = iter(ctx.saved_tensors), ctx.weight
        d, dy_TF, plan = ctx.w_shape[1], in_rows(dy.reshape(-1, ctx.w_shape[0])), one_group(ctx.ids_T)
        x, trusted_x = kept(tensors, ctx.forms[0])
        w, trusted_w = kept(tensors, ctx.forms[1])
        dx = dw = None
        if ctx.needs_input_grad[0]:
            w = w if isinstance(w, Packed) else w[None]
            again = weights_again(weight, w, 0)
            turned = trusted_x is not None or rotated(weight)
            dyq = cast_rows(weight, "dgrad", "dy", dy_TF, plan)
            dx = product(dyq, again, plan, torch.float32 if turned else dy.dtype)
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
            h_RG, aq = scaled_up(
                xq, rows.source_R, upq, b_up, rows.counts_E, plan.schedule, form, activation, x_ND.dtype
            )
        else:
            h_RG = product(xq, upq, plan, x_ND.dtype, rows.source_R, b_up)
            aq = cast_rows(down, "fprop", "x", activate(activation, h_RG.float()), plan)
        downq = cast_weights(down, w_down, first)
        y_ND = summed(aq, downq, plan, rows, x_ND.dtype, chunk, weights_R, b_down)
        keep = Kept()
        keep.keep(x_ND, xq, up.reads_fprop("wgrad", "x"))
        keep.keep(w_up, upq, up.reads_fprop("dgrad", "w"))
        keep.keep(None, aq, down.reads_fprop("wgrad", "x"))  # a itself is made again from h
        keep.keep(w_down, downq, down.reads_fprop("dgrad", "w"))
        ctx.save_for_backward(h_RG, weights_R, b_down, ids_N, rows.source_R, rows.expert_R, rows.bag, rows.starts,
                              rows.counts_E, *keep.tensors)  # fmt: skip
        ctx.forms, ctx.up, ctx.down, ctx.activation, ctx.chunk = keep.forms, up, down, activation, chunk
        ctx.widths, ctx.first, ctx.experts = (x_ND.shape[1], w_down.shape[2]), first, experts
        ctx.has_bias = b_up is not None
        return y_ND

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        h_RG, weights_R, b_down, ids_N, source_R, expert_R, bag, starts, counts_E = (next(tensors) for _ in range(9))
        rows, (d, f), dtype = Rows(source_R, source_R, expert_R, bag, starts, counts_E), ctx.widths, dy_ND.dtype
        plan, up, down = plan_of(rows, ids_N, ctx.first, ctx.experts), ctx.up, ctx.down
        x, trusted_x = kept(tensors, ctx.forms[0])
        w_up, trusted_up = kept(tensors, ctx.forms[1])
        a, trusted_a = kept(tensors, ctx.forms[2])
        w_down, trusted_down = kept(tensors, ctx.forms[3])
        dy_ND = dy_ND.contiguous()

        dyq = cast_rows(down, "dgrad", "dy", dy_ND, one_group(ids_N))
        w = weights_again(down, w_down, ctx.first)
        if rotated(down) or trusted_a is not None:
            da_RF = product(dyq, w, plan, torch.float32, source_R)
            whole_RF, da_RF = down.straight_back_both(da_RF, trusted_a, f)
            gate_RF, h = torch.empty_like(da_RF), h_RG.float()
            a_RF: Tensor | None = activate(ctx.activation, h, gate_RF)
            dweights_R = torch.where(plan.real()[:, 0], torch.linalg.vecdot(whole_RF, a_RF), 0)
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
        w = weights_again(up, w_up, ctx.first)
        turned = rotated(up) or trusted_x is not None
        dx_ND = summed(dhq, w, plan, rows, torch.float32 if turned else dtype, ctx.chunk)
        dx_ND = up.straight_back(dx_ND, "dgrad", "w", trusted_x, d).to(dtype)
        return (dx_ND, dweights_R, dw_up, dw_down, db_up, db_down, *[None] * 8)


def plan_of(rows: Rows, ids_N: Tensor, first: int, experts: int) -> Plan:
    ids_R = ids_N[rows.source_R] * experts + rows.expert_R + first
    return Plan(schedule(rows.counts_E, TILE), ids_R)


def cast_both(weight: Weight, dy_RN: Tensor, plan: Plan) -> tuple[Packed, Packed]:
    """dy of dgrad along rows and of wgrad along columns: in one launch, where both are of one format and not rotated."""
    products = weight.precision.products
    form, key, _ = how(weight, "dgrad", "dy", dy_RN.device)
    other, other_key, _ = how(weight, "wgrad", "dy", dy_RN.device)
    if form != other or products["dgrad"].rotation or products["wgrad"].rotation:
        return cast_rows(weight, "dgrad", "dy", dy_RN, plan), cast_columns(weight, "wgrad", "dy", dy_RN, plan)
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
