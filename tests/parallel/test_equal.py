"""A model spread over ranks computes what one process computes: loss, every gradient, the norm, the weights after steps.

The reference replays the ranks' micro-batches in turn on one process, for each is a routing domain of its own.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.model import build
from moesaic.parallel.apply import parallelize
from moesaic.parallel.clip import clip_gradients
from moesaic.parallel.mesh import make_meshes
from tests.parallel.ranks import run_ranks

CPU = torch.device("cpu")
SEQUENCE = 13

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared_dense_tied": dict(
        d_shared=24, n_dense_layers=1, d_dense=40, tie_embeddings=True, n_kv_heads=2, qk_norm="full"
    ),
    "top1_renormalized": dict(router=RouterConfig(top_k=1, renormalize=True), qk_norm="head"),
    "all_experts": dict(router=RouterConfig(top_k=4)),
}


def config_of(shape: str) -> ModelConfig:
    base: dict[str, Any] = dict(
        vocab_size=61,
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_experts=4,
        d_expert=20,
        init_std=0.1,
        router=RouterConfig(top_k=2),
    )
    return ModelConfig(**(base | SHAPES[shape]))


def micro_batches(world: int, accumulation: int, unequal: bool) -> list[list[Tensor]]:
    """[rank][micro-batch] of tokens (B, SEQUENCE + 1); unequal: the last rank's are smaller, its last one empty."""
    generator = torch.Generator().manual_seed(11)
    sizes = [[2] * accumulation for _ in range(world)]
    if unequal:
        sizes[-1] = [1] * (accumulation - 1) + [0]
    return [[torch.randint(0, 61, (n, SEQUENCE + 1), generator=generator) for n in row] for row in sizes]


def backward(model: Any, batches: list[Tensor], all_tokens: int) -> Tensor:
    """Adds gradients of these micro-batches; returns their part of the loss with auxiliary terms."""
    total = torch.zeros(())
    for batch in batches:
        out = model(batch[:, :-1], batch[:, 1:])
        loss = out.loss / all_tokens + out.aux * (batch.shape[0] * SEQUENCE / all_tokens)
        loss.backward()
        total += loss.detach()
    return total


def train(model: Any, batches: list[Tensor], all_tokens: int, clip: Any) -> dict[str, Any]:
    """Three AdamW steps on the same batch; gradients of the first."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-2, eps=1e-3
    )  # at eps 1e-8 rounding noise is divided by itself
    result: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(3):
        result["losses"].append(backward(model, batches, all_tokens))
        if step == 0:
            result["gradients"] = {n: whole(p.grad) for n, p in model.named_parameters()}
        result["norms"].append(clip(model))
        optimizer.step()
        optimizer.zero_grad()
    result["weights"] = {n: whole(p.detach()) for n, p in model.named_parameters()}
    return result


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def spread(cases: list[tuple[str, int, int, bool]]) -> list[dict[str, Any]]:
    """On each rank: the results of all cases, losses summed over ranks."""
    results = []
    for shape, expert, accumulation, unequal in cases:
        rank, world = dist.get_rank(), dist.get_world_size()
        batches = micro_batches(world, accumulation, unequal)
        tokens = sum(b.shape[0] for row in batches for b in row) * SEQUENCE
        path = "local" if expert == 1 and shape == "plain" else "all_to_all"
        model = parallelize(
            config_of(shape), make_meshes("cpu", expert), path, seed=2, device=CPU, compute=torch.float32
        )
        result = train(model, batches[rank], tokens, lambda m: clip_gradients(m.parameters(), 0.5))
        losses = torch.stack(result["losses"])
        dist.all_reduce(losses)
        results.append(result | {"losses": losses, "norms": torch.stack(result["norms"])})
    return results


def alone(shape: str, world: int, accumulation: int, unequal: bool) -> dict[str, Any]:
    batches = [batch for row in micro_batches(world, accumulation, unequal) for batch in row]
    tokens = sum(b.shape[0] for b in batches) * SEQUENCE
    model = build(config_of(shape), 2, CPU)
    result = train(model, batches, tokens, lambda m: torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5))
    return result | {"losses": torch.stack(result["losses"]), "norms": torch.stack(result["norms"])}


CASES = {
    1: [("plain", 1, 1, False)],
    2: [("plain", 1, 1, False), ("plain", 2, 1, False), ("shared_dense_tied", 2, 2, False), ("shared_dense_tied", 1, 1, True),
        ("top1_renormalized", 2, 2, True), ("all_experts", 2, 1, True)],
    4: [("plain", 1, 1, False), ("plain", 2, 1, True), ("shared_dense_tied", 2, 2, False), ("plain", 4, 1, False)],
}  # fmt: skip


@pytest.mark.parametrize("world", CASES)
def test_equal_to_one_process(world: int, tmp_path: Path) -> None:
    ranks = run_ranks(spread, world, tmp_path, CASES[world])
    for i, (shape, expert, accumulation, unequal) in enumerate(CASES[world]):
        case = f"{shape} expert={expert} accumulation={accumulation} unequal={unequal}"
        want = alone(shape, world, accumulation, unequal)
        for rank, results in enumerate(ranks):
            got = results[i]
            torch.testing.assert_close(
                got["losses"], want["losses"], rtol=1e-5, atol=0, msg=lambda m, c=case: f"{c}: {m}"
            )
            torch.testing.assert_close(
                got["norms"], want["norms"], rtol=1e-5, atol=0, msg=lambda m, c=case: f"{c}: {m}"
            )
            for kind in ("gradients", "weights"):
                assert got[kind].keys() == want[kind].keys()
                for name, value in want[kind].items():
                    error = (got[kind][name] - value).abs().max() / value.abs().max()
                    assert error < 1e-5, (case, rank, kind, name, error)
            # What is gathered is the same on all ranks, to the bit.
            assert all(torch.equal(got["weights"][n], ranks[0][i]["weights"][n]) for n in got["weights"])


def in_bf16() -> tuple[Tensor, dict[str, Tensor], set[torch.dtype]]:
    batch = micro_batches(2, 1, False)[dist.get_rank()]
    model = parallelize(
        config_of("plain"), make_meshes("cpu", 2), "all_to_all", seed=2, device=CPU, compute=torch.bfloat16
    )
    loss = backward(model, batch, 4 * SEQUENCE)
    dist.all_reduce(loss)
    kinds = {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()}
    return loss, {n: whole(p.grad) for n, p in model.named_parameters()}, kinds


def test_bf16_products_with_fp32_weights(tmp_path: Path) -> None:
    """What CUDA runs by default: products in bf16, everything that is kept or summed in fp32."""
    want = alone("plain", 2, 1, False)
    for loss, gradients, kinds in run_ranks(in_bf16, 2, tmp_path):
        assert kinds == {torch.float32}
        assert abs(loss / want["losses"][0] - 1) < 0.01
        for name, value in want["gradients"].items():
            error = (gradients[name] - value).norm() / value.norm()
            # One flipped top-K choice among 52 tokens moves a gradient this much; a wrong scale would be 1.
            assert 1e-6 < error < 0.2, (name, error)
