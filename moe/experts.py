"""Routed experts over rows sorted by expert: one operation that saves little for backward.

    for row r of expert j:        x = input[source[r]]
        h  = W_up[j] x + b_up[j]                            G values: gate, then up, for the gated kinds (G = 2F); else G = F
        a  = act(h)                                         F values
        y  = W_down[j] (w_r * a) + w_r * b_down[j]          w_r: the router's weight of this row
    output[n] = sum of y over the rows of input n           in slot order

Weighting the activation instead of the output is the same product, and lets backward do without y: with
da' = W_down[j]^T dy, the weight's gradient is <da', a> + <dy, b_down[j]> (SonicMoE, arXiv 2512.14080, equation 10). What is
kept is the input (N x D), h (R x G) and index vectors: with SwiGLU in bf16 2ND + 4RF bytes and metadata. a is computed again,
gathered rows are gathered again. y and the gathered dx are made in column chunks of at most `chunk_mib`, so no R x D tensor
need exist.

Letters: N input rows, R routed rows, D model width, F expert width, G width of h, E experts (held here).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.kernels.permute import Rows, sum_bags
from moesaic.moe.config import ModelConfig

aten = torch.ops.aten

# ---------------------------------------------------------------- activations


GATES: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}


def activate(kind: str, h_RG: Tensor) -> Tensor:
    """a_RF of h_RG. The gated kinds: Shazeer, arXiv 2002.05202, GeGLU with the exact erf; relu2: So et al., arXiv 2109.08668."""
    if kind == "relu2":
        return h_RG.relu().square()
    gate, up = h_RG.chunk(2, dim=1)
    return GATES[kind](gate) * up


def activate_backward(kind: str, da_RF: Tensor, h_RG: Tensor) -> Tensor:
    """dh_RG, from the gradient of `activate(kind, h_RG)`."""
    if kind == "relu2":
        return da_RF * h_RG.relu().mul_(2)
    gate, up = h_RG.chunk(2, dim=1)
    dh_RG = torch.empty_like(h_RG)
    dgate, dup = dh_RG.chunk(2, dim=1)
    torch.mul(da_RF, GATES[kind](gate), out=dup)
    dactivated = da_RF * up
    if kind == "swiglu":
        aten.silu_backward.grad_input(dactivated, gate, grad_input=dgate)
    elif kind == "geglu":
        aten.gelu_backward.grad_input(dactivated, gate, grad_input=dgate)
    else:
        torch.mul(dactivated, gate > 0, out=dgate)
    return dh_RG


# ---------------------------------------------------------------- the specification


def experts_reference(
    x_ND: Tensor, weights_R: Tensor, w_up_EGD: Tensor, w_down_EDF: Tensor, b_up_EG: Tensor | None, b_down_ED: Tensor | None,
    rows: Rows, activation: str,
) -> Tensor:  # fmt: skip
    """In plain differentiable torch of any floating type; a loop over experts."""
    outputs, start = [], 0
    for j, count in enumerate(rows.counts_E.tolist()):
        part = slice(start, start + count)
        h = x_ND[rows.source_R[part]] @ w_up_EGD[j].T
        if b_up_EG is not None:
            h = h + b_up_EG[j]
        y = activate(activation, h) @ w_down_EDF[j].T
        if b_down_ED is not None:
            y = y + b_down_ED[j]
        outputs.append(y * weights_R[part, None].to(x_ND.dtype))
        start += count
    y_RD = torch.cat(outputs)
    starts = rows.starts
    if starts is None:
        return y_RD[rows.bag].sum(dim=1)
    bags = [rows.bag[a:b] for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False)]
    return torch.stack([y_RD[bag].sum(dim=0) for bag in bags]) if bags else x_ND * 0


# ---------------------------------------------------------------- the torch backend


class _ExpertsOp(torch.autograd.Function):
    """On CPU a loop of matrix products over each expert's rows, which stay in cache; on CUDA `F.grouped_mm` with offsets on the
    device, so that the host never waits for a count."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weights_R: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, b_down: Tensor | None,
        rows: Rows, activation: str, chunk_mib: int,
    ) -> Tensor:  # fmt: skip
        weights_R = weights_R.to(x_ND.dtype)
        columns = _column_chunks(x_ND.shape[1], rows.source_R.numel() * x_ND.element_size(), chunk_mib)
        forward = _forward_loop if x_ND.device.type == "cpu" else _forward_grouped
        h_RG, y_ND = forward(x_ND, weights_R, w_up, w_down, b_up, b_down, rows, activation, columns)
        ctx.save_for_backward(
            x_ND, h_RG, weights_R, w_up, w_down, b_down,
            rows.source_R, rows.expert_R if b_down is not None else None, rows.bag, rows.starts, rows.counts_E,
        )  # fmt: skip
        ctx.activation, ctx.columns, ctx.has_bias = activation, columns, b_up is not None
        return y_ND

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, h_RG, weights_R, w_up, w_down, b_down, source_R, expert_R, bag, starts, counts_E = ctx.saved_tensors
        rows = Rows(source_R, source_R, expert_R, bag, starts, counts_E)
        backward = _backward_loop if x_ND.device.type == "cpu" else _backward_grouped
        grads = backward(
            dy_ND.contiguous(), x_ND, h_RG, weights_R, w_up, w_down, b_down, rows, ctx.activation, ctx.columns
        )
        dx_ND, dweights_R, dw_up, dw_down, db_up, db_down = grads
        if not ctx.has_bias:
            db_up = db_down = None
        return dx_ND, dweights_R.float(), dw_up, dw_down, db_up, db_down, None, None, None


Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _column_chunks(width: int, bytes_per_column: int, chunk_mib: int) -> list[slice]:
    """Equal ranges of the D columns, multiples of 16 but for the last, of at most `chunk_mib` where 16 columns are no more."""
    most = max(16, (chunk_mib * 2**20 // max(bytes_per_column, 1)) // 16 * 16)
    pieces = math.ceil(width / most)
    step = math.ceil(width / pieces / 16) * 16
    return [slice(a, min(a + step, width)) for a in range(0, width, step)]


def _in_chunks(
    columns: list[slice], rows: Rows, n_inputs: int, first: Tensor, fill: Callable[[Tensor, slice], None]
) -> Tensor:
    """The sums of bags, chunk by chunk: `first` (R, columns) is filled already; `fill(buffer, columns)` makes the others."""
    if len(columns) == 1:
        return sum_bags(first, rows.bag, rows.starts)
    out_ND = first.new_empty(n_inputs, columns[-1].stop)
    for i, part in enumerate(columns):
        buffer = first[:, : part.stop - part.start]
        if i:
            if buffer.shape[1] != first.shape[1]:  # the last, narrower one: contiguous in the same memory
                buffer = first.view(-1)[: first.shape[0] * (part.stop - part.start)].view(first.shape[0], -1)
            fill(buffer, part)
        out_ND[:, part] = sum_bags(buffer, rows.bag, rows.starts)
    return out_ND


def _forward_loop(
    x_ND: Tensor, weights_R: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, b_down: Tensor | None,
    rows: Rows, activation: str, columns: list[slice],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n_rows, counts = rows.source_R.numel(), rows.counts_E.tolist()
    h_RG = x_ND.new_empty(n_rows, w_up.shape[1])
    y_Rd = x_ND.new_empty(n_rows, columns[0].stop)
    a_RF = x_ND.new_empty(n_rows, w_down.shape[2]) if len(columns) > 1 else None
    start = 0
    for j, count in enumerate(counts):
        part = slice(start, start + count)
        start += count
        h = torch.mm(x_ND.index_select(0, rows.source_R[part]), w_up[j].T, out=h_RG[part])
        if b_up is not None:
            h += b_up[j]
        a = activate(activation, h).mul_(weights_R[part, None])
        torch.mm(a, w_down[j, columns[0]].T, out=y_Rd[part])
        if a_RF is not None:
            a_RF[part] = a

    def fill(buffer: Tensor, chunk: slice) -> None:
        start = 0
        for j, count in enumerate(counts):
            part = slice(start, start + count)
            start += count
            assert a_RF is not None
            torch.mm(a_RF[part], w_down[j, chunk].T, out=buffer[part])

    y_ND = _in_chunks(columns, rows, x_ND.shape[0], y_Rd, fill)
    return h_RG, y_ND if b_down is None else y_ND + _biases(b_down, weights_R, rows)


def _biases(b_down_ED: Tensor, weights_R: Tensor, rows: Rows) -> Tensor:
    """Sum of weight * b_down over each input's rows, (N, D); as a product with the (N, E) weights, so that no (R, D) is made."""
    # Padding has expert E, which the last column takes and nobody reads.
    weights_RE = weights_R.new_zeros(weights_R.numel(), b_down_ED.shape[0] + 1)
    weights_RE.scatter_(1, rows.expert_R[:, None], weights_R[:, None])
    return sum_bags(weights_RE[:, :-1].contiguous(), rows.bag, rows.starts) @ b_down_ED


def _backward_loop(
    dy_ND: Tensor, x_ND: Tensor, h_RG: Tensor, weights_R: Tensor, w_up: Tensor, w_down: Tensor, b_down: Tensor | None,
    rows: Rows, activation: str, columns: list[slice],
) -> Grads:  # fmt: skip
    n_rows, counts = rows.source_R.numel(), rows.counts_E.tolist()
    dx_Rd = x_ND.new_empty(n_rows, columns[0].stop)
    dh_RG = x_ND.new_empty(n_rows, h_RG.shape[1]) if len(columns) > 1 else None
    dweights_R = torch.empty_like(weights_R)
    dw_up, dw_down = torch.empty_like(w_up), torch.empty_like(w_down)
    db_up = w_up.new_zeros(w_up.shape[:2]) if b_down is not None else None
    db_down = torch.zeros_like(b_down) if b_down is not None else None
    start = 0
    for j, count in enumerate(counts):
        # An expert without rows gets zeros, as the product over no rows gives: never None, never what was in memory.
        part = slice(start, start + count)
        start += count
        source_r, w_r1 = rows.source_R[part], weights_R[part, None]
        dy_rD = dy_ND.index_select(0, source_r)
        a_rF = activate(activation, h_RG[part])
        da_rF = dy_rD @ w_down[j]
        torch.linalg.vecdot(da_rF, a_rF, out=dweights_R[part])
        torch.mm(dy_rD.T, a_rF.mul_(w_r1), out=dw_down[j])
        dh_rG = activate_backward(activation, da_rF.mul_(w_r1), h_RG[part])
        torch.mm(dh_rG.T, x_ND.index_select(0, source_r), out=dw_up[j])
        torch.mm(dh_rG, w_up[j, :, columns[0]], out=dx_Rd[part])
        if dh_RG is not None:
            dh_RG[part] = dh_rG
        if b_down is not None and db_up is not None and db_down is not None:
            dweights_R[part] += dy_rD @ b_down[j]
            torch.mv(dy_rD.T, w_r1[:, 0], out=db_down[j])
            torch.sum(dh_rG, dim=0, out=db_up[j])

    def fill(buffer: Tensor, chunk: slice) -> None:
        start = 0
        for j, count in enumerate(counts):
            part = slice(start, start + count)
            start += count
            assert dh_RG is not None
            torch.mm(dh_RG[part], w_up[j, :, chunk], out=buffer[part])

    dx_ND = _in_chunks(columns, rows, x_ND.shape[0], dx_Rd, fill)
    return dx_ND, dweights_R, dw_up, dw_down, db_up, db_down


def _forward_grouped(
    x_ND: Tensor, weights_R: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, b_down: Tensor | None,
    rows: Rows, activation: str, columns: list[slice],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ends_E = rows.counts_E.cumsum(0, dtype=torch.int32)
    h_RG = F.grouped_mm(x_ND[rows.source_R], w_up.mT, offs=ends_E)
    if b_up is not None:
        h_RG = h_RG + b_up[rows.expert_R.clamp(max=b_up.shape[0] - 1)]
    a_RF = activate(activation, h_RG) * weights_R[:, None]
    out = [sum_bags(F.grouped_mm(a_RF, w_down[:, c].mT, offs=ends_E), rows.bag, rows.starts) for c in columns]
    y_ND = out[0] if len(out) == 1 else torch.cat(out, dim=1)
    return h_RG, y_ND if b_down is None else y_ND + _biases(b_down, weights_R, rows)


def _backward_grouped(
    dy_ND: Tensor, x_ND: Tensor, h_RG: Tensor, weights_R: Tensor, w_up: Tensor, w_down: Tensor, b_down: Tensor | None,
    rows: Rows, activation: str, columns: list[slice],
) -> Grads:  # fmt: skip
    ends_E = rows.counts_E.cumsum(0, dtype=torch.int32)
    # Rows past the last end are padding, and grouped_mm leaves their memory as it was.
    real_R1 = (torch.arange(h_RG.shape[0], device=h_RG.device) < ends_E[-1])[:, None]
    dy_RD = dy_ND[rows.source_R]
    da_RF = F.grouped_mm(dy_RD, w_down, offs=ends_E)
    a_RF = activate(activation, h_RG)
    dweights_R = torch.where(real_R1, da_RF.float() * a_RF.float(), 0).sum(dim=1)
    dw_down = F.grouped_mm(dy_RD.mT, a_RF * weights_R[:, None], offs=ends_E)
    db_up = db_down = None
    dh_RG = activate_backward(activation, da_RF * weights_R[:, None], h_RG)
    if b_down is not None:
        bias_RD = b_down[rows.expert_R.clamp(max=b_down.shape[0] - 1)]
        dweights_R = dweights_R + torch.where(real_R1, dy_RD.float() * bias_RD.float(), 0).sum(dim=1)
        # Sums over an expert's rows as products: a scatter-add would add them in any order. 8 columns: 16 bytes, the alignment.
        ones_R8 = torch.ones_like(h_RG[:, :1]).expand(-1, 8).contiguous()
        db_up = F.grouped_mm(dh_RG.mT, ones_R8, offs=ends_E)[..., 0]
        db_down = F.grouped_mm(dy_RD.mT, ones_R8 * weights_R[:, None], offs=ends_E)[..., 0]
    del dy_RD, a_RF, da_RF
    dw_up = F.grouped_mm(dh_RG.mT, x_ND[rows.source_R], offs=ends_E)
    out = [sum_bags(F.grouped_mm(dh_RG, w_up[:, :, c], offs=ends_E), rows.bag, rows.starts) for c in columns]
    return out[0] if len(out) == 1 else torch.cat(out, dim=1), dweights_R, dw_up, dw_down, db_up, db_down


# ---------------------------------------------------------------- the module


class Experts(nn.Module):
    """The routed experts' weights, each (out, in) as of a linear layer: w_up_EGD (gate rows, then up rows), w_down_EDF, and
    biases b_up_EG, b_down_ED where `model.expert_bias` says so.

    forward(x_ND, weights_R, rows) -> y_ND. A sharded weight (a DTensor over the expert dimension) is used by its local part:
    `rows` then speaks of this rank's experts.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation, self.backend, self.chunk_mib = config.activation, config.experts_backend, config.chunk_mib
        up = config.d_expert * (1 if config.activation == "relu2" else 2)
        self.w_up_EGD = nn.Parameter(torch.empty(config.n_experts, up, config.d_model))
        self.w_down_EDF = nn.Parameter(torch.empty(config.n_experts, config.d_model, config.d_expert))
        self.b_up_EG = nn.Parameter(torch.empty(config.n_experts, up)) if config.expert_bias else None
        self.b_down_ED = nn.Parameter(torch.empty(config.n_experts, config.d_model)) if config.expert_bias else None

    def forward(self, x_ND: Tensor, weights_R: Tensor, rows: Rows) -> Tensor:
        parameters: Any = (self.w_up_EGD, self.w_down_EDF, self.b_up_EG, self.b_down_ED)
        w_up, w_down, b_up, b_down = (w.to_local() if hasattr(w, "to_local") else w for w in parameters)
        if self.backend == "reference":
            return experts_reference(x_ND, weights_R, w_up, w_down, b_up, b_down, rows, self.activation)
        return _ExpertsOp.apply(x_ND, weights_R, w_up, w_down, b_up, b_down, rows, self.activation, self.chunk_mib)
