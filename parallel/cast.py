"""Products in another type than weights are kept in, for an engine that knows of one type alone.

What FSDP2's mixed precision does, done where a weight is used: it is cast, and its gradient comes back in the type of what
is kept, to be summed over micro-batches and ranks in it. The engine sees fp32 and nothing else. DeepSpeed's own bf16 differs: its
router would score tokens with bf16 weights, stage 0 adds up micro-batches in bf16, and stage 1 takes another optimizer.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.moe.experts import Experts
from moesaic.moe.model import Transformer
from moesaic.moe.router import Router


def compute_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Let `module` and what lies below it compute with weights cast to `dtype`, but for routers, which need fp32, experts, which
    FSDP2 casts, and layers of low precision (moesaic.moe.low), which cast by themselves. Names, modules and parameters stay what
    they are."""
    if isinstance(module, (Router, Experts)) or "forward" in vars(module):
        return
    for child in module.children():
        compute_in(child, dtype)
    forward: Any = module.forward
    owner: Any = module.head if isinstance(module, Transformer) else module  # the loss takes the weight of the head
    if owner is module and isinstance(owner, nn.Linear):
        assert [name for name, _ in owner.named_parameters(recurse=False)] == ["weight"]
        module.forward = lambda x: CastLinear.apply(x, owner.weight)
    elif list(owner.parameters(recurse=False)):
        module.forward = lambda *inputs, **named: with_cast(owner, dtype, forward, *inputs, **named)


def with_cast(module: nn.Module, dtype: torch.dtype, forward: Any, *inputs: Any, **named: Any) -> Any:
    """What `forward` gives, with casts in the place of the parameters of `module`."""
    # Python looks for an attribute here first, and torch.nn.Module for a parameter only where it is missing.
    casts = {name: p.to(dtype) for name, p in module.named_parameters(recurse=False)}
    module.__dict__.update(casts)
    try:
        return forward(*inputs, **named)
    finally:
        for name in casts:
            del module.__dict__[name]


class CastLinear(torch.autograd.Function):
    """x w^T in the type of x (..., D), for w (F, D). Keeps w itself, which ZeRO-3 lets go until backward, not its cast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return dy @ w.to(dy.dtype), (dy.flatten(0, -2).T @ x.flatten(0, -2)).to(w.dtype)
