"""Tile sizes: how each target cuts a grouped product into pieces. The one table that kernels, rounding and counters read.

A grouped GEMM multiplies each expert's rows with that expert's matrix, one M x N tile of the result at a time, K deep a step:

    varlen_m   y[rows of e] = x[rows of e] @ w[e]        the rows are dimension M: an expert's last tile is padded to M rows
    varlen_k   dw[e] = x[rows of e].T @ dy[rows of e]    the rows are the depth K: an expert's last step is padded to K rows

Token rounding (moesaic.kernels.rounding) makes each expert's rows a multiple of `rounding_tile`, so that neither is padded.
That needs one M for all varlen_m products of a target, of which every varlen_k depth is a divisor.

Letters: M tile rows, N tile columns, K tile depth.
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """An m x n tile of the result, computed k deep a step. Powers of two; at least 16, as Triton's `dot` demands."""

    m: int
    n: int
    k: int

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
}

# Torch's matrix products on a CPU take any number of rows, so M = 16 is a choice: the smallest that Triton's `dot`, and so its
# interpreter, accepts. Rounding costs quality where an expert has fewer than about two tiles of rows (arXiv 2512.14080), and
# models that train on a CPU give an expert tens or hundreds: at a GPU's 128, many an expert would be rounded to nothing.
_CPU = {
    "varlen_m": Tile(16, 64, 32),
    "varlen_m_narrow": Tile(16, 32, 32),
    "varlen_k": Tile(64, 64, 16),
}

TILES: dict[str, dict[str, Tile]] = {"cpu": _CPU} | {name: _GPU for name in ("sm_90a", "sm_100a", "gfx942", "gfx950")}


def gemm_tile(target: str | torch.device, product: str, columns: int, override: Tile | None = None) -> Tile:
    """The tile of a grouped GEMM: `product` is varlen_m or varlen_k, `columns` the width of its result."""
    if override is not None:
        return override
    assert product in ("varlen_m", "varlen_k"), product
    narrow = product == "varlen_m" and columns < NARROW
    return TILES[target_name(target)][f"{product}_narrow" if narrow else product]


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


def target_name(target: str | torch.device) -> str:
    """The key of `TILES` for a device: `cpu`, or the architecture of the GPU behind it. A string is taken as a key."""
    if isinstance(target, str):
        name = target
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
