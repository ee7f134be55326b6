"""The expert operation against a per-token loop in fp64: outputs and every gradient, on ragged and empty experts."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.moe import experts as module
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.dispatch import LocalPath, sort_rows
from moesaic.moe.experts import Experts, experts_reference, sum_slots
from moesaic.moe.layer import MoE
from moesaic.moe.router import Routing, count_rows

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


def naive(x: Tensor, ids: Tensor, weights: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """Token by token, slot by slot."""
    out = []
    for t in range(x.shape[0]):
        total = torch.zeros(x.shape[1], dtype=x.dtype)
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            h = w_up[e] @ x[t]
            width = h.shape[0] // 2
            gate = h[:width]
            total = total + weights[t, k] * (w_down[e] @ (gate * torch.sigmoid(gate) * h[width:]))
        out.append(total)
    return torch.stack(out)


def operands(shape: tuple[int, ...], scale: float = 1.0) -> dict[str, Tensor]:
    tokens, d, f, experts, k = shape
    return {
        "x": torch.randn(tokens, d) * scale,
        "weights": torch.rand(tokens, k),
        "w_up": torch.randn(experts, 2 * f, d) / d**0.5,
        "w_down": torch.randn(experts, d, f) / f**0.5,
    }


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-300)).item()


def run(function: Any, values: dict[str, Tensor], gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    out = function(*leaves.values())
    out.backward(gradient.to(out.dtype))
    return out.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("backend", ["loop", "grouped", "reference"])
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(
    shape: tuple[int, ...], workload: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, d, _, experts, k = shape
    if backend == "grouped":  # what runs on CUDA, run here
        monkeypatch.setattr(module, "_forward_loop", module._forward_grouped)
        monkeypatch.setattr(module, "_backward_loop", module._backward_grouped)
    ids = choose(tokens, experts, k, workload)
    rows = sort_rows(ids, count_rows(ids, experts))
    index = (rows.source_R, rows.position_NK, rows.counts_e)
    values, gradient = operands(shape), torch.randn(tokens, d)
    exact = {name: value.double() for name, value in values.items()}
    want, want_grads = run(lambda x, w, up, down: naive(x, ids, w, up, down), exact, gradient)
    if backend == "reference":
        got, grads = run(lambda x, w, up, down: experts_reference(x, w, rows, up, down), exact, gradient)
    else:
        got, grads = run(lambda x, w, up, down: module._ExpertsOp.apply(x, w, up, down, *index), values, gradient)
    tolerance = 1e-12 if backend == "reference" else 2e-6
    assert relative(got, want) < tolerance
    for name in values:
        assert relative(grads[name], want_grads[name]) < tolerance, name


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_scale_of_values(scale: float) -> None:
    shape = (45, 32, 16, 6, 2)
    ids = choose(45, 6, 2, "random")
    rows = sort_rows(ids, count_rows(ids, 6))
    values, gradient = operands(shape, scale), torch.randn(45, 32) / scale
    want, want_grads = run(
        lambda x, w, up, down: naive(x, ids, w, up, down), {n: v.double() for n, v in values.items()}, gradient
    )
    index = (rows.source_R, rows.position_NK, rows.counts_e)
    got, grads = run(lambda x, w, up, down: module._ExpertsOp.apply(x, w, up, down, *index), values, gradient)
    assert relative(got, want) < 2e-6
    assert all(relative(grads[name], want_grads[name]) < 2e-6 for name in values)


def test_same_inputs_same_bits_and_untouched() -> None:
    ids = choose(64, 8, 2, "random")
    rows = sort_rows(ids, count_rows(ids, 8))
    values, gradient = operands((64, 32, 16, 8, 2)), torch.randn(64, 32)
    before = {name: value.clone() for name, value in values.items()}
    index = (rows.source_R, rows.position_NK, rows.counts_e)
    one, two = (run(lambda *v: module._ExpertsOp.apply(*v, *index), values, gradient) for _ in range(2))
    assert torch.equal(one[0], two[0]) and all(torch.equal(one[1][n], two[1][n]) for n in values)
    assert all(torch.equal(values[n], before[n]) for n in values)


def test_experts_without_rows_get_zero_gradients() -> None:
    config = ModelConfig(d_model=16, n_heads=2, n_experts=4, d_expert=8)
    layer = Experts(config)
    torch.nn.init.normal_(layer.w_up_EGD)
    torch.nn.init.normal_(layer.w_down_EDF)
    ids = torch.tensor([[1, 2]] * 5)
    routing = Routing(ids, torch.rand(5, 2), count_rows(ids, 4))
    LocalPath()(torch.randn(5, 16), routing, layer).sum().backward()
    for weight in layer.parameters():
        assert weight.grad is not None
        assert weight.grad[[0, 3]].abs().max() == 0 and weight.grad[[1, 2]].abs().max() > 0


def test_saves_input_and_preactivation_only() -> None:
    """Bytes kept for backward, by storage: N*D + R*2F values, the weights themselves, and index vectors."""
    tokens, d, f, experts, k = 128, 32, 24, 8, 2
    ids = choose(tokens, experts, k, "random")
    rows = sort_rows(ids, count_rows(ids, experts))
    values = {name: value.requires_grad_() for name, value in operands((tokens, d, f, experts, k)).items()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module._ExpertsOp.apply(*values.values(), rows.source_R, rows.position_NK, rows.counts_e)
    for name in ("w_up", "w_down"):
        del saved[values[name].untyped_storage().data_ptr()]
    index_bytes = 8 * (tokens * k * 2 + experts) + 4 * tokens * k
    assert sum(saved.values()) == 4 * (tokens * d + tokens * k * 2 * f) + index_bytes


def test_sorted_rows_by_hand() -> None:
    # Three tokens, two slots: experts (2 0) (1 2) (0 1). Sorted: expert 0 has tokens 0, 2; 1 has 1, 2; 2 has 0, 1.
    ids = torch.tensor([[2, 0], [1, 2], [0, 1]])
    rows = sort_rows(ids, count_rows(ids, 3))
    assert rows.source_R.tolist() == [0, 2, 1, 2, 0, 1]
    assert rows.position_NK.tolist() == [[4, 0], [2, 5], [1, 3]]
    assert rows.counts_e.tolist() == [2, 2, 2]
    y = torch.arange(6.0)[:, None]
    assert sum_slots(y, rows.position_NK).flatten().tolist() == [4.0, 7.0, 4.0]


def test_a_layer_on_cuda_does_not_wait_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """FakeTensorMode has no values, so `.item()` and `.tolist()` raise: what runs on CUDA runs without either, both ways.

    The fake tensors say they are on the CPU, for autograd asks a CUDA device for its streams even of fake ones.
    """
    monkeypatch.setattr(module, "_forward_loop", module._forward_grouped)
    monkeypatch.setattr(module, "_backward_loop", module._backward_grouped)
    config = ModelConfig(d_model=64, n_heads=2, n_experts=8, d_expert=32, d_shared=32, router=RouterConfig(top_k=2))
    with torch.device("meta"):
        layer = MoE(config)
    with FakeTensorMode():
        for part in layer.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, torch.nn.Parameter(torch.empty(parameter.shape, dtype=torch.bfloat16)))
        x = torch.empty(40, 64, dtype=torch.bfloat16, requires_grad=True)
        y, aux = layer(x)
        assert y.shape == x.shape and y.dtype == torch.bfloat16
        (y.sum() + aux["balance"] + aux["z"]).backward()
        for name, parameter in [*layer.named_parameters(), ("x", x)]:
            assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
        with pytest.raises(Exception, match="_local_scalar_dense"):  # so a wait would be seen
            aux["counts"].tolist()
