"""What profile=collectives adds to the steps that it doesn't trace, of the demonstration's model on two ranks of one thread each.

    python benchmarks/profile_overhead.py

Steps with and without it take turns in one run, every other pair in the opposite order, so that other programs of the machine hit
both; some steps were traced before, and one is still to come. A time is that of the slowest rank; the ratio is the median over
pairs, with their quartiles. Then what is left of tracing in the process: hooks on modules, a recorder, methods in the place of
the class's own; it must be nothing, or the benchmark ends. `without the profile` is the same process before there was one.
"""

import multiprocessing as mp
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import compare
import torch
import torch.distributed as dist

from moesaic.launch import cli
from moesaic.launch.collectives_report import Profile
from moesaic.launch.optim import make_optimizer
from moesaic.parallel import trace
from moesaic.parallel.apply import parallelize, start_engine
from moesaic.parallel.engine import Engine
from moesaic.parallel.mesh import make_meshes

RANKS, PAIRS, SEQUENCES, SEQ, TRACED = 2, 60, 4, 256, 3
LIMIT = 1.05
WAIT = dist.Work.wait


def left_behind(engine: Engine) -> int:
    """Hooks of modules, and functions that are not what they were before any tracing."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.model.modules())
    replaced = sum(name in vars(engine) for name in ("backward", "step"))
    return hooks + replaced + (trace._state.recorder is not None) + (dist.Work.wait is not WAIT)


def measure(folder: str) -> tuple[list[float], list[float], list[float]]:
    """Seconds of steps without the profile and with it, by pair, and of those that it traces."""
    knobs = [
        "recipe=tiny_moe",
        f"train.seq_len={SEQ}",
        "profile=collectives",
        f"run_dir={folder}",
        "wandb.mode=disabled",
    ]
    config = cli.compose([*knobs, f"profile_steps=[{','.join(map(str, range(1, TRACED + 1)))},{10**6}]",
                          f"train.steps={10**6}", "parallel.expert=2"])  # fmt: skip
    cpu = torch.device("cpu")
    model = parallelize(config.model, config.parallel, make_meshes("cpu", 2), seed=0, device=cpu, compute=torch.float32)
    engine = start_engine(config.parallel, model, make_optimizer(model, config.optim))
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(0, 256, (SEQUENCES, SEQ + 1), generator=generator)
    trace.observe()

    def step(profile: Profile | None, number: int = 10) -> float:
        dist.barrier()
        began = time.perf_counter()
        if profile:
            profile.begin(number)
        out = engine.model(tokens[:, :-1], tokens[:, 1:])
        engine.backward(out.loss / (RANKS * SEQUENCES * SEQ) + out.aux, last=True)
        engine.step(1.0)
        if profile:
            profile.end(out.counts)
        seconds = torch.tensor(time.perf_counter() - began)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds.item()

    for _ in range(3):
        step(None)
    before = left_behind(engine)
    profile = Profile(config, engine, cpu, 2, 0, None, print)
    traced = [step(profile, n) for n in range(1, TRACED + 1)]
    pairs = [{side: step(side) for side in (None, profile)[:: 1 if i % 2 else -1]} for i in range(PAIRS)]
    if left_behind(engine) != before:
        raise SystemExit(f"profile_overhead: {left_behind(engine) - before} hooks or functions are left of tracing")
    return [pair[None] for pair in pairs], [pair[profile] for pair in pairs], traced


def rank_main(rank: int, folder: str, results: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    found = measure(f"{folder}/run")
    if rank == 0:
        results.send(found)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    compare.warn_if_busy()
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "run").mkdir()
        receive, send = context.Pipe(duplex=False)
        ranks = [context.Process(target=rank_main, args=(rank, folder, send)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        send.close()
        off, on, traced = receive.recv()
        for process in ranks:
            process.join()
    ratios = [b / a for a, b in zip(off, on, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    compare.report("profile_overhead", f"a step that is not traced, over one without the profile, {PAIRS} pairs", middle, LIMIT,
                   "limit", "ratio", False, quartiles=[round(low, 3), round(high, 3)],
                   ms=compare.rounded(1e3 * statistics.median(off)))  # fmt: skip
    compare.report("profile_overhead", f"a traced step, over one without the profile, {TRACED} of them",
                   statistics.median(traced) / statistics.median(off), 1.0, "no profile", "ratio", False)  # fmt: skip


if __name__ == "__main__":
    main()
