"""SwiGLU experts over rows sorted by expert: one operation that saves little for backward.

    for row r of expert j:        x = input[source[r]]
        h  = W_up[j] x            (2F: gate, then up)
        a  = silu(h_gate) * h_up
        y  = W_down[j] (w_r * a)  (w_r: the router's weight of this row)
    output[n] = sum_k y[position[n, k]]      in k order

Weighting the activation instead of the output is the same product, and lets backward do without y: with
da' = W_down[j]^T dy, the weight's gradient is <da', a> (SonicMoE, arXiv 2512.14080, equation 10). So all that is kept is the
input (N x D), h (R x 2F) and index vectors; a is computed again, gathered rows are gathered again.

Letters: N input rows, K slots per input row, R routed rows, D model width, F expert width, G = 2F, e experts held here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.moe.config import ModelConfig

if TYPE_CHECKING:
    from moesaic.moe.dispatch import Rows


def experts_reference(x_ND: Tensor, weights_NK: Tensor, rows: Rows, w_up_eGD: Tensor, w_down_eDF: Tensor) -> Tensor:
    """The specification, in plain differentiable torch of any floating type: a loop over experts, then over slots."""
    weights_R = torch.zeros_like(rows.source_R, dtype=weights_NK.dtype)
    weights_R = weights_R.index_put((rows.position_NK,), weights_NK)
    outputs, start = [], 0
    for j, count in enumerate(rows.counts_e.tolist()):
        part = slice(start, start + count)
        gate, up = (x_ND[rows.source_R[part]] @ w_up_eGD[j].T).chunk(2, dim=1)
        outputs.append((F.silu(gate) * up @ w_down_eDF[j].T) * weights_R[part, None].to(x_ND.dtype))
        start += count
    y_RD = torch.cat(outputs)
    return sum((y_RD[position] for position in rows.position_NK.T[1:]), start=y_RD[rows.position_NK[:, 0]])


def sum_slots(y_RD: Tensor, position_NK: Tensor) -> Tensor:
    """y_ND[n] = sum_k y_RD[position_NK[n, k]], in k order: the same bits every time, unlike a scatter-add on CUDA."""
    if position_NK.shape[1] == 1:
        return y_RD.index_select(0, position_NK[:, 0])
    total_ND = y_RD.index_select(0, position_NK[:, 0])
    for k in range(1, position_NK.shape[1]):
        total_ND += y_RD.index_select(0, position_NK[:, k])
    return total_ND


def _swiglu_backward(da_RF: Tensor, h_RG: Tensor) -> Tensor:
    """dh_RG from the gradient of a = silu(gate) * up."""
    gate, up = h_RG.chunk(2, dim=1)
    dh_RG = torch.empty_like(h_RG)
    dgate, dup = dh_RG.chunk(2, dim=1)
    torch.mul(da_RF, F.silu(gate), out=dup)
    dgate.copy_(torch.ops.aten.silu_backward(da_RF * up, gate))
    return dh_RG


def _weighted_activation(h_RG: Tensor, weights_R: Tensor) -> Tensor:
    gate, up = h_RG.chunk(2, dim=1)
    return F.silu(gate).mul_(up).mul_(weights_R[:, None])


class _ExpertsOp(torch.autograd.Function):
    """The `torch` backend. On CPU a loop of matrix products over each expert's rows, which stay in cache; on CUDA
    `F.grouped_mm` with offsets on the device, so that the host never waits for a count."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weights_NK: Tensor, w_up_eGD: Tensor, w_down_eDF: Tensor,
        source_R: Tensor, position_NK: Tensor, counts_e: Tensor,
    ) -> Tensor:  # fmt: skip
        weights_R = torch.empty(source_R.shape, dtype=x_ND.dtype, device=x_ND.device)
        weights_R[position_NK.flatten()] = weights_NK.flatten().to(x_ND.dtype)
        forward = _forward_loop if x_ND.device.type == "cpu" else _forward_grouped
        h_RG, y_RD = forward(x_ND, weights_R, w_up_eGD, w_down_eDF, source_R, counts_e)
        ctx.save_for_backward(x_ND, h_RG, weights_R, w_up_eGD, w_down_eDF, source_R, position_NK, counts_e)
        ctx.weights_dtype = weights_NK.dtype
        return sum_slots(y_RD, position_NK)

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, h_RG, weights_R, w_up_eGD, w_down_eDF, source_R, position_NK, counts_e = ctx.saved_tensors
        backward = _backward_loop if x_ND.device.type == "cpu" else _backward_grouped
        dx_RD, dweights_R, dw_up, dw_down = backward(
            dy_ND.contiguous(), x_ND, h_RG, weights_R, w_up_eGD, w_down_eDF, source_R, counts_e
        )
        dweights_NK = dweights_R[position_NK].to(ctx.weights_dtype)
        return sum_slots(dx_RD, position_NK), dweights_NK, dw_up, dw_down, None, None, None


def _forward_loop(
    x_ND: Tensor, weights_R: Tensor, w_up_eGD: Tensor, w_down_eDF: Tensor, source_R: Tensor, counts_e: Tensor
) -> tuple[Tensor, Tensor]:
    """(h_RG, y_RD); each expert's rows are few enough to stay in cache between the two products."""
    h_RG = x_ND.new_empty(source_R.numel(), w_up_eGD.shape[1])
    y_RD = x_ND.new_empty(source_R.numel(), x_ND.shape[1])
    start = 0
    for j, count in enumerate(counts_e.tolist()):
        part = slice(start, start + count)
        torch.mm(x_ND.index_select(0, source_R[part]), w_up_eGD[j].T, out=h_RG[part])
        torch.mm(_weighted_activation(h_RG[part], weights_R[part]), w_down_eDF[j].T, out=y_RD[part])
        start += count
    return h_RG, y_RD


def _backward_loop(
    dy_ND: Tensor, x_ND: Tensor, h_RG: Tensor, weights_R: Tensor, w_up_eGD: Tensor, w_down_eDF: Tensor,
    source_R: Tensor, counts_e: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx_RD, dweights_R, dw_up, dw_down)."""
    dx_RD = x_ND.new_empty(source_R.numel(), x_ND.shape[1])
    dweights_R = weights_R.new_empty(weights_R.shape)
    dw_up, dw_down = torch.empty_like(w_up_eGD), torch.empty_like(w_down_eDF)
    start = 0
    for j, count in enumerate(counts_e.tolist()):
        # An expert without rows gets zeros, as the product over no rows gives: never None, never what was in memory.
        part = slice(start, start + count)
        dy_rD = dy_ND.index_select(0, source_R[part])
        h_rG, w_r = h_RG[part], weights_R[part]
        gate, up = h_rG.chunk(2, dim=1)
        a_rF = F.silu(gate).mul_(up)
        dscaled_rF = dy_rD @ w_down_eDF[j]
        torch.linalg.vecdot(dscaled_rF, a_rF, out=dweights_R[part])
        torch.mm(dy_rD.T, a_rF.mul_(w_r[:, None]), out=dw_down[j])
        dh_rG = _swiglu_backward(dscaled_rF.mul_(w_r[:, None]), h_rG)
        torch.mm(dh_rG.T, x_ND.index_select(0, source_R[part]), out=dw_up[j])
        torch.mm(dh_rG, w_up_eGD[j], out=dx_RD[part])
        start += count
    return dx_RD, dweights_R, dw_up, dw_down


def _forward_grouped(
    x_ND: Tensor, weights_R: Tensor, w_up_eGD: Tensor, w_down_eDF: Tensor, source_R: Tensor, counts_e: Tensor
) -> tuple[Tensor, Tensor]:
    offsets_e = counts_e.cumsum(0, dtype=torch.int32)
    h_RG = F.grouped_mm(x_ND[source_R], w_up_eGD.mT, offs=offsets_e)
    return h_RG, F.grouped_mm(_weighted_activation(h_RG, weights_R), w_down_eDF.mT, offs=offsets_e)


def _backward_grouped(
    dy_ND: Tensor, x_ND: Tensor, h_RG: Tensor, weights_R: Tensor, w_up_eGD: Tensor, w_down_eDF: Tensor,
    source_R: Tensor, counts_e: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    offsets_e = counts_e.cumsum(0, dtype=torch.int32)
    dy_RD = dy_ND[source_R]
    dscaled_RF = F.grouped_mm(dy_RD, w_down_eDF, offs=offsets_e)
    gate, up = h_RG.chunk(2, dim=1)
    a_RF = F.silu(gate) * up
    dweights_R = (dscaled_RF.float() * a_RF.float()).sum(dim=1)
    dw_down = F.grouped_mm(dy_RD.mT, a_RF * weights_R[:, None], offs=offsets_e)
    dh_RG = _swiglu_backward(dscaled_RF * weights_R[:, None], h_RG)
    dw_up = F.grouped_mm(dh_RG.mT, x_ND[source_R], offs=offsets_e)
    return F.grouped_mm(dh_RG, w_up_eGD, offs=offsets_e), dweights_R, dw_up, dw_down


class Experts(nn.Module):
    """The routed experts' weights. w_up_EGD: gate rows, then up rows; w_down_EDF. As (out, in) of a linear layer each.

    forward(x_ND, weights_NK, rows) -> y_ND, where `rows` says which expert each of the N * K slots visits. A sharded weight
    (a DTensor over the expert dimension) is used by its local part: `rows` then speaks of this rank's experts.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_up_EGD = nn.Parameter(torch.empty(config.n_experts, 2 * config.d_expert, config.d_model))
        self.w_down_EDF = nn.Parameter(torch.empty(config.n_experts, config.d_model, config.d_expert))

    def forward(self, x_ND: Tensor, weights_NK: Tensor, rows: Rows) -> Tensor:
        w_up, w_down = (w.to_local() if hasattr(w, "to_local") else w for w in (self.w_up_EGD, self.w_down_EDF))
        return _ExpertsOp.apply(x_ND, weights_NK, w_up, w_down, rows.source_R, rows.position_NK, rows.counts_e)
