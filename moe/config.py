"""The shape of a model: everything that must be known to build it, and nothing about how it is run.

Every dataclass checks itself when it is made and raises `ValueError` with one line that names the knob as a user writes
it on the command line (`model.router.top_k`), its value and the rule it broke.
"""

from dataclasses import dataclass, field

ROUTERS = ("softmax_topk",)


def require(ok: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `ok`: a user's mistake, told in one line."""
    if not ok:
        raise ValueError(message)


@dataclass
class RouterConfig:
    """How a token chooses its experts.

    kind           softmax_topk: the K best of a softmax over all experts, ties to the lower expert id
    top_k          K, experts per token
    renormalize    divide the K weights by their sum (Mixtral, Qwen3-MoE do; OLMoE does not)
    balance_coef   weight of the load-balance loss E * sum_e(share of rows_e * mean probability_e), per layer, averaged
    z_coef         weight of the router z-loss mean(logsumexp(logits)^2) (ST-MoE, arXiv 2202.08906)
    """

    kind: str = "softmax_topk"
    top_k: int = 2
    renormalize: bool = False
    balance_coef: float = 0.01
    z_coef: float = 0.001

    def __post_init__(self) -> None:
        require(self.kind in ROUTERS, f"model.router.kind={self.kind}: must be one of {', '.join(ROUTERS)}")
        require(self.top_k >= 1, f"model.router.top_k={self.top_k}: must be at least 1")
        for name in ("balance_coef", "z_coef"):
            require(getattr(self, name) >= 0, f"model.router.{name}={getattr(self, name)}: must not be negative")


@dataclass
class ModelConfig:
    """A decoder-only Mixture-of-Experts transformer.

    vocab_size      V; at least the number of tokens of the tokenizer
    d_model         D, width of the residual stream
    n_layers        L, blocks in all, the leading dense ones included
    n_heads         query heads; n_kv_heads (null: as many) must divide it
    head_dim        width of one head (null: d_model / n_heads); even, for the rotary embedding
    n_experts       E, routed experts of a layer
    d_expert        F, width of one routed expert
    d_shared        width of the shared expert that every token passes through (0: none)
    n_dense_layers  leading blocks with a dense feed-forward of width d_dense instead of experts
    qk_norm         RMSNorm on queries and keys: none, head (each head by itself, Qwen3) or full (all heads together, OLMoE)
    tie_embeddings  the output head is the embedding matrix
    init_std        standard deviation of the initial weights; output projections get init_std / sqrt(2 L)
    """

    vocab_size: int = 320
    d_model: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None
    head_dim: int | None = None
    n_experts: int = 8
    d_expert: int = 256
    d_shared: int = 0
    n_dense_layers: int = 0
    d_dense: int = 0
    qk_norm: str = "none"
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_experts", "d_expert"):
            require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)}: must be at least 1")
        for name in ("d_shared", "n_dense_layers", "d_dense"):
            require(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)}: must not be negative")
        require(self.router.top_k <= self.n_experts,
                f"model.router.top_k={self.router.top_k}: must not exceed model.n_experts={self.n_experts}")  # fmt: skip
        require(self.head_dim is not None or self.d_model % self.n_heads == 0,
                f"model.d_model={self.d_model}: must be a multiple of model.n_heads={self.n_heads}, "
                "or model.head_dim must be given")  # fmt: skip
        require(self.head_width % 2 == 0, f"model.head_dim={self.head_width}: must be even, for the rotary embedding")
        require(self.kv_heads >= 1 and self.n_heads % self.kv_heads == 0,
                f"model.n_kv_heads={self.n_kv_heads}: must divide model.n_heads={self.n_heads}")  # fmt: skip
        require(self.n_dense_layers <= self.n_layers,
                f"model.n_dense_layers={self.n_dense_layers}: must not exceed model.n_layers={self.n_layers}")  # fmt: skip
        require(self.n_dense_layers == 0 or self.d_dense >= 1,
                f"model.d_dense={self.d_dense}: must be at least 1 with model.n_dense_layers={self.n_dense_layers}")  # fmt: skip
        require(self.qk_norm in ("none", "head", "full"),
                f"model.qk_norm={self.qk_norm}: must be one of none, head, full")  # fmt: skip

    @property
    def head_width(self) -> int:
        return self.head_dim if self.head_dim is not None else self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads
