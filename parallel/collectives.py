"""What each collective of a step is for, how much it moves between whom, how long it takes, and who is waited for.

`Recorder` does the collectives that moesaic.parallel.trace notes, whichever engine asks for them and whichever backend carries
them, and keeps an `Event` of each. `exchange` then puts the ranks' events side by side.

**Bytes** are those that must travel: each rank's part, straight from the rank that has it to the one that needs it; rings move as
many. With n ranks, own rank w, and c_p the bytes of the p-th of n parts (of whole numbers, first parts larger):

    operation                       sent to p                       received from p
    all_gather                      what this rank gives            what p gives
    reduce_scatter                  p's part                        this rank's part
    all_reduce                      c_p + c_w                       the same: a reduce_scatter and an all_gather
    all_to_all                      the split for p                 the split of p
    broadcast, scatter              from the source alone           from the source alone
    gather, reduce                  to the destination alone        to the destination alone

What is sent in all is what is received in all. The hop is `intra` within a node and `inter` between two. The sizes of collectives
that carry Python objects are not seen: they count as calls. What the fused path's kernels store into other ranks' memory is taken
from their own counters (docs/fused.md): an event a layer and phase, of both directions together and without a time.

**Time** is from this rank's arrival to its end. Up to the arrival of the group's last rank it is `wait`, the rest is transfer.
`exposed` is the part in which this rank did nothing else. On a CPU these are times of the host, which the call holds until it is
done, or `wait` of a handle. On a GPU they are those of the collective's kernel, from the Kineto trace: moesaic.parallel.kineto.

**Bandwidth** as in NCCL's tests (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md): algorithm bandwidth is the buffer's size over
the transfer's time; times `bus_factor`, what the wires carried, it is bus bandwidth.
"""

import contextlib
import inspect
import math
import platform
import re
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from moesaic.moe.layer import MoE
from moesaic.moe.model import Transformer
from moesaic.parallel import trace
from moesaic.parallel.engine import Engine
from moesaic.parallel.fused import FusedPath
from moesaic.parallel.shared import Pending

REST = "embedding, norm, head"
LOOP = "no layer"  # the norm of gradients, the loss, the optimizer's gathering
ACTS = ("counts", "slots", "dispatch", "combine", "combine_grad", "dispatch_grad", "slots_grad", "weights", "gradients")
KERNEL, BOTH = "fused kernel", "forward+backward"
COLLECTIVE, MODULE, PHASE = "moesaic collective ", "moesaic module ", "moesaic phase "


@dataclass
class Event:
    """A collective of this rank. Times in seconds of this rank's time.monotonic(), bytes by hop, `buffer` in bytes. `ended` is
    None where the host doesn't learn it. `behind` is the rank of the run that came last."""

    index: int
    phase: str
    layer: str
    module: str
    purpose: str
    operation: str
    group: str
    number: int
    ranks: list[int]
    began: float
    buffer: int = 0
    sent: dict[str, int] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    ended: float | None = None
    exposed: float = 0.0
    wait: float = 0.0
    behind: int | None = None

    @property
    def time(self) -> float:
        return max(0.0, (self.ended or self.began) - self.began)


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def chunks(tensor: Tensor, parts: int) -> list[int]:
    """Bytes of each of as many parts of whole numbers, as even as can be."""
    each, more = divmod(tensor.numel(), parts)
    return [(each + (i < more)) * tensor.element_size() for i in range(parts)]


def splits(tensor: Tensor, sizes: list[int] | None, parts: int) -> list[int]:
    row = size(tensor) // tensor.shape[0] if tensor.shape[0] else 0
    return [row * n for n in sizes or [tensor.shape[0] // parts] * parts]


def traffic(operation: str, a: dict[str, Any], own: int, ranks: list[int]) -> tuple[int, list[int], list[int]] | None:
    """(bytes of the buffer, sent to each rank of the group, received from each), itself included; None where they can't be seen.

    a: the arguments by the names that torch gives them. own: this rank's place among `ranks`.
    """
    n = len(ranks)

    def alone(end: str, out: list[int], back: list[int]) -> tuple[list[int], list[int]]:
        """What travels where one rank sends to all (`out`), and what this one gets of it (`back`, to the place of the source)."""
        at = a.get(f"group_{end}")
        at = ranks.index(a.get(end) or 0) if at is None else at
        return (out if own == at else [0] * n, [back[0] * (p == at) for p in range(n)])

    if operation in ("all_gather_into_tensor", "all_gather_single"):
        part = size(next(v for k, v in a.items() if k.startswith("input")))
        return n * part, [part] * n, [part] * n
    if operation == "all_gather":
        return sum(map(size, a["tensor_list"])), [size(a["tensor"])] * n, [size(t) for t in a["tensor_list"]]
    if operation in ("reduce_scatter_tensor", "reduce_scatter_single"):
        part = size(a["output"])
        return n * part, [part] * n, [part] * n
    if operation == "reduce_scatter":
        return sum(map(size, a["input_list"])), [size(t) for t in a["input_list"]], [size(a["output"])] * n
    if operation == "all_reduce":
        parts = chunks(a["tensor"], n)
        both = [c + parts[own] for c in parts]
        return size(a["tensor"]), both, both
    if operation == "all_to_all_single":
        out = splits(a["input"], a.get("input_split_sizes"), n)
        return size(a["input"]), out, splits(a["output"], a.get("output_split_sizes"), n)
    if operation == "all_to_all":
        out = [size(t) for t in a["input_tensor_list"]]
        return sum(out), out, [size(t) for t in a["output_tensor_list"]]
    if operation == "broadcast":
        return size(a["tensor"]), *alone("src", [size(a["tensor"])] * n, [size(a["tensor"])])
    if operation == "scatter":
        out = [size(t) for t in a.get("scatter_list") or []]
        return size(a["tensor"]) * n, *alone("src", out, [size(a["tensor"])])
    if operation == "reduce":
        return size(a["tensor"]), *alone("dst", [size(a["tensor"])] * n, [size(a["tensor"])])[::-1]
    if operation == "gather":
        into = [size(t) for t in a.get("gather_list") or []]
        return size(a["tensor"]) * n, *alone("dst", into, [size(a["tensor"])])[::-1]
    return (0, [0] * n, [0] * n) if operation == "barrier" else None


def bus_factor(operation: str, n: int) -> float:
    """What the slowest wire carries, as a multiple of the buffer: of a ring of n ranks, as NCCL's tests count."""
    if operation == "all_reduce":
        return 2 * (n - 1) / n
    return 1.0 if operation in ("broadcast", "reduce") else (n - 1) / n


def attribute(purpose: str, module: str) -> tuple[str, str, str]:
    """(layer, module, what for) of a collective, from what trace.within said, or where it is called, and the module whose forward
    was running."""
    who, _, act = purpose.rpartition(" ")
    if act not in ACTS:
        who, act = module, purpose
    layer = re.fullmatch(r"(blocks\.\d+)(?:\.(.+))?", who)
    if layer:
        return layer[1], layer[2] or "", act
    return {"the rest": REST, "embedding": REST, "norm": REST, "head": REST, "": LOOP}.get(who, who), "", act


class Recorder:
    """Keeps the collectives of this process while `recording`. `node` neighbouring ranks of the run are in one node.

    `sent` adds up bytes by hop as they are asked for, apart from the events: what a report says in sum must agree with it.
    """

    def __init__(self, node: int) -> None:
        self.node, self.rank = node, dist.get_rank()
        self.groups: dict[str, dist.ProcessGroup] = {}
        self.named: set[int] = set()
        self.clear()

    def clear(self) -> None:
        self.events: list[Event] = []
        self.sent: Counter[str] = Counter()
        self.unseen: Counter[str] = Counter()
        self.works: dict[int, tuple[dist.Work, Event]] = {}
        self.phase, self.modules = "other", [""]

    def hop(self, rank: int) -> str:
        return "intra" if rank // self.node == self.rank // self.node else "inter"

    def __call__(self, call: trace.Call, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        thread = threading.current_thread()
        if thread is not threading.main_thread() and not isinstance(thread, threading._DummyThread):
            return function(*args, **kwargs)  # a save in the background; autograd's own threads are none of Python's
        ranks = trace.ranks_of(call.group)
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
        self.groups[call.group] = arguments.get("group") or dist.distributed_c10d._get_default_group()
        event = Event(len(self.events), self.phase, *attribute(call.purpose, self.modules[-1]), call.operation, call.group,
                      call.number, ranks, call.began)  # fmt: skip
        own = ranks.index(self.rank)
        if (moved := traffic(call.operation, arguments, own, ranks)) is None:
            self.unseen[call.operation] += 1
        else:
            event.buffer, out, back = moved
            event.sent, event.received = ({"intra": 0, "inter": 0} for _ in range(2))
            for i, rank in enumerate(ranks):
                if i != own:
                    event.sent[self.hop(rank)] += out[i]
                    event.received[self.hop(rank)] += back[i]
                    self.sent[self.hop(rank)] += out[i]
        self.events.append(event)
        with record_function(f"{COLLECTIVE}{event.index}"):
            event.began = time.monotonic()
            result = function(*args, **kwargs)
        returned = time.monotonic()
        if isinstance(result, dist.Work):
            self.works[id(result)] = result, event
            result.get_future().add_done_callback(lambda _: self.end(event))
        else:
            event.ended, event.exposed = returned, returned - event.began
        return result

    def stored(self, layer: str, path: FusedPath, sent_WP: Tensor) -> None:
        """What a layer's fused kernels sent to each rank of their group, by phase, and so what this one received. Collective."""
        from moesaic.kernels.fused_ep import PHASES

        group, received_WP = path.space.group, torch.empty_like(sent_WP)
        self.groups.setdefault(group.group_name, group)
        dist.all_to_all_single(received_WP, sent_WP.contiguous(), group=group)
        ranks, sent, received = dist.get_process_group_ranks(group), sent_WP.tolist(), received_WP.tolist()
        others = [(i, self.hop(rank)) for i, rank in enumerate(ranks) if rank != self.rank]
        for p, phase in enumerate(PHASES):
            event = Event(len(self.events), BOTH, layer, "ffn", phase, KERNEL, group.group_name, -1, ranks, 0.0,
                          sum(sent[i][p] for i, _ in others))  # fmt: skip
            for hop in ("intra", "inter"):
                event.sent[hop] = sum(sent[i][p] for i, to in others if to == hop)
                event.received[hop] = sum(received[i][p] for i, to in others if to == hop)
                self.sent[hop] += event.sent[hop]
            self.events.append(event)

    def end(self, event: Event) -> None:
        event.ended = event.ended or time.monotonic()

    def waited(self, work: dist.Work, seconds: float) -> None:
        """The host stood in `wait` of a handle."""
        if known := self.works.pop(id(work), None):  # NCCL's handle holds what the collective brought
            known[1].exposed += seconds
            self.end(known[1])


@contextlib.contextmanager
def recording(recorder: Recorder, engine: Engine) -> Iterator[None]:
    """In the block, `recorder` keeps every collective of a step of `engine`, with its phase and, in forward, its module. After it
    nothing is left of that but names."""
    model = getattr(engine, "module", engine.model)
    names = {p: name for name, p in model.named_parameters()}
    if hasattr(engine, "zero") and id(engine) not in recorder.named:
        recorder.named.add(id(engine))
        trace.name_buckets(engine.model, engine.zero, names)

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        outer, recorder.phase = recorder.phase, name
        with record_function(PHASE + name):
            yield
        recorder.phase = outer

    def in_phase(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with phase(name):
                return method(*args, **kwargs)

        return call

    open_ranges: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            open_ranges.append(record_function(MODULE + name))
            open_ranges[-1].__enter__()
            recorder.modules.append(name)

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)
        recorder.modules.pop()

    hooks, open_phase = [], contextlib.ExitStack()
    for name, module in ranges(model):
        hooks.append(module.register_forward_pre_hook(enter(name), prepend=True))
        hooks.append(module.register_forward_hook(leave, always_call=True))  # recomputation may end in the middle
    hooks.append(
        engine.model.register_forward_pre_hook(lambda *_: open_phase.enter_context(phase("forward")), prepend=True)
    )
    hooks.append(engine.model.register_forward_hook(lambda *_: open_phase.close()))
    waits = {kind: kind.wait for kind in (dist.Work, Pending)}

    def timed(wait: Callable[..., Any]) -> Callable[..., Any]:
        def call(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            result = wait(work, *args, **kwargs)
            recorder.waited(work, time.monotonic() - began)
            return result

        return call

    for kind, wait in waits.items():
        kind.wait = timed(wait)  # type: ignore[method-assign]
    engine.backward, engine.step = in_phase("backward", engine.backward), in_phase("optimizer", engine.step)  # type: ignore[method-assign]
    counters = [path.counters_WP.clone() for _, path in fused_paths(model)]
    trace.record_with(recorder)
    try:
        yield
    finally:
        trace.record_with(None)
        for (layer, path), before_WP in zip(fused_paths(model), counters, strict=True):
            recorder.stored(layer, path, path.counters_WP - before_WP)
        for kind, wait in waits.items():
            kind.wait = wait  # type: ignore[method-assign]
        del engine.backward, engine.step  # what the class has is there again
        for hook in hooks:
            hook.remove()


def fused_paths(model: Transformer) -> list[tuple[str, FusedPath]]:
    """Those of the model, by layer."""
    layers = ((f"blocks.{i}", block.ffn) for i, block in enumerate(model.blocks))
    return [(name, ffn.path) for name, ffn in layers if isinstance(ffn, MoE) and isinstance(ffn.path, FusedPath)]


def ranges(model: Transformer) -> Iterable[tuple[str, nn.Module]]:
    """The modules whose time is told apart, by name: blocks, their parts, and the parts of MoE layers."""
    yield "embedding", model.embedding
    for i, block in enumerate(model.blocks):
        yield f"blocks.{i}", block
        for name, part in block.named_children():
            yield f"blocks.{i}.{name}", part
            if isinstance(part, MoE):
                inner = {"router": part.router, "experts": part.experts, "shared": part.shared}
                yield from ((f"blocks.{i}.{name}.{n}", m) for n, m in inner.items() if m is not None)
    yield "norm", model.norm


# ---------------------------------------------------------------- the ranks side by side


def clock_offset(rounds: int = 16) -> float:
    """Seconds to add to this rank's time.monotonic() to get rank 0's. Collective.

    Ranks of one machine share a clock. Between machines it is the median difference of when ranks leave a barrier, right to about
    the time of a message.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text() if boot.exists() else platform.node()
    times = []
    for _ in range(rounds):
        dist.barrier()
        times.append(time.monotonic())
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (machine, times))
    first, clock = told[0]
    if first == machine:
        return 0.0
    here = [other for where, other in told if where == machine]
    return statistics.median(a - b for other in here for a, b in zip(clock, other, strict=True))


def exchange(events: list[Event], groups: dict[str, dist.ProcessGroup], offset: float, device: torch.device) -> None:
    """Fill in who came last to each collective, and how long this rank waited there. Collective.

    Calls are matched by their number in their group. One that some rank did not record has no wait.
    """
    mine: dict[str, tuple[int, int]] = {}
    events = [e for e in events if e.operation != KERNEL]
    for e in events:
        mine[e.group] = (mine.get(e.group, (e.number, 0))[0], e.number)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    for name in sorted(groups):
        ranks, found = trace.ranks_of(name), [told[r].get(name) for r in trace.ranks_of(name)]
        if None in found:
            continue
        first, last = max(f for f, _ in found), min(e for _, e in found)
        if last < first:
            continue
        own = {e.number: e for e in events if e.group == name}
        numbers = range(first, last + 1)
        began = [own[n].began + offset if n in own else math.nan for n in numbers]
        began_N = torch.tensor(began, dtype=torch.float64, device=device)
        every_RN = began_N.new_empty(len(ranks) * len(numbers))
        dist.all_gather_single(every_RN, began_N, group=groups[name])
        latest, who = every_RN.view(len(ranks), -1).cpu().max(dim=0)
        for n, late, place in zip(numbers, latest.tolist(), who.tolist(), strict=True):
            if not math.isnan(late):
                own[n].behind, own[n].wait = ranks[place], min(own[n].time, max(0.0, late - offset - own[n].began))


def rows(events: Iterable[Event], step: int, rank: int, names: dict[str, str]) -> list[dict[str, Any]]:
    """One for each layer, module, phase, purpose, operation and group of a step of a rank: what collectives.csv holds.

    names: of groups, as the mesh calls them. Times in ms, bandwidths in GB/s of 1e9, None where nothing was moved.
    """
    together: dict[tuple[str, ...], list[Event]] = defaultdict(list)
    for e in events:
        together[e.layer, e.module, e.phase, e.purpose, e.operation, e.group].append(e)
    made = []
    for (layer, module, phase, purpose, operation, group), calls in together.items():
        moving, late = sum(e.time - e.wait for e in calls), Counter[int]()
        for e in calls:
            if e.behind is not None:
                late[e.behind] += round(e.wait * 1e9)
        buffer, ranks = sum(e.buffer for e in calls), calls[0].ranks
        speed = buffer / moving / 1e9 if buffer and moving > 0 else None
        exposed = sum(min(e.exposed, e.time) for e in calls)
        made.append(
            {"rank": rank, "step": step, "layer": layer, "module": module, "phase": phase, "purpose": purpose,
             "operation": operation, "group": names.get(group, group), "ranks": trace.short(ranks), "calls": len(calls),
             "buffer_bytes": buffer}
            | {f"{what}_{hop}_bytes": sum(getattr(e, what).get(hop, 0) for e in calls)
               for what in ("sent", "received") for hop in ("intra", "inter")}
            | {"time_ms": 1e3 * sum(e.time for e in calls), "exposed_ms": 1e3 * exposed,
               "overlapped_ms": 1e3 * (sum(e.time for e in calls) - exposed), "wait_ms": 1e3 * sum(e.wait for e in calls),
               "waited_for": max(late, key=lambda r: late[r]) if late.total() else None,
               "algorithm_gb_s": speed, "bus_gb_s": speed and speed * bus_factor(operation, len(ranks))}
        )  # fmt: skip
    return made
