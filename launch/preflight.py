"""What one wants to know of a cluster before a run is paid for. Give it the run's own command line, on the run's own ranks.

    torchrun --nproc-per-node 2 launch/preflight.py recipe=tiny_moe
    torchrun --nproc-per-node 8 launch/preflight.py recipe=7b_moe run_dir=/shared/runs/a hardware=h100_sxm

A line for each check: ok; warn, which may cost time; FAIL, with which the run would break or compute wrongly, and exit code 1.
`hardware` is a file of recipes/hardware, or the path of one, whose links are expected here (auto: by the name of the device).
"""

# ruff: noqa: E402
import os

PARENT = os.getppid()  # before the imports, which take seconds

import importlib.metadata
import platform
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from moesaic.launch import cli
from moesaic.launch.batches import micro_batches
from moesaic.launch.schema import Config
from moesaic.launch.startup import check_devices, compute_dtype, settle_model, together
from moesaic.moe.flops import parameter_counts
from moesaic.parallel import hardware as machines
from moesaic.parallel import probe, storage
from moesaic.parallel.hardware import Hardware
from moesaic.parallel.layout import layout_of
from moesaic.parallel.memory_plan import memory_of
from moesaic.parallel.mesh import end, end_with_parent, leave_after, start
from moesaic.parallel.probe import gather

Finding = tuple[str, str]  # ok, warn or FAIL, and what is to be said
OK, WARN, FAIL = "ok", "warn", "FAIL"
SETTINGS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1", "CUDA_LAUNCH_BLOCKING": "1",
            "TORCH_DISTRIBUTED_DEBUG": "DETAIL", "NCCL_DEBUG": "TRACE"}  # fmt: skip
MIB = 2**20


@dataclass
class Place:
    """Where this rank is. `hosts`: the name of each rank's."""

    config: Config
    device: torch.device
    kind: str
    hardware: Hardware | None
    hosts: list[str]

    @property
    def local(self) -> int:
        """Ranks on this rank's host."""
        return self.hosts.count(self.hosts[dist.get_rank()])


def main(config: Config, hardware: str) -> None:
    end_with_parent(PARENT)
    check_devices()
    device = start()
    try:
        together(lambda: settle_model(config, {}))
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        machine = together(lambda: expected(hardware, device, kind))
        place = Place(config, device, kind, machine, gather(socket.gethostname()))
        levels = run(place, print if dist.get_rank() == 0 else lambda line: None)
    finally:
        end(device)
    if FAIL in levels:
        raise SystemExit(1)


def run(place: Place, say: Callable[[str], None]) -> list[str]:
    """All checks, a line each as soon as it is known. Collective. Returns their levels."""
    world, nodes = dist.get_world_size(), len(set(place.hosts))
    known = f", hardware={place.hardware.name}" if place.hardware else ""
    say(f"preflight of {place.config.name}: {world} ranks on {nodes} host{'s' * (nodes > 1)}, {place.kind}{known}")
    checks = (versions, settings, devices, memory, disk, clocks, exchange, products, links)
    levels = []
    for check in checks:
        for level, told in check(place):
            say(f"{level:4}  {check.__name__:9} {told}")
            levels.append(level)
    say(f"{levels.count(FAIL)} failed, {levels.count(WARN)} to look at")
    return levels


def expected(name: str, device: torch.device, kind: str) -> Hardware | None:
    """The hardware that `name` says; auto: that of the device's name, None where there is none."""
    if name != "auto":
        return machines.load(name)
    if device.type == "cpu":
        return machines.load("cpu")
    fits = [n for n in machines.names() if re.search(rf"\b{n.split('_')[0]}\b", kind, re.I)]
    return machines.load(fits[0]) if len(fits) == 1 else None


def processor() -> str:
    """What /proc/cpuinfo calls this machine's, where there is one."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()


# ---------------------------------------------------------------- checks: (level, line), on every rank alike


def versions(place: Place) -> Iterator[Finding]:
    mine = {"python": platform.python_version(), "machine": platform.machine()}
    mine |= {name: installed(name) for name in ("moesaic", "torch", "triton", "deepspeed", "numpy")}
    mine |= {"cuda": torch.version.cuda or "-", "hip": torch.version.hip or "-", "nccl": "-"}
    if place.device.type == "cuda":
        mine["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    everybody = gather(mine)
    differing = [name for name in mine if len({theirs[name] for theirs in everybody}) > 1]
    for name in differing:
        kinds = by_line([[theirs[name]] for theirs in everybody])
        yield FAIL, f"{name} differs: " + "; ".join(f"{version} ({ranks})" for version, ranks in kinds.items())
    told = list(
        dict.fromkeys(f for theirs in everybody for f in bad_pairs(theirs, torch_wants("triton"), place.config))
    )
    yield from told
    if not differing and not told:
        yield OK, ", ".join(f"{name} {version}" for name, version in mine.items() if version != "-")


def installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def torch_wants(name: str) -> str:
    """The version of a package that this build of torch was made for; "" where it names none."""
    for line in importlib.metadata.requires("torch") or []:
        if found := re.match(rf"{name}\s*\(?==\s*([\w.]+)", line):
            return found[1]
    return ""


def bad_pairs(have: Mapping[str, str], triton: str, config: Config) -> list[Finding]:
    """What is known to go wrong with the versions `have`, each with who says so. `triton`: the one that torch asks for."""
    found: list[Finding] = []
    if older(have["torch"], "2.13"):
        found.append(
            (FAIL, f"torch {have['torch']}: must be 2.13 or newer, for its FSDP2 and process groups (pyproject.toml)")
        )
    if triton and have["triton"].partition("+")[0] != triton:
        found.append((WARN, f"triton {have['triton']}: this torch was made for {triton}, as its package says"))
    if config.parallel.engine == "deepspeed" and older(have["deepspeed"], "0.19.8"):
        found.append(
            (FAIL, f"deepspeed {have['deepspeed']}: parallel.engine=deepspeed needs 0.19.8 or newer (pyproject.toml)")
        )
    nccl = have["nccl"]
    if nccl != "-" and older(nccl, "2.26.2"):
        found.append(
            (
                WARN,
                f"nccl {nccl}: hangs when a communicator is aborted, fixed in 2.26.2 (github.com/pytorch/pytorch/pull/149546)",
            )
        )
    if nccl == "2.29.2":
        found.append((WARN, f"nccl {nccl}: hangs, fixed in 2.29.3 (github.com/pytorch/pytorch/pull/174338)"))
    if nccl != "-" and have["machine"] == "aarch64" and older(nccl, "2.29.3"):
        found.append(
            (
                WARN,
                f"nccl {nccl} on aarch64: hangs without a word, fixed in 2.29.3 (github.com/marin-community/marin/pull/8038)",
            )
        )
    return found


def older(version: str, least: str) -> bool:
    def parts(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3]]

    return parts(version) < parts(least)


def settings(place: Place) -> Iterator[Finding]:
    """Environment variables that cost time, or stand in the way of nodes that come and go."""
    found = []
    for name, slow in SETTINGS.items():
        if os.environ.get(name, "").upper() == slow:
            found.append(f"{name}={slow} slows every step")
    if len(set(place.hosts)) > 1 and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        found.append(
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE is not 1: a node that joins later waits in vain (docs/survival.md)"
        )
    ranks = by_line(gather(found))
    yield from ((WARN, f"{line} ({told})") for line, told in ranks.items())
    if not ranks:
        yield OK, "nothing in the environment that is known to cost time"


def devices(place: Place) -> Iterator[Finding]:
    kinds = by_line(gather([place.kind]))
    found = []
    if place.device.type == "cpu" and (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()):
        found.append(
            (
                FAIL,
                f"a GPU is here that torch {torch.__version__} can't use: a build for CPUs, or the driver is missing or too old",
            )
        )
    if place.device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(place.device)
        if free < 0.9 * whole:
            found.append((WARN, f"others hold {(whole - free) / 2**30:.1f} of {whole / 2**30:.1f} GiB of the GPU"))
    threads, cores = place.local * torch.get_num_threads(), len(os.sched_getaffinity(0))
    if place.device.type == "cpu" and threads > cores:
        found.append((WARN, f"{threads} threads of {place.local} ranks on {cores} cores: set OMP_NUM_THREADS"))
    if len(kinds) > 1:
        found.append((WARN, "not all alike: " + "; ".join(f"{kind} ({ranks})" for kind, ranks in kinds.items())))
    ranks = by_line(gather(found))
    yield from ((level, f"{line} ({told})") for (level, line), told in ranks.items())
    if not ranks:
        yield OK, f"{dist.get_world_size()} x {place.kind}"


def memory(place: Place) -> Iterator[Finding]:
    """What a rank needs, by the formulas of launch/plan.py, against what is free; and the copy in host memory of a save."""
    config, world = place.config, dist.get_world_size()
    batches = micro_batches(config.train.global_batch, config.train, 0, world)
    compute = "fp32" if compute_dtype(config, place.device) is torch.float32 else "bf16"
    host = available() / place.local
    free = torch.cuda.mem_get_info(place.device)[0] if place.device.type == "cuda" else host
    states = 12 * parameter_counts(config.model).total / world
    try:
        layout = layout_of(
            config.model,
            config.parallel,
            world,
            place.local,
            batches[0][1],
            len(batches),
            config.train.seq_len,
            compute,
        )
        need, what = float(memory_of(config.model, layout).total), "weights, gradients, moments and activations take"
    except ValueError as error:
        need, what = states / 3 * 4, f"weights, gradients and moments alone take ({error})"
    copy = states if config.train.async_checkpoint else 0.0
    if place.device.type == "cpu":
        need, what = need + copy, f"{what.removesuffix(' take')} and the copy of a save take"
    least = min(gather((free, dist.get_rank())))
    told = f"{what} {need / 2**30:.2f} GiB of a rank's, by formula; rank {least[1]} has {least[0] / 2**30:.2f} GiB free"
    yield (FAIL if need > least[0] else WARN if need > 0.9 * least[0] else OK), told
    least = min(gather((host, dist.get_rank())))
    if place.device.type == "cuda":
        told = f"the copy of a save takes {copy / 2**30:.2f} GiB of host memory; rank {least[1]} has {least[0] / 2**30:.2f} GiB"
        lacks = copy > least[0]
        yield (FAIL if lacks else OK), told + "; train.async_checkpoint=false needs none" * lacks


def available() -> int:
    """Bytes of this host's memory that programs can still get."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    assert found
    return int(found[1]) * 1024


def disk(place: Place) -> Iterator[Finding]:
    """Where checkpoints will be: that all ranks see the same place, its space, and the speed at which all write at once."""
    train, rank, world = place.config.train, dist.get_rank(), dist.get_world_size()
    root = train.checkpoint_dir or f"{place.config.run_dir}/checkpoints"
    size = 12 * parameter_counts(place.config.model).total
    local = "://" not in root
    missing = first_missing(Path(root)) if local and rank == 0 else None
    name = gather(os.urandom(4).hex())[0]
    folder = storage.join(root, f"preflight_{name}")
    piece = Random(name).randbytes(MIB)
    times = max(1, min(size // world // MIB, 256 if place.device.type == "cuda" else 32))
    problems = [p for p in gather(attempt(lambda: storage.make_folder(folder) if rank == 0 else None)) if p]
    if problems:
        yield FAIL, f"{root}: cannot be made or written ({problems[0]})"
        return
    began = time.perf_counter()
    said = gather(attempt(lambda: write(storage.join(folder, f"rank{rank}"), piece, times)))
    seconds = max(gather(time.perf_counter() - began))
    problems = [f"rank {r}: {p}" for r, p in enumerate(said) if p]
    others = storage.join(folder, f"rank{(rank + 1) % world}")
    said = gather(attempt(lambda: check(others, piece, times)))
    problems = problems or [f"rank {r} does not read what another wrote ({p}); all must see the same place"
                            for r, p in enumerate(said) if p]  # fmt: skip
    # A rank that sees another place has none of these folders, or its own. All look before one deletes.
    space = min(gather(shutil.disk_usage(root).free if local and os.path.isdir(root) else sys.maxsize))
    if rank == 0:
        storage.remove_folder(folder, "rank0")
    dist.barrier()
    if local:
        attempt(lambda: storage.remove_folder(folder, f"rank{rank}"))  # nothing is there, unless it is another place
    if missing:
        remove_empty(Path(root), missing)
    if problems:
        yield FAIL, f"{root}: {problems[0]}"
    else:
        rate = world * times * MIB / seconds
        told = (
            f"a checkpoint of {size / 1e9:.3g} GB in about {size / rate:.1f} s, at {rate / 1e9:.2f} GB/s of all ranks"
        )
        yield OK, f"{root}: {told}"
    if local:
        kept = size * (train.keep_checkpoints + 1)  # an old one is deleted when the new one is complete
        told = (
            f"{space / 1e9:.4g} GB free; train.keep_checkpoints={train.keep_checkpoints} takes up to {kept / 1e9:.3g}"
        )
        yield (FAIL if kept > space else OK), f"{root}: {told}"


def first_missing(path: Path) -> Path | None:
    """The highest folder of a path that does not exist yet."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    return missing[-1] if missing else None


def remove_empty(path: Path, top: Path) -> None:
    """Delete folders from `path` up to `top`, as far as nothing is in them."""
    for folder in (path, *path.parents):
        if attempt(folder.rmdir) or folder == top:
            return


def write(path: str, piece: bytes, times: int) -> None:
    with storage.writer(path) as file:
        for _ in range(times):
            file.write(piece)


def check(path: str, piece: bytes, times: int) -> None:
    if storage.size(path) != times * len(piece):
        raise OSError(f"{storage.size(path)} bytes of {times * len(piece)}")
    with storage.reader(path) as file:
        if file.read(len(piece)) != piece:
            raise OSError("other bytes")


def attempt(work: Callable[[], Any]) -> str:
    try:
        work()
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ""


def clocks(place: Place) -> Iterator[Finding]:
    offsets = probe.clock_offsets()
    rank, (ahead, doubt) = max(enumerate(offsets), key=lambda item: abs(item[1][0]))
    told = f"rank {rank} ({place.hosts[rank]}) is {ahead * 1e3:+.2f} ms from rank 0, to {max(doubt, 1e-5) * 1e3:.2f} ms"
    late = abs(ahead) - doubt > 1
    yield (WARN if late else OK), told + "; times in logs, and in files that nodes share, will not agree" * late


def exchange(place: Place) -> Iterator[Finding]:
    wrong = probe.wrong_rows(place.device)
    yield from ((FAIL, line) for line in wrong[:8])
    if not wrong:
        yield OK, f"an uneven all-to-all of {dist.get_world_size()} ranks brings every row as it was sent"


def products(place: Place) -> Iterator[Finding]:
    cuda = place.device.type == "cuda"
    n, repeats = (4096, 50) if cuda else (512, 4)
    dtype = compute_dtype(place.config, place.device)
    wrong = probe.wrong_products(place.device, dtype, place.kind, n, repeats)
    yield from ((FAIL, line) for line in wrong[:8])
    if not wrong:
        yield (
            OK,
            f"{repeats} products of {n} x {n} matrices in {str(dtype).removeprefix('torch.')}, right to the bit on every rank",
        )


def links(place: Place) -> Iterator[Finding]:
    if dist.get_world_size() == 1:
        yield OK, "one rank, no links"
        return
    speeds = probe.link_speeds(place.device, 64 * MIB if place.device.type == "cuda" else 4 * MIB)
    hops: dict[str, list[probe.Speed]] = {}
    for speed in speeds:
        hops.setdefault(hop(place, *speed.ranks), []).append(speed)
    for name, found in sorted(hops.items()):
        slowest, latest = min(found, key=lambda s: s.bytes_s), max(found, key=lambda s: s.latency)
        middle, latency = median(s.bytes_s for s in found), median(s.latency for s in found)
        told = f"{name}: {len(found)} link{'s' * (len(found) > 1)}, {middle / 1e9:.3g} GB/s, {latency * 1e6:.3g} us"
        if len(found) > 1:
            told += f"; least {slowest.bytes_s / 1e9:.3g} GB/s {between(place, slowest)}"
            told += f", most {latest.latency * 1e6:.3g} us {between(place, latest)}"
        want = place.hardware.hops[name] if place.hardware else None
        slow = want is not None and (middle < want.bytes_s / 2 or latency > 5 * want.latency)
        if want and place.hardware:
            told += f"; {place.hardware.name} has {want.bytes_s / 1e9:.3g} GB/s, {want.us:.3g} us"
        yield (WARN if slow else OK), told + "; slow for it" * slow
        for s in [s for s in found if s.bytes_s < 0.6 * middle or s.latency > 5 * latency][:8]:
            told = f"{s.bytes_s / 1e9:.3g} GB/s, {s.latency * 1e6:.3g} us"
            yield WARN, f"{name}: {told} {between(place, s)}: slower than its like"


def between(place: Place, speed: probe.Speed) -> str:
    a, b = speed.ranks
    return f"between ranks {a} and {b} ({place.hosts[a]}, {place.hosts[b]})"


def hop(place: Place, a: int, b: int) -> str:
    near = place.hosts[a] == place.hosts[b]
    return "intra" if near or (place.hardware and a // place.hardware.domain == b // place.hardware.domain) else "inter"


def by_line(said: list[list[Any]]) -> dict[Any, str]:
    """What was said, each once, and by which ranks."""
    ranks: dict[Any, list[str]] = {}
    for rank, lines in enumerate(said):
        for line in lines:
            ranks.setdefault(line, []).append(str(rank))
    return {line: f"rank {', '.join(who[:8])}{', …' * (len(who) > 8)}" for line, who in ranks.items()}


def program() -> None:
    own = [argument for argument in sys.argv[1:] if argument.startswith("hardware=")]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in own]
    hardware = own[-1].partition("=")[2] if own else "auto"

    def preflight(config: Config) -> None:
        main(config, hardware)

    cli.run(preflight)


if __name__ == "__main__":
    leave_after(program)
