"""What a machine is, for those that plan on it or simulate it: recipes/hardware/NAME.yaml read into a checked dataclass.

Numbers of a data sheet are peaks, and no program reaches them: the planner has factors for that (moesaic.parallel.time_plan).
A file that launch/comm_bench.py wrote holds what was measured between this cluster's own ranks.

    hardware = load("h100_sxm")
    hardware.rate("bf16")                          # 9.894e14 operations a second
    hardware.hops["inter"].seconds(1e6)            # of a message of 1 MB to another domain
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from moesaic.moe.config import require

FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "hardware"
HOPS = ("intra", "inter")
PRECISIONS = ("fp32", "tf32", "bf16", "fp8", "fp4")
WORDS = {int: "a whole number", float: "a number", str: "text"}
TARGETS = ("cpu", "sm_90a", "sm_100a", "gfx942", "gfx950")


@dataclass(frozen=True)
class Link:
    """The way of one device to others.

    gb_s        10^9 bytes a second that it sends, and receives at the same time
    us          microseconds from the start of a message without content to its end
    efficiency  the part of gb_s that a large message reaches: 1 for a measured gb_s
    """

    gb_s: float
    us: float
    efficiency: float = 1.0

    @property
    def bytes_s(self) -> float:
        return self.gb_s * 1e9 * self.efficiency

    @property
    def latency(self) -> float:
        return self.us * 1e-6

    def seconds(self, size: float, messages: int = 1) -> float:
        """Of `messages` one after another that hold `size` bytes in all."""
        return messages * self.latency + size / self.bytes_s


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal devices.

    name         of the file
    part         what it is in its maker's words
    target       key of moesaic.kernels.tiles.TILES: the tiles of matrix products
    processors   streaming multiprocessors, compute units, or cores, of one device
    tflops       10^12 operations a second of dense matrix products, by precision, none where there is no unit for it
    memory_gib   that a program can allocate of one device's memory; memory_gb_s: 10^9 bytes a second of it
    node         devices that one host drives
    domain       devices that the `intra` links join: the node, or several
    hops         the links, by hop: intra, inside a domain, and inter, to another one
    launch_us    microseconds that the host needs to issue one operation: PyTorch's dispatch, autograd, and the launch, 2.3 of
                 them (arXiv 2504.11750)
    gathers      of weights and gradients as FSDP2 moves them, its part on the host included; sums: of an all_reduce between its
                 copies. Both in the place of the hops, where they were measured by themselves (none: not)
    """

    name: str
    part: str
    target: str
    processors: int
    tflops: dict[str, float]
    memory_gib: float
    memory_gb_s: float
    node: int
    domain: int
    hops: dict[str, Link]
    launch_us: float = 10.0
    gathers: Link | None = None
    sums: Link | None = None

    def __post_init__(self) -> None:
        what = f"hardware={self.name}"
        require(self.target in TARGETS, f"{what}: target={self.target}: must be one of {', '.join(TARGETS)}")
        for name in ("processors", "node", "domain"):
            require(getattr(self, name) >= 1, f"{what}: {name}={getattr(self, name)}: must be at least 1")
        require(self.domain % self.node == 0, f"{what}: domain={self.domain}: must be a multiple of node={self.node}")
        for name in ("memory_gib", "memory_gb_s"):
            require(_positive(getattr(self, name)), f"{what}: {name}={getattr(self, name)}: must be positive")
        require(self.launch_us >= 0, f"{what}: launch_us={self.launch_us}: must not be negative")
        require(isinstance(self.tflops, dict) and bool(self.tflops),
                f"{what}: tflops: must hold a rate by precision, such as bf16")  # fmt: skip
        for name, rate in self.tflops.items():
            require(name in PRECISIONS, f"{what}: tflops.{name}: must be one of {', '.join(PRECISIONS)}")
            require(_positive(rate), f"{what}: tflops.{name}={rate}: must be positive")
        require(set(self.hops) == set(HOPS), f"{what}: hops: must be {' and '.join(HOPS)}, not {', '.join(self.hops)}")
        links = {f"hops.{hop}": link for hop, link in self.hops.items()} | {"gathers": self.gathers, "sums": self.sums}
        for hop, link in links.items():
            if link is None:
                continue
            require(_positive(link.gb_s), f"{what}: {hop}.gb_s={link.gb_s}: must be positive")
            require(link.us >= 0, f"{what}: {hop}.us={link.us}: must not be negative")
            require(0 < link.efficiency <= 1, f"{what}: {hop}.efficiency={link.efficiency}: must lie in 0..1")

    def rate(self, precision: str) -> float:
        """Operations a second at the peak. Raises ValueError where the device has no unit for `precision`."""
        require(precision in self.tflops,
                f"precision={precision}: hardware={self.name} has {', '.join(self.tflops)}")  # fmt: skip
        return self.tflops[precision] * 1e12

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_gib * 2**30

    @property
    def bandwidth(self) -> float:
        """Bytes a second of the device's memory."""
        return self.memory_gb_s * 1e9


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def names() -> list[str]:
    """Those that ship with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Hardware:
    """The hardware of a shipped name, or of a YAML file's path.

    Raises ValueError, one line, for a name or a field that is unknown, a field that is missing, or a value that can't be.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, names(), n=1)
        raise ValueError(
            f"hardware={name}: unknown" + (f"; nearest: {near[0]}" if near else f"; known: {', '.join(names())}")
        )
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"hardware={name}: can't be read: {' '.join(str(error).split())}") from None
    require(isinstance(values, dict), f"hardware={name}: must hold fields: {', '.join(_fields(Hardware))}")
    hops = values.get("hops")
    require(isinstance(hops, dict), f"hardware={name}: hops: must hold {' and '.join(HOPS)}")
    links = {hop: _made(Link, link, f"hardware={name}: hops.{hop}") for hop, link in hops.items()}
    own = {key: _made(Link, values[key], f"hardware={name}: {key}") for key in ("gathers", "sums") if values.get(key)}
    read = {"name": path.stem} | values | {"hops": links} | own
    made: Hardware = _made(Hardware, read, f"hardware={name}")
    return made


def save(hardware: Hardware, path: str | Path, head: str = "") -> None:
    """Write what `load` reads. `head`: lines of comment above it, such as where the numbers come from."""
    comment = "".join(f"# {line}\n" for line in head.splitlines())
    Path(path).write_text(comment + yaml.safe_dump(dataclasses.asdict(hardware), sort_keys=False))


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _made(kind: type, values: Any, what: str) -> Any:
    known = _fields(kind)
    require(isinstance(values, dict), f"{what}: must hold fields: {', '.join(known)}")
    for name in values:
        require(name in known, f"{what}: {name}: unknown; known: {', '.join(known)}")
    for name, hint in get_type_hints(kind).items():
        wanted = (int, float) if hint is float else hint
        if name in values and wanted in (int, str, (int, float)):
            require(isinstance(values[name], wanted) and values[name] is not True,
                    f"{what}: {name}={values[name]}: must be {WORDS[hint]}")  # fmt: skip
    try:
        return kind(**values)
    except TypeError as error:  # a field that is missing
        raise ValueError(f"{what}: {str(error).replace(f'{kind.__name__}.__init__() ', '')}") from None
