"""Parameter and FLOP formulas against published figures, transformers' models and torch's FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moesaic.moe.config import MLAConfig, ModelConfig, RouterConfig
from moesaic.moe.flops import flops_per_token, parameter_counts
from moesaic.moe.model import Transformer

QWEN3_30B = ModelConfig(
    vocab_size=151_936,
    d_model=2048,
    n_layers=48,
    n_heads=32,
    n_kv_heads=4,
    head_dim=128,
    n_experts=128,
    d_expert=768,
    qk_norm="head",
    router=RouterConfig(top_k=8),
)
QWEN3_235B = ModelConfig(
    vocab_size=151_936,
    d_model=4096,
    n_layers=94,
    n_heads=64,
    n_kv_heads=4,
    head_dim=128,
    n_experts=128,
    d_expert=1536,
    qk_norm="head",
    router=RouterConfig(top_k=8),
)
OLMOE_7B = ModelConfig(
    vocab_size=50_304,
    d_model=2048,
    n_layers=16,
    n_heads=16,
    n_experts=64,
    d_expert=1024,
    qk_norm="full",
    router=RouterConfig(top_k=8),
)
# Without its layer that predicts a second token.
DEEPSEEK_V3 = ModelConfig(
    vocab_size=129_280,
    d_model=7168,
    n_layers=61,
    attention="mla",
    mla=MLAConfig(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
    n_heads=128,
    n_experts=256,
    d_expert=2048,
    d_shared=2048,
    n_dense_layers=3,
    d_dense=18_432,
    router=RouterConfig(kind="sigmoid_bias", top_k=8, groups=8, groups_kept=4),
)


@pytest.mark.parametrize(
    ("config", "gflop"),
    [(QWEN3_30B, 23.08), (QWEN3_235B, 148.33), (DEEPSEEK_V3, 250.45)],
    ids=["30b", "235b", "deepseek"],
)
def test_flops_of_published_models(config: ModelConfig, gflop: float):
    """GFLOP per token at sequence length 4096, as published throughput and utilisation imply."""
    assert flops_per_token(config, 4096) / 1e9 == pytest.approx(gflop, rel=0.005)


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (QWEN3_30B, 30.5e9, 3.3e9),
        (QWEN3_235B, 235e9, 22e9),
        (OLMOE_7B, 6.92e9, 1.28e9),
        (DEEPSEEK_V3, 671.026404352e9, 37e9),
    ],
    ids=["30b", "235b", "olmoe", "deepseek"],
)
def test_counts_of_published_models(config: ModelConfig, total: float, active: float):
    counts = parameter_counts(config)
    assert counts.total == pytest.approx(total, rel=0.005)
    assert counts.active == pytest.approx(active, rel=0.02)
    assert counts.embedding == config.vocab_size * config.d_model


def qwen3(config: ModelConfig) -> PreTrainedModel:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_width,
            num_experts=config.n_experts,
            num_experts_per_tok=config.router.top_k,
            moe_intermediate_size=config.d_expert,
            intermediate_size=config.d_dense,
            mlp_only_layers=list(range(config.n_dense_layers)),
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    )


def olmoe(config: ModelConfig) -> PreTrainedModel:
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            num_experts=config.n_experts,
            num_experts_per_tok=config.router.top_k,
            intermediate_size=config.d_expert,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    )


def deepseek(config: ModelConfig) -> PreTrainedModel:
    mla = config.mla
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_heads,
            q_lora_rank=mla.q_lora_rank,
            kv_lora_rank=mla.kv_lora_rank,
            qk_nope_head_dim=mla.qk_nope_head_dim,
            qk_rope_head_dim=mla.qk_rope_head_dim,
            v_head_dim=mla.v_head_dim,
            n_routed_experts=config.n_experts,
            n_shared_experts=config.d_shared // config.d_expert,
            num_experts_per_tok=config.router.top_k,
            n_group=config.router.groups,
            topk_group=config.router.groups_kept,
            moe_intermediate_size=config.d_expert,
            intermediate_size=config.d_dense,
            first_k_dense_replace=config.n_dense_layers,
            num_nextn_predict_layers=0,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    )


def small(**overrides: object) -> ModelConfig:
    shape = {
        "vocab_size": 61,
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "n_experts": 5,
        "d_expert": 40,
        "router": RouterConfig(top_k=2),
    }
    return ModelConfig(**(shape | overrides))  # type: ignore[arg-type]


def small_mla(q_lora_rank: int | None) -> ModelConfig:
    return small(
        attention="mla", n_kv_heads=None, n_experts=6, d_shared=80, n_dense_layers=1, d_dense=96,
        mla=MLAConfig(q_lora_rank=q_lora_rank, kv_lora_rank=22, qk_nope_head_dim=18, qk_rope_head_dim=6, v_head_dim=14),
        router=RouterConfig(kind="sigmoid_bias", top_k=2, groups=2, groups_kept=1),
    )  # fmt: skip


MODELS = [
    (deepseek, small_mla(None)),
    (deepseek, small_mla(26)),
    (qwen3, small(qk_norm="head", head_dim=24)),
    (qwen3, small(qk_norm="head", n_dense_layers=1, d_dense=96)),
    (qwen3, small(qk_norm="head", tie_embeddings=True)),
    (olmoe, small(qk_norm="full")),
]


@pytest.mark.parametrize(("build", "config"), MODELS)
def test_total_matches_a_built_model(build, config: ModelConfig):
    with torch.device("meta"):
        model = build(config)
    assert parameter_counts(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("build", "config"), MODELS)
def test_flops_match_what_a_training_step_executes(build, config: ModelConfig):
    """Eager attention computes the whole square, so the counter sees the half above the diagonal that we leave out."""
    batch, seq_len = 2, 32
    model = build(config)
    tokens = torch.randint(config.vocab_size, (batch, seq_len))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.sum().backward()
    mla = config.mla
    head = mla.qk_head_dim + mla.v_head_dim if config.attention == "mla" else 2 * config.head_width
    masked = 3 * config.n_layers * 2 * seq_len * config.n_heads * head / 2
    ours = batch * seq_len * (flops_per_token(config, seq_len) + masked)
    # The rotary embedding's table is a tiny matrix product there.
    assert counter.get_total_flops() == pytest.approx(ours, rel=1e-4)


def test_shared_expert_counts_once_a_moe_layer():
    without, shared = small(n_dense_layers=1, d_dense=96), small(n_dense_layers=1, d_dense=96, d_shared=48)
    added = 2 * 3 * 64 * 48
    assert parameter_counts(shared).total - parameter_counts(without).total == added
    assert parameter_counts(shared).active - parameter_counts(without).active == added
    assert flops_per_token(shared, 8) - flops_per_token(without, 8) == 6 * added


def test_idle_experts_are_not_active():
    counts = parameter_counts(small())
    assert counts.total - counts.active == 3 * (5 - 2) * 3 * 64 * 40


@pytest.mark.parametrize("expert_bias", [False, True])
@pytest.mark.parametrize(("activation", "matrices"), [("geglu", 3), ("relu2", 2)])
def test_experts_of_every_kind_are_counted(activation: str, matrices: int, expert_bias: bool):
    config = small(activation=activation, expert_bias=expert_bias)
    counts = parameter_counts(config)
    with torch.device("meta"):
        model = Transformer(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    bias = (64 + (matrices - 1) * 40) * expert_bias
    assert counts.total - counts.active == 3 * (5 - 2) * (matrices * 64 * 40 + bias)
    assert flops_per_token(config, 8) - flops_per_token(small(), 8) == 6 * 3 * 2 * (matrices - 3) * 64 * 40


@pytest.mark.parametrize(
    ("name", "published"),
    # GFLOP a token that throughputs and TFLOPS published by Megatron-Bridge come to (benchmarks/published_throughput.csv): the
    # middle of what its rows without multi-token prediction give.
    [("qwen3_235b", 148.0), ("deepseek_v3", 249.6)],
)
def test_published_flops(name, published):
    from moesaic.launch import cli

    model = cli.compose([f"recipe={name}"]).model
    assert flops_per_token(model, 4096) / 1e9 == pytest.approx(published, rel=0.01)
