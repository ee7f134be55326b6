"""Losses that keep experts evenly used, and the figures that show whether they are.

Letters: T tokens, E experts, K experts per token. Every value is over one routing domain: one rank's micro-batch.
"""

import torch
from torch import Tensor


def balance_loss(probs_TE: Tensor, counts_E: Tensor) -> Tensor:
    """E * sum_e f_e P_e, with f_e expert e's share of the rows and P_e its mean probability; 1 when both are even.

    Switch Transformer (arXiv 2101.03961) equation 4, with the rows of all K choices. The gradient flows through P alone.
    A domain without tokens gives 0.
    """
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return probs_TE.shape[1] * (share_E * probs_TE.sum(dim=0)).sum() / max(probs_TE.shape[0], 1)


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2: keeps router logits small (ST-MoE, arXiv 2202.08906, equation 5)."""
    return logits_TE.logsumexp(dim=1).square().sum() / max(logits_TE.shape[0], 1)


def load_figures(counts_LE: Tensor) -> dict[str, float]:
    """Figures of one step from the rows per expert, int64 (L, E), summed over the global batch.

    moe/load_max_over_mean: the busiest expert's rows over the mean, worst layer; moe/load_cv: standard deviation over the mean,
    mean of layers; moe/dead_fraction: share of experts that got no row; moe/load_entropy: entropy of the load over log E, mean.
    """
    load_LE = counts_LE.double()
    share_LE = load_LE / load_LE.sum(dim=1, keepdim=True).clamp(min=1)
    n_experts = counts_LE.shape[1]
    entropy_L = torch.special.entr(share_LE).sum(dim=1)
    uniform = torch.log(torch.tensor(float(max(n_experts, 2)), dtype=torch.float64))
    return {
        "moe/load_max_over_mean": (share_LE.amax(dim=1) * n_experts).max().item(),
        "moe/load_cv": ((share_LE * n_experts).std(dim=1, correction=0)).mean().item(),
        "moe/dead_fraction": (counts_LE == 0).double().mean().item(),
        "moe/load_entropy": (entropy_L / uniform).mean().item() if n_experts > 1 else 1.0,
    }
