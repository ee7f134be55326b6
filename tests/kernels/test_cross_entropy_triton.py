"""The fused output head: the harness, its mutants, its memory, and what autograd and torch.compile see of it."""

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.kernels import cross_entropy_triton
from moesaic.kernels.cross_entropy import linear_cross_entropies, linear_cross_entropy_reference
from moesaic.kernels.cross_entropy_triton import fused_linear_cross_entropy
from moesaic.kernels.testing import Operation, check, launches, mutated, saved_bytes

Z = 0.01
# chunk_bytes: of g for N tokens in fp32, blocks of one or a few tiles of columns, or one block.
SHAPES = (
    {"N": 1, "D": 8, "V": 2, "chunk": 1},
    {"N": 37, "D": 24, "V": 101, "chunk": 1},
    {"N": 33, "D": 41, "V": 197, "chunk": 33 * 4 * 128},
    {"N": 70, "D": 64, "V": 400, "chunk": 2**20},
)


def inputs(shape: Mapping[str, int], dtype: torch.dtype, scale: float, generator: torch.Generator) -> dict[str, Any]:
    n, d, v = shape["N"], shape["D"], shape["V"]
    x = torch.randn(n, d, generator=generator) * scale / d**0.5
    w = torch.randn(v, d, generator=generator)
    targets = torch.randint(v, (n,), generator=generator)
    targets[1::3] = -100
    return {"x": x.to(dtype), "w": w.to(dtype), "targets": targets, "chunk": shape["chunk"]}


OPERATION = Operation(
    name="linear_cross_entropy",
    run=lambda x, w, targets, chunk: fused_linear_cross_entropy(x, w, targets, -100, chunk, Z),
    reference=lambda x, w, targets, chunk: linear_cross_entropy_reference(x, w, targets, -100, Z),
    inputs=inputs,
    shapes=SHAPES,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3},
    gradients=("x", "w"),
    scales=(1.0, 1e-4, 30.0),
)


def test_harness(device: str) -> None:
    check(OPERATION, device)


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        ("_forward_kernel", 'tl.where((v < V)[None, :], z_MN, float("-inf"))', "z_MN"),
        ("_forward_kernel", "total_M * tl.exp(largest_M - new_M)", "total_M"),
        ("_forward_kernel", "v[None, :] == target_M[:, None]", "v[None, :] == n[:, None]"),
        ("_gradient_kernel", "(1.0 + 2.0 * z_coef * lse_M)[:, None]", "1.0"),
        ("_gradient_kernel", "v = first + column", "v = column"),
        ("_gradient_kernel", "(target_M != ignored)[:, None] & ", ""),
        ("_product_kernel", "acc_MN += tl.load(before + places, mask=real, other=0.0)", "pass"),
        ("_product_kernel", "acc_MN *= tl.load(scale)", "pass"),
        ("_product_kernel", "range(0, K, BK)", "range(0, K - BK + 1, BK)"),
    ],
)
def test_broken_kernels_fail(kernel: str, old: str, new: str, device: str) -> None:
    with mutated(getattr(cross_entropy_triton, kernel), old, new), pytest.raises(AssertionError):
        check(OPERATION, device)


@pytest.mark.parametrize("chunk", [1, 2**30])
def test_launches_and_memory(chunk: int, device: str) -> None:
    """One launch in forward, three for each block in backward; kept are the inputs and one number a token."""
    x, w = (
        torch.randn(20, 16, device=device, requires_grad=True),
        torch.randn(150, 16, device=device, requires_grad=True),
    )
    targets = torch.randint(150, (20,), device=device)
    run = functools.partial(fused_linear_cross_entropy, x, w, targets, -100, chunk)
    assert saved_bytes(run, ignore=(x, w, targets)) == 20 * 4
    with launches() as kernels:
        loss = run()
        assert kernels == ["_forward_kernel"]
        loss.backward()
    blocks = 1 if chunk > 1 else -(-150 // cross_entropy_triton._tile_of(x).n)
    assert kernels[1:] == ["_gradient_kernel", "_product_kernel", "_product_kernel"] * blocks
    with launches() as kernels:
        frozen = fused_linear_cross_entropy(x, w.detach(), targets, -100, chunk)
        torch.autograd.grad(frozen, x)
    assert kernels[1:] == ["_gradient_kernel", "_product_kernel"] * blocks


def test_backends_agree(device: str) -> None:
    x, w = (
        torch.randn(30, 24, device=device, requires_grad=True),
        torch.randn(90, 24, device=device, requires_grad=True),
    )
    targets = torch.randint(90, (30,), device=device)
    targets[::7] = -100
    results = []
    for backend in ("torch", "triton"):
        loss, each_N = linear_cross_entropies(x, w, targets, -100, backend=backend)
        results.append([loss, each_N, *torch.autograd.grad(loss * 0.3, (x, w))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_tokens_and_all_ignored(device: str) -> None:
    for n in (0, 5):
        x, w = (
            torch.randn(n, 8, device=device, requires_grad=True),
            torch.randn(9, 8, device=device, requires_grad=True),
        )
        loss = fused_linear_cross_entropy(x, w, torch.full((n,), -100, device=device), -100, 100)
        loss.backward()
        assert loss.item() == 0 and (x.grad == 0).all() and (w.grad == 0).all()


def test_operation_for_the_compiler(device: str) -> None:
    """Schema, fake tensors and autograd are those that torch.compile and FSDP2 rely on; no value is read on the host."""
    x, w = torch.randn(9, 8, device=device, requires_grad=True), torch.randn(20, 8, device=device, requires_grad=True)
    arguments = (x, w, torch.randint(20, (9,), device=device), -100, 0.0, 1)
    torch.library.opcheck(cross_entropy_triton._forward_op, arguments)
    with FakeTensorMode():
        x, w = (torch.randn(s, 8, requires_grad=True, dtype=torch.bfloat16) for s in (9, 20))
        loss = fused_linear_cross_entropy(x, w, torch.zeros(9, dtype=torch.int64), -100, 1)
        dx, dw = torch.autograd.grad(loss, (x, w))
    assert loss.dtype is torch.float32 and loss.shape == ()
    assert (dx.shape, dx.dtype, dw.shape, dw.dtype) == (x.shape, torch.bfloat16, w.shape, torch.bfloat16)
