"""Biases of the experts inside the fused kernels (moesaic.kernels.fused_ep), beside the products of tasks that are there: no
task, no flag and no byte more.

    up         h = W_up[x] row + b_up[x]
    down       slot of the source = W_down[x] a + b_down[x]
    backward   dS = <da, a> + <dO, b_down[x]>                 in down tasks of the first columns
               db_down[x] = sum over its rows of weight dO    in weight tasks of the first columns, in the order of rows
               db_up[x] = sum over its rows of dh

Letters: M rows of a tile, N columns, D model width, F expert width, G width of h, K rows of a block, P columns of a sum.
"""

import triton.language as tl

from moesaic.kernels.interpret import jit


@jit
def with_bias(x_MN, b_EQ, j, columns, first, end, Q: tl.constexpr):
    """x plus columns `first` + `columns` of expert j's bias, Q wide, as far as `columns` are below `end`."""
    at = b_EQ + j.to(tl.int64) * Q + first + columns
    return x_MN + tl.load(at, mask=columns < end, other=0.0).to(tl.float32)[None, :]


@jit
def bias_scores(
    dy_RD, holder_R, b_eD, j, tile, end, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ONCE: tl.constexpr
):
    """<dO, b_down> of a tile's rows; 0 for none."""
    place = tile * BM + tl.arange(0, BM)
    row = tl.minimum(place, end - 1)
    holder = tl.load(holder_R + row, cache_modifier=".cg") if ONCE else row
    sum_M = tl.zeros([BM], tl.float32)
    for d in range(0, D, BK):
        ds = d + tl.arange(0, BK)
        mask = (place < end)[:, None] & (ds < D)[None, :]
        dy_MK = tl.load(dy_RD + holder.to(tl.int64)[:, None] * D + ds[None, :], mask=mask, other=0.0)
        b_K = tl.load(b_eD + j.to(tl.int64) * D + ds, mask=ds < D, other=0.0)
        sum_M += tl.sum(dy_MK.to(tl.float32) * b_K.to(tl.float32)[None, :], axis=1)
    return sum_M


@jit
def bias_sums(
    x_RP, weight_R, out, holder_R, j, start, count, p, P: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, HELD: tl.constexpr
):  # fmt: skip
    """Columns of the p-th block of the sum over an expert's rows of x, times their weight where that is given. HELD: rows are
    read through `holder_R`."""
    ps = p * BP + tl.arange(0, BP)
    sum_P = tl.zeros([BP], tl.float32)
    for r in range(0, count, BK):
        k = r + tl.arange(0, BK)
        row = start + tl.where(k < count, k, 0)
        holder = tl.load(holder_R + row, cache_modifier=".cg") if HELD else row
        mask = (k < count)[:, None] & (ps < P)[None, :]
        x_KP = tl.load(x_RP + holder.to(tl.int64)[:, None] * P + ps[None, :], mask=mask, other=0.0).to(tl.float32)
        if weight_R is not None:
            x_KP *= tl.load(weight_R + row, cache_modifier=".cg")[:, None]
        sum_P += tl.sum(x_KP, axis=0)
    tl.store(out + j.to(tl.int64) * P + ps, sum_P.to(out.dtype.element_ty), mask=ps < P)
