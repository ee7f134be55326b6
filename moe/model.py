"""The transformer, on one device. It knows nothing of ranks; moesaic.parallel.apply spreads it.

Letters: B sequences, S positions, T = B * S tokens, D model width, V vocabulary, L layers, E experts.
"""

import hashlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.moe.attention import Attention, rotary_table
from moesaic.moe.config import ModelConfig
from moesaic.moe.layer import Aux, FeedForward, MoE

IGNORED = -100


class Output(NamedTuple):
    """What a forward pass gives.

    logits   (B, S, V), where no targets were given, else None
    loss     scalar fp32, the sum of the cross entropies of all targets that are not IGNORED, else None
    aux      auxiliary loss of this call's tokens, weighted with the configuration's coefficients, mean over MoE layers
    counts   int64 (MoE layers, E), rows per expert
    """

    logits: Tensor | None
    loss: Tensor | None
    aux: Tensor
    counts: Tensor


class Block(nn.Module):
    """Pre-norm residual block: x += attention(norm(x)); x += feed_forward(norm(x)). x_BSD -> (x_BSD, aux of a MoE layer)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        dense = layer < config.n_dense_layers
        self.ffn = FeedForward(config.d_model, config.d_dense) if dense else MoE(config)

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> tuple[Tensor, Aux]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_SC, sin_SC)
        x_TD = self.ffn_norm(x_BSD).flatten(0, 1)
        y_TD, aux = self.ffn(x_TD) if isinstance(self.ffn, MoE) else (self.ffn(x_TD), {})
        return x_BSD + y_TD.view_as(x_BSD), aux


class Transformer(nn.Module):
    """Decoder-only language model. tokens_BS (and targets_BS) -> Output.

    Losses are computed inside `forward` because sharded training engines gather weights only there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor | None = None) -> Output:
        config = self.config
        cos_SC, sin_SC = rotary_table(tokens_BS.shape[1], config.head_width, config.rope_theta, tokens_BS.device)
        x_BSD = self.embedding(tokens_BS)
        records: list[Aux] = []
        for block in self.blocks:
            x_BSD, record = block(x_BSD, cos_SC, sin_SC)
            if record:
                records.append(record)
        logits_BSV = self.head(self.norm(x_BSD))
        loss = None
        if targets_BS is not None:
            loss = F.cross_entropy(
                logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        aux, counts = self._collect(records, x_BSD)
        return Output(logits_BSV if targets_BS is None else None, loss, aux, counts)

    def _collect(self, records: list[Aux], x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        router = self.config.router
        if not records:
            none = torch.zeros(0, self.config.n_experts, dtype=torch.int64, device=x_BSD.device)
            return torch.zeros((), device=x_BSD.device), none
        losses = [router.balance_coef * r["balance"] + router.z_coef * r["z"] for r in records]
        return torch.stack(losses).mean(), torch.stack([r["counts"] for r in records])


@torch.no_grad()
def init_parameter(name: str, parameter: Tensor, config: ModelConfig, seed: int) -> None:
    """Fill one whole parameter of the model: 1 for norms, else normal with `init_std`, the matrices that write into the
    residual stream with init_std / sqrt(2 L).

    The values depend on (seed, name) alone, so that every way to spread a model over ranks starts from the same weights.
    """
    if "norm" in name.split(".")[-2]:
        parameter.fill_(1.0)
        return
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7], "little"))
    writes_residual = ".wo." in name or "w_down" in name
    std = config.init_std / math.sqrt(2 * config.n_layers) if writes_residual else config.init_std
    parameter.normal_(0.0, std, generator=generator)


def build(config: ModelConfig, seed: int, device: torch.device) -> Transformer:
    """A model with initial weights on one device."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device=device)
    if config.tie_embeddings:  # which `to_empty` undoes
        model.head.weight = model.embedding.weight
    for name, parameter in model.named_parameters():
        init_parameter(name, parameter, config, seed)
    return model
