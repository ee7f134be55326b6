"""Routers and local dispatch by the kernels against the same by torch: every kind, with capacity and rounding, and replayed."""

import dataclasses

import pytest
import torch
from torch import Tensor

from moesaic.kernels.testing import launches
from moesaic.moe.config import ROUNDINGS, ModelConfig, RouterConfig
from moesaic.moe.layer import MoE
from moesaic.moe.replay import Tape
from moesaic.moe.router import Router, Routing, Scores

ROUTERS = {
    "softmax": {},
    "softmax, divided": {"renormalize": True, "scale": 1.5},
    "sigmoid": {"kind": "sigmoid_bias", "renormalize": True, "scale": 2.5},
    "groups": {"kind": "sigmoid_bias", "groups": 3, "groups_kept": 2},
    "capacity": {"capacity_factor": 0.7, "renormalize": True},
    "expert choice": {"kind": "expert_choice", "renormalize": True},
    "rounded sigmoid": {"kind": "sigmoid_bias", "rounding": "nearest", "rounding_tile": 4},
} | {f"rounded {rule}": {"rounding": rule, "rounding_tile": 8, "renormalize": True} for rule in ROUNDINGS[1:]}


def config(backend: str, **router: object) -> ModelConfig:
    return ModelConfig(
        d_model=16, n_experts=12, d_expert=8, n_heads=2, experts_backend=backend, router=RouterConfig(top_k=3, **router)
    )


def routed(router: Router, x_TD: Tensor) -> tuple[Routing, Scores, list[str]]:
    torch.manual_seed(7)  # rounding draws from it
    with launches() as names:
        routing, scores = router(x_TD)
    return routing, scores, names


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_kernels_route_as_torch_does(name: str, training: bool) -> None:
    if name == "expert choice" and not training:
        return
    routers = [Router(config(backend, **ROUTERS[name])).train(training) for backend in ("torch", "triton")]
    with torch.no_grad():
        routers[0].weight_ED.normal_()
        if hasattr(routers[0], "bias_E"):
            routers[0].bias_E.normal_()
    routers[1].load_state_dict(routers[0].state_dict())
    x_TD = torch.randn(40, 16)
    (want, want_scores, none), (got, got_scores, names) = (routed(router, x_TD) for router in routers)
    expected = [] if name == "expert choice" else ["_topk_kernel"]
    expected += ["_select_kernel", "_order_kernel"] if training and "rounded" in name else []
    assert none == [] and names == expected
    for field in dataclasses.fields(Routing):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if field.name == "weights_S":
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert a.equal(b) if isinstance(b, Tensor) else a == b, field.name
    torch.testing.assert_close(got_scores.shares_TE, want_scores.shares_TE, rtol=1e-5, atol=1e-6)
    gradients = []
    for routing, scores, router in ((want, want_scores, routers[0]), (got, got_scores, routers[1])):
        factors = torch.linspace(-1, 1, routing.weights_S.numel())
        (
            (routing.weights_S * factors).sum() + scores.shares_TE.square().sum() + scores.logits_TE.logsumexp(1).sum()
        ).backward()
        gradients.append(router.weight_ED.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4 * gradients[0].abs().max().item())


def test_a_replayed_choice_stays() -> None:
    """Weights moved between the passes, so a second choice would be another; the replay keeps the first, with the new weights."""
    router, tape, x_TD = Router(config("triton", renormalize=True)), Tape(), torch.randn(30, 16)
    torch.nn.init.normal_(router.weight_ED)
    with tape.record():
        first, _ = router(x_TD)
    with torch.no_grad():
        router.weight_ED.mul_(-1)
    with tape.replay(), launches() as names:
        second, scores = router(x_TD)
    assert names == ["_topk_kernel"] and second.expert_S.equal(first.expert_S)
    assert not router(x_TD)[0].expert_S.equal(first.expert_S)
    weights_TK = scores.shares_TE.gather(1, first.expert_S.view(30, 3))
    torch.testing.assert_close(second.weights_S.view(30, 3), weights_TK / weights_TK.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("router", [{}, {"capacity_factor": 0.6}, {"rounding": "up", "rounding_tile": 8}], ids=str)
def test_a_layer_by_kernels_equals_the_reference(router: dict) -> None:
    layers = [MoE(config(backend, **router)) for backend in ("reference", "triton")]
    for parameter in layers[0].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layers[1].load_state_dict(layers[0].state_dict())
    x_TD, out = torch.randn(26, 16), []
    for layer in layers:
        x = x_TD.clone().requires_grad_()
        torch.manual_seed(3)
        y_TD, aux = layer(x)
        (y_TD.square().sum() + aux["balance"] + aux["z"]).backward()
        out.append([y_TD, x.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*out, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()
