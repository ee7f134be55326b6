"""Rows and products of fp8 inside the fused kernels (moesaic.kernels.fused_ep).

    a row that travels    D codes, e4m3, then a byte, e8m0, for each 128 of them, in the place of a row of a longer type
    product by row        y[r] += sx[r, b] sw[n, b] <W_b[n], x_b[r]>     for blocks b of 128 of the depth, each added in fp32
    weight gradient       dW[p, q] += sl[p, c] sr[q, c] <l_c[p], r_c[q]>  for chunks c of 128 of an expert's rows

Scales are powers of two, the least under which a block doesn't clip (moesaic.kernels.quantize: e4m3, blocks of 1x128 and, of
weights, 128x128, rule rceil), so codes and scales are those of that file bit by bit. Weights come as codes (`Low`). X is cast
when it is sent; a, dO and dh are cast when a product loads them, as blocks of their rows, and again, as blocks of columns, by
weight gradients, for which X and a are first what their blocks of rows have made of them.

gfx942 has e4m3fnuz, in which the same bits stand for half the value: half of a value is cast, and scales count twice.

Letters: M rows of a tile, K depth, N columns, D model width, F expert width, P x Q a weight's gradient.
"""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from moesaic.kernels.fused_tasks import rows_by_expert
from moesaic.kernels.grouped_gemm import load_rows, load_weight, multiply
from moesaic.kernels.interpret import jit
from moesaic.kernels.scaled_gemm import e4m3
from moesaic.kernels.tiles import target_name

BLOCK = 128
DEPTH = tl.constexpr(BLOCK)


def coded_bytes(width: int) -> int:
    """Of a row of `width` codes and their scales on the wire."""
    return width + -(-width // BLOCK)


def kept_bytes(width: int) -> int:
    """Of the same in memory, where rows begin at multiples of 16 bytes."""
    return -(-coded_bytes(width) // 16) * 16


# ---------------------------------------------------------------- casts


@jit
def inside(rows_M, columns_N, SIZE: tl.constexpr, TILE: tl.constexpr):
    """The mask of a tile: of rows alone, where whole tiles of TILE columns make up SIZE."""
    return rows_M[:, None] if SIZE % TILE == 0 else rows_M[:, None] & (columns_N < SIZE)[None, :]


# Scales in integers alone: on AMD, comparisons would take scalar registers, of which there are too few.


@jit
def factors(amax, CODE: tl.constexpr):
    """(what values are multiplied with before they are cast, the byte of the scale) of blocks of which amax has the bits of the
    largest magnitude. CODE: the type whose bits are codes.

    The scale is 2^ceil(log2(amax / 448)), and 448 is 1.75 times a power of two: amax's exponent less 8, one more where what is
    behind it is above 1.75. There is one amax, about 2^-118, just above, of which the quotient is rounded to a power of two.
    """
    byte = tl.maximum((amax - (amax == 0x4600001).to(tl.int32) + 0x1FFFFF >> 23) - 8, 0)
    byte |= -((amax >> 23) + 1 >> 8) & 255  # infinity and NaN: 255
    return inverse_of(byte, CODE), byte.to(tl.uint8)


@jit
def scale_of(byte, CODE: tl.constexpr):
    """fp32: what a code counts, from the byte of its scale; NaN of 255. No byte is from 248 to 254."""
    exponent = byte.to(tl.int32)
    bits = tl.maximum(exponent << 23, 1 << 22) + (exponent + 8 >> 8 << 22)
    scale = bits.to(tl.float32, bitcast=True)
    return scale * 2.0 if CODE.is_fp8e4b8() else scale


@jit
def inverse_of(byte, CODE: tl.constexpr):
    """1 / scale_of, exactly: what values are multiplied with before they are cast."""
    exponent = byte.to(tl.int32)
    inverse = ((254 - exponent << 23) + (exponent + 8 >> 8 << 22)).to(tl.float32, bitcast=True)
    return inverse * 0.5 if CODE.is_fp8e4b8() else inverse


@jit
def largest(x, axis: tl.constexpr):
    """The bits, as fp32, of the largest magnitude along an axis, infinity and NaN above all others. In 16 bits where x has no
    more: converted values would take registers until they are cast."""
    if x.dtype == tl.bfloat16:
        bits = tl.max(x.to(tl.int16, bitcast=True) & 0x7FFF, axis=axis).to(tl.int32) << 16
    else:
        bits = tl.max(x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=axis)
    return bits


@jit
def cast_rows(x_MK, CODE: tl.constexpr):
    """(codes of rows that are one block each, the bytes of their scales)."""
    by_M, byte_M = factors(largest(x_MK, 1), CODE)
    return (x_MK.to(tl.float32) * by_M[:, None]).to(CODE), byte_M


@jit
def cast_columns(x_KN, CODE: tl.constexpr):
    """(codes of columns that are one block each, what they count)."""
    by_N, byte_N = factors(largest(x_KN, 0), CODE)
    return (x_KN.to(tl.float32) * by_N[None, :]).to(CODE), scale_of(byte_N, CODE)


# ---------------------------------------------------------------- rows that travel


@jit
def send_rows(x, token, to, rows, carried, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """x[token] to places `rows` of `to`."""
    for d in range(0, D, BK):
        ds = d + tl.arange(0, BK)
        mask = inside(carried, ds, D, BK)
        values = tl.load(x + token.to(tl.int64)[:, None] * D + ds[None, :], mask=mask, other=0.0)
        tl.store(to + rows.to(tl.int64)[:, None] * D + ds[None, :], values, mask=mask)


@jit
def coded_rows(base, rows, STRIDE: tl.constexpr, D: tl.constexpr, CODE: tl.constexpr):
    """(pointers to the first codes of rows, and of their scales), M x 1. base: bytes, of which STRIDE lie from row to row."""
    row = base + rows.to(tl.int64)[:, None] * STRIDE
    return row.to(tl.pointer_type(CODE)), row + D


@jit
def send_cast(
    x, token, base, rows, carried, STRIDE: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """x[token], cast, to places `rows` of `base`. BK columns at a time, which divides a block: twice over each block."""
    codes_M1, scales_M1 = coded_rows(base, rows, STRIDE, D, CODE)
    x_M1 = x + token.to(tl.int64)[:, None] * D
    for block in range(0, D, DEPTH):
        amax = tl.zeros([BM], tl.int32)
        for part in range(0, DEPTH, BK):
            ds = block + part + tl.arange(0, BK)
            values = tl.load(x_M1 + ds[None, :], mask=inside(carried, ds, D, 128), other=0.0)
            amax = tl.maximum(amax, largest(values, 1))
        by_M, byte_M = factors(amax, CODE)
        tl.store(scales_M1 + block // DEPTH, byte_M[:, None], mask=carried[:, None])
        for part in range(0, DEPTH, BK):
            ds = block + part + tl.arange(0, BK)
            mask = inside(carried, ds, D, 128)
            values = tl.load(x_M1 + ds[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(codes_M1 + ds[None, :], (values * by_M[:, None]).to(CODE), mask=mask)


@jit
def keep_coded(
    base, holder, kept, rows, exists, STRIDE: tl.constexpr, KEPT: tl.constexpr, D: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Rows `holder` of `base` to rows of `kept`, of which KEPT bytes lie from row to row: codes and scales, bytes both."""
    from_M1, to_M1 = base + holder.to(tl.int64)[:, None] * STRIDE, kept + rows.to(tl.int64)[:, None] * KEPT
    SIZE: tl.constexpr = D + (D + DEPTH - 1) // DEPTH
    for d in range(0, SIZE, BK):
        ds = d + tl.arange(0, BK)
        mask = exists[:, None] & (ds < SIZE)[None, :]
        tl.store(to_M1 + ds[None, :], tl.load(from_M1 + ds[None, :], mask=mask, other=0), mask=mask)


@jit
def send_x(x, token, to, rows, carried, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, CODE: tl.constexpr):
    """`send_rows`, or `send_cast` into the same memory."""
    if CODE is None:
        send_rows(x, token, to, rows, carried, D, BM, BK)
    else:
        stride: tl.constexpr = D * to.dtype.element_ty.primitive_bitwidth // 8
        send_cast(x, token, to.to(tl.pointer_type(tl.uint8)), rows, carried, stride, D, BM, BK, CODE)


@jit
def keep_x(
    from_RD, holder, kept, rows, exists, D: tl.constexpr, KEPT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """Rows that came, as they came, to where they are kept for backward."""
    if CODE is None:
        send_rows(from_RD, holder, kept, rows, exists, D, BM, BK)
    else:
        stride: tl.constexpr = D * from_RD.dtype.element_ty.primitive_bitwidth // 8
        keep_coded(from_RD.to(tl.pointer_type(tl.uint8)), holder, kept, rows, exists, stride, KEPT, D, BK)


# ---------------------------------------------------------------- products by row


@jit
def decoded_by_weight(
    x_M1, scales_M1, w, expert, n, n2, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PAIR: tl.constexpr,
    DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """`rows_by_weight` of coded rows with a matrix of the high type, which has all values of a code times its scale."""
    acc_MN = tl.zeros([BM, BN], tl.float32)
    acc2_MN = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        scale_M1 = scale_of(tl.load(scales_M1 + k // DEPTH), CODE)
        x_MK = (load_rows(x_M1, k, K, BK, EVEN).to(tl.float32) * scale_M1).to(TYPE)
        acc_MN = multiply(acc_MN, x_MK, w, expert, n, k, N, K, N * K, K, BN, BK, False, DESCRIBED, PRECISION)
        if PAIR:
            acc2_MN = multiply(acc2_MN, x_MK, w, expert, n2, k, N, K, N * K, K, BN, BK, False, DESCRIBED, PRECISION)
    return acc_MN, acc2_MN


@jit
def add_block(
    acc_MN, x_MK, scale_M1, w, w_scales, expert, n, k, N, K, BN: tl.constexpr, DESCRIBED: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """acc + x W^T of one block of the depth. ALIGNED: BN columns from n lie in one block of W."""
    w_KN = load_weight(w, expert, n, k, N, K, N * K, K, BN, DEPTH, DESCRIBED).T
    blocks = tl.cdiv(K, DEPTH)
    scales = w_scales + expert.to(tl.int64) * tl.cdiv(N, DEPTH) * blocks + k // DEPTH
    if ALIGNED:
        scale_MN = scale_M1 * tl.load(scales + n // DEPTH * blocks)
    else:
        ns = tl.minimum(n + tl.arange(0, BN), N - 1)
        scale_MN = scale_M1 * tl.load(scales + ns // DEPTH * blocks)[None, :]
    return acc_MN + tl.dot(x_MK, w_KN) * scale_MN


@jit
def coded_by_weight(
    x_M1, scales_M1, w, w_scales, expert, n, n2, N, K, BM: tl.constexpr, BN: tl.constexpr, PAIR: tl.constexpr,
    DESCRIBED: tl.constexpr, ALIGNED: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Columns n of coded rows times an expert's coded matrix (N, K), and columns n2, if PAIR; BM x BN each, fp32."""
    acc_MN = tl.zeros([BM, BN], tl.float32)
    acc2_MN = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, DEPTH):
        x_MK = load_rows(x_M1, k, K, DEPTH, K % 128 == 0)
        scale_M1 = scale_of(tl.load(scales_M1 + k // DEPTH), CODE)
        acc_MN = add_block(acc_MN, x_MK, scale_M1, w, w_scales, expert, n, k, N, K, BN, DESCRIBED, ALIGNED)
        if PAIR:
            acc2_MN = add_block(acc2_MN, x_MK, scale_M1, w, w_scales, expert, n2, k, N, K, BN, DESCRIBED, ALIGNED)
    return acc_MN, acc2_MN


@jit
def cast_by_weight(
    x_M1, kept_M1, keep_M1, w, w_scales, expert, n, N, K, BM: tl.constexpr, BN: tl.constexpr, DESCRIBED: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """Columns n of rows of the high type, cast as they are loaded, times an expert's coded matrix (N, K). The bytes of their
    scales go to kept_M1 where keep_M1 says so, unless that is None."""
    acc_MN = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, DEPTH):
        x_MK, byte_M = cast_rows(load_rows(x_M1, k, K, DEPTH, K % 128 == 0), CODE)
        if kept_M1 is not None:
            tl.store(kept_M1 + k // DEPTH, byte_M[:, None], mask=keep_M1)
        scale_M1 = scale_of(byte_M, CODE)[:, None]
        acc_MN = add_block(acc_MN, x_MK, scale_M1, w, w_scales, expert, n, k, N, K, BN, DESCRIBED, True)
    return acc_MN


@jit
def up_product(
    rows_RD, holder, w_up, shared, scales, j, f, f2, G, D: tl.constexpr, F: tl.constexpr, SHARED: tl.constexpr,
    BM: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr, PAIR: tl.constexpr, DESCRIBED: tl.constexpr,
    SHARED_DESCRIBED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Columns f and f2 of rows that came times W_up of expert j: of the high type, or of codes with `scales`."""
    if CODE is None:
        x_M1 = rows_RD + holder.to(tl.int64)[:, None] * D
        gate_MN, up_MN = rows_by_expert(
            x_M1, w_up, shared, j, f, f2, G, D, G * D, D, SHARED, BM, BU, BK, PAIR, False, DESCRIBED, SHARED_DESCRIBED, EVEN,
            PRECISION,
        )  # fmt: skip
    else:
        TYPE: tl.constexpr = rows_RD.dtype.element_ty
        stride: tl.constexpr = D * TYPE.primitive_bitwidth // 8
        x_M1, scales_M1 = coded_rows(rows_RD.to(tl.pointer_type(tl.uint8)), holder, stride, D, CODE)
        if scales is None:
            gate_MN, up_MN = decoded_by_weight(
                x_M1, scales_M1, w_up, j, f, f2, G, D, BM, BU, BK, PAIR, DESCRIBED, EVEN, PRECISION, TYPE, CODE
            )
        else:
            aligned: tl.constexpr = not PAIR or F % BU == 0
            gate_MN, up_MN = coded_by_weight(
                x_M1, scales_M1, w_up, scales, j, f, f2, G, D, BM, BU, PAIR, DESCRIBED, aligned, CODE
            )
    return gate_MN, up_MN


# ---------------------------------------------------------------- weight gradients


@jit
def place_of(k, holder_R, start, count, HELD: tl.constexpr):
    """(the k-th rows of an expert, where their values stand, fp32: 1 for rows that exist, 0 for others, which are the last one).
    Without masks, as scales are without comparisons."""
    row = start + tl.minimum(k, count - 1)
    holder = tl.load(holder_R + row, cache_modifier=".cg") if HELD else row
    return row, holder.to(tl.int64), tl.minimum(tl.maximum(count - k, 0), 1).to(tl.float32)


@jit
def load_columns(places, columns, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Rows of TILE columns, 0 past SIZE."""
    return tl.load(places) if SIZE % TILE == 0 else tl.load(places, mask=(columns < SIZE)[None, :], other=0.0)


@jit
def load_decoded(base, rows, real, column, Q: tl.constexpr, STRIDE: tl.constexpr, BN: tl.constexpr, CODE: tl.constexpr):
    """fp32: BN columns, all of one block, of coded rows, 0 where they don't exist."""
    codes_K1, scales_K1 = coded_rows(base, rows, STRIDE, Q, CODE)
    qs = column + tl.arange(0, BN)
    scale_K1 = scale_of(tl.load(scales_K1 + column // DEPTH), CODE) * real[:, None]
    return load_columns(codes_K1 + qs[None, :], qs, Q, BN).to(tl.float32) * scale_K1


@jit
def decoded_weight_tile(
    left, right, out, holder_R, start, count, p, q, P: tl.constexpr, Q: tl.constexpr, RIGHT_HELD: tl.constexpr,
    STRIDE: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """BP x BN of an expert's sum over rows of left^T right, of P and Q columns: left of the high type, right codes with scales,
    STRIDE bytes a row."""
    ps, qs = p * BP + tl.arange(0, BP), q * BN + tl.arange(0, BN)
    acc = tl.zeros([BP, BN], tl.float32)
    for r in range(0, count, BK):
        row, holder, real = place_of(r + tl.arange(0, BK), holder_R, start, count, RIGHT_HELD)
        l_KP = load_columns(left + row.to(tl.int64)[:, None] * P + ps[None, :], ps, P, BP)
        r_KN = load_decoded(right, holder, real, q * BN, Q, STRIDE, BN, CODE)
        acc = tl.dot(l_KP.T, r_KN.to(left.dtype.element_ty), acc, input_precision=PRECISION)
    to = out + ps.to(tl.int64)[:, None] * Q + qs[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(ps < P)[:, None] & (qs < Q)[None, :])


@jit
def load_left(
    left, weight_R, holder_R, k, start, count, ps, P: tl.constexpr, BP: tl.constexpr, HELD: tl.constexpr
):  # fmt: skip
    """fp32, columns ps of the k-th rows of an expert, times weight_R where that is given."""
    row, holder, real = place_of(k, holder_R, start, count, HELD)
    if weight_R is not None:
        real *= tl.load(weight_R + row, cache_modifier=".cg")
    return load_columns(left + holder[:, None] * P + ps[None, :], ps, P, BP).to(tl.float32) * real[:, None]


@jit
def load_right(
    right, scales, holder_R, k, start, count, column, Q: tl.constexpr, HELD: tl.constexpr, STRIDE: tl.constexpr,
    BN: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """fp32, BN columns of the k-th rows of an expert: coded rows, or values and the bytes of the scales of their blocks of 128
    columns, `scales`, of which is given what a cast by them makes."""
    _, holder, real = place_of(k, holder_R, start, count, HELD)
    if scales is None:
        r_KN = load_decoded(right, holder, real, column, Q, STRIDE, BN, CODE)
    else:
        B: tl.constexpr = (Q + 127) // 128
        qs = column + tl.arange(0, BN)
        byte_K1 = tl.load(scales + holder * B + column // DEPTH)[:, None]
        r_KN = load_columns(right + holder[:, None] * Q + qs[None, :], qs, Q, BN).to(tl.float32) * inverse_of(
            byte_K1, CODE
        )
        r_KN = r_KN.to(CODE).to(tl.float32) * (scale_of(byte_K1, CODE) * real[:, None])
    return r_KN


@jit
def cast_weight_tile(
    left, weight_R, right, scales, out, holder_R, start, count, p, q, P: tl.constexpr, Q: tl.constexpr, LEFT_HELD: tl.constexpr,
    RIGHT_HELD: tl.constexpr, STRIDE: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """BP x BN of an expert's sum over rows of left^T right, both cast 128 rows of a column at a time; see `load_left`,
    `load_right`."""
    ps, qs = p * BP + tl.arange(0, BP), q * BN + tl.arange(0, BN)
    acc = tl.zeros([BP, BN], tl.float32)
    # One operand after the other, and none ahead of its time: the values of both don't fit into registers.
    for r in tl.range(0, count, DEPTH, num_stages=1):
        k = r + tl.arange(0, DEPTH)
        l_KP = load_left(left, weight_R, holder_R, k, start, count, ps, P, BP, LEFT_HELD)
        l_KP, l_scale_P = cast_columns(l_KP, CODE)
        tl.debug_barrier()
        r_KN = load_right(right, scales, holder_R, k, start, count, q * BN, Q, RIGHT_HELD, STRIDE, BN, CODE)
        r_KN, r_scale_N = cast_columns(r_KN, CODE)
        acc += tl.dot(l_KP.T, r_KN) * (l_scale_P[:, None] * r_scale_N[None, :])
    to = out + ps.to(tl.int64)[:, None] * Q + qs[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(ps < P)[:, None] & (qs < Q)[None, :])


# ---------------------------------------------------------------- what the host gives


@dataclass(frozen=True)
class Low:
    """What fp8 products need beside the codes of weights (moesaic.kernels.scaled_gemm): fp32 scales of their blocks of 128x128,
    up_scales (e, ceil(G / 128), ceil(D / 128)) and down_scales (e, ceil(D / 128), ceil(F / 128)); a_scales_RB, uint8 (R, ceil(F /
    128)), which forward fills for backward."""

    up_scales: Tensor
    down_scales: Tensor
    a_scales_RB: Tensor


def has_products(target: str | torch.device) -> bool:
    """Whether the kernels with fp8 products are ready for a target. On AMD that of backward moves scalar registers to lanes of
    vector registers within the loops of weight gradients."""
    return not target_name(target).startswith("gfx")


def code_type(device: torch.device) -> tl.dtype:
    """The type whose bits are codes on a device."""
    return tl.float8e4b8 if e4m3(device) is torch.float8_e4m3fnuz else tl.float8e4nv


def scales_low(low: Low | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if low is None else (low.up_scales, low.down_scales, low.a_scales_RB)


def transposed(w_up_eGD: Tensor, w_down_eDF: Tensor, low: Low) -> tuple[Tensor, Tensor, Low]:
    """Of a cast with square blocks, for backward's products: the depth of a matrix must be contiguous."""
    up, down = (w.view(torch.uint8).mT.contiguous().view(w.dtype) for w in (w_up_eGD, w_down_eDF))
    return up, down, Low(low.up_scales.mT.contiguous(), low.down_scales.mT.contiguous(), low.a_scales_RB)


def new_kept(x_TD: Tensor, rows: int, coded: bool) -> Tensor:
    """Room for rows that came, as they came."""
    d = x_TD.shape[1]
    return x_TD.new_empty(rows, kept_bytes(d), dtype=torch.uint8) if coded else x_TD.new_empty(rows, d)


def meta_low(e: int, d: int, f: int, rows: int) -> Low:
    """Of a layer on the meta device."""
    b, g = -(-d // BLOCK), -(-2 * f // BLOCK)
    up, down = (torch.empty(e, n, m, device="meta") for n, m in ((g, b), (b, -(-f // BLOCK))))
    return Low(up, down, torch.empty(rows, -(-f // BLOCK), dtype=torch.uint8, device="meta"))


COMPILED: dict[str, tuple[int, int, torch.dtype, bool, str]] = {
    "D 2048, F 1024, bf16": (2048, 1024, torch.bfloat16, True, "high"),
    "D 2048, F 1024, bf16, every row": (2048, 1024, torch.bfloat16, False, "high"),
    "D 2048, F 1024, fp32": (2048, 1024, torch.float32, True, "high"),
    "D 2048, F 1024, bf16, fp8 rows": (2048, 1024, torch.bfloat16, True, "rows"),
    "D 2048, F 1024, bf16, fp8 products": (2048, 1024, torch.bfloat16, True, "products"),
    "D 2048, F 1024, bf16, fp8 products, every row": (2048, 1024, torch.bfloat16, False, "products"),
    # Of blocks and steps that a recipe keeps high, in the tiles of its products.
    "D 2048, F 1024, bf16, fp8 rows beside products": (2048, 1024, torch.bfloat16, True, "rows beside products"),
    "D 2048, F 1024, bf16, beside products": (2048, 1024, torch.bfloat16, True, "high beside products"),
}


def compiled(target: str) -> dict[str, tuple[int, int, torch.dtype, bool, str]]:
    """Of COMPILED, what a target has."""
    return {name: case for name, case in COMPILED.items() if "products" not in case[4] or has_products(target)}
