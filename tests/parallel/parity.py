"""One cell of the parity matrix: what one process computes, what the ranks compute, and how they differ.

The reference is plain: whole weights, LocalPath, autograd's own sums, torch's own clipping. It replays the ranks' micro-batches
in turn, for each is a routing domain of its own. The ranks run the product's: `parallelize`, the engine, `train_step`.

Letters: L MoE layers, E experts, S slots.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.launch.batches import micro_batches, most_tokens
from moesaic.launch.data import TokenStream, train_batch
from moesaic.launch.optim import learning_rate, make_optimizer, set_lr
from moesaic.launch.schema import Config
from moesaic.launch.train import train_step
from moesaic.moe.balance import update_bias
from moesaic.moe.model import Fill, Transformer, build, init_parameter
from moesaic.parallel.apply import parallelize, start_engine, total
from moesaic.parallel.engine import MOMENTS, Engine
from moesaic.parallel.mesh import Meshes, make_meshes
from tests.parallel.cells import Cell
from tests.parallel.mutations import mutated
from tests.parallel.pool import Pool, RanksFailed

CPU = torch.device("cpu")
TOLERANCE = 1e-5
STEPS = 3
Named = dict[str, Tensor]
# What of a run is the same on every rank, and compared with the reference within the tolerance.
COMPARED = ("losses", "norms", "clipped_norm", "figures", "gradients", "moments", "weights")


# ---------------------------------------------------------------- workloads


class Samples:
    """A stream of random tokens for `train_batch`, in which no two positions of a micro-batch are the same to the model.

    A router scores the second token of `a a` as the first, and the first ones of two sequences that begin alike: which of them
    an expert drops is then open, and the last bit of a sum decides. So no token comes twice in a sequence, and none begins two.
    """

    windows = 1_000_000
    rows = TokenStream.rows  # in the order of a run

    def __init__(self, sequence: int, vocab: int) -> None:
        self.sequence, self.vocab = sequence, vocab

    def gather(self, windows: np.ndarray) -> np.ndarray:
        rows = np.empty((len(windows), self.sequence + 1), np.int64)
        for i, window in enumerate(windows.tolist()):
            row = np.random.default_rng(window).permutation(self.vocab)[: self.sequence + 1]
            rows[i] = (row - row[0] + windows[0] + i) % self.vocab
        return rows


def wishes(workload: str, n_experts: int) -> Tensor:
    """What the router should add to each expert's logit, fp32 (E,)."""
    e = torch.arange(n_experts)
    if workload == "zipf":
        return -1.2 * (e + 1.0).log()
    unwanted = {
        "one expert": e > 0, "experts without a token": e % 2 == 1, "a rank that receives nothing": e >= n_experts // 2,
    }.get(workload, e < 0)  # fmt: skip
    return torch.where(unwanted, -3.0, 3.0) if unwanted.any() else torch.zeros(n_experts)


def filling(cell: Cell, config: Config) -> Fill:
    """Initial weights that make the workload: the first feature of every token is large, so that the router's weights for it
    act as a bias on the experts, through scores and gradients like any other."""
    wish_E = wishes(cell.workload, config.model.n_experts)

    def fill(name: str, tensor: Tensor) -> None:
        init_parameter(name, tensor, config.model, config.train.seed)
        if name == "embedding.weight":
            tensor *= (
                3  # else what attention adds, the same for all tokens of a sequence, chooses the experts of layer 1
            )
            if wish_E.any():
                tensor[:, 0] = 1.5
        if name.endswith("router.weight_ED") and wish_E.any():
            tensor[:, 0] = wish_E / 3.5  # about what the norm makes of the feature

    return fill


class Unfit(AssertionError):
    """The reference's run is not the test it was meant to be."""


def check_workload(cell: Cell, counts_LE: Tensor, batches: list[list[int]]) -> None:
    """The reference's step has the property that gives the workload its name, else Unfit. batches: [rank][micro-batch], sequences
    of each."""
    rows_L = counts_LE.sum(dim=1)
    n_experts = counts_LE.shape[1]
    lower, upper = counts_LE[:, : n_experts // 2], counts_LE[:, n_experts // 2 :]
    busiest = (counts_LE.amax(dim=1) * n_experts / rows_L).min()
    first = counts_LE[:, 0]
    holds = {
        "uniform": lambda: busiest < 2.5 and (counts_LE > 0).all(),
        "zipf": lambda: busiest > 1.5 and (lower.sum(dim=1) > 2 * upper.sum(dim=1)).all(),
        "one expert": lambda: (first == rows_L).all() and (rows_L > 0).all(),
        "experts without a token": lambda: (counts_LE[:, 1::2] == 0).all() and (counts_LE[:, 0::2] > 0).all(),
        "a rank that receives nothing": lambda: (upper == 0).all() and (rows_L > 0).all(),
        "an empty remainder": lambda: batches[-1][-1] == 0 and batches[0][-1] > 0,
        "T prime": lambda: {n * cell.config().train.seq_len for row in batches for n in row} == {13},
    }[cell.workload]
    if not holds():
        raise Unfit(f"{cell}: {counts_LE.tolist()} rows, {batches} sequences")


def check_gradients(cell: Cell, gradients: Named) -> None:
    """Every tensor has a gradient, the router's not by rounding alone, and clipping cuts, else Unfit."""
    largest = {name: gradient.abs().max().item() for name, gradient in gradients.items()}
    if any(value < (1e-4 if "router" in name else 1e-12) for name, value in largest.items()):
        raise Unfit(f"{cell}: {largest}")
    if cell.clip and norm_of(gradients) < 1.1 * cell.clip:
        raise Unfit(f"{cell}: norm {norm_of(gradients)}")


# ---------------------------------------------------------------- what is recorded of a run


class Routes:
    """The routing of every forward pass, as the routers gave it: [pass][layer], int64 (2, S) of token and expert."""

    def __init__(self, model: Transformer) -> None:
        self.passes: list[list[Tensor]] = []
        self.open = False
        for layer in model.moe_layers():
            layer.router.register_forward_hook(self._see)
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def _begin(self, module: Any, inputs: Any) -> None:
        self.passes.append([])
        self.open = True  # a recomputation in backward is no pass

    def _end(self, module: Any, inputs: Any, output: Any) -> None:
        self.open = False

    def _see(self, module: Any, inputs: Any, output: Any) -> None:
        if self.open:
            routing = output[0]
            self.passes[-1].append(torch.stack([routing.token_S, routing.expert_S]).clone())


def norm_of(tensors: Named) -> Tensor:
    return torch.linalg.vector_norm(torch.cat([t.flatten() for t in tensors.values()]).double()).float()


def record(config: Config, run: dict[str, Any]) -> dict[str, Any]:
    """Ends a record: lists become tensors. The gradients as clipped are what the first step left in the first moments."""
    first = {name: moment for name, moment in run.pop("first_moments").items() if name.startswith("exp_avg.")}
    run["clipped_norm"] = norm_of(first) / (1 - config.optim.beta1)
    return run | {key: torch.stack(run[key]) for key in ("losses", "norms", "counts", "figures")}


# ---------------------------------------------------------------- one process


@functools.lru_cache(maxsize=8)
def reference(cell: Cell) -> dict[str, Any]:
    """What one process computes; `routes` are those of each rank."""
    config = cell.config()
    world = cell.layout.world
    model = build(config.model, config.train.seed, CPU, filling(cell, config))
    optimizer = make_optimizer(model, config.optim)
    routes = Routes(model)
    stream = Samples(config.train.seq_len, config.model.vocab_size)
    global_tokens = config.train.global_batch * config.train.seq_len
    random_states = [torch.manual_seed(rank).get_state() for rank in range(world)]
    run: dict[str, Any] = {key: [] for key in ("losses", "norms", "counts", "figures")}
    run["routes"] = [[] for _ in range(world)]
    for step in range(STEPS):
        first_sample = step * config.train.global_batch
        dealt = [micro_batches(config.train.global_batch, config.train, rank, world) for rank in range(world)]
        batches = [
            [torch.from_numpy(train_batch(stream, config.train.seed, first_sample + a, n)) for a, n in row]
            for row in dealt
        ]

        def replay(work: Callable[[int, int, Tensor], None], batches: list[list[Tensor]] = batches) -> list[Tensor]:
            """`work(rank, i, micro-batch)` in turn, each rank with random numbers of its own; their states after."""
            states = []
            for rank, mine in enumerate(batches):
                torch.set_rng_state(random_states[rank])
                for i, batch in enumerate(mine):
                    work(rank, i, batch)
                states.append(torch.get_rng_state())
            return states

        if config.model.router.balance_over == "global":
            totals: dict[int, Any] = {}

            @torch.no_grad()
            def count(rank: int, i: int, batch: Tensor, totals: dict[int, Any] = totals) -> None:
                totals[i] = totals.get(i, 0) + model(batch[:, :-1], batch[:, 1:]).counts

            replay(count)
        sums: list[Any] = [0, 0, 0]

        def backward(rank: int, i: int, batch: Tensor, sums: list[Any] = sums) -> None:
            if config.model.router.balance_over == "global":
                for layer, counts_E in zip(model.moe_layers(), totals[i], strict=True):
                    layer.reduce = lambda _, counts_E=counts_E: counts_E
            out = model(batch[:, :-1], batch[:, 1:])
            assert out.loss is not None
            tokens = batch[:, 1:].numel()
            ((out.loss + out.aux * tokens) / global_tokens).backward()
            for k, part in enumerate((out.loss.detach() / global_tokens, out.counts, out.figures)):
                sums[k] = sums[k] + part
            run["routes"][rank].append(routes.passes[-1])

        random_states = replay(backward)
        loss, counts_LE, figures_LF = sums
        check_workload(cell, counts_LE, [[n for _, n in row] for row in dealt])
        for key, value in (("losses", loss), ("counts", counts_LE), ("figures", figures_LF)):
            run[key].append(value)
        if step == 0:
            run["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            check_gradients(cell, run["gradients"])
        limit = config.optim.clip or float("inf")
        run["norms"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
        set_lr(optimizer, learning_rate(step, STEPS, config.optim))
        optimizer.step()
        optimizer.zero_grad()
        if config.model.router.kind == "sigmoid_bias":
            update_bias(model, counts_LE)
        run["moments"] = {
            f"{m}.{n}": optimizer.state[p][m].clone() for n, p in model.named_parameters() for m in MOMENTS
        }
        run.setdefault("first_moments", run["moments"])
    run["weights"] = {n: p.detach().clone() for n, p in [*model.named_parameters(), *model.named_buffers()]}
    return record(config, run)


# ---------------------------------------------------------------- many ranks


@functools.cache
def meshes_of(expert: int, replicate: int) -> Meshes:
    """Process groups cost time and sockets, and outlive a cell."""
    return make_meshes("cpu", expert, replicate)


def make_engine(cell: Cell, config: Config, compute: torch.dtype = torch.float32) -> tuple[Transformer, Engine]:
    meshes = meshes_of(cell.layout.expert, config.parallel.replicate)
    model = parallelize(
        config.model, config.parallel, meshes, seed=config.train.seed, device=CPU, compute=compute,
        fill=filling(cell, config), tokens=most_tokens(config.train),
    )  # fmt: skip
    return model, start_engine(config.parallel, model, make_optimizer(model, config.optim))


def whole(tensors: Named) -> Named:
    """Copies of tensors that may lie in pieces. Collective."""
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for n, t in tensors.items()}


def train(cell: Cell) -> dict[str, Any]:
    """The cell on this rank, and `routes`, its own."""
    config = cell.config()
    torch.manual_seed(123)  # nothing of what precedes a run may matter
    model, engine = make_engine(cell, config)
    stream: Any = Samples(config.train.seq_len, config.model.vocab_size)
    with torch.no_grad():  # nor an evaluation before it: weights that it gathered would be those of every step
        engine.model(torch.zeros(1, config.train.seq_len, dtype=torch.int64))
    engine.rest()
    routes = Routes(model)
    run: dict[str, Any] = {key: [] for key in ("losses", "norms", "counts", "figures")}
    torch.manual_seed(dist.get_rank())
    for step in range(STEPS):
        set_lr(engine.optimizer, learning_rate(step, STEPS, config.optim))
        first_sample = step * config.train.global_batch
        *sums, _ = train_step(engine, stream, config.train, first_sample, CPU, None)
        for key, value in zip(("losses", "counts", "figures"), sums, strict=True):
            run[key].append(total(value))
        if step == 0:
            run["gradients"] = whole(engine.gradients())
        run["norms"].append(engine.step(config.optim.clip))
        if config.model.router.kind == "sigmoid_bias":
            update_bias(model, run["counts"][-1])
        if step in (0, STEPS - 1):
            run["moments"] = whole(engine.moments())
            run.setdefault("first_moments", run["moments"])
    run["weights"] = whole(engine.weights())
    return record(config, run) | {"routes": routes.passes}


def tensors(run: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """All that every rank has the same of: (kind, or kind and parameter; tensor)."""
    for key in ("counts", *COMPARED):
        value = run[key]
        if isinstance(value, dict):
            yield from ((f"{key} {name}", tensor) for name, tensor in value.items())
        else:
            yield key, value


def digest(run: dict[str, Any]) -> str:
    """A hash of every bit of it."""
    hashed = hashlib.sha256()
    for name, tensor in tensors(run):
        hashed.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def on_rank(cell: Cell, times: int, mutation: str | None) -> dict[str, Any]:
    """The cell, `times` times. `digests` of each; tensors of the first, on rank 0 alone."""
    try:
        with mutated(mutation):
            runs = [train(cell) for _ in range(times)]
    except BaseException:
        meshes_of.cache_clear()  # ranks may have left a group at different places
        raise
    result = {"digests": [digest(run) for run in runs], "routes": runs[0]["routes"]}
    return result | (runs[0] if dist.get_rank() == 0 else {})


# ---------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class Outcome:
    """status: green, red or refused. error: the largest difference, relative to the largest entry of its tensor, and where.
    reason: why it is red or refused. digest: of all bits of the run."""

    cell: Cell
    status: str
    error: float = float("nan")
    where: str = ""
    reason: str = ""
    digest: str = ""


def run_cell(pool: Pool, cell: Cell, times: int = 2, mutation: str | None = None) -> Outcome:
    """The cell on the ranks of `pool`, `times` times, against the reference, which this process computes meanwhile."""
    try:
        cell.config()
    except ValueError as error:
        return Outcome(cell, "refused", reason=str(error))
    pool.send(on_rank, cell, times, mutation)
    try:
        want = reference(cell.reference())
    finally:
        try:
            ranks = pool.receive()
            failure = None
        except RanksFailed as error:
            failure = error
    if failure:
        refusal = failure.refusal()
        return Outcome(cell, "refused" if refusal else "red", reason=refusal or str(failure))
    return judge(cell, want, ranks)


def judge(cell: Cell, want: dict[str, Any], ranks: list[dict[str, Any]]) -> Outcome:
    got = ranks[0]
    errors = dict(differences(want, got))
    where = max(errors, key=lambda name: errors[name])
    reasons = []
    if not errors[where] <= TOLERANCE:
        worst = sorted(errors, key=lambda name: -errors[name])[:4]
        reasons.append("differs: " + ", ".join(f"{name} by {errors[name]:.1e}" for name in worst))
    if not torch.equal(want["counts"], got["counts"]):
        reasons.append("other rows per expert")
    for rank, (theirs, mine) in enumerate(zip(want["routes"], ranks, strict=True)):
        passes = [
            torch.equal(a, b) for x, y in zip(theirs, mine["routes"], strict=True) for a, b in zip(x, y, strict=True)
        ]
        if not all(passes):
            reasons.append(f"rank {rank} routes {passes.count(False)} of {len(passes)} layers otherwise")
    if any(len(set(rank["digests"])) > 1 for rank in ranks):
        reasons.append("the same seed twice: other bits")
    if len({rank["digests"][0] for rank in ranks}) > 1:
        reasons.append("ranks have different results")
    status = "red" if reasons else "green"
    return Outcome(cell, status, errors[where], where, "; ".join(reasons), got["digests"][0])


def differences(want: dict[str, Any], got: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(what, largest difference relative to the largest entry), a missing or misshapen tensor differing infinitely."""
    mine, theirs = dict(tensors(got)), dict(tensors(want))
    for name in theirs.keys() | mine.keys():
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None or a.shape != b.shape:
            yield name, float("inf")
        elif name != "counts":
            yield name, relative(a, b)


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference of a from b, relative to b's largest entry; infinite where it is no number."""
    difference = ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()
    return difference if difference == difference else float("inf")


@contextmanager
def pools() -> Iterator[Callable[[int], Pool]]:
    """A function that gives the pool of so many ranks, started when it is first asked for."""
    started: dict[int, Pool] = {}

    def pool(world: int) -> Pool:
        if world not in started:
            started[world] = Pool(world)
        return started[world]

    try:
        yield pool
    finally:
        for one in started.values():
            one.close()
