"""The shape of a model: everything that must be known to build it, and nothing about how it is run.

Every dataclass checks itself when it is made and raises `ValueError` with one line that names the knob as a user writes
it on the command line (`model.router.top_k`), its value and the rule it broke.
"""

import math
from dataclasses import dataclass, field

ROUTERS = ("softmax_topk", "sigmoid_bias", "expert_choice")
ROUNDINGS = ("none", "nearest", "stochastic", "score", "balance", "up", "down")
BALANCES = ("micro_batch", "sequence", "global", "layers")
ATTENTIONS = ("gqa", "mla")
ACTIVATIONS = ("swiglu", "geglu", "reglu", "relu2")
BACKENDS = ("auto", "triton", "torch", "reference")


def require(ok: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `ok`: a user's mistake, told in one line."""
    if not ok:
        raise ValueError(message)


@dataclass
class RouterConfig:
    """How a token chooses its experts; see moesaic.moe.router.

    kind             softmax_topk, sigmoid_bias (DeepSeek-V3) or expert_choice (training only)
    top_k            K, experts per token (of expert_choice: on average)
    renormalize      divide the weights of a token by their sum (Mixtral, Qwen3-MoE, DeepSeek-V3 do; OLMoE does not)
    scale            factor on all weights (DeepSeek-V3: 2.5)
    groups           sigmoid_bias: experts in groups of equal size
    groups_kept      of these, the best, whose experts a token chooses from
    bias_rate        sigmoid_bias: step of the bias that evens out the load (0: the bias stays)
    capacity_factor  most rows of an expert, in units of T * K / E; the lowest scores are dropped (0: dropless)
    rounding         make every expert's rows a multiple of the kernel's tile: none, nearest, stochastic, score, balance, up, down
    rounding_tile    rows of that tile (null: of the kernel that will run, from moesaic.kernels.tiles)
    balance_over     the tokens of one balance loss: micro_batch, sequence, global (those of all ranks at once) or layers (the
                     micro-batch in all layers at once, one loss for all)
    balance_coef     weight of the load-balance loss E * sum_e(share of rows_e * mean probability_e), per layer, averaged
    z_coef           weight of the router z-loss mean(logsumexp(logits)^2) (ST-MoE, arXiv 2202.08906)
    """

    kind: str = "softmax_topk"
    top_k: int = 2
    renormalize: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    bias_rate: float = 0.001
    capacity_factor: float = 0.0
    rounding: str = "none"
    rounding_tile: int | None = None
    balance_over: str = "micro_batch"
    balance_coef: float = 0.01
    z_coef: float = 0.001

    def __post_init__(self) -> None:
        for name, choices in (("kind", ROUTERS), ("rounding", ROUNDINGS), ("balance_over", BALANCES)):
            value = getattr(self, name)
            require(value in choices, f"model.router.{name}={value}: must be one of {', '.join(choices)}")
        require(self.top_k >= 1, f"model.router.top_k={self.top_k}: must be at least 1")
        require(self.scale > 0, f"model.router.scale={self.scale}: must be positive")
        require(self.rounding_tile is None or self.rounding_tile >= 1,
                f"model.router.rounding_tile={self.rounding_tile}: must be at least 1, or null")  # fmt: skip
        for name in ("bias_rate", "capacity_factor", "balance_coef", "z_coef"):
            require(getattr(self, name) >= 0, f"model.router.{name}={getattr(self, name)}: must not be negative")
        require(1 <= self.groups_kept <= self.groups,
                f"model.router.groups_kept={self.groups_kept}: must lie in 1..model.router.groups={self.groups}")  # fmt: skip
        require(self.groups == 1 or self.kind == "sigmoid_bias",
                f"model.router.groups={self.groups}: works with model.router.kind=sigmoid_bias, not {self.kind}")  # fmt: skip
        require(self.capacity_factor == 0 or self.rounding == "none",
                f"model.router.rounding={self.rounding}: can't be joined with "
                f"model.router.capacity_factor={self.capacity_factor}")  # fmt: skip
        require(self.groups == 1 or self.rounding == "none",
                f"model.router.rounding={self.rounding}: would send tokens outside their groups; needs "
                f"model.router.groups=1, not {self.groups}")  # fmt: skip
        require(self.kind != "expert_choice" or (self.rounding == "none" and self.capacity_factor == 0),
                "model.router.kind=expert_choice: gives every expert the same number of rows; leave "
                f"model.router.rounding={self.rounding} at none and "
                f"model.router.capacity_factor={self.capacity_factor} at 0")  # fmt: skip


@dataclass
class MLAConfig:
    """Multi-head latent attention, in the published names; in brackets the values of DeepSeek-V3 (arXiv 2412.19437).

    q_lora_rank       width of the latent that queries are made from (1536; null: straight from the residual stream)
    kv_lora_rank      width of the latent that keys and values are made from (512)
    qk_nope_head_dim  width of the part of a head's query and key that knows no position (128)
    qk_rope_head_dim  width of the rotated part, whose key all heads share (64)
    v_head_dim        width of a head's value (128)
    rope_interleave   rotated pairs are neighbours, as in DeepSeek's weights; false: the two halves, as in Llama's
    """

    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_interleave: bool = True

    def __post_init__(self) -> None:
        for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.mla.{name}={value}: must be at least 1")
        require(self.qk_rope_head_dim % 2 == 0,
                f"model.mla.qk_rope_head_dim={self.qk_rope_head_dim}: must be even, for the rotary embedding")  # fmt: skip

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass
class YarnConfig:
    """A longer context by slower rotation (YaRN, arXiv 2309.00071), in the published names; see moesaic.moe.attention.

    factor                            how many times longer (1: no change)
    original_max_position_embeddings  positions of the model before
    beta_fast, beta_slow              pairs that turn more often than beta_fast within these stay, less than beta_slow slow down
                                      by the factor, and those between do in part
    mscale, mscale_all_dim            with m(x) = 1 + 0.1 x ln(factor): the rotated parts grow by m(mscale) / m(mscale_all_dim),
                                      and the scores of MLA by m(mscale_all_dim)^2
    """

    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        require(self.factor >= 1, f"model.yarn.factor={self.factor}: must be at least 1")
        require(self.original_max_position_embeddings >= 1,
                f"model.yarn.original_max_position_embeddings={self.original_max_position_embeddings}: "
                "must be at least 1")  # fmt: skip
        require(0 < self.beta_slow < self.beta_fast,
                f"model.yarn.beta_slow={self.beta_slow}: must lie between 0 and "
                f"model.yarn.beta_fast={self.beta_fast}")  # fmt: skip
        for name in ("mscale", "mscale_all_dim"):
            require(getattr(self, name) >= 0, f"model.yarn.{name}={getattr(self, name)}: must not be negative")


@dataclass
class ModelConfig:
    """A decoder-only Mixture-of-Experts transformer.

    vocab_size      V; at least the number of tokens of the tokenizer
    d_model         D, width of the residual stream
    n_layers        L, blocks in all, the leading dense ones included
    attention       gqa: grouped queries, of n_heads, n_kv_heads, head_dim and qk_norm; mla: latent keys and values, of
                    n_heads and model.mla
    n_heads         query heads
    n_kv_heads      of keys and values (null: n_heads); must divide n_heads
    head_dim        width of one head (null: d_model / n_heads); even, for the rotary embedding
    document_mask   a token of a packed sequence sees its own document only; false: all that stands before it
    n_experts       E, routed experts of a layer
    d_expert        F, width of one routed expert
    activation      of the experts: swiglu, geglu, reglu (gated, two matrices up) or relu2 (one)
    expert_bias     biases in the routed experts
    experts_backend triton: the kernels, which a CPU interprets, slowly; torch; reference: plain and slow, the specification;
                    auto: triton on a GPU whose tiles are known, else torch
    chunk_mib       most MiB of one temporary of the experts' outputs on a GPU, which are made in column chunks of that size
    d_shared        width of the shared expert that every token passes through (0: none)
    n_dense_layers  leading blocks with a dense feed-forward instead of experts
    d_dense         width of that one
    qk_norm         RMSNorm on queries and keys: none, head (each head by itself, Qwen3) or full (all heads together, OLMoE)
    rope_theta      base of the rotary embedding's wavelengths
    norm_eps        added to the mean square in RMSNorm
    tie_embeddings  the output head is the embedding matrix
    init_std        standard deviation of the initial weights; output projections get init_std / sqrt(2 L)
    """

    vocab_size: int = 320
    d_model: int = 256
    n_layers: int = 4
    attention: str = "gqa"
    n_heads: int = 4
    n_kv_heads: int | None = None
    head_dim: int | None = None
    document_mask: bool = True
    n_experts: int = 8
    d_expert: int = 256
    activation: str = "swiglu"
    expert_bias: bool = False
    experts_backend: str = "auto"
    chunk_mib: int = 256
    d_shared: int = 0
    n_dense_layers: int = 0
    d_dense: int = 0
    qk_norm: str = "none"
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    mla: MLAConfig = field(default_factory=MLAConfig)
    yarn: YarnConfig = field(default_factory=YarnConfig)
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_experts", "d_expert"):
            require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)}: must be at least 1")
        for name in ("d_shared", "n_dense_layers", "d_dense"):
            require(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)}: must not be negative")
        require(0 < self.rope_theta < math.inf, f"model.rope_theta={self.rope_theta}: must be positive")
        for name in ("norm_eps", "init_std"):
            require(0 <= getattr(self, name) < math.inf,
                    f"model.{name}={getattr(self, name)}: must not be negative")  # fmt: skip
        require(self.router.top_k <= self.n_experts,
                f"model.router.top_k={self.router.top_k}: must not exceed model.n_experts={self.n_experts}")  # fmt: skip
        require(self.activation in ACTIVATIONS,
                f"model.activation={self.activation}: must be one of {', '.join(ACTIVATIONS)}")  # fmt: skip
        require(self.experts_backend in BACKENDS,
                f"model.experts_backend={self.experts_backend}: must be one of {', '.join(BACKENDS)}")  # fmt: skip
        require(self.chunk_mib >= 1, f"model.chunk_mib={self.chunk_mib}: must be at least 1")
        r = self.router
        require(self.n_experts % r.groups == 0,
                f"model.router.groups={r.groups}: must divide model.n_experts={self.n_experts}")  # fmt: skip
        require(self.n_experts // r.groups * r.groups_kept >= r.top_k,
                f"model.router.groups_kept={r.groups_kept}: leaves {self.n_experts // r.groups * r.groups_kept} experts for "
                f"model.router.top_k={r.top_k}")  # fmt: skip
        require(self.n_dense_layers <= self.n_layers,
                f"model.n_dense_layers={self.n_dense_layers}: must not exceed model.n_layers={self.n_layers}")  # fmt: skip
        require(self.n_dense_layers == 0 or self.d_dense >= 1,
                f"model.d_dense={self.d_dense}: must be at least 1 with model.n_dense_layers={self.n_dense_layers}")  # fmt: skip
        require(
            self.attention in ATTENTIONS, f"model.attention={self.attention}: must be one of {', '.join(ATTENTIONS)}"
        )
        if self.attention == "gqa":
            self._check_gqa()
        else:
            for name, unused in (("n_kv_heads", None), ("head_dim", None), ("qk_norm", "none")):
                require(getattr(self, name) == unused,
                        f"model.{name}={getattr(self, name)}: has no meaning with model.attention=mla; leave it at "
                        f"{'null' if unused is None else unused}, model.mla has the knobs of its heads")  # fmt: skip

    def _check_gqa(self) -> None:
        require(self.head_dim is not None or self.d_model % self.n_heads == 0,
                f"model.d_model={self.d_model}: must be a multiple of model.n_heads={self.n_heads}, "
                "or model.head_dim must be given")  # fmt: skip
        require(self.head_width >= 1 and self.head_width % 2 == 0,
                f"model.head_dim={self.head_width}: must be even, for the rotary embedding")  # fmt: skip
        require(self.kv_heads >= 1 and self.n_heads % self.kv_heads == 0,
                f"model.n_kv_heads={self.n_kv_heads}: must divide model.n_heads={self.n_heads}")  # fmt: skip
        require(self.qk_norm in ("none", "head", "full"),
                f"model.qk_norm={self.qk_norm}: must be one of none, head, full")  # fmt: skip

    @property
    def head_width(self) -> int:
        return self.head_dim if self.head_dim is not None else self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

    @property
    def rotary_width(self) -> int:
        """Width of the part of a head that is rotated."""
        return self.mla.qk_rope_head_dim if self.attention == "mla" else self.head_width
