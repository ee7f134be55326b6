"""The harness on a small operation that is right, and on broken ones that it must notice, each in its own way."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.interpret import jit
from moesaic.kernels.testing import (
    Operation,
    check,
    check_case,
    float_atomics,
    launches,
    left_out,
    mutated,
    relative_error,
    same_bits,
)

# Rows times a vector, with a ReLU: y[n, d] = max(0, x[n, d] w[d]); dw by row blocks, then added up in their order.


@jit
def scale_forward(x_ND, w_D, y_ND, N, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    n, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (d < D)[None, :]
    place = n[:, None].to(tl.int64) * D + d[None, :]
    w = tl.load(w_D + d, mask=d < D, other=0.0).to(tl.float32)
    x = tl.load(x_ND + place, mask=inside, other=0.0).to(tl.float32)
    y = x * w[None, :]
    y = tl.maximum(y, 0.0)
    tl.store(y_ND + place, y.to(y_ND.dtype.element_ty), mask=inside)


@jit
def scale_backward(dy_ND, x_ND, w_D, dx_ND, part_BD, N, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    block = tl.program_id(0)
    n, d = block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (d < D)[None, :]
    place = n[:, None].to(tl.int64) * D + d[None, :]
    w = tl.load(w_D + d, mask=d < D, other=0.0).to(tl.float32)
    x = tl.load(x_ND + place, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ND + place, mask=inside, other=0.0).to(tl.float32)
    dy = tl.where(x * w[None, :] > 0, dy, 0.0)
    tl.store(dx_ND + place, (dy * w[None, :]).to(dx_ND.dtype.element_ty), mask=inside)
    tl.store(part_BD + block * D + d, tl.sum(dy * x, axis=0), mask=d < D)


@jit
def add_parts(part_BD, dw_D, B, D, COLUMNS: tl.constexpr):
    d = tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for b in range(B):
        total += tl.load(part_BD + b * D + d, mask=d < D, other=0.0)
    tl.store(dw_D + d, total.to(dw_D.dtype.element_ty), mask=d < D)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_D: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, w_D)
        (n, d), y_ND = x_ND.shape, torch.empty_like(x_ND)
        scale_forward[(triton.cdiv(n, 4),)](x_ND, w_D, y_ND, n, d, ROWS=4, COLUMNS=triton.next_power_of_2(d))
        return y_ND

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, Tensor]:
        x_ND, w_D = ctx.saved_tensors
        (n, d), dx_ND, dw_D = x_ND.shape, torch.empty_like(x_ND), torch.empty_like(w_D)
        blocks, columns = triton.cdiv(n, 4), triton.next_power_of_2(d)
        part_BD = torch.empty(blocks, d, device=x_ND.device)
        scale_backward[(blocks,)](dy_ND, x_ND, w_D, dx_ND, part_BD, n, d, ROWS=4, COLUMNS=columns)
        add_parts[(1,)](part_BD, dw_D, blocks, d, COLUMNS=columns)
        return dx_ND, dw_D


def inputs(shape: Mapping[str, int], dtype: torch.dtype, scale: float, generator: torch.Generator) -> dict[str, Any]:
    x_ND, w_D = (torch.randn(s, generator=generator) * scale for s in ((shape["N"], shape["D"]), (shape["D"],)))
    return {"x_ND": x_ND.to(dtype), "w_D": w_D.to(dtype)}


SCALE = Operation(
    "scale", Scale.apply, lambda x_ND, w_D: (x_ND * w_D).relu(), inputs,
    shapes=({"N": 1, "D": 1}, {"N": 9, "D": 13}, {"N": 16, "D": 8}),
    tolerance={torch.float32: 1e-6, torch.bfloat16: 2.0**-8}, gradients=("x_ND", "w_D"),
)  # fmt: skip
QUICK = dataclasses.replace(SCALE, shapes=({"N": 9, "D": 13},))


def test_what_is_right_passes() -> None:
    errors = check(SCALE, every=True)
    assert errors.keys() == {"out", "dx_ND", "dw_D"} and all(0 <= error <= 2.0**-8 for error in errors.values())


BROKEN = {
    "wrong offset": (scale_forward, "y_ND + place, y", "y_ND + place + 1, y", "out"),
    "wrong rows": (scale_forward, "tl.program_id(0) * ROWS", "tl.program_id(0) * ROWS // 2", "out"),
    "skipped tail": (scale_forward, "(n < N)[:, None]", "(n < N // ROWS * ROWS)[:, None]", "out differs between runs"),
    "skipped column": (scale_forward, "(d < D)[None, :]", "(d < D - 1)[None, :]", "out differs between runs"),
    "dropped epilogue": (scale_forward, "    y = tl.maximum(y, 0.0)\n", "", "out is off"),
    "cast too early": (scale_forward, "x * w[None, :]", "(x * w[None, :]).to(tl.float8e5).to(tl.float32)", "out is off"),
    "sum of short": (scale_backward, "(dy * x,", "((dy * x).to(tl.bfloat16).to(tl.float32),", "dw_D is off"),
    "dropped mask of the gradient": (scale_backward, "tl.where(x * w[None, :] > 0, dy, 0.0)", "dy", "dx_ND is off"),
    "writes its input": (scale_forward, "y_ND + place, y", "x_ND + place, y", "the input x_ND was changed"),
    "skipped part": (add_parts, "range(B)", "range(B - 1)", "dw_D is off"),
    "stale sum": (add_parts, "tl.zeros((COLUMNS,), tl.float32)", "tl.load(dw_D + d, mask=d < D).to(tl.float32)", "dw_D"),
}  # fmt: skip


@pytest.mark.parametrize(("kernel", "old", "new", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_kernels_are_noticed(kernel: Any, old: str, new: str, message: str) -> None:
    with mutated(kernel, old, new), pytest.raises(AssertionError, match=message):
        check(QUICK)
    assert Scale.forward.__globals__[kernel.__name__] is kernel


def broken(run: Callable[..., Any]) -> Operation:
    return dataclasses.replace(QUICK, run=run)


def test_a_result_of_before_is_noticed() -> None:
    """Memory that is used again and that nobody fills: right in the first call, and wrong where the inputs are others."""
    kept: list[Tensor] = []

    def stale(x_ND: Tensor, w_D: Tensor) -> Tensor:
        kept.append(Scale.apply(x_ND, w_D))
        return kept[0] * 1

    operation = dataclasses.replace(broken(stale), gradients=())
    check_case(operation, {"N": 4, "D": 4}, torch.float32, 1.0, 0, "cpu", "first")
    with pytest.raises(AssertionError, match="second: out is off"):
        check_case(operation, {"N": 4, "D": 4}, torch.float32, 1.0, 1, "cpu", "second")


def test_no_kernel_and_a_kernel_without_effect_are_noticed() -> None:
    with pytest.raises(AssertionError, match="no kernel was launched"):
        check(broken(lambda x_ND, w_D: (x_ND * w_D).relu()))

    def in_vain(x_ND: Tensor, w_D: Tensor) -> Tensor:
        add_parts[(1,)](w_D.detach()[None], torch.empty_like(w_D), 1, w_D.numel(), COLUMNS=16)
        return Scale.apply(x_ND, w_D)

    with pytest.raises(AssertionError, match="leaving out add_parts changes nothing"):
        check(dataclasses.replace(broken(in_vain), gradients=()))


def test_results_that_vary_are_noticed() -> None:
    def vary(x_ND: Tensor, w_D: Tensor) -> Tensor:
        return Scale.apply(x_ND, w_D) * (1 + 1e-7 * torch.rand(()).item())

    with pytest.raises(AssertionError, match="differs between runs"):
        check(broken(vary))


def test_small_values_must_be_as_right_as_large_ones() -> None:
    """An absolute tolerance would let a kernel pass that writes zeros where values are of 1e-5."""
    zeros = broken(lambda x_ND, w_D: Scale.apply(x_ND, w_D) * (w_D.abs().amax() > 0.1))
    with pytest.raises(AssertionError, match="out is off by 1.00e"):
        check_case(zeros, {"N": 4, "D": 4}, torch.float32, 1e-4, 0, "cpu", "small")
    assert relative_error(torch.tensor([1.0, torch.inf]), torch.tensor([1.0, torch.inf])) == 0
    assert relative_error(torch.tensor([torch.nan]), torch.tensor([1.0])) == torch.inf
    assert relative_error(torch.tensor([1e-30]), torch.tensor([0.0])) == torch.inf
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_launches_are_counted_in_forward_and_backward() -> None:
    x, w = torch.randn(5, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    with launches() as names:
        Scale.apply(x, w).sum().backward()
        with left_out("add_parts"):
            Scale.apply(x, w).sum().backward()
    assert names == ["scale_forward", "scale_backward", "add_parts", "scale_forward", "scale_backward"]
    Scale.apply(x, w)
    assert len(names) == 5


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("%7 = tt.atomic_rmw fadd, relaxed, gpu, %p, %v, %m : (tensor<64x!tt.ptr<f32>>, tensor<64xf32>) -> tensor<64xf32>", 1),
        ("%7 = tt.atomic_rmw add, acq_rel, gpu, %p, %v, %m : (!tt.ptr<i32>, i32, i1) -> i32", 0),
        ("red.global.gpu.relaxed.add.f32 [%rd1], %f1;\natom.global.add.noftz.bf16x2 %r1, [%rd1], %r2;", 2),
        ("atom.global.gpu.acq_rel.add.u32 %r1, [%rd1], 1;\nadd.f32 %f1, %f2, %f3;", 0),
        ("REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;".replace("REDG", "RED"), 1),
        ("global_atomic_add_f32 v0, v1, s[0:1]\nglobal_atomic_pk_add_bf16 v0, v1, s[0:1]\nds_add_f32 v0, v1", 3),
        ("global_atomic_add v0, v1, s[0:1]\nv_add_f32 v0, v1, v2\nds_add_u32 v0, v1", 0),
    ],
)  # fmt: skip
def test_atomic_sums_of_floats_are_found_in_code(code: str, found: int) -> None:
    assert len(float_atomics(code)) == found
