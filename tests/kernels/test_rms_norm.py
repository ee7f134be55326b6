"""RMSNorm and its gradients against the definition in fp64."""

import pytest
import torch

from moesaic.kernels.rms_norm import RMSNorm


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(1, 3), (7, 24), (3, 5, 33), (0, 8), (2, 3, 4, 6)], ids=str)
def test_equals_definition(shape: tuple[int, ...], scale: float) -> None:
    norm = RMSNorm(shape[-1], eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(shape) * scale).requires_grad_()
    dy = torch.randn(shape)
    got = norm(x)
    got.backward(dy)
    exact, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    want = exact / (exact.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight
    want.backward(dy.double())
    for mine, theirs in ((got, want), (x.grad, exact.grad), (norm.weight.grad, weight.grad)):
        assert mine.shape == theirs.shape
        if theirs.numel():
            assert (mine - theirs).abs().max() <= 5e-6 * theirs.abs().max()


def test_views_and_other_types() -> None:
    norm = RMSNorm(8)
    x = torch.randn(4, 6, 16)[:, ::2, 4:12]
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (8,), norm.weight, norm.eps))
    half = RMSNorm(8, eps=1e-5).bfloat16()
    y = half(x.bfloat16())
    torch.testing.assert_close(y.float(), torch.nn.functional.rms_norm(x, (8,), None, 1e-5), rtol=0.02, atol=0.02)
