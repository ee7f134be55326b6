"""Activations computed again in backward: the same gradients, less memory, and never another route."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop

from moesaic.kernels.testing import PeakMemory
from moesaic.moe import router
from moesaic.moe.attention import rotary_table
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.model import Block, build
from moesaic.parallel import fsdp, remat, shared
from moesaic.parallel.apply import parallelize
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.fsdp import FSDPEngine
from moesaic.parallel.mesh import make_meshes
from tests.parallel.ranks import run_ranks
from tests.parallel.shapes import CPU, SEQUENCE, SHAPES, config_of, micro_batches, whole

REPEATING = ("selective", "full")


def forward(shape: str, mode: str) -> tuple[Any, Any, Tensor]:
    """A model, what it gave, and the loss to start backward from."""
    torch.manual_seed(5)
    model = build(config_of(shape), 2, CPU)
    remat.recompute(model, mode)
    batch = micro_batches(1, 1, False)[0][0]
    out = model(batch[:, :-1], batch[:, 1:])
    return model, out, out.loss / batch.numel() + out.aux


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def differences(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    assert got.keys() == want.keys()
    return {n: ((got[n] - v).abs().max() / v.abs().max().clamp(min=1e-9)).item() for n, v in want.items()}


@pytest.mark.parametrize("mode", REPEATING)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_outputs_gradients_and_dice(shape: str, mode: str) -> None:
    plain, want, loss = forward(shape, "none")
    loss.backward()
    dice = torch.rand(())
    model, got, loss = forward(shape, mode)
    calls: list[Tensor] = []
    for layer in model.moe_layers():  # a second sum over ranks would wait for ranks that don't come
        layer.reduce = lambda value: calls.append(value) or value  # type: ignore[func-returns-value]
    loss.backward()
    assert not calls
    assert torch.rand(()) == dice  # no chance was drawn again
    for key in ("loss", "aux", "counts", "figures"):
        assert torch.equal(getattr(got, key), getattr(want, key)), key
    assert max(differences(gradients(model), gradients(plain)).values()) < 1e-6


@pytest.mark.parametrize("mode", REPEATING)
def test_backward_in_another_thread_without_an_early_end(mode: str) -> None:
    """As on CUDA, where backward has threads of its own; and the kept path is left out, not only never reached."""
    plain, _, loss = forward("shared_dense_tied", "none")
    loss.backward()
    with set_checkpoint_early_stop(False):
        model, _, loss = forward("shared_dense_tied", mode)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert max(differences(gradients(model), gradients(plain)).values()) < 1e-6


@pytest.mark.parametrize("mode", REPEATING)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_decided_again(shape: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("decided again")

    _, _, loss = forward(shape, mode)
    for name in ("stable_topk", "round_routing", "keep_best_groups"):
        monkeypatch.setattr(router, name, refuse)
    monkeypatch.setattr(torch, "randint", refuse)
    loss.backward()


def nudged(kind: str, mode: str) -> dict[str, Tensor]:
    """Gradients where, between forward and backward, every score moves by a millionth and most choices with it.

    The router's rows of two experts are nearly equal, and change places. Each token's best expert is one of the two.
    """
    config = ModelConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, n_experts=4, d_expert=20, init_std=0.3,
                         router=RouterConfig(kind=kind, top_k=1, z_coef=0.0))  # fmt: skip
    model = build(config, 3, CPU)
    for layer in model.moe_layers():
        with torch.no_grad():
            weight = layer.router.weight_ED
            weight[1] = weight[0] + 1e-6 * torch.randn(32, generator=torch.Generator().manual_seed(1))
            weight[2:] = 0.0
            layer.router.weight_ED.mul_(0.1)
            if kind == "sigmoid_bias":
                layer.router.bias_E[2:] = -1.0
            else:
                weight[2:] = -5 * weight[0]
    remat.recompute(model, mode)
    batch = micro_batches(1, 1, False)[0][0]
    loss = model(batch[:, :-1], batch[:, 1:]).loss
    for layer in model.moe_layers():
        weight = layer.router.weight_ED.data  # .data: autograd would notice another change
        weight[:2] = weight[:2].flip(0)
    loss.backward()
    return gradients(model)


@pytest.mark.parametrize("kind", ["softmax_topk", "sigmoid_bias"])
def test_a_score_that_would_flip_the_route_does_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = nudged(kind, "none")
    for mode in REPEATING:
        assert max(differences(nudged(kind, mode), want).values()) < 1e-4, mode
    monkeypatch.setattr(router, "once", lambda _, decide: decide())  # what happens without the tape
    flipped = differences(nudged(kind, "full"), want)
    assert flipped["blocks.1.ffn.experts.w_up_EGD"] > 0.1


# ---------------------------------------------------------------- memory


def kept_bytes(mode: str, config: ModelConfig, sequences: int, length: int) -> int:
    """Bytes that live between forward and backward of a block, its input and output left out."""
    torch.manual_seed(0)
    block = Block(config, 0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([block])
    remat.recompute(model, mode)  # type: ignore[arg-type]
    x_BSD = torch.randn(sequences, length, config.d_model, requires_grad=True)
    cos_SC, sin_SC = rotary_table(length, config.rotary_width, 1e4, CPU)
    memory = PeakMemory()
    with memory:
        y_BSD, aux = block(x_BSD, cos_SC, sin_SC)
    scalars = sum(value.nbytes for value in aux.values())
    kept = memory.now - y_BSD.nbytes - scalars
    (y_BSD.sum() + aux["balance"]).backward()
    return kept


@pytest.mark.parametrize("d_shared", [0, 48])
def test_bytes_that_are_kept(d_shared: int) -> None:
    """fp32: `full` keeps which experts were chosen, and nothing else; `selective` what the experts keep, too."""
    tokens, d, f, k = 2 * 40, 48, 56, 3
    config = ModelConfig(d_model=d, n_heads=4, n_experts=8, d_expert=f, d_shared=d_shared, router=RouterConfig(top_k=k))
    full, selective, none = (kept_bytes(mode, config, 2, 40) for mode in ("full", "selective", "none"))
    ids = 8 * tokens * k
    assert full == ids
    # The experts' input and pre-activation; per row its input, its slot, its place in sums and its weight; counts.
    assert selective == full + 4 * tokens * d + 8 * tokens * k * f + tokens * k * (8 + 8 + 8 + 4) + 8 * 8
    # A norm's result; queries, keys, values, the former two once more, rotated; attention's result; the sum before the experts.
    assert none > selective + 8 * 4 * tokens * d + 4 * 4 * tokens * d_shared


# ---------------------------------------------------------------- ranks


def record_collectives(monkeypatch: Any) -> list[tuple[str, Any]]:
    calls: list[tuple[str, Any]] = []

    def recorded(owner: Any, name: str, known_as: str) -> Any:
        real = getattr(owner, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            tensors = [a for a in (*arguments, *keywords.values()) if isinstance(a, Tensor)]
            group = keywords.get("group")
            calls.append((known_as, (tensors[0].dtype, 0 if group is None else dist.get_world_size(group))))
            return real(*arguments, **keywords)

        return call

    for module, name in ((shared, "all_to_all_single"), (dist, "all_reduce")):
        monkeypatch.setattr(module, name, recorded(module, name, name))
    for way in (fsdp.GatherDirectly, fsdp.SumDirectly):
        monkeypatch.setattr(way, "__call__", recorded(way, "__call__", way.__name__))
    return calls


def collectives(
    expert: int, replicate: int, compute: torch.dtype
) -> list[tuple[list[tuple[str, Any]], dict[str, Tensor]]]:
    """For each mode: the collectives of this rank in two steps of two micro-batches, and all gradients. The last rank's second
    micro-batch is empty."""
    results = []
    for mode in remat.MODES:
        config = config_of("shared_dense_tied")
        config.router.balance_over = "global"
        model = parallelize(
            config,
            ParallelConfig(remat=mode),
            make_meshes("cpu", expert, replicate),
            seed=2,
            device=CPU,
            compute=compute,
        )
        engine = FSDPEngine(model, torch.optim.SGD(model.parameters(), lr=0.0))
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = micro_batches(world, 2, True)[rank]
        with pytest.MonkeyPatch.context() as monkeypatch:
            calls = record_collectives(monkeypatch)
            for _ in range(2):
                for i, batch in enumerate(mine):
                    out = model(batch[:, :-1], batch[:, 1:])
                    engine.backward((out.loss + out.aux) / (world * 2 * SEQUENCE), last=i == 1)
        results.append((calls, {n: whole(p.grad) for n, p in model.named_parameters()}))
    return results


@pytest.mark.parametrize(("world", "expert", "replicate", "compute"), [
    (2, 2, 1, torch.float32), (2, 2, 1, torch.bfloat16), (4, 2, 2, torch.float32), (4, 2, 1, torch.bfloat16),
])  # fmt: skip
def test_every_rank_does_the_same_and_rows_travel_as_documented(
    world: int, expert: int, replicate: int, compute: torch.dtype, tmp_path: Path
) -> None:
    ranks = run_ranks(collectives, world, tmp_path, expert, replicate, compute)

    def count(calls: list[tuple[str, Any]], name: str) -> int:
        return sum(call[0] == name for call in calls)

    for results in ranks:
        (none, want), (selective, got_selective), (full, got_full) = results
        for i, calls in enumerate((none, selective, full)):
            assert calls == ranks[0][i][0]  # the same, in the same order, on every rank
        for name in ("all_reduce", "GatherDirectly", "SumDirectly"):
            assert count(selective, name) == count(full, name) == count(none, name) > 0, name
        # The rows' way out once more, of one layer in four passes: no counts, no router's weights, no way back.
        assert count(selective, "all_to_all_single") == count(none, "all_to_all_single")
        assert count(full, "all_to_all_single") == count(none, "all_to_all_single") + 4
        for got in (got_selective, got_full):
            assert max(differences(got, want).values()) < (1e-6 if compute is torch.float32 else 1e-2)
