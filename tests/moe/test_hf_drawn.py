"""Models of drawn shapes against transformers' own: eight of each family, whatever the family allows."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.moe.test_hf import EXPERTS, hold_to_transformers, tokens


def drawn(kind: str, seed: int) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """A tiny shape in the family's own fields, and (vocabulary, sequences, positions) of tokens for it.

    Left out is one expert a token with weights made to sum to 1: its router's gradient is 0, and only rounding would be compared.
    """
    rng = random.Random(f"{kind} {seed}")
    one_of, between = rng.choice, rng.randint
    kv_heads, shared_by = one_of([1, 2, 3]), one_of([1, 2, 3])
    heads, n_experts, layers = kv_heads * shared_by, between(2, 11), between(1, 3)
    theta = round(10 ** rng.uniform(2, 7), 1)
    changes: dict[str, Any] = dict(
        vocab_size=between(17, 90), hidden_size=between(9, 41), num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, tie_word_embeddings=one_of([True, False]), rms_norm_eps=one_of([1e-6, 1e-5, 1e-3]),
        rope_parameters=dict(rope_type="default", rope_theta=theta), intermediate_size=between(5, 27),
    )  # fmt: skip
    if one_of([True, False, False]):
        original, factor = between(4, 16), one_of([2.0, 3.5, 8.0])
        changes["rope_parameters"] = dict(
            rope_type="yarn", rope_theta=theta, factor=factor, original_max_position_embeddings=original,
            beta_fast=one_of([32.0, 4.0]), beta_slow=one_of([1.0, 0.5]),
        )  # fmt: skip
        changes["max_position_embeddings"] = int(original * factor)
    renormalize = kind == "mixtral" or one_of([True, False])
    fewest = 2 if renormalize else 1
    top_k = between(fewest, n_experts)
    changes |= dict(num_experts_per_tok=top_k)
    if kind == "olmoe":
        changes |= dict(hidden_size=heads * 2 * between(2, 5), num_experts=n_experts, norm_topk_prob=renormalize)
    elif kind == "mixtral":
        changes |= dict(head_dim=2 * between(2, 7), num_local_experts=n_experts)
    elif kind == "qwen3_moe":
        dense = list(range(between(0, layers - 1)))
        changes |= dict(
            head_dim=2 * between(2, 7), num_experts=n_experts, moe_intermediate_size=between(5, 23), norm_topk_prob=renormalize,
            mlp_only_layers=dense,
        )  # fmt: skip
    else:
        groups, of_a_group = between(1, 4), between(2, 4)
        kept = between(1, groups)
        changes |= dict(
            num_key_value_heads=heads, n_routed_experts=groups * of_a_group, n_group=groups, topk_group=kept,
            num_experts_per_tok=between(fewest, kept * of_a_group), norm_topk_prob=renormalize,
            routed_scaling_factor=one_of([1.0, 1.7, 2.5]), n_shared_experts=between(1, 3), moe_intermediate_size=between(5, 23),
            first_k_dense_replace=between(0, layers - 1), q_lora_rank=one_of([None, 7, 12]), kv_lora_rank=between(5, 19),
            qk_nope_head_dim=between(3, 9), qk_rope_head_dim=2 * between(1, 4), v_head_dim=between(3, 11),
            rope_interleave=one_of([True, False]),
        )  # fmt: skip
    if kind != "deepseek_v3":
        changes |= dict(router_aux_loss_coef=one_of([0.0, 0.01, 0.5]))
    return changes, (changes["vocab_size"], between(1, 3), between(3, 23))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", EXPERTS)
def test_equal_to_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    changes, batch = drawn(kind, seed)
    print(kind, changes, batch)
    hold_to_transformers(kind, changes, tokens(*batch), tmp_path)
