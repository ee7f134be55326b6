"""A training step on two ranks of one thread each against the same step in one process with two threads.

    python benchmarks/expert_parallel.py

The same model, global batch and optimizer on the same two cores, so that what two ranks lose is what spreading costs: copies and
exchanges of rows, gathering and adding up what FSDP2 shards, waiting for the other rank. Experts divided (parallel.expert=2), the
same with parallel.reshard=never, and all parameters sharded (parallel.expert=1).

Tokens are drawn by Zipf's law, or uniformly. The weights are fresh, so a frequent token takes its experts' rank with it and the
other one waits: Zipf's rows hold that too. Uniform ones stand for a router that balances. `alone` is the ceiling: two processes,
each with half of the batch, that tell each other nothing, so they do not train one model.

Shared memory within one machine: it says nothing of a network, or of GPUs. Losses of the first steps must be those of one
process, or nothing is timed.
"""

import functools
import multiprocessing as mp
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import compare
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.launch.optim import make_optimizer
from moesaic.launch.schema import OptimConfig
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.model import Transformer, build
from moesaic.parallel.apply import parallelize, start_engine
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.mesh import make_meshes

RANKS, STEPS, ROUNDS = 2, 4, 15
SEQUENCES, LENGTH = 4, 512
SHAPE = ModelConfig(
    vocab_size=4096, d_model=256, n_layers=4, n_heads=4, n_experts=32, d_expert=128, qk_norm="full",
    router=RouterConfig(top_k=4, balance_coef=0.0),  # which is a micro-batch's: two ranks have two of them
)  # fmt: skip
CASE = "D 256, L 4, H 4, E 32, K 4, F 128, V 4096, batch 4x512, fp32"
OPTIM = OptimConfig(lr=1e-3, clip=1.0)
CPU = torch.device("cpu")


# Sides: how the ranks share the model (None: not at all), the tokens, and what the row says.
SIDES: dict[str, tuple[ParallelConfig | None, str, str]] = {
    "expert 2": (ParallelConfig(expert="2"), "Zipf", "parallel.expert=2"),
    "expert 2, uniform": (ParallelConfig(expert="2"), "uniform", "parallel.expert=2"),
    "expert 2, never": (ParallelConfig(expert="2", reshard="never"), "uniform", "parallel.expert=2 parallel.reshard=never"),
    "expert 1": (ParallelConfig(expert="1"), "Zipf", "parallel.expert=1"),
    "alone": (None, "uniform", "without communication"),
}  # fmt: skip


def batch(tokens: str, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    frequency = 1 / torch.arange(1, SHAPE.vocab_size + 1) if tokens == "Zipf" else torch.ones(SHAPE.vocab_size)
    drawn = torch.multinomial(frequency, SEQUENCES * (LENGTH + 1), replacement=True, generator=generator)
    drawn = drawn.view(SEQUENCES, LENGTH + 1)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def loss_of(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    out = model(tokens, targets)
    assert out.loss is not None
    return out.loss / (SEQUENCES * LENGTH) + out.aux * (len(tokens) / SEQUENCES)


def plain(tokens: str, share: slice) -> Callable[[int], float]:
    """step -> its loss, of `share` of the batch in this process alone."""
    model = build(SHAPE, seed=0, device=CPU)
    optimizer = make_optimizer(model, OPTIM)

    def step(i: int) -> float:
        loss = loss_of(model, *(t[share] for t in batch(tokens, i)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def spread(parallel: ParallelConfig, tokens: str, share: slice) -> Callable[[int], float]:
    """step -> this rank's part of its loss."""
    meshes = make_meshes("cpu", int(parallel.expert))
    model = parallelize(SHAPE, parallel, meshes, seed=0, device=CPU, compute=torch.float32)
    engine = start_engine(parallel, model, make_optimizer(model, OPTIM))

    def step(i: int) -> float:
        loss = loss_of(engine.model, *(t[share] for t in batch(tokens, i)))
        engine.backward(loss, last=True)
        engine.step(OPTIM.clip)
        return loss.item()

    return step


def rank_main(rank: int, store: str, orders: Connection) -> None:
    """Does the step of the side that each order names, and answers with this rank's part of the loss; None ends it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    share = slice(rank * SEQUENCES // RANKS, (rank + 1) * SEQUENCES // RANKS)
    steps = {
        name: spread(parallel, tokens, share) if parallel else plain(tokens, share)
        for name, (parallel, tokens, _) in SIDES.items()
    }
    while (order := orders.recv()) is not None:
        side, i = order
        orders.send(steps[side](i))
    dist.barrier()
    dist.destroy_process_group()


class Ranks:
    """Processes that wait for orders, asleep in between."""

    def __init__(self, folder: Path) -> None:
        self.orders, theirs = zip(*(mp.Pipe() for _ in range(RANKS)), strict=True)
        spawn = mp.get_context("spawn")
        jobs = [(rank, str(folder / "store"), end) for rank, end in enumerate(theirs)]
        self.processes = [spawn.Process(target=rank_main, args=job, daemon=True) for job in jobs]
        for process in self.processes:
            process.start()
        for end in theirs:  # so that a rank's death is the end of its pipe
            end.close()

    def step(self, side: str, i: int) -> float:
        for order in self.orders:
            order.send((side, i))
        return sum(order.recv() for order in self.orders)

    def end(self) -> None:
        for order in self.orders:
            order.send(None)
        for process in self.processes:
            process.join()


def main() -> None:
    compare.warn_if_busy()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(Path(folder))
        steps = {tokens: plain(tokens, slice(None)) for tokens in ("Zipf", "uniform")}
        steps |= {side: functools.partial(ranks.step, side) for side in SIDES}
        for i in range(STEPS):
            losses = {name: step(i) for name, step in steps.items()}
            for name, (parallel, tokens, _) in SIDES.items():
                if parallel and not abs(losses[name] - losses[tokens]) <= 1e-4 * losses[tokens]:
                    raise SystemExit(f"step {i}: the loss of {name} is {losses[name]}, of one process {losses[tokens]}")

        def timed(step: Callable[[int], float]) -> Callable[[], float]:
            numbers = iter(range(STEPS, STEPS + ROUNDS))
            return lambda: step(next(numbers))

        seconds = compare.alternate({name: timed(step) for name, step in steps.items()}, ROUNDS)
        ranks.end()
    rates = {name: SEQUENCES * LENGTH / value for name, value in seconds.items()}
    for name, (_, tokens, what) in SIDES.items():
        compare.report(
            "expert_parallel", f"{CASE}; {tokens} tokens; {RANKS} ranks of one thread, {what}", rates[name],
            rates[tokens], "one process, two threads", "tokens/s", more_is_better=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
