"""The transformer, on one device. It knows nothing of ranks; moesaic.parallel.apply spreads it.

Letters: B sequences, S positions, T = B * S tokens, D model width, V vocabulary, L layers, E experts.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moesaic.kernels.cross_entropy import linear_cross_entropies
from moesaic.kernels.rms_norm import RMSNorm
from moesaic.moe.attention import Attention, LatentAttention, Mask, document_mask, rotary_table
from moesaic.moe.balance import FIGURES, pooled_balance_loss
from moesaic.moe.config import ModelConfig
from moesaic.moe.experts import backend_for
from moesaic.moe.layer import Aux, FeedForward, MoE, plainly
from moesaic.moe.precision import Precision, PrecisionConfig

IGNORED = -100
# Writes the weights of a whole parameter or buffer, by its name in the model, into a tensor of its shape, in place.
Fill = Callable[[str, Tensor], None]
RECORD = ("balance", "z", "shares", "counts", "figures")  # what a MoE layer tells of a call


class Output(NamedTuple):
    """What a forward pass gives.

    logits   (B, S, V), where no targets were given, else None
    loss     scalar fp32, the sum of the cross entropies of all targets that are not IGNORED, else None
    aux      auxiliary loss of this call's tokens, weighted with the configuration's coefficients, mean over MoE layers (or, where
             model.router.balance_over=layers, of them all at once)
    counts   int64 (MoE layers, E), tokens that chose each expert
    figures  fp32 (MoE layers, 6), sums over tokens that moesaic.moe.balance.FIGURES names
    losses   fp32 (B,), the part of each sequence in `loss`, to look at, without a gradient; None where there is no loss
    """

    logits: Tensor | None
    loss: Tensor | None
    aux: Tensor
    counts: Tensor
    figures: Tensor
    losses: Tensor | None = None


class Block(nn.Module):
    """Pre-norm residual block: x += attention(norm(x)); x += feed_forward(norm(x)). x_BSD -> (x_BSD, aux of a MoE layer).

    `run` runs it: moesaic.parallel.remat may put in its place what computes activations again in backward.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = LatentAttention(config) if config.attention == "mla" else Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        dense = layer < config.n_dense_layers
        self.ffn = FeedForward(config.d_model, config.d_dense) if dense else MoE(config)
        self.run: Callable[..., Any] = plainly

    def forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor, mask: Mask = None) -> tuple[Tensor, Aux]:
        return self.run(self._forward, x_BSD, cos_SC, sin_SC, mask)

    def _forward(self, x_BSD: Tensor, cos_SC: Tensor, sin_SC: Tensor, mask: Mask) -> tuple[Tensor, Aux]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos_SC, sin_SC, mask)
        x_TD = self.ffn_norm(x_BSD).flatten(0, 1)
        y_TD, aux = self.ffn(x_TD, x_BSD.shape[0]) if isinstance(self.ffn, MoE) else (self.ffn(x_TD), {})
        return x_BSD + y_TD.view_as(x_BSD), aux


class Transformer(nn.Module):
    """Decoder-only language model. tokens_BS (and targets_BS) -> Output.

    A token sees all tokens that stand before it in its sequence, or with documents_BS, the numbers that
    moesaic.moe.attention.document_ids gives, those of its own document alone.

    Losses are computed inside `forward` because sharded training engines gather weights only there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.precision = Precision(PrecisionConfig())  # nothing quantized, until moesaic.moe.low.lower says otherwise

    def forward(
        self, tokens_BS: Tensor, targets_BS: Tensor | None = None, documents_BS: Tensor | None = None, start: int = 0
    ) -> Output:
        """`start`: position of the first token, after those that the layers' caches hold."""
        config, end = self.config, start + tokens_BS.shape[1]
        table = rotary_table(end, config.rotary_width, config.rope_theta, tokens_BS.device, config.yarn)
        cos_SC, sin_SC = (x[start:] for x in table)
        mask = None if documents_BS is None else document_mask(documents_BS)
        x_BSD = self.embedding(tokens_BS)
        records: list[Aux] = []
        for block in self.blocks:
            x_BSD, record = block(x_BSD, cos_SC, sin_SC, mask)
            if record:
                records.append(record)
        x_BSD = self.norm(x_BSD)
        logits = loss = losses = None
        if targets_BS is None:
            logits = self.head(x_BSD)
        else:
            backend = "triton" if backend_for(config.experts_backend, x_BSD) == "triton" else "torch"
            x_TD, targets_T = x_BSD.flatten(0, 1), targets_BS.flatten()
            loss, each_T = linear_cross_entropies(x_TD, self.head.weight, targets_T, IGNORED, backend=backend)
            losses = each_T.view(targets_BS.shape).sum(1)
        aux, counts, figures = self._collect(records, x_BSD)
        return Output(logits, loss, aux, counts, figures, losses)

    def _collect(self, records: list[Aux], x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router = self.config.router
        if not records:
            counts = torch.zeros(0, self.config.n_experts, dtype=torch.int64, device=x_BSD.device)
            return torch.zeros((), device=x_BSD.device), counts, torch.zeros(0, len(FIGURES), device=x_BSD.device)
        balance, z, shares, counts, figures = (torch.stack([r[key] for r in records]) for key in RECORD)
        loss = pooled_balance_loss(counts, shares) if router.balance_over == "layers" else balance.mean()
        return router.balance_coef * loss + router.z_coef * z.mean(), counts, figures

    def moe_layers(self) -> list[MoE]:
        """The MoE layers in order: row l of `Output.counts` is of the l-th."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoE)]


@torch.no_grad()
def init_parameter(name: str, parameter: Tensor, config: ModelConfig, seed: int) -> None:
    """Fill one whole parameter of the model: 1 for norms, 0 for biases, else normal with `init_std`, the matrices that write
    into the residual stream with init_std / sqrt(2 L).

    The values depend on (seed, name) alone, so that every way to spread a model over ranks starts from the same weights.
    """
    if parameter.ndim == 1 or ".b_" in name:  # norms, biases
        parameter.fill_(1.0 if "norm" in name else 0.0)
        return
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest[:7], "little"))
    writes_residual = ".wo." in name or "w_down" in name
    std = config.init_std / math.sqrt(2 * config.n_layers) if writes_residual else config.init_std
    parameter.normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize(
    module: nn.Module, prefix: str, config: ModelConfig, seed: int, device: torch.device, fill: Fill | None = None
) -> None:
    """Allocate a part of the model, whose names there begin with `prefix`, and fill it: by `fill`, or else parameters as
    `init_parameter` says, and buffers with 0. It undoes the tie of tied embeddings."""
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        if fill:
            fill(prefix + name, parameter)
        else:
            init_parameter(prefix + name, parameter, config, seed)
    for name, buffer in module.named_buffers():
        if fill:
            fill(prefix + name, buffer)
        else:
            buffer.zero_()


def build(config: ModelConfig, seed: int, device: torch.device, fill: Fill | None = None) -> Transformer:
    """A model with initial weights, or those that `fill` gives, on one device."""
    with torch.device("meta"):
        model = Transformer(config)
    initialize(model, "", config, seed, device, fill)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model
