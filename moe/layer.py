"""The feed-forward layers of a block: Mixture of Experts, and the dense one of leading blocks and shared experts.

Letters: T tokens, D model width, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.kernels.products import Linear
from moesaic.kernels.tiles import known_tile
from moesaic.moe.balance import balance_loss, z_loss
from moesaic.moe.config import ModelConfig
from moesaic.moe.dispatch import ExpertPath, LocalPath
from moesaic.moe.experts import Experts
from moesaic.moe.replay import on_tape
from moesaic.moe.router import Router, count_rows, unrouted_tokens

Aux = dict[str, Tensor]


def alone(counts: Tensor) -> Tensor:
    """The sum over all ranks, of one rank: `MoE.reduce` until moesaic.parallel puts a collective in its place."""
    return counts


def plainly(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments): what runs a block or a path until moesaic.parallel.remat puts something else in its place."""
    return function(*arguments)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream for what may run beside the current one; none on a CPU, and for fake tensors of a device that isn't there."""
    return torch.cuda.Stream(device) if device.type == "cuda" and torch.cuda.is_available() else None


def meanwhile(module: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """Start module(x) on a stream of its own. What is returned gives the result, and lets the current stream wait for it.

    Autograd runs each operation's backward on the stream of its forward and waits where gradients cross streams, so backward
    overlaps the same way. On a CPU it is computed at once. So it is where activations are computed again in backward: that
    happens on the stream that first asks for one, and others would read them without waiting.
    """
    side = None if on_tape() else side_stream(x.device)
    if side is None:
        y = module(x)
        return lambda: y
    current = torch.cuda.current_stream(x.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        y = module(x)
    # Freed memory goes back to the stream that allocated it, which must not write there before the other one has read.
    x.record_stream(side)

    def result() -> Tensor:
        current.wait_stream(side)
        y.record_stream(current)
        return y

    return result


class FeedForward(nn.Module):
    """SwiGLU: x_TD -> w_down (silu(gate) * up), with gate and up rows in one matrix."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.w_up = Linear(d_model, 2 * width)
        self.w_down = Linear(width, d_model)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = self.w_up(x_TD).chunk(2, dim=-1)
        return self.w_down(F.silu(gate) * up)


class MoE(nn.Module):
    """A layer of routed experts, with an optional shared one. A token's way:

    1. `router` scores all E experts in fp32 and decides who visits whom, with what weight: a frozen `Routing`.
    2. `path` takes the token to its experts, wherever they are, and brings the weighted sum back. `LocalPath` when the layer
       is made; moesaic.parallel puts another one in its place when experts live on several ranks.
       `run` calls it.
    3. The shared expert, if any, sees every token; the two are added. It and the losses are computed before `path` is called, so
       that backward begins with the experts, and recomputation (moesaic.parallel.remat) can end with them. On CUDA the shared
       expert computes while rows travel, on a stream of its own, and so does its backward.

    x_TD of `sequences` sequences -> (y_TD, aux). aux: `balance` and `z`, scalars, the unweighted losses over this call's
    tokens; `shares`, fp32 (E,), the sums of the tokens' scores; `counts`, int64 (E,), tokens that chose each expert; `figures`,
    fp32 (6,), the sums over tokens that moesaic.moe.balance.FIGURES names.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.balance_over = config.router.balance_over
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = FeedForward(config.d_model, config.d_shared) if config.d_shared else None
        self.path: ExpertPath = LocalPath()
        self.reduce: Callable[[Tensor], Tensor] = alone
        self.run: Callable[..., Any] = plainly

    def forward(self, x_TD: Tensor, sequences: int = 1) -> tuple[Tensor, Aux]:
        routing, scores = self.router(x_TD)
        if self.training:
            routing = self.path.admit(routing)
        reduce = self.reduce if self.training else alone  # an evaluation has no use for the loss
        balance = balance_loss(routing, scores.shares_TE, self.balance_over, sequences, reduce)
        aux = {"balance": balance, "z": z_loss(scores.logits_TE), "shares": scores.shares_TE.sum(dim=0)}
        with torch.no_grad():
            entropy = torch.special.entr(scores.shares_TE).sum()
            tokens = torch.full_like(entropy, routing.tokens)
            tile = known_tile(x_TD.device, self.router.config.rounding_tile)
            padding = (-routing.counts_E % tile).sum().float() if tile else torch.full_like(entropy, torch.nan)
            lost, unrouted = (n.float() for n in (routing.dropped, unrouted_tokens(routing)))
            figures = torch.stack([tokens, entropy, lost, routing.added.float(), padding, unrouted])
            aux |= {"counts": count_rows(routing.chosen_S, routing.counts_E.numel()), "figures": figures}
        shared = None if self.shared is None else meanwhile(self.shared, x_TD)
        y_TD = self.run(self.path, x_TD, routing, self.experts)
        return y_TD if shared is None else y_TD + shared(), aux
