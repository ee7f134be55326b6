"""The rotary kernel against its specification, and against the composed operations that the model runs on a CPU."""

from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moesaic.kernels import rope
from moesaic.kernels.testing import Operation, check, mutated
from moesaic.moe.attention import _turn, rotary_table, rotate


def inputs(shape: Mapping[str, int], dtype: torch.dtype, scale: float, generator: torch.Generator) -> dict[str, Any]:
    b, s, h, c = (shape[letter] for letter in "BSHC")
    x = torch.randn(b, s, 3, h, c, generator=generator) * scale
    cos, sin = rotary_table(s, c, 100.0, torch.device("cpu"))
    return {"x": x.to(dtype), "cos": cos, "sin": sin, "direction": shape["direction"]}


OPERATION = Operation(
    name="rope",
    run=lambda x, cos, sin, direction: rope.rope(x[:, :, 1], cos, sin, direction),  # a part of each row, as of wqkv
    reference=lambda x, cos, sin, direction: rope.rope_reference(x[:, :, 1], cos, sin, direction),
    inputs=inputs,
    shapes=(
        {"B": 1, "S": 1, "H": 1, "C": 2, "direction": 1},
        {"B": 2, "S": 37, "H": 3, "C": 24, "direction": -1},
        {"B": 3, "S": 50, "H": 5, "C": 64, "direction": 1},
    ),
    tolerance={torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3},
)


def test_harness(device: str) -> None:
    check(OPERATION, device)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("DIRECTION * tl.load", "tl.load"),
        ("row // H, row % H", "row // H, row % 1"),
        ("(row < R)[:, None] & (pair < P)", "(row < R - 1)[:, None] & (pair < P)"),
        ("sin_SC + table + P", "sin_SC + table"),
    ],
)
def test_broken_kernels_fail(old: str, new: str, device: str) -> None:
    with mutated(rope._rope_kernel, old, new), pytest.raises(AssertionError):
        check(OPERATION, device)


@pytest.mark.parametrize("interleaved", [False, True])
def test_equals_the_model_on_a_cpu(interleaved: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and gradient through `rotate` as the model calls it, with the kernel in the place of the composed operations."""
    cos, sin = (table.to(device) for table in rotary_table(9, 12, 100.0, torch.device("cpu")))
    x = torch.randn(2, 9, 3, 12, device=device, requires_grad=True)
    dy = torch.randn(2, 9, 3, 12, device=device)

    def both() -> list[Tensor]:
        y = rotate(x, cos, sin, interleaved)
        return [y, *torch.autograd.grad(y, x, dy)]

    composed = both()
    monkeypatch.setattr("moesaic.moe.attention._turn", lambda x, cos, sin, d: rope.rope(x, cos[:, 0], sin[:, 0], d))
    for mine, theirs in zip(both(), composed, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_on_cuda_it_is_one_operation(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cos, sin = (table.to(device) for table in rotary_table(9, 12, 100.0, torch.device("cpu")))
    torch.library.opcheck(rope.rope, (torch.randn(2, 9, 3, 12, device=device).bfloat16(), cos, sin, -1))
    operation, x = mock.Mock(), mock.Mock(is_cuda=True)
    monkeypatch.setattr(rope, "rope", operation)
    assert _turn(x, cos[:, None], sin[:, None], -1) is operation.return_value
    (got, *tables, direction), _ = operation.call_args
    assert got is x and direction == -1 and all(map(torch.equal, tables, (cos, sin)))
