"""Tile sizes: how each target cuts a grouped product into pieces. The one table that kernels, rounding and counters read.

A grouped GEMM multiplies each expert's rows with that expert's matrix, one M x N tile of the result at a time, K deep a step:

    varlen_m   y[rows of e] = x[rows of e] @ w[e]        the rows are dimension M: an expert's last tile is padded to M rows
    varlen_k   dw[e] = x[rows of e].T @ dy[rows of e]    the rows are the depth K: an expert's last step is padded to K rows

Token rounding (moesaic.kernels.rounding) makes each expert's rows a multiple of `rounding_tile`, so that neither is padded.
That needs one M for all varlen_m products of a target, of which every varlen_k depth is a divisor.

Letters: M tile rows, N tile columns, K tile depth.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """An m x n tile of the result, computed k deep a step. Powers of two; at least 16, as Triton's `dot` demands.

    By `warps` warps, with `stages` steps under way at once.
    """

    m: int
    n: int
    k: int
    warps: int = 8
    stages: int = 3

    def __post_init__(self) -> None:
        for size in (self.m, self.n, self.k):
            if size < 16 or size & (size - 1):
                raise ValueError(f"tile={self.m}x{self.n}x{self.k}: sizes must be powers of two, at least 16")


# Results narrower than this get the `varlen_m_narrow` tile: half of a 128 wide one would be padding.
NARROW = 128

# Compiled ahead of time at 128x128x64, a gather-fused product uses the tensor cores of all four without spilling registers, also
# with a SwiGLU epilogue and a task queue in the same kernel. At 128x256x64 that kernel spills on both sm targets.
_GPU = {
    "varlen_m": Tile(128, 128, 64),
    "varlen_m_narrow": Tile(128, 64, 64),
    "varlen_k": Tile(128, 128, 64),
    "fused": Tile(128, 64, 32, stages=4),
    "fused_low": Tile(64, 128, 32, stages=4),
    "dense": Tile(128, 128, 64),
    "dense_small": Tile(64, 64, 32, warps=4, stages=2),
}

# Torch's matrix products on a CPU take any number of rows, so M = 16 is a choice: the smallest that Triton's `dot`, and so its
# interpreter, accepts. Rounding costs quality where an expert has fewer than about two tiles of rows (arXiv 2512.14080), and
# models that train on a CPU give an expert tens or hundreds: at a GPU's 128, many an expert would be rounded to nothing.
_CPU = {
    "varlen_m": Tile(16, 64, 32),
    "varlen_m_narrow": Tile(16, 32, 32),
    "varlen_k": Tile(64, 64, 16),
    "fused": Tile(16, 128, 128),
    "fused_low": Tile(16, 128, 128),
    "dense": Tile(32, 64, 32),
    "dense_small": Tile(32, 64, 32),
}

TILES: dict[str, dict[str, Tile]] = {"cpu": _CPU} | {name: _GPU for name in ("sm_90a", "sm_100a", "gfx942", "gfx950")}
TILES |= {
    name: TILES[name] | {"fused": Tile(128, 64, 32, stages=1), "fused_low": Tile(64, 128, 32, stages=1)}
    for name in ("gfx942", "gfx950")
}
# With two stages, rows at odd addresses spill.
TILES["sm_100a"] = _GPU | {"dense_small": Tile(64, 64, 32, warps=4, stages=1)}


def gemm_tile(target: str | torch.device, product: str, columns: int, override: Tile | None = None) -> Tile:
    """The tile of a grouped GEMM: `product` is varlen_m or varlen_k, `columns` the width of its result."""
    if override is not None:
        return override
    assert product in ("varlen_m", "varlen_k"), product
    narrow = product == "varlen_m" and columns < NARROW
    return TILES[target_name(target)][f"{product}_narrow" if narrow else product]


def dense_tile(target: str | torch.device, large: bool) -> Tile:
    """The tile of a product without groups; the small one is for fp32, and for rows that don't begin at multiples of 16 bytes,
    whose addresses and masks take registers."""
    return TILES[target_name(target)]["dense" if large else "dense_small"]


def fused_tile(target: str | torch.device, low: bool = False) -> Tile:
    """The tile of all products of the fused kernels (moesaic.kernels.fused_ep), of which M divides that of the others'. The
    interpreter takes as long for a small tile as for a large one. low: where layers have products of fp8, whose rows are cast in
    registers while they are multiplied: half as many, by twice as many columns."""
    return TILES[target_name(target)]["fused_low" if low else "fused"]


def product_precision(target: str | torch.device, dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`. NVIDIA's matrix units take fp32 as TF32 only: in three products as exact as fp32, or in one
    where torch.set_float32_matmul_precision allows it. AMD's take fp32."""
    if dtype != torch.float32 or not target_name(target).startswith("sm_"):
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def rounding_tile(target: str | torch.device, override: int | None = None) -> int:
    """M, of which token rounding must make every expert's rows a multiple on this target; `override` (rows) comes first."""
    if override is not None:
        if override < 1:
            raise ValueError(f"model.router.rounding_tile={override}: must be at least 1")
        return override
    return TILES[target_name(target)]["varlen_m"].m


@functools.cache
def known_tile(target: str | torch.device, override: int | None = None) -> int | None:
    """`rounding_tile`, or None where it is not known."""
    try:
        return rounding_tile(target, override)
    except ValueError:
        return None


def replace(target: str, entries: Mapping[str, Tile]) -> None:
    """Put tiles into the table, for this process, as moesaic.kernels.autotune finds them.

    Raises ValueError for a product that the table doesn't have, and where the rows of an expert would be rounded to what pads a
    product: the varlen_m tiles need one M, and the depth of varlen_k must divide it.
    """
    table = TILES[target] | dict(entries)
    if unknown := [name for name in table if name not in _GPU]:
        raise ValueError(f"{unknown[0]}: must be one of {', '.join(_GPU)}")
    m = table["varlen_m"].m
    if table["varlen_m_narrow"].m != m:
        raise ValueError(f"varlen_m_narrow m={table['varlen_m_narrow'].m}: must be that of varlen_m, {m}")
    if m % table["varlen_k"].k:
        raise ValueError(f"varlen_k k={table['varlen_k'].k}: must divide the m of varlen_m, {m}")
    TILES[target] = table
    known_tile.cache_clear()


@contextlib.contextmanager
def using(target: str, entries: Mapping[str, Tile]) -> Iterator[None]:
    """`replace` for a while."""
    saved = TILES[target]
    replace(target, entries)
    try:
        yield
    finally:
        replace(target, saved)


# Programs that a persistent kernel starts: one for each multiprocessor or compute unit of the parts named in docs/kernels.md.
_PROCESSORS = {"sm_90a": 132, "sm_100a": 148, "gfx942": 304, "gfx950": 256}
# Under the interpreter programs run one after another; with a few, a persistent loop still has something to divide.
_INTERPRETED = 3

_of_meta = "meta"


@contextlib.contextmanager
def meta_is(target: str) -> Iterator[None]:
    """While active, tensors on the meta device pass for tensors on `target`, so that launchers can be compiled for it."""
    global _of_meta
    saved, _of_meta = _of_meta, target
    known_tile.cache_clear()
    try:
        yield
    finally:
        _of_meta = saved
        known_tile.cache_clear()


def processors(device: torch.device) -> int:
    """How many programs of a persistent kernel run at once on a device, one on each of its multiprocessors or compute units."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _PROCESSORS.get(target_name(device), _INTERPRETED)


def target_name(target: str | torch.device) -> str:
    """The key of `TILES` for a device: `cpu`, or the architecture of the GPU behind it. A string is taken as a key."""
    if isinstance(target, str):
        name = target
    elif target.type == "meta":
        name = _of_meta
    elif target.type != "cuda":
        name = target.type
    elif torch.version.hip:
        name = torch.cuda.get_device_properties(target).gcnArchName.split(":")[0]  # as in gfx942:sramecc+:xnack-
    else:
        major, minor = torch.cuda.get_device_capability(target)
        # 10.3 is of the family of 10.0, and gets its tiles.
        name = {9: "sm_90a", 10: "sm_100a"}.get(major, f"sm_{major}{minor}")
    if name not in TILES:
        raise ValueError(
            f"model.router.rounding_tile=null: no tile is known for {name}, only for {', '.join(TILES)}; give its rows"
        )
    return name
