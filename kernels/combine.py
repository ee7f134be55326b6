"""The outputs of a token's rows, weighted and added up in the order of its slots: the same bits every time.

    for input n:  y[n]  = sum over j of w[r] rows[r],   r = bag[n, j]        or bag[starts[n] + j], j < starts[n + 1] - starts[n]
                  drows[r] = w[r] dy[n],   dw[r] = <dy[n], rows[r]>          0 for rows in no bag

Without weights, w = 1. Sums in fp32, whatever the rows are in. One launch each way; no atomics, as a row is in at most one bag.
Bytes moved: forward (R + N) D of the rows' type; backward the same, and with weights the R D of the rows once more.

Letters: N inputs, R rows, D width, K rows per input.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.interpret import jit


def combine_reference(rows_RD: Tensor, bag: Tensor, starts: Tensor | None, weights_R: Tensor | None = None) -> Tensor:
    """y_ND in plain differentiable torch of any floating type."""
    if weights_R is not None:
        rows_RD = rows_RD * weights_R[:, None].to(rows_RD.dtype)
    if starts is None:
        return rows_RD[bag].sum(dim=1)
    bags = [rows_RD[bag[a:b]].sum(dim=0) for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False)]
    return torch.stack(bags) if bags else rows_RD[:0]


@jit
def _bags(bag, starts, n, N, K, RAGGED: tl.constexpr):
    """First place and number of rows of each of these inputs; none for those past N."""
    if RAGGED:
        first = tl.load(starts + n, mask=n < N, other=0)
        return first, tl.load(starts + n + 1, mask=n < N, other=0) - first
    return n * K, tl.where(n < N, K, 0).to(tl.int64)


@jit
def _combine_kernel(
    rows_RD, bag, starts, weights_R, y_ND, N, D, K, RAGGED: tl.constexpr, WEIGHTED: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    first, count = _bags(bag, starts, n, N, K, RAGGED)
    total = tl.zeros((BN, BD), tl.float32)
    for j in range(tl.max(count, axis=0)):
        r = tl.load(bag + first + j, mask=j < count, other=0).to(tl.int64)
        inside = (j < count)[:, None] & (d < D)[None, :]
        row = tl.load(rows_RD + r[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights_R + r, mask=j < count, other=0.0).to(tl.float32)[:, None]
        total += row
    inside = (n < N)[:, None] & (d < D)[None, :]
    tl.store(y_ND + n[:, None] * D + d[None, :], total.to(y_ND.dtype.element_ty), mask=inside)


@jit
def _spread_kernel(
    dy_ND, rows_RD, bag, starts, weights_R, drows_RD, dw_R, N, D, K, RAGGED: tl.constexpr, WEIGHTED: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    first, count = _bags(bag, starts, n, N, K, RAGGED)
    for j in range(tl.max(count, axis=0)):
        r = tl.load(bag + first + j, mask=j < count, other=0).to(tl.int64)
        w = tl.full((BN,), 1.0, tl.float32)
        if WEIGHTED:
            w = tl.load(weights_R + r, mask=j < count, other=0.0).to(tl.float32)
        dw = tl.zeros((BN,), tl.float32)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            inside = (j < count)[:, None] & (d < D)[None, :]
            dy = tl.load(dy_ND + n[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            place = r[:, None] * D + d[None, :]
            tl.store(drows_RD + place, (w[:, None] * dy).to(drows_RD.dtype.element_ty), mask=inside)
            if WEIGHTED:
                dw += tl.sum(dy * tl.load(rows_RD + place, mask=inside, other=0.0).to(tl.float32), axis=1)
        if WEIGHTED:
            tl.store(dw_R + r, dw, mask=j < count)


def _blocks(d: int) -> tuple[int, int]:
    """Inputs and columns that a program takes: 2,048 values in all, columns first."""
    columns = min(triton.next_power_of_2(d), 512)
    return max(1, min(16, 2048 // columns)), columns


def _run(rows_RD: Tensor, bag: Tensor, starts: Tensor | None, weights_R: Tensor | None) -> Tensor:
    d, n = rows_RD.shape[1], bag.shape[0] if starts is None else starts.numel() - 1
    rows_RD, (block_n, block_d), y_ND = rows_RD.contiguous(), _blocks(d), rows_RD.new_empty(n, d)
    if y_ND.numel():
        _combine_kernel[triton.cdiv(n, block_n), triton.cdiv(d, block_d)](
            rows_RD, bag, bag if starts is None else starts, rows_RD if weights_R is None else weights_R, y_ND, n, d,
            bag.shape[1] if starts is None else 0, RAGGED=starts is not None, WEIGHTED=weights_R is not None,
            BN=block_n, BD=block_d,
        )  # fmt: skip
    return y_ND


def _run_backward(
    dy_ND: Tensor, rows_RD: Tensor, bag: Tensor, starts: Tensor | None, weights_R: Tensor | None
) -> list[Tensor]:
    """[drows_RD] and, with weights, [dweights_R]."""
    (n, d), (block_n, block_d) = dy_ND.shape, _blocks(rows_RD.shape[1])
    rows_RD, dy_ND = rows_RD.contiguous(), dy_ND.contiguous()
    # Rows in no bag are written by nobody.
    make = torch.empty_like if starts is None else torch.zeros_like
    out = [make(rows_RD)] if weights_R is None else [make(rows_RD), make(weights_R, dtype=torch.float32)]
    if dy_ND.numel() and bag.numel():
        _spread_kernel[(triton.cdiv(n, block_n),)](
            dy_ND, rows_RD, bag, bag if starts is None else starts, rows_RD if weights_R is None else weights_R, out[0], out[-1],
            n, d, bag.shape[1] if starts is None else 0, RAGGED=starts is not None, WEIGHTED=weights_R is not None,
            BN=block_n, BD=block_d,
        )  # fmt: skip
    return [out[0], out[1].to(weights_R.dtype)] if weights_R is not None else out


_op = torch.library.custom_op("moesaic::combine", _run, mutates_args=())
_op_backward = torch.library.custom_op("moesaic::combine_backward", _run_backward, mutates_args=())


@_op.register_fake
def _(rows_RD: Tensor, bag: Tensor, starts: Tensor | None, weights_R: Tensor | None) -> Tensor:
    return rows_RD.new_empty(bag.shape[0] if starts is None else starts.numel() - 1, rows_RD.shape[1])


@_op_backward.register_fake
def _(dy_ND: Tensor, rows_RD: Tensor, bag: Tensor, starts: Tensor | None, weights_R: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(rows_RD)] + ([] if weights_R is None else [torch.empty_like(weights_R)])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_RD, bag, starts, weights_R = inputs
    ctx.like = rows_RD.shape, rows_RD.dtype
    # Without weights, the rows themselves are not needed.
    ctx.save_for_backward(rows_RD if weights_R is not None else rows_RD.new_empty(0), bag, starts, weights_R)


def _differentiate(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
    rows_RD, bag, starts, weights_R = ctx.saved_tensors
    if weights_R is None:
        shape, dtype = ctx.like
        rows_RD = dy_ND.new_empty(shape, dtype=dtype)
    grads = _op_backward(dy_ND, rows_RD, bag, starts, weights_R)
    return grads[0], None, None, grads[1] if weights_R is not None else None


_op.register_autograd(_differentiate, setup_context=_save)


def combine(rows_RD: Tensor, bag: Tensor, starts: Tensor | None, weights_R: Tensor | None = None) -> Tensor:
    """y_ND, of the rows' type. Differentiable in rows_RD and weights_R.

    rows_RD    bf16, fp16 or fp32
    bag        int64, rows of each input: (N, K); or (at least the sum of all,), of which input n has those from starts[n] on,
               up to starts[n + 1]. A row is in one bag, or in none
    starts     None, or int64 (N + 1,)
    weights_R  any floating type
    """
    return _op(rows_RD, bag, starts, weights_R)


def compile_cases(target: str) -> dict[str, Any]:
    """For moesaic.kernels.targets."""

    def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows_RD, dy_ND = meta(32768, 2048, dtype=torch.bfloat16), meta(4096, 2048, dtype=torch.bfloat16)
    weights_R, bag, flat, starts = meta(32768, dtype=torch.float32), meta(4096, 8), meta(32768), meta(4097)
    return {
        "D 2048, K 8": lambda: _run(rows_RD, bag, None, weights_R),
        "D 2048, bags of any size": lambda: _run(rows_RD, flat, starts, None),
        "backward, D 2048, K 8": lambda: _run_backward(dy_ND, rows_RD, bag, None, weights_R),
        "backward, D 2048, bags of any size": lambda: _run_backward(dy_ND, rows_RD, flat, starts, weights_R),
    }
