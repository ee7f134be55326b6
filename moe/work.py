"""What a model computes, product by product, and what it moves through memory: by formula, no model is built.

Letters: T tokens, S positions of a sequence, D width, F expert width, G width of the experts' pre-activation, K experts per
token, E experts, R rows that the experts compute, H heads, J key-value heads, C width of a head, V vocabulary, b bytes of an
activation.
"""

from dataclasses import dataclass

from moesaic.moe.config import ModelConfig


@dataclass(frozen=True)
class Product:
    """(m, k) x (k, n), or `groups` products whose m add up to m. kind: `dense`, `grouped`, `attention` (half of the S x S pairs;
    its `groups` is the width of a head),
    `router`, in fp32, or `head`."""

    name: str
    m: int
    n: int
    k: int
    groups: int = 1
    kind: str = "dense"

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k


def block_products(
    config: ModelConfig, tokens: int, seq_len: float, dense: bool, rows: int, experts: int
) -> list[Product]:
    """The forward products of a block over `tokens`; its `experts` here compute `rows` rows. Backward has two of each, but five
    for two in attention, which makes its scores again."""
    d, h, t, mla = config.d_model, config.n_heads, tokens, config.mla
    if config.attention == "mla":
        q = mla.q_lora_rank
        queries = h * mla.qk_head_dim
        made = (
            [Product("wq", t, queries, d)] if q is None else [Product("wq_a", t, q, d), Product("wq_b", t, queries, q)]
        )
        made.append(Product("wkv_a", t, mla.kv_lora_rank + mla.qk_rope_head_dim, d))
        made.append(Product("wkv_b", t, h * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank))
        out, pair, wide = h * mla.v_head_dim, h * (mla.qk_head_dim + mla.v_head_dim), mla.qk_head_dim
    else:
        made = [Product("wqkv", t, (h + 2 * config.kv_heads) * config.head_width, d)]
        out, pair, wide = h * config.head_width, 2 * h * config.head_width, config.head_width
    # Two products over half of the pairs: pair / 2 wide each.
    parts = [*made, Product("attention", t, round(seq_len), pair // 2, wide, "attention"), Product("wo", t, d, out)]
    if dense:
        return [*parts, Product("dense up", t, 2 * config.d_dense, d), Product("dense down", t, d, config.d_dense)]
    ups = 1 if config.activation == "relu2" else 2
    parts.append(Product("router", t, config.n_experts, d, kind="router"))
    parts.append(Product("experts up", rows, ups * config.d_expert, d, experts, "grouped"))
    parts.append(Product("experts down", rows, d, config.d_expert, experts, "grouped"))
    if config.d_shared:
        parts.append(Product("shared up", t, 2 * config.d_shared, d))
        parts.append(Product("shared down", t, d, config.d_shared))
    return parts


def head_product(config: ModelConfig, tokens: int) -> Product:
    return Product("head", tokens, config.vocab_size, config.d_model, kind="head")


def block_traffic(config: ModelConfig, tokens: int, dense: bool, rows: int, travelled: int, b: int) -> dict[str, float]:
    """Bytes through memory of a block's forward beside the operands of products; backward moves about twice that.

    norms       two norms, two sums with the residual stream, norms and rotation of heads
    router      input in fp32, and six passes over (T, E) numbers
    activation  of experts or the dense feed-forward
    rows        experts' outputs added per token; `travelled` rows are packed, and added, on either side of an exchange
    """
    d, h, j, c = config.d_model, config.n_heads, config.kv_heads, config.head_width
    heads = 4 * (h + j) * c if config.attention == "gqa" else 4 * h * config.mla.qk_head_dim
    traffic = {"norms": float(b * tokens * (10 * d + heads))}
    if dense:
        return traffic | {"activation": 3.0 * b * tokens * config.d_dense}
    wide = config.d_expert * (2 if config.activation == "relu2" else 3)
    traffic["router"] = float(tokens * ((b + 4) * d + 24 * config.n_experts))
    traffic["activation"] = float(b * (rows * wide + 3 * tokens * config.d_shared))
    traffic["rows"] = float(b * d * (rows + 2 * tokens + 4 * travelled))
    return traffic


def head_traffic(config: ModelConfig, tokens: int) -> float:
    """Of the logits, chunk by chunk: written, read in fp32 for their largest, sum and gradient, and written again."""
    return 24.0 * tokens * config.vocab_size
