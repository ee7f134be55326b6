"""Routed experts in Triton: outputs and every gradient, launches, bytes kept, and kernels broken on purpose."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.kernels import experts as module
from moesaic.kernels.experts import ACTIVATIONS, experts, experts_reference
from moesaic.kernels.interpret import INTERPRET
from moesaic.kernels.permute import Rows, sort_slots
from moesaic.kernels.testing import Operation, check, check_case, launches, mutated, saved_bytes

DEVICE = "cpu" if INTERPRET else "cuda"
# Where values are 1e3, the slope at a gate depends on what little of it is left: fp32 gives 1e-6 at 1, and 3e-5 there.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Tokens, slots a token, experts, width, expert width; `first`: experts below it get no rows; `unused`: one slot of so many isn't
# used. The third: all tokens visit all experts, but for those. The fourth: one expert with everything.
SHAPES = (
    dict(tokens=37, k=2, experts=5, d=40, f=24, first=0, unused=0),
    dict(tokens=1, k=1, experts=1, d=17, f=9, first=0, unused=0),
    dict(tokens=21, k=4, experts=4, d=48, f=33, first=0, unused=3),
    dict(tokens=40, k=1, experts=6, d=20, f=72, first=5, unused=0),
)
SMALL = dict(tokens=19, k=2, experts=3, d=24, f=17, first=1, unused=0)

LEAVES = ("x", "weights", "w_up", "w_down", "b_up", "b_down")


def rows_of(s: Mapping[str, int], generator: torch.Generator) -> Rows:
    noise = torch.rand(s["tokens"], s["experts"], generator=generator)
    noise[:, : s["first"]] = -1
    chosen = noise.topk(s["k"], dim=1).indices.flatten()
    token_S = torch.arange(s["tokens"]).repeat_interleave(s["k"])
    if s["unused"]:
        chosen[:: s["unused"]] = s["experts"]
    counts = torch.bincount(chosen, minlength=s["experts"] + 1)[: s["experts"]].clone()
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


def on_device(values: dict[str, Any]) -> dict[str, Any]:
    return {name: v.to(DEVICE) if isinstance(v, Tensor) else v for name, v in values.items()}


def operation(activation: str, bias: bool, shapes: tuple[Mapping[str, int], ...] = SHAPES) -> Operation:
    return Operation(
        f"experts {activation}{' with biases' * bias}", run, exact,
        lambda s, dtype, scale, generator: inputs(s, dtype, scale, generator, activation, bias), shapes, TOLERANCE,
        ("x", "weights", "w_up", "w_down", *(("b_up", "b_down") if bias else ())),
    )  # fmt: skip


OPERATIONS = [
    operation("swiglu", False),
    operation("swiglu", True, SHAPES[2:3]),
    operation("geglu", True, (SMALL,)),
    operation("reglu", True, (SMALL,)),
    operation("relu2", True, (SMALL,)),
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_against_reference(operation: Operation) -> None:
    check(operation, DEVICE, every=DEVICE != "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_shapes_and_activations_on_a_gpu(activation: str, bias: bool) -> None:
    check(operation(activation, bias), "cuda", every=True)


MUTANTS = [
    ("_up_kernel", "expert, f, F + f, G", "expert, f, f, G"),  # the gate twice
    ("store_activated", "tl.store(places + F, up, mask=exists)", "pass"),  # what was in memory
    ("store_activated", "a_MN *= up.to(tl.float32)", "pass"),
    ("_up_kernel", "tl.load(biases + F,", "tl.load(biases,"),
    ("_up_kernel", "E - 1) * n_tiles", "E - 1) * n_tiles - 1"),
    ("_dact_columns", "dgate_MN = da_MN * w_M1", "dgate_MN = da_MN"),
    ("_dact_columns", "a_MN * w_M1 if", "a_MN if"),
    ("_dact_columns", "dgate_MN *= up.to(tl.float32)", "pass"),
    ("_dact_columns", "(dgate_MN * slope_MN)", "dgate_MN"),
    ("_dact_columns", "tl.sum(da_MN * a_MN,", "tl.sum((da_MN * a_MN).to(tl.bfloat16).to(tl.float32),"),
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
        check_case(case, shape, torch.float32, 1.0, 0, DEVICE, "mutant")


@settings(max_examples=6)
@given(
    tokens=st.integers(0, 40), k=st.integers(1, 3), experts=st.integers(3, 6), d=st.integers(1, 70), f=st.integers(1, 70),
    activation=st.sampled_from(ACTIVATIONS), bias=st.booleans(), dtype=st.sampled_from(list(TOLERANCE)),
    unused=st.sampled_from([0, 2]),
)  # fmt: skip
def test_any_shape(
    tokens: int, k: int, experts: int, d: int, f: int, activation: str, bias: bool, dtype: torch.dtype, unused: int
) -> None:
    shape = dict(tokens=tokens, k=k, experts=experts, d=d, f=f, first=0, unused=unused)
    check_case(operation(activation, bias), shape, dtype, 1.0, 0, DEVICE, str(shape))


def test_launches_of_a_layer() -> None:
    """Three forward and five backward, and a schedule each way."""
    values = on_device(inputs(SHAPES[0], torch.float32, 1.0, torch.Generator().manual_seed(0), "swiglu", True))
    values["x"].requires_grad_()
    with launches() as forward:
        y = run(**values)
    assert forward == ["_schedule_kernel", "_up_kernel", "_varlen_m_kernel", "_combine_kernel"]
    with launches() as backward:
        y.sum().backward()
    products = ["_dact_kernel", "_varlen_k_kernel", "_varlen_k_kernel", "_varlen_m_kernel"]
    assert backward == ["_schedule_kernel", *products, "_combine_kernel"]


def test_column_chunks_give_the_same() -> None:
    values = on_device(inputs(SHAPES[2], torch.float32, 1.0, torch.Generator().manual_seed(0), "swiglu", True))
    leaves = [values[name].requires_grad_() for name in LEAVES]
    whole, parts = run(**values), run(**values, chunk=16)
    upstream = torch.randn_like(whole)
    torch.testing.assert_close(parts, whole)
    got, want = (torch.autograd.grad(out, leaves, upstream) for out in (parts, whole))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_kept(dtype: torch.dtype) -> None:
    """The input, h, two int64 indices and an fp32 weight a row, and the experts' counts."""
    s = SHAPES[0]
    values = on_device(inputs(s, dtype, 1.0, torch.Generator().manual_seed(0), "swiglu", False))
    weights = [values[name].requires_grad_() for name in ("w_up", "w_down")]
    values["x"].requires_grad_()
    rows = s["tokens"] * s["k"]
    tensors = (s["tokens"] * s["d"] + rows * 2 * s["f"]) * dtype.itemsize
    assert saved_bytes(lambda: run(**values), weights) == tensors + rows * (8 + 8 + 4) + 8 * s["experts"]


def test_under_fake_tensors_and_compile() -> None:
    """One operation each way, whose shapes are known without running it; the compiler sees no graph break."""
    values = on_device(inputs(SHAPES[0], torch.float32, 1.0, torch.Generator().manual_seed(0), "relu2", True))
    leaves = [values[name].requires_grad_() for name in LEAVES]
    want = run(**values)
    want_grads = torch.autograd.grad(want.square().sum(), leaves)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    got = compiled(**values)
    grads = torch.autograd.grad(got.square().sum(), leaves)
    assert got.equal(want) and all(a.equal(b) for a, b in zip(grads, want_grads, strict=True))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        fake = run(**fakes)
        fake_grads = torch.autograd.grad(fake.sum(), [fakes[n] for n in LEAVES])
    assert fake.shape == want.shape and [g.shape for g in fake_grads] == [g.shape for g in want_grads]


def test_the_host_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operation does between launches, on tensors without values: reading one raises."""
    for kernel in ("_up_kernel", "_dact_kernel"):
        monkeypatch.setattr(module, kernel, Unlaunched())
    for kernel in ("_schedule_kernel", "_varlen_m_kernel", "_varlen_k_kernel"):
        monkeypatch.setattr(f"moesaic.kernels.grouped_gemm.{kernel}", Unlaunched())
    monkeypatch.setattr("moesaic.kernels.combine._combine_kernel", Unlaunched())
    # There are no descriptors of tensors without memory.
    monkeypatch.setattr("moesaic.kernels.grouped_gemm.target_name", lambda device: "gfx942")
    values = on_device(inputs(SHAPES[2], torch.float32, 1.0, torch.Generator().manual_seed(0), "swiglu", True))
    rows = values["rows"]
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in values.items()}
        index = [mode.from_tensor(t) for t in (rows.source_R, rows.bag, rows.starts, rows.counts_E)]
        x, weights, w_up, w_down, b_up, b_down = (fake[n] for n in LEAVES)
        y, h = module._forward(x, weights, w_up, w_down, b_up, b_down, *index, "swiglu", 16)
        grads = module._backward(y, x, h, weights, w_up, w_down, b_down, *index, "swiglu", 16)
        assert [g.shape for g in grads] == [t.shape for t in (x, weights, w_up, w_down, b_up, b_down)]
        with pytest.raises(Exception, match="_local_scalar_dense"):  # so a wait would be seen
            index[-1].tolist()


class Unlaunched:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None
