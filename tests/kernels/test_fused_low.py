"""Casts inside the fused kernels, against the specification. Whole kernels: tests/parallel/test_fused_low.py."""

import pytest
import torch
import triton
import triton.language as tl

from moesaic.kernels.fused_low import cast_columns, cast_rows, inverse_of, scale_of, send_cast
from moesaic.kernels.interpret import jit
from moesaic.kernels.quantize import Format, pack, quantize

FORM = Format("e4m3", (1, 128), "e8m0", "rceil")


@jit
def _cast_kernel(x, codes, scales, columns, counts, N: tl.constexpr, CODE: tl.constexpr):
    n, k = tl.arange(0, N), tl.arange(0, 128)
    values = tl.load(x + n[:, None] * 128 + k[None, :])
    code, byte = cast_rows(values, CODE)
    tl.store(codes + n[:, None] * 128 + k[None, :], code)
    tl.store(scales + n, byte)
    code, count = cast_columns(tl.load(x + n[None, :] * 128 + k[:, None]), CODE)
    tl.store(columns + n[None, :] * 128 + k[:, None], code)
    tl.store(counts + n, count)
    tl.store(counts + N + n, scale_of(byte, CODE) * inverse_of(byte, CODE))


def awkward(rows: int) -> torch.Tensor:
    """Rows whose largest values lie about each power of two times 448, the others of all sizes; zeros, infinity, NaN."""
    g = torch.Generator().manual_seed(0)
    bits = (torch.tensor([448.0]).view(torch.int32) + torch.tensor([-1, 0, 1, 2])).view(torch.float32)
    top = torch.ldexp(bits[torch.arange(rows) % 4], torch.arange(rows) // 4 % 246 - 127)
    x = torch.randn(rows, 128, generator=g).clamp(-1, 1) * torch.ldexp(
        torch.ones(rows, 128), -torch.randint(0, 30, (rows, 128), generator=g)
    )
    x *= top[:, None]
    x[:, 5] = top * (-1) ** torch.arange(rows)
    x[-3] = 0
    x[-2, 7] = torch.inf
    x[-1, 9] = torch.nan
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fnuz", [False, True], ids=["e4m3fn", "e4m3fnuz"])
def test_casts_are_those_of_the_specification(dtype: torch.dtype, fnuz: bool) -> None:
    """Of e4m3fnuz, gfx942's, a code is half of its value, and a scale counts twice."""
    x = awkward(1024).to(dtype)
    kind = torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn
    codes, columns = torch.empty(2, 1024, 128, dtype=torch.uint8).view(kind)
    scales, counts = torch.empty(1024, dtype=torch.uint8), torch.empty(2, 1024)
    _cast_kernel[(1,)](x, codes, scales, columns, counts, N=1024, CODE=tl.float8e4b8 if fnuz else tl.float8e4nv)
    want = quantize(x, FORM)
    packed = pack(want)
    assert torch.equal(scales, packed.scales.view(torch.uint8).flatten())
    finite = packed.scales.float().isfinite().flatten()
    assert finite.sum() == 1022
    for found in (codes, columns):
        assert torch.equal(found.float()[finite] * (2 if fnuz else 1), want.codes_NK[finite])
        assert not found.float()[~finite].isfinite().any()
    assert torch.equal(counts[0][finite], packed.scales.float().flatten()[finite] * (2 if fnuz else 1))
    assert counts[1][finite].eq(1).all() and counts[:, ~finite].isnan().all()


@jit
def _send_kernel(x, to, token, rows, real, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STRIDE: tl.constexpr):
    m = tl.arange(0, BM)
    send_cast(x, tl.load(token + m), to, tl.load(rows + m), tl.load(real + m) != 0, STRIDE, D, BM, BK, tl.float8e4nv)


@pytest.mark.parametrize(("d", "block"), [(300, 128), (300, 32), (160, 32), (256, 64)])
def test_rows_are_sent_as_the_codec_has_them(d: int, block: int) -> None:
    """Codes and scales behind them, at the places they belong to; nothing else is written."""
    stride, g = 320, torch.Generator().manual_seed(1)
    x = torch.randn(40, d, generator=g) * torch.ldexp(torch.ones(40, 1), torch.randint(-40, 40, (40, 1), generator=g))
    token, rows = torch.randint(0, 40, (16,), generator=g), torch.randperm(50, generator=g)[:16]
    real = (torch.arange(16) % 3 > 0).int()
    to = torch.full((50, stride), 77, dtype=torch.uint8)
    _send_kernel[(1,)](x, to, token, rows, real, D=d, BM=16, BK=block, STRIDE=stride)
    packed = pack(quantize(x, FORM))
    want = torch.full_like(to, 77)
    there = real.bool()
    want[rows[there], :d] = packed.codes.view(torch.uint8)[token[there]]
    want[rows[there], d : d + triton.cdiv(d, 128)] = packed.scales.view(torch.uint8)[token[there]]
    assert torch.equal(to, want)
