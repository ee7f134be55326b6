"""Sharded checkpoints: one folder a step, complete or not counted; any layout loads what any other wrote.

    checkpoints/step_00000100/   shard_00000.safetensors, …   what each rank owns: pieces of weights, moments, random states
                                 manifest.json                where each piece lies, sizes, checksums, and all that is no tensor

A checkpoint is complete when its manifest is there, which is written when all else is safe on disk; the same rule serves a file
system and an object store. Nothing in it is ever run. Tensors are saved by name as whole tensors that happen to lie in pieces,
each piece once, by one of the ranks that hold it; so another number of ranks, another division of experts or another engine
loads them.

    newest(root)             the newest checkpoint that is whole in every byte: what is not is told, and passed over
    load(path, engine)       fill an engine; each rank reads the ranges that it needs, into its own tensors
    Saver(root, …)           save an engine: at once, or from a copy in host memory while training goes on
"""

import json
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesaic.parallel import shards, storage
from moesaic.parallel.engine import MOMENTS, Engine
from moesaic.parallel.manifest import (
    MANIFEST,
    CorruptError,
    File,
    FormatError,
    Manifest,
    check_fits,
    complete_checkpoints,
    encode,
    folders,
    is_checkpoint,
    read_manifest,
    refuse_pickles,
    step_folder,
    step_of,
    verify,
)
from moesaic.parallel.shards import DTYPES, NAMES, Part, Piece

__all__ = [
    "MANIFEST", "CorruptError", "FormatError", "SaveError", "Saver", "complete_checkpoints", "is_checkpoint", "load",
    "load_model", "load_tensors", "newest", "read_manifest", "read_state", "refuse_pickles", "remove_leftovers", "step_folder",
    "verify", "verify_together",
]  # fmt: skip

T = TypeVar("T")
PATIENCE = 3600.0  # seconds that a rank waits for others to write what they own


class SaveError(RuntimeError):
    """A checkpoint could not be written. Older ones are as they were."""


# ---------------------------------------------------------------- finding


def newest(root: str | Path, say: Callable[[str], None]) -> str | None:
    """The newest checkpoint under `root` of which every byte is what was written; None where there is none at all. Collective.

    Each rank reads a share of the bytes. `say` gets a line for each newer one that is incomplete or corrupt. Raises ValueError
    where there are checkpoints and none is whole, or one of a format that can't be read: starting anew would lose them.
    """
    corrupt: list[str] = []
    for path, complete in reversed(_from_first(lambda: folders(root))):
        problems = []
        try:
            problems = verify_together(_from_first(partial(read_manifest, path)))
        except CorruptError as error:
            problems = [str(error)]
        if not problems:
            return path
        for line in problems:
            say(f"warning: {path} is not used: {line}")
        if complete:
            corrupt.append(path)
    if corrupt:
        raise ValueError(f"{root}: no checkpoint is whole, of {', '.join(path.rsplit('/', 1)[-1] for path in corrupt)}")
    return None


def verify_together(manifest: Manifest) -> list[str]:
    """`verify`, each rank a share. The same lines on all. Collective."""
    return [line for lines in _gather(verify(manifest, _rank(), _ranks())) for line in lines]


def read_state(path: str | Path) -> dict[str, Any]:
    """What `save` was given as `state`."""
    return read_manifest(path).state


def remove_leftovers(root: str | Path) -> None:
    """Delete what a save that was killed left. For one process, before anything is saved."""
    for path, complete in folders(root):
        if not complete and not storage.exists(storage.join(path, ".metadata")):
            storage.remove_folder(path, MANIFEST)


# ---------------------------------------------------------------- loading


def load(path: str | Path, engine: Engine) -> None:
    """Fill weights, buffers, moments and the CPU random generator from a checkpoint, in place. Collective.

    A rank that did not exist when it was saved keeps its random state. Raises ValueError, on all ranks, where the checkpoint is
    of another model, before anything is touched; or CorruptError, where what is read is not what was written.
    """
    manifest = _from_first(lambda: read_manifest(path))
    weights = {f"model.{name}": t for name, t in engine.weights().items()}
    check_fits(manifest, _described(weights), "model.")
    check_moments(manifest)
    moments = {f"optim.{name}": t for name, t in engine.moments().items()}
    check_fits(manifest, _described(moments))
    steps, random = torch.zeros(()), torch.get_rng_state()
    tensors = weights | moments | {"optim.step": steps}
    if _rng_key() in manifest.tensors:
        tensors[_rng_key()] = random
    check_fits(manifest, _described(tensors))
    mistake = None
    try:
        read_into(manifest, tensors)
    except CorruptError as error:
        mistake = str(error)
    for line in _gather(mistake):
        if line is not None:
            raise CorruptError(line)
    engine.loaded(steps)
    torch.set_rng_state(random)


def check_moments(manifest: Manifest) -> None:
    """Raises CorruptError unless each moment is there for the same weights, and of their shapes."""
    found = []
    for moment in MOMENTS:
        prefix = f"optim.{moment}."
        found.append({n.removeprefix(prefix): t.shape for n, t in manifest.tensors.items() if n.startswith(prefix)})
    for name in found[0].keys() | found[1].keys():
        weight = manifest.tensors.get(f"model.{name}")
        if weight is None or {weight.shape} != {moments.get(name) for moments in found}:
            raise CorruptError(f"{manifest.path}: the moments of {name} are not of its shape")


def load_model(path: str | Path, model: nn.Module) -> None:
    """Fill the weights of a model in one process, with or without a process group, whatever layout saved them."""
    tensors = {n: value.detach() for n, value in [*model.named_parameters(), *model.named_buffers()]}
    _load_whole(path, tensors, "model.")


def load_tensors(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Fill whole parameters and buffers, by their names in the model, in one process, whatever layout saved them."""
    _load_whole(path, tensors, None)


def _load_whole(path: str | Path, tensors: dict[str, Tensor], prefix: str | None) -> None:
    manifest = read_manifest(path)
    named = {f"model.{name}": value for name, value in tensors.items()}
    check_fits(manifest, _described(named), prefix)
    read_into(manifest, named)


def read_into(manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Fill what this rank holds of `tensors`, which `check_fits` has passed. What is read is verified. Raises CorruptError."""
    todo: dict[int, list[tuple[int, Piece, Piece, Tensor]]] = {}
    for name, tensor in tensors.items():
        for wanted, values in shards.parts(name, tensor):
            for placed, piece in manifest.pieces(name):
                if shards.meet(piece, wanted):
                    todo.setdefault(placed.file, []).append((placed.start, piece, wanted, values))
    for file, copies in todo.items():
        with manifest.open(file) as opened:
            for start, piece, wanted, values in sorted(copies, key=lambda copy: copy[0]):
                shards.fill(opened, start, piece, wanted, values)


def _described(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


# ---------------------------------------------------------------- saving


class Saver:
    """Writes the checkpoints of a run under `root`, the newest `keep` of which stay. Its making is collective.

    A save takes a copy of what this rank owns to host memory and returns; a thread writes it. At most one is on its way. Ranks
    tell each other through the process group's store when they are done, by a connection of the thread's own: no collective
    runs beside those of training. Older checkpoints go when the new one is complete.

    background  False: save before going on, without the copy
    on_error    continue: a save that fails is told on stderr, and training goes on; stop: the next `save`, or `finish`, raises
                SaveError, on all ranks
    """

    def __init__(self, root: str | Path, keep: int, background: bool = True, on_error: str = "continue") -> None:
        self.root, self.keep, self.background, self.on_error = str(root), keep, background, on_error
        self.name = _from_first(lambda: f"{time.time_ns():x}")
        store: Any = dist.distributed_c10d._get_default_store()
        self.store: dist.Store = store.clone()
        self.saves = 0
        self.thread: threading.Thread | None = None
        self.error: str | None = None  # of the last save
        self.host: Tensor | None = None

    def save(self, step: int, engine: Engine, state: dict[str, Any], wait: bool = False) -> None:
        """Save the checkpoint of `step`; `state`, JSON-able, is read back by `read_state`. Every rank calls it, and it waits for
        the save before. With `wait` it returns when the checkpoint is complete. Raises SaveError where it can't be written."""
        self.finish()
        tensors = {f"model.{name}": t for name, t in engine.weights().items()}
        tensors |= {f"optim.{name}": t for name, t in engine.moments().items()}
        tensors["optim.step"] = engine.steps()
        mine = shards.owned(tensors) + shards.parts(_rng_key(), torch.get_rng_state())
        mine.sort(key=lambda part: shards.place_in_file(part[0]))
        self.saves += 1
        if self.background and not wait:
            mine = self._copy(mine)
            self.thread = threading.Thread(target=self._write, args=(step, state, mine), daemon=True)
            self.thread.start()
            return
        self._write(step, state, mine)
        if self.error and (wait or self.on_error == "stop"):
            raise SaveError(self.error)

    def finish(self) -> None:
        """Wait for the save that is on its way. Raises SaveError where it failed and `on_error` is stop."""
        if self.thread:
            self.thread.join()
            self.thread = None
            if self.error and self.on_error == "stop":
                raise SaveError(self.error)

    def _copy(self, mine: list[Part]) -> list[Part]:
        """The same values in host memory, which is taken once and used again."""
        size = sum(piece.bytes for piece, _ in mine)
        cuda = any(values.is_cuda for _, values in mine)
        if self.host is None or self.host.numel() < size:
            self.host = torch.empty(size, dtype=torch.uint8)
            if cuda:
                pin(self.host)
        copies, at = [], 0
        for piece, values in mine:
            copy = self.host[at : at + piece.bytes].view(DTYPES[piece.dtype]).view(piece.sizes)
            copy.copy_(values, non_blocking=True)
            copies.append((piece, copy))
            at += piece.bytes
        if cuda:
            torch.cuda.synchronize()
        return copies

    def _write(self, step: int, state: dict[str, Any], mine: list[Part]) -> None:
        """Write what is this rank's; on rank 0, when all have, the manifest. Sets `error`, to the same on all ranks."""
        key, rank, ranks = f"checkpoint/{self.name}/{self.saves}", _rank(), _ranks()
        path = step_folder(self.root, step)
        try:
            if rank == 0:
                self._begin(key, path)
            elif not self._wait(f"{key}/begin"):
                raise OSError("rank 0 could not make the folder")
            name = f"shard_{rank:05d}.safetensors"
            pieces = [piece for piece, _ in mine]
            size, checksums, starts = shards.write(storage.join(path, name), pieces, (values for _, values in mine))
            told: dict[str, Any] = {"file": (name, size, checksums), "pieces": list(zip(pieces, starts, strict=True))}
        except Exception as error:
            told = {"error": f"rank {rank}: {error}"}
        try:
            self.store.set(f"{key}/{rank}", json.dumps(told))
            if rank > 0:
                self.error = self._wait(f"{key}/end") or None
                return
            self.error = self._end(key, path, step, state, ranks)
            self.store.set(f"{key}/end", self.error or "")
        except Exception as error:
            self.error = f"rank {rank}: checkpoint of step {step}: {error}"
        if self.error:
            print(f"error: {self.error}", file=sys.stderr, flush=True)

    def _begin(self, key: str, path: str) -> None:
        """Rank 0: an empty folder. Leftovers of the same step are none of its files."""
        made = ""
        try:
            storage.remove_folder(path, MANIFEST)
            storage.make_folder(path)
            made = "yes"
        finally:
            self.store.set(f"{key}/begin", made)

    def _end(self, key: str, path: str, step: int, state: dict[str, Any], ranks: int) -> str | None:
        """Rank 0: wait for all, write the manifest, delete what is old. Returns what went wrong."""
        files: list[File] = []
        pieces, errors = [], []
        for rank in range(ranks):
            told = json.loads(self._wait(f"{key}/{rank}"))
            self.store.delete_key(f"{key}/{rank}")
            if "error" in told:
                errors.append(told["error"])
                continue
            name, size, checksums = told["file"]
            pieces += [(_piece(*piece), len(files), start) for piece, start in told["pieces"]]
            files.append(File(name, size, checksums))
        try:
            if not errors:
                storage.write_last(storage.join(path, MANIFEST), encode(step, state, files, pieces))
        except Exception as error:
            errors = [str(error)]
        if errors:
            self._clear(path)
            older = [p for p in complete_checkpoints(self.root) if p != path]
            return (f"the checkpoint of step {step} was not written: {'; '.join(errors)}; the newest is "
                    + (older[-1] if older else "none"))  # fmt: skip
        # Later steps than this are of a future that was left, by a resume from an earlier one.
        found = complete_checkpoints(self.root)
        kept = [p for p in found if (step_of(p) or 0) <= step][-self.keep :]
        for old in [p for p in found if p not in kept]:
            self._clear(old)
        return None

    def _clear(self, path: str) -> None:
        try:
            storage.remove_folder(path, MANIFEST)
        except OSError as error:
            print(f"warning: {path} can't be deleted: {error}", file=sys.stderr, flush=True)

    def _wait(self, key: str) -> str:
        # Polled: a call that blocks would hold the connection.
        end = time.monotonic() + PATIENCE
        while not self.store.check([key]):
            if time.monotonic() > end:
                raise SaveError(f"a rank has not written its part within {PATIENCE:.0f} s")
            time.sleep(0.01)
        return self.store.get(key).decode()


def pin(host: Tensor) -> None:
    """Lock memory in place, so that a GPU copies to it by itself. `pin_memory` would round its size up to a power of two."""
    cudart = torch.cuda.cudart()
    result = cudart.cudaHostRegister(host.data_ptr(), host.numel(), 0)
    if int(result) == 0:  # else it works, slower
        weakref.finalize(host, cudart.cudaHostUnregister, host.data_ptr())


def _piece(name: str, dtype: str, *boxes: Sequence[int]) -> Piece:
    shape, offsets, sizes = map(tuple, boxes)
    return Piece(name, dtype, shape, offsets, sizes)


# ---------------------------------------------------------------- ranks


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rng_key() -> str:
    return f"rng.{_rank()}"


def _gather(value: T) -> list[T]:
    """`value` of every rank. Collective."""
    values: list[Any] = [value] * _ranks()
    if _ranks() > 1:
        dist.all_gather_object(values, value)
    return values


def _from_first(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, or the ValueError or OSError that it raises there, on every rank. Collective."""
    box: list[Any] = [None, None]
    if _rank() == 0:
        try:
            box[0] = work()
        except (ValueError, OSError) as error:
            box[1] = error
    if _ranks() > 1:
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]
