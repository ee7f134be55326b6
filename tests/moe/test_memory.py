"""What the expert operation keeps, and how much it needs on the way, against the formulas."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.kernels.permute import sort_slots
from moesaic.kernels.testing import PeakMemory, saved_bytes
from moesaic.moe import experts as module
from moesaic.moe.router import count_rows

# Tokens, width, expert width, experts, slots: the 12 shapes of SonicMoE's Table 9b (arXiv 2512.14080), of models of 1.4B to 120B.
TABLE_9B = [
    (40960, 768, 256, 128, 8), (40960, 768, 512, 64, 4), (40960, 768, 1024, 32, 2),
    (24576, 1536, 256, 128, 8), (24576, 1536, 512, 64, 4), (24576, 1536, 1024, 32, 2),
    (32768, 4096, 256, 256, 16), (32768, 4096, 512, 128, 8), (32768, 4096, 1024, 64, 4),
    (32768, 4096, 512, 256, 16), (32768, 4096, 1024, 128, 8), (32768, 4096, 2048, 64, 4),
]  # fmt: skip
# MiB of 2Td + 4TKn, as the paper's formula gives them.
MIB = [380, 380, 380, 264, 264, 264, 768, 768, 768, 1280, 1280, 1280]


def saved(shape: tuple[int, ...], dtype: torch.dtype, ids: Tensor) -> int:
    """Bytes the operation keeps beside its weights."""
    tokens, d, f, experts, k = shape
    x = torch.empty(tokens, d, dtype=dtype, requires_grad=True)
    weights = torch.empty(tokens * k, requires_grad=True)
    w_up = torch.empty(experts, 2 * f, d, dtype=dtype, requires_grad=True)
    w_down = torch.empty(experts, d, f, dtype=dtype, requires_grad=True)
    token_S = torch.arange(tokens).repeat_interleave(k)
    rows = sort_slots(token_S, ids.flatten(), count_rows(ids, experts), tokens, k)
    return saved_bytes(
        lambda: module._ExpertsOp.apply(x, weights, w_up, w_down, None, None, rows, "swiglu", 256), (w_up, w_down)
    )


def metadata(shape: tuple[int, ...], width: int) -> int:
    """Row indices there and back, int64, the router's weights, in the input's type, and counts."""
    tokens, _, _, experts, k = shape
    return tokens * k * (8 + 8 + width) + 8 * experts


@pytest.mark.parametrize(("shape", "mib"), list(zip(TABLE_9B, MIB, strict=True)), ids=str)
def test_saved_bytes_at_full_size(shape: tuple[int, ...], mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16, by what runs on CUDA, on tensors without memory."""
    monkeypatch.setattr(module, "_forward_loop", module._forward_grouped)
    tokens, d, f, _, k = shape
    with FakeTensorMode():
        got = saved(shape, torch.bfloat16, torch.zeros(tokens, k, dtype=torch.int64))
    assert got - metadata(shape, 2) == 2 * tokens * d + 4 * tokens * k * f == mib * 2**20
    assert metadata(shape, 2) < 0.03 * got


@pytest.mark.parametrize("shape", [(64, 48, 40, 8, 2), (33, 16, 24, 5, 5)])
def test_saved_bytes_with_real_memory(shape: tuple[int, ...]) -> None:
    """fp32 keeps twice the bytes, and the loop that runs on a CPU keeps the same tensors."""
    tokens, d, f, experts, k = shape
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    assert saved(shape, torch.float32, ids) - metadata(shape, 4) == 4 * tokens * d + 8 * tokens * k * f


class Large(PeakMemory):
    """Counts storages of at least `size` bytes: how many are made, `made`, and how many live at once at most, `together`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made, self.together = size, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = set(self._alive)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        large = [key for key, (_, size) in self._alive.items() if size >= self.size]
        self.made += len(set(large) - before)
        self.together = max(self.together, len(large))
        return out


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("chunk_mib", [1, 256])
def test_rows_of_outputs_and_input_gradients_are_never_all_there(
    backend: str, chunk_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R x D values are 12 MiB here. On a CPU no tensor has as many. The grouped products need gathered X forward, gathered dY and
    gathered X backward, one after the other; and only where one chunk takes all columns, Y and dX beside."""
    if backend == "grouped":
        monkeypatch.setattr(module, "_forward_loop", module._forward_grouped)
        monkeypatch.setattr(module, "_backward_loop", module._backward_grouped)
    tokens, d, f, experts, k = 2048, 384, 16, 4, 4
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    rows = sort_slots(torch.arange(tokens).repeat_interleave(k), ids.flatten(), count_rows(ids, experts), tokens, k)
    x, weights, w_up, w_down = (
        value.requires_grad_() for value in
        (torch.randn(tokens, d), torch.rand(tokens * k), torch.randn(experts, 2 * f, d), torch.randn(experts, d, f))
    )  # fmt: skip
    dy, rows_by_d = torch.randn(tokens, d), tokens * k * d * 4
    with Large(rows_by_d) as forward:
        y = module._ExpertsOp.apply(x, weights, w_up, w_down, None, None, rows, "swiglu", chunk_mib)
    with Large(rows_by_d) as backward:
        y.backward(dy)
    one_chunk = int(chunk_mib == 256)
    want = (1 + one_chunk, 1, 2 + one_chunk, 1) if backend == "grouped" else (0, 0, 0, 0)
    assert (forward.made, forward.together, backward.made, backward.together) == want
    # Beside them: sums of T x D, a group's or a chunk's rows, and what is F wide.
    assert max(forward.peak, backward.peak) < (0.8 + (backend == "grouped")) * rows_by_d


def test_the_instrument_sees_what_lives() -> None:
    with PeakMemory() as watch:
        a = torch.ones(1000)
        b = a + 1
        del b
        c = a.view(10, 100)[2:]
        c += 1
        assert watch.now == 4000
    assert watch.peak == 8000
