"""Routed experts in Triton: outputs and every gradient, launches, bytes kept, and kernels broken on purpose."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.kernels import experts as module
from moesaic.kernels.experts import ACTIVATIONS, experts, experts_reference
from moesaic.kernels.permute import Rows, sort_slots
from moesaic.kernels.testing import Operation, check, check_case, launches, mutated, saved_bytes

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Tokens, slots a token, experts, width, expert width; `first`: experts below it get no rows; `unused`: one slot of so many is unused.
SHAPES = (
    dict(tokens=37, k=2, experts=5, d=40, f=24, first=0, unused=0),
    dict(tokens=1, k=1, experts=1, d=17, f=9, first=0, unused=0),
    dict(tokens=29, k=4, experts=4, d=48, f=33, first=0, unused=3),  # every token visits every expert, but for unused slots
    dict(tokens=40, k=1, experts=6, d=20, f=72, first=5, unused=0),  # one expert with everything
)


def rows_of(s: Mapping[str, int], generator: torch.Generator) -> Rows:
    noise = torch.rand(s["tokens"], s["experts"], generator=generator)
    noise[:, : s["first"]] = -1
    chosen = noise.topk(s["k"], dim=1).indices.flatten()
    token_S = torch.arange(s["tokens"]).repeat_interleave(s["k"])
    if s["unused"]:
        chosen[:: s["unused"]] = s["experts"]
    counts = torch.bincount(chosen, minlength=s["experts"] + 1)[: s["experts"]]
    return sort_slots(token_S, chosen, counts, s["tokens"], 0 if s["unused"] else s["k"])


def inputs(
    s: Mapping[str, int], dtype: torch.dtype, scale: float, generator: torch.Generator, activation: str, bias: bool
) -> dict[str, Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    g = s["f"] * (1 if activation == "relu2" else 2)
    rows = rows_of(s, generator)
    # fp16 ends at 6e-8 and 65504: there the scale is that of the last, linear, product; of the input it would be squared.
    of_x, of_w = (1.0, scale) if dtype is torch.float16 else (scale, 1.0)
    return {
        "x": (normal(s["tokens"], s["d"]) * of_x).to(dtype),
        "weights": torch.rand(rows.source_R.numel(), generator=generator),
        "w_up": (normal(s["experts"], g, s["d"]) / s["d"] ** 0.5).to(dtype),
        "w_down": (normal(s["experts"], s["d"], s["f"]) / s["f"] ** 0.5 * of_w).to(dtype),
        "b_up": (normal(s["experts"], g) * of_x).to(dtype) if bias else None,
        "b_down": (normal(s["experts"], s["d"]) * of_x * of_w).to(dtype) if bias else None,
        "rows": rows,
        "activation": activation,
    }


def run(
    x: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, b_down: Tensor | None, rows: Rows,
    activation: str, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    return experts(
        x, weights, w_up, w_down, b_up, b_down, rows.source_R.to(x.device), rows.bag.to(x.device),
        None if rows.starts is None else rows.starts.to(x.device), rows.counts_E.to(x.device), activation, chunk,
    )  # fmt: skip


def exact(
    x: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, b_down: Tensor | None, rows: Rows,
    activation: str,
) -> Tensor:  # fmt: skip
    return experts_reference(x, weights, w_up, w_down, b_up, b_down, rows.source_R, rows.counts_E, activation)


def operation(activation: str, bias: bool, shapes: tuple[Mapping[str, int], ...] = SHAPES) -> Operation:
    return Operation(
        f"experts {activation}{' with biases' * bias}", run, exact,
        lambda s, dtype, scale, generator: inputs(s, dtype, scale, generator, activation, bias), shapes, TOLERANCE,
        ("x", "weights", "w_up", "w_down", *(("b_up", "b_down") if bias else ())),
    )  # fmt: skip


OPERATIONS = [
    operation("swiglu", False),
    operation("swiglu", True, SHAPES[2:]),
    operation("geglu", True, SHAPES[:1]),
    operation("reglu", True, SHAPES[:1]),
    operation("relu2", True, SHAPES[:2]),
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_against_reference(operation: Operation) -> None:
    check(operation)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_reference_on_a_gpu(activation: str, bias: bool) -> None:
    check(operation(activation, bias), "cuda", every=True)


MUTANTS = [
    ("_up_kernel", "expert, f, F + f, G", "expert, f, f, G"),  # the gate twice
    ("_up_kernel", "tl.store(places + F, up, mask=exists)", "pass"),  # what was in memory
    ("_up_kernel", "a_MN *= up.to(tl.float32)", "pass"),
    ("_up_kernel", "tl.load(biases + F,", "tl.load(biases,"),
    ("_up_kernel", "E - 1) * n_tiles", "E - 1) * n_tiles - 1"),
    ("_dact_kernel", "dgate_MN = da_MN * w_M1", "dgate_MN = da_MN"),
    ("_dact_kernel", "(a_MN * w_M1)", "a_MN"),
    ("_dact_kernel", "dgate_MN *= up", "pass"),
    ("_dact_kernel", "(dgate_MN * slope_MN)", "dgate_MN"),
    ("_dact_kernel", "tl.where(exists, da_MN * a_MN, 0.0)", "tl.where(exists, da_MN * a_MN, 0.0).to(tl.bfloat16).to(tl.float32)"),
    ("_dact_kernel", "rows * n_tiles + n_tile", "rows * n_tiles"),
    ("_dact_kernel", "part_M += tl.sum", "_ = tl.sum"),
    ("_dact_kernel", "E - 1) * n_tiles", "E - 1) * n_tiles - 1"),
    ("_activation", "slope = s + value * (1 - s)", "slope = s"),
]


@pytest.mark.parametrize(("kernel", "old", "new"), MUTANTS)
def test_a_broken_kernel_fails(kernel: str, old: str, new: str) -> None:
    case = operation("swiglu", True)
    shape = dict(tokens=17, k=2, experts=3, d=24, f=72, first=0, unused=0)
    with mutated(getattr(module, kernel), old, new), pytest.raises(AssertionError, match="mutant"):
        check_case(case, shape, torch.float32, 1.0, 0, "cpu", "mutant")


def test_launches_of_a_layer() -> None:
    """Three products forward, and five backward, of which the combining ones are counted apart; and the schedule, once each way."""
    values = inputs(SHAPES[0], torch.float32, 1.0, torch.Generator().manual_seed(0), "swiglu", True)
    values["x"].requires_grad_()
    with launches() as forward:
        y = run(**values)
    assert forward == ["_schedule_kernel", "_up_kernel", "_varlen_m_kernel"]
    with launches() as backward:
        y.sum().backward()
    assert backward == ["_schedule_kernel", "_dact_kernel", "_varlen_k_kernel", "_varlen_k_kernel", "_varlen_m_kernel"]


def test_column_chunks_give_the_same() -> None:
    values = inputs(SHAPES[2], torch.float32, 1.0, torch.Generator().manual_seed(0), "swiglu", True)
    leaves = [values[name].requires_grad_() for name in ("x", "weights", "w_up", "w_down", "b_up", "b_down")]
    whole, parts = run(**values), run(**values, chunk=16)
    upstream = torch.randn_like(whole)
    assert whole.equal(parts)
    for one, two in zip(
        torch.autograd.grad(whole, leaves, upstream), torch.autograd.grad(parts, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_kept(dtype: torch.dtype) -> None:
    """The input, h, two int64 indices and an fp32 weight a row, and the experts' counts."""
    s = SHAPES[0]
    values = inputs(s, dtype, 1.0, torch.Generator().manual_seed(0), "swiglu", False)
    weights = [values[name].requires_grad_() for name in ("w_up", "w_down")]
    values["x"].requires_grad_()
    rows = s["tokens"] * s["k"]
    tensors = (s["tokens"] * s["d"] + rows * 2 * s["f"]) * dtype.itemsize
    assert saved_bytes(lambda: run(**values), weights) == tensors + rows * (8 + 8 + 4) + 8 * s["experts"]


def test_under_fake_tensors_and_compile() -> None:
    """One operation each way, whose shapes are known without running it; the compiler sees no graph break."""
    values = inputs(SHAPES[0], torch.float32, 1.0, torch.Generator().manual_seed(0), "relu2", True)
    leaves = [values[name].requires_grad_() for name in ("x", "weights", "w_up", "w_down", "b_up", "b_down")]
    want = run(**values)
    want_grads = torch.autograd.grad(want.square().sum(), leaves)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    got = compiled(**values)
    grads = torch.autograd.grad(got.square().sum(), leaves)
    assert got.equal(want) and all(a.equal(b) for a, b in zip(grads, want_grads, strict=True))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        fake = run(**fakes)
        fake_grads = torch.autograd.grad(fake.sum(), [fakes[n] for n in ("x", "weights", "w_up", "w_down", "b_up", "b_down")])
    assert fake.shape == want.shape and [g.shape for g in fake_grads] == [g.shape for g in want_grads]


def test_the_host_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operation does between launches, on tensors without values: reading one raises."""
    for kernel in ("_up_kernel", "_dact_kernel"):
        monkeypatch.setattr(module, kernel, Unlaunched())
    for kernel in ("_schedule_kernel", "_varlen_m_kernel", "_varlen_k_kernel"):
        monkeypatch.setattr(f"moesaic.kernels.grouped_gemm.{kernel}", Unlaunched())
    monkeypatch.setattr("moesaic.kernels.grouped_gemm.target_name", lambda device: "gfx942")  # no descriptor of no memory
    values = inputs(SHAPES[2], torch.float32, 1.0, torch.Generator().manual_seed(0), "swiglu", True)
    rows = values["rows"]
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        index = [mode.from_tensor(t) for t in (rows.source_R, rows.bag, rows.starts, rows.counts_E)]
        x, weights, w_up, w_down, b_up, b_down = (fake[n] for n in ("x", "weights", "w_up", "w_down", "b_up", "b_down"))
        y, h = module._forward(x, weights, w_up, w_down, b_up, b_down, *index, "swiglu", 16)
        grads = module._backward(y, x, h, weights, w_up, w_down, b_down, *index, "swiglu", 16)
        assert [g.shape for g in grads] == [t.shape for t in (x, weights, w_up, w_down, b_up, b_down)]
        with pytest.raises(Exception, match="_local_scalar_dense"):  # so a wait would be seen
            index[-1].tolist()


class Unlaunched:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None
