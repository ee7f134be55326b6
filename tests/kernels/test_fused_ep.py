"""The fused kernels by themselves, on one rank: outputs and every gradient, all types, odd shapes, memory that nobody wrote.

With TRITON_INTERPRET=0 on a GPU (make test-gpu). Several ranks: tests/parallel/test_fused.py and test_fused_schedules.py.
"""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.kernels import fused_ep
from moesaic.kernels.experts import ACTIVATIONS, experts_reference
from moesaic.kernels.fused_ep_backward import backward
from moesaic.kernels.fused_protocol import regions
from moesaic.kernels.permute import Rows
from moesaic.kernels.symmetric import make_heap
from moesaic.kernels.testing import Operation, check
from moesaic.kernels.tiles import fused_tile
from tests.kernels.test_experts import SHAPES, TOLERANCE, inputs

SMALL = dict(tokens=5, k=2, experts=3, d=20, f=9, first=0, unused=3)


def failing(setting: fused_ep.Setting, result: Tensor) -> Tensor:
    """NaN where a wait was in vain, as without the forward kernel, which the harness leaves out in turn."""
    return torch.full_like(result, torch.nan) if setting.heap.view("failed").any() else result


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, b_down: Tensor | None,
        rows: Rows, activation: str, keep: bool, n: int,
    ) -> Tensor:  # fmt: skip
        """n: the first experts, given as shared ones."""
        (n_experts, _, d), f, tile = w_up.shape, w_down.shape[2], fused_tile(x.device)
        slots = rows.source_R.numel()
        tiles = fused_ep.room(1, n_experts, slots, tile.m)
        pair = activation != "relu2"
        shapes = regions(
            1, n_experts, d, x.dtype, slots, tiles, tile.m, fused_ep.most_columns(d, tile), fused_ep.most_columns(f, tile, pair),
            not keep,
        )  # fmt: skip

        def alone(size: int, exchange: Any) -> Any:
            memory = torch.zeros(size, dtype=torch.uint8, device=x.device)
            return memory, [memory], [memory.data_ptr()]

        heap = make_heap(0, shapes, lambda value: [value], alone)
        ctx.sent = torch.zeros(1, len(fused_ep.PHASES), dtype=torch.int64, device=x.device)
        programs = fused_ep.grid_programs(x.device, 0)
        ctx.setting = fused_ep.Setting(
            heap, n_experts, tile, not keep, 2_000 if x.is_cpu else 10_000_000, programs, wave=2
        )
        ctx.shared = (w_up[:n], w_down[:n]) if n else None
        w_up, w_down = w_up[n:], w_down[n:]
        ctx.rows, ctx.activation, ctx.inputs = rows, activation, (x, weights, w_up, w_down, b_down)
        y, *ctx.kept = fused_ep.forward(
            x, weights, w_up, w_down, rows, activation, ctx.setting, ctx.sent, keep, b_up=b_up, b_down=b_down,
            shared=ctx.shared,
        )  # fmt: skip
        return failing(ctx.setting, y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x, weights, up, down, b_down), (h, tables, kept) = ctx.inputs, ctx.kept
        grads = backward(
            dy, x, h, kept, tables, weights, up, down, ctx.rows, ctx.activation, ctx.setting, ctx.sent, b_down=b_down,
            shared=ctx.shared,
        )  # fmt: skip
        assert not ctx.sent.any()  # nothing goes to another rank
        return *(failing(ctx.setting, grad) for grad in grads), *[None] * (10 - len(grads))


def run(activation: str, keep: bool, n: int = 0, **given: Any) -> Tensor:
    x = given["x"]
    indices = (given[name].to(x.device) for name in ("source_R", "slot_R", "expert_R", "bag"))
    starts = given["starts"]
    rows = Rows(*indices, None if starts is None else starts.to(x.device), given["counts_E"].to(x.device))
    parameters = (given["w_up"], given["w_down"], given.get("b_up"), given.get("b_down"))
    return Fused.apply(x, given["weights"], *parameters, rows, activation, keep, n)


def plain(activation: str, **given: Any) -> Tensor:
    names = ("x", "weights", "w_up", "w_down", "b_up", "b_down")
    return experts_reference(*(given.get(n) for n in names), given["source_R"], given["counts_E"], activation)


def draw(
    names: tuple[str, ...], activation: str, s: Any, dtype: torch.dtype, scale: float, generator: torch.Generator
) -> dict[str, Any]:
    given = inputs(s, dtype, scale, generator, activation, bias="b_up" in names)
    rows = given.pop("rows")
    given = {name: given[name] for name in names}
    fields = ("source_R", "slot_R", "expert_R", "bag", "starts", "counts_E")
    return given | {name: getattr(rows, name) for name in fields}


def operation(activation: str, keep: bool, bias: bool, shapes: Any, n: int = 0) -> Operation:
    names = ("x", "weights", "w_up", "w_down", *(("b_up", "b_down") if bias else ()))
    return Operation(
        f"fused {activation}", functools.partial(run, activation, keep, n), functools.partial(plain, activation),
        functools.partial(draw, names, activation), shapes, TOLERANCE, names, (1.0,),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("activation", "keep", "bias", "shapes"),
    [("swiglu", False, False, SHAPES[1:3]), ("swiglu", False, True, (SMALL,)), ("relu2", True, True, SHAPES[1:2])],
)
def test_equals_the_specification(activation: str, keep: bool, bias: bool, shapes: Any, device: str) -> None:
    check(operation(activation, keep, bias, shapes), device)


@pytest.mark.parametrize("shape", [SMALL, SMALL | dict(d=32, f=16)])  # read through pointers; and, but for fp32, by TMA
def test_shared_experts(shape: Any, device: str) -> None:
    check(operation("swiglu", False, True, (shape,), 2), device)


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_shapes_and_activations_on_a_gpu(activation: str, keep: bool) -> None:
    check(operation(activation, keep, not keep, SHAPES), "cuda", every=True)
