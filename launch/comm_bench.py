"""Times collectives between the ranks of this cluster, and writes a hardware recipe that launch/plan.py reads.

    torchrun --standalone --nproc-per-node 2 launch/comm_bench.py out=runs/here.yaml
    torchrun --nnodes 4 --nproc-per-node 8 ... launch/comm_bench.py hardware=h100_sxm out=/shared/ours.yaml
    python launch/plan.py recipe=7b_moe hardware=runs/here.yaml nodes=1

all_reduce, reduce_scatter, all_gather and all_to_all, even and with Zipf's shares for the ranks, over sizes: inside a node,
between the ranks of the same place in all nodes, and over all. A time is that of the slowest rank, the median of several. Latency
and bandwidth of each hop are fitted by the planner's own formula, (log2 n rounded up) * latency + bytes on the wire / bandwidth,
twice for an all_reduce, to the least relative error. Where a cluster has no such hop, the recipe of `hardware` keeps its own. On
CPUs an all_reduce is gloo's, and has figures of its own, `sums`.
"""

import csv
import dataclasses
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moesaic.launch import options
from moesaic.moe.config import require
from moesaic.parallel import shared
from moesaic.parallel.collectives import bus_factor
from moesaic.parallel.hardware import Hardware, Link, load, save
from moesaic.parallel.mesh import end, leave_after, start

OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "all_to_all zipf")


@dataclass
class Options:
    """hardware: a recipe, whose figures other than links are kept. largest_mb: of the buffer of a rank. node: ranks of a node
    (0: what torchrun started on this machine). zipf: the exponent; rank r gets a share of 1 / (r + 1) ^ zipf."""

    hardware: str = "cpu"
    out: str = "hardware.yaml"
    largest_mb: float = 16.0
    repeats: int = 7
    node: int = 0
    zipf: float = 1.0


@dataclass(frozen=True)
class Timed:
    """size: bytes of the buffer, as NCCL's tests count; seconds: of the slowest rank."""

    hop: str
    operation: str
    ranks: int
    size: int
    seconds: float

    @property
    def bus_gb_s(self) -> float:
        return self.size * bus_factor(self.operation.split()[0], self.ranks) / self.seconds / 1e9


def shares(total: int, n: int, exponent: float) -> list[int]:
    """`total` rows for n ranks in the proportion of Zipf's law."""
    weights = [1 / (r + 1) ** exponent for r in range(n)]
    found = [int(total * w / sum(weights)) for w in weights]
    found[0] += total - sum(found)
    return found


def collective(
    operation: str, size: int, group: dist.ProcessGroup, device: torch.device, zipf: float
) -> tuple[int, Callable[[], object]]:
    """The call, and the bytes of its buffer: `size`, rounded so that n ranks can divide it."""
    n, own = dist.get_world_size(group), dist.get_rank(group)
    part = max(1, size // 4 // n)
    ways: Any = dist if device.type == "cuda" else shared  # as a run does
    whole, piece = torch.ones(n * part, device=device), torch.ones(part, device=device)
    if operation == "all_reduce":
        return whole.numel() * 4, lambda: dist.all_reduce(whole.zero_(), group=group)
    if operation == "reduce_scatter":
        return whole.numel() * 4, lambda: ways.reduce_scatter_single(piece, whole, group=group)
    if operation == "all_gather":
        return whole.numel() * 4, lambda: ways.all_gather_single(whole, piece, group=group)
    out = shares(n * part, n, zipf) if operation.endswith("zipf") else [part] * n
    into = torch.empty(n * out[own], device=device)
    return whole.numel() * 4, lambda: ways.all_to_all_single(into, whole, [out[own]] * n, out, group=group)


def seconds_of(call: Callable[[], object], group: dist.ProcessGroup, device: torch.device, repeats: int) -> float:
    """Of the slowest rank of the run, the median; the first call does not count."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier(group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    slowest = torch.tensor(times[1:], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def fit(found: list[Timed]) -> tuple[Link, float]:
    """The link of least relative error, by the planner's formula, and the median relative error of a time."""
    rows = []
    for t in found:
        twice = 2 if t.operation == "all_reduce" else 1
        rows.append((twice * math.ceil(math.log2(t.ranks)), t.size * bus_factor(t.operation, t.ranks), t.seconds))
    a = torch.tensor([[steps / s, size / s] for steps, size, s in rows], dtype=torch.float64)
    scale = a.norm(dim=0)
    solution = torch.linalg.lstsq(a / scale, torch.ones(len(a), 1, dtype=torch.float64)).solution[:, 0] / scale
    latency, per_byte = solution.tolist()
    if latency < 0 or per_byte <= 0:  # noise: the one that is left alone
        one = [(a[:, i].sum() / a[:, i].square().sum()).item() for i in range(2)]
        latency, per_byte = (0.0, one[1]) if latency < 0 else (one[0], 1e-15)
    errors = [abs(steps * latency + size * per_byte - s) / s for steps, size, s in rows]
    return Link(gb_s=float(f"{1e-9 / per_byte:.4g}"), us=float(f"{1e6 * latency:.4g}")), statistics.median(errors)


def make_groups(node: int) -> dict[str, dist.ProcessGroup]:
    """This rank's group of each hop that there is, and that of all. Collective."""
    world, rank = dist.get_world_size(), dist.get_rank()
    every = {"intra": [range(first, first + node) for first in range(0, world, node)],
             "inter": [range(place, world, node) for place in range(node)]}  # fmt: skip
    found: dict[str, dist.ProcessGroup] = {}
    for hop, lists in every.items():
        for ranks in lists:
            group = dist.new_group(list(ranks)) if len(ranks) > 1 else None
            if group is not None and rank in ranks:
                found[hop] = group
    return found | {"all": dist.distributed_c10d._get_default_group()}


def measure(o: Options, node: int, device: torch.device) -> list[Timed]:
    sizes = [2**p for p in range(10, int(math.log2(o.largest_mb * 1e6)) + 1, 2)]
    found = []
    for hop, group in make_groups(node).items():
        for operation in OPERATIONS:
            for size in sizes:
                held, call = collective(operation, size, group, device, o.zipf)
                seconds = seconds_of(call, group, device, o.repeats)
                found.append(Timed(hop, operation, dist.get_world_size(group), held, seconds))
    return found


def main(o: Options) -> None:
    require(1e-2 <= o.largest_mb <= 1e5, f"largest_mb={o.largest_mb:g}: must lie in 0.01..100,000")
    require(o.repeats >= 1, f"repeats={o.repeats}: must be at least 1")
    require(o.zipf >= 0, f"zipf={o.zipf:g}: must not be negative")
    require(o.out.endswith(".yaml"), f"out={o.out}: must end in .yaml, as launch/plan.py wants it")
    base = load(o.hardware)
    device = start()
    world = dist.get_world_size()
    node = o.node or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        require(world > 1, "torchrun: there must be more than one rank, there is nothing to time otherwise")
        require(node >= 1 and world % node == 0, f"node={node}: must divide the number of ranks, {world}")
        if dist.get_rank() == 0:
            check_folder(o.out)
        found = measure(o, node, device)
        if dist.get_rank() == 0:
            write(o, base, found, node, world, device.type)
    finally:
        end(device)


def check_folder(out: str) -> None:
    """Minutes of timing must not end in a folder that nothing can be written to."""
    require(not Path(out).is_dir(), f"out={out}: is a folder")
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=Path(out).parent).close()
    except OSError as error:
        raise ValueError(f"out={out}: can't be written ({error.strerror})") from None


def write(o: Options, base: Hardware, found: list[Timed], node: int, world: int, device: str) -> None:
    print(f"{'hop':6} {'operation':16} {'ranks':>5} {'bytes':>12} {'ms':>10} {'bus GB/s':>9}")
    for t in found:
        print(f"{t.hop:6} {t.operation:16} {t.ranks:5} {t.size:12,} {1e3 * t.seconds:10.3f} {t.bus_gb_s:9.3f}")
    links, said, sums = dict(base.hops), [], base.sums
    apart = ["all_to_all zipf"]
    if device == "cpu":  # sums over copies are gloo's; what else travels goes through memory that ranks share
        apart.append("all_reduce")
        sums, error = fit([t for t in found if t.hop == "all" and t.operation == "all_reduce"])
        said.append(f"sums: {sums.gb_s:g} GB/s, {sums.us:g} us; a time is off by {error:.0%} in the median")
    for hop in links:
        mine = [t for t in found if t.hop == hop and t.operation not in apart]
        if not mine:
            said.append(f"{hop}: not measured, that of {base.name}")
            continue
        links[hop], error = fit(mine)
        said.append(
            f"{hop}: {links[hop].gb_s:g} GB/s, {links[hop].us:g} us; a time is off by {error:.0%} in the median"
        )
    last = {t.operation: t.seconds for t in found if t.hop == "all"}  # of the largest size
    said.append(f"all_to_all, {world} ranks, largest: shares of Zipf's law, exponent {o.zipf:g}, take "
                f"{last['all_to_all zipf'] / last['all_to_all']:.2f} times as long as even ones")  # fmt: skip
    print("\n".join(said))
    domain = node if base.domain < node or base.domain % node else base.domain
    path = Path(o.out)
    head = f"Links measured by launch/comm_bench.py, {world} ranks ({device}), {node} a node; all else is that of {base.name}.\n"
    save(
        dataclasses.replace(base, name=path.stem, node=node, domain=domain, hops=links, sums=sums),
        path,
        head + "\n".join(said),
    )
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["hop", "operation", "ranks", "bytes", "seconds", "bus_gb_s"])
        writer.writerows([t.hop, t.operation, t.ranks, t.size, t.seconds, t.bus_gb_s] for t in found)
    print(f"files: {path}, {path.with_suffix('.csv')}")


if __name__ == "__main__":

    def program() -> None:
        # Of a mistake, one rank speaks.
        if int(os.environ.get("RANK", "0")) > 0:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        options.run(main, Options, __doc__)

    leave_after(program)
