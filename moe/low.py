"""Layers whose products are quantized, emulated: exact products, in fp32, of what hardware would multiply. Where hardware does,
`Precision.native` says so, and moesaic.moe.native has the layers.

moesaic.moe.precision says what a recipe is, moesaic.kernels.quantize what a cast. Here is when each tensor is cast: once, before
it is gathered or read by several products, and kept packed where backward reads the same cast. Sums over tokens (wgrad) go in
whole blocks of an expert's rows, padded with zeros, so that no block mixes two experts. Not emulated: the order in which
hardware adds up, and the bits of its accumulators.

    linear    fprop  y = cast(x) cast(W)^T      dgrad  dx = cast(dy) cast(W^T)^T      wgrad  dW = cast(dy^T) cast(x^T)^T
    experts   for row r of expert j, n its input row, w its weight:
      fprop     h_r = cast(x)_n cast(W_up[j])^T;  a_r = act(h_r);  y_r = cast(a)_r cast(W_down[j])^T;  output[n] = sum of w_r y_r
      dgrad     da_r = cast(dy)_n cast(W_down[j]^T)^T;  dw_r = <da_r, a_r>, also where a's cast clips;  dh_r = act'(h_r) w_r da_r
                dinput[n] = sum of cast(dh)_r cast(W_up[j]^T)^T
      wgrad     dW_down[j] = cast((w_r dy_n)^T) cast(a^T)^T;  dW_up[j] = cast(dh^T) cast(x^T)^T    over the rows of j

With a rotated fprop whose casts backward reads (source=fprop), dx and dW arise in the rotated space: they are masked by what the
cast did not clip and rotated back (Quartet, arXiv 2505.14669). Without, the gradient passes through the casts.

Letters: T tokens, N input rows, R routed rows, P padded rows, D model width, F expert width, G width of h, E experts held here.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.kernels.hadamard import rotate, rotate_back
from moesaic.kernels.permute import Rows, sum_bags
from moesaic.kernels.products import linear, mm, rows_mm, slices
from moesaic.kernels.quantize import (
    Format,
    Packed,
    Quantized,
    key_of,
    pack,
    pack_bits,
    quantize,
    quantize_each,
    random_signs,
    unpack_bits,
)
from moesaic.moe.config import ModelConfig, require
from moesaic.moe.experts import Experts, activate, activate_backward
from moesaic.moe.layer import MoE
from moesaic.moe.model import Transformer
from moesaic.moe.precision import LAYERS, Precision, PrecisionConfig, unit_formats


class Low(NamedTuple):
    """An operand: values, fp32, along the last dimension what is added up, and the factor that the result is multiplied with,
    scalar or one of each matrix (None: 1)."""

    values: Tensor
    factor: Tensor | None
    quantized: Quantized | None

    @staticmethod
    def of(quantized: Quantized) -> "Low":
        form = quantized.format
        return Low(
            quantized.values(), quantized.factor if form.scale == "e4m3" or form.rule == "shrink" else None, quantized
        )


def stream_of(device: torch.device) -> Any:
    """That on which this is computed: a shared expert has one of its own, and what another one makes may not be there yet."""
    return torch.cuda.current_stream(device) if device.type == "cuda" and torch.cuda.is_initialized() else None


def mark_of(x: Tensor) -> tuple[Any, ...]:
    """What tells a tensor, while it is held, from all others. In inference mode, torch counts no versions."""
    version = None if x.is_inference() else x._version
    return x.data_ptr(), version, x.shape, x.stride(), x.dtype, stream_of(x.device)


class Weight:
    """The casts of one weight's products. `name` is the same on every layout, for chance depends on it."""

    def __init__(self, precision: Precision, name: str) -> None:
        self.precision, self.name = precision, name

    def cast(
        self, product: str, side: str, x: Tensor, rows: Tensor | None = None, columns: Tensor | None = None, first: int = 0
    ) -> Low:  # fmt: skip
        """x, (N, K) or (E, N, K), as this operand: rotated, then quantized. rows, columns: their global numbers. first: experts
        before these."""
        p = self.precision.products[product]
        form, casts = p.sides[side].form, self.precision.casts
        shared = side == "x" and product == "fprop" and form is not None and form.rounding == "even"
        mark = (form, p.rotation, *mark_of(x))
        for other, _, low in casts if shared else ():
            if other == mark:
                return low
        whole = x.float()
        if p.rotation:
            whole = rotate(whole, p.rotation, self.signs(product, x.device))
            if columns is not None:  # padding has numbers that nobody else has
                more = whole.shape[-1] - columns.numel()
                columns = torch.cat((columns, -1 - torch.arange(more, device=x.device)))
        if form is None:
            return Low(whole, None, None)
        key = (
            key_of(self.precision.seed, self.name, product, side, self.precision.step) if form.rounding != "even" else 0
        )
        if x.ndim == 3:
            e, n, _ = whole.shape
            rows = torch.arange(first * n, (first + e) * n, device=x.device).view(e, n)
            low = Low.of(quantize_each(whole, form, key, rows, run=p.rotation))
        else:
            low = Low.of(quantize(whole, form, key, rows, columns, run=p.rotation))
        if shared:
            casts[:] = [*casts[-1:], (mark, x, low)]
        return low

    def signs(self, product: str, device: torch.device) -> Tensor | None:
        p = self.precision.products[product]
        if p.signs == "none":
            return None
        step, drawn = self.precision.step if p.signs == "step" else -1, self.precision.signs
        place = (product, step, device, stream_of(device))
        if place not in drawn:
            drawn[place] = random_signs(key_of(self.precision.seed, "signs", product, step), p.rotation, device)
        return drawn[place]

    def reads_fprop(self, product: str, side: str) -> bool:
        return self.precision.products[product].sides[side].source == "fprop"

    def again(self, product: str, side: str, kept: "Tensor | Low", **numbers: Any) -> Low:
        """The operand of dgrad or wgrad that was one of fprop, cast along its other side."""
        if isinstance(kept, Tensor):
            return self.cast(product, side, kept.mT.contiguous(), **numbers)
        if self.precision.products[product].sides[side].form is None:
            return Low(kept.values.mT.contiguous(), kept.factor, None)
        return self.cast(product, side, full(kept).mT.contiguous(), **numbers)

    def straight_back(self, gradient: Tensor, product: str, side: str, trusted: Tensor | None, columns: int) -> Tensor:
        """The gradient of x or w from that of its cast: 0 where that was clipped, out of the rotated space."""
        if trusted is not None:
            gradient = gradient * trusted
        rotation = self.precision.products["fprop"].rotation
        if rotation and self.reads_fprop(product, side):
            gradient = rotate_back(gradient, rotation, self.signs("fprop", gradient.device), columns)
        return gradient

    def straight_back_both(self, gradient: Tensor, trusted: Tensor | None, columns: int) -> tuple[Tensor, Tensor]:
        """The gradient of x's cast, which is that of all that stands behind it, and that of x."""
        whole = self.straight_back(gradient, "dgrad", "w", None, columns)
        return whole, whole if trusted is None else self.straight_back(gradient, "dgrad", "w", trusted, columns)


def full(low: Low) -> Tensor:
    """Values with their factor."""
    if low.factor is None:
        return low.values
    return low.values * low.factor.view(-1, *[1] * (low.values.ndim - 1))


def multiply(left: Low, right: Low) -> Tensor:
    """(M, K) and (N, K) -> (M, N)."""
    return scaled(mm(left.values, right.values.mT), left.factor, right.factor)


def scaled(product: Tensor, *factors: Tensor | None) -> Tensor:
    for factor in factors:
        if factor is not None:
            product = product.mul_(factor)
    return product


# ---------------------------------------------------------------- what is kept for backward


class Saver:
    """Tensors for `save_for_backward`, and how to get back what they were: checkpointing and counters of memory see them all."""

    def __init__(self) -> None:
        self.tensors: list[Tensor | None] = []
        self.forms: list[tuple[Format | None, int]] = []

    def keep(self, high: Tensor, low: Low, packed: bool) -> None:
        """`high`, or `low` packed; and what the cast, which rotation may have made wider, did not clip, where it tells."""
        if packed:
            assert low.quantized is not None
            p = pack(low.quantized)
            self.tensors += [p.codes, p.scales, p.factor, p.trusted]
        else:
            trusted = None if low.quantized is None else low.quantized.trusted_NK
            self.tensors += [high, None, None, None if trusted is None else pack_bits(trusted)]
        self.forms.append((p.format if packed else None, low.values.shape[-1]))


def kept(tensors: Iterator[Any], form: tuple[Format | None, int]) -> tuple[Tensor | Low, Tensor | None]:
    """What `Saver.keep` kept: the tensor or its cast; and what that, of so many columns, did not clip."""
    a, scales, factor, trusted = (next(tensors) for _ in range(4))
    if form[0] is not None:
        a = Low.of(Packed(form[0], a, scales, factor, form[1]).unpack())
    return a, None if trusted is None else unpack_bits(trusted, form[1])


# ---------------------------------------------------------------- linear


class LowLinear(torch.autograd.Function):
    """x (..., D), w (F, D) -> x W^T in the type of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, weight: Weight, ids_T: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        xq, wq = weight.cast("fprop", "x", x_TD, ids_T), weight.cast("fprop", "w", w)
        saver = Saver()
        saver.keep(x_TD, xq, weight.reads_fprop("wgrad", "x"))
        saver.keep(w, wq, weight.reads_fprop("dgrad", "w"))
        ctx.save_for_backward(*saver.tensors)
        ctx.forms, ctx.weight, ctx.ids_T, ctx.shape, ctx.w_shape = saver.forms, weight, ids_T, x.shape, w.shape
        return multiply(xq, wq).view(*x.shape[:-1], w.shape[0]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        tensors, weight, ids_T = iter(ctx.saved_tensors), ctx.weight, ctx.ids_T
        (f, d), dtype = ctx.w_shape, dy.dtype
        dy_TF = dy.reshape(-1, f).float()
        x, trusted_x = kept(tensors, ctx.forms[0])
        w, trusted_w = kept(tensors, ctx.forms[1])
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = multiply(weight.cast("dgrad", "dy", dy_TF, ids_T), weight.again("dgrad", "w", w))
            dx = weight.straight_back(dx, "dgrad", "w", trusted_x, d).view(ctx.shape).to(dtype)
        if ctx.needs_input_grad[1]:
            dyq = weight.cast("wgrad", "dy", dy_TF.T.contiguous(), columns=ids_T)
            dw = multiply(dyq, weight.again("wgrad", "x", x, columns=ids_T))
            dw = weight.straight_back(dw, "wgrad", "x", trusted_w, d)
        return dx, dw, None, None


def low_linear(module: nn.Linear, weight: Weight, x: Tensor) -> Tensor:
    precision = weight.precision
    if precision.high:
        return linear(x, module.weight.to(x.dtype))
    numbers = precision.numbers(x.shape[:-1].numel(), x.device)
    if precision.native(x.device):
        # Only here: where there is no GPU, it starts Triton's interpreter.
        from moesaic.moe.native import NativeLinear

        return NativeLinear.apply(x, module.weight, weight, numbers)
    return LowLinear.apply(x, module.weight, weight, numbers)


# ---------------------------------------------------------------- experts


class _LowExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weights_R: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, b_down: Tensor | None,
        rows: Rows, activation: str, up: Weight, down: Weight, ids_N: Tensor, first: int, experts: int,
    ) -> Tensor:  # fmt: skip
        counts = rows.counts_E.tolist()  # on a GPU the host waits here; the kernels will not
        used = sum(counts)
        source_R, w_R1 = rows.source_R[:used], weights_R[:used, None].float()
        expert_R = torch.arange(len(counts), device=x_ND.device).repeat_interleave(rows.counts_E, output_size=used)
        ids_R = ids_N[source_R] * experts + expert_R + first
        xq, upq = up.cast("fprop", "x", x_ND, ids_N), up.cast("fprop", "w", w_up, first=first)
        h_RG = grouped(xq.values[source_R], xq.factor, upq, counts, expert_R)
        if b_up is not None:
            h_RG += b_up.float()[expert_R]
        a_RF = activate(activation, h_RG)
        aq, downq = down.cast("fprop", "x", a_RF, ids_R), down.cast("fprop", "w", w_down, first=first)
        y_RD = grouped(aq.values, aq.factor, downq, counts, expert_R)
        if b_down is not None:
            y_RD += b_down.float()[expert_R]
        y_RD = F.pad(y_RD.mul_(w_R1), (0, 0, 0, weights_R.numel() - used))  # padding is in a bag that nobody reads
        saver = Saver()
        saver.keep(x_ND, xq, up.reads_fprop("wgrad", "x"))
        saver.keep(w_up, upq, up.reads_fprop("dgrad", "w"))
        # a itself is made again from h.
        saver.keep(a_RF.new_empty(0), aq, down.reads_fprop("wgrad", "x"))
        saver.keep(w_down, downq, down.reads_fprop("dgrad", "w"))
        ctx.save_for_backward(
            h_RG, weights_R, b_down, rows.bag, rows.starts, source_R, expert_R, ids_R, ids_N, *saver.tensors
        )
        ctx.forms, ctx.up, ctx.down, ctx.counts, ctx.activation = saver.forms, up, down, counts, activation
        ctx.shapes, ctx.first, ctx.has_bias = (x_ND.shape, w_down.shape), first, b_up is not None
        return sum_bags(y_RD, rows.bag, rows.starts).to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        h_RG, weights_R, b_down, bag, starts, source_R, expert_R, ids_R, ids_N = (next(tensors) for _ in range(9))
        (_, d), (_, _, f) = ctx.shapes
        up, down, counts, dtype = ctx.up, ctx.down, ctx.counts, dy_ND.dtype
        x, trusted_x = kept(tensors, ctx.forms[0])
        w_up, trusted_up = kept(tensors, ctx.forms[1])
        a, trusted_a = kept(tensors, ctx.forms[2])
        w_down, trusted_down = kept(tensors, ctx.forms[3])
        used, dy_ND = h_RG.shape[0], dy_ND.float()
        w_R1 = weights_R[:used, None].float()

        dyq = down.cast("dgrad", "dy", dy_ND, ids_N)
        w = down.again("dgrad", "w", w_down, first=ctx.first)
        da_RF = grouped(dyq.values[source_R], dyq.factor, w, counts, expert_R)
        whole_RF, da_RF = down.straight_back_both(da_RF, trusted_a, f)
        gate_RF = torch.empty_like(da_RF)
        a_RF = activate(ctx.activation, h_RG, gate_RF)
        dweights_R = F.pad(torch.linalg.vecdot(whole_RF, a_RF), (0, weights_R.numel() - used))
        dy_RD = dy_ND[source_R]
        if b_down is not None:
            dweights_R[:used] += (dy_RD * b_down.float()[expert_R]).sum(dim=1)
        dy_RD *= w_R1
        dh_RG = activate_backward(ctx.activation, da_RF * w_R1, h_RG, gate_RF)
        dw_down = weight_gradient(down, dy_RD, a_RF if isinstance(a, Tensor) else a, counts, ids_R, trusted_down, f)
        xs = x[source_R] if isinstance(x, Tensor) else Low(x.values[source_R], x.factor, None)
        dw_up = weight_gradient(up, dh_RG, xs, counts, ids_R, trusted_up, d)
        db_up = db_down = None
        if ctx.has_bias:
            # By expert: on CUDA, `index_add_` would add up in any order.
            db_up, db_down = (torch.stack([own.sum(dim=0) for own in s.split(counts)]) for s in (dh_RG, dy_RD))

        dhq = up.cast("dgrad", "dy", dh_RG, ids_R)
        w = up.again("dgrad", "w", w_up, first=ctx.first)
        dx_RD = grouped(dhq.values, dhq.factor, w, counts, expert_R)
        dx_ND = sum_bags(F.pad(dx_RD, (0, 0, 0, weights_R.numel() - used)), bag, starts)
        dx_ND = up.straight_back(dx_ND, "dgrad", "w", trusted_x, d)
        return (dx_ND.to(dtype), dweights_R.to(weights_R.dtype), dw_up, dw_down, db_up, db_down, *[None] * 7)


def grouped(values_RK: Tensor, factor: Tensor | None, weights: Low, counts: list[int], expert_R: Tensor) -> Tensor:
    """(R, N): each row with its expert's matrix of weights (E, N, K)."""
    out = values_RK.new_empty(values_RK.shape[0], weights.values.shape[1])
    for rows, w, o in zip(slices(counts), weights.values.mT.unbind(), out.split(counts), strict=True):
        rows_mm(values_RK, rows, w, o)
    return scaled(out, factor, None if weights.factor is None else weights.factor[expert_R, None])


def weight_gradient(
    weight: Weight, dy_RN: Tensor, x: Tensor | Low, counts: list[int], ids_R: Tensor, trusted: Tensor | None, columns: int
) -> Tensor:  # fmt: skip
    """(E, N, K) from rows sorted by expert: the columns of the operands, padded so that each expert has whole runs."""
    run = weight.precision.products["wgrad"].run
    padded = [-(-count // run) * run for count in counts]
    starts = torch.tensor([sum(padded[:j]) - sum(counts[:j]) for j in range(len(counts))])
    place_R = torch.arange(len(ids_R)) + starts.repeat_interleave(torch.tensor(counts))
    place_R = place_R.to(dy_RN.device)
    total = sum(padded)

    def spread_out(rows: Tensor) -> Tensor:
        return rows if total == len(rows) else rows.new_zeros(total, rows.shape[1]).index_copy_(0, place_R, rows)

    # The zeros behind an expert's rows have numbers that nobody else has, from -1 on, as in the kernels and a linear layer.
    ends_P = torch.tensor([sum(padded[:j]) + n for j, n in enumerate(counts)]).repeat_interleave(torch.tensor(padded))
    ids_P = (ends_P - 1 - torch.arange(total)).to(ids_R.device).index_copy_(0, place_R, ids_R)
    left = weight.cast("wgrad", "dy", spread_out(dy_RN).T.contiguous(), columns=ids_P)
    again = spread_out(x.float()) if isinstance(x, Tensor) else Low(spread_out(x.values), x.factor, None)
    right = weight.again("wgrad", "x", again, columns=ids_P)
    out = dy_RN.new_empty(len(counts), left.values.shape[0], right.values.shape[0])
    for j, (a, b) in enumerate(zip(left.values.split(padded, 1), right.values.split(padded, 1), strict=True)):
        mm(a, b.T, out=out[j])
    return weight.straight_back(scaled(out, left.factor, right.factor), "wgrad", "x", trusted, columns)


class LowExperts:
    """What computes routed experts in the place of their own operation; `experts`: how many there are in all."""

    def __init__(self, precision: Precision, name: str, experts: int) -> None:
        self.precision, self.experts = precision, experts
        self.up, self.down = Weight(precision, f"{name}.up"), Weight(precision, f"{name}.down")

    @property
    def active(self) -> bool:
        return not self.precision.high

    def numbers(self, tokens: int, device: torch.device) -> Tensor | None:
        """The numbers of the tokens of this pass, where chance depends on them: they travel with their rows."""
        return self.precision.numbers(tokens, device) if self.active and self.precision.chance else None

    def __call__(
        self, owner: Experts, parameters: tuple[Tensor, Tensor, Tensor | None, Tensor | None], x_ND: Tensor, weights_R: Tensor,
        rows: Rows, ids_N: Tensor | None, first: int,
    ) -> Tensor:  # fmt: skip
        ids_N = torch.arange(x_ND.shape[0], device=x_ND.device) if ids_N is None else ids_N
        arguments = x_ND, weights_R, *parameters, rows, owner.activation, self.up, self.down, ids_N, first, self.experts
        if self.precision.native(x_ND.device):
            from moesaic.moe.native import NativeExperts

            return NativeExperts.apply(*arguments, owner.chunk(x_ND, rows))
        return _LowExperts.apply(*arguments)


# ---------------------------------------------------------------- a model


def check_low(config: PrecisionConfig, model: ModelConfig) -> None:
    """Raises ValueError where no layer is left to quantize, or the kernels are asked for and no device has such products."""
    blocks, dense = model.n_layers, model.n_dense_layers
    one, other = ("high_first", "high_last") if config.high_first else ("high_last", "high_first")
    require(config.high_first + config.high_last < blocks,
            f"precision.{one}={getattr(config, one)}: with precision.{other}={getattr(config, other)} leaves none of "
            f"model.n_layers={blocks} to quantize")  # fmt: skip
    routed = dense < blocks - config.high_last
    has = {"attention": True, "dense": config.high_first < dense or (routed and model.d_shared > 0), "experts": routed}
    require(any(has[kind] for kind in config.layers),
            f"precision.layers={config.layers}: must name one of {', '.join(kind for kind in LAYERS if has[kind])}, which blocks "
            "to quantize have")  # fmt: skip
    if model.experts_backend == "triton":
        try:
            unit_formats(config)
        except ValueError as error:
            raise ValueError(f"model.experts_backend=triton: {error}; auto and torch emulate it") from None


def lower(model: Transformer, config: PrecisionConfig, seed: int = 0) -> None:
    """Let the layers that `config` names compute by its recipe. Names and parameters stay what they are. Raises what `check_low`
    does."""
    model.precision = Precision(config, seed, model.config.experts_backend)
    if not config.quantized:
        return
    check_low(config, model.config)
    for i in range(config.high_first, model.config.n_layers - config.high_last):
        block: Any = model.blocks[i]
        parts = {"attention": block.attention, "dense": block.ffn}
        if isinstance(block.ffn, MoE):
            parts["dense"] = block.ffn.shared
            if "experts" in config.layers:
                name = f"blocks.{i}.ffn.experts"
                block.ffn.experts.low = low = LowExperts(model.precision, name, model.config.n_experts)
                model.precision.weights |= {f"{name}.w_up_EGD": low.up, f"{name}.w_down_EDF": low.down}
        chosen = {id(m) for kind in config.layers if parts.get(kind) is not None for m in parts[kind].modules()}
        for name, module in block.named_modules(prefix=f"blocks.{i}"):
            if isinstance(module, nn.Linear) and id(module) in chosen:
                weight = model.precision.weights[f"{name}.weight"] = Weight(model.precision, name)
                lower_linear(module, weight)


def lower_linear(module: nn.Linear, weight: Weight) -> None:
    module.forward = lambda x: low_linear(module, weight, x)  # type: ignore[assignment,method-assign]
