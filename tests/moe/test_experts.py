"""The expert operation against a per-token loop in fp64: outputs and every gradient, on ragged and empty experts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.kernels.permute import Rows, sort_slots, sum_bags
from moesaic.kernels.rounding import RULES
from moesaic.moe import experts as module
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.dispatch import LocalPath
from moesaic.moe.experts import Experts, experts_reference
from moesaic.moe.layer import MoE
from moesaic.moe.router import count_rows, topk_routing

# tokens, width, expert width, experts, slots
SHAPES = [(1, 8, 8, 1, 1), (37, 16, 24, 5, 2), (50, 24, 8, 7, 7), (96, 40, 16, 16, 3)]
WORKLOADS = ["random", "one_hot", "empty_experts"]


def choose(tokens: int, experts: int, k: int, workload: str) -> Tensor:
    """Expert ids (tokens, k), distinct within a row."""
    if workload == "one_hot":  # everybody's first choice is the last expert
        return torch.stack(
            [torch.cat((torch.tensor([experts - 1]), torch.randperm(experts - 1)[: k - 1])) for _ in range(tokens)]
        )
    used = max(k, experts // 2) if workload == "empty_experts" else experts
    return torch.stack([torch.randperm(used)[:k] for _ in range(tokens)])


def rows_of(ids: Tensor, experts: int, unused: Tensor | None = None) -> Rows:
    """Rows of ids (T, K), without the slots that `unused`, bool (T, K), marks."""
    tokens, k = ids.shape
    token_S = torch.arange(tokens).repeat_interleave(k)
    if unused is None:
        return sort_slots(token_S, ids.flatten(), count_rows(ids, experts), tokens, k)
    return sort_slots(token_S, ids.masked_fill(unused, experts).flatten(), count_rows(ids[~unused], experts), tokens, 0)


ACT = {
    "swiglu": lambda h: h[: len(h) // 2] * torch.sigmoid(h[: len(h) // 2]) * h[len(h) // 2 :],
    "geglu": lambda h: h[: len(h) // 2] * (1 + torch.erf(h[: len(h) // 2] / 2**0.5)) / 2 * h[len(h) // 2 :],
    "reglu": lambda h: h[: len(h) // 2].clamp(min=0) * h[len(h) // 2 :],
    "relu2": lambda h: h.clamp(min=0) ** 2,
}


def naive(values: dict[str, Tensor], ids: Tensor, unused: Tensor | None, activation: str) -> Tensor:
    """Token by token, slot by slot."""
    x, w_up, w_down, b_up, b_down = (values.get(n) for n in ("x", "w_up", "w_down", "b_up", "b_down"))
    out = []
    for t in range(ids.shape[0]):
        total = torch.zeros(x.shape[1], dtype=x.dtype)
        for k in range(ids.shape[1]):
            if unused is not None and unused[t, k]:
                continue
            e = int(ids[t, k])
            h = w_up[e] @ x[t] + (0 if b_up is None else b_up[e])
            y = w_down[e] @ ACT[activation](h) + (0 if b_down is None else b_down[e])
            total = total + values["weights"][t, k] * y
        out.append(total)
    return torch.stack(out)


def operands(
    shape: tuple[int, ...], scale: float = 1.0, activation: str = "swiglu", bias: bool = False
) -> dict[str, Tensor]:
    tokens, d, f, experts, k = shape
    up = f if activation == "relu2" else 2 * f
    values = {
        "x": torch.randn(tokens, d) * scale,
        "weights": torch.rand(tokens, k),
        "w_up": torch.randn(experts, up, d) / d**0.5,
        "w_down": torch.randn(experts, d, f) / f**0.5,
    }
    return values | ({"b_up": torch.randn(experts, up), "b_down": torch.randn(experts, d)} if bias else {})


def ours(
    values: dict[str, Tensor], rows: Rows, activation: str = "swiglu", backend: str = "torch", chunk: int = 256
) -> Tensor:
    weights_R = values["weights"].flatten()[rows.slot_R]
    args = (
        values["x"],
        weights_R,
        values["w_up"],
        values["w_down"],
        values.get("b_up"),
        values.get("b_down"),
        rows,
        activation,
    )
    return experts_reference(*args) if backend == "reference" else module._ExpertsOp.apply(*args, chunk)


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-300)).item()


def run(function: Any, values: dict[str, Tensor], gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    out = function(leaves)
    out.backward(gradient.to(out.dtype))
    return out.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def grouped_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what runs on CUDA."""
    monkeypatch.setattr(module, "_forward_loop", module._forward_grouped)
    monkeypatch.setattr(module, "_backward_loop", module._backward_grouped)


def check(
    shape: tuple[int, ...], ids: Tensor, unused: Tensor | None, activation: str, bias: bool, backend: str
) -> None:
    values, gradient = operands(shape, 1.0, activation, bias), torch.randn(shape[0], shape[1])
    rows = rows_of(ids, shape[3], unused)
    exact = {name: value.double() for name, value in values.items()}
    want, want_grads = run(lambda v: naive(v, ids, unused, activation), exact, gradient)
    if backend == "reference":
        got, grads = run(lambda v: ours(v, rows, activation, "reference"), exact, gradient)
    else:
        got, grads = run(lambda v: ours(v, rows, activation), values, gradient)
    tolerance = 1e-12 if backend == "reference" else 3e-6
    assert relative(got, want) < tolerance
    for name in values:
        assert relative(grads[name], want_grads[name]) < tolerance, name


@pytest.mark.parametrize("backend", ["loop", "grouped", "reference"])
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(
    shape: tuple[int, ...], workload: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "grouped":
        grouped_on_cpu(monkeypatch)
    check(shape, choose(shape[0], shape[3], shape[4], workload), None, "swiglu", False, backend)


@pytest.mark.parametrize("backend", ["loop", "grouped", "reference"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "reglu", "relu2"])
def test_activations_biases_and_unused_slots(
    activation: str, bias: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "grouped":
        grouped_on_cpu(monkeypatch)
    monkeypatch.setattr(module, "GROUP_ROWS", 16)  # several groups of experts, of more and fewer rows
    ids = choose(43, 6, 3, "random")
    unused = torch.rand(43, 3) < 0.3
    unused[7] = True  # a token without any expert
    check((43, 24, 16, 6, 3), ids, unused, activation, bias, backend)


def cuda_embedding_bag(bag: Tensor, y: Tensor, starts: Tensor | None = None, **options: Any) -> Tensor:
    """What torch's CUDA kernel does, read in its source: the last bag ends where the indices end."""
    if starts is None:
        return y[bag].sum(dim=1)
    bags = starts.tolist()[: -1 if options.get("include_last_offset") else None]
    ends = [*bags[1:], len(bag)]
    return torch.stack([y[bag[a:b]].sum(dim=0) for a, b in zip(bags, ends, strict=True)])


def test_padding_rows_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA unused slots stay as rows past the last expert's; what they hold must reach nothing."""
    grouped_on_cpu(monkeypatch)
    ids, unused = choose(43, 6, 3, "random"), torch.rand(43, 3) < 0.3
    rows = rows_of(ids, 6, unused)
    monkeypatch.setattr("moesaic.kernels.permute.on_host", lambda tensor: False)
    padded = rows_of(ids, 6, unused)
    assert padded.source_R.numel() == padded.bag.numel() == 43 * 3 > rows.source_R.numel()
    real = F.grouped_mm

    def dirty(*args: Any, **kwargs: Any) -> Tensor:
        out = real(*args, **kwargs)
        if out.dim() == 2:
            out[int(kwargs["offs"][-1]) :] = torch.nan
        return out

    values, gradient = operands((43, 24, 16, 6, 3), bias=True), torch.randn(43, 24)
    want, want_grads = run(lambda v: ours(v, rows), values, gradient)
    monkeypatch.setattr(F, "grouped_mm", dirty)
    monkeypatch.setattr(F, "embedding_bag", cuda_embedding_bag)
    got, grads = run(lambda v: ours(v, padded), values, gradient)
    torch.testing.assert_close(got, want)
    for name in values:
        torch.testing.assert_close(grads[name], want_grads[name])


def test_column_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped_on_cpu(monkeypatch)
    shape = (4000, 72, 16, 6, 3)
    rows, values, gradient = rows_of(choose(4000, 6, 3, "random"), 6), operands(shape), torch.randn(4000, 72)
    assert len(module._column_chunks(72, 12000 * 4, 1)) == 5  # 16 columns each, the last 8
    whole, whole_grads = run(lambda v: ours(v, rows), values, gradient)
    parts, part_grads = run(lambda v: ours(v, rows, chunk=1), values, gradient)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    for name in values:
        torch.testing.assert_close(part_grads[name], whole_grads[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_scale_of_values(scale: float) -> None:
    ids = choose(45, 6, 2, "random")
    values, gradient = operands((45, 32, 16, 6, 2), scale), torch.randn(45, 32) / scale
    exact = {n: v.double() for n, v in values.items()}
    want, want_grads = run(lambda v: naive(v, ids, None, "swiglu"), exact, gradient)
    got, grads = run(lambda v: ours(v, rows_of(ids, 6)), values, gradient)
    assert relative(got, want) < 2e-6
    assert all(relative(grads[name], want_grads[name]) < 2e-6 for name in values)


def test_same_inputs_same_bits_and_untouched() -> None:
    rows = rows_of(choose(64, 8, 2, "random"), 8)
    values, gradient = operands((64, 32, 16, 8, 2)), torch.randn(64, 32)
    before = {name: value.clone() for name, value in values.items()}
    one, two = (run(lambda v: ours(v, rows), values, gradient) for _ in range(2))
    assert torch.equal(one[0], two[0]) and all(torch.equal(one[1][n], two[1][n]) for n in values)
    assert all(torch.equal(values[n], before[n]) for n in values)


def test_experts_without_rows_get_zero_gradients() -> None:
    config = ModelConfig(d_model=16, n_heads=2, n_experts=4, d_expert=8)
    layer = Experts(config)
    torch.nn.init.normal_(layer.w_up_EGD)
    torch.nn.init.normal_(layer.w_down_EDF)
    ids = torch.tensor([[1, 2]] * 5)
    routing = topk_routing(ids, torch.rand(5, 2), 4)
    LocalPath()(torch.randn(5, 16), routing, layer).sum().backward()
    for weight in layer.parameters():
        assert weight.grad is not None
        assert weight.grad[[0, 3]].abs().max() == 0 and weight.grad[[1, 2]].abs().max() > 0


def test_sorted_rows_by_hand() -> None:
    # Three tokens, two slots: experts (2 0) (1 2) (0 1). Sorted: expert 0 has tokens 0, 2; 1 has 1, 2; 2 has 0, 1.
    ids = torch.tensor([[2, 0], [1, 2], [0, 1]])
    rows = rows_of(ids, 3)
    assert rows.source_R.tolist() == [0, 2, 1, 2, 0, 1]
    assert rows.slot_R.tolist() == [1, 4, 2, 5, 0, 3] and rows.expert_R.tolist() == [0, 0, 1, 1, 2, 2]
    assert rows.bag.tolist() == [[4, 0], [2, 5], [1, 3]] and rows.starts is None
    y = torch.arange(6.0)[:, None]
    assert sum_bags(y, rows.bag, None).flatten().tolist() == [4.0, 7.0, 4.0]
    # Without token 0's second slot and both of token 1: expert 0 has token 2, 1 has 2, 2 has 0.
    rows = rows_of(ids, 3, torch.tensor([[False, True], [True, True], [False, False]]))
    assert rows.source_R.tolist() == [2, 2, 0] and rows.counts_E.tolist() == [1, 1, 1]
    assert rows.bag.tolist() == [2, 0, 1] and rows.starts.tolist() == [0, 1, 1, 3]
    assert sum_bags(y[:3], rows.bag, rows.starts).flatten().tolist() == [2.0, 0.0, 1.0]


@pytest.mark.parametrize("router", [
    dict(top_k=2), dict(top_k=2, balance_over="sequence"), dict(kind="sigmoid_bias", groups=4, groups_kept=2),
    dict(kind="expert_choice"), dict(capacity_factor=1.25), dict(rounding="balance", renormalize=True),
    *(dict(rounding=rule) for rule in RULES),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_on_cuda_does_not_wait_for_the_host(
    bias: bool, router: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FakeTensorMode has no values, so `.item()` and `.tolist()` raise: what runs on CUDA runs without either, both ways.

    The fake tensors say they are on the CPU, for autograd asks a CUDA device for its streams even of fake ones.
    """
    grouped_on_cpu(monkeypatch)
    monkeypatch.setattr("moesaic.kernels.permute.on_host", lambda tensor: False)
    config = ModelConfig(
        d_model=64, n_heads=2, n_experts=8, d_expert=32, d_shared=32, expert_bias=bias, router=RouterConfig(**router)
    )
    with torch.device("meta"):
        layer = MoE(config)
    with FakeTensorMode():
        for part in layer.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, torch.nn.Parameter(torch.empty(parameter.shape, dtype=torch.bfloat16)))
        if hasattr(layer.router, "bias_E"):
            layer.router.bias_E = torch.zeros(8)
        x = torch.empty(40, 64, dtype=torch.bfloat16, requires_grad=True)
        y, aux = layer(x, sequences=4)
        assert y.shape == x.shape and y.dtype == torch.bfloat16
        (y.sum() + aux["balance"] + aux["z"]).backward()
        for name, parameter in [*layer.named_parameters(), ("x", x)]:
            assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
        with pytest.raises(Exception, match="_local_scalar_dense"):  # so a wait would be seen
            aux["counts"].tolist()
