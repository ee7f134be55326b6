"""Which collective each rank is in, and who waits for whom when one never ends.

`observe` puts a note around torch.distributed's collectives. FSDP2, DeepSpeed, checkpoints and our own modules all call them
by these names, so each is noted once, whoever calls. What a call is for it can't know; `within` says that, around our own
exchanges and around FSDP2's groups of parameters, a group of the next layer fetched ahead included. Where nobody says it, the
place of the call in our code stands for it.

`Watchdog` is a thread of each rank. Every few seconds it writes a word into the store that all ranks share: how many
collectives of each group this rank has begun, the last one, and where its main thread is. A rank that for `timeout` seconds has
neither begun nor ended one reads the words of all others, says who waits where and who is missing, and ends the process. A
rank that is stopped, or lost with its machine, is silent; its last word is then told, and how old it is.

What torch's own flight recorders hold (each collective with its shapes, on NCCL also whether it started) is written beside it,
a file for each rank; `torchfrtrace run_dir/hang/nccl` compares them.
"""

import contextlib
import functools
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

# By their names in torch.distributed; what one of them calls in turn (a barrier its all-reduce) is part of it.
OPERATIONS = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter",
    "reduce_scatter_single", "reduce_scatter_tensor", "scatter", "scatter_object_list",
)  # fmt: skip
HUNG = 4  # the exit code of a process that the watchdog ends
RECORDED = "2000"  # entries of torch's flight recorders
RECORDERS = {"nccl": "_dump_nccl_trace", "gloo": "_dump_fr_trace"}


@dataclass
class Call:
    """A collective as this rank sees it: the `number`-th of its group, from 1. `ended` is None while it is inside, and 0 for one
    that it will wait for later. Times are of time.monotonic."""

    number: int
    operation: str
    purpose: str
    group: str
    began: float
    ended: float | None = None


class _State:
    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.ranks: dict[str, list[int]] = {}
        self.last: Call | None = None
        self.moved = time.monotonic()
        self.unhurried = False
        self.recorder: Recorder | None = None
        self.thread = threading.get_ident()


# Does a collective in the place of its caller, and keeps what it wants of it: (the call, the function, its arguments) -> result.
Recorder = Callable[[Call, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_state = _State()
_local = threading.local()
_dog: "Watchdog | None" = None


@contextlib.contextmanager
def within(purpose: str) -> Iterator[None]:
    """Collectives that this thread begins in the block are for `purpose`: a layer, and what happens there."""
    outer = getattr(_local, "purpose", None)
    _local.purpose = purpose
    try:
        yield
    finally:
        _local.purpose = outer


@contextlib.contextmanager
def unhurried() -> Iterator[None]:
    """In the block this rank may go without collectives for as long as it likes: it waits for a disk."""
    _state.unhurried = True
    try:
        yield
    finally:
        _state.moved, _state.unhurried = time.monotonic(), False


def observe() -> None:
    """From now on note every collective of this process. Once is enough; again changes nothing."""
    for name in OPERATIONS:
        function = getattr(dist, name, None)
        if function is not None and not hasattr(function, "observed"):
            setattr(dist, name, noted(function))


def record_with(recorder: Recorder | None) -> None:
    """From now on `recorder` does the collectives that are noted; None: nobody."""
    _state.recorder = recorder


def ranks_of(group: str) -> list[int]:
    """The ranks of a group that was noted."""
    return _state.ranks[group]


def last_call() -> Call | None:
    """The newest collective that this process began."""
    return _state.last


def noted(function: Callable[..., Any]) -> Callable[..., Any]:
    """A collective, noted under its name."""
    name = function.__name__
    position = list(inspect.signature(function).parameters).index("group")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        group = args[position] if position < len(args) else kwargs.get("group")
        if group is None:
            group = dist.group.WORLD
        if group is None or getattr(_local, "inside", False):
            return function(*args, **kwargs)
        key = group.group_name
        if key not in _state.ranks:
            _state.ranks[key] = dist.get_process_group_ranks(group)
        _state.counts[key] = number = _state.counts.get(key, 0) + 1
        now = time.monotonic()
        purpose = getattr(_local, "purpose", None) or _place(sys._getframe(1))
        _state.last = this = Call(number, name, purpose, key, now)
        _state.moved = now
        _local.inside = True
        try:
            recorder = _state.recorder
            result = recorder(this, function, args, kwargs) if recorder else function(*args, **kwargs)
        finally:
            _local.inside = False
        _state.moved = time.monotonic()
        this.ended = 0.0 if kwargs.get("async_op") else _state.moved
        return result

    call.observed = True  # type: ignore[attr-defined]
    return call


@functools.cache
def _short_path(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def _place(frame: Any) -> str:
    """Where in our own code a call comes from, e.g. `norm in parallel/clip.py:40`; empty where it doesn't."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("moesaic.") or name == "__main__":
            return f"{frame.f_code.co_name} in {_short_path(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def name_groups(model: nn.Module) -> None:
    """Let FSDP2's groups of parameters say whose weights they gather and whose gradients they add. A group of the next layer is
    fetched in hooks of this one, so no scope around a module would do.

    FSDP2 has a hook for each of the collectives but the sum over copies; the two methods that begin them are wrapped instead.
    """

    def named(method: Callable[..., Any], purpose: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with within(purpose):
                return method(*args, **kwargs)

        return call

    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for method, what in (("unshard", "weights"), ("post_backward", "gradients")):
                    setattr(group, method, named(getattr(group, method), f"{name or 'the rest'} {what}"))


def name_buckets(engine: Any, zero: Any, names: dict[nn.Parameter, str]) -> None:
    """The same of DeepSpeed's engine and its optimizer: whose parameters a bucket holds, from the first to the last block."""

    def who(parameters: Any) -> str:
        found = {tuple(names[p].split(".")[:2]) for p in parameters if names.get(p, "").startswith("blocks.")}
        layers = [".".join(layer) for layer in sorted(found, key=lambda layer: int(layer[1]))]
        some = layers[:1] if len(layers) < 2 else [f"{layers[0]} to {layers[-1]}"]
        return " and ".join(some + ["the rest"] * any(not names.get(p, "").startswith("blocks.") for p in parameters))

    def named(method: Callable[..., Any], parameters: Callable[..., Any], what: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            with within(f"{who(parameters(*args))} {what}"):
                return method(*args, **kwargs)

        return call

    def in_bucket(tensor: Any, dtype: torch.dtype) -> list[Any]:
        return [zero.bit16_groups[group][i] for group, i, _ in zero.ipg_buckets[dtype].params]

    engine.allreduce_gradients = named(
        engine.allreduce_gradients, lambda *_: list(names), "gradients"
    )  # stage 0: all at once
    if hasattr(zero, "average_tensor"):  # stages 1 and 2
        zero.average_tensor = named(zero.average_tensor, in_bucket, "gradients")
    scatter = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
    if hasattr(zero, scatter):
        setattr(zero, scatter, named(getattr(zero, scatter), lambda parameters, *_: parameters, "gradients"))
        for p in names:
            if hasattr(p, "all_gather_coalesced"):
                p.all_gather_coalesced = named(p.all_gather_coalesced, lambda parameters, *_: parameters, "weights")


# ---------------------------------------------------------------- when a collective never ends


class Watchdog(threading.Thread):
    """Ends the process with code HUNG when for `timeout` seconds it neither began nor ended a collective, and says why.

    store   shared by all ranks; the thread has its own connection
    folder  takes each rank's flight record
    tell    gets the text, on the lowest of the ranks that wait; `leave` ends the process
    """

    def __init__(
        self, timeout: float, store: dist.Store, rank: int, world: int, folder: Path,
        tell: Callable[[str], None], leave: Callable[[int], Any] = os._exit,
    ) -> None:  # fmt: skip
        super().__init__(name="moesaic watchdog", daemon=True)
        self.timeout, self.store, self.rank, self.world, self.folder = timeout, store, rank, world, folder
        self.tell, self.leave = tell, leave
        self.period = min(max(timeout / 10, 0.1), 5.0)
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(self.period):
            stalled = not _state.unhurried and time.monotonic() - _state.moved > self.timeout
            try:
                self.say(stalled)
                if stalled:
                    self._end()
                    return
            except Exception as error:  # the store left with its host
                if stalled:
                    self.tell(f"rank {self.rank}: {word_text(own_word(True))}; the store of the run is gone ({error})")
                    self.leave(HUNG)
                    return

    def say(self, stalled: bool) -> None:
        self.store.set(f"word/{self.rank}", json.dumps(own_word(stalled)))

    def _end(self) -> None:
        write_flight_record(self.folder, self.rank)
        for _ in range(3):  # the others find it out by themselves, up to a period later
            if self.over.wait(self.period):  # the run ends meanwhile, for a reason of its own
                return
            self.say(True)
        now, words = time.time(), {}
        for rank in range(self.world):
            if self.store.check([f"word/{rank}"]):
                words[rank] = json.loads(self.store.get(f"word/{rank}"))
        waiting = [r for r, word in words.items() if word["stalled"] and now - word["at"] <= 3 * self.period + 1]
        if self.rank == min([*waiting, self.rank]):
            self.tell(report(words, self.world, now, self.timeout, 3 * self.period + 1))
        else:
            time.sleep(3 * self.period)  # the end of one process ends the others
        self.leave(HUNG)


def watch(timeout: float, folder: Path, tell: Callable[[str], None]) -> None:
    """Start this rank's watchdog, and give torch's own timeouts a minute more. Nothing in a run of one process. Collective."""
    global _dog
    if dist.get_world_size() == 1:
        return
    _state.thread, _state.moved = threading.get_ident(), time.monotonic()
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout + 60), group)
    store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store().clone())  # type: ignore[attr-defined]
    _dog = Watchdog(timeout, store, dist.get_rank(), dist.get_world_size(), folder, tell)
    _dog.say(False)
    _dog.start()


def unwatch() -> None:
    """Nothing is late any more: the run is over, or about to be."""
    global _dog
    if _dog:
        _dog.over.set()
        _dog.join()
        _dog = None


def own_word(stalled: bool) -> dict[str, Any]:
    """What a rank says of itself, JSON-able."""
    last, frame = _state.last, sys._current_frames().get(_state.thread)
    return {
        "at": time.time(),
        "stalled": stalled,
        "still": time.monotonic() - _state.moved,
        "inside": last is not None and last.ended is None,
        "last": last and [last.number, last.operation, last.purpose, last.group],
        "counts": dict(_state.counts),
        "ranks": {group: ranks for group, ranks in _state.ranks.items() if group in _state.counts},
        "place": _place(frame),
    }


def word_text(word: dict[str, Any]) -> str:
    """One rank's word as a person reads it."""
    if word["last"] is None:
        return f"has begun no collective, is at {word['place']}"
    number, operation, purpose, group = word["last"]
    ranks = word["ranks"][group]
    of = f"{operation} number {number} of ranks {short(ranks)}, for {purpose}"
    return f"waits in {of}" if word["inside"] else f"is at {word['place']}, after {of}"


def report(words: dict[int, dict[str, Any]], world: int, now: float, timeout: float, fresh: float) -> str:
    """Who waits where, and who is missing: an opening line, and one for each rank. A word older than `fresh` seconds means that
    its rank is silent."""
    missing: dict[int, str] = {}
    for number, operation, purpose, group in sorted(word["last"] for word in words.values() if word["last"]):
        for rank in next(word["ranks"][group] for word in words.values() if group in word["ranks"]):
            word = words.get(rank)
            waits_there = word and word["stalled"] and word["inside"] and word["last"][3] == group
            if not word or (word["counts"].get(group, 0) < number and not waits_there):
                missing.setdefault(rank, f"{operation} for {purpose}")
    silent = [rank for rank in range(world) if rank not in words or now - words[rank]["at"] > fresh]
    late = [f"rank {rank} did not come to {what}" for rank, what in sorted(missing.items())]
    late += [f"rank {rank} is silent" for rank in silent if rank not in missing]
    lines = [f"parallel.timeout={timeout:g}: " + ("; ".join(late) or "no rank moved, and none is behind the others")]
    for rank in range(world):
        if rank not in words:
            lines.append(f"  rank {rank}: never said a word")
            continue
        word = words[rank]
        since = (
            f"is silent since {now - word['at']:.0f} s, before that: "
            if rank in silent
            else f"since {word['still']:.0f} s "
        )
        lines.append(f"  rank {rank}: {since}{word_text(word)}")
    return "\n".join(lines)


def short(ranks: list[int]) -> str:
    """`0-3` for neighbours, else `0,2,4`."""
    if len(ranks) > 1 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))


def record_flights() -> None:
    """Ask torch to keep a flight record. Before the process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED)


def write_flight_record(folder: Path, rank: int) -> None:
    """What torch's flight recorders hold, as `torchfrtrace` reads it. Never raises: the process is ending as it is."""
    for backend, dump in RECORDERS.items():
        with contextlib.suppress(Exception):
            data = getattr(torch._C._distributed_c10d, dump)()
            (folder / backend).mkdir(parents=True, exist_ok=True)
            (folder / backend / f"rank_{rank}").write_bytes(data)
