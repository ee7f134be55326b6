"""Causal self-attention with rotary positions and grouped queries.

Letters: B sequences, S positions, D model width, H query heads, J key-value heads, C width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.moe.config import ModelConfig


def rotary_table(length: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 (S, C): position times theta^(-2i/C) for i in 0..C/2, repeated for the two halves of a head."""
    # fp64: at position 100,000 an fp32 angle is off by more than bf16 can tell.
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency).repeat(1, 2)
    return angle.cos().float(), angle.sin().float()


def rotate(x_BHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    """Rotary embedding with halves as pairs (i, i + C/2), as in Llama's published weights. RoFormer, arXiv 2104.09864."""
    first, second = x_BHSC.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BHSC * cos_SC + turned * sin_SC).to(x_BHSC.dtype)


class Attention(nn.Module):
    """x_BSD -> y_BSD. One matrix makes queries, keys and values, stacked in this order along its output."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.n_heads, config.kv_heads, config.head_width
        self.qk_norm = config.qk_norm
        self.wqkv = nn.Linear(config.d_model, (self.heads + 2 * self.kv_heads) * self.width, bias=False)
        self.wo = nn.Linear(self.heads * self.width, config.d_model, bias=False)
        if self.qk_norm != "none":
            per_head = self.qk_norm == "head"
            self.q_norm = nn.RMSNorm(self.width * (1 if per_head else self.heads), config.norm_eps)
            self.k_norm = nn.RMSNorm(self.width * (1 if per_head else self.kv_heads), config.norm_eps)

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
        batch, length, _ = x_BSD.shape
        widths = [self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width]
        q, k, v = self.wqkv(x_BSD).split(widths, dim=2)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BHSC = q.view(batch, length, self.heads, self.width).transpose(1, 2)
        k_BJSC = k.view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        v_BJSC = v.view(batch, length, self.kv_heads, self.width).transpose(1, 2)
        if self.qk_norm == "head":
            q_BHSC, k_BJSC = self.q_norm(q_BHSC), self.k_norm(k_BJSC)
        q_BHSC, k_BJSC = rotate(q_BHSC, cos_SC, sin_SC), rotate(k_BJSC, cos_SC, sin_SC)
        y_BHSC = F.scaled_dot_product_attention(
            q_BHSC, k_BJSC, v_BJSC, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        return self.wo(y_BHSC.transpose(1, 2).reshape(batch, length, self.heads * self.width))
