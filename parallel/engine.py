"""What the training loop and checkpoints ask of an engine, and what the engines share."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from moesaic.moe.model import Transformer

MOMENTS = ("exp_avg", "exp_avg_sq")


class Groups(Protocol):
    """What sets a learning rate sees of an optimizer, or of two."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


class Engine(Protocol):
    """What turns losses into new weights. A training step:

        for each micro-batch of this rank:   engine.backward(loss of engine.model(...), last=is it the step's last)
        set the learning rate in engine.optimizer.param_groups
        norm = engine.step(clip)

    model      call it; its weights may be whole only inside its forward. It has the Transformer's attributes and methods, but
               its `named_parameters` may not be those of the model
    optimizer  has param_groups

    `weights`, `gradients` and `moments` are by name in the model (moments: `exp_avg.` and `exp_avg_sq.` before it), and of the
    whole, wherever its parts lie: plain tensors that every rank holds alike, or tensors in pieces, with a `full_tensor()` that
    gives the whole (collective). They are what the engine works with, not copies.
    """

    model: Transformer

    @property
    def optimizer(self) -> Groups: ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`, which is divided by the tokens of the global batch: sums over ranks. Collective."""

    def step(self, clip: float, skip: bool = False) -> Tensor:
        """Scale gradients so that their global norm is at most `clip` (0: leave them), update the weights, clear the gradients.
        Where the norm is not finite, on any rank, for whichever parameter, nothing is updated anywhere: weights, moments and
        `steps` stay as they were, of dense parameters and experts alike, and the gradients are cleared. `skip`, the same on
        every rank, asks for that. Returns the norm before, fp32 scalar on the host, equal on every rank. Collective, and waits
        for the device."""

    def rest(self) -> None:
        """After forward passes without a backward one: let go of what they gathered."""

    def weights(self) -> dict[str, Tensor]:
        """Parameters, fp32, and buffers."""

    def gradients(self) -> dict[str, Tensor]:
        """Between the backward that is the last of its step, and `step`."""

    def moments(self) -> dict[str, Tensor]:
        """AdamW's."""

    def steps(self) -> Tensor:
        """AdamW's count of steps, a scalar."""

    def make_moments(self) -> None:
        """Make moments, zero, before any step."""

    def loaded(self, steps: Tensor) -> None:
        """`weights` and `moments` were overwritten by those after `steps` steps: make all else agree with them. Collective."""


def make_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    for p in parameters:
        # AdamW's fused kernel wants the step count beside the parameter, on its device.
        step = torch.zeros((), device=p.device)
        optimizer.state[p] = {"step": step} | {m: torch.zeros_like(p) for m in MOMENTS}


def count_steps(optimizer: torch.optim.Optimizer) -> Tensor:
    return next((state["step"] for state in optimizer.state.values() if "step" in state), torch.tensor(0.0))


def set_steps(optimizer: torch.optim.Optimizer, steps: Tensor) -> None:
    for p, state in optimizer.state.items():
        state["step"] = steps.to(p.device, copy=True)  # beside the parameter, as in `make_moments`
