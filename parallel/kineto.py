"""What a Kineto trace says of a step, by layer and phase: work of the host, kernels and how long they waited in the queue, what
the kernels of collectives took and how much of that was hidden, and memory.

The trace has our ranges (moesaic.parallel.collectives) around phases, modules and collectives. An operator of backward belongs to
the module whose forward made it: autograd gives both the same sequence number. A kernel belongs where it was launched from, by
correlation id.

`queue_us` is SKIP's TKLQT (arXiv 2504.11750): over all kernels, the time from the begin of the launch to the begin of the kernel.
It is flat while the host is the slower of the two, and grows with a full queue. A CPU has no launches: there `ops`, their time
and the time between them (Python, autograd, hooks) say what the host does.
"""

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from moesaic.parallel.collectives import COLLECTIVE, MODULE, PHASE, Event

BACKWARD = "autograd::engine::evaluate_function: "
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
Span = tuple[float, float]


@dataclass
class Work:
    """Of a module, its parts left out, in a phase. us: of operators (ops_us) and between them (between_us) on the host,
    collectives left out; of kernels on a GPU, and in its queue."""

    ops: int = 0
    ops_us: float = 0.0
    between_us: float = 0.0
    kernels: int = 0
    kernels_us: float = 0.0
    queue_us: float = 0.0


@dataclass
class Reading:
    """work by (module, phase); memory: (us, bytes allocated, module, phase) at each change; spans: (module, phase, begin, end) of
    modules and backward's operators, and of phases with an empty module, in us; collectives: begin of each on the host; kernels:
    (begin, end) of theirs; computing: of all others."""

    work: dict[tuple[str, str], Work] = field(default_factory=lambda: defaultdict(Work))
    memory: list[tuple[float, int, str, str]] = field(default_factory=list)
    spans: list[tuple[str, str, float, float]] = field(default_factory=list)
    collectives: dict[int, float] = field(default_factory=dict)
    kernels: dict[int, list[Span]] = field(default_factory=lambda: defaultdict(list))
    computing: list[Span] = field(default_factory=list)


def read(events: Iterable[dict[str, Any]], device_type: int) -> Reading:
    """events: `traceEvents` of a Chrome trace of torch.profiler. device_type: whose memory, 0 of the CPU, 1 of CUDA."""
    host: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    launched: dict[int, dict[str, Any]] = {}
    phases: list[tuple[float, float, str]] = []
    forward: dict[int, str] = {}  # of sequence numbers
    reading = Reading()
    for e in events:
        category, name = e.get("cat"), e.get("name", "")
        if category == "user_annotation" and name.startswith(PHASE):
            phases.append((e["ts"], e["ts"] + e["dur"], name.removeprefix(PHASE)))
        if category in DEVICE:
            launched[e["args"]["correlation"]] = e
        elif (
            category in ("cpu_op", "cuda_runtime", "cuda_driver")
            or (category == "user_annotation" and name.startswith((PHASE, MODULE, COLLECTIVE)))
            or (name == "[memory]" and e["args"]["Device Type"] == device_type)
        ):
            host[e["tid"]].append(e)
    phases.sort()
    starts = [p[0] for p in phases]

    def phase_at(ts: float) -> str:
        at = bisect.bisect_right(starts, ts) - 1
        return phases[at][2] if at >= 0 and ts < phases[at][1] else "other"

    # Threads in the order of their first event: forward's before that of backward.
    for thread in sorted(host.values(), key=lambda found: min(e["ts"] for e in found)):
        _sweep(thread, phase_at, forward, launched, reading)
    reading.memory.sort()
    return reading


def _sweep(
    thread: list[dict[str, Any]], phase_at: Any, forward: dict[int, str], launched: dict[int, Any], reading: Reading
) -> None:
    """Add what one thread of the host did. Its events nest: each instant belongs to the innermost."""
    stack: list[list[Any]] = []  # [end, kind, module, index of the collective or -1, time of its own, phase]

    def pop() -> None:
        _, kind, module, index, own, phase = stack.pop()
        work = reading.work[module, phase]
        if index < 0 and kind == "op":
            work.ops_us += own
        elif index < 0:
            work.between_us += own

    for e in sorted(thread, key=lambda e: (e["ts"], -e.get("dur", 0))):
        ts, duration, name = e["ts"], e.get("dur", 0.0), e["name"]
        while stack and stack[-1][0] <= ts:
            pop()
        _, above, module, index, *_ = stack[-1] if stack else (0, "", "", -1)
        phase, args = phase_at(ts), e.get("args", {})
        if name == "[memory]":
            reading.memory.append((ts, args["Total Allocated"], module, phase))
            continue
        if e["cat"].startswith("cuda"):
            if kernel := launched.get(args.get("correlation", -1)):
                span = kernel["ts"], kernel["ts"] + kernel["dur"]
                work = reading.work[module, phase]
                if index >= 0 and re.search("[nr]ccl", kernel["name"], re.I):
                    reading.kernels[index].append(span)
                else:
                    reading.computing.append(span)
                    work.kernels += 1
                    work.kernels_us += kernel["dur"]
                    work.queue_us += max(0.0, kernel["ts"] - ts)
            continue
        kind, number = "op", args.get("Sequence number")
        if name.startswith(PHASE):
            kind, module = "range", ""
        elif name.startswith(MODULE):
            kind, module = "range", name.removeprefix(MODULE)
        elif name.startswith(COLLECTIVE):
            kind, index = "range", int(name.removeprefix(COLLECTIVE))
            reading.collectives[index] = ts
        elif name.startswith(BACKWARD):
            kind, module = "range", forward.get(number, module)
        elif number is not None and phase == "forward":
            forward[number] = module  # the last operator that shows a number is the one that took it
        if stack:
            stack[-1][4] -= duration
        if kind == "op" and above != "op" and index < 0:
            reading.work[module, phase].ops += 1
        if kind == "range" and not name.startswith(COLLECTIVE):
            reading.spans.append((module, phase, ts, ts + duration))
        stack.append([ts + duration, kind, module, index, duration, phase])
    while stack:
        pop()


def place(events: list[Event], reading: Reading) -> float:
    """Give collectives the times of their kernels, where there are such. Returns us to add to times of the trace to get those of
    time.monotonic()."""
    found = [1e6 * e.began - reading.collectives[e.index] for e in events if e.index in reading.collectives]
    shift = sorted(found)[len(found) // 2] if found else 0.0
    busy = union(reading.computing)
    for event in events:
        if spans := reading.kernels.get(event.index):
            begin, end = min(s[0] for s in spans), max(s[1] for s in spans)
            event.began, event.ended = (begin + shift) / 1e6, (end + shift) / 1e6
            event.exposed = (end - begin - overlap((begin, end), busy)) / 1e6
    return shift


def union(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def overlap(span: Span, merged: list[Span]) -> float:
    at = bisect.bisect_right(merged, (span[0],)) - 1
    total = 0.0
    for begin, end in merged[max(0, at) :]:
        if begin >= span[1]:
            break
        total += max(0.0, min(end, span[1]) - max(begin, span[0]))
    return total
