"""Head and cross entropy in one: against the specification in fp64, and its memory against its promise."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.kernels.cross_entropy import linear_cross_entropies, linear_cross_entropy, linear_cross_entropy_reference


@pytest.mark.parametrize("scale", [1e-3, 1.0, 5.0])
@pytest.mark.parametrize(
    ("n", "d", "v", "chunk_bytes"), [(1, 3, 2, 1), (37, 16, 101, 4 * 101 * 8), (64, 24, 50, 2**20)]
)
def test_equals_reference(n: int, d: int, v: int, chunk_bytes: int, scale: float) -> None:
    x, w = torch.randn(n, d) * scale, torch.randn(v, d)
    targets = torch.randint(0, v, (n,))
    targets[::3] = -100
    if n == 1:
        targets[0] = 1
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    exact = [x.double().requires_grad_(), w.double().requires_grad_()]
    got = linear_cross_entropy(*leaves, targets, -100, chunk_bytes)
    want = linear_cross_entropy_reference(*exact, targets, -100)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-7)
    _, each_N = linear_cross_entropies(*leaves, targets, -100, chunk_bytes)
    alone = [linear_cross_entropy_reference(exact[0][i : i + 1], exact[1], targets[i : i + 1], -100) for i in range(n)]
    torch.testing.assert_close(each_N.double(), torch.stack(alone), rtol=2e-6, atol=1e-6)
    assert not each_N.requires_grad
    (got * 0.37).backward()
    (want * 0.37).backward()
    for mine, theirs in zip(leaves, exact, strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max().clamp(min=1e-3)


def test_all_ignored_and_no_tokens() -> None:
    w = torch.randn(7, 4, requires_grad=True)
    for n in (0, 5):
        x = torch.randn(n, 4, requires_grad=True)
        loss = linear_cross_entropy(x, w, torch.full((n,), -100), -100)
        loss.backward()
        assert loss.item() == 0 and (x.grad == 0).all() and (w.grad == 0).all()


class Largest(TorchDispatchMode):
    """The largest storage that any operation made, views of the `given` tensors not counted."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.bytes = 0
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_no_tensor_of_all_logits() -> None:
    n, d, v = 512, 8, 1000
    x, w = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    with Largest() as watch:
        linear_cross_entropy(x, w, torch.randint(0, v, (n,)), -100, chunk_bytes=64 * v * 4).backward()
    assert watch.bytes <= 64 * v * 4  # all logits would be 8 times that


def test_without_gradient_makes_none() -> None:
    """As in an evaluation, where the weights are those of training: nothing as large as the head's gradient is made."""
    n, d, v = 9, 40, 110
    x, w, targets = torch.randn(n, d), torch.randn(v, d, requires_grad=True), torch.randint(0, v, (n,))
    with torch.no_grad(), Largest(w) as watch:
        got = linear_cross_entropy(x, w, targets, -100, chunk_bytes=4 * v)
    assert watch.bytes < w.nbytes
    torch.testing.assert_close(got, linear_cross_entropy_reference(x, w.detach(), targets, -100))
