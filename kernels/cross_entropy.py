"""Output head and cross entropy in one operation, without the logits of all tokens at once.

    for a chunk of tokens n:   z_n   = W x_n                         V logits, fp32
                               loss += logsumexp(z_n) - z_n[target_n]
                               g_n   = softmax(z_n) - onehot(target_n)
                               dx_n  = W^T g_n,   dW += g_n x_n^T

The gradient of a sum of losses needs nothing that comes later but one factor, so it is made in the forward pass, while a chunk's
logits are there: no logits are kept, and none are computed twice. Kept for backward are dx (N x D) and dW (V x D). A loss that
nobody differentiates makes neither.

Letters: N tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels.products import mm, mtm

CHUNK_BYTES_CPU = (
    16 * 2**20
)  # of logits: they stay in the last cache, and malloc uses their memory again instead of mapping it anew
CHUNK_BYTES = 512 * 2**20  # elsewhere: products of over a thousand rows, also with a large vocabulary
LEAST_ROWS = 256  # fewer reread a large weight too often: at V 32768, 128 take 9% longer


def linear_cross_entropy_reference(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignored: int, z_coef: float = 0.0
) -> Tensor:
    """The specification: over all targets that are not `ignored`, the sum of cross entropy + z_coef * (log sum exp)^2."""
    logits_NV = x_ND @ weight_VD.T
    z_N = torch.where(targets_N == ignored, 0.0, logits_NV.logsumexp(dim=1).square())
    return F.cross_entropy(logits_NV, targets_N, ignore_index=ignored, reduction="sum") + z_coef * z_N.sum()


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    ignored: int,
    chunk_bytes: int | None = None,
    *,
    backend: str = "torch",
) -> Tensor:
    """Sum of the cross entropies of all targets that are not `ignored`, fp32 scalar. Products in x's type, all else in fp32.

    targets_N: int64 below V, or `ignored`, which is negative. Peak memory beyond inputs and gradients: about `chunk_bytes`, by
    default 16 MiB on a CPU and 512 MiB elsewhere, or the logits of 256 tokens where they take more. `backend`: torch, or triton,
    the kernels of cross_entropy_triton.py, which have no logits in forward and `chunk_bytes` of their gradient in backward.
    """
    return linear_cross_entropies(x_ND, weight_VD, targets_N, ignored, chunk_bytes, backend=backend)[0]


def linear_cross_entropies(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    ignored: int,
    chunk_bytes: int | None = None,
    *,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """What `linear_cross_entropy` gives, and each token's own part of it, fp32 (N,), 0 where ignored: to look at, without a
    gradient."""
    least = 1
    if chunk_bytes is None:
        chunk_bytes, least = (CHUNK_BYTES_CPU if x_ND.device.type == "cpu" else CHUNK_BYTES), LEAST_ROWS
    if backend == "triton":
        from moesaic.kernels.cross_entropy_triton import fused_linear_cross_entropies

        return fused_linear_cross_entropies(x_ND, weight_VD, targets_N, ignored, chunk_bytes)
    rows = max(least, chunk_bytes // (4 * weight_VD.shape[0]))
    # Asked here, for inside a Function's forward gradients are always off, and needs_input_grad knows nothing of no_grad.
    return _LinearCrossEntropy.apply(x_ND, weight_VD, targets_N, ignored, rows, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignored: int, rows: int, differentiated: bool
    ) -> tuple[Tensor, Tensor]:
        each_N = torch.empty(x_ND.shape[0], dtype=torch.float32, device=x_ND.device)
        needed = differentiated and any(ctx.needs_input_grad)
        dx_ND = torch.empty_like(x_ND) if needed else None
        # fp32 whatever the weights are in: it sums over chunks.
        dw_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needed else None
        for start in range(0, x_ND.shape[0], rows):
            x_nD, target_n1 = x_ND[start : start + rows], targets_N[start : start + rows, None]
            z_nV = mm(x_nD, weight_VD.T).float()
            real_n1 = (target_n1 != ignored).float()
            target_n1 = target_n1.clamp(min=0)
            largest_n1 = z_nV.amax(dim=1, keepdim=True)
            chosen_n1 = z_nV.gather(1, target_n1)
            sum_n1 = z_nV.sub_(largest_n1).exp_().sum(dim=1, keepdim=True)
            each_N[start : start + rows] = (real_n1 * (largest_n1 + sum_n1.log() - chosen_n1))[:, 0]
            if dx_ND is not None and dw_VD is not None:
                g_nV = z_nV.mul_(real_n1 / sum_n1).scatter_add_(1, target_n1, -real_n1).to(x_nD.dtype)
                mm(g_nV, weight_VD, out=dx_ND[start : start + rows])
                dw_VD += mtm(g_nV, x_nD)
                del g_nV
            del z_nV  # before there are the next chunk's
        if dw_VD is not None:
            ctx.save_for_backward(dx_ND, dw_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(each_N)
        return each_N.sum(), each_N

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        dx_ND, dw_VD = ctx.saved_tensors
        return dx_ND * dloss.to(dx_ND.dtype), dw_VD * dloss.to(dw_VD.dtype), None, None, None, None
