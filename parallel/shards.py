"""Tensors in pieces, and the files that hold them.

A piece is a box of a tensor: offsets and sizes per dimension. A rank's part of a DTensor is one box, what ZeRO leaves of a
parameter a few. A file is a safetensors file: a header, then the values of its pieces one after the other. Its checksums are
of blocks of BLOCK bytes, the header's among them, so that any range can be read and verified without the rest.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moesaic.parallel import storage
from moesaic.parallel.fragment import Fragment

BLOCK = 2**22
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CorruptError(ValueError):
    """A file is not what was written."""


class Piece(NamedTuple):
    """A box of the tensor `name`, whose whole has `shape`; dtype is a key of DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def key(self) -> str:
        """Its name in a file: that of the tensor, where it is not all of it with its offsets."""
        return self.name if self.sizes == self.shape else f"{self.name}@{','.join(map(str, self.offsets))}"

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * DTYPES[self.dtype].itemsize


Part = tuple[Piece, Tensor]


# ---------------------------------------------------------------- who holds what


def parts(name: str, tensor: Tensor) -> list[Part]:
    """The pieces of a tensor that this rank holds, and their values, in place; none where it holds none."""
    shape, dtype = tuple(tensor.shape), NAMES[tensor.dtype]
    boxes: Iterable[tuple[Any, Any, Tensor]]
    if isinstance(tensor, Fragment):
        boxes = tensor.boxes()
    elif isinstance(tensor, DTensor):
        assert not any(p.is_partial() for p in tensor.placements), tensor.placements
        values = tensor.to_local()
        sizes, offsets = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
        assert tuple(values.shape) == tuple(sizes) or values.numel() == 0 == math.prod(sizes), (
            name,
            values.shape,
            sizes,
        )
        boxes = [(offsets, sizes, values)]
    else:
        boxes = [((0,) * len(shape), shape, tensor)]
    return [(Piece(name, dtype, shape, tuple(o), tuple(s)), v.detach()) for o, s, v in boxes if math.prod(s) > 0]


def holders(tensor: Tensor) -> tuple[int, ...]:
    """The ranks that hold the same pieces of `tensor` as this one, in order."""
    if isinstance(tensor, Fragment):
        return (dist.get_rank(),)
    if not isinstance(tensor, DTensor):
        return tuple(range(dist.get_world_size()))
    here = tensor.device_mesh.get_coordinate()
    assert here is not None
    index = tuple(slice(None) if p.is_replicate() else i for p, i in zip(tensor.placements, here, strict=True))
    return tuple(sorted(tensor.device_mesh.mesh[index].flatten().tolist()))


def owned(tensors: Mapping[str, Tensor]) -> list[Part]:
    """The pieces that this rank writes: every piece has one writer among the ranks that hold it, and these have equal shares.

    Each rank decides alone. Those that hold a piece hold the same ones in common, and deal them out by the same rule: the
    largest first, to the one who has least.
    """
    result: list[Part] = []
    loads: dict[tuple[int, ...], list[int]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        ranks = holders(tensor)
        mine = parts(name, tensor)
        load = loads.setdefault(ranks, [0] * len(ranks))
        writer = load.index(min(load))
        load[writer] += sum(piece.bytes for piece, _ in mine)
        if ranks[writer] == dist.get_rank():
            result += mine
    return result


# ---------------------------------------------------------------- writing a file


class Written(NamedTuple):
    """A file: its bytes, the checksums of its blocks, and the byte at which each of its pieces starts."""

    size: int
    checksums: list[str]
    starts: list[int]


def place_in_file(piece: Piece) -> tuple[Any, ...]:
    """What pieces of a file are sorted by: wider types come first, so that all are aligned."""
    return -DTYPES[piece.dtype].itemsize, piece.name, piece.offsets


def write(path: str, pieces: Sequence[Piece], values: Iterable[Tensor]) -> Written:
    """Write a safetensors file of pieces sorted by `place_in_file`. `values` gives theirs, one at a time, on any device. Raises
    OSError."""
    ends = list(itertools.accumulate((piece.bytes for piece in pieces), initial=0))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for piece, start, end in zip(pieces, ends, ends[1:], strict=False):
        header[piece.key] = {"dtype": piece.dtype, "shape": piece.sizes, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sums = BlockSums()
    with storage.writer(path) as file:
        for data in itertools.chain([memoryview(len(text).to_bytes(8, "little") + text)], map(bytes_of, values)):
            for block in sums.add(data):
                write_all(file, block)
    assert sums.size == 8 + len(text) + ends[-1], (path, sums.size)
    return Written(sums.size, sums.done(), [8 + len(text) + end for end in ends[:-1]])


class BlockSums:
    """Checksums of the blocks of a stream of bytes."""

    def __init__(self) -> None:
        self.size, self._done, self._open = 0, list[str](), xxhash.xxh3_64()

    def add(self, data: memoryview) -> Iterator[memoryview]:
        """The same bytes, in parts that lie in one block."""
        while data:
            part = data[: BLOCK - self.size % BLOCK]
            data = data[len(part) :]
            self._open.update(part)
            self.size += len(part)
            if self.size % BLOCK == 0:
                self._done.append(self._open.hexdigest())
                self._open.reset()
            yield part

    def done(self) -> list[str]:
        return self._done + ([self._open.hexdigest()] if self.size % BLOCK else [])


def bytes_of(tensor: Tensor) -> memoryview:
    """Its values in row-major order: themselves where they lie so in host memory, else a copy."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(cast(Any, flat.view(torch.uint8).numpy()))


def write_all(file: Any, data: memoryview) -> None:
    while data:  # an unbuffered file may take less than it is given
        data = data[file.write(data) :]


# ---------------------------------------------------------------- reading a file


class VerifiedFile:
    """A file of known size and checksums. What `read_into` gives was verified. Raises CorruptError, naming the file."""

    def __init__(self, path: str, size: int, checksums: Sequence[str], block: int = BLOCK) -> None:
        self.path, self.size, self.checksums, self.block = path, size, checksums, block
        self._cached, self._buffer = -1, bytearray(min(block, size))
        try:
            found = storage.size(path)
            if found != size:
                raise CorruptError(f"{path}: has {found:,} bytes, {size:,} were written")
            self._open = storage.reader(path)
            self._file: Any = self._open.__enter__()
        except OSError as error:
            raise CorruptError(f"{path}: can't be read ({error.strerror or error})") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.__exit__(kind, error, trace)

    def read_into(self, start: int, out: memoryview) -> None:
        """Bytes `start` to `start + len(out)`."""
        while out:
            i, skip = divmod(start, self.block)
            n = min(len(out), self._length(i) - skip)
            if n == self._length(i):
                self._read(i, out[:n])
            else:
                if i != self._cached:
                    self._cached = -1
                    self._read(i, memoryview(self._buffer)[: self._length(i)])
                    self._cached = i
                out[:n] = memoryview(self._buffer)[skip : skip + n]
            start, out = start + n, out[n:]

    def verify(self, first: int, end: int) -> None:
        """Read blocks `first` to `end`."""
        for i in range(first, end):
            self._read(i, memoryview(self._buffer)[: self._length(i)])

    def _length(self, i: int) -> int:
        return min(self.block, self.size - i * self.block)

    def _read(self, i: int, out: memoryview) -> None:
        at, whole = i * self.block, out
        try:
            self._file.seek(at)
            while out:
                n = self._file.readinto(out)
                if not n:
                    raise CorruptError(f"{self.path}: ends early")
                out = out[n:]
        except OSError as error:
            raise CorruptError(f"{self.path}: can't be read ({error.strerror or error})") from error
        if xxhash.xxh3_64_hexdigest(whole) != self.checksums[i]:
            raise CorruptError(f"{self.path}: bytes {at:,} to {at + len(whole):,} do not have their checksum")


def meet(one: Piece, other: Piece) -> bool:
    """Whether two pieces of a tensor have a value in common."""
    return all(a < b + m and b < a + n for a, n, b, m in zip(*one[3:], *other[3:], strict=True))


def fill(file: VerifiedFile, start: int, piece: Piece, wanted: Piece, out: Tensor) -> None:
    """Copy what `piece`, which begins at byte `start` of the file, has of `wanted` into that one's values, `out`. They `meet`."""
    begin = [max(a, b) for a, b in zip(piece.offsets, wanted.offsets, strict=True)]
    end = [min(a + n, b + m) for a, n, b, m in zip(*piece[3:], *wanted[3:], strict=True)]
    out = out[tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, wanted.offsets, strict=True))]
    here = [slice(a - o, b - o) for a, b, o in zip(begin, end, piece.offsets, strict=True)]
    _copy(file, start, list(piece.sizes), here, out)


@torch.no_grad()
def _copy(file: VerifiedFile, start: int, sizes: list[int], box: list[slice], out: Tensor) -> None:
    """Fill `out` with `box` of the array of `sizes` that begins at byte `start`. No more than BLOCK bytes are held beside it.

    Straight into `out` where both lie in one run; else by rows, as many as fit; else within each row.
    """
    row = math.prod(sizes[1:]) * out.itemsize
    first, end = (box[0].start, box[0].stop) if box else (0, 1)
    whole = all(s == slice(0, n) for s, n in zip(box[1:], sizes[1:], strict=True))
    if whole and out.is_contiguous() and out.device.type == "cpu":
        file.read_into(start + first * row, bytes_of(out))
    elif row <= BLOCK:
        step = BLOCK // row
        for i in range(first, end, step):
            n = min(step, end - i)
            rows = torch.empty((n, *sizes[1:]), dtype=out.dtype)
            file.read_into(start + i * row, bytes_of(rows))
            if box:
                out[i - first : i - first + n].copy_(rows[(slice(None), *box[1:])])
            else:
                out.copy_(rows[0])
    else:
        for i in range(first, end):
            _copy(file, start + i * row, sizes[1:], box[1:], out[i - first])
