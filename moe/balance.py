"""What keeps experts evenly used, and the figures that show whether they are.

Letters: B sequences, T tokens, E experts, K experts per token, L MoE layers, M tile rows.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moesaic.moe.replay import once
from moesaic.moe.router import Routing, count_rows

if TYPE_CHECKING:
    from moesaic.moe.model import Transformer

# What a layer adds up over the tokens of a call: see `load_figures`.
FIGURES = ("tokens", "router_entropy", "dropped", "added", "padding", "unrouted")


def balance_loss(
    routing: Routing, shares_TE: Tensor, over: str, sequences: int, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """E * sum_e f_e P_e: f_e expert e's share of the rows, P_e its mean share of a token's scores; 1 when both are even.

    Switch Transformer (arXiv 2101.03961) equation 4, with all K choices. The rows are those that were chosen, before capacity
    and rounding took and gave: what capacity cuts off is what the loss must see. The gradient flows through P alone.
    `over` says which tokens f and P are means of:

    micro_batch   those of this call
    sequence      of each sequence by itself, then the mean of the losses (the balance loss of DeepSeek-V3, arXiv 2412.19437)
    global        f over the calls of all ranks at once, through `reduce`; P over this call's. The losses, weighted with each
                  rank's tokens, add up to that of all of them (arXiv 2501.11873). With accumulation, each micro-batch by itself.
    layers        those of this call; of all layers at once see `pooled_balance_loss`

    A call without tokens gives 0 (and still calls `reduce`).
    """
    tokens, n_experts = shares_TE.shape
    if over == "sequence" and tokens:
        token_S = routing.token_S[: routing.chosen_S.numel()]
        sequence_S = torch.div(token_S * sequences, tokens, rounding_mode="floor")
        counts_BE = count_rows(sequence_S * n_experts + routing.chosen_S, sequences * n_experts).view(sequences, -1)
        share_BE = counts_BE / counts_BE.sum(dim=1, keepdim=True).clamp(min=1)
        mean_BE = shares_TE.view(sequences, -1, n_experts).mean(dim=1)
        return n_experts * (share_BE * mean_BE).sum() / sequences
    counts_E = count_rows(routing.chosen_S, n_experts)
    if over == "global":
        own_E = counts_E
        counts_E = once("balance", lambda: reduce(own_E))
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return n_experts * (share_E * shares_TE.sum(dim=0)).sum() / max(tokens, 1)


def pooled_balance_loss(counts_LE: Tensor, shares_LE: Tensor) -> Tensor:
    """The balance loss with f and P taken over all layers at once, as if an expert number were the same expert in each of them.

    What transformers adds for OLMoE, Mixtral and Qwen3-MoE is K times this one. counts_LE: rows; shares_LE: sums of the tokens'
    scores, with gradient. It is even as soon as layers make up for each other: `micro_batch` asks for more.
    """
    share_E = counts_LE.sum(dim=0) / counts_LE.sum().clamp(min=1)
    shares_E = shares_LE.sum(dim=0)
    return counts_LE.shape[1] * (share_E * shares_E).sum() / shares_E.detach().sum().clamp(min=1)


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2: keeps router logits small (ST-MoE, arXiv 2202.08906, equation 5)."""
    return logits_TE.logsumexp(dim=1).square().sum() / max(logits_TE.shape[0], 1)


@torch.no_grad()
def update_bias(model: "Transformer", counts_LE: Tensor) -> None:
    """Move each router's selection bias by rate * sign(mean load - load), with the rows per expert of the whole global batch.

    Auxiliary-loss-free balancing, DeepSeek-V3. Call it once after each optimizer step, with the sum over ranks and micro-batches.
    """
    for layer, counts_E in zip(model.moe_layers(), counts_LE, strict=True):
        load_E = counts_E.double()
        layer.router.bias_E += layer.router.config.bias_rate * (load_E.mean() - load_E).sign().float()


def load_figures(counts_LE: Tensor, figures_LF: Tensor) -> dict[str, float]:
    """Figures of one step, from sums over the global batch: rows chosen per expert, int64 (L, E), and FIGURES, (L, 6).

    moe/load_max_over_mean   the busiest expert's rows over the mean
    moe/load_cv              standard deviation of the load over its mean
    moe/dead_fraction        share of experts without a row
    moe/load_entropy         entropy of the load, over log E
    moe/router_entropy       mean entropy of a token's scores, over log E
    moe/dropped, moe/added   choices that capacity, rounding and a limit on a rank's load took away, and that rounding made, per
                             token
    moe/unrouted             tokens that no expert takes, as a share: who lost all choices, or whom expert choice passed over
    moe/padding              rows that tiles add to the routed ones, as a share of these, each micro-batch of a rank by itself;
                             left out where the tile is not known

    Each over all MoE layers (load_max_over_mean: the worst), and of the l-th as moe/layer<l>/....; none without MoE layers.
    """
    if not counts_LE.shape[0]:
        return {}
    n_experts = counts_LE.shape[1]
    load_LE, figures = counts_LE.double(), figures_LF.double()
    rows_L = load_LE.sum(dim=1)
    share_LE = load_LE / rows_L.clamp(min=1)[:, None]
    uniform = torch.log(torch.tensor(float(max(n_experts, 2)), dtype=torch.float64))
    tokens_L = figures[:, 0].clamp(min=1)
    columns = {
        "load_max_over_mean": share_LE.amax(dim=1) * n_experts,
        "load_cv": (share_LE * n_experts).std(dim=1, correction=0),
        "dead_fraction": (counts_LE == 0).double().mean(dim=1),
        "load_entropy": torch.special.entr(share_LE).sum(dim=1) / uniform if n_experts > 1 else torch.ones_like(rows_L),
        "router_entropy": figures[:, 1] / tokens_L / uniform,
        "dropped": figures[:, 2] / tokens_L,
        "added": figures[:, 3] / tokens_L,
        "unrouted": figures[:, 5] / tokens_L,
    }
    if not figures[:, 4].isnan().any():
        columns["padding"] = figures[:, 4] / (rows_L - figures[:, 2] + figures[:, 3]).clamp(min=1)
    result = {
        f"moe/{name}": (v.max() if name == "load_max_over_mean" else v.mean()).item() for name, v in columns.items()
    }
    for layer in range(counts_LE.shape[0]):
        result |= {f"moe/layer{layer}/{name}": v[layer].item() for name, v in columns.items()}
    return result
