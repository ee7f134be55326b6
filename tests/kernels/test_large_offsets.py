"""Addresses past 2^31 values: tensors that long, of which only what is read is ever touched, so that they take no memory."""

import pytest
import torch
from torch import Tensor

from moesaic.kernels import combine
from moesaic.kernels.grouped_gemm import schedule, varlen_k, varlen_k_reference, varlen_m, varlen_m_reference
from moesaic.kernels.tiles import Tile

TILE, FAR = Tile(16, 16, 16), 2**30 + 64  # the third row or expert begins beyond 2^31 values
COUNTS = torch.tensor([3, 0, 18])


def far_apart(*shape: int) -> Tensor:
    """fp16, the first dimension's parts FAR values apart."""
    inner = [1]
    for size in reversed(shape[2:]):
        inner.insert(0, inner[0] * size)
    t = torch.empty_strided(shape, (FAR, *inner), dtype=torch.float16)
    for part in t:
        part.copy_(torch.randn(part.shape))
    assert t[2:].storage_offset() > 2**31
    return t


@pytest.fixture(autouse=True)
def on_a_cpu(device: str) -> None:
    if device != "cpu":
        pytest.skip("on a GPU the memory would have to be there")


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got.double() - want).abs().max() < 2e-3 * want.abs().max())


@pytest.mark.parametrize("k", [24, 23], ids=["described", "pointers"])
@pytest.mark.parametrize("transposed", [False, True])
def test_weights(transposed: bool, k: int) -> None:
    torch.manual_seed(0)
    n = 40 if k == 24 else 39
    x, w = torch.randn(21, k).half(), far_apart(3, *((k, n) if transposed else (n, k)))
    y, _ = varlen_m(x, w, schedule(COUNTS, TILE.m), TILE, transposed=transposed)
    near = torch.stack([part.clone() for part in w]).double()
    assert close(y, varlen_m_reference(x.double(), near, COUNTS, None, None, transposed))


def test_rows_that_are_gathered() -> None:
    torch.manual_seed(1)
    x, w, source = far_apart(3, 24), torch.randn(3, 40, 24).half(), torch.randint(3, (21,))
    near = torch.stack([row.clone() for row in x]).double()
    plan = schedule(COUNTS, TILE.m)
    y, _ = varlen_m(x, w, plan, TILE, source_R=source)
    assert close(y, varlen_m_reference(near, w.double(), COUNTS, source, None, False))
    right = torch.randn(21, 8).half()
    dw, _ = varlen_k(x, right, plan, TILE, source, gather="left")
    assert close(dw, varlen_k_reference(near, right.double(), COUNTS, source, "left", None)[0])
    dw, _ = varlen_k(right, x, plan, TILE, source, gather="right")
    assert close(dw, varlen_k_reference(right.double(), near, COUNTS, source, "right", None)[0])


def test_rows_that_are_combined() -> None:
    rows, d = 2**22 + 5, 512
    y_RD = torch.empty(rows, d, dtype=torch.float16)  # over 2^31 values
    assert y_RD.numel() > 2**31
    bag = torch.tensor([[rows - 1, 0], [rows - 2, rows - 3]])
    for row in bag.flatten().tolist():
        y_RD[row] = torch.randn(d)
    got = combine.combine(y_RD, bag, None)
    assert close(got, y_RD[bag].double().sum(dim=1))
