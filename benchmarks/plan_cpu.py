"""The planner's time of a step against the measured one, of the demonstration's model on two ranks of one thread each.

    python benchmarks/plan_cpu.py

What the planner must know of the machine is measured first, in the two ranks at once, and by itself: the products of a block,
the bandwidth of memory, latency and bandwidth of an exchange, and with 16 tokens a sequence, so that little else is computed,
what an operation takes and what FSDP2 adds for its gathering, and for sums over copies. Nothing is fitted to a step that is
predicted. Then each layout trains a few steps; the least time counts, for other programs only add to it. A line for each layout,
the predicted time as the peer, and one for the rank correlation of all. On a busy machine `--cpu-time` tells processors' seconds.
"""

import dataclasses
import multiprocessing as mp
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import compare
import torch
import torch.distributed as dist

from moesaic.kernels import products
from moesaic.launch import cli
from moesaic.launch.optim import make_optimizer
from moesaic.moe.attention import attend
from moesaic.moe.model import Transformer, initialize
from moesaic.moe.work import block_products
from moesaic.parallel import hardware, shared
from moesaic.parallel.apply import parallelize, start_engine
from moesaic.parallel.fsdp import FSDPEngine
from moesaic.parallel.layout import collectives, layout_of
from moesaic.parallel.mesh import make_meshes
from moesaic.parallel.time_plan import MEMORY, launches, product_seconds, time_of

RANKS, STEPS, SEQ = 2, 10, 256
SHAPE = ["recipe=tiny_moe", f"train.seq_len={SEQ}"]
# The same layers with few tokens, so narrow that a step takes as long as to issue its operations; and as wide as they are.
FEW, LOCAL = 4, ["train.seq_len=16", "parallel.expert=1", "parallel.expert_path=local"]
NARROW, WIDE = [*LOCAL, "model.d_model=24", "model.d_expert=8"], LOCAL
# Sequences of a rank's step, of its micro-batch, overrides.
LAYOUTS: dict[str, tuple[int, int, list[str]]] = {
    "sharded": (4, 4, ["parallel.expert=1", "parallel.expert_path=local"]),
    "experts divided": (4, 4, ["parallel.expert=2"]),
    "copies": (4, 4, ["parallel.expert=1", "parallel.expert_path=local", "parallel.replicate=2"]),
    "four micro-batches": (4, 1, ["parallel.expert=2"]),
    "recomputed": (4, 4, ["parallel.expert=2", "parallel.remat=full"]),
    "half the batch": (2, 2, ["parallel.expert=2"]),
}


# Of a busy machine: what a rank's processor worked, instead of what passed. Waiting for the other rank doesn't count then.
clock = time.process_time if "--cpu-time" in sys.argv else time.perf_counter


def least(function: Callable[[], Any], rounds: int = 7) -> float:
    function()
    times = []
    for _ in range(rounds):
        dist.barrier()
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


def measure_machine() -> hardware.Hardware:
    x = torch.randn(1 << 21)  # 8 MiB, as an activation is: part of it stays in cache
    bandwidth = 2 * x.nbytes / least(lambda: x * 2.0)
    few, many = torch.ones(2), torch.ones(1 << 20)
    latency = least(lambda: shared.all_to_all_single(torch.empty_like(few), few), 20)
    exchange = least(lambda: shared.all_to_all_single(torch.empty_like(many), many))
    link = hardware.Link(many.nbytes / 2 / max(exchange - latency, 1e-6) / 1e9, latency * 1e6)
    alone = [measure_step(FEW, FEW, shape, copies=0) for shape in (NARROW, WIDE)]
    config = cli.compose([*SHAPE, *NARROW])
    layout = layout_of(config.model, config.parallel, RANKS, RANKS, FEW, 1, 16, "fp32")
    issued = config.model.n_layers * sum(
        launches(config.model, layout, phase, cpu=True) for phase in ("forward", "backward")
    )
    gathers, sums = (fsdp_link(copies, alone) for copies in (1, RANKS))
    return dataclasses.replace(
        hardware.load("cpu"), name="here", tflops={"fp32": product_rate()}, memory_gb_s=bandwidth / MEMORY / 1e9,
        hops={"intra": link, "inter": link}, gathers=gathers, sums=sums, launch_us=1e6 * alone[0] / issued,
    )  # fmt: skip


def product_rate() -> float:
    """10^12 operations a second at which the products of a block, forward and backward, would take as long as they do."""
    model, tokens, seconds, work = cli.compose(SHAPE).model, 4 * SEQ, 0.0, 0.0
    unit = dataclasses.replace(hardware.load("cpu"), tflops={"fp32": 1.0}, memory_gb_s=1e9)
    for p in block_products(model, tokens, SEQ, False, tokens * model.router.top_k, model.n_experts):
        if p.kind == "attention":
            q, k, v = (torch.randn(4, SEQ, model.n_heads, model.head_width, requires_grad=True) for _ in range(3))
            seconds += least(lambda: attend(q, k, v, None, 1.0).sum().backward())  # noqa: B023
            work += 3.5 * product_seconds(p, unit, "fp32", 4)
            continue
        x, w, dy = torch.randn(p.m // p.groups, p.k), torch.randn(p.n, p.k), torch.randn(p.m // p.groups, p.n)
        three = (lambda: products.mm(x, w.T), lambda: products.mm(dy, w), lambda: products.mtm(dy, x))  # noqa: B023
        seconds += p.groups * sum(least(one, 20) for one in three)
        work += 3 * product_seconds(p, unit, "fp32", 4)
    return work / seconds


def fsdp_link(copies: int, alone: list[float]) -> hardware.Link:
    """What FSDP2 adds to a micro-batch without it, by call and by byte: of narrow layers and of wide ones with few tokens."""
    added, calls, sizes = [], 0, []
    for shape, without in zip((NARROW, WIDE), alone, strict=True):
        config = cli.compose([*SHAPE, *shape, f"parallel.replicate={copies}"])
        layout = layout_of(config.model, config.parallel, RANKS, RANKS, FEW, 1, 16, "fp32")
        found = list(collectives(config.model, layout))
        added.append(max(1e-6, measure_step(FEW, FEW, shape, copies) - without))
        calls = sum(2 if c.operation == "all_reduce" else 1 for c in found)
        sizes.append(sum(c.sent for c in found))
    per_byte = max(1e-12, (added[1] - added[0]) / (sizes[1] - sizes[0]))
    return hardware.Link(1e-9 / per_byte, 1e6 * max(0.0, added[0] - sizes[0] * per_byte) / calls)


def measure_step(sequences: int, micro: int, overrides: list[str], copies: int | None = None) -> float:
    """Of a step; with `copies`, 0 without FSDP2, of its micro-batches alone, without the optimizer."""
    config = cli.compose([*SHAPE, *overrides, *([f"parallel.replicate={copies}"] if copies else [])])
    local, length = config.parallel.expert_path == "local", config.train.seq_len
    if copies == 0:
        model = Transformer(config.model)
        initialize(model, "", config.model, 0, torch.device("cpu"))
        engine: Any = FSDPEngine(model, make_optimizer(model, config.optim))
    else:
        meshes = make_meshes("cpu", 1 if local else int(config.parallel.expert), config.parallel.replicate)
        model = parallelize(
            config.model, config.parallel, meshes, seed=0, device=torch.device("cpu"), compute=torch.float32
        )
        engine = start_engine(config.parallel, model, make_optimizer(model, config.optim))
    tokens = torch.randint(0, 256, (sequences, length + 1), generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> None:
        for i in range(0, sequences, micro):
            part = tokens[i : i + micro]
            out = engine.model(part[:, :-1], part[:, 1:])
            engine.backward(out.loss / (RANKS * sequences * length) + out.aux, last=i + micro >= sequences)
        if copies is None:
            engine.step(1.0)
        else:
            engine.optimizer.zero_grad(set_to_none=True)

    return least(step, STEPS if copies is None else 3 * STEPS)


def rank_main(rank: int, meeting: str, results: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    machine = measure_machine()
    measured = {name: measure_step(*layout) for name, layout in LAYOUTS.items()}
    if rank == 0:
        results.send((machine, measured))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    compare.warn_if_busy()
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receive, send = context.Pipe(duplex=False)
        meeting = str(Path(folder) / "meet")
        ranks = [context.Process(target=rank_main, args=(rank, meeting, send)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        machine, measured = receive.recv()
        for process in ranks:
            process.join()
    link, gathers, sums = machine.hops["intra"], machine.gathers, machine.sums
    assert gathers and sums
    print(f"# products {machine.rate('fp32') / 1e9:.1f} GFLOP/s, memory {machine.memory_gb_s:.1f} GB/s, ", end="")
    told = {"exchange": link, "FSDP2's gathering": gathers, "its sums over copies": sums}
    print(", ".join(f"{name} {one.gb_s:.2f} GB/s and {one.us:.0f} us" for name, one in told.items()), end=", ")
    print(f"an operation {machine.launch_us:.1f} us")
    planned = {}
    for name, (sequences, micro, overrides) in LAYOUTS.items():
        config = cli.compose([*SHAPE, *overrides])
        layout = layout_of(config.model, config.parallel, RANKS, RANKS, micro, sequences // micro, SEQ, "fp32")
        planned[name] = time_of(config.model, layout, machine, "fp32").step
        kind = "seconds" if clock is time.perf_counter else "processor's seconds"
        compare.report(
            "plan_cpu", f"{name}, {kind} of a step, simulated", measured[name], planned[name], "planned", "s", False
        )

    def ranked(times: dict[str, float]) -> list[float]:
        return [float(sum(other < t for other in times.values())) for t in times.values()]

    rho = statistics.correlation(ranked(measured), ranked(planned))
    worst = max(abs(planned[name] / measured[name] - 1) for name in planned)
    compare.report("plan_cpu", f"rank correlation of {len(planned)} layouts", rho, 1.0, "aim", "Spearman", True,
                   worst_error=round(worst, 3))  # fmt: skip


if __name__ == "__main__":
    main()
