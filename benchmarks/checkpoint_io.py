"""Checkpoints against plain files: bytes, bandwidth, what a save in the background costs a step, memory that a load takes.

One process; the state is that of an MoE of 17M parameters with AdamW, 0.2 GB. The peer of a save is a write of as many bytes from
memory to one file on the same disk, made safe by fsync as a save is; that of a load is a read of the same files into memory. Both
reads come from the system's cache. Everything that is loaded is verified first.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from compare import alternate, report, warn_if_busy

from moesaic.launch.optim import make_optimizer
from moesaic.launch.schema import OptimConfig
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.parallel import checkpoint
from moesaic.parallel.apply import parallelize, start_engine
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.engine import Engine
from moesaic.parallel.mesh import make_meshes

CONFIG = ModelConfig(
    vocab_size=4096, d_model=256, n_layers=4, n_heads=4, n_experts=32, d_expert=128, router=RouterConfig(top_k=4)
)
TOKENS = (4, 513)
ROUNDS = 7


def make_engine() -> Engine:
    parallel, device = ParallelConfig(), torch.device("cpu")
    model = parallelize(CONFIG, parallel, make_meshes("cpu", 1), seed=0, device=device, compute=torch.float32)
    return start_engine(parallel, model, make_optimizer(model, OptimConfig()))


def step(engine: Engine) -> None:
    tokens = torch.randint(0, CONFIG.vocab_size, TOKENS, generator=torch.Generator().manual_seed(0))
    out = engine.model(tokens[:, :-1], tokens[:, 1:])
    assert out.loss is not None
    engine.backward(out.loss / tokens[:, 1:].numel(), last=True)
    engine.step(1.0)


def memory(what: str) -> int:
    """VmRSS, or VmHWM since `forget_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(folder: Path) -> None:
    engine = make_engine()
    step(engine)
    tensors = [*engine.weights().values(), *engine.moments().values()]
    state = sum(t.numel() * t.element_size() for t in tensors)
    behind = checkpoint.Saver(folder / "behind", keep=1)
    before = checkpoint.Saver(folder / "before", keep=1, background=False)
    behind.save(1, engine, {})
    behind.finish()
    before.save(1, engine, {})
    path = folder / "before" / "step_00000001"
    files = sorted(path.iterdir())
    written = sum(file.stat().st_size for file in files)
    report("checkpoint_io", "bytes written, of those of weights and moments", written, state, "state", "bytes", False)

    data = b"".join(file.read_bytes() for file in files)

    def write() -> None:
        with (folder / "plain").open("wb", 0) as file:
            file.write(data)
            os.fsync(file.fileno())

    def save() -> None:
        before.save(1, engine, {})

    sides = alternate({"ours": save, "peer": write}, ROUNDS)
    rates = {name: written / seconds / 1e6 for name, seconds in sides.items()}
    report("checkpoint_io", "save", rates["ours"], rates["peer"], "write + fsync", "MB/s", True)

    buffer = bytearray(written)

    def read() -> None:
        view = memoryview(buffer)
        for file in files:
            with file.open("rb", 0) as opened:
                view = view[opened.readinto(view) or 0 :]

    sides = alternate({"ours": lambda: checkpoint.load(path, engine), "peer": read}, ROUNDS)
    rates = {name: written / seconds / 1e6 for name, seconds in sides.items()}
    report("checkpoint_io", "load", rates["ours"], rates["peer"], "read", "MB/s", True)

    resident = memory("VmRSS")
    forget_peak()
    checkpoint.load(path, engine)
    extra = max(memory("VmHWM") - resident, 1)
    report("checkpoint_io", "memory a load takes beside the state", extra, state, "a second copy", "bytes", False)

    # Two steps, a save between them or none; then what is still on its way is waited for, untimed.
    calls: list[float] = []

    def two_steps(saver: checkpoint.Saver | None) -> float:
        start = time.perf_counter()
        step(engine)
        if saver:
            begin = time.perf_counter()
            saver.save(1, engine, {})
            if saver is behind:
                calls.append(time.perf_counter() - begin)
        step(engine)
        seconds = time.perf_counter() - start
        if saver:
            saver.finish()
        return seconds

    totals: dict[str, list[float]] = {"none": [], "behind": [], "before": []}
    for i in range(ROUNDS):
        for name in list(totals)[:: 1 if i % 2 == 0 else -1]:
            totals[name].append(two_steps({"none": None, "behind": behind, "before": before}[name]))
    median = {name: sorted(times)[len(times) // 2] for name, times in totals.items()}
    one = median["none"] / 2
    for case, name in (("in the background", "behind"), ("before going on", "before")):
        added = max(median[name] - median["none"], 1e-3) / one
        report("checkpoint_io", f"what a save {case} adds, of a step", added, 1.0,
               f"a step of {one:.2f} s", "steps", False)  # fmt: skip
    report("checkpoint_io", "the copy of a save in the background, of a step", sorted(calls)[len(calls) // 2] / one, 1.0,
           f"a step of {one:.2f} s", "steps", False)  # fmt: skip


if __name__ == "__main__":
    warn_if_busy()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    place = Path(tempfile.mkdtemp(prefix="checkpoint_io-", dir="."))
    try:
        main(place)
    finally:
        shutil.rmtree(place)
        dist.destroy_process_group()
