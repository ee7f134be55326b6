"""Causal self-attention: grouped queries (GQA) and latent keys and values (MLA), in sequences or packed documents.

Letters: B sequences, S positions, T = B * S tokens, D model width, H query heads, J key-value heads, C width of a head (or
of its rotated part), P = C / 2 rotated pairs of a head, N blocks of positions.

Positions are counted over the sequence, also where documents are packed: the rotary embedding makes a score depend on
the distance of two tokens alone, and a document's tokens keep theirs wherever it begins.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from moesaic.kernels.products import Linear, bmm
from moesaic.kernels.rms_norm import RMSNorm
from moesaic.moe.config import ModelConfig, YarnConfig

LATENT_EPS = 1e-6  # of the norms of MLA's latents, in every published model, whatever the other norms have
BLOCK = 128  # positions of a block of `block_mask`
QUERIES = 128  # of a block of causal attention on a CPU
KEPT = 1024  # positions of a sequence up to which its probabilities are kept for backward

# Who sees whom: tokens all that stand before them (None), or those of their document, which is given by the lengths of
# all documents, one sequence after another (on a CPU), or by blocks (elsewhere).
Mask = tuple[int, ...] | BlockMask | None


# ---------------------------------------------------------------- rotary positions


def rotary_table(
    length: int, width: int, theta: float, device: torch.device, yarn: YarnConfig | None = None
) -> tuple[Tensor, Tensor]:
    """What `rotate` multiplies with, fp32 (S, C) each: (cos, cos) and (-sin, sin) of the angles of a head's pairs.

    At position s, pair i has the angle s * theta^(-2i/C) (RoFormer, arXiv 2104.09864). With `yarn`, pairs that turn
    less than beta_slow times within the model's original positions are slowed by the factor, those that turn more
    than beta_fast times are not, and in between the slowing is linear in i, from bounds rounded outwards; and both
    tables are multiplied by m(mscale) / m(mscale_all_dim). (YaRN, arXiv 2309.00071, as DeepSeek-V3 has it.)
    """
    # fp64: at position 100,000 an fp32 angle is off by more than bf16 can tell.
    pair_P = torch.arange(width // 2, dtype=torch.float64, device=device)
    frequency_P = theta ** (-2 * pair_P / width)
    scale = 1.0
    if yarn is not None and yarn.factor > 1:

        def turning(times: float) -> float:
            """The pair, a real number, that turns so often within the original positions."""
            return (
                width * math.log(yarn.original_max_position_embeddings / (2 * math.pi * times)) / (2 * math.log(theta))
            )

        low = max(math.floor(turning(yarn.beta_fast)), 0)
        high = min(math.ceil(turning(yarn.beta_slow)), width - 1)
        slowed_P = ((pair_P - low) / max(high - low, 1e-3)).clamp(0, 1)
        frequency_P = frequency_P * (1 - slowed_P + slowed_P / yarn.factor)
        scale = _magnitude(yarn, yarn.mscale) / _magnitude(yarn, yarn.mscale_all_dim)
    angle_SP = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency_P)
    cos_SP, sin_SP = (angle_SP.cos() * scale).float(), (angle_SP.sin() * scale).float()
    return torch.cat((cos_SP, cos_SP), dim=1), torch.cat((-sin_SP, sin_SP), dim=1)


def _magnitude(yarn: YarnConfig, mscale: float) -> float:
    return 1 + 0.1 * mscale * math.log(yarn.factor)


def rotate(x_BSHC: Tensor, cos_SC: Tensor, sin_SC: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the pairs of each head by the angles of `rotary_table`. Pairs are (i, i + C/2), as in Llama's weights, or
    `interleaved`, (2i, 2i + 1), as in DeepSeek's; the result has the former in both cases, which no score can tell."""
    if interleaved:
        x_BSHC = x_BSHC.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return _Rotate.apply(x_BSHC, cos_SC[:, None], sin_SC[:, None])


class _Rotate(torch.autograd.Function):
    """The pairs (i, i + C/2) turned, without a copy of x with its halves exchanged; backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x_BSHC: Tensor, cos_S1C: Tensor, sin_S1C: Tensor) -> Tensor:
        ctx.save_for_backward(cos_S1C, sin_S1C)
        return _turn(x_BSHC, cos_S1C, sin_S1C, 1)

    @staticmethod
    def backward(ctx: Any, dy_BSHC: Tensor) -> tuple[Tensor, None, None]:
        cos_S1C, sin_S1C = ctx.saved_tensors
        return _turn(dy_BSHC, cos_S1C, sin_S1C, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    if x.is_cuda:
        from moesaic.kernels.rope import rope  # Triton, which a CPU does without

        return rope(x, cos[:, 0], sin[:, 0], direction)
    pairs = x.shape[-1] // 2
    y = x * cos
    y[..., :pairs].addcmul_(x[..., pairs:], sin[..., :pairs], value=direction)
    y[..., pairs:].addcmul_(x[..., :pairs], sin[..., pairs:], value=direction)
    return y.to(x.dtype)


# ---------------------------------------------------------------- documents


def document_ids(tokens_BS: Tensor, separator: int) -> Tensor:
    """int32 (B, S): the number of the document, counted within its sequence, that each token belongs to. The separator, which
    follows every document, is predicted as its end, and read as the first token of the next: there it stands when a model
    generates, too."""
    return (tokens_BS == separator).cumsum(dim=1, dtype=torch.int32)


def document_mask(documents_BS: Tensor) -> Mask:
    """What `attend` must know of the documents, made once for all layers: `block_mask`, or on a CPU `document_lengths`.

    documents_BS: numbers, of any integer type, that never fall along a sequence, such as `document_ids` gives.
    """
    if documents_BS.device.type == "cpu":
        return document_lengths(documents_BS)
    return block_mask(documents_BS) if documents_BS.numel() else None


def document_lengths(documents_BS: Tensor) -> tuple[int, ...] | None:
    """The tokens of each document of each sequence, in order; None where every sequence is one document."""
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    starts = begins_BS.flatten().nonzero().flatten()
    if len(starts) == len(documents_BS):
        return None
    return tuple(torch.diff(starts, append=starts.new_tensor([documents_BS.numel()])).tolist())


def block_mask(documents_BS: Tensor) -> BlockMask:
    """The mask as flex_attention reads it: the blocks of keys that a block of queries sees in part, and those seen whole.

    It equals what torch's create_block_mask makes of `visible`, but never holds S x S values: as numbers never fall
    along a sequence, the first and the last of a block tell all. Nothing is read back to the host.
    """

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents_BS[b, query] == documents_BS[b, key])

    def listed(seen_BNN: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks of keys each block of queries sees, and which: their numbers in order, then the others."""
        order_BNN = seen_BNN.int().argsort(dim=-1, descending=True, stable=True).int()
        return seen_BNN.sum(dim=-1, dtype=torch.int32)[:, None], order_BNN[:, None].contiguous()

    length = documents_BS.shape[1]
    start_N = torch.arange(0, length, BLOCK, device=documents_BS.device)
    end_N = start_N + BLOCK - 1
    first_BN, last_BN = documents_BS[:, start_N], documents_BS[:, end_N.clamp(max=length - 1)]
    before_NN = start_N[:, None] > start_N
    seen_BNN = (start_N[:, None] >= start_N) & (last_BN[:, None, :] >= first_BN[:, :, None])
    whole_BNN = before_NN & (end_N < length)[:, None] & (first_BN[:, None, :] == last_BN[:, :, None])
    return BlockMask.from_kv_blocks(
        *listed(seen_BNN & ~whole_BNN),
        *listed(whole_BNN),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


# ---------------------------------------------------------------- attention proper


def attend(q_BSHC: Tensor, k_BSJC: Tensor, v_BSJC: Tensor, mask: Mask, scale: float) -> Tensor:
    """softmax(scale * q k^T) v over the tokens that `mask` lets a token see, none after itself -> y_BSHC, as wide as v.

    On a CPU each document is a call of its own: no product is made to be masked, and no S x S mask is held.
    """
    if isinstance(mask, BlockMask):
        gqa = q_BSHC.shape[2] != k_BSJC.shape[2]
        q_BHSC, k_BJSC, v_BJSC = (x.transpose(1, 2) for x in (q_BSHC, k_BSJC, v_BSJC))
        flex = _flex(q_BSHC.is_cuda)
        return flex(q_BHSC, k_BJSC, v_BJSC, block_mask=mask, scale=scale, enable_gqa=gqa).transpose(1, 2)
    if mask is None:
        return _causal(q_BSHC, k_BSJC, v_BSJC, scale)
    documents = zip(*(x.flatten(0, 1).split(list(mask)) for x in (q_BSHC, k_BSJC, v_BSJC)), strict=True)
    y_THC = torch.cat([_causal(q[None], k[None], v[None], scale)[0] for q, k, v in documents])
    return y_THC.view(*q_BSHC.shape[:3], v_BSJC.shape[3])


def _causal(q_BSHC: Tensor, k_BSJC: Tensor, v_BSJC: Tensor, scale: float) -> Tensor:
    if q_BSHC.device.type == "cpu" and q_BSHC.numel():
        return _CausalOnCPU.apply(q_BSHC, k_BSJC, v_BSJC, scale)
    q_BHSC, k_BJSC, v_BJSC = (x.transpose(1, 2) for x in (q_BSHC, k_BSJC, v_BSJC))
    gqa = q_BSHC.shape[2] != k_BSJC.shape[2]
    y_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BJSC, v_BJSC, is_causal=True, scale=scale, enable_gqa=gqa)
    return y_BHSC.transpose(1, 2)


class _CausalOnCPU(torch.autograd.Function):
    """Causal attention in blocks of QUERIES queries: a block is multiplied with the keys up to its own end, and no others.

    torch's kernel for CPUs leaves out what a query must not see in steps of 512 keys: nothing in a sequence of 512. Probabilities
    are kept for backward in sequences of up to KEPT positions, and made again block by block in longer ones: then no S x S values
    are held, as in FlashAttention (arXiv 2205.14135). Heads that share keys and values are rows of one product.

    Letters: N = B * J, G query heads that share a key-value head, Q queries of a block, E keys up to its end.
    """

    @staticmethod
    def forward(ctx: Any, q_BSHC: Tensor, k_BSJC: Tensor, v_BSJC: Tensor, scale: float) -> Tensor:
        q_NGSC, k_NSC, v_NSC = (
            _by_head(q_BSHC, k_BSJC, scale),
            _by_head(k_BSJC, k_BSJC)[:, 0],
            _by_head(v_BSJC, k_BSJC)[:, 0],
        )
        y_NGSC = v_NSC.new_empty(*q_NGSC.shape[:3], v_NSC.shape[2])
        kept = []
        for start in range(0, q_NGSC.shape[2], QUERIES):
            q_NGQC = q_NGSC[:, :, start : start + QUERIES]
            p_NRE = _probabilities(q_NGQC, k_NSC, start)
            bmm(p_NRE, v_NSC[:, : p_NRE.shape[2]], y_NGSC[:, :, start : start + QUERIES])
            if q_NGSC.shape[2] <= KEPT:
                kept.append(p_NRE)
        ctx.save_for_backward(q_NGSC, k_NSC, v_NSC, *kept)
        ctx.batch, ctx.scale = q_BSHC.shape[0], scale
        return _by_position(y_NGSC, ctx.batch)

    @staticmethod
    def backward(ctx: Any, dy_BSHC: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_NGSC, k_NSC, v_NSC, *kept = ctx.saved_tensors
        dy_NGSC = _by_head(dy_BSHC, _by_position(k_NSC[:, None], ctx.batch))
        dq_NGSC, dk_NSC, dv_NSC = torch.empty_like(q_NGSC), torch.zeros_like(k_NSC), torch.zeros_like(v_NSC)
        for start in range(0, q_NGSC.shape[2], QUERIES):
            q_NGQC, dy_NRC = q_NGSC[:, :, start : start + QUERIES], dy_NGSC[:, :, start : start + QUERIES].flatten(1, 2)
            p_NRE = kept[start // QUERIES] if kept else _probabilities(q_NGQC, k_NSC, start)
            end = p_NRE.shape[2]
            bmm(p_NRE.mT, dy_NRC, dv_NSC[:, :end], add=True)
            dp_NRE = bmm(dy_NRC, v_NSC[:, :end].mT)
            ds_NRE = torch.ops.aten._softmax_backward_data(dp_NRE, p_NRE, -1, p_NRE.dtype)
            bmm(ds_NRE.mT, q_NGQC.flatten(1, 2), dk_NSC[:, :end], add=True)
            bmm(ds_NRE, k_NSC[:, :end], dq_NGSC[:, :, start:end])
        dq, dk, dv = (_by_position(x, ctx.batch) for x in (dq_NGSC.mul_(ctx.scale), dk_NSC[:, None], dv_NSC[:, None]))
        return dq, dk, dv, None


def _by_head(x_BSHC: Tensor, k_BSJC: Tensor, scale: float = 1.0) -> Tensor:
    """-> contiguous (N, G, S, C), times `scale`."""
    shared = x_BSHC.unflatten(2, (k_BSJC.shape[2], -1)).permute(0, 2, 3, 1, 4)
    return torch.mul(shared, scale, out=x_BSHC.new_empty(shared.shape)).flatten(0, 1)


def _by_position(x_NGSC: Tensor, batch: int) -> Tensor:
    """(N, G, S, C) -> (B, S, H, C), a view."""
    return x_NGSC.unflatten(0, (batch, -1)).flatten(1, 2).transpose(1, 2)


def _probabilities(q_NGQC: Tensor, k_NSC: Tensor, start: int) -> Tensor:
    """(N, G * Q, E): of a block of queries, of which the first stands at `start`, over the keys up to its end."""
    heads, queries = q_NGQC.shape[1:3]
    scores = bmm(q_NGQC.flatten(1, 2), k_NSC[:, : start + queries].mT)
    own = scores.unflatten(1, (heads, queries))[..., start:]
    own += torch.full((queries, queries), -math.inf, dtype=scores.dtype).triu_(1)
    return torch.softmax(scores, dim=-1)


@functools.cache
def _flex(fused: bool) -> Any:
    # Only when compiled is it one kernel; else it holds all scores.
    return torch.compile(flex_attention) if fused else flex_attention


class KVCache:
    """Keys and values of all that one layer has seen of B sequences, whose first pad_B positions hold nothing: with rotary
    positions, where a sequence begins does not matter. While it is a layer's `cache`, the layer takes what comes next, not whole
    sequences."""

    def __init__(self, pad_B: Tensor) -> None:
        self.pad_B = pad_B
        self.k_BSJC: Tensor | None = None
        self.v_BSJC: Tensor | None = None

    def attend(self, q_BSHC: Tensor, k_BSJC: Tensor, v_BSJC: Tensor, scale: float) -> Tensor:
        if self.k_BSJC is not None and self.v_BSJC is not None:
            k_BSJC, v_BSJC = torch.cat((self.k_BSJC, k_BSJC), 1), torch.cat((self.v_BSJC, v_BSJC), 1)
        self.k_BSJC, self.v_BSJC = k_BSJC, v_BSJC
        key_S = torch.arange(k_BSJC.shape[1], device=k_BSJC.device)
        query_S1 = key_S[-q_BSHC.shape[1] :, None]
        # A position that holds nothing sees itself: over no keys at all softmax is NaN.
        seen_BSS = ((key_S <= query_S1) & (key_S >= self.pad_B[:, None, None])) | (key_S == query_S1)
        q_BHSC, k_BJSC, v_BJSC = (x.transpose(1, 2) for x in (q_BSHC, k_BSJC, v_BSJC))
        gqa = q_BSHC.shape[2] != k_BSJC.shape[2]
        y_BHSC = F.scaled_dot_product_attention(
            q_BHSC, k_BJSC, v_BJSC, attn_mask=seen_BSS[:, None], scale=scale, enable_gqa=gqa
        )
        return y_BHSC.transpose(1, 2)


class Attention(nn.Module):
    """x_BSD -> y_BSD. One matrix makes queries, keys and values, stacked in this order along its output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.n_heads, config.kv_heads, config.head_width
        self.cache: KVCache | None = None
        self.qk_norm = config.qk_norm
        self.wqkv = Linear(config.d_model, (self.heads + 2 * self.kv_heads) * self.width)
        self.wo = Linear(self.heads * self.width, config.d_model)
        if self.qk_norm != "none":
            per_head = self.qk_norm == "head"
            self.q_norm = RMSNorm(self.width * (1 if per_head else self.heads), config.norm_eps)
            self.k_norm = RMSNorm(self.width * (1 if per_head else self.kv_heads), config.norm_eps)

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor, mask: Mask = None) -> Tensor:
        widths = [self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width]
        q, k, v = self.wqkv(x_BSD).split(widths, dim=2)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BSHC, k_BSJC, v_BSJC = (x.unflatten(2, (-1, self.width)) for x in (q, k, v))
        if self.qk_norm == "head":
            q_BSHC, k_BSJC = self.q_norm(q_BSHC), self.k_norm(k_BSJC)
        q_BSHC, k_BSJC = rotate(q_BSHC, cos_SC, sin_SC), rotate(k_BSJC, cos_SC, sin_SC)
        if self.cache is not None:
            return self.wo(self.cache.attend(q_BSHC, k_BSJC, v_BSJC, self.width**-0.5).flatten(2))
        return self.wo(attend(q_BSHC, k_BSJC, v_BSJC, mask, self.width**-0.5).flatten(2))


class LatentAttention(nn.Module):
    """x_BSD -> y_BSD. Multi-head latent attention (MLA) of DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437):

    1. `wkv_a` makes of a token a latent of kv_lora_rank values, and one rotated key that all heads share. A cache would
       hold these and nothing else.
    2. `wkv_b` makes of the normed latent each head's key without position, and its value, head by head.
    3. `wq`, or `wq_a` and `wq_b` with a normed latent between them, makes each head's query: the part without position,
       then the one that is rotated.
    4. Heads attend with keys of both parts, scaled by the root of their joint width, and `wo` joins the values.

    Names are those of DeepSeek's own inference code, and every matrix is laid out as published.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.cache: KVCache | None = None
        mla = self.mla = config.mla
        self.heads = config.n_heads
        self.scale = mla.qk_head_dim**-0.5 * _magnitude(config.yarn, config.yarn.mscale_all_dim) ** 2
        if mla.q_lora_rank is None:
            self.wq = Linear(config.d_model, self.heads * mla.qk_head_dim)
        else:
            self.wq_a = Linear(config.d_model, mla.q_lora_rank)
            self.q_norm = RMSNorm(mla.q_lora_rank, LATENT_EPS)
            self.wq_b = Linear(mla.q_lora_rank, self.heads * mla.qk_head_dim)
        self.wkv_a = Linear(config.d_model, mla.kv_lora_rank + mla.qk_rope_head_dim)
        self.kv_norm = RMSNorm(mla.kv_lora_rank, LATENT_EPS)
        self.wkv_b = Linear(mla.kv_lora_rank, self.heads * (mla.qk_nope_head_dim + mla.v_head_dim))
        self.wo = Linear(self.heads * mla.v_head_dim, config.d_model)

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor, mask: Mask = None) -> Tensor:
        mla = self.mla
        q = self.wq(x_BSD) if mla.q_lora_rank is None else self.wq_b(self.q_norm(self.wq_a(x_BSD)))
        latent, k_rope = self.wkv_a(x_BSD).split([mla.kv_lora_rank, mla.qk_rope_head_dim], dim=2)
        kv = self.wkv_b(self.kv_norm(latent))

        q_nope, q_rope = q.unflatten(2, (self.heads, -1)).split([mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=3)
        k_nope, v_BSHC = kv.unflatten(2, (self.heads, -1)).split([mla.qk_nope_head_dim, mla.v_head_dim], dim=3)
        q_rope = rotate(q_rope, cos_SC, sin_SC, mla.rope_interleave)
        k_rope = rotate(k_rope.unsqueeze(2), cos_SC, sin_SC, mla.rope_interleave)
        q_BSHC = torch.cat((q_nope, q_rope), dim=3)
        k_BSHC = torch.cat((k_nope, k_rope.expand_as(q_rope)), dim=3)
        if self.cache is not None:  # of every head's keys and values, not of the latents
            return self.wo(self.cache.attend(q_BSHC, k_BSHC, v_BSHC, self.scale).flatten(2))
        return self.wo(attend(q_BSHC, k_BSHC, v_BSHC, mask, self.scale).flatten(2))
