"""Layers of low precision: against plain layers, against a reference in ml_dtypes, and what each recipe costs a product."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.kernels.hadamard import rotate
from moesaic.kernels.permute import Rows, sort_slots
from moesaic.kernels.quantize import pack_bits, quantize, unpack_bits
from moesaic.launch import cli
from moesaic.moe import low as low_module
from moesaic.moe.config import ACTIVATIONS, ModelConfig, RouterConfig
from moesaic.moe.experts import Experts
from moesaic.moe.low import LowExperts, LowLinear, Weight, grouped, lower, weight_gradient
from moesaic.moe.model import build
from moesaic.moe.precision import PRODUCTS, Precision, PrecisionConfig, operands, without_effect

ROOT = Path(__file__).resolve().parents[2]
RECIPES = "fp8_block mxfp8 mxint8 nvfp4 quartet quartet2 mxfp4_deosc".split()
CPU = torch.device("cpu")


def recipe(name: str, *knobs: str) -> PrecisionConfig:
    return cli.compose(["recipe=tiny_moe", f"precision={name}", *knobs]).precision


def snr(x: Tensor, reference: Tensor) -> float:
    return -10 * math.log10(
        ((x - reference).double().square().sum() / reference.double().square().sum()).item() + 1e-30
    )


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(precision: Precision, x: Tensor, w: Tensor, dy: Tensor, name: str = "w") -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dW)"""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = LowLinear.apply(x, w, Weight(precision, name), torch.arange(x.shape[:-1].numel()))
    y.backward(dy)
    assert x.grad is not None and w.grad is not None
    return y.detach(), x.grad, w.grad


# ---------------------------------------------------------------- linear


def test_nothing_quantized_is_a_linear_layer() -> None:
    x, w, dy = gaussian(2, 5, 24), gaussian(7, 24, seed=1), gaussian(2, 5, 7, seed=2)
    y, dx, dw = linear(Precision(PrecisionConfig()), x, w, dy)
    torch.testing.assert_close(y, F.linear(x, w))
    torch.testing.assert_close(dx, dy @ w)
    torch.testing.assert_close(dw, dy.flatten(0, 1).T @ x.flatten(0, 1))


def mx(x: Tensor) -> np.ndarray:
    """MXFP8 of rows, by ml_dtypes, a block at a time."""
    out = np.zeros(x.shape, np.float64)
    for r, row in enumerate(x.numpy().astype(np.float64)):
        for k in range(0, len(row), 32):
            block = row[k : k + 32]
            scale = 2.0 ** np.ceil(np.log2(np.float32(np.abs(block).max()) / np.float32(448)))
            out[r, k : k + 32] = (block / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(
                float
            ) * scale
    return out


def test_mxfp8_is_the_products_of_ml_dtypes() -> None:
    x, w, dy = gaussian(45, 70), gaussian(50, 70, seed=1), gaussian(45, 50, seed=2) * 1e-4
    y, dx, dw = linear(Precision(recipe("mxfp8")), x, w, dy)
    for ours, left, right in ((y, x, w), (dx, dy, w.T), (dw, dy.T, x.T)):
        expected = torch.from_numpy(mx(left) @ mx(right).T)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_a_cast_that_backward_uses_as_it_is() -> None:
    """fp8_block: dx is of the same cast weight as y."""
    x, w = gaussian(40, 150), gaussian(140, 150, seed=1)
    precision = Precision(recipe("fp8_block"))
    wq = quantize(w, precision.products["fprop"].sides["w"].form).dequantize()
    dy = gaussian(40, 140, seed=2)
    _, dx, _ = linear(precision, x, w, dy)
    dyq = quantize(dy, precision.products["dgrad"].sides["dy"].form).dequantize()
    torch.testing.assert_close(dx, dyq @ wq, rtol=1e-5, atol=1e-4)


def test_quartet_gives_no_gradient_to_what_it_clips() -> None:
    x, w, dy = gaussian(64, 64), gaussian(96, 64, seed=1), gaussian(64, 96, seed=2)
    precision = Precision(recipe("quartet"))
    _, dx, dw = linear(precision, x, w, dy)
    form = precision.products["fprop"].sides["x"].form
    for tensor, gradient in ((x, dx), (w, dw)):
        trusted = quantize(rotate(tensor, 32), form).trusted_NK
        clipped = rotate(gradient, 32)[~trusted]
        assert clipped.numel() > 100 and clipped.abs().max() < 1e-5 * gradient.abs().max()
        assert (rotate(gradient, 32)[trusted].abs() > 1e-4).float().mean() > 0.9


# What a recipe leaves of a product, decibels, of Gaussian operands; wgrad adds up over 200 rows.
PRODUCT_SNR = {
    "fp8_block": (28.5, 28.5, 28.5), "mxfp8": (28.5, 28.5, 28.5), "mxint8": (39.4, 39.3, 39.4), "nvfp4": (16.7, 14.4, 15.0),
    "quartet": (14.7, 10.0, 10.2), "quartet2": (18.2, 15.7, 16.4), "mxfp4_deosc": (15.3, 13.6, 14.1),
}  # fmt: skip
# And of experts as a whole: y, dx, gradients of the router's weights, of w_up and of w_down.
EXPERT_SNR = {
    "fp8_block": (23.9, 23.6, 23.4, 23.5, 23.6), "mxfp8": (23.9, 23.6, 23.4, 23.5, 23.6),
    "mxint8": (34.0, 33.3, 34.3, 33.1, 33.3), "nvfp4": (13.4, 10.8, 11.7, 10.9, 11.5), "quartet": (9.3, 6.3, 8.0, 6.5, 8.1),
    "quartet2": (14.7, 12.4, 13.9, 12.7, 13.5), "mxfp4_deosc": (11.8, 8.8, 10.1, 10.2, 11.3),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_signal_to_noise_of_products(name: str) -> None:
    # 0.7: the least favourable deviation of quest would be 1
    x, w, dy = gaussian(200, 192) * 0.7, gaussian(160, 192, seed=1) * 0.02, gaussian(200, 160, seed=2) * 1e-5
    found = linear(Precision(recipe(name, "precision.high_last=0")), x, w, dy)
    exact = (x @ w.T, dy @ w, dy.T @ x)
    for product, ours, expected, decibels in zip(PRODUCTS, found, exact, PRODUCT_SNR[name], strict=True):
        assert snr(ours, expected) == pytest.approx(decibels, abs=0.5), product


@pytest.mark.parametrize("name", ["mxfp8", "quartet", "mxfp4_deosc"])
def test_rows_are_cast_alike_wherever_they_are(name: str) -> None:
    """Row-wise casts, chance included, depend on the row and its number alone; where a factor is of the tensor, on it too."""
    precision = Precision(recipe(name))
    precision.step = 3
    weight, order = Weight(precision, "w"), torch.randperm(50, generator=torch.Generator().manual_seed(0))[:30]
    x, ids = gaussian(50, 64), torch.arange(1000, 1050)
    for product, side in (("fprop", "x"), ("dgrad", "dy")):
        whole = weight.cast(product, side, x, ids).values
        assert torch.equal(weight.cast(product, side, x[order], ids[order]).values, whole[order])
    if precision.chance:
        assert not torch.equal(weight.cast("dgrad", "dy", x, ids + 1).values, whole)


STOCHASTIC = [
    f"precision.{operand}.{knob}" for operand in ("dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")
    for knob in ("element=e2m1", "rule=shrink", "rounding=stochastic")
]  # fmt: skip


def test_chance_is_of_the_seed_the_layer_the_operand_the_step_and_the_row() -> None:
    x, config = gaussian(64, 64), recipe("mxfp8", *STOCHASTIC)

    def drawn(
        seed: int = 0, name: str = "w", product: str = "dgrad", side: str = "dy", step: int = 3, first: int = 0
    ) -> Tensor:
        precision = Precision(config, seed)
        precision.step = step
        return Weight(precision, name).cast(product, side, x, torch.arange(first, first + 64)).values

    one = drawn()
    assert torch.equal(drawn(), one)
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"name": "v"},
        {"product": "wgrad"},
        {"side": "w"},
        {"step": 4},
        {"first": 1},
    ]
    for other in others:  # as often alike as two draws of such values are
        assert 0.5 < (drawn(**other) == one).float().mean() < 0.9, other


def test_a_token_is_rounded_anew_by_each_expert() -> None:
    """Two experts of the same weights, with the same rows: their gradients are alike but for chance."""
    for knobs, alike in (([], True), (STOCHASTIC, False)):
        experts = experts_of("swiglu")
        for p in experts.parameters():
            p.data = p.data[:1].expand(5, *p.shape[1:]).clone()
        chosen = torch.tensor([2, 4]).repeat(30)
        rows = sort_slots(torch.arange(30).repeat_interleave(2), chosen, chosen.bincount(minlength=5), 30, 2)
        experts.low = LowExperts(Precision(recipe("mxfp8", *knobs)), "e", 5)
        *_, dup, ddown = run_experts(experts, gaussian(30, 40), torch.ones(60), rows, gaussian(30, 40, seed=9))
        assert [torch.equal(d[2], d[4]) for d in (dup, ddown)] == [alike, alike]


@pytest.mark.parametrize("name", ["fp8_block", "mxfp8", "mxint8", "mxfp4_deosc"])
def test_an_experts_gradient_is_of_its_own_rows(name: str) -> None:
    """Beside rows a million times larger, which would share a scale with its own."""
    counts, ids = [33, 40], torch.arange(73)
    weight = Weight(Precision(recipe(name)), "e.up")
    x, dy = (
        gaussian(73, 64),
        gaussian(73, 32, seed=1) * torch.tensor([1.0, 1e-6]).repeat_interleave(torch.tensor(counts))[:, None],
    )
    found = weight_gradient(weight, dy, x, counts, ids, None, 64)
    alone = weight_gradient(weight, dy[33:], x[33:], counts[1:], ids[33:], None, 64)
    torch.testing.assert_close(found[1], alone[0], rtol=1e-5, atol=1e-12)


def test_a_tensor_is_cast_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a block's forward, no two casts are of the same tensor: the shared expert's input is the routed ones' too."""
    calls: list[tuple[int, ...]] = []

    def counted(x: Tensor, *rest: Any, **named: Any) -> Any:
        calls.append(tuple(x.shape))
        return quantize(x, *rest, **named)

    c = cli.compose(["recipe=tiny_moe", "precision=mxfp8", "model.n_layers=1", "model.d_shared=64"])
    model = build(c.model, 0, CPU)
    lower(model, c.precision)
    monkeypatch.setattr(low_module, "quantize", counted)
    monkeypatch.setattr(
        low_module,
        "quantize_each",
        lambda x, *rest, **named: (calls.append(tuple(x.shape)), quantize_each(x, *rest, **named))[1],
    )
    model(torch.arange(32)[None])
    d, f = c.model.d_model, c.model.d_expert
    rows = 32 * c.model.router.top_k
    assert sorted(calls) == sorted([
        (32, d), (3 * d, d), (32, d), (d, d),  # attention
        (32, d), (128, d), (32, 64), (d, 64),  # the shared expert; its input is the routed experts' too
        (8, 2 * f, d), (rows, f), (8, d, f),
    ])  # fmt: skip


quantize_each = low_module.quantize_each


def test_streams_share_no_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared expert computes on a stream of its own: what it has begun to cast, or to draw, no other may read."""
    precision, x = Precision(recipe("nvfp4")), gaussian(8, 64)
    weight = Weight(precision, "w")
    cast, signs = weight.cast("fprop", "x", x), weight.signs("wgrad", CPU)
    assert weight.cast("fprop", "x", x) is cast and weight.signs("wgrad", CPU) is signs and signs is not None
    monkeypatch.setattr(low_module, "stream_of", lambda device: "another")
    again, drawn = weight.cast("fprop", "x", x), weight.signs("wgrad", CPU)
    assert again is not cast and torch.equal(again.values, cast.values)
    assert drawn is not None and drawn is not signs and torch.equal(drawn, signs)


def test_inference_mode() -> None:
    """Where torch counts no versions of a tensor."""
    model, _ = model_of("fp8_block")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(tokens).logits
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, expected)


# ---------------------------------------------------------------- experts


def ragged(tokens: int, experts: int, k: int, seed: int = 0) -> Rows:
    """Expert 1 has no rows, others any number."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    scores[:, 1] = -1
    scores[:, 0] += 0.5
    chosen = scores.topk(k, dim=1).indices.flatten()
    return sort_slots(torch.arange(tokens).repeat_interleave(k), chosen, chosen.bincount(minlength=experts), tokens, k)


def experts_of(activation: str, bias: bool = False) -> Experts:
    c = ModelConfig(
        d_model=40,
        n_heads=2,
        n_experts=5,
        d_expert=24,
        activation=activation,
        expert_bias=bias,
        router=RouterConfig(top_k=2),
    )
    experts = Experts(c)
    for i, p in enumerate(experts.parameters()):
        p.data = gaussian(*p.shape, seed=i) * 0.2
    return experts


def run_experts(experts: Experts, x: Tensor, weights: Tensor, rows: Rows, dy: Tensor) -> list[Tensor]:
    """[y, dx, dweights, gradients of parameters]"""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    experts.zero_grad()
    y = experts(x, weights, rows)
    y.backward(dy)
    return [y.detach(), x.grad, weights.grad, *[p.grad.clone() for p in experts.parameters()]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_experts_without_a_format_are_the_specification(activation: str, bias: bool) -> None:
    experts, rows = experts_of(activation, bias), ragged(33, 5, 2)
    x, weights, dy = (
        gaussian(33, 40),
        torch.rand(66, generator=torch.Generator().manual_seed(5)),
        gaussian(33, 40, seed=9),
    )
    precision = Precision(PrecisionConfig())
    precision.high = False
    experts.low = LowExperts(precision, "e", 5)
    found = run_experts(experts, x, weights, rows, dy)
    experts.low = None
    experts.backend = "reference"
    for ours, expected in zip(found, run_experts(experts, x, weights, rows, dy), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", RECIPES)
def test_signal_to_noise_of_grouped_products(name: str) -> None:
    """Each product by itself, over experts with 0, 1 and no round number of rows, as far from fp64 as that of a linear layer."""
    counts = [70, 0, 1, 33, 96]
    expert_R, ids_R = torch.arange(5).repeat_interleave(torch.tensor(counts)), torch.arange(200)
    x, w, dy = gaussian(200, 192) * 0.7, gaussian(5, 160, 192, seed=1) * 0.02, gaussian(200, 160, seed=2) * 1e-5
    weight = Weight(Precision(recipe(name, "precision.high_last=0")), "e.up")
    xq, wq = weight.cast("fprop", "x", x, ids_R), weight.cast("fprop", "w", w)
    assert xq.quantized is not None and wq.quantized is not None
    y = grouped(xq.values, xq.factor, wq, counts, expert_R)
    dyq = weight.cast("dgrad", "dy", dy, ids_R)
    again = weight.again("dgrad", "w", wq if weight.reads_fprop("dgrad", "w") else w)
    dx = grouped(dyq.values, dyq.factor, again, counts, expert_R)
    dx = weight.straight_back(dx, "dgrad", "w", xq.quantized.trusted_NK, 192)
    kept_x = xq if weight.reads_fprop("wgrad", "x") else x
    dw = weight_gradient(weight, dy, kept_x, counts, ids_R, wq.quantized.trusted_NK, 192)
    xs, dys = x.double().split(counts), dy.double().split(counts)
    exact = (
        torch.cat([a @ b.T for a, b in zip(xs, w.double(), strict=True)]),
        torch.cat([a @ b for a, b in zip(dys, w.double(), strict=True)]),
        torch.stack([a.T @ b for a, b in zip(dys, xs, strict=True)]),
    )
    for product, ours, expected, decibels in zip(PRODUCTS, (y, dx, dw), exact, PRODUCT_SNR[name], strict=True):
        assert snr(ours.double(), expected) == pytest.approx(decibels, abs=0.8), product
    assert dw[1].eq(0).all()


@pytest.mark.parametrize("name", RECIPES)
def test_signal_to_noise_of_ragged_experts(name: str) -> None:
    """All three products at once, of experts with 0, and with no round number of rows."""
    experts, rows = experts_of("swiglu"), ragged(150, 5, 2)
    x, weights, dy = (
        gaussian(150, 40),
        torch.rand(300, generator=torch.Generator().manual_seed(5)),
        gaussian(150, 40, seed=9),
    )
    expected = run_experts(experts, x, weights, rows, dy)
    experts.low = LowExperts(Precision(recipe(name, "precision.high_last=0")), "e", 5)
    found = run_experts(experts, x, weights, rows, dy)
    for ours, reference, decibels in zip(found, expected, EXPERT_SNR[name], strict=True):
        assert snr(ours, reference) == pytest.approx(decibels, abs=1.0)
    assert found[3][1].eq(0).all() and found[4][1].eq(0).all()  # the expert without rows


def test_experts_are_linear_layers_of_their_rows() -> None:
    """With one expert and weights 1, the products are those of two linear layers with an activation between them; of 60 rows,
    which fill no block of weight gradients."""
    c = ModelConfig(d_model=64, n_heads=2, n_experts=1, d_expert=32, activation="relu2", router=RouterConfig(top_k=1))
    experts, rows = Experts(c), sort_slots(torch.arange(60), torch.zeros(60).long(), torch.tensor([60]), 60, 1)
    for i, p in enumerate(experts.parameters()):
        p.data = gaussian(*p.shape, seed=i) * 0.2
    x, dy = gaussian(60, 64), gaussian(60, 64, seed=9)
    for name in RECIPES:
        precision = Precision(recipe(name, "precision.high_last=0"))
        experts.low = LowExperts(precision, "e", 1)
        y, dx, _, dup, ddown = run_experts(experts, x, torch.ones(60), rows, dy)
        ids = torch.arange(60)
        x_, up, down = (t.detach().clone().requires_grad_() for t in (x, experts.w_up_EGD[0], experts.w_down_EDF[0]))
        h = LowLinear.apply(x_, up, Weight(precision, "e.up"), ids)
        z = LowLinear.apply(h.relu().square(), down, Weight(precision, "e.down"), ids)
        z.backward(dy)
        for ours, expected in ((y, z.detach()), (dx, x_.grad), (dup[0], up.grad), (ddown[0], down.grad)):
            # quartet2: a last bit decides about 4 or 6, or a scale, of a whole block
            assert snr(ours, expected) > (25 if name == "quartet2" else 100), name


def test_gradient_of_a_routers_weight_knows_no_clip() -> None:
    """It stands behind the product: <dy, y of its row>, of what was clipped too. Casts of dgrad itself cost little here."""
    dgrad = ["dy.element=null", "w.element=e4m3", "w.rule=rceil", "w.rounding=even"]
    experts, chosen = experts_of("swiglu"), torch.arange(300) % 5
    rows = sort_slots(torch.arange(300), chosen, chosen.bincount(), 300, 1)
    experts.low = LowExperts(Precision(recipe("quartet", *(f"precision.dgrad.{knob}" for knob in dgrad))), "e", 5)
    dy = gaussian(300, 40, seed=9)
    y, _, dweights, *_ = run_experts(experts, gaussian(300, 40, seed=3), torch.ones(300), rows, dy)
    assert snr(dweights, (dy * y).sum(dim=1)[rows.source_R]) > 14  # masked: 8 to 11


# ---------------------------------------------------------------- a model


def model_of(name: str, *knobs: str) -> tuple[Any, Any]:
    c = cli.compose(
        ["recipe=tiny_moe", f"precision={name}", "model.d_model=64", "model.n_heads=2", "model.n_layers=3", *knobs]
    )
    model = build(c.model, 0, CPU)
    lower(model, c.precision)
    return model, c


def lowered(model: Any) -> list[str]:
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "forward" in vars(m)]
    return linear + [n for n, m in model.named_modules() if isinstance(m, Experts) and m.low is not None]


def test_layers_that_stay_high() -> None:
    model, _ = model_of("mxfp8", "model.d_shared=32", "precision.high_first=1", "precision.high_last=1")
    assert sorted(lowered(model)) == [
        f"blocks.1.{n}"
        for n in ("attention.wo", "attention.wqkv", "ffn.experts", "ffn.shared.w_down", "ffn.shared.w_up")
    ]
    model, _ = model_of("mxfp8", "precision.layers=[experts]")
    assert lowered(model) == [f"blocks.{i}.ffn.experts" for i in range(3)]
    mla = ["model.attention=mla", "model.qk_norm=none", "model.mla.q_lora_rank=32", "model.mla.kv_lora_rank=16"]
    model, _ = model_of("mxfp8", "precision.layers=[attention]", *mla)
    assert len(lowered(model)) == 15
    assert lowered(model_of("bf16")[0]) == []
    dense, _ = model_of("mxfp8", "precision.layers=[dense]", "model.n_dense_layers=1", "model.d_dense=64")
    assert lowered(dense) == ["blocks.0.ffn.w_up", "blocks.0.ffn.w_down"]


def test_the_last_part_of_a_run_is_high() -> None:
    model, c = model_of("mxint8", "precision.high_tail=0.25")
    plain = build(c.model, 0, CPU)
    tokens = torch.arange(40)[None]
    exact = plain(tokens).logits
    for step, same in ((0, False), (5, False), (6, True), (7, True)):
        model.precision.begin(step, 8)
        assert torch.equal(model(tokens).logits, exact) == same, step


def test_memory_of_what_is_kept() -> None:
    """Bytes that autograd keeps of a linear layer, counted; weights and inputs packed where backward reads their casts."""

    def kept(name: str) -> int:
        seen = []
        x, w = gaussian(256, 128).requires_grad_(), gaussian(128, 128).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.nbytes), t)[1], lambda t: t):
            LowLinear.apply(x, w, Weight(Precision(recipe(name, "precision.high_last=0")), "w"), torch.arange(256))
        return sum(seen)

    x, w = 256 * 128, 128 * 128
    assert kept("mxfp8") == 4 * (x + w)
    assert kept("fp8_block") == x + w + 4 * (x // 128 + 1) + 8  # a byte, scales, factors
    assert kept("quartet2") == (x + w) // 2 + (x + w) // 16 + 8
    assert kept("quartet") == (x + w) // 2 + (x + w) // 32 + 8 + (x + w) // 8  # and a bit each for what was clipped
    flags = gaussian(7, 13) > 0
    assert torch.equal(unpack_bits(pack_bits(flags), 13), flags)


FLIPS = {
    "mxint8": 0.022,
    "mxfp8": 0.049,
    "fp8_block": 0.049,
    "quartet2": 0.136,
    "nvfp4": 0.158,
    "mxfp4_deosc": 0.160,
    "quartet": 0.211,
}


@pytest.mark.parametrize("name", RECIPES)
def test_router_flip_rate(name: str) -> None:
    """The share of choices that a recipe's noise in a router's input changes: of 8 experts, 2 a token, in three layers."""
    knobs = ["precision.high_last=0", "model.init_std=0.1"]
    model, c = model_of(name, *knobs)
    plain = build(c.model, 0, CPU)
    tokens = torch.randint(0, 256, (4, 128), generator=torch.Generator().manual_seed(0))

    def choices(model: Any) -> Tensor:
        found = []
        hooks = [
            layer.router.register_forward_hook(lambda _m, _i, out: found.append(out[0].expert_S))
            for layer in model.moe_layers()
        ]
        model(tokens)
        for hook in hooks:
            hook.remove()
        return F.one_hot(torch.stack(found).view(3, -1, 2), 8).sum(dim=2)

    rate = (choices(model) != choices(plain)).float().sum().item() / (2 * 3 * 512 * 2)
    assert rate == pytest.approx(FLIPS[name], rel=0.1)


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        (["precision=mxfp8", "precision.fprop.x.element=e3m2"], "precision.fprop.x.element=e3m2: must be one of"),
        (["precision=mxfp8", "precision.fprop.x.block=1x33"], "precision.fprop.x.block=1x33: must be one of"),
        (["precision=mxfp8", "precision.wgrad.dy.scale=fp32"], "precision.wgrad.dy.rule=rceil: must be one of amax"),
        (["precision=mxfp8", "precision.fprop.w.scale=e4m3", "precision.fprop.w.rule=amax"], "is for elements of 4 bits"),
        (["precision=mxfp8", "precision.dgrad.rotation=24"], "precision.dgrad.rotation=24: must be one of 0, 16, 32, 64, 128"),
        (["precision=mxfp8", "precision.dgrad.signs=step"], "precision.dgrad.signs=step: needs a precision.dgrad.rotation"),
        (["precision=quartet", "precision.dgrad.dy.rule=floor"], "precision.dgrad.dy.rounding=stochastic: has a bias with"),
        (["precision=quartet", "precision.dgrad.w.source=high"], "precision.dgrad.w.source=high: must be fprop, for what"),
        (["precision=quartet", "precision.fprop.x.rule=rceil", "precision.wgrad.x.source=high"],
         "precision.wgrad.x.source=high: must be fprop, for what precision.fprop.w.rule=quest clips"),
        (["precision=quartet", "precision.fprop.x.rounding=stochastic"], "precision.fprop.x.rounding=stochastic: must be even"),
        (["precision=quartet2", "precision.dgrad.rotation=0"], "precision.dgrad.signs=step: needs a precision.dgrad.rotation"),
        (["precision=quartet2", "precision.dgrad.signs=fixed"], "precision.dgrad.dy.rounding=eden: needs"),
        (["precision=mxfp8", "precision.wgrad.dy.source=fprop"], "precision.wgrad.dy.source=fprop: must be high"),
        (["precision=fp8_block", "precision.fprop.w.block=1x128"], "precision.dgrad.w.element=null with source=fprop"),
        (["precision=fp8_block", "precision.fprop.w.element=null"], "precision.fprop.w is not quantized"),
        (["precision=mxfp8", "precision.high_tail=1"], "precision.high_tail=1.0: must lie in 0..1, and below 1"),
        (["precision=fp32", "precision.fprop.x.rule=bogus"], "precision.fprop.x.rule=bogus: must be one of floor"),
        (["precision=fp8_block", "precision.dgrad.w.scale=fp32"], "precision.dgrad.w.rule=rceil: must be one of amax"),
        (["precision=[mxfp8,nvfp4]"], "precision=[mxfp8,nvfp4]: must be one of auto, bf16, fp32"),
        (["precision=null"], "precision=null: must be one of auto, bf16, fp32"),
        (["precision=mxfp8", "precision.layers=[router]"], "precision.layers=['router']: must be some of"),
        (["precision=mxfp8", "precision.deosc_period=10", "precision.fprop.w.element=null"], "precision.deosc_period=10: needs"),
        (["precision=mxfp4_deosc", "precision.fprop.w.rule=shrink", "precision.fprop.w.rounding=stochastic"],
         "precision.deosc_period=200: needs a precision.fprop.w of rounding=even without"),
        (["precision=mxfp8", "precision.combine=fp8"], "precision.combine=fp8: must be one of high, bf16, logfmt8, logfmt10"),
        (["precision=mxfp4"], "precision=mxfp4: unknown; nearest: mxfp8"),
    ],
)  # fmt: skip
def test_wrong_combinations_are_named(knobs: list[str], told: str) -> None:
    with pytest.raises(cli.UserError) as error:
        cli.compose(["recipe=tiny_moe", *knobs])
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("name", "knobs", "told"),
    [
        ("mxfp8", ["high_tail=0.2"], []),
        ("mxfp8", ["high_tail=0.001"], ["precision.high_tail=0.001: is no step of train.steps=100"]),
        ("mxfp4_deosc", [], ["precision.deosc_start=2000: the first window of precision.deosc_period=200"]),
        ("mxfp4_deosc", ["deosc_start=10", "deosc_period=71", "high_tail=0.2"], ["precision.deosc_start=10: the first"]),
        ("mxfp4_deosc", ["deosc_start=10", "deosc_period=70", "high_tail=0.2"], []),
        ("bf16", ["high_last=1", "fprop.rotation=32"],
         ["precision.high_last: does nothing, for precision=bf16 quantizes no", "precision.fprop.rotation: does nothing"]),
    ],
)  # fmt: skip
def test_knobs_without_effect_are_told(name: str, knobs: list[str], told: list[str]) -> None:
    found = without_effect(recipe(name, *(f"precision.{knob}" for knob in knobs)), 100)
    assert len(found) == len(told) and all(line.startswith(start) for line, start in zip(found, told, strict=True)), (
        found
    )


def test_recipes_that_a_model_refuses() -> None:
    with pytest.raises(
        ValueError, match="precision.high_first=2: with precision.high_last=1 leaves none of model.n_layers=3"
    ):
        model_of("mxfp8", "precision.high_first=2", "precision.high_last=1")
    dense = ["precision.layers=[dense]", "model.n_dense_layers=1", "model.d_dense=64"]
    assert len(lowered(model_of("mxfp8", *dense)[0])) == 2
    for knobs in (dense[:1], ["precision.layers=[]"], [*dense, "precision.high_first=1"]):
        with pytest.raises(ValueError, match="must name one of attention, experts, which blocks to quantize"):
            model_of("mxfp8", *knobs)


# Of each product: rotation and signs; its operands, which of them is fprop's cast, used or cast again. As the papers have them.
SHIPPED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "fp8_block": ([
        "0 none", "e4m3 1x128 pow2 rceil even", "e4m3 128x128 pow2 rceil even",
        "0 none", "e4m3 1x128 pow2 rceil even", "fprop",
        "0 none", "e4m3 1x128 pow2 rceil even", "fprop e4m3 1x128 pow2 rceil even"], {"dispatch": "fp8"}),
    "mxfp8": (["0 none", *["e4m3 1x32 e8m0 rceil even"] * 2] * 3, {}),
    "mxint8": (["0 none", *["int8 1x32 e8m0 rceil even"] * 2] * 3, {}),
    "nvfp4": ([
        "0 none", "e2m1 1x16 e4m3 amax even", "e2m1 16x16 e4m3 amax even",
        "0 none", "e2m1 1x16 e4m3 amax stochastic", "fprop",
        "16 fixed", "e2m1 1x16 e4m3 amax stochastic", "e2m1 1x16 e4m3 amax even"], {"high_last": 1}),
    "quartet": ([
        "32 none", *["e2m1 1x32 e8m0 quest even"] * 2,
        *["32 step", "e2m1 1x32 e8m0 shrink stochastic", "fprop e2m1 1x32 e8m0 shrink stochastic"] * 2], {}),
    "quartet2": ([
        "0 none", *["e2m1 1x16 e4m3 four_six even"] * 2,
        *["128 step", "e2m1 1x16 e4m3 amax eden", "fprop e2m1 1x16 e4m3 amax eden"] * 2], {}),
    "mxfp4_deosc": ([
        "0 none", "e2m1 1x32 e8m0 even even", "e2m1 32x32 e8m0 even even",
        "0 none", "e2m1 1x32 e8m0 shrink stochastic", "fprop",
        "32 step", "e2m1 1x32 e8m0 shrink stochastic", "e2m1 1x32 e8m0 shrink even"],
        {"deosc_period": 200, "deosc_ratio": 4.0, "deosc_start": 2000}),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_what_shipped_recipes_are(name: str) -> None:
    config, words = recipe(name), []
    for product in PRODUCTS:
        p = getattr(config, product)
        words.append(f"{p.rotation} {p.signs}")
        for _, o in operands(p):
            form = f"{o.element} {o.block} {o.scale} {o.rule} {o.rounding}" if o.element else ""
            words.append(" ".join(part for part in (o.source if o.source == "fprop" else "", form) if part))
    formats, others = SHIPPED[name]
    assert words == formats
    plain = PrecisionConfig()
    rest = {f.name: getattr(config, f.name) for f in fields(plain) if f.name not in PRODUCTS}
    assert rest == {key: getattr(plain, key) for key in rest} | {"recipe": name} | others


def test_recipes_are_all_here() -> None:
    names = {path.stem for path in (ROOT / "recipes/precision").glob("*.yaml")}
    assert names == {*RECIPES, "auto", "bf16", "fp32"}
    for name in names:
        assert recipe(name).recipe == name
        assert recipe(name).quantized == (name in RECIPES)
