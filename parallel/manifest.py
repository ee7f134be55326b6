"""What a checkpoint says of itself: manifest.json, written last, and read with suspicion.

    {"format": "moesaic-checkpoint/1", "checksum": "…",      of the format and of all that follows, down to the end of the file
     "step": 100,
     "state": {…},                                           what the training loop gave: samples, tokens, configuration, …
     "block": 4194304,
     "files": [{"name": "shard_00000.safetensors", "size": 1234, "checksums": ["…", …]}, …],  one a block
     "tensors": {"model.norm.weight": {"dtype": "F32", "shape": [64],
                 "pieces": [[file, first byte in it, offsets in the tensor, sizes], …]}, …}}

Checksums are XXH3, which finds accidents; they don't stop who wants to deceive. So nothing is believed: names that lead out of
the folder, pieces that overlap, leave a gap, or lie outside of their file or tensor, are refused before any tensor is touched.
Nothing is ever run: JSON and numbers are all there is.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from moesaic.parallel import storage
from moesaic.parallel.shards import BLOCK, DTYPES, CorruptError, Piece, VerifiedFile

MANIFEST = "manifest.json"
VERSION = "1"
LARGEST = 2**29  # bytes of a manifest, several million pieces
_STEP = re.compile(r"step_(\d{8,})")
_FILE = re.compile(r"shard_\d{5,9}\.safetensors")


class FormatError(ValueError):
    """A checkpoint that this version can't read."""


class File(NamedTuple):
    name: str
    size: int
    checksums: list[str]


class Placed(NamedTuple):
    """Where a piece lies: `start` is the first byte in file number `file`."""

    file: int
    start: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Stored(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    pieces: list[Placed]


@dataclass(frozen=True)
class Manifest:
    path: str  # of the checkpoint
    step: int
    state: dict[str, Any]
    block: int
    files: list[File]
    tensors: dict[str, Stored]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    def open(self, file: int) -> VerifiedFile:
        name, size, checksums = self.files[file]
        return VerifiedFile(storage.join(self.path, name), size, checksums, self.block)

    def pieces(self, name: str) -> list[tuple[Placed, Piece]]:
        stored = self.tensors[name]
        return [(p, Piece(name, stored.dtype, stored.shape, p.offsets, p.sizes)) for p in stored.pieces]


def step_folder(root: str | Path, step: int) -> str:
    return storage.join(root, f"step_{step:08d}")


def step_of(path: str | Path) -> int | None:
    """The step in the name of a folder, None where it has none."""
    match = _STEP.fullmatch(str(path).rstrip("/").rsplit("/", 1)[-1])
    return int(match[1]) if match else None


def folders(root: str | Path) -> list[tuple[str, bool]]:
    """Folders of checkpoints under `root`, by step, and whether each is complete: has a manifest. It may still be corrupt."""
    found = sorted((step, name) for name in storage.names(root) if (step := step_of(name)) is not None)
    paths = [storage.join(root, name) for _, name in found]
    return [(path, is_checkpoint(path)) for path in paths]


def complete_checkpoints(root: str | Path) -> list[str]:
    """Complete checkpoints under `root`, oldest first; none where the folder does not exist."""
    return [path for path, complete in folders(root) if complete]


def is_checkpoint(path: str | Path) -> bool:
    return storage.exists(storage.join(path, MANIFEST))


def refuse_pickles(path: str | Path) -> None:
    """Raises FormatError where `path` is a checkpoint of torch.distributed.checkpoint."""
    if storage.exists(storage.join(path, ".metadata")):
        raise FormatError(
            f"{path}: is a checkpoint of torch.distributed.checkpoint, whose pickles may run code: not read"
        )


# ---------------------------------------------------------------- writing


def encode(
    step: int, state: dict[str, Any], files: list[File], pieces: Iterable[tuple[Piece, int, int]], block: int = BLOCK
) -> bytes:
    """The manifest of `pieces`, each with its file and first byte. They must make up whole tensors."""
    tensors: dict[str, dict[str, Any]] = {}
    for piece, file, start in pieces:
        entry = tensors.setdefault(piece.name, {"dtype": piece.dtype, "shape": piece.shape, "pieces": []})
        entry["pieces"].append([file, start, piece.offsets, piece.sizes])
    body = [
        f' "step": {step}',
        f' "state": {json.dumps(state)}',
        f' "block": {block}',
        f' "files": {_lines("[]", [json.dumps(file._asdict()) for file in files])}',
        f' "tensors": {_lines("{}", [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in tensors.items()])}',
    ]
    text = (",\n".join(body) + "}\n").encode()
    return _first_line(VERSION, text) + text


def _lines(brackets: str, entries: list[str]) -> str:
    return brackets[0] + ",\n  ".join(entries) + brackets[1]


def _first_line(version: str, rest: bytes) -> bytes:
    checksum = xxhash.xxh3_128_hexdigest(f"moesaic-checkpoint/{version}\n".encode() + rest)
    return f'{{"format": "moesaic-checkpoint/{version}", "checksum": "{checksum}",\n'.encode()


# ---------------------------------------------------------------- reading


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the checkpoint `path`, checked. Raises CorruptError, or FormatError, in one line that names it."""
    where = storage.join(path, MANIFEST)
    if not is_checkpoint(path):
        refuse_pickles(path)
        raise CorruptError(f"{path}: is no complete checkpoint, there is no {MANIFEST}")
    try:
        size = storage.size(where)
        if size > LARGEST:
            raise CorruptError(f"{where}: has {size:,} bytes, more than any manifest")
        with storage.reader(where) as file:
            data = file.read()
    except OSError as error:
        raise CorruptError(f"{where}: can't be read ({error.strerror or error})") from error
    line, newline, rest = data.partition(b"\n")
    version = re.match(rb'\{"format": "moesaic-checkpoint/(\w{1,20})", ', line)
    if not version or line + newline != _first_line(version[1].decode(errors="replace"), rest):
        raise CorruptError(f"{where}: does not have its checksum")
    if version[1].decode() != VERSION:
        raise FormatError(f"{where}: has format {version[1].decode()}, this version reads {VERSION}")
    try:
        return _checked(str(path), json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        told = "nested too deeply" if isinstance(error, RecursionError) else f"{type(error).__name__}: {error}"
        raise CorruptError(f"{where}: {told if type(error) is not ValueError else error}") from error


def _checked(path: str, values: dict[str, Any]) -> Manifest:
    """The manifest that `values` describe. Raises ValueError, KeyError or TypeError where they describe none."""
    step, block, state = _count(values["step"]), _count(values["block"]), values["state"]
    named = step_of(path)
    _must(named in (None, step), f"is of step {step}, not of that in the name of its folder")
    _must(0 < block <= 2**30 and isinstance(state, dict), "has no valid block size or state")
    files = [File(f["name"], _count(f["size"]), list(f["checksums"])) for f in values["files"]]
    for file in files:
        _must(isinstance(file.name, str) and bool(_FILE.fullmatch(file.name)), f"names a file {file.name!r}")
        _must(len(file.checksums) == -(-file.size // block), f"{file.name}: {len(file.checksums)} checksums")
    _must(len({file.name for file in files}) == len(files), "names a file twice")
    tensors: dict[str, Stored] = {}
    spans: list[list[tuple[int, int, str]]] = [[] for _ in files]
    for name, entry in values["tensors"].items():
        dtype, shape = entry["dtype"], _counts(entry["shape"])
        _must(dtype in DTYPES, f"tensor {name}: is of type {dtype!r}")
        pieces = [Placed(_count(f), _count(at), _counts(o), _counts(s)) for f, at, o, s in entry["pieces"]]
        for piece in pieces:
            _must(len(piece.offsets) == len(piece.sizes) == len(shape) and piece.file < len(files),
                  f"tensor {name}: a piece has other dimensions, or lies in no file")  # fmt: skip
            end = piece.start + math.prod(piece.sizes) * DTYPES[dtype].itemsize
            spans[piece.file].append((piece.start, end, name))
        _check_cover(name, shape, pieces)
        tensors[name] = Stored(dtype, shape, pieces)
    for file, found in zip(files, spans, strict=True):
        end = 8  # where a header begins, of any length
        for i, (start, stop, name) in enumerate(sorted(found)):
            _must(
                start == end or (i == 0 and start > end),
                f"tensor {name}: overlaps others in {file.name}, or leaves a gap",
            )
            end = stop
        _must(end == file.size or not found, f"{file.name}: has {file.size:,} bytes, its pieces end at {end:,}")
    return Manifest(path, step, state, block, files, tensors)


def _check_cover(name: str, shape: tuple[int, ...], pieces: list[Placed]) -> None:
    """Raises ValueError unless every value of the tensor lies in one piece."""
    for _, _, offsets, sizes in pieces:
        _must(all(o + s <= n and s > 0 for o, s, n in zip(offsets, sizes, shape, strict=True)),
              f"tensor {name}: a piece at {list(offsets)} of {list(sizes)} lies outside of {list(shape)}")  # fmt: skip
    _must(sum(math.prod(p.sizes) for p in pieces) == math.prod(shape), f"tensor {name}: its pieces are not all of it")
    # Along the first dimension, a piece can overlap only those that have begun and not ended.
    open_pieces: list[Placed] = []
    for piece in sorted(pieces, key=lambda p: p.offsets[0]) if shape else ():
        open_pieces = [p for p in open_pieces if p.offsets[0] + p.sizes[0] > piece.offsets[0]]
        for other in open_pieces:
            apart = any(o + s <= p or p + t <= o
                        for o, s, p, t in zip(*piece[2:], *other[2:], strict=True))  # fmt: skip
            _must(apart, f"tensor {name}: pieces overlap at {list(piece.offsets)}")
        open_pieces.append(piece)


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{value!r}: is no count")
    return value


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > 16:
        raise ValueError("holds no list of counts where one must be")
    return tuple(map(_count, values))


# ---------------------------------------------------------------- verifying


def verify(manifest: Manifest, rank: int = 0, ranks: int = 1) -> list[str]:
    """Read a share of all blocks; of `ranks` ranks each reads another one. A line for each file that is not what was written."""
    problems = []
    total = sum(len(file.checksums) for file in manifest.files)
    begin, end, first = total * rank // ranks, total * (rank + 1) // ranks, 0
    for i, file in enumerate(manifest.files):
        blocks = len(file.checksums)
        low, high = max(begin - first, 0), min(end - first, blocks)
        if low < high or (blocks == 0 and rank == 0):
            try:
                with manifest.open(i) as opened:
                    opened.verify(low, high)
            except CorruptError as error:
                problems.append(str(error))
        first += blocks
    return problems


def check_fits(
    manifest: Manifest, wanted: Mapping[str, tuple[str, tuple[int, ...]]], prefix: str | None = None
) -> None:
    """Raises ValueError that says which of the `wanted` tensors, name -> (type, shape), is another one in the checkpoint, and
    how; with a `prefix`, the checkpoint must have no others whose names begin so."""
    lines = []
    for name, (dtype, shape) in wanted.items():
        stored = manifest.tensors.get(name)
        if stored is None:
            lines.append(f"tensor {name}: is not in it, and this model has one of shape {list(shape)}")
        elif stored.shape != shape:
            lines.append(f"tensor {name}: has shape {list(stored.shape)}, in this model {list(shape)}")
        elif stored.dtype != dtype:
            lines.append(f"tensor {name}: is of type {stored.dtype}, in this model {dtype}")
    if prefix is not None:
        lines += [
            f"tensor {name}: is not in this model"
            for name in manifest.tensors
            if name.startswith(prefix) and name not in wanted
        ]
    if lines:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise ValueError(f"{manifest.path}: {lines[0]}{more}")
