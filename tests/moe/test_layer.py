"""The shared expert beside the expert path: what runs on which CUDA stream, and who waits for whom."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.moe import layer as layer_file
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.dispatch import LocalPath
from moesaic.moe.layer import MoE, side_stream
from moesaic.moe.model import initialize
from moesaic.moe.replay import Tape

CPU = torch.device("cpu")


class Stream:
    """A stream by name. What waits, what is enqueued and which tensors are kept is noted in `events`."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other: "Stream") -> None:
        self.events.append(f"{self.name} waits for {other.name}")


def test_the_shared_expert_runs_beside_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(d_model=16, n_heads=2, n_experts=4, d_expert=8, d_shared=12, router=RouterConfig(top_k=2))
    layer = MoE(config)
    initialize(layer, "ffn.", config, 0, CPU)
    x = torch.randn(11, 16)

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)[0]
        y.square().sum().backward()
        return y, {"x": leaf.grad} | {n: p.grad.clone() for n, p in layer.named_parameters()}

    want, want_gradients = run()
    events: list[str] = []
    main, side = Stream("main", events), Stream("side", events)
    on = [main]

    @contextlib.contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        on.append(chosen)
        yield
        on.pop()

    class Noted(LocalPath):
        def __call__(self, *arguments: Any) -> Tensor:
            events.append(f"path on {on[-1].name}")
            return super().__call__(*arguments)

    monkeypatch.setattr(layer_file, "side_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: on[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(Tensor, "record_stream", lambda t, s: events.append(f"{tuple(t.shape)} kept for {s.name}"))
    monkeypatch.setattr(layer, "path", Noted())
    layer.shared.register_forward_pre_hook(lambda *_: events.append(f"shared on {on[-1].name}"))
    got, gradients = run()
    assert events == [
        "side waits for main", "shared on side", "(11, 16) kept for side", "path on main", "main waits for side",
        "(11, 16) kept for main",
    ]  # fmt: skip
    assert torch.equal(got, want)
    assert all(torch.equal(gradients[n], want_gradients[n]) for n in want_gradients)

    events.clear()
    with Tape().record():  # activations may be computed again on any stream: all on one
        layer(x)
    assert events == ["shared on main", "path on main"]


def test_one_side_stream_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    side_stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(str(device), []))
    fake = side_stream(torch.device("cuda", 3))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    real = side_stream(torch.device("cuda", 0))
    assert (fake, side_stream(CPU)) == (None, None)  # no such device: fake tensors
    assert isinstance(real, Stream) and real.name == "cuda:0"
    assert side_stream(torch.device("cuda", 0)) is real
    side_stream.cache_clear()
