"""Weights that hop between two values of their cast are put on one of them (`precision.deosc_period`).

A weight near the boundary of two codes crosses it with the smallest step: it hardly moves, and its cast jumps forth and back.
Over a window of steps, with w the weight and q its cast in fprop,

    moved = sum of |w_t - w_(t-1)|     hopped = sum of |q_t - q_(t-1)|     at the end, where hopped >= ratio * moved > 0: w = q

as TetraJet-v2 (arXiv 2510.27527) and AMD's ALTO (github.com/AMD-AGI/ALTO) do it. Four more values a weight, spread like it.
Every step, each matrix is gathered once, but for experts that are sharded by expert, to be cast as forward casts it.

Windows begin at deosc_start + n * deosc_period; they are in no checkpoint. A run that resumes within one starts it anew, and
differs from one that was not interrupted; at the end of a window it does not.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moesaic.moe.low import full
from moesaic.moe.model import Transformer
from moesaic.parallel.engine import Engine
from moesaic.parallel.shards import parts


class Deoscillation:
    """Call `start` when weights are there, then `after` each step."""

    def __init__(self, model: Transformer, engine: Engine) -> None:
        self.precision, self.engine = model.precision, engine
        self.state: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}

    @torch.no_grad()
    def start(self, step: int) -> None:
        """The weights are those after `step` steps."""
        self.state = {}
        if step >= self.precision.config.deosc_start:
            for name, pairs in self._pairs():
                self.state[name] = [(w.clone(), q, torch.zeros_like(w), torch.zeros_like(w)) for w, q in pairs]

    @torch.no_grad()
    def after(self, step: int) -> int | None:
        """`step` steps are done. At the end of a window, how many weights of all ranks were moved, else None. Collective."""
        config = self.precision.config
        if self.precision.high:  # to the end of the run: no window begins any more
            self.state = {}
            return None
        if not self.state:
            self.start(step)
            return None
        ended = (step - config.deosc_start) % config.deosc_period == 0
        snapped = torch.zeros((), dtype=torch.int64)
        for name, pairs in self._pairs():
            for (before, before_q, moved, hopped), (w, q) in zip(self.state[name], pairs, strict=True):
                moved += (w - before).abs()
                hopped += (q - before_q).abs()
                if ended:
                    hops = (moved > 0) & (hopped >= config.deosc_ratio * moved)
                    w.copy_(torch.where(hops, q, w))
                    snapped += hops.sum().cpu()
                    moved.zero_()
                    hopped.zero_()
                before.copy_(w)
                before_q.copy_(q)
        if not ended:
            return None
        self.engine.loaded(self.engine.steps())
        snapped = snapped.to(w.device)
        dist.all_reduce(snapped)
        return int(snapped)

    def _pairs(self) -> Iterator[tuple[str, list[tuple[Tensor, Tensor]]]]:
        """Of each weight that is cast: the parts that this rank holds, in place, and their casts."""
        weights = self.engine.weights()
        for name, weight in self.precision.weights.items():
            held: Any = weights[name]
            own = parts(name, held)
            if (
                isinstance(held, DTensor)
                and held.ndim == 3
                and all(p.is_shard(0) or p.is_replicate() for p in held.placements)
            ):
                casts = [full(weight.cast("fprop", "w", w)) for _, w in own]
            else:
                whole = held.full_tensor() if hasattr(held, "full_tensor") else held
                cast = full(weight.cast("fprop", "w", whole))
                boxes = [tuple(slice(o, o + n) for o, n in zip(p.offsets, p.sizes, strict=True)) for p, _ in own]
                casts = [cast[box].clone() for box in boxes]
            yield name, [(w, q) for (_, w), q in zip(own, casts, strict=True)]
