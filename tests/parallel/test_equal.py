"""A model spread over ranks computes what one process computes: loss, every gradient, the norm, the weights after steps.

The reference replays the ranks' micro-batches in turn on one process, for each is a routing domain of its own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.kernels.rounding import RULES
from moesaic.moe.balance import update_bias
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.model import build
from moesaic.parallel.apply import parallelize, total
from moesaic.parallel.clip import clip_gradients
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.fsdp import FSDPEngine
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
    "sigmoid_bias": dict(router=RouterConfig(
        kind="sigmoid_bias", groups=2, groups_kept=1, renormalize=True, scale=2.5, bias_rate=0.05, balance_over="sequence",
    )),
    "expert_choice": dict(router=RouterConfig(kind="expert_choice", renormalize=True)),
    "capacity": dict(router=RouterConfig(capacity_factor=0.8, balance_over="global", balance_coef=0.1)),
    "global_and_biases": dict(
        router=RouterConfig(balance_over="global", balance_coef=0.1), expert_bias=True, activation="relu2"
    ),
    "layers": dict(router=RouterConfig(balance_over="layers", balance_coef=0.1)),
    # Three experts a rank over two or four ranks that shard them: no dimension of w_up divides.
    "odd": dict(n_experts=6, d_expert=21, d_model=34, n_heads=1, activation="relu2", expert_bias=True),
} | {
    rule: dict(router=RouterConfig(rounding=rule, rounding_tile=4, renormalize=rule in ("up", "score")))
    for rule in RULES
}  # fmt: skip


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


Send = Callable[[Tensor, bool], None]


def backward(
    model: Any, batches: dict[int, list[Tensor]], all_tokens: int, step: int = 0, send: Send | None = None
) -> list[Tensor]:
    """Adds gradients of the micro-batches of these ranks, by `send(loss, last)`. Returns their part of the loss with auxiliary
    terms, of the rows per expert and of the routing figures."""
    sums: list[Tensor] = []
    for rank, mine in batches.items():
        torch.manual_seed(100 * rank + step)  # rules of chance draw from each rank's own generator
        for i, batch in enumerate(mine):
            model.micro_batch = i  # for `replayed`
            out = model(batch[:, :-1], batch[:, 1:])
            loss = out.loss / all_tokens + out.aux * (batch.shape[0] * SEQUENCE / all_tokens)
            if send:
                send(loss, i == len(mine) - 1)
            else:
                loss.backward()
            parts = [loss.detach(), out.counts, out.figures]
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    return sums


def train(
    model: Any, batches: dict[int, list[Tensor]], all_tokens: int, clip: Any, total: Any, prepare: Any = None,
    send: Send | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Three AdamW steps on the same batch; gradients of the first. `total` sums over ranks; `prepare(step)` precedes a step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-2, eps=1e-3
    )  # at eps 1e-8 rounding noise is divided by itself
    result: dict[str, Any] = {"losses": [], "norms": [], "counts": [], "figures": []}
    for step in range(3):
        if prepare:
            prepare(step)
        loss, counts_LE, figures_LF = (total(part) for part in backward(model, batches, all_tokens, step, send))
        for key, value in (("losses", loss), ("counts", counts_LE), ("figures", figures_LF)):
            result[key].append(value)
        if step == 0:
            result["gradients"] = {n: whole(p.grad) for n, p in model.named_parameters()}
        result["norms"].append(clip(model))
        optimizer.step()
        optimizer.zero_grad()
        if model.config.router.kind == "sigmoid_bias":
            update_bias(model, counts_LE)
    result["weights"] = {n: whole(p.detach()) for n, p in [*model.named_parameters(), *model.named_buffers()]}
    named = list(model.named_parameters())
    result["moments"] = {f"{m}.{n}": whole(optimizer.state[p][m]) for n, p in named for m in ("exp_avg", "exp_avg_sq")}
    return result | {key: torch.stack(result[key]) for key in ("losses", "norms", "counts", "figures")}


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


class Case(NamedTuple):
    shape: str
    expert: int = 1
    accumulation: int = 1
    unequal: bool = False
    replicate: int = 1
    reshard: str = "auto"


def spread(cases: list[Case]) -> list[dict[str, Any]]:
    """On each rank: the results of all cases, losses, rows and figures summed over ranks."""
    results = []
    for case in cases:
        rank, world = dist.get_rank(), dist.get_world_size()
        batches = micro_batches(world, case.accumulation, case.unequal)
        tokens = sum(b.shape[0] for row in batches for b in row) * SEQUENCE
        path = "local" if case.expert == 1 and case.shape == "plain" else "all_to_all"
        model = parallelize(
            config_of(case.shape),
            ParallelConfig(expert_path=path, reshard=case.reshard),
            make_meshes("cpu", case.expert, case.replicate),
            seed=2,
            device=CPU,
            compute=torch.float32,
        )

        def clip(model: Any) -> Tensor:
            return clip_gradients(model.parameters(), 0.5)

        engine = FSDPEngine(model, None)  # type: ignore[arg-type]
        with torch.no_grad():  # as an evaluation would: it leaves no weights behind that a step does not change
            model(batches[rank][0][:, :-1])
        engine.rest()
        assert all(hasattr(p, "full_tensor") for p in model.parameters())
        send = engine.backward
        results.append(train(model, {rank: batches[rank]}, tokens, clip, total, send=send))
    return results


def replayed(model: Any, batches: dict[int, list[Tensor]], step: int) -> None:
    """Puts in place of each layer's `reduce` the rows per expert that all ranks together route in a micro-batch."""
    rows: dict[int, Tensor] = {}
    with torch.no_grad():
        for rank, mine in batches.items():
            torch.manual_seed(100 * rank + step)
            for i, batch in enumerate(mine):
                counts_LE = model(batch[:, :-1], batch[:, 1:]).counts
                rows[i] = rows[i] + counts_LE if i in rows else counts_LE
    for i, layer in enumerate(model.moe_layers()):
        layer.reduce = lambda counts_E, i=i: rows[model.micro_batch][i]


def alone(shape: str, world: int, accumulation: int, unequal: bool) -> dict[str, Any]:
    batches = dict(enumerate(micro_batches(world, accumulation, unequal)))
    tokens = sum(b.shape[0] for row in batches.values() for b in row) * SEQUENCE
    model = build(config_of(shape), 2, CPU)

    def clip(model: Any) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)

    return train(model, batches, tokens, clip, lambda value: value, lambda step: replayed(model, batches, step))


CASES = {
    1: [Case("plain")],
    2: [Case("plain"), Case("plain", 2), Case("shared_dense_tied", 2, 2), Case("shared_dense_tied", 1, 1, True),
        Case("top1_renormalized", 2, 2, True), Case("all_experts", 2, 1, True), Case("sigmoid_bias", 2, 2, True),
        Case("sigmoid_bias", 1, 1, True), Case("expert_choice", 2, 2, True), Case("capacity", 2, 2, True),
        Case("global_and_biases", 2, 2, True), Case("layers", 2, 1, True), Case("plain", 1, 2, True, replicate=2),
        Case("shared_dense_tied", 1, 2, reshard="never"), Case("plain", 2, 2, reshard="always"),
        *(Case(rule, 2, 2, True) for rule in RULES)],
    4: [Case("plain"), Case("plain", 2, 1, True), Case("shared_dense_tied", 2, 2), Case("plain", 4), Case("odd", 2),
        Case("plain", 1, 2, True, replicate=2), Case("shared_dense_tied", 2, 2, True, replicate=2),
        Case("plain", 4, 2, replicate=2), Case("odd", 1, replicate=4), Case("odd", 2, 2, True, replicate=4)],
}  # fmt: skip


@pytest.mark.parametrize("world", CASES)
def test_equal_to_one_process(world: int, tmp_path: Path) -> None:
    ranks = run_ranks(spread, world, tmp_path, CASES[world])
    for i, case in enumerate(CASES[world]):
        want = alone(case.shape, world, case.accumulation, case.unequal)
        for rank, results in enumerate(ranks):
            got = results[i]
            assert torch.equal(got["counts"], want["counts"]), case
            for kind in ("losses", "norms", "figures"):
                torch.testing.assert_close(
                    got[kind], want[kind], rtol=1e-5, atol=0, msg=lambda m, k=kind: f"{case}: {k}: {m}"
                )
            for kind in ("gradients", "weights", "moments"):
                assert got[kind].keys() == want[kind].keys()
                for name, value in want[kind].items():
                    error = (got[kind][name] - value).abs().max() / value.abs().max()
                    assert error < 1e-5, (case, rank, kind, name, error)
            # What is gathered is the same on all ranks, to the bit.
            assert all(torch.equal(got["weights"][n], ranks[0][i]["weights"][n]) for n in got["weights"])


def in_bf16() -> tuple[Tensor, dict[str, Tensor], set[torch.dtype]]:
    rank = dist.get_rank()
    model = parallelize(
        config_of("plain"), ParallelConfig(), make_meshes("cpu", 2), seed=2, device=CPU, compute=torch.bfloat16
    )
    tables: set[torch.dtype] = set()
    model.blocks[0].attention.register_forward_pre_hook(lambda _, inputs: tables.update(t.dtype for t in inputs[1:3]))
    loss = total(backward(model, {rank: micro_batches(2, 1, False)[rank]}, 4 * SEQUENCE)[0])
    assert tables == {torch.float32}  # angles of far positions need it
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
