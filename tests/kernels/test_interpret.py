"""The interpreter's conversions and products, against formats worked out from their definitions, and against fp64."""

import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

from moesaic.kernels.interpret import INTERPRET, jit, np

pytestmark = pytest.mark.skipif(not INTERPRET, reason="kernels are compiled here")

# bits of exponent and mantissa, bias, the largest number, what stands for more than that; zeros and NaN apart
FORMATS = {
    torch.bfloat16: (8, 7, 127, (2 - 2**-7) * 2.0**127, math.inf),
    torch.float16: (5, 10, 15, 65504.0, math.inf),
    torch.float8_e4m3fn: (4, 3, 7, 448.0, 448.0),
    torch.float8_e5m2: (5, 2, 15, 57344.0, math.inf),
}


@jit
def convert(source, target, size, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    values = tl.load(source + place, mask=place < size)
    if ROUNDING == "":
        values = values.to(target.dtype.element_ty)
    else:
        values = values.to(target.dtype.element_ty, fp_downcast_rounding=ROUNDING)
    tl.store(target + place, values, mask=place < size)


def converted(values: Tensor, dtype: torch.dtype, rounding: str = "") -> Tensor:
    out = torch.empty(values.shape, dtype=dtype)
    convert[(1,)](values, out, values.numel(), ROUNDING=rounding, BLOCK=1 << (values.numel() - 1).bit_length())
    return out


def numbers(dtype: torch.dtype) -> dict[int, float]:
    """The finite numbers from 0 up that the bits of a format mean, by the definition."""
    exponent, mantissa, bias, largest, _ = FORMATS[dtype]
    values = {}
    for bits in range(2 ** (exponent + mantissa)):
        e, m = bits >> mantissa, bits & 2**mantissa - 1
        value = (m / 2**mantissa) * 2.0 ** (1 - bias) if e == 0 else (1 + m / 2**mantissa) * 2.0 ** (e - bias)
        if value <= largest:
            values[bits] = value
    return values


def as_bits(values: Tensor) -> Tensor:
    return values.view(torch.int16 if values.dtype.itemsize == 2 else torch.uint8).int() & (
        0xFFFF if values.dtype.itemsize == 2 else 0xFF
    )


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_short_floats_mean_what_their_format_says(dtype: torch.dtype) -> None:
    table = numbers(dtype)
    bits = torch.tensor(list(table))
    short = bits.to(torch.int16 if dtype.itemsize == 2 else torch.uint8).view(dtype)
    assert converted(short, torch.float32).double().tolist() == list(table.values())
    assert as_bits(converted(torch.tensor(list(table.values())), dtype)).equal(bits.int())
    assert as_bits(converted(-torch.tensor(list(table.values())), dtype)).equal(
        bits.int() + 2 ** (8 * dtype.itemsize - 1)
    )


@pytest.mark.parametrize("rounding", ["", "rtz"])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_between_two_numbers_the_nearer_or_the_even_one(dtype: torch.dtype, rounding: str) -> None:
    table = list(numbers(dtype).items())
    steps = [(a, b) for a, b in pairwise(table) if a[1] == 0 or (a[1] > 1e-30 and b[1] < 1e30)]
    steps = steps[:: max(1, len(steps) // 4000)]
    values, want = [], []
    for (low_bits, low), (high_bits, high) in steps:
        middle = (low + high) / 2
        values += [low + (high - low) / 4, middle, low + 3 * (high - low) / 4]
        even = low_bits if low_bits % 2 == 0 else high_bits
        want += [low_bits] * 3 if rounding else [low_bits, even, high_bits]
    values_N = torch.tensor(values, dtype=torch.float32)
    assert values_N.double().tolist() == values  # fp32 holds them exactly
    assert as_bits(converted(values_N, dtype, rounding)).tolist() == want
    sign = 2 ** (8 * dtype.itemsize - 1)
    assert as_bits(converted(-values_N, dtype, rounding)).tolist() == [bits + sign for bits in want]


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_what_is_no_number_or_too_large(dtype: torch.dtype) -> None:
    largest, beyond = FORMATS[dtype][3:]
    values = torch.tensor([math.inf, -math.inf, math.nan, largest, 3.4e38, -0.0])
    inf, minus, nan, top, more, zero = converted(values, dtype).float().tolist()
    assert math.isnan(nan) and top == largest and zero == 0 and math.copysign(1, zero) == -1
    for got, want in ((inf, beyond), (minus, -beyond), (more, beyond)):
        assert got == want


def test_integers_and_wide_floats() -> None:
    integers = torch.tensor([0, 1, -3, 255, 257, -100_000])
    assert converted(integers, torch.bfloat16).float().tolist() == [0, 1, -3, 255, 256, -99840]
    assert converted(torch.tensor([0.0, 2.5, -2.5, 300.0]).bfloat16(), torch.int32).tolist() == [0, 2, -2, 300]
    assert converted(torch.tensor([1.5]), torch.float64).tolist() == [1.5]
    with pytest.raises(Exception, match="convert to fp32 first"):
        converted(torch.tensor([1.5]).double(), torch.bfloat16)


@jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(left, right, input_precision=PRECISION))


@pytest.mark.parametrize("dtype", [torch.float32, *FORMATS], ids=str)
def test_products(dtype: torch.dtype) -> None:
    a, b = (torch.randint(-8, 9, shape).to(dtype) for shape in ((16, 32), (32, 64)))
    c = torch.empty(16, 64)
    product[(1,)](a, b, c, 16, 64, 32, PRECISION="ieee")
    assert c.double().equal(a.double() @ b.double())  # small whole numbers: every sum is exact
    a, b = torch.randn(16, 32).to(dtype), torch.randn(32, 64).to(dtype)
    product[(1,)](a, b, c, 16, 64, 32, PRECISION="ieee")
    assert (c.double() - a.double() @ b.double()).abs().max() < 3e-5


def test_fp32_products_lose_on_a_cpu_what_tf32_loses_on_a_gpu() -> None:
    a, b, c = torch.full((16, 16), 1 + 2.0**-10), torch.eye(16), torch.empty(16, 16)
    product[(1,)](a, b, c, 16, 16, 16, PRECISION="tf32")
    assert c.equal(a)
    product[(1,)](a + 2.0**-12, b, c, 16, 16, 16, PRECISION="tf32")
    assert c.equal(a)
    product[(1,)](a + 2.0**-12, b, c, 16, 16, 16, PRECISION="ieee")
    assert c.equal(a + 2.0**-12)


@jit
def add_short(x, y, out):
    tl.store(out, tl.load(x) + tl.load(y))


@jit
def sum_short(x, out):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, 2)), axis=0))


@jit
def largest_short(x, out):
    tl.store(out, tl.load(x + tl.arange(0, 2)).to(tl.float32).max(axis=0))


def test_arithmetic_in_short_floats_is_refused() -> None:
    one, out = torch.ones(2, dtype=torch.bfloat16), torch.empty(1, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="fadd in bf16: convert to fp32 first"):
        add_short[(1,)](one, one, out)
    with pytest.raises(Exception, match="in bf16: convert to fp32 first"):
        sum_short[(1,)](one, out)
    largest_short[(1,)](one, out)
    assert out.item() == 1


def test_types_that_are_made_once_are_what_they_are_of() -> None:
    """Sizes, element, whether a pointer is constant: nothing that differs is shared, and what is wrong stays wrong."""
    scalars = [tl.int1, tl.int32, tl.uint32, tl.int64, tl.bfloat16, tl.float16, tl.float32, tl.float8e5, tl.float8e5b16]
    scalars += [tl.pointer_type(scalar, const=const) for scalar in (tl.float32, tl.int32) for const in (False, True)]
    made = []
    for _ in range(2):
        for shape in ((1,), (16,), (2, 8), (8, 2), (16, 1)):
            for scalar in scalars:
                kind = tl.block_type(scalar, list(shape))
                assert kind.scalar == scalar and list(kind.shape) == list(shape) and kind.numel == math.prod(shape)
                value = tl.tensor(TensorHandle(np.zeros(shape, bool), scalar), kind)
                assert list(value.shape) == list(shape) and value.numel == math.prod(shape)
                assert value.type is kind and value.dtype == scalar
                made.append(kind)
            assert list(tl.tensor(TensorHandle(np.zeros(1, bool), tl.int32), tl.int32).shape) == []
        for wrong in ([3], [], [2, 3], [2**21]):
            with pytest.raises((TypeError, ValueError)):
                tl.block_type(tl.float32, wrong)
    half = len(made) // 2
    for i, one in enumerate(made[:half]):
        assert [j for j, other in enumerate(made[half:]) if one == other] == [i]


def test_interprets_whatever_was_imported_before() -> None:
    """Triton's own functions are made when triton is imported: for a GPU, if nobody said otherwise until then."""
    code = """
import os, triton
assert "TRITON_INTERPRET" not in os.environ
from tests.kernels.test_interpret import *
test_arithmetic_in_short_floats_is_refused()
assert os.environ["TRITON_INTERPRET"] == "1"
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run(code, environment | {"CUDA_VISIBLE_DEVICES": ""})


def test_compiles_where_it_is_told_to() -> None:
    code = (
        "from moesaic.kernels.interpret import *; assert isinstance(jit(triton.cdiv.fn), JITFunction) and not INTERPRET"
    )
    run(code, os.environ | {"TRITON_INTERPRET": "0"})


def test_one_code_for_all_numbers() -> None:
    """Of the fused kernels, whatever the rank's number, the layer's and the step's tokens."""
    code = """
from moesaic.kernels.fused_ep import ANY, _fused_forward_kernel
from moesaic.kernels.fused_ep_backward import _fused_backward_kernel
from moesaic.kernels.fused_rows import _carry_kernel, _give_back_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
for kernel in (_fused_forward_kernel, _fused_backward_kernel, _carry_kernel, _give_back_kernel):
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    codes = [bind(*[number] * len(kernel.params), debug=False)[1] for number in (0, 1, 16, 17)]
    one = [i for i, p in enumerate(kernel.params) if p.name in ANY]
    assert len(one) == len(ANY) - (kernel is _carry_kernel) and all(len({str(code[i]) for code in codes}) == 1 for i in one)
    assert all(len({str(code[i]) for code in codes}) > 1 for i, p in enumerate(kernel.params) if i not in one)
"""
    run(code, os.environ | {"TRITON_INTERPRET": "0"})


def run(code: str, environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[2])
