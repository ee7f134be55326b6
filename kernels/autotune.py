"""Tiles chosen by timing the experts of a layer on the GPU that is there, in place of those of moesaic.kernels.tiles.

    record = tuned(device, shape, cache)       times candidates, or reads what an earlier call with the same key found
    use(record, device)                        from now on, every launch and token rounding take these tiles

What is timed is a layer's experts forward and backward in bf16, as moesaic.kernels.bench has them: launches share L2 and tails,
so the sum is what counts. Candidates are tried one product at a time, the others as they are, once for each M: all products of a
direction count in the same M, and token rounding does. One whose result is not that of plain torch is not timed, and one that
doesn't fit the device is passed over.

A record is JSON, as in run_dir/tiles.json:

    {"device": "NVIDIA H100 80GB HBM3", "target": "sm_90a", "shape": {"T": 4096, …}, "code": "5f0c…",
     "tiles": {"varlen_m": {"m": 128, "n": 128, "k": 64, "warps": 8, "stages": 4}, …},
     "milliseconds": {"table": …, "chosen": …}}

Only `target` and `tiles` are read again by `use`; of a file that a person writes, the others may be left out. Tuning itself was
never run on a GPU, only with a stand-in for its clock: not measured.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import triton

from moesaic.kernels import tiles
from moesaic.kernels.tiles import Tile

PRODUCTS = ("varlen_m", "varlen_m_narrow", "varlen_k")

# (n, k, warps, stages). The wide ones are those that compile without spills somewhere; a device that can't is passed over.
_ROWS = [(128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (256, 64, 8, 3), (128, 32, 8, 4), (64, 64, 4, 4)]
_NARROW = [(64, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 4), (32, 64, 4, 4)]
# (m, n, k, warps, stages)
_DEPTH = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 32, 8, 4), (128, 256, 64, 8, 3), (64, 128, 64, 4, 3)]


def candidates(product: str, m: int) -> list[Tile]:
    """What is tried for a product, with M rows where the rows are dimension M. Depths of varlen_k divide every M."""
    if product == "varlen_k":
        return [Tile(*sizes) for sizes in _DEPTH if m % sizes[2] == 0]
    return [Tile(m, *sizes) for sizes in (_NARROW if product == "varlen_m_narrow" else _ROWS)]


def layer_shape(tokens: int, d: int, f: int, g: int, experts: int, top_k: int, ranks: int) -> dict[str, int]:
    """The shape that a rank of `ranks` sees of a layer's experts, with rows evenly spread: as many rows, of fewer experts."""
    local = experts // ranks
    k = min(top_k, local)
    return {"T": tokens * top_k // k, "D": d, "F": f, "G": g, "E": local, "K": k, "R": tokens * top_k // k * k}


def code_hash() -> str:
    """Of the files that decide how fast a tile is."""
    folder = Path(__file__).parent
    names = ("autotune", "grouped_gemm", "experts", "combine", "tiles")
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in names)).hexdigest()[:16]


def key_of(device: torch.device, shape: Mapping[str, int]) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"device": name, "target": tiles.target_name(device), **versions, "shape": dict(shape), "code": code_hash()}


def search(
    device: torch.device, shape: Mapping[str, int], say: Callable[[str], None] = print
) -> tuple[dict[str, Tile], dict[str, float]]:
    """(the fastest tiles by product, milliseconds of the table's and of these). Takes minutes, mostly the compiler's."""
    from moesaic.kernels import bench

    target = tiles.target_name(device)
    case = next(bench.experts(device, shape))

    def milliseconds(entries: Mapping[str, Tile]) -> float | None:
        try:
            with tiles.using(target, entries):
                why = bench.wrong(case)
                return None if why else bench.milliseconds(case.ours)
        except (RuntimeError, triton.runtime.errors.TritonError) as error:  # it doesn't fit, or doesn't compile
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            return None

    best = {product: tiles.TILES[target][product] for product in PRODUCTS}
    table = milliseconds(best)
    if table is None:
        raise ValueError(f"train.tiles=autotune: {case.name} is wrong on this device already with the table's tiles")
    say(f"tiles: timing candidates on {key_of(device, shape)['device']}; the table's take {table:.3f} ms")
    least = table
    for m in (64, 128):
        entries = {p: tile if p == "varlen_k" else dataclasses.replace(tile, m=m) for p, tile in best.items()}
        fastest = milliseconds(entries)
        for product in _used(shape):
            for tile in candidates(product, m):
                trial = entries | {product: tile}
                taken = milliseconds(trial) if m % trial["varlen_k"].k == 0 else None
                if taken is not None and (fastest is None or taken < fastest):
                    entries, fastest = trial, taken
        say(f"tiles: with {m} rows " + ("none works" if fastest is None else f"{fastest:.3f} ms"))
        if fastest is not None and fastest < least:
            best, least = entries, fastest
    return best, {"table": table, "chosen": least}


def _used(shape: Mapping[str, int]) -> list[str]:
    """The products that a layer of this shape has: results of G, F and D columns."""
    narrow = {"varlen_m_narrow" if shape[letter] < tiles.NARROW else "varlen_m" for letter in "GFD"}
    return [product for product in PRODUCTS if product in narrow or product == "varlen_k"]


def tuned(
    device: torch.device, shape: Mapping[str, int], cache: Path | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The record of the fastest tiles for a layer: from `cache` (null: ~/.cache/moesaic/tiles), or found now and put there.

    shape    T, D, F, G, E, K and R as in moesaic.kernels.roofline
    Raises ValueError where there is no GPU, or none that tiles are known for.
    """
    from moesaic.kernels import bench

    if line := bench.no_gpu():
        raise ValueError(f"train.tiles=autotune: {line.removeprefix('error: ')}")
    key = key_of(device, shape)
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "moesaic" / "tiles"
    path = folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"
    if path.is_file():
        try:
            record = read(path)
            say(f"tiles: as timed before, {path}")
            return record
        except ValueError as error:
            say(f"tiles: {error}; timing again")
    found, milliseconds = search(device, shape, say)
    record = key | {"tiles": {p: dataclasses.asdict(tile) for p, tile in found.items()}, "milliseconds": milliseconds}
    write(record, path)
    return record


def read(path: str | Path) -> dict[str, Any]:
    """A record. Raises ValueError, with the path, where it can't be read or is none."""
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: can't be read as a record of tiles ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("tiles"), dict) or "target" not in record:
        raise ValueError(f"{path}: is no record of tiles, an object with target and tiles")
    _entries(record, str(path))
    return record


def write(record: Mapping[str, Any], path: Path) -> None:
    """Whole or not at all: runs that start together may write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w") as file:
        json.dump(record, file, indent=1)
    os.replace(temporary, path)


def use(record: Mapping[str, Any], device: torch.device, source: str = "tiles") -> None:
    """Every later launch in this process takes the record's tiles. Raises ValueError, one line with `source`, where they are
    another target's, or such that token rounding would have no one M."""
    target = tiles.target_name(device)
    if record["target"] != target:
        raise ValueError(f"{source}: its tiles are for {record['target']}, and this device is {target}")
    entries = _entries(record, source)
    try:
        tiles.replace(target, entries)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _entries(record: Mapping[str, Any], source: str) -> dict[str, Tile]:
    try:
        return {product: Tile(**sizes) for product, sizes in record["tiles"].items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
