"""How many parameters a model has and how much arithmetic a token costs, by formula: no model is built.

D model width, F expert width, E experts in all, K experts per token, V vocabulary, L layers.
"""

from dataclasses import dataclass

from moesaic.moe.config import ModelConfig


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    total      all of them, norms and embedding included; a tied output head is counted once
    active     those that one token uses: `total` without the E - K experts of a layer that it is not sent to
    embedding  the input embedding, V * D
    """

    total: int
    active: int
    embedding: int


def parameter_counts(config: ModelConfig) -> Counts:
    """Count the parameters of `Transformer(config)`. The bias of a sigmoid router is none: no gradient changes it."""
    embedding = config.vocab_size * config.d_model
    head = 0 if config.tie_embeddings else embedding
    norms = config.n_layers * (2 * config.d_model + _attention_norms(config)) + config.d_model
    n_moe_layers = config.n_layers - config.n_dense_layers
    # The biases of an expert; the K experts of a token are among `active`, the others are not.
    biases = (_expert_ups(config) * config.d_expert + config.d_model) * config.expert_bias
    idle = n_moe_layers * (config.n_experts - config.router.top_k) * (_expert_matrices(config) + biases)
    active = embedding + _active_block_matrices(config) + n_moe_layers * config.router.top_k * biases + norms + head
    return Counts(total=active + idle, active=active, embedding=embedding)


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations that training costs per token of a sequence of `seq_len` tokens.

    The usual convention of model FLOPs: 2 per multiply-add, backward twice the forward, so 6 for each matrix parameter
    a token meets (router and output head included, the embedding lookup not), and attention's two products (QK^T and
    PV) over half of the sequence, for the causal mask. Norms, biases, softmax and recomputation do not count, and neither
    does what a document mask saves, which depends on the data.
    """
    matrices = _active_block_matrices(config) + config.vocab_size * config.d_model
    mla = config.mla
    head = mla.qk_head_dim + mla.v_head_dim if config.attention == "mla" else 2 * config.head_width
    attention_forward = 2 * seq_len * config.n_heads * head / 2
    return 6.0 * matrices + 3.0 * config.n_layers * attention_forward


def _active_block_matrices(config: ModelConfig) -> int:
    """Matrix parameters of all blocks that one token meets: attention, router, K experts, shared expert, dense part."""
    d_model = config.d_model
    experts = config.router.top_k * _expert_matrices(config) + 3 * d_model * config.d_shared
    router = config.n_experts * d_model
    n_moe_layers = config.n_layers - config.n_dense_layers
    dense = config.n_dense_layers * 3 * d_model * config.d_dense
    return config.n_layers * _attention_matrices(config) + n_moe_layers * (router + experts) + dense


def _attention_matrices(config: ModelConfig) -> int:
    """Matrix parameters of one attention layer."""
    d_model, heads, mla = config.d_model, config.n_heads, config.mla
    if config.attention == "gqa":
        return 2 * d_model * config.head_width * (heads + config.kv_heads)
    queries = heads * mla.qk_head_dim
    made = d_model * queries if mla.q_lora_rank is None else mla.q_lora_rank * (d_model + queries)
    latent = d_model * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    from_latent = mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return made + latent + from_latent + heads * mla.v_head_dim * d_model


def _attention_norms(config: ModelConfig) -> int:
    """Parameters of the norms inside one attention layer."""
    if config.attention == "mla":
        return config.mla.kv_lora_rank + (config.mla.q_lora_rank or 0)
    heads = {"none": 0, "head": 2, "full": config.n_heads + config.kv_heads}[config.qk_norm]
    return heads * config.head_width


def _expert_matrices(config: ModelConfig) -> int:
    """Matrix parameters of one routed expert."""
    return (_expert_ups(config) + 1) * config.d_model * config.d_expert


def _expert_ups(config: ModelConfig) -> int:
    return 1 if config.activation == "relu2" else 2
