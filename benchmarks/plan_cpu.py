"""The planner's time of a step against the measured one, of the demonstration's model on two ranks of one thread each.

    python benchmarks/plan_cpu.py

What the planner must know of the machine is measured first, in the two ranks at once, and by itself: the rate of matrix
products, the bandwidth of memory, latency and bandwidth of an exchange. Nothing is fitted to a step. Then each layout trains
a few steps; the least time counts, for other programs only add to it. A line for each layout, the predicted time as the peer,
and one for the rank correlation of all.
"""

import dataclasses
import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import compare
import torch
import torch.distributed as dist

from moesaic.launch import cli
from moesaic.launch.optim import make_optimizer
from moesaic.parallel import hardware, shared
from moesaic.parallel.apply import parallelize, start_engine
from moesaic.parallel.layout import layout_of
from moesaic.parallel.mesh import make_meshes
from moesaic.parallel.time_plan import MEMORY, PRODUCT, time_of

RANKS, STEPS, SEQ = 2, 6, 256
SHAPE = ["recipe=tiny_moe", f"train.seq_len={SEQ}"]
# Sequences of a rank's step, of its micro-batch, overrides.
LAYOUTS: dict[str, tuple[int, int, list[str]]] = {
    "sharded": (4, 4, ["parallel.expert=1", "parallel.expert_path=local"]),
    "experts divided": (4, 4, ["parallel.expert=2"]),
    "copies": (4, 4, ["parallel.expert=1", "parallel.expert_path=local", "parallel.replicate=2"]),
    "four micro-batches": (4, 1, ["parallel.expert=2"]),
    "recomputed": (4, 4, ["parallel.expert=2", "parallel.remat=full"]),
    "half the batch": (2, 2, ["parallel.expert=2"]),
}


def least(function: Callable[[], Any], rounds: int = 7) -> float:
    function()
    times = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_machine() -> hardware.Hardware:
    a, b = torch.randn(1024, 192), torch.randn(192, 576)  # the size of the model's products
    out = torch.empty(1024, 576)
    rate = 2 * 1024 * 192 * 576 * 20 / least(lambda: [torch.mm(a, b, out=out) for _ in range(20)])
    x, y = torch.randn(1 << 21), torch.empty(1 << 21)  # 8 MiB each, as an activation is: part of it stays in cache
    bandwidth = 2 * x.nbytes / least(lambda: torch.mul(x, 2.0, out=y))
    small = torch.ones(4)
    issue = least(lambda: [small + small for _ in range(200)]) / 200
    few, many = torch.ones(2), torch.ones(1 << 20)
    latency = least(lambda: shared.all_to_all_single(torch.empty_like(few), few), 20)
    exchange = least(lambda: shared.all_to_all_single(torch.empty_like(many), many))
    speed = many.nbytes / 2 / max(exchange - latency, 1e-6)
    link = hardware.Link(speed / 1e9, latency * 1e6)
    return dataclasses.replace(
        hardware.load("cpu"), name="here", tflops={"fp32": rate / PRODUCT["fp32"] / 1e12}, memory_gb_s=bandwidth / MEMORY / 1e9,
        hops={"intra": link, "inter": link}, launch_us=issue * 1e6 * 3,  # of autograd's share, and of several arguments
    )  # fmt: skip


def measure_step(sequences: int, micro: int, overrides: list[str]) -> float:
    config = cli.compose([*SHAPE, *overrides])
    local = config.parallel.expert_path == "local"
    meshes = make_meshes("cpu", 1 if local else int(config.parallel.expert), config.parallel.replicate)
    model = parallelize(
        config.model, config.parallel, meshes, seed=0, device=torch.device("cpu"), compute=torch.float32
    )
    engine = start_engine(config.parallel, model, make_optimizer(model, config.optim))
    tokens = torch.randint(0, 256, (sequences, SEQ + 1), generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> None:
        for i in range(0, sequences, micro):
            part = tokens[i : i + micro]
            out = engine.model(part[:, :-1], part[:, 1:])
            engine.backward(out.loss / (RANKS * sequences * SEQ) + out.aux, last=i + micro >= sequences)
        engine.step(1.0)

    return least(step, STEPS)


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
    link = machine.hops["intra"]
    print(f"# products {machine.rate('fp32') / 1e9:.1f} GFLOP/s, memory {machine.memory_gb_s:.1f} GB/s, ", end="")
    print(f"exchange {link.gb_s:.2f} GB/s and {link.us:.0f} us, an operation {machine.launch_us:.1f} us")
    planned = {}
    for name, (sequences, micro, overrides) in LAYOUTS.items():
        config = cli.compose([*SHAPE, *overrides])
        layout = layout_of(config.model, config.parallel, RANKS, RANKS, micro, sequences // micro, SEQ, "fp32")
        planned[name] = time_of(config.model, layout, machine, "fp32").step
        compare.report(
            "plan_cpu", f"{name}, seconds of a step, simulated", measured[name], planned[name], "planned", "s", False
        )

    def ranked(times: dict[str, float]) -> list[float]:
        return [float(sum(other < t for other in times.values())) for t in times.values()]

    rho = statistics.correlation(ranked(measured), ranked(planned))
    worst = max(abs(planned[name] / measured[name] - 1) for name in planned)
    compare.report("plan_cpu", f"rank correlation of {len(planned)} layouts", rho, 1.0, "aim", "Spearman", True,
                   worst_error=round(worst, 3))  # fmt: skip


if __name__ == "__main__":
    main()
