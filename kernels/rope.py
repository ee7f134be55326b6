"""Rotary embedding (RoFormer, arXiv 2104.09864) in one pass over memory.

    for token t at position s of its sequence, head h, pair i of P:     a, b = x[t, h, i], x[t, h, i + P]
                                                                        y[t, h, i]     = a cos[s, i] - d b sin[s, i]
                                                                        y[t, h, i + P] = b cos[s, i] + d a sin[s, i]

d is 1 forward, and -1 backward, which turns the other way. In fp32, whatever x is in. Composed of torch's operations it takes
four launches, and products with an fp32 table are fp32; here it is one, that reads and writes x's type.

Letters: B sequences, S positions, H heads, C = 2P width of a head, R = B S H rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.interpret import jit
from moesaic.kernels.targets import Cases, meta


def rope_reference(x_BSHC: Tensor, cos_SC: Tensor, sin_SC: Tensor, direction: int) -> Tensor:
    """The specification. The tables are those of moe/attention.py: (cos, cos) and (-sin, sin)."""
    exchanged = torch.cat(x_BSHC.chunk(2, dim=-1)[::-1], dim=-1)
    return x_BSHC * cos_SC[:, None] + direction * exchanged * sin_SC[:, None]


@jit
def _rope_kernel(
    x, cos_SC, sin_SC, y, R, S, H, stride_b, stride_s, stride_h,
    DIRECTION: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    pair = tl.arange(0, BP)[None, :]
    real = (row < R)[:, None] & (pair < P)
    token, head = row // H, row % H
    sequence, position = token // S, token % S
    source = x + (sequence * stride_b + position * stride_s + head * stride_h)[:, None] + pair
    a = tl.load(source, mask=real, other=0.0).to(tl.float32)
    b = tl.load(source + P, mask=real, other=0.0).to(tl.float32)
    table = position[:, None] * (2 * P) + pair
    cos = tl.load(cos_SC + table, mask=real, other=0.0)
    sin = DIRECTION * tl.load(sin_SC + table + P, mask=real, other=0.0)
    out = y + row[:, None] * (2 * P) + pair
    tl.store(out, (a * cos - b * sin).to(y.dtype.element_ty), mask=real)
    tl.store(out + P, (b * cos + a * sin).to(y.dtype.element_ty), mask=real)


def launch(x_BSHC: Tensor, cos_SC: Tensor, sin_SC: Tensor, direction: int) -> Tensor:
    b, s, h, c = x_BSHC.shape
    if x_BSHC.stride(3) != 1:
        x_BSHC = x_BSHC.contiguous()
    y_BSHC = x_BSHC.new_empty(b, s, h, c)
    if y_BSHC.numel():
        pairs = triton.next_power_of_2(c // 2)
        rows = max(1, 2048 // pairs)
        _rope_kernel[triton.cdiv(b * s * h, rows),](
            x_BSHC, cos_SC, sin_SC, y_BSHC, b * s * h, s, h, *x_BSHC.stride()[:3],
            DIRECTION=direction, P=c // 2, BP=pairs, BR=rows, num_warps=4,
        )  # fmt: skip
    return y_BSHC


@torch.library.custom_op("moesaic::rope", mutates_args=())
def rope(x_BSHC: Tensor, cos_SC: Tensor, sin_SC: Tensor, direction: int) -> Tensor:
    """The pairs of each head turned, contiguous, in x's type. cos_SC, sin_SC: fp32 tables of moe/attention.py, contiguous.

    Not differentiable by itself: its gradient is itself with the other direction, which moe/attention.py applies.
    """
    return launch(x_BSHC, cos_SC, sin_SC, direction)


@rope.register_fake
def _(x_BSHC: Tensor, cos_SC: Tensor, sin_SC: Tensor, direction: int) -> Tensor:
    return x_BSHC.new_empty(x_BSHC.shape)


def compile_cases(target: str) -> Cases:
    """Queries as attention gives them, a part of each row of its first product; a contiguous gradient; a shared key of MLA."""

    def run(x: Tensor, direction: int) -> None:
        tables = meta(x.shape[1], x.shape[3], dtype=torch.float32)
        launch(x, tables, tables, direction)

    return {
        "H 24, C 64, bf16": lambda: run(meta(6, 4096, 3 * 24 * 64)[:, :, : 24 * 64].unflatten(2, (24, 64)), 1),
        "H 16, C 128, bf16, backward": lambda: run(meta(6, 4096, 16, 128), -1),
        "H 1, C 64, bf16": lambda: run(meta(6, 4096, 576)[:, :, None, 512:], 1),
        "H 24, C 64, fp32": lambda: run(meta(6, 4096, 24, 64, dtype=torch.float32), 1),
    }
