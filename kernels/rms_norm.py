"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * w over the last dimension (arXiv 1910.07467).

    r  = (mean(x^2) + eps)^(-1/2)                    one value a row
    y  = x r w
    dw = sum over rows of dy x r
    dx = dy w r - x r^3 <dy w, x> / D

On a CPU, torch composes it, and its gradient, of a dozen passes over memory; here they take a handful. Elsewhere torch's own
fused operation runs. Letters: D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` with a weight, over the last dimension; any floating type, statistics in the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == self.weight.dtype and self.eps is not None and x.numel():
            return _CpuRMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class _CpuRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, r)
        return (x * r).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, r = ctx.saved_tensors
        product = dy * x
        rows_RD = product.flatten(0, -2)
        dw_D = torch.mv(rows_RD.T, r.flatten())
        correction = torch.mv(rows_RD, weight_D).view_as(r).mul_(r.pow(3)).div_(-x.shape[-1])
        dx = torch.mul(dy, weight_D, out=product).mul_(r).addcmul_(x, correction)
        return dx, dw_D, None
