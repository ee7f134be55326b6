"""Small models and micro-batches that the tests of ranks share."""

from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.rounding import RULES
from moesaic.moe.config import ModelConfig, RouterConfig

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


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()
