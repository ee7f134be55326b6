"""Layouts that fit, fastest first, and why the first is first. A simulation: see moesaic.parallel.time_plan."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moesaic.moe.config import ModelConfig
from moesaic.parallel.hardware import Hardware
from moesaic.parallel.layout import Layout
from moesaic.parallel.memory_plan import Memory, memory_of
from moesaic.parallel.time_plan import Timing, time_of

KNOBS = {"precision": "precision", "expert": "parallel.expert", "replicate": "parallel.replicate", "path": "parallel.expert_path",
         "reshard": "parallel.reshard", "remat": "parallel.remat", "micro_batch": "train.micro_batch"}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """precision: of products. timing: none where it doesn't fit."""

    layout: Layout
    precision: str
    memory: Memory
    timing: Timing | None

    def value(self, name: str) -> Any:
        return self.precision if name == "precision" else getattr(self.layout, name)

    def overrides(self) -> str:
        layout = self.layout
        names = [name for name in KNOBS if layout.zero is None or name not in ("replicate", "reshard")]
        engine = [] if layout.zero is None else [f"parallel.engine=deepspeed parallel.zero_stage={layout.zero}"]
        told = {name: f"{KNOBS[name]}={self.value(name)}" for name in names}
        if self.precision in ("fp8", "fp4"):  # a plan's own knob: a run's is precision=NAME
            told["precision"] = f"products={self.precision}"
        return " ".join([*engine, *told.values()])


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def with_batch(layout: Layout, micro_batch: int, global_batch: int) -> Layout:
    """Every rank takes its share of the global batch in micro-batches of the given size."""
    share = -(-global_batch // layout.world)
    return dataclasses.replace(layout, micro_batch=micro_batch, micro_batches=-(-share // micro_batch))


def search(
    model: ModelConfig,
    layout: Layout,
    hardware: Hardware,
    precisions: Sequence[str],
    global_batch: int,
    efficiency: float,
) -> list[Candidate]:
    """All of: `precisions` of products; divisors of ranks and experts for `expert`; one copy, a copy a node, and whole copies for
    `replicate`; the rest as told in KNOBS. Those that fit come first, by time; then the others, by memory."""
    world, share = layout.world, -(-global_batch // layout.world)
    batches = [m for m in divisors(share) if m * layout.seq_len <= 131_072] or [1]
    experts = divisors(math.gcd(world, model.n_experts))
    zero = layout.zero is not None
    copies = (
        [1]
        if zero
        else sorted({d for d in (1, world // layout.node, world // hardware.domain, world) if d and world % d == 0})
    )
    found = []
    for expert, replicate, reshard, remat in itertools.product(
        experts, copies, (layout.reshard,) if zero else ("auto", "never"), ("none", "selective", "full")
    ):
        paths = ["local"] if expert == 1 else ["all_to_all"]
        if expert > layout.node > 1:
            paths.append("two_hop")
        if layout.path == "fused":
            paths = ["fused"]
        for path, micro in itertools.product(paths, batches):
            changed: dict[str, Any] = {
                "expert": expert,
                "replicate": replicate,
                "path": path,
                "reshard": reshard,
                "remat": remat,
            }
            one = with_batch(dataclasses.replace(layout, **changed), micro, global_batch)
            if one.shared and one.nodes > 1:  # which parallel.fused_shared is not for
                continue
            for compute, kinds in itertools.groupby(sorted(precisions), key=lambda kind: kind == "fp32"):
                one = dataclasses.replace(one, compute="fp32" if compute else "bf16")
                memory = memory_of(model, one)
                fits = memory.total <= hardware.memory
                found += [
                    Candidate(
                        one, kind, memory, time_of(model, one, hardware, kind, efficiency=efficiency) if fits else None
                    )
                    for kind in kinds
                ]
    return sorted(found, key=lambda c: (c.timing is None, c.timing.step if c.timing else c.memory.total))


def largest_batch(model: ModelConfig, layout: Layout, hardware: Hardware) -> int:
    """The most sequences of a micro-batch that fit, 0 where not even one does."""

    def fits(micro: int) -> bool:
        return memory_of(model, dataclasses.replace(layout, micro_batch=micro)).total <= hardware.memory

    low, high = 0, 1
    while fits(high) and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def reasons(candidates: list[Candidate]) -> list[str]:
    """For each knob, the winner against the best layout in which it has another value: how much slower that is, and what takes
    longer there; or that none fits."""
    winner = candidates[0]
    assert winner.timing is not None
    lines = []
    for name, knob in KNOBS.items():
        own = winner.value(name)
        others = [c for c in candidates if c.value(name) != own]
        if not others:
            continue
        other = others[0]
        value = other.value(name)
        if other.timing is None:
            least = other.memory.total / 2**30
            lines.append(f"{knob}={own}: with another value nothing fits; {value} needs at least {least:.0f} GiB")
            continue
        slower = other.timing.step / winner.timing.step - 1
        longer = sorted(
            ((gone(other.timing, what) - gone(winner.timing, what), what) for what in WHAT), reverse=True
        )  # fmt: skip
        because = f"; {WHAT[longer[0][1]]} {longer[0][0] * 1e3:.0f} ms a step longer" if longer[0][0] > 0 else ""
        lines.append(f"{knob}={own}: the best with {value} is {slower:.1%} slower{because}")
    return lines


# What parts of a step's time begin with, in words.
WHAT = {
    "product": "matrix products take", "memory": "passes over memory take", "exposed exchange": "rows travel",
    "exposed weights": "weights and gradients travel", "exposed sums": "sums over copies take", "issuing": "issuing takes",
}  # fmt: skip


def gone(timing: Timing, what: str) -> float:
    """Seconds of a step that go to parts whose name begins with `what`."""
    times = timing.step_parts()
    return sum(seconds for (_, _, name), seconds in times.items() if name.startswith(what))
