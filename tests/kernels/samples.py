"""Kernels that test_targets.py compiles: a good one, and ones that a row must fail."""

import torch
import triton
import triton.language as tl

from moesaic.kernels import tiles
from moesaic.kernels.targets import Cases, meta


@triton.jit
def _product_kernel(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    n = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        acc = tl.dot(tl.load(a + m * K + ks[None, :]), tl.load(b + n.T * K + ks[None, :]).T, acc)
    tl.store(c + m * tl.num_programs(1) * BN + n, acc.to(c.dtype.element_ty))


@triton.jit
def _atomic_kernel(x, y, N: tl.constexpr):
    tl.atomic_add(y + tl.arange(0, N) % 8, tl.load(x + tl.arange(0, N)).to(tl.float32))


@triton.jit
def _wide_kernel(x, N: tl.constexpr):
    """One warp that must remember all of x."""
    places = x + tl.arange(0, N)
    values = tl.load(places)
    tl.store(places, values - tl.sum(values))


@triton.jit
def _broken_kernel(x):
    tl.store(x, nobody)  # noqa: F821


def product(**options: int) -> None:
    a, b = meta(4096, 1024), meta(1024, 1024)
    assert tiles.target_name(a.device) in tiles.TILES
    _product_kernel[32, 8](a, b, meta(4096, 1024), 1024, BM=128, BN=128, BK=64, num_warps=8, **options)


def compile_cases(target: str) -> Cases:
    cases = {
        "good": product,
        "atomic": lambda: _atomic_kernel[1,](meta(1024), meta(8, dtype=torch.float32), N=1024, num_warps=4),
        "broken": lambda: _broken_kernel[1,](meta(8)),
    }
    wide = {"sm_90a": 16384, "gfx942": 65536}
    if target in wide:
        cases["spills"] = lambda: _wide_kernel[1,](meta(65536, dtype=torch.float32), N=wide[target], num_warps=1)
    return cases
