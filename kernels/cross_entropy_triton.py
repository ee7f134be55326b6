"""Output head and cross entropy as Triton kernels: no logits beyond a tile in forward, a block of the vocabulary's in backward.

    forward    for a part s of the vocabulary:  z_nv   = w_v x_n                                  fp32, never written
                                                part_sn = log sum over v of exp z_nv,  chosen_sn = z_n,target_n or 0
               lse_n = log sum over s of exp part_sn
               loss  = sum over n that count:   lse_n - sum over s of chosen_sn + z_coef lse_n^2
    backward   for a block of the vocabulary:   g_nv   = exp(z_nv - lse_n) (1 + 2 z_coef lse_n) - [v = target_n]      z again
                                                dx_n  += sum over v of g_nv w_v                   fp32 from block to block
                                                dw_v   = sum over n of g_nv x_n                   complete, written once

The term with z_coef is PaLM's z-loss (arXiv 2204.02311), which keeps log sum exp near 0. Kept for backward are the inputs and one
fp32 a token; the torch form (cross_entropy.py) keeps both gradients, and forms 6NDV multiply-adds where this takes 8: logits
are made again, as in Cut Cross-Entropy (arXiv 2411.09009), which adds up dx and dw under locks. Here every sum has one order: a
tile's products in its own program, blocks one launch after another, parts by one small reduction.

Products are of x's type with fp32 sums. What is written for a block is g, in x's type, at most `chunk_bytes` of it.

Letters: N tokens, D width, V vocabulary, S parts of it, B entries of a block; BM, BN, BK tile sizes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moesaic.kernels.interpret import jit
from moesaic.kernels.targets import Cases, meta
from moesaic.kernels.tiles import Tile, dense_tile, processors, product_precision, target_name

GROUP = 8  # tiles of rows that go through all columns together, so that both are found in L2
PARTS = 32  # of the vocabulary in forward, at most


# ---------------------------------------------------------------- kernels


@jit
def _tile(source, row, column, rows, columns, stride, BR: tl.constexpr, BC: tl.constexpr, DESCRIBED: tl.constexpr):
    """BR x BC of a matrix, zero beyond its edge; by the tensor memory accelerator, or by pointers."""
    if DESCRIBED:
        values = source.load([row, column])
    else:
        r = row + tl.arange(0, BR)
        c = column + tl.arange(0, BC)
        places = source + r.to(tl.int64)[:, None] * stride + c[None, :]
        values = tl.load(places, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)
    return values


@jit
def _logits(
    x, w, n, v, N, V, D, stride_x, stride_w, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """z of tokens n and entries v, BM x BN, fp32."""
    z_MN = tl.zeros([BM, BN], tl.float32)
    for k in range(0, D, BK):
        x_MK = _tile(x, n, k, N, D, stride_x, BM, BK, DESCRIBED)
        w_NK = _tile(w, v, k, V, D, stride_w, BN, BK, DESCRIBED)
        z_MN = tl.dot(x_MK, w_NK.T, z_MN, input_precision=PRECISION)
    return z_MN


@jit
def _forward_kernel(
    x, w, targets_N, part_SN, chosen_SN, N, V, D, S, width, stride_x, stride_w,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    m, s = tl.swizzle2d(program // S, program % S, tl.cdiv(N, BM), S, GROUP)
    n = m * BM + tl.arange(0, BM)
    target_M = tl.load(targets_N + n, mask=n < N, other=-1)
    largest_M = tl.full([BM], float("-inf"), tl.float32)
    total_M = tl.zeros([BM], tl.float32)
    chosen_M = tl.zeros([BM], tl.float32)
    for first in range(s * width, tl.minimum((s + 1) * width, V), BN):
        z_MN = _logits(x, w, m * BM, first, N, V, D, stride_x, stride_w, BM, BN, BK, DESCRIBED, PRECISION)
        v = first + tl.arange(0, BN)
        z_MN = tl.where((v < V)[None, :], z_MN, float("-inf"))
        new_M = tl.maximum(largest_M, tl.max(z_MN, axis=1))
        total_M = total_M * tl.exp(largest_M - new_M) + tl.sum(tl.exp(z_MN - new_M[:, None]), axis=1)
        largest_M = new_M
        chosen_M += tl.sum(tl.where(v[None, :] == target_M[:, None], z_MN, 0.0), axis=1)
    places = s.to(tl.int64) * N + n
    tl.store(part_SN + places, largest_M + tl.log(total_M), mask=n < N)
    tl.store(chosen_SN + places, chosen_M, mask=n < N)


@jit
def _gradient_kernel(
    x, w, targets_N, lse_N, g_NB, ignored, z_coef, first, N, V, D, B, stride_x, stride_w,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program, columns = tl.program_id(0), tl.cdiv(B, BN)
    m, b = tl.swizzle2d(program // columns, program % columns, tl.cdiv(N, BM), columns, GROUP)
    z_MN = _logits(x, w, m * BM, first + b * BN, N, V, D, stride_x, stride_w, BM, BN, BK, DESCRIBED, PRECISION)
    n = m * BM + tl.arange(0, BM)
    column = b * BN + tl.arange(0, BN)
    v = first + column
    target_M = tl.load(targets_N + n, mask=n < N, other=ignored)
    lse_M = tl.load(lse_N + n, mask=n < N, other=0.0)
    g_MN = tl.exp(z_MN - lse_M[:, None]) * (1.0 + 2.0 * z_coef * lse_M)[:, None]
    g_MN = tl.where(v[None, :] == target_M[:, None], g_MN - 1.0, g_MN)
    g_MN = tl.where((target_M != ignored)[:, None] & (v < V)[None, :], g_MN, 0.0)
    places = g_NB + n.to(tl.int64)[:, None] * B + column[None, :]
    tl.store(places, g_MN.to(g_NB.dtype.element_ty), mask=(n < N)[:, None] & (column < B)[None, :])


@jit
def _product_kernel(
    a, b, before, scale, out, M, N, K, stride_a, stride_b, stride_out,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TRANSPOSED: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = scale (A B + before), or of A^T; `before` is fp32 and laid out as `out`; it and `scale` may be None."""
    program, columns = tl.program_id(0), tl.cdiv(N, BN)
    i, j = tl.swizzle2d(program // columns, program % columns, tl.cdiv(M, BM), columns, GROUP)
    acc_MN = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        if TRANSPOSED:
            a_MK = _tile(a, k, i * BM, K, M, stride_a, BK, BM, DESCRIBED).T
        else:
            a_MK = _tile(a, i * BM, k, M, K, stride_a, BM, BK, DESCRIBED)
        b_KN = _tile(b, k, j * BN, K, N, stride_b, BK, BN, DESCRIBED)
        acc_MN = tl.dot(a_MK, b_KN, acc_MN, input_precision=PRECISION)
    m = i * BM + tl.arange(0, BM)
    n = j * BN + tl.arange(0, BN)
    places = m.to(tl.int64)[:, None] * stride_out + n[None, :]
    real = (m < M)[:, None] & (n < N)[None, :]
    if before is not None:
        acc_MN += tl.load(before + places, mask=real, other=0.0)
    if scale is not None:
        acc_MN *= tl.load(scale)
    tl.store(out + places, acc_MN.to(out.dtype.element_ty), mask=real)


# ---------------------------------------------------------------- launchers


def _tile_of(x_ND: Tensor) -> Tile:
    """A large one where rows begin at multiples of 16 bytes, and of 16-bit types."""
    large = x_ND.element_size() == 2 and x_ND.stride(0) * x_ND.element_size() % 16 == 0
    return dense_tile(x_ND.device, large)


def _described(device: torch.device, *matrices: Tensor) -> bool:
    """Whether the tensor memory accelerator can read them. AMD's GPUs have none, and read what is described in small pieces."""
    aligned = all(m.stride(0) * m.element_size() % 16 == 0 and m.data_ptr() % 16 == 0 for m in matrices)
    return aligned and not target_name(device).startswith("gfx")


def _operand(matrix: Tensor, rows: int, columns: int, described: bool) -> Any:
    return TensorDescriptor.from_tensor(matrix, [rows, columns]) if described else matrix


def _options(tile: Tile, x: Tensor) -> dict[str, Any]:
    sizes = {"BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": GROUP}
    precision = product_precision(x.device, x.dtype)
    return sizes | {"PRECISION": precision, "num_warps": tile.warps, "num_stages": tile.stages}


def forward(
    x_ND: Tensor, w_VD: Tensor, targets_N: Tensor, ignored: int, z_coef: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse_N, each_N), fp32; each_N: what a token adds to the loss."""
    (n, d), v = x_ND.shape, w_VD.shape[0]
    if n == 0:
        none, lse_N, each_N = (x_ND.new_zeros(shape, dtype=torch.float32) for shape in ((), (0,), (0,)))
        return none, lse_N, each_N
    tile = _tile_of(x_ND)
    # Parts enough for a few programs on each processor; more would be more to write and to reduce.
    wanted = min(PARTS, triton.cdiv(4 * processors(x_ND.device), triton.cdiv(n, tile.m)))
    width = triton.cdiv(triton.cdiv(v, wanted), tile.n) * tile.n
    parts = triton.cdiv(v, width)
    part_SN, chosen_SN = x_ND.new_empty(2, parts, n, dtype=torch.float32).unbind()
    described = _described(x_ND.device, x_ND, w_VD)
    _forward_kernel[triton.cdiv(n, tile.m) * parts,](
        _operand(x_ND, tile.m, tile.k, described), _operand(w_VD, tile.n, tile.k, described), targets_N, part_SN, chosen_SN,
        n, v, d, parts, width, x_ND.stride(0), w_VD.stride(0), DESCRIBED=described, **_options(tile, x_ND),
    )  # fmt: skip
    lse_N = torch.logsumexp(part_SN, dim=0)
    each_N = lse_N - chosen_SN.sum(dim=0)
    if z_coef:
        each_N = each_N + z_coef * lse_N.square()
    each_N = torch.where(targets_N == ignored, 0.0, each_N)
    return each_N.sum(), lse_N, each_N


def backward(
    dloss: Tensor, x_ND: Tensor, w_VD: Tensor, targets_N: Tensor, lse_N: Tensor, ignored: int, z_coef: float, chunk_bytes: int,
    of_x: bool, of_w: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx_ND, dw_VD) in the inputs' types; without values, and of no elements, where not asked for."""
    (n, d), v = x_ND.shape, w_VD.shape[0]
    dx_ND = torch.empty_like(x_ND) if of_x else x_ND.new_empty(0)
    dw_VD = torch.empty_like(w_VD) if of_w else w_VD.new_empty(0)
    if n == 0:
        return dx_ND, dw_VD.zero_()
    tile = _tile_of(x_ND)
    blocks = triton.cdiv(v, max(1, chunk_bytes // (n * x_ND.element_size()) // tile.n) * tile.n)
    b = triton.cdiv(triton.cdiv(v, blocks), tile.n) * tile.n
    g_NB = x_ND.new_empty(n, b)
    sum_ND = x_ND.new_empty(n, d, dtype=torch.float32) if of_x and v > b else None
    described, scale = _described(x_ND.device, x_ND, w_VD), dloss.float()
    for first in range(0, v, b):
        width = min(b, v - first)
        w_BD = w_VD[first : first + width]
        _gradient_kernel[triton.cdiv(n, tile.m) * triton.cdiv(b, tile.n),](
            _operand(x_ND, tile.m, tile.k, described), _operand(w_VD, tile.n, tile.k, described), targets_N, lse_N, g_NB,
            ignored, z_coef, first, n, v, d, b, x_ND.stride(0), w_VD.stride(0), DESCRIBED=described, **_options(tile, x_ND),
        )  # fmt: skip
        if of_x:
            last = first + b >= v
            _product(
                g_NB, w_BD, None if first == 0 else sum_ND, scale if last else None, dx_ND if last else sum_ND, tile
            )
        if of_w:
            _product(g_NB, x_ND, None, scale, dw_VD[first : first + width], tile, transposed=True)
    return dx_ND, dw_VD


def _product(
    a: Tensor, b: Tensor, before: Tensor | None, scale: Tensor | None, out: Any, tile: Tile, transposed: bool = False
) -> None:
    """out = scale (a b + before), or of a^T. `a` may have more columns than the product needs: those of `b` or `out` count."""
    (m, n), k = out.shape, b.shape[0]
    described = _described(a.device, a, b)
    _product_kernel[triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),](
        _operand(a, *((tile.k, tile.m) if transposed else (tile.m, tile.k)), described),
        _operand(b, tile.k, tile.n, described), before, scale, out, m, n, k, a.stride(0), b.stride(0), out.stride(0),
        TRANSPOSED=transposed, DESCRIBED=described, **_options(tile, a),
    )  # fmt: skip


# ---------------------------------------------------------------- one operation for autograd and torch.compile


@torch.library.custom_op("moesaic::linear_cross_entropy", mutates_args=())
def _forward_op(
    x: Tensor, w: Tensor, targets: Tensor, ignored: int, z_coef: float, chunk_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    return forward(x, w, targets, ignored, z_coef)


@_forward_op.register_fake
def _(
    x: Tensor, w: Tensor, targets: Tensor, ignored: int, z_coef: float, chunk_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    loss, lse, each = (x.new_empty(shape, dtype=torch.float32) for shape in ((), x.shape[:1], x.shape[:1]))
    return loss, lse, each


@torch.library.custom_op("moesaic::linear_cross_entropy_backward", mutates_args=())
def _backward_op(
    dloss: Tensor, x: Tensor, w: Tensor, targets: Tensor, lse: Tensor, ignored: int, z_coef: float, chunk_bytes: int,
    of_x: bool, of_w: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return backward(dloss, x, w, targets, lse, ignored, z_coef, chunk_bytes, of_x, of_w)


@_backward_op.register_fake
def _(
    dloss: Tensor, x: Tensor, w: Tensor, targets: Tensor, lse: Tensor, ignored: int, z_coef: float, chunk_bytes: int,
    of_x: bool, of_w: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x) if of_x else x.new_empty(0), torch.empty_like(w) if of_w else w.new_empty(0)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, w, targets, *ctx.rest = inputs
    ctx.save_for_backward(x, w, targets, output[1])
    ctx.mark_non_differentiable(output[1], output[2])


def _differentiate(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, w, targets, lse = ctx.saved_tensors
    of_x, of_w = ctx.needs_input_grad[:2]
    dx, dw = _backward_op(dloss, x, w, targets, lse, *ctx.rest, of_x, of_w)
    return dx if of_x else None, dw if of_w else None, None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_setup)


def fused_linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignored: int, chunk_bytes: int, z_coef: float = 0.0
) -> Tensor:
    """As `linear_cross_entropy`, by the kernels: fp32 scalar. Rows of x and of the weight are contiguous, and of one type."""
    return fused_linear_cross_entropies(x_ND, weight_VD, targets_N, ignored, chunk_bytes, z_coef)[0]


def fused_linear_cross_entropies(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignored: int, chunk_bytes: int, z_coef: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `linear_cross_entropies`, by the kernels."""
    assert x_ND.dtype == weight_VD.dtype and x_ND.stride(1) == weight_VD.stride(1) == 1, (x_ND.dtype, weight_VD.dtype)
    loss, _, each_N = _forward_op(x_ND, weight_VD, targets_N, ignored, z_coef, chunk_bytes)
    return loss, each_N


def compile_cases(target: str) -> Cases:
    """N 8192 in blocks of about 8,000 entries, and in one; odd widths, which no descriptor takes; fp32."""

    def run(n: int, d: int, v: int, dtype: torch.dtype, chunk_bytes: int) -> None:
        x, w, targets = meta(n, d, dtype=dtype), meta(v, d, dtype=dtype), meta(n, dtype=torch.int64)
        loss, lse, _ = forward(x, w, targets, -100, 1e-4)
        backward(loss, x, w, targets, lse, -100, 1e-4, chunk_bytes, True, True)

    return {
        "D 2048, V 50304, bf16": lambda: run(8192, 2048, 50304, torch.bfloat16, 128 * 2**20),
        "D 2048, V 50304, fp16": lambda: run(8192, 2048, 50304, torch.float16, 128 * 2**20),
        "D 1001, V 8191, bf16": lambda: run(8192, 1001, 8191, torch.bfloat16, 512 * 2**20),
        "D 2048, V 50304, fp32": lambda: run(8192, 2048, 50304, torch.float32, 128 * 2**20),
    }
