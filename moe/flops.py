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
    """Count the parameters of `Transformer(config)`."""
    embedding = config.vocab_size * config.d_model
    head = 0 if config.tie_embeddings else embedding
    qk_norm = {
        "none": 0,
        "head": 2 * config.head_width,
        "full": (config.n_heads + config.kv_heads) * config.head_width,
    }[config.qk_norm]
    norms = config.n_layers * (2 * config.d_model + qk_norm) + config.d_model
    n_moe_layers = config.n_layers - config.n_dense_layers
    idle = n_moe_layers * (config.n_experts - config.router.top_k) * 3 * config.d_model * config.d_expert
    active = embedding + _active_block_matrices(config) + norms + head
    return Counts(total=active + idle, active=active, embedding=embedding)


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations that training costs per token of a sequence of `seq_len` tokens.

    The usual convention of model FLOPs: 2 per multiply-add, backward twice the forward, so 6 for each matrix parameter
    a token meets (router and output head included, the embedding lookup not), and attention's two products (QK^T and
    PV) over half of the sequence, for the causal mask. Norms, softmax and recomputation do not count.
    """
    matrices = _active_block_matrices(config) + config.vocab_size * config.d_model
    attention_forward = 4 * seq_len * config.n_heads * config.head_width / 2
    return 6.0 * matrices + 3.0 * config.n_layers * attention_forward


def _active_block_matrices(config: ModelConfig) -> int:
    """Matrix parameters of all blocks that one token meets: attention, router, K experts, shared expert, dense part."""
    d_model = config.d_model
    attention = 2 * d_model * config.head_width * (config.n_heads + config.kv_heads)
    experts = 3 * d_model * (config.router.top_k * config.d_expert + config.d_shared)
    router = config.n_experts * d_model
    n_moe_layers = config.n_layers - config.n_dense_layers
    dense = config.n_dense_layers * 3 * d_model * config.d_dense
    return config.n_layers * attention + n_moe_layers * (router + experts) + dense
