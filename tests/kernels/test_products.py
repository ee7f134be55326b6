"""Products by either library, against fp64. Both can be had on any CPU; which is faster is another question."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from moesaic.kernels import products
from moesaic.kernels.permute import sort_slots
from moesaic.moe.experts import _ExpertsOp, experts_reference
from moesaic.moe.low import Low, grouped

SHAPES = [(1, 3, 2), (16, 8, 24), (17, 33, 5), (100, 64, 129), (0, 4, 4), (20, 0, 4), (31, 7, 0)]


@pytest.fixture(params=[False, True], ids=["torch", "onednn"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    calls = []
    true = products._product

    def counted(a: Tensor, b: Tensor) -> Tensor:
        calls.append(a.shape)
        return true(a, b)

    monkeypatch.setattr(products, "by_onednn", lambda: request.param)
    monkeypatch.setattr(products, "_product", counted)
    yield request.param
    if not request.param:
        assert not calls


def drawn(*shape: int, turned: bool = False) -> Tensor:
    return torch.randn(*shape[:-2], shape[-1], shape[-2]).mT if turned else torch.randn(shape)


def close(got: Tensor, want: Tensor) -> None:
    assert_close(got.double(), want, rtol=0, atol=2e-6 * max(1.0, want.abs().max().item() if want.numel() else 0.0))


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("turned", range(4))
def test_mm(m: int, k: int, n: int, turned: int) -> None:
    a, b = drawn(m, k, turned=bool(turned & 1)), drawn(k, n, turned=bool(turned & 2))
    want, out = a.double() @ b.double(), torch.full((m, n), torch.nan)
    close(products.mm(a, b), want)
    assert products.mm(a, b, out=out) is out
    close(out, want)


@pytest.mark.parametrize("turned", range(4))
def test_slices_of_columns(library: bool, turned: int, capfd: pytest.CaptureFixture[str]) -> None:
    """By fast code too: oneDNN has none for a second operand whose columns or rows are not side by side, and says so."""
    a, b = (drawn(40, 90, turned=bool(turned & bit))[:, 8:72] for bit in (1, 2))
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        got = products.mm(a, b.T)
    close(got, a.double() @ b.double().T)
    told = [line for line in capfd.readouterr().out.splitlines() if "exec" in line and "inner_product" in line]
    assert bool(told) == library and not any(",ref" in line for line in told), told


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_torchs(dtype: torch.dtype) -> None:
    a, b = torch.randn(20, 30).to(dtype), torch.randn(30, 40).to(dtype)
    assert torch.equal(products.mm(a, b), torch.mm(a, b))


@given(st.integers(1, 10**6))
def test_rounded(count: int) -> None:
    got = products.rounded(count)
    assert count <= got <= count + count / 16
    assert bin(got).count("1") <= 5 and products.rounded(got) == got
    assert len({products.rounded(n) for n in range(1024, 2048)}) <= 17


@pytest.mark.parametrize(
    "counts", [[40, 0, 19, 5, 33], [100], [0, 0], [16, 17], [products.PIECE + 3, 2 * products.PIECE]]
)
@pytest.mark.parametrize("spare", [0, 50])
def test_rows_of_experts(counts: list[int], spare: int) -> None:
    """What stands behind the rows is not in the result, be it NaN for `rows_mm`."""
    rows = sum(counts)
    a, b, w = drawn(rows + spare, 24), drawn(rows + spare, 40), drawn(len(counts), 24, 8)
    for j, part in enumerate(products.slices(counts)):
        assert part.stop - part.start == counts[j]
        out, poisoned = torch.full((counts[j], 8), torch.nan), a.clone()
        poisoned[part.stop :] = torch.nan
        products.rows_mm(poisoned, part, w[j], out)
        close(out, a[part].double() @ w[j].double())
        for left, right in ((a, b), (b, a)):
            out = torch.full((left.shape[1], right.shape[1]), torch.nan)
            products.mtm(left, right, part, out)
            close(out, left[part].double().T @ right[part].double())


@pytest.mark.parametrize(("n", "m", "k", "p"), [(3, 17, 9, 20), (2, 5, 4, 6), (1, 64, 32, 64)])
def test_bmm(n: int, m: int, k: int, p: int) -> None:
    a, b = drawn(n, m, k), drawn(n, k, p, turned=True)
    want = a.double() @ b.double()
    close(products.bmm(a, b), want)
    into = torch.ones(n, 2 * m, p)[:, ::2]
    products.bmm(a, b, into, add=True)
    close(into, want + 1)
    products.bmm(a, b, into.view(n, m, p))
    close(into, want)


@pytest.mark.parametrize("shape", [(2, 30), (7,), (0,), (64,)])
def test_linear(shape: tuple[int, ...]) -> None:
    layer = products.Linear(12, 20)
    x = torch.randn(*shape, 12, requires_grad=True)
    dy = torch.randn(*shape, 20)
    y = layer(x)
    y.backward(dy)
    assert y.shape == dy.shape and x.grad is not None and layer.weight.grad is not None
    w64, x64, dy64 = layer.weight.double(), x.double(), dy.double()
    close(y, x64 @ w64.T)
    close(x.grad, dy64 @ w64)
    close(layer.weight.grad, dy64.flatten(0, -2).T @ x64.flatten(0, -2))


@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_experts(tokens: int) -> None:
    """The loop over experts, forward and backward; more than one group of rows, experts without any."""
    torch.manual_seed(tokens)
    e, d, f, k = 9, 24, 20, 4
    ids = (torch.rand(tokens, e) ** torch.arange(1.0, e + 1)).topk(k).indices.sort(dim=1).values
    rows = sort_slots(
        torch.arange(tokens).repeat_interleave(k), ids.flatten(), ids.flatten().bincount(minlength=e), tokens, k
    )
    inputs = [torch.randn(tokens, d), torch.rand(tokens * k), torch.randn(e, 2 * f, d), torch.randn(e, d, f)]
    ours = [x.clone().requires_grad_() for x in inputs]
    want = [x.double().requires_grad_() for x in inputs]
    dy = torch.randn(tokens, d)
    y = _ExpertsOp.apply(*ours, None, None, rows, "swiglu", 8)
    y64 = experts_reference(*want, None, None, rows, "swiglu")
    y.backward(dy)
    y64.backward(dy.double())
    close(y, y64.detach())
    for mine, theirs in zip(ours, want, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        close(mine.grad, theirs.grad)


def test_experts_of_low_precision() -> None:
    counts = [20, 0, 33]
    values, weights = torch.randn(53, 16), torch.randn(3, 24, 16)
    got = grouped(values, None, Low(weights, None, None), counts, torch.empty(0))
    want = [v.double() @ w.double().T for v, w in zip(values.split(counts), weights, strict=True)]
    close(got, torch.cat(want))


INFO = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\n\nprocessor\t: 1\n"


@pytest.mark.parametrize(("vendor", "family", "instructions", "want"), [
    ("AuthenticAMD", 26, "AVX512", True), ("AuthenticAMD", 25, "AVX512", False), ("AuthenticAMD", 26, "AVX2", False),
    ("GenuineIntel", 26, "AVX512", False),
])  # fmt: skip
def test_which_processors(
    monkeypatch: pytest.MonkeyPatch, vendor: str, family: int, instructions: str, want: bool
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(Path, "read_text", lambda self: INFO.format(vendor, family))
    assert products.by_onednn.__wrapped__() == want
