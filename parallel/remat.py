"""Activations that are computed again in backward instead of kept: `parallel.remat`.

    none        all that autograd saves is kept
    selective   of a block, its input and what its routed experts saved are kept; all else is computed again: norms, attention,
                router, shared expert or dense feed-forward. No row travels twice, and no expert computes twice
    full        a block's input is kept; all else is computed again, the experts and the rows' way to them included

Why `selective` keeps the experts: what the rest saves is the most memory for the least work. Per token, in bf16, with causal
attention over S positions and as many key-value heads as query heads (D model width, F expert width, K experts per token):

                   bytes kept by `none`               operations to make them again
    the rest       about 20 D                         8 D^2 + 2 S D
    experts        4 K F, and rows that travelled     4 K D F, and the rows travel again

At S = D the rest gives 2 / D bytes an operation, the experts 1 / D, and these wait for the network besides. The bytes are counted
in tests/parallel/test_remat.py.

**Routing is saved, never recomputed.** Whatever is a choice, chance or an answer of other ranks was decided in the forward pass,
and is replayed (moesaic.moe.replay): experts, drops and rounding, counts, the plan of an exchange, sums over ranks. Weights are
computed again from scores, at the saved indices, for gradients go through them. Figures and losses are those of the forward
pass.

**Order of collectives.** Recomputation begins when backward first needs something of a block, and ends with the last tensor that
backward needs: with the operation of the experts, for a MoE layer calls its path last. In `full`, rows are so exchanged once
more on their way out, never on their way back. Every rank runs the same operations in the same order, whatever its rows.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from moesaic.moe.dispatch import ExpertPath
from moesaic.moe.experts import Experts
from moesaic.moe.layer import MoE
from moesaic.moe.model import Block, Transformer
from moesaic.moe.replay import Tape, replaying
from moesaic.moe.router import Routing

MODES = ("none", "selective", "full")


def recompute(model: Transformer, mode: str) -> None:
    """Let the blocks of `model` compute activations again in backward, as `mode`, one of `MODES`, says. FSDP2 and expert paths
    may come before or after."""
    assert mode in MODES, mode
    if mode == "none":
        return
    for block in model.blocks:
        assert isinstance(block, Block)
        block.run = repeated
        if mode == "selective" and isinstance(block.ffn, MoE):
            block.ffn.run = kept


def repeated(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), of which only the arguments and the decisions are kept for backward."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    tape = Tape()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return tape.record(), tape.replay()

    # Nothing in a block draws random numbers but what `once` guards.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def kept(path: ExpertPath, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """path(...), which keeps what it saves, and is left out when its block is computed again."""
    if replaying():
        # Backward needs no value of it: it is only added. Were one used, NaN would tell.
        return x_TD.new_full((), torch.nan).expand_as(x_TD)
    with saved_tensors_hooks(_keep, _keep):
        return path(x_TD, routing, experts)


def _keep(tensor: Tensor) -> Tensor:
    # Detached: a tensor that held the operation it came from, which holds the tensor, would never be freed.
    return tensor.detach()
