"""Layers of low precision by kernels, against their emulation: equal where the casts are and sums are short, else within a bound.

The kernels' casts are those of the emulation, bit by bit; their sums are in another order. So what is left is fp32's rounding,
and where a recipe rounds a quantized tensor again or draws by a row that holds no token, other draws.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.kernels import scaled_experts, tiles
from moesaic.kernels.grouped_gemm import schedule
from moesaic.kernels.hadamard import SIZES, hadamard
from moesaic.kernels.interpret import INTERPRET
from moesaic.kernels.permute import Rows, sort_slots
from moesaic.kernels.quantize import Format, pack, quantize, quantize_each
from moesaic.kernels.quantize_triton import TILE
from moesaic.kernels.scaled_experts import expert_sums, fits, scaled_dact, scaled_up
from moesaic.kernels.testing import filled, launches, mutated
from moesaic.moe.config import ACTIVATIONS, ModelConfig, RouterConfig
from moesaic.moe.experts import Experts, activate, activate_backward
from moesaic.moe.low import LowExperts, LowLinear, Weight, low_linear
from moesaic.moe.native import NativeLinear
from moesaic.moe.precision import Precision, unit_formats, why_not_native
from tests.moe.test_low import CPU, gaussian, model_of, ragged, recipe, run_experts, snr

pytestmark = pytest.mark.skipif(not INTERPRET, reason="the emulation is compared on a CPU")
NATIVE = "fp8_block mxfp8 nvfp4 quartet quartet2 mxfp4_deosc".split()


def precision_of(name: str, backend: str, *knobs: str) -> Precision:
    return Precision(recipe(name, "precision.high_last=0", *knobs), backend=backend)


def experts_of(d: int, f: int, activation: str = "swiglu", bias: bool = False) -> Experts:
    c = ModelConfig(d_model=d, n_heads=2, n_experts=3, d_expert=f, activation=activation, expert_bias=bias,
                    router=RouterConfig(top_k=2))  # fmt: skip
    experts = Experts(c)
    for i, p in enumerate(experts.parameters()):
        p.data = gaussian(*p.shape, seed=i) * 0.2
    return experts


def both(
    name: str, experts: Experts, tokens: int, rows: Rows, *knobs: str
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """(by kernels, emulated: [y, dx, dweights, gradients of parameters]; kernels that ran)."""
    d = experts.w_up_EGD.shape[2]
    x, dy = gaussian(tokens, d), gaussian(tokens, d, seed=9)
    weights = torch.rand(300, generator=torch.Generator().manual_seed(5))[: rows.source_R.numel()].clone()
    found, kernels = [], []
    for backend in ("triton", "torch"):
        experts.low = LowExperts(precision_of(name, backend, *knobs), "e", 3)
        with launches() as ran:
            found.append(run_experts(experts, x, weights, rows, dy))
        kernels = list(ran) if backend == "triton" else kernels
        assert backend == "triton" or not ran
    return found[0], found[1], kernels


# Decibels of [y, dx, dweights, dw_up, dw_down]: 120 is fp32's rounding. Where wgrad is rotated, whose sums are in another order,
# a last bit decides about a code, or a scale.
EXACT = (120, 120, 120, 120, 120)
BOUNDS = {"fp8_block": EXACT, "mxfp8": EXACT, "nvfp4": (120, 120, 120, 20, 20), "quartet": (120, 120, 120, 15, 15),
          "quartet2": (120, 25, 25, 15, 15), "mxfp4_deosc": (120, 120, 120, 20, 20)}  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
def test_experts_are_the_emulation(name: str) -> None:
    """Ragged experts, one without rows, of widths that are no multiple of a block."""
    ours, emulated, kernels = both(name, experts_of(40, 24), 70, ragged(70, 3, 2))
    for one, other, least in zip(ours, emulated, BOUNDS[name], strict=True):
        assert snr(one, other) > least, (name, snr(one, other))
    assert ours[3][1].eq(0).all() and ours[4][1].eq(0).all()  # the expert without rows
    assert sum("varlen_k" in k for k in kernels) == 2


@pytest.mark.parametrize("name", ["fp8_block", "nvfp4", "quartet2"])
def test_rows_of_nobody(name: str) -> None:
    """Padding behind the rows of experts, in memory that holds NaN where nobody wrote, reaches no result."""
    tokens, used = 20, 33
    expert_S = torch.randint(0, 3, (2 * tokens,), generator=torch.Generator().manual_seed(1))
    expert_S[torch.randperm(2 * tokens, generator=torch.Generator().manual_seed(2))[used:]] = (
        3  # these slots are dropped
    )
    counts = expert_S.bincount(minlength=4)[:3]
    rows = sort_slots(torch.arange(tokens).repeat_interleave(2), expert_S, counts, tokens, 0)
    assert rows.source_R.numel() == used
    more = torch.arange(used, used + 7)
    padded = Rows(*(torch.cat((t, v)) for t, v in ((rows.source_R, more * 0), (rows.slot_R, more * 0),
                  (rows.expert_R, more * 0 + 3), (rows.bag, more))), rows.starts, counts)  # fmt: skip
    experts = experts_of(40, 24)
    with filled(float("nan"), 0x7F):
        ours, _, _ = both(name, experts, tokens, padded)
    _, emulated, _ = both(name, experts, tokens, rows)
    assert ours[2][used:].eq(0).all()
    ours[2] = ours[2][:used]
    for i, (one, other) in enumerate(zip(ours, emulated, strict=True)):
        other = other[:used] if i == 2 else other
        assert snr(one, other) > BOUNDS[name][i], (i, snr(one, other))


def test_fp8_of_whole_blocks() -> None:
    """Where `up` writes codes and scales: a launch more for a is not there. In chunks of columns, biased."""
    experts, rows = experts_of(256, 128, "swiglu", True), ragged(40, 3, 2)
    whole = both("fp8_block", experts, 40, rows)
    for one, other in zip(*whole[:2], strict=True):
        assert snr(one, other) > 100
    assert any("scaled_up" in k for k in whole[2])
    experts.chunk_mib = 0
    for one, other in zip(both("fp8_block", experts, 40, rows)[0], whole[0], strict=True):
        assert snr(one, other) > 120


@pytest.mark.parametrize("activation", [kind for kind in ACTIVATIONS if kind != "swiglu"])
def test_activations_with_biases(activation: str) -> None:
    ours, emulated, _ = both("mxfp8", experts_of(40, 40, activation, True), 30, ragged(30, 3, 2))
    for one, other in zip(ours, emulated, strict=True):
        assert snr(one, other) > 60  # a last bit of an activation moves a code, seldom


def test_linear_layers_are_the_emulation() -> None:
    """A product of one group; inputs that two layers read are cast once."""
    x, w, dy = gaussian(2, 35, 72), gaussian(50, 72, seed=1) * 0.1, gaussian(2, 35, 50, seed=2)
    for name in NATIVE:
        found: list[list[Tensor]] = []
        for function, backend in ((NativeLinear, "triton"), (LowLinear, "torch")):
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
            y: Any = function.apply(a, b, Weight(precision_of(name, backend), "w"), torch.arange(70))
            y.backward(dy)
            assert a.grad is not None and b.grad is not None
            found.append([y.detach(), a.grad, b.grad])
        y_, dx, dw = (snr(one, other) for one, other in zip(*found, strict=True))
        bound = BOUNDS[name]
        assert y_ > bound[0] and dx > bound[1] and dw > bound[3], (name, y_, dx, dw)
    precision = precision_of("fp8_block", "triton")
    layers = [torch.nn.Linear(72, 8, bias=False) for _ in range(2)]
    with launches() as ran:
        for i, layer in enumerate(layers):
            low_linear(layer, Weight(precision, str(i)), x)
    # The first: a schedule, x, its weights, the product. The second reads the same cast.
    assert [k.strip("_").removesuffix("_kernel") for k in ran] == [
        "schedule", "quantize", "squares", "scaled_varlen_m", "schedule", "squares", "scaled_varlen_m",
    ]  # fmt: skip


def test_casts_again_with_their_factor() -> None:
    """Of rule shrink what a code counts is in the factor of the first cast too."""
    ours, emulated, _ = both("fp8_block", experts_of(40, 24), 70, ragged(70, 3, 2), "precision.fprop.x.rule=shrink")
    assert all(snr(one, other) > 120 for one, other in zip(ours, emulated, strict=True))


def of_operand(operand: str, **values: str) -> list[str]:
    return [f"precision.{operand}.{key}={value}" for key, value in values.items()]


ROW = {"element": "e2m1", "block": "1x16", "scale": "e4m3", "rule": "amax"}


@pytest.mark.parametrize(("name", "knobs"), [
    ("nvfp4", of_operand("fprop.w", rule="four_six")),  # in squares
    ("nvfp4", [*of_operand("fprop.w", **ROW), *of_operand("dgrad.w", **ROW, source="high")]),  # each expert's factor
    ("nvfp4", of_operand("dgrad.w", **ROW)),  # squares again, in rows
    ("mxfp8", of_operand("wgrad.x", source="fprop")),
    ("quartet", of_operand("fprop", rotation="0")),
    # One operand's flags, as wide as its rotated cast, beside the operand as it was.
    ("quartet", [*of_operand("fprop.w", rule="rceil"), *of_operand("wgrad.x", source="high")]),
    ("quartet", [*of_operand("fprop.x", rule="rceil"), *of_operand("dgrad.w", source="high")]),
    # Cast by the emulation's functions.
    ("quartet", [*of_operand("fprop", rotation="0"), *of_operand("fprop.w", block="32x32")]),
    ("mxfp4_deosc", of_operand("dgrad.w", element="e2m1", block="32x32", source="high")),
])  # fmt: skip
def test_other_recipes(name: str, knobs: list[str]) -> None:
    ours, emulated, _ = both(name, experts_of(44, 20), 70, ragged(70, 3, 2), *knobs)
    for one, other, least in zip(ours, emulated, BOUNDS[name], strict=True):
        assert snr(one, other) > least, snr(one, other)


@pytest.mark.parametrize(("name", "knobs"), [("quartet2", []), ("quartet", of_operand("fprop", rotation="0"))])
def test_keeps_what_the_emulation_keeps(name: str, knobs: list[str]) -> None:
    """Bit by bit: codes, scales, factors, and what was not clipped, of widths that fill no byte."""
    found = []
    for function, backend in ((NativeLinear, "triton"), (LowLinear, "torch")):
        x, w, seen = gaussian(70, 44).requires_grad_(), gaussian(50, 44, seed=1).requires_grad_(), []
        weight = Weight(precision_of(name, backend, *knobs), "w")
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: (seen.append(t), t)[1], lambda t: t):
            function.apply(x, w, weight, torch.arange(70))  # type: ignore[no-untyped-call]
        found.append(seen)
    assert len(found[0]) == (8 if name == "quartet" else 6)
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype and one.nbytes == other.nbytes
        assert torch.equal(one.float().flatten(), other.float().flatten())


def test_linear_layers_of_strided_tensors() -> None:
    """A transposed input, and the expanded gradient that a sum has."""
    found = []
    for function, backend in ((NativeLinear, "triton"), (LowLinear, "torch")):
        a, b = gaussian(72, 9).requires_grad_(), gaussian(50, 72, seed=1).requires_grad_()
        function.apply(a.T, b, Weight(precision_of("mxfp8", backend), "w"), torch.arange(9)).sum().backward()  # type: ignore[no-untyped-call]
        assert a.grad is not None and b.grad is not None
        found.append((a.grad, b.grad))
    assert all(snr(one, other) > 120 for one, other in zip(*found, strict=True))


def test_in_bf16_and_what_is_kept() -> None:
    """h and dh are of the compute type. Of fp8_block codes and scales are kept, and of 16 bits h alone."""
    experts, rows = experts_of(256, 128), ragged(20, 3, 2)
    experts.low = LowExperts(precision_of("fp8_block", "triton"), "e", 3)
    x, weights, dy = gaussian(20, 256).bfloat16(), torch.rand(40), gaussian(20, 256, seed=9).bfloat16()
    ours = run_experts(experts, x, weights, rows, dy)
    experts.low = LowExperts(precision_of("fp8_block", "torch"), "e", 3)
    for one, other in zip(ours, run_experts(experts, x, weights, rows, dy), strict=True):
        assert one.dtype == other.dtype and snr(one.float(), other.float()) > 30
    experts.low = LowExperts(precision_of("fp8_block", "triton"), "e", 3)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        experts(x, weights, rows)
    sizes = [t.nbytes for t in kept.values() if t.dtype is torch.bfloat16]
    assert sizes == [40 * 256 * 2]  # h
    codes = sum(t.nbytes for t in kept.values() if t.dtype is torch.float8_e4m3fn)
    assert codes == 20 * 256 + 40 * 128 + experts.w_up_EGD.numel() + experts.w_down_EDF.numel()


class Unlaunched:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


class NoCopies(TorchDispatchMode):
    """Of a tensor on the host to the device, for which CUDA has the host wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            assert not (out.is_meta and any(isinstance(t, Tensor) and t.is_cpu for t in args)), (func, args)
        return out


@pytest.mark.parametrize("name", NATIVE)
def test_the_host_does_not_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens between launches, on tensors without values: reading one raises. Shapes and types are those of a run."""
    kernels = {
        "scaled_gemm": "_scaled_varlen_m_kernel _scaled_varlen_k_kernel", "quantize_triton": "_quantize_kernel _squares_kernel",
        "scaled_experts": "_scaled_up_kernel _scaled_dact_kernel _sums_kernel", "grouped_gemm": "_schedule_kernel",
        "combine": "_combine_kernel",
    }  # fmt: skip
    for file, names in kernels.items():
        for kernel in names.split():
            monkeypatch.setattr(f"moesaic.kernels.{file}.{kernel}", Unlaunched())
    monkeypatch.setattr(Weight, "cast", None)  # of the emulation: no shipped recipe needs it
    experts, rows = experts_of(256, 128, "swiglu", True).to("meta"), ragged(30, 3, 2)
    rows = Rows(*(None if t is None else t.to("meta") for t in vars(rows).values()))
    x, weights = (torch.empty(*shape, device="meta", requires_grad=True) for shape in ((30, 256), (60,)))
    for size in SIZES:
        hadamard(size, x.device)  # once a run
    with tiles.meta_is("sm_100a"), NoCopies():
        experts.low = LowExperts(precision_of(name, "triton"), "e", 3)
        y = experts(x.bfloat16(), weights, rows)
        y.backward(torch.empty_like(y))
    assert y.shape == x.shape and y.dtype is torch.bfloat16
    for tensor in (x, weights, *experts.parameters()):
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape
    with pytest.raises(RuntimeError):  # so a wait would be seen
        rows.counts_E.tolist()


# ---------------------------------------------------------------- epilogues by themselves


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "mxfp4"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_epilogues(name: str, activation: str) -> None:
    """`up` writes what the cast of act(h) is, of its own h; `dact` what follows from h as it is given."""
    torch.manual_seed(0)
    group, f, d, pair = (
        128 if name == "fp8" else 32,
        128 if name == "fp8" else 71 if name == "mxfp4" else 72,
        60,
        activation == "swiglu",
    )
    element, scale = ("e2m1" if name == "mxfp4" else "e4m3"), "pow2" if name == "fp8" else "e8m0"
    form = Format(element, (1, group), scale, "rceil")
    square = Format(element, (128, 128) if name == "fp8" else (1, 32), scale, "rceil")
    counts, source = torch.tensor([20, 0, 7]), torch.randint(0, 9, (27,))
    plan, g = schedule(counts, TILE), 2 * f if pair else f
    x, w = pack(quantize(torch.randn(9, d), form)), pack(quantize_each(torch.randn(3, g, d) * 0.3, square))
    assert fits(form, f, activation)
    h, a = scaled_up(x, source, w, None, counts, plan, form, activation, torch.float32)
    values = x.unpack().dequantize()[source]
    want = torch.cat([r @ v.T for r, v in zip(values.split(counts.tolist()), w.unpack().dequantize(), strict=True)])
    torch.testing.assert_close(h, want, rtol=1e-5, atol=1e-5)
    cast = quantize(activate(activation, h), form)
    assert snr(a.unpack().dequantize(), cast.dequantize()) > 60 and a.codes.shape == pack(cast).codes.shape

    dy, weights = pack(quantize(torch.randn(9, d), form)), torch.rand(27)
    w = pack(quantize_each(torch.randn(3, f, d), square))
    dh, again, parts = scaled_dact(dy, source, w, h, weights, plan, activation, "a")
    none = scaled_dact(dy, source, w, h, weights, plan, activation, "")
    assert none[1] is None and torch.equal(none[0], dh)
    values = dy.unpack().dequantize()[source]
    da = torch.cat([r @ v.T for r, v in zip(values.split(counts.tolist()), w.unpack().dequantize(), strict=True)])
    gate = torch.empty_like(da)
    expected = activate(activation, h, gate)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.sum(dim=1), (da * expected).sum(dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dh, activate_backward(activation, da * weights[:, None], h, gate), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expert_sums(dh, plan, None, weights)[0], (dh * weights[:, None])[:20].sum(dim=0))


BROKEN = [
    ("_scaled_up_kernel", "F + f, column", "f, column"),
    ("_scaled_up_kernel", "rows, real, f, AC", "rows, real, 0, AC"),
    ("_scaled_dact_kernel", "da_MN *= tl.load(factor_E + expert)", "da_MN *= 2"),
    ("_sums_kernel", "rows = start + r", "rows = r + 1"),
]


@pytest.mark.parametrize("mutant", BROKEN, ids=lambda mutant: mutant[1])
def test_notices(mutant: tuple[str, str, str]) -> None:
    kernel, old, new = mutant
    with mutated(getattr(scaled_experts, kernel), old, new), pytest.raises(AssertionError):
        test_epilogues("mxfp8", "swiglu")


# ---------------------------------------------------------------- who decides


def test_where_products_are_native() -> None:
    """triton: or refused, in one line. auto: on GPUs that have the products; else emulated."""
    device = torch.device("meta")
    for name, formats, targets in (
        ("fp8_block", ["fp8"], "sm_90a sm_100a gfx942 gfx950"),
        ("mxfp8", ["mxfp8"], "sm_90a sm_100a gfx950"),
        ("nvfp4", ["nvfp4"], "sm_100a"),
        ("quartet", ["mxfp4"], "sm_90a sm_100a gfx950"),
        ("quartet2", ["nvfp4"], "sm_100a"),
        ("mxfp4_deosc", ["mxfp4"], "sm_90a sm_100a gfx950"),
    ):
        config = recipe(name, "precision.high_last=0")
        assert unit_formats(config) == formats
        for target in ("sm_90a", "sm_100a", "gfx942", "gfx950"):
            with tiles.meta_is(target):
                why = why_not_native(config, device)
                assert (why is None) == (target in targets.split()), (name, target)
                if why:
                    with pytest.raises(
                        ValueError, match=f"^model.experts_backend=triton: precision={name}: {target} has no"
                    ):
                        Precision(config, backend="triton").native(device)
                else:
                    assert Precision(config, backend="triton").native(device)
                assert not Precision(config, backend="torch").native(device)
    assert Precision(recipe("mxfp8"), backend="auto").told(CPU) == "emulated"
    assert Precision(recipe("mxfp8"), backend="triton").told(CPU) == "by kernels, interpreted"


@pytest.mark.parametrize(
    ("name", "knobs", "told"),
    [
        ("mxint8", [], "precision.fprop.x.element=int8, block=1x32, scale=e8m0: no matrix unit multiplies it"),
        ("mxfp8", ["precision.wgrad.x.element=null"], "precision.wgrad.x.element=null: no matrix unit multiplies it with"),
        ("mxfp8", ["precision.dgrad.dy.element=e5m2"], "precision.dgrad.dy.element=e5m2, block=1x32"),
        ("mxfp8", ["precision.dgrad.dy.element=e2m1"], "precision.dgrad: dy times w is mxfp4 times mxfp8, which no matrix"),
        ("mxfp8", ["precision.fprop.x.block=32x32"], "precision.fprop.x.block=32x32: matrix units take 1x32"),
        ("fp8_block", ["precision.fprop.w.block=1x128", "precision.dgrad.w.element=e4m3", "precision.dgrad.w.block=1x128",
                       "precision.dgrad.w.scale=pow2"], "precision.fprop.w.block=1x128: matrix units take 128x128"),
    ],
)  # fmt: skip
def test_refused(name: str, knobs: list[str], told: str) -> None:
    with pytest.raises(ValueError) as error:
        model_of(name, "model.experts_backend=triton", *knobs)
    assert str(error.value).startswith("model.experts_backend=triton: " + told)
    assert str(error.value).endswith("; auto and torch emulate it")
    model_of(name, "model.experts_backend=auto", *knobs)
