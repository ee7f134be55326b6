"""Grouped matrix products over rows sorted by expert, of sizes that only the device knows.

    varlen_m   for row r of expert e:   y[r] = W[e] x[source[r]] + b[e]          W (E, N, K), transposed: W^T[e], W (E, K, N)
    varlen_k   for expert e:            dW[e] = sum over its rows r of left[r]^T right[r]       (E, P, Q)
                                        sums[e] = sum over its rows r of weight[r] left[r]      (E, P), a bias's gradient

`source` is applied while a tile is loaded: no gathered copy is made, in varlen_k of neither operand. Products of bf16, fp16 or
fp32 are added in fp32. An expert without rows has no tiles in varlen_m and zeros in varlen_k.

How the work is cut: as many programs as the device has multiprocessors, each taking every P-th tile of a list that is never
written down. In varlen_m it holds each expert's M-row tiles times the column tiles; a tile finds its expert in the cumulative
counts of M tiles. Within an expert, GROUP row tiles go through all columns together, so that programs which run at a time share
rows and weights in L2. In varlen_k an expert's tiles are as deep as it has rows: the experts come by falling count, so that the
long ones are dealt out first and evenly. `schedule` computes all that from the counts in one launch: the host never waits.

Letters: R rows, E experts, K depth, N columns; P x Q the matrices of varlen_k; BM, BN, BK tile sizes.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moesaic.kernels.interpret import jit
from moesaic.kernels.tiles import Tile, gemm_tile, processors, product_precision, target_name

GROUP = 8  # row tiles that share the columns' weights in L2


# ---------------------------------------------------------------- the specification


def varlen_m_reference(
    x: Tensor, w: Tensor, counts_E: Tensor, source_R: Tensor | None, bias_EN: Tensor | None, transposed: bool
) -> Tensor:
    """In plain torch of any floating type; rows past the last expert's are zero."""
    rows_RK = x if source_R is None else x[source_R]
    y_RN = x.new_zeros(rows_RK.shape[0], w.shape[2 if transposed else 1])
    start = 0
    for e, count in enumerate(counts_E.tolist()):
        part = slice(start, start + count)
        y_RN[part] = rows_RK[part] @ (w[e] if transposed else w[e].T)
        if bias_EN is not None:
            y_RN[part] += bias_EN[e]
        start += count
    return y_RN


def varlen_k_reference(
    left: Tensor, right: Tensor, counts_E: Tensor, source_R: Tensor, gather: str, weights_R: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(dW, sums); `gather` says which operand is read through `source_R`: left or right."""
    left_RP, right_RQ = (left[source_R], right) if gather == "left" else (left, right[source_R])
    weighted_RP = left_RP if weights_R is None else left_RP * weights_R[:, None].to(left.dtype)
    out, sums, start = [], [], 0
    for count in counts_E.tolist():
        part = slice(start, start + count)
        out.append(left_RP[part].T @ right_RQ[part])
        sums.append(weighted_RP[part].sum(dim=0))
        start += count
    return torch.stack(out), torch.stack(sums)


# ---------------------------------------------------------------- who computes what


@jit
def _schedule_kernel(counts_E, starts_E, tile_ends_E, order_E, E, BM: tl.constexpr, BE: tl.constexpr):
    mine = tl.program_id(0) * BE + tl.arange(0, BE)
    count = tl.load(counts_E + mine, mask=mine < E, other=0)
    start = tl.zeros([BE], tl.int64)
    tiles = tl.cdiv(count, BM)
    rank = tl.zeros([BE], tl.int32)
    for first in range(0, E, BE):
        other = first + tl.arange(0, BE)
        n = tl.load(counts_E + other, mask=other < E, other=-1)[None, :]
        earlier = other[None, :] < mine[:, None]
        start += tl.sum(tl.where(earlier, n, 0), axis=1)
        tiles += tl.sum(tl.where(earlier, tl.cdiv(n, BM), 0), axis=1)
        before = (n > count[:, None]) | ((n == count[:, None]) & earlier)
        rank += tl.sum(before.to(tl.int32), axis=1)
    tl.store(starts_E + mine, start, mask=mine < E)
    tl.store(tile_ends_E + mine, tiles.to(tl.int32), mask=mine < E)
    tl.store(order_E + rank, mine, mask=mine < E)


@jit
def first_tile(XCDS: tl.constexpr):
    """Where this program begins. AMD deals programs to its dies in turn; neighbours in the list belong on one die and its L2."""
    program = tl.program_id(0)
    return program % XCDS * (tl.num_programs(0) // XCDS) + program // XCDS


@jit
def find_tile(
    tile, n_tiles, counts_E, starts_E, tile_ends_E, E, BM: tl.constexpr, BE: tl.constexpr, GROUP: tl.constexpr
):
    """(expert, first row, end of the expert's rows, column tile) of a tile of varlen_m."""
    experts = tl.arange(0, BE)
    ends = tl.load(tile_ends_E + experts, mask=experts < E, other=2**31 - 1)
    expert = tl.sum((ends <= tile // n_tiles).to(tl.int32), axis=0)
    count = tl.load(counts_E + expert)
    m_tiles = tl.cdiv(count, BM).to(tl.int32)
    local = tile - (tl.load(tile_ends_E + expert) - m_tiles) * n_tiles
    m, n = tl.swizzle2d(local // n_tiles, local % n_tiles, m_tiles, n_tiles, GROUP)
    start = tl.load(starts_E + expert)
    return expert, start + m * BM, start + count, n


# ---------------------------------------------------------------- one tile


@jit
def load_weight(
    w, expert, row, column, rows, columns, stride_e, stride_r, BR: tl.constexpr, BC: tl.constexpr, DESCRIBED: tl.constexpr
):  # fmt: skip
    """BR x BC of an expert's matrix, zero beyond its edge."""
    if DESCRIBED:
        block = w.load([expert, row, column]).reshape(BR, BC)
    else:
        r = row + tl.arange(0, BR)
        c = column + tl.arange(0, BC)
        places = w + expert.to(tl.int64) * stride_e + r.to(tl.int64)[:, None] * stride_r + c[None, :]
        block = tl.load(places, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)
    return block


@jit
def multiply(
    acc_MN, x_MK, w, expert, n, k, N, K, stride_e, stride_r, BN: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x W^T, or x W, for BK of the depth: operands of another format need another one of these, and of `load_rows`."""
    if TRANSPOSED:
        b = load_weight(w, expert, k, n, K, N, stride_e, stride_r, BK, BN, DESCRIBED)
    else:
        b = load_weight(w, expert, n, k, N, K, stride_e, stride_r, BN, BK, DESCRIBED).T
    return tl.dot(x_MK, b, acc_MN, input_precision=PRECISION)


@jit
def load_rows(x_M1, k, K, BK: tl.constexpr, EVEN: tl.constexpr):
    """BK values at k of the rows that the pointers x_M1 point to."""
    ks = k + tl.arange(0, BK)
    return tl.load(x_M1 + ks[None, :]) if EVEN else tl.load(x_M1 + ks[None, :], mask=(ks < K)[None, :], other=0.0)


@jit
def rows_by_weight(
    x_M1, w, expert, n, n2, N, K, stride_e, stride_r, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PAIR: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns n of rows times the expert's matrix, and columns n2, if PAIR, of the same rows; BM x BN each, fp32."""
    acc_MN = tl.zeros([BM, BN], tl.float32)
    acc2_MN = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        x_MK = load_rows(x_M1, k, K, BK, EVEN)
        acc_MN = multiply(
            acc_MN, x_MK, w, expert, n, k, N, K, stride_e, stride_r, BN, BK, TRANSPOSED, DESCRIBED, PRECISION
        )
        if PAIR:
            acc2_MN = multiply(
                acc2_MN, x_MK, w, expert, n2, k, N, K, stride_e, stride_r, BN, BK, TRANSPOSED, DESCRIBED, PRECISION
            )
    return acc_MN, acc2_MN


@jit
def row_pointers(x, source_R, row, end, stride, BM: tl.constexpr, GATHER: tl.constexpr):
    """(pointers to BM input rows, BM x 1; the rows, int64; which exist). Rows past the end point to some row that exists."""
    rows = row + tl.arange(0, BM)
    real = rows < end
    places = tl.load(source_R + rows, mask=real, other=0) if GATHER else tl.where(real, rows, row)
    return x + places[:, None] * stride, rows, real


# ---------------------------------------------------------------- kernels


@jit
def _varlen_m_kernel(
    x, source_R, w, bias_EN, y_RN, parts_RP, sums_R, counts_E, starts_E, tile_ends_E, E, N, K, P,
    stride_x, stride_e, stride_r,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, BP: tl.constexpr, GROUP: tl.constexpr,
    XCDS: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(N, BN)
    tiles = tl.load(tile_ends_E + E - 1) * n_tiles
    for tile in range(first_tile(XCDS), tiles, tl.num_programs(0)):
        expert, row, end, n_tile = find_tile(tile, n_tiles, counts_E, starts_E, tile_ends_E, E, BM, BE, GROUP)
        x_M1, rows, real = row_pointers(x, source_R, row, end, stride_x, BM, source_R is not None)
        n = n_tile * BN
        acc_MN, _ = rows_by_weight(
            x_M1, w, expert, n, n, N, K, stride_e, stride_r, BM, BN, BK, False, TRANSPOSED, DESCRIBED, EVEN, PRECISION
        )
        ns = n + tl.arange(0, BN)
        if bias_EN is not None:
            acc_MN += tl.load(bias_EN + expert.to(tl.int64) * N + ns, mask=ns < N, other=0.0).to(tl.float32)[None, :]
        places = y_RN + rows[:, None] * N + ns[None, :]
        tl.store(places, acc_MN.to(y_RN.dtype.element_ty), mask=real[:, None] & (ns < N)[None, :])
        if parts_RP is not None and n_tile == 0:
            p = tl.arange(0, BP)
            mask = real[:, None] & (p < P)[None, :]
            parts = tl.load(parts_RP + rows[:, None] * P + p[None, :], mask=mask, other=0.0)
            tl.store(sums_R + rows, tl.sum(parts, axis=1), mask=real)


@jit
def _varlen_k_kernel(
    left, right, source_R, weights_R, out_EPQ, sums_EP, counts_E, starts_E, order_E, E, P, Q, stride_l, stride_r,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, XCDS: tl.constexpr,
    GATHER_LEFT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    p_tiles = tl.cdiv(P, BM)
    q_tiles = tl.cdiv(Q, BN)
    for tile in range(first_tile(XCDS), E * p_tiles * q_tiles, tl.num_programs(0)):
        expert = tl.load(order_E + tile // (p_tiles * q_tiles))
        local = tile % (p_tiles * q_tiles)
        p_tile, q_tile = tl.swizzle2d(local // q_tiles, local % q_tiles, p_tiles, q_tiles, GROUP)
        ps = p_tile * BM + tl.arange(0, BM)
        qs = q_tile * BN + tl.arange(0, BN)
        start = tl.load(starts_E + expert)
        count = tl.load(counts_E + expert).to(tl.int32)
        acc_MN = tl.zeros([BM, BN], tl.float32)
        for r in range(0, count, BK):
            rows = r + tl.arange(0, BK)
            real = (rows < count)[:, None]
            rows = start + rows
            gathered = tl.load(source_R + rows[:, None], mask=real, other=0)
            l_rows, r_rows = (gathered, rows[:, None]) if GATHER_LEFT else (rows[:, None], gathered)
            a_KM = tl.load(left + l_rows * stride_l + ps[None, :], mask=real & (ps < P)[None, :], other=0.0)
            b_KN = tl.load(right + r_rows * stride_r + qs[None, :], mask=real & (qs < Q)[None, :], other=0.0)
            acc_MN = tl.dot(a_KM.T, b_KN, acc_MN, input_precision=PRECISION)
        places = out_EPQ + expert.to(tl.int64) * P * Q + ps.to(tl.int64)[:, None] * Q + qs[None, :]
        tl.store(places, acc_MN.to(out_EPQ.dtype.element_ty), mask=(ps < P)[:, None] & (qs < Q)[None, :])
        if sums_EP is not None and q_tile == 0:
            total_M = tl.zeros([BM], tl.float32)
            for r in range(0, count, BK):
                rows = r + tl.arange(0, BK)
                real = rows < count
                rows = start + rows
                l_rows = tl.load(source_R + rows, mask=real, other=0) if GATHER_LEFT else rows
                mask = real[:, None] & (ps < P)[None, :]
                a_KM = tl.load(left + l_rows[:, None] * stride_l + ps[None, :], mask=mask, other=0.0).to(tl.float32)
                if weights_R is not None:
                    a_KM *= tl.load(weights_R + rows, mask=real, other=0.0)[:, None]
                total_M += tl.sum(a_KM, axis=0)
            tl.store(sums_EP + expert.to(tl.int64) * P + ps, total_M.to(sums_EP.dtype.element_ty), mask=ps < P)


# ---------------------------------------------------------------- launchers


@dataclass(frozen=True)
class Schedule:
    """int64 (E,), but int32 tile_ends_E and order_E: rows of each expert, its first row, M tiles up to and with it, and the
    experts by falling count. All on the device."""

    counts_E: Tensor
    starts_E: Tensor
    tile_ends_E: Tensor
    order_E: Tensor
    m: int


def schedule(counts_E: Tensor, m: int) -> Schedule:
    """The schedule of products over counts_E, int64, rows per expert, in tiles of m rows. One launch."""
    n_experts = counts_E.numel()
    starts_E = torch.empty_like(counts_E)
    tile_ends_E, order_E = counts_E.new_empty(2, n_experts, dtype=torch.int32).unbind()
    block = min(32, triton.next_power_of_2(n_experts))
    _schedule_kernel[(triton.cdiv(n_experts, block),)](
        counts_E, starts_E, tile_ends_E, order_E, n_experts, BM=m, BE=block, num_warps=4
    )
    return Schedule(counts_E, starts_E, tile_ends_E, order_E, m)


def launch_options(tile: Tile, *operands: Tensor, any_m: bool = False) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the arguments that all products share.

    Where rows of an operand don't begin at multiples of 16 bytes, their addresses and masks take registers, and the tile is
    smaller; its m only if that is free, as `any_m` says: token rounding and the schedule count in it.
    """
    device, size = operands[0].device, operands[0].element_size()
    target, programs = target_name(device), processors(device)
    m, n, stages = tile.m, tile.n, tile.stages
    # As many bytes of the depth as of 16-bit types: registers and shared memory stay the same.
    depth = tile.k if size == 2 else max(16, tile.k // 2)
    if any(operand.stride(-2) * size % 16 for operand in operands):
        m, n, depth = min(m, 64) if any_m else m, min(n, 64), min(depth, 32)
        stages = 1 if target.startswith("gfx") else stages
    dies = 8 if target.startswith("gfx") and programs % 8 == 0 else 1
    return (programs,), all_registers(target) | {
        "BM": m, "BN": n, "BK": depth, "GROUP": GROUP, "XCDS": dies,
        "PRECISION": product_precision(device, operands[0].dtype), "num_warps": tile.warps, "num_stages": stages,
    }  # fmt: skip


def all_registers(target: str) -> dict[str, int]:
    """An option of launches whose grid is persistent: one program is on a multiprocessor, with all of its registers. To have room
    for two, NVIDIA's assembler would spill a few."""
    return {"maxnreg": 255} if target.startswith("sm_") else {}


def _in_rows(*tensors: Tensor) -> bool:
    """Whether values of a row are neighbours in memory."""
    return all(tensor.stride(-1) == 1 or tensor.shape[-1] == 1 or not tensor.numel() for tensor in tensors)


def describe(w: Tensor, rows: int, columns: int) -> tuple[Tensor | TensorDescriptor, bool]:
    """A descriptor of w (E, ·, ·) for blocks of an expert's rows x columns, which TMA loads. Or w itself: where it isn't laid out
    as descriptors need, 16-byte alignment of all but the last dimension, and on AMD, which has no TMA: Triton 3.7.1 makes 2-byte
    loads of a descriptor's there, but 16-byte loads of pointers'."""
    strides = all(stride * w.element_size() % 16 == 0 for stride in w.stride()[:2])
    if not strides or target_name(w.device).startswith("gfx") or w.data_ptr() % 16 != 0:
        return w, False
    return TensorDescriptor(w, list(w.shape), list(w.stride()), [1, rows, columns]), True


def varlen_m(
    x: Tensor, w: Tensor, plan: Schedule, tile: Tile, *, source_R: Tensor | None = None, bias_EN: Tensor | None = None,
    transposed: bool = False, parts_RP: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(y_RN, row sums of parts_RP or None).

    x          (R, K), or (inputs, K) read through source_R, int64 (R,); rows contiguous
    w          (E, N, K), or (E, K, N) if transposed; the last dimension contiguous
    bias_EN    added to the rows of each expert
    parts_RP   fp32: their sums over P, in a fixed order, on the way
    Rows past the last expert's are left as they are in memory.
    """
    assert x.dtype == w.dtype and plan.m == tile.m and _in_rows(x, w), (x.dtype, w.dtype)
    n_experts, (n, k) = w.shape[0], (w.shape[2], w.shape[1]) if transposed else (w.shape[1], w.shape[2])
    assert x.shape[1] == k, (x.shape, w.shape)
    n_rows = (x if source_R is None else source_R).shape[0]
    y_RN = x.new_empty(n_rows, n)
    sums_R = None if parts_RP is None else parts_RP.new_zeros(n_rows)
    grid, options = launch_options(tile, x, w)
    bn, bk = options["BN"], options["BK"]
    described, is_described = describe(w, *((bk, bn) if transposed else (bn, bk)))
    p = 1 if parts_RP is None else parts_RP.shape[1]
    _varlen_m_kernel[grid](
        x, source_R, described, bias_EN, y_RN, parts_RP, sums_R, plan.counts_E, plan.starts_E, plan.tile_ends_E,
        n_experts, n, k, p, x.stride(0), w.stride(0), w.stride(1),
        BE=triton.next_power_of_2(n_experts), BP=triton.next_power_of_2(p), TRANSPOSED=transposed, DESCRIBED=is_described,
        EVEN=k % bk == 0, **options,
    )  # fmt: skip
    return y_RN, sums_R


def varlen_k(
    left: Tensor, right: Tensor, plan: Schedule, tile: Tile, source_R: Tensor, *, gather: str,
    sums: bool = False, weights_R: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dW_EPQ, sums_EP or None): of left (·, P) and right (·, Q), of which `gather`, left or right, is read through source_R.

    sums       also sum the rows of left, times fp32 weights_R where given
    """
    assert left.dtype == right.dtype and gather in ("left", "right") and _in_rows(left, right), (
        left.dtype,
        right.dtype,
    )
    n_experts, p, q = plan.counts_E.numel(), left.shape[1], right.shape[1]
    out_EPQ = left.new_empty(n_experts, p, q)
    sums_EP = left.new_empty(n_experts, p) if sums else None
    grid, options = launch_options(tile, left, right, any_m=True)
    _varlen_k_kernel[grid](
        left, right, source_R, weights_R, out_EPQ, sums_EP, plan.counts_E, plan.starts_E, plan.order_E, n_experts, p, q,
        left.stride(0), right.stride(0), GATHER_LEFT=gather == "left", **options,
    )  # fmt: skip
    return out_EPQ, sums_EP


# ---------------------------------------------------------------- ahead of time


def compile_cases(target: str) -> Any:
    """What moesaic.kernels.targets compiles: the products of a layer of D 1536, F 256, 128 experts, and one of odd widths."""
    from moesaic.kernels.targets import meta

    def case(d: int, f: int, dtype: torch.dtype, biased: bool) -> None:
        n_experts, inputs, rows = 128, 24576, 8 * 24576
        tile, depth = gemm_tile(target, "varlen_m", d), gemm_tile(target, "varlen_k", d)
        source, counts = meta(rows, dtype=torch.int64), meta(n_experts, dtype=torch.int64)
        x, a, weights = meta(inputs, d, dtype=dtype), meta(rows, f, dtype=dtype), meta(rows, dtype=torch.float32)
        w, bias = meta(n_experts, d, f, dtype=dtype), meta(n_experts, d, dtype=dtype) if biased else None
        plan = schedule(counts, tile.m)
        varlen_m(a, w, plan, tile, bias_EN=bias)
        parts = meta(rows, 4, dtype=torch.float32)
        varlen_m(a, w.view(n_experts, f, d), plan, tile, transposed=True, parts_RP=parts)
        varlen_m(x, w.view(n_experts, f, d), plan, tile, source_R=source)
        varlen_k(x, a, plan, depth, source, gather="left", sums=biased, weights_R=weights if biased else None)
        varlen_k(a, x, plan, depth, source, gather="right", sums=biased)

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return {f"D 1536, F 256, {name}": functools.partial(case, 1536, 256, dtype, False) for name, dtype in types.items()} | {
        "D 1536, F 256, bf16, biases": lambda: case(1536, 256, torch.bfloat16, True),
        "D 1001, F 333, bf16": lambda: case(1001, 333, torch.bfloat16, False),
    }  # fmt: skip
