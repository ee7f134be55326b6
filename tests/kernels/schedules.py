"""Schedules of the fused kernels: several programs on each of several ranks, every one a process, with random delays between
steps.

    python -m tests.kernels.schedules [--count N] [--seed S] [--jobs J]     what `make fused-schedules` runs

One process makes the memory of all ranks, then forks one child for each program: they share what was mapped before, at the same
addresses. So programs of a rank run at the same time, which Triton's interpreter alone never does. A schedule is drawn from its
seed: ranks, programs, tokens, routing, layers and micro-batches back to back on one heap, delays. Results are held to a plain
reference, and to themselves.
"""

import argparse
import itertools
import mmap
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels import fused_ep, fused_ep_backward, fused_rows
from moesaic.kernels.experts import experts_reference
from moesaic.kernels.fused_protocol import EPOCH, failures, records, regions
from moesaic.kernels.interpret import interpreter
from moesaic.kernels.permute import Rows, sort_slots
from moesaic.kernels.symmetric import Heap, starts
from moesaic.kernels.tiles import Tile

TILE = Tile(16, 16, 16)


@dataclass(frozen=True)
class Schedule:
    """steps: of each launch, (layer, micro-batch, whether backward), in order. apart: of rows out and of results back, a launch
    each, instead (moesaic.kernels.fused_rows)."""

    seed: int
    ranks: int
    programs: int
    experts: int
    top_k: int
    tokens: tuple[int, ...]
    skew: float
    once: bool
    keep: bool
    wave: int
    delay: float
    steps: tuple[tuple[int, int, bool], ...]
    d: int = 20
    f: int = 12
    apart: bool = False


def drawn(seed: int) -> Schedule:
    r = random.Random(seed)
    ranks, programs = r.choice([(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (4, 1), (4, 2)])
    experts = ranks * r.choice([1, 2])
    orders = (
        ((0, 0, False), (0, 0, True)),
        ((0, 0, False), (1, 0, False), (1, 0, True), (0, 0, True)),
        ((0, 0, False), (0, 0, True), (0, 1, False), (0, 1, True)),
        ((0, 0, False), (0, 1, False), (0, 2, False)),
    )
    return Schedule(
        seed, ranks, programs, experts, r.randint(1, min(3, experts)),
        tuple(r.choice([0, 1, 2, 7, 18]) for _ in range(ranks)), r.choice([0.0, 0.0, 2.0, 20.0]), r.random() < 0.6,
        r.random() < 0.5, r.choice([1, 2, 32]), r.choice([0.0, 1e-4, 2e-3]), r.choice(orders), apart=r.random() < 0.3,
    )  # fmt: skip


# ---------------------------------------------------------------- memory and inputs, made before any child


def shared_heaps(ranks: int, shapes: Any) -> list[Heap]:
    """A heap of each rank, all in this process and its children."""
    offsets, size = starts(shapes)
    memory = [torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8) for _ in range(ranks)]
    table = torch.tensor([[m.data_ptr() + offset for m in memory] for offset in offsets])
    return [Heap(rank, ranks, shapes, memory[rank], memory, table) for rank in range(ranks)]


@dataclass
class Inputs:
    """Of one rank in one layer and micro-batch."""

    x: Tensor
    dy: Tensor
    weights: Tensor
    rows: Rows
    up: Tensor
    down: Tensor
    results: dict[str, Any] = field(default_factory=dict)

    def made(self, d: int, back: bool) -> Tensor:
        """(S, D + 1), a function of the inputs."""
        slots = len(self.rows.source_R)
        g = torch.Generator().manual_seed(int(self.weights.sum() * 1e6) + back)
        return torch.randn(slots, d + 1, generator=g)


def inputs(s: Schedule, layer: int, batch: int) -> list[Inputs]:
    g = torch.Generator().manual_seed(s.seed)
    made, e = [], s.experts // s.ranks
    up = torch.randn(8, s.experts, 2 * s.f, s.d, generator=g)[layer] / s.d**0.5
    down = torch.randn(8, s.experts, s.d, s.f, generator=g)[layer] / s.f**0.5
    g.manual_seed(s.seed * 64 + layer * 8 + batch)
    for rank, tokens in enumerate(s.tokens):
        likely = torch.arange(1, s.experts + 1).float() ** -s.skew
        scores = torch.rand(tokens, s.experts, generator=g).log() / likely
        ids = scores.topk(s.top_k).indices.flatten()
        counts = torch.bincount(ids, minlength=s.experts)
        rows = sort_slots(torch.arange(tokens).repeat_interleave(s.top_k), ids, counts, tokens, s.top_k)
        x, dy = torch.randn(2, tokens, s.d, generator=g).unbind()
        own = slice(rank * e, rank * e + e)
        weights = torch.rand(tokens * s.top_k, generator=g)
        made.append(Inputs(x, dy, weights, rows, up[own].contiguous(), down[own].contiguous()))
    return made


Before = tuple[Callable[[], None], Tensor] | None  # what a rank's first program does, and then says in shared memory


class Captured:
    """Takes a kernel's place: notes launches instead of making them."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: self.calls.append((args, options))


def launches(
    s: Schedule, heaps: list[Heap], settings: list[fused_ep.Setting]
) -> tuple[list[list[Any]], dict[Any, list[Inputs]]]:
    """([rank][step] of (kernel, arguments, options, what to do before), inputs by (layer, micro-batch)); all in shared memory."""
    names = ("_fused_forward_kernel", "_fused_backward_kernel", "_carry_kernel", "_give_back_kernel")
    files = (fused_ep, fused_ep_backward, fused_rows, fused_rows)
    real = [getattr(file, name) for file, name in zip(files, names, strict=True)]
    data: dict[Any, list[Inputs]] = {}
    steps: list[list[Any]] = [[] for _ in heaps]
    captured = [Captured() for _ in files]
    try:
        for file, name, capture in zip(files, names, captured, strict=True):
            setattr(file, name, capture)
        for layer, batch, back in s.steps:
            mine = data.setdefault((layer, batch), inputs(s, layer, batch))
            for rank in range(s.ranks):
                sent = torch.zeros(s.ranks, len(fused_ep.PHASES), dtype=torch.int64)
                before = (launch_apart if s.apart else launch)(s, mine, rank, settings[rank], sent, back)
                for kernel, capture in zip(real, captured, strict=True):
                    for args, options in capture.calls:
                        for value in args:
                            if isinstance(value, Tensor) and value.data_ptr() not in {
                                h.table.data_ptr() for h in heaps
                            }:
                                value.share_memory_()
                        steps[rank].append((kernel, args, options, before if kernel is real[-1] else None))
                    capture.calls.clear()
    finally:
        for file, name, kernel in zip(files, names, real, strict=True):
            setattr(file, name, kernel)
    return steps, data


def launch(
    s: Schedule, ranks: list[Inputs], rank: int, setting: fused_ep.Setting, sent: Tensor, back: bool
) -> None:  # fmt: skip
    i = ranks[rank]
    common = (i.weights, i.up, i.down, i.rows, "swiglu", setting, sent)
    if back:
        y, h, tables, kept = i.results["forward"]
        i.results["backward"] = fused_ep_backward.backward(i.dy, i.x, h, kept, tables, *common)
    else:
        i.results["forward"] = fused_ep.forward(i.x, *common, keep=s.keep)


def launch_apart(
    s: Schedule, ranks: list[Inputs], rank: int, setting: fused_ep.Setting, sent: Tensor, back: bool
) -> Before:  # fmt: skip
    """Results are made here, as if by experts: of each slot a row and a number, wherever it is computed. Returned: what looks at
    the rows that came, between the launches."""
    i, name = ranks[rank], "backward" if back else "forward"
    y = torch.cat([other.made(s.d, back)[at] for other, at in slots_of(s, ranks, rank)])
    numbers = torch.arange(len(i.x)) + 1000 * rank
    given = dict(tables=i.results["tables"]) if back else dict(weights_S=i.weights, numbers_T=numbers)
    tables = fused_rows.carry(i.dy if back else i.x, i.rows, setting, sent, int(back), **given)
    i.results["tables"] = tables
    dweights = y[:, -1].contiguous() if back else None
    i.results[name] = fused_rows.give_back(
        y[:, :-1].contiguous(), i.rows, len(i.x), setting, tables, sent, int(back), dweights
    )
    seen = y.new_full((len(y), s.d + 3), torch.nan).share_memory_()
    i.results[f"{name} came"], looked = seen, torch.zeros(1).share_memory_()

    def look() -> None:
        came = fused_rows.arrived(setting, tables)
        parts = [
            fused_rows.values_of(setting, came.holder_N),
            came.of(setting, "weight")[:, None],
            came.of(setting, "numbers")[:, None],
        ]
        seen.copy_(torch.cat([*parts, came.rows.expert_R[:, None]], dim=1))
        looked.fill_(1)

    return look, looked


def slots_of(s: Schedule, ranks: list[Inputs], rank: int) -> list[tuple[Inputs, Tensor]]:
    """Those that come to a rank, in the order of their rows: (whose, which), by expert and source."""
    e = s.experts // s.ranks
    experts = range(rank * e, rank * e + e)
    return [(i, (i.rows.expert_R == x).nonzero()[:, 0]) for x in experts for i in ranks]


# ---------------------------------------------------------------- one program


def delay_steps(seed: int, longest: float) -> None:
    """Sleep for a random time before stores and atomics of this process."""
    r = random.Random(seed)
    slow = r.choice([0.02, 0.1, 0.5])

    def slowly(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            if r.random() < slow:
                time.sleep(r.random() * longest)
            return original(*arguments, **named)

        return run

    for name in ("create_masked_store", "create_store", "create_atomic_rmw", "create_atomic_cas", "create_masked_load"):
        if hasattr(interpreter.InterpreterBuilder, name):
            setattr(interpreter.InterpreterBuilder, name, slowly(getattr(interpreter.InterpreterBuilder, name)))


def program(s: Schedule, heap: Heap, steps: list[Any], rank: int, number: int) -> None:
    torch.set_num_threads(1)
    if s.delay:
        delay_steps(s.seed * 97 + rank * 11 + number, s.delay)
    epoch = heap.view("control")
    for n, (kernel, args, options, before) in enumerate(steps):
        while int(epoch[EPOCH.value]) != n:  # a launch begins when the one before has ended, as on a stream
            if int(heap.view("failed")[:, 0].sum()):
                os._exit(0)
            time.sleep(1e-3)
        if before and number == 0:
            before[0]()
        while before and not before[1].item():
            time.sleep(1e-3)
        kernel[(1,)](*args[:-1], number, **options)
    os._exit(0)


# ---------------------------------------------------------------- one schedule


class ScheduleFailed(AssertionError):
    pass


def run(
    s: Schedule, trace: int = 0, timeout: float = 120.0, change: Callable[[int, int], None] | None = None,
    spins: int = 100_000,
) -> list[list[int]]:  # fmt: skip
    """Run a schedule and check results. Returns the events of all ranks, by ticket, where `trace` gives them room.

    change(rank, program) runs in each child first. Raises ScheduleFailed, with the schedule, on a hang, a failure or a wrong
    result.
    """
    tiles = fused_ep.room(s.ranks, s.experts, sum(s.tokens) * s.top_k, TILE.m)
    shapes = regions(
        s.ranks, s.experts, s.d, torch.float32, max(1, max(s.tokens) * s.top_k), tiles, TILE.m, fused_ep.most_columns(s.d, TILE),
        fused_ep.most_columns(s.f, TILE, True), not s.keep, trace, s.apart,
    )  # fmt: skip
    heaps = shared_heaps(s.ranks, shapes)
    settings = [fused_ep.Setting(h, s.experts, TILE, s.once, spins, s.programs, s.wave, trace) for h in heaps]
    steps, data = launches(s, heaps, settings)
    context = multiprocessing.get_context("fork")

    def child(rank: int, number: int) -> None:
        if change:
            change(rank, number)
        program(s, heaps[rank], steps[rank], rank, number)

    children = [
        context.Process(target=child, args=(rank, number), daemon=True)
        for rank in range(s.ranks)
        for number in range(s.programs)
    ]
    for process in children:
        process.start()
    end, left = time.monotonic() + timeout, children
    while left and time.monotonic() < end and not any(process.exitcode for process in children):
        connection.wait([process.sentinel for process in left], end - time.monotonic())
        left = [process for process in left if process.is_alive()]
    codes = [process.exitcode for process in children]
    for process in children:
        process.kill()
        process.join()
    if any(codes):
        raise ScheduleFailed(f"{s}: exit codes {codes}")
    failed = [failures(heap.view("failed")) for heap in heaps]
    if any(failed):
        raise ScheduleFailed(f"{s}: {[str(f) for f in failed[0]]}")
    if left:
        raise ScheduleFailed(f"{s}: a hang, of programs {[i for i, code in enumerate(codes) if code is None]}")
    if s.apart:
        check_apart(s, data)
    else:
        check(s, data)
    return sorted(record for heap in heaps for record in records(heap)) if trace else []


def check(s: Schedule, data: dict[Any, list[Inputs]]) -> None:
    """Each result against autograd over whole weights in fp64."""
    for (layer, batch), ranks in data.items():
        weights = [torch.cat([getattr(i, name) for i in ranks]).double().requires_grad_() for name in ("up", "down")]
        wanted = []
        for i in ranks:
            x, w = (t.double().requires_grad_() for t in (i.x, i.weights))
            if len(i.x):
                y = experts_reference(x, w, *weights, None, None, i.rows.source_R, i.rows.counts_E, "swiglu")
                y.backward(i.dy.double())
            else:
                y, x.grad, w.grad = x.detach(), torch.zeros_like(x), torch.zeros_like(w)
            wanted.append([y.detach(), x.grad, w.grad])
        e = s.experts // s.ranks
        # Of all ranks: one rank's may be a single sum whose terms cancel.
        largest = [
            max((t.abs().max().item() for t in each if t.numel()), default=0.0) for each in zip(*wanted, strict=True)
        ]
        for rank, i in enumerate(ranks):
            got = [i.results["forward"][0], *i.results.get("backward", ())]
            grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
            want = wanted[rank] + [grad[rank * e : rank * e + e] for grad in grads]
            scales = [*largest, *(grad.abs().max().item() for grad in grads)]
            for name, a, b, scale in zip(("y", "dx", "dweights", "dup", "ddown"), got, want, scales, strict=False):
                error = (a - b).abs().max() / max(scale, 1e-6) if a.numel() else torch.zeros(())
                if not error < 1e-5:
                    raise ScheduleFailed(f"{s}: rank {rank} layer {layer} batch {batch}: {name} off by {error:.1e}")


def check_apart(s: Schedule, data: dict[Any, list[Inputs]]) -> None:
    """Which rows came, with what, and sums of what was given back, slot by slot."""
    for (layer, batch), ranks in data.items():
        for rank, name in itertools.product(range(s.ranks), ("forward", "backward")):
            i, back = ranks[rank], name == "backward"
            if name not in i.results:
                continue
            made, (y, dweights) = i.made(s.d, back), i.results[name]
            want = torch.zeros_like(y).index_add_(0, i.rows.source_R, made[:, :-1])
            right = torch.allclose(y, want, atol=1e-5) and (dweights is None or torch.equal(dweights, made[:, -1]))
            came = []
            for other, at in slots_of(s, ranks, rank):
                tokens = other.rows.source_R[at]
                numbers = tokens + 1000 * [i is other for i in ranks].index(True)
                whose = other.rows.expert_R[at] - rank * (s.experts // s.ranks)
                told = torch.stack([other.weights[at], numbers, whose], dim=1)
                came.append(torch.cat([(other.dy if back else other.x)[tokens], told], dim=1))
            seen = i.results[f"{name} came"]
            numbers_too = s.d if back else s.d + 2  # backward sends no weights and numbers
            want = torch.cat(came)
            right &= torch.equal(seen[:, :numbers_too], want[:, :numbers_too]) and torch.equal(seen[:, -1], want[:, -1])
            if not right:
                raise ScheduleFailed(f"{s}: rank {rank} layer {layer} batch {batch}: {name} is wrong")


def main() -> int:
    parser = argparse.ArgumentParser(description="run random schedules of the fused kernels")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    began, done, failed = time.monotonic(), 0, 0

    def one(seed: int) -> str:
        try:
            run(drawn(seed))
        except ScheduleFailed as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(given.jobs) as pool:
        for told in pool.map(one, range(given.seed, given.seed + given.count)):
            done, failed = done + 1, failed + bool(told)
            if told:
                print(f"FAILED {told}", flush=True)
            if done % 25 == 0:
                print(f"{done} schedules, {failed} failed, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{done} schedules from seed {given.seed}, {failed} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
