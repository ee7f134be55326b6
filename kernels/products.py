"""Matrix products of fp32 on CPUs, by the faster of the two libraries in torch.

torch multiplies fp32 matrices by MKL, which has no code of 512 bits for AMD's processors. oneDNN has: from Zen 5 on, whose units
are that wide, it is about twice as fast, in all layouts of operands. Elsewhere all of this is torch's own. What decides is the
processor alone, so that a run gives the same bits every time.
"""

import functools
import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_ROWS = 16  # fewer are slower: what oneDNN does before a product takes longer than it
PIECE = 512  # rows at a time: oneDNN's result is copied to where it belongs while it is in the cache
ZEN_5 = 26  # the family of processors


@functools.cache
def by_onednn() -> bool:
    """Whether this processor's fp32 products are those of oneDNN."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    facts = {name.strip(): value.strip() for name, _, value in lines}
    return facts.get("vendor_id") == "AuthenticAMD" and int(facts.get("cpu family", 0)) >= ZEN_5


def _taken(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype is torch.float32 is b.dtype
        and a.device.type == "cpu"
        and a.ndim > 1
        and a.shape[-2] >= LEAST_ROWS
        and a.numel() > 0 < b.numel()
        and type(a) in (Tensor, nn.Parameter)  # no fake ones: what counts operations knows torch's
        and by_onednn()
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    if not (b.is_contiguous() or b.mT.is_contiguous()):
        b = b.mT.contiguous().mT  # a slice of columns: oneDNN would take its reference, a thousand times slower
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")
    return out


def slices(counts: list[int]) -> list[slice]:
    """Of rows that stand one after the other."""
    return [slice(a, b) for a, b in itertools.pairwise(itertools.accumulate(counts, initial=0))]


def mm(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """torch.mm, without a gradient."""
    if not _taken(a_MK, b_KN):
        return torch.mm(a_MK, b_KN, out=out)
    c_MN = _product(a_MK, b_KN)
    return c_MN if out is None else out.copy_(c_MN)


def rounded(count: int) -> int:
    """`count`, or the next larger number of four significant bits: at most a sixteenth more.

    oneDNN makes code for each new shape, which takes as long as some products. Counts of rows, which differ from step to step,
    are rounded up to these, of which there are sixteen between a number and twice as much.
    """
    step = 1 << max(0, count.bit_length() - 5)
    return -(-count // step) * step


def rows_mm(a_RK: Tensor, rows: slice, b_KN: Tensor, out: Tensor) -> None:
    """out = a[rows] b. What follows the rows, a sixteenth of as many, is read where it is there, and not used."""
    a_MK = a_RK[rows]
    if not _taken(a_MK, b_KN):
        torch.mm(a_MK, b_KN, out=out)
        return
    for start, out_mN in zip(range(rows.start, rows.stop, PIECE), out.split(PIECE), strict=True):
        count = out_mN.shape[0]
        out_mN.copy_(_product(a_RK[start : start + rounded(count)], b_KN)[:count])


def mtm(a_RM: Tensor, b_RN: Tensor, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
    """a[rows]^T b[rows], of a and b that are finite: what follows the rows, a sixteenth of as many, is multiplied with zeros."""
    a, b = a_RM[rows], b_RN[rows]
    if a.shape[0] < LEAST_ROWS or not _taken(a.T, b):
        return torch.mm(a.T, b, out=out)
    # oneDNN wants the rows of its first operand side by side, so one of the two is copied: the narrower one.
    c_MN = _with_zeros(b, a_RM, rows).T if b.shape[1] < a.shape[1] else _with_zeros(a, b_RN, rows)
    return c_MN if out is None else out.copy_(c_MN)


def _with_zeros(narrow: Tensor, wide_RN: Tensor, rows: slice) -> Tensor:
    count, start = narrow.shape[0], rows.start or 0
    wide = wide_RN[start : start + rounded(count)]
    left = narrow.new_empty(narrow.shape[1], wide.shape[0])
    left[:, :count] = narrow.T
    left[:, count:] = 0
    return _product(left, wide)


def bmm(a_NMK: Tensor, b_NKP: Tensor, out: Tensor | None = None, *, add: bool = False) -> Tensor:
    """torch.bmm, without a gradient. out: (N, ...) of as many values a product, which are set, or added to."""
    if not _taken(a_NMK, b_NKP):
        c_NMP = torch.bmm(a_NMK, b_NKP)
        if out is None:
            return c_NMP
        return out.add_(c_NMP.view(out.shape)) if add else out.copy_(c_NMP.view(out.shape))
    if out is None:
        out, add = a_NMK.new_empty(*a_NMK.shape[:2], b_NKP.shape[2]), False
    for a, b, c in zip(a_NMK.unbind(), b_NKP.unbind(), out.unbind(), strict=True):
        c_MP = _product(a, b).view(c.shape)
        _ = c.add_(c_MP) if add else c.copy_(c_MP)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_FD: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, w_FD)
        return mm(x_ND, w_FD.T)

    @staticmethod
    def backward(ctx: Any, dy_NF: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_ND, w_FD = ctx.saved_tensors
        dx, dw = ctx.needs_input_grad
        return mm(dy_NF, w_FD) if dx else None, mtm(dy_NF, x_ND) if dw else None


def linear(x: Tensor, w_FD: Tensor) -> Tensor:
    """x w^T, (..., D) -> (..., F)."""
    if not _taken(x, w_FD):
        return F.linear(x, w_FD)
    y: Tensor = _Linear.apply(x.flatten(0, -2), w_FD)
    return y.unflatten(0, x.shape[:-1])


class Linear(nn.Linear):
    """torch.nn.Linear without a bias."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
