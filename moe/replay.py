"""What a forward pass decides, it decides once, also where its activations are computed again in backward.

A recomputed score may differ in its last bit: another kernel, another order of sums, weights that moved. If choices were made
again, a token could go to another expert than in the forward pass, ranks would exchange other rows than they expect, and dice
would be thrown twice. So every choice, every draw and every answer of other ranks goes through `once`. moesaic.parallel.remat
records them in the forward pass and replays them.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_running = threading.local()  # backward runs in threads of its own


class Tape:
    """The decisions of one forward pass through a part of the model, by name."""

    def __init__(self) -> None:
        self.decisions: dict[str, Any] = {}
        self.replaying = False

    @contextmanager
    def record(self) -> Iterator[None]:
        with self._run(False):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        with self._run(True):
            yield

    @contextmanager
    def _run(self, replaying: bool) -> Iterator[None]:
        before = getattr(_running, "tape", None)
        _running.tape, self.replaying = self, replaying
        try:
            yield
        finally:
            _running.tape = before


def once(name: str, decide: Callable[[], T]) -> T:
    """decide(), run without gradients, or in a replay what it gave when it was recorded. `name` is unique within a block."""
    tape: Tape | None = getattr(_running, "tape", None)
    if tape is not None and tape.replaying:
        return tape.decisions[name]
    with torch.no_grad():
        decision = decide()
    if tape is not None:
        assert name not in tape.decisions, name
        tape.decisions[name] = decision
    return decision


def replaying() -> bool:
    """Whether a forward pass is being repeated."""
    tape: Tape | None = getattr(_running, "tape", None)
    return tape is not None and tape.replaying


def on_tape() -> bool:
    """Whether a forward pass is being recorded, so as to be repeated in backward, or is being repeated."""
    return getattr(_running, "tape", None) is not None
