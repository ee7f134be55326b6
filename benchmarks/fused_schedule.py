"""SIMULATION, not a measurement: when the tasks of a fused expert-parallel layer would run, against one phase after another.

    python benchmarks/fused_schedule.py [--hardware h100_sxm] [--model 7b_moe] [--ranks 8] [--backward] [--shared] [--plot]

A layer's forward, or its backward, is a graph of tasks (docs/fused.md): dispatch of a chunk of rows, a tile of GEMM 1 with its
activation, one of GEMM 2 with rows pushed back to their source, the sum of a tile of tokens; backward, a tile of an expert's
gradients too. Workers of a rank, one a multiprocessor, take tasks from the rank's queue in its order and wait, holding their
place, until what a task needs has been signalled. A task lasts as long as its arithmetic or its share of the memory traffic,
whichever is longer; rows for another rank then pass the source's way out and the target's way in, each first come, first
served, and count as sent when they have arrived.

The peer is the same work as phases with a barrier after each: all-to-all, both GEMMs, a sum on the owner, all-to-all, sum. It
sends a token once to each rank, and one sum back, as the all_to_all path does; backward it has kept X, which the fused kernel
sends again unless `--keep`. Kernel launches and host waits count for nothing on either side, which flatters the peer. Exposed
communication is the time beyond that of products and sums alone.

Rates are a hardware recipe's; `--matmul-share` and `--comm-processors` are assumptions, printed with each line. What it leaves
out: contention in L2 and memory, clocks, other collectives. It says what an order of tasks can hide, not how fast a kernel is.

Letters: T tokens a rank, D width, F expert width, E experts in all, e on a rank, K experts a token, W ranks.
"""

import argparse
import dataclasses
import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from moesaic.moe.config import require
from moesaic.parallel.hardware import Hardware, load

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
BF16 = 2  # bytes
Signal = tuple[object, int]


@dataclass(frozen=True)
class Machine:
    """Rates of one rank, in seconds, bytes and FLOPs.

    workers   programs that run at once
    flops     a second, of one worker's matrix products
    copy      bytes a second that one worker moves: its share of the memory's
    link      bytes a second of a rank's way out, and as many of its way in
    latency   from the last byte sent until the other rank can see the flag
    """

    workers: int
    flops: float
    copy: float
    link: float
    latency: float


class Task(NamedTuple):
    """`seconds` of a worker, then `sends` (rank, bytes) to others or itself, then `signals`: when all of `needs` is signalled."""

    kind: str
    seconds: float
    needs: Sequence[Signal] = ()
    sends: Sequence[tuple[int, float]] = ()
    signals: Sequence[Signal] = ()


class Span(NamedTuple):
    """A task as it ran: taken from the queue, begun when its needs were met, ended when what it sent had arrived."""

    rank: int
    worker: int
    task: Task
    taken: float
    begin: float
    end: float


def simulate(queues: Sequence[Sequence[Task]], machine: Machine) -> list[Span]:
    """Run a queue of tasks a rank; spans in the order of their ends.

    Raises ValueError where the tasks wait for each other forever, naming one that waits.
    """
    signalled: dict[object, int] = defaultdict(int)
    parked: dict[object, list[tuple]] = defaultdict(list)
    way_out, way_in = [0.0] * len(queues), [0.0] * len(queues)
    position = [0] * len(queues)
    spans: list[Span] = []
    events: list[tuple] = []
    order = 0
    waiting = 0

    def at(time: float, what, *arguments) -> None:
        nonlocal order
        order += 1  # events of one moment run in the order they were made
        heapq.heappush(events, (time, order, what, arguments))

    def take(now: float, rank: int, worker: int) -> None:
        nonlocal waiting
        if position[rank] < len(queues[rank]):
            task = queues[rank][position[rank]]
            position[rank] += 1
            waiting += 1
            look(now, rank, worker, task, now)

    def look(now: float, rank: int, worker: int, task: Task, taken: float) -> None:
        nonlocal waiting
        for counter, amount in task.needs:
            if signalled[counter] < amount:
                parked[counter].append((rank, worker, task, taken))
                return
        waiting -= 1
        at(now + task.seconds, send, rank, worker, task, taken, now)

    def send(now: float, rank: int, worker: int, task: Task, taken: float, begin: float) -> None:
        end = now + sum(size for _, size in task.sends) / machine.copy
        flight = [end, sum(target != rank for target, _ in task.sends)]
        for target, size in task.sends:
            if target != rank:
                start = max(now, way_out[rank])
                way_out[rank] = start + size / machine.link
                at(start, arrive, target, size, flight, (rank, worker, task, taken, begin))
        if flight[1] == 0:
            at(end, finish, rank, worker, task, taken, begin)

    def arrive(now: float, target: int, size: float, flight: list, span: tuple) -> None:
        start = max(now, way_in[target])
        way_in[target] = start + size / machine.link
        flight[0] = max(flight[0], way_in[target] + machine.latency)
        flight[1] -= 1
        if flight[1] == 0:
            at(flight[0], finish, *span)

    def finish(now: float, rank: int, worker: int, task: Task, taken: float, begin: float) -> None:
        spans.append(Span(rank, worker, task, taken, begin, now))
        for counter, amount in task.signals:
            signalled[counter] += amount
            for waiter in parked.pop(counter, ()):
                look(now, *waiter)
        take(now, rank, worker)

    for worker in range(machine.workers):
        for rank in range(len(queues)):
            at(0.0, take, rank, worker)
    while events:
        now, _, what, arguments = heapq.heappop(events)
        what(now, *arguments)
    if waiting:
        rank, _, task, _ = next(iter(parked.values()))[0]
        raise ValueError(f"{waiting} tasks wait forever; one is {task.kind} of rank {rank}, for {task.needs}")
    return spans


def makespan(spans: Sequence[Span]) -> float:
    return max((span.end for span in spans), default=0.0)


def lower_bound(queues: Sequence[Sequence[Task]], machine: Machine) -> float:
    """No schedule is faster: the busiest rank's work over its workers, and the busiest way out or in of a rank."""
    out, into, work = [0.0] * len(queues), [0.0] * len(queues), [0.0] * len(queues)
    for rank, queue in enumerate(queues):
        for task in queue:
            work[rank] += task.seconds + sum(size for _, size in task.sends) / machine.copy
            for target, size in task.sends:
                if target != rank:
                    out[rank] += size / machine.link
                    into[target] += size / machine.link
    return max(max(work) / machine.workers, max(out), max(into))


# ---------------------------------------------------------------- the layer


@dataclass(frozen=True)
class Layer:
    """Shape of a layer and how its work is cut.

    m, n   rows and columns of a tile
    wave   row tiles whose GEMM 2 tasks follow their GEMM 1 tasks
    once   a token needed by several experts of a rank crosses once
    keep   of backward: rows of X were kept, else they are sent again
    """

    d_model: int
    d_expert: int
    n_experts: int
    top_k: int
    m: int = 128
    n: int = 64
    wave: int = 32
    once: bool = True
    keep: bool = False


def route(layer: Layer, ranks: int, tokens: int, zipf: float, seed: int = 0) -> np.ndarray:
    """Experts of each token, [W, T, K], distinct and ascending, drawn without replacement with weights 1 / (1 + e)^zipf.

    Experts are numbered at random, so that hot ones are spread over the ranks. Infinite: all tokens' first choice is one expert.
    """
    draw = np.random.default_rng(seed)
    heat = np.zeros(layer.n_experts)
    if np.isinf(zipf):
        heat[0] = 1e9
    else:
        heat = -zipf * np.log1p(np.arange(layer.n_experts))
    heat = draw.permutation(heat)
    noisy = heat + draw.gumbel(size=(ranks, tokens, layer.n_experts))
    return np.sort(np.argpartition(-noisy, layer.top_k - 1, axis=-1)[..., : layer.top_k], axis=-1)


def fused(layer: Layer, chosen: np.ndarray, machine: Machine, backward: bool = False) -> list[list[Task]]:
    """Every rank's queue, in the order of docs/fused.md: plan; dispatch, to itself first; waves of row tiles; backward the
    experts' gradients; sums."""
    W, T, K = chosen.shape
    per_rank = layer.n_experts // W
    up_tiles, down_tiles = tile_seconds(layer, chosen, machine, backward)
    pairs = crossings(layer, chosen)
    ups, downs = -(-up_width(layer, backward) // layer.n), -(-layer.d_model // layer.n)
    copies = 2 if backward and not layer.keep else 1
    keyed: list[list[tuple[tuple, Task]]] = [[] for _ in range(W)]
    tokens_of = [[np.nonzero((chosen[w] == e).any(-1))[0] for e in range(layer.n_experts)] for w in range(W)]
    for w in range(W):
        counts = [(v, 0.0 if backward else 4.0 * layer.n_experts) for v in range(W)]
        keyed[w].append(((0,), Task("counts", 0.0, (), counts, [(("counts", v), 1) for v in range(W)])))
    for owner in range(W):
        t = 0
        for e in range(owner * per_rank, (owner + 1) * per_rank):
            sources = np.concatenate([np.full(len(tokens_of[w][e]), w) for w in range(W)])
            tokens = np.concatenate([tokens_of[w][e] for w in range(W)])
            first = t
            for i in range(0, len(sources), layer.m):
                tile, wave, back, arrivals = (owner, t), t // layer.wave, [], []
                for w in np.unique(sources[i : i + layer.m]):
                    mine = tokens[i : i + layer.m][sources[i : i + layer.m] == w]
                    carried = copies * len(mine) * layer.d_model * BF16 * (pairs[w, owner] if layer.once else 1.0)
                    task = Task(
                        "dispatch", 0.0, [(("counts", w), W)], [(owner, carried)], [((tile, "rows"), len(mine))]
                    )
                    keyed[w].append(((1, (owner - w) % W, e, i), task))
                    back.append((int(w), len(mine)))
                    found = zip(*np.unique(mine // layer.m, return_counts=True), strict=True)
                    arrivals += [(int(w), int(token_tile), int(count)) for token_tile, count in found]
                needs = [((tile, "rows"), min(layer.m, len(sources) - i))]
                for c in range(ups):
                    keyed[owner].append(((2, wave, 0, c, t), Task("up", up_tiles, needs, (), [((tile, "up"), 1)])))
                for c in range(downs):
                    columns = min(layer.n, layer.d_model - c * layer.n)
                    sends = [(w, count * columns * BF16) for w, count in back]
                    signals = [(("slots", w, token_tile, c), count) for w, token_tile, count in arrivals]
                    task = Task("down", down_tiles, [((tile, "up"), ups)], sends, signals)
                    keyed[owner].append(((2, wave, 1, c, t), task))
                t += 1
            if backward:
                needs = [(((owner, tile), "up"), ups) for tile in range(first, t)]
                for c, seconds in enumerate(gradient_seconds(layer, len(sources), machine)):
                    keyed[owner].append(((3, e, c), Task("weight", seconds, needs)))
    for w in range(W):
        for i in range(0, T, layer.m):
            count = min(layer.m, T - i)
            for c in range(downs):
                seconds = count * (K + 1) * min(layer.n, layer.d_model - c * layer.n) * BF16 / machine.copy
                keyed[w].append(((4, i, c), Task("combine", seconds, [(("slots", w, i // layer.m, c), count * K)])))
    return [[task for _, task in sorted(queue, key=lambda pair: pair[0])] for queue in keyed]


def with_shared(layer: Layer, chosen: np.ndarray, n: int) -> tuple[Layer, np.ndarray]:
    """The same with n shared experts in the queue, as moesaic.parallel.fused.with_shared: the first of each rank's, for its own
    tokens."""
    W, T, K = chosen.shape
    each = layer.n_experts // W
    own = np.arange(W)[:, None, None] * (each + n) + np.arange(n)
    chosen = np.sort(np.concatenate([chosen + n * (chosen // each + 1), np.broadcast_to(own, (W, T, n))], axis=2))
    return dataclasses.replace(layer, n_experts=layer.n_experts + n * W, top_k=K + n), chosen


def shared_seconds(layer: Layer, tokens: int, n: int, machine: Machine, backward: bool) -> float:
    """Of a shared expert beside the kernel: its arithmetic alone, on all workers."""
    return (2 if backward else 1) * 6 * tokens * layer.d_model * n * layer.d_expert / machine.flops / machine.workers


def crossings(layer: Layer, chosen: np.ndarray) -> np.ndarray:
    """[source, target]: of the slots that a source's tokens have at a target, the part that crosses if a token crosses once."""
    W = len(chosen)
    target = chosen // (layer.n_experts // W)
    hits = np.stack([(target == v).sum(-1) for v in range(W)], axis=1)  # [W, target, T]
    return (hits > 0).sum(-1) / np.maximum(hits.sum(-1), 1)


def up_width(layer: Layer, backward: bool) -> int:
    """Columns of GEMM 1: gate and up; backward the gradient of what they give."""
    return layer.d_expert if backward else 2 * layer.d_expert


def gradient_seconds(layer: Layer, rows: int, machine: Machine) -> list[float]:
    """Of each m x n tile of an expert's gradients, dW_down [D, F] first, then dW_up [2F, D], over its rows: as `tile_seconds`."""
    seconds = []
    for height, width in ((layer.d_model, layer.d_expert), (2 * layer.d_expert, layer.d_model)):
        tiles = -(-height // layer.m) * -(-width // layer.n)
        moved = BF16 * (rows * (height + width) / tiles + layer.m * layer.n)
        seconds += [max(2 * layer.m * layer.n * rows / machine.flops, moved / machine.copy)] * tiles
    return seconds


def tile_seconds(layer: Layer, chosen: np.ndarray, machine: Machine, backward: bool) -> tuple[float, float]:
    """Of a tile of GEMM 1 and of GEMM 2: its arithmetic, or its part of the operands' and the result's bytes, each moved once."""
    D, F, m, n = layer.d_model, layer.d_expert, layer.m, layer.n
    tiles = max(chosen.size / len(chosen) / m, 1.0)  # of rows, on a rank
    experts = layer.n_experts / len(chosen)
    up = max(
        2 * m * n * D / machine.flops,
        BF16 * (m * D + m * 3 * F + experts * D * 2 * F / tiles) * n / (2 * F) / machine.copy,
    )
    # What GEMM 2 writes is what it sends: counted there.
    if backward:  # da of dO, reads h, writes dh and a; dx of dh
        up = max(
            2 * m * n * D / machine.flops, BF16 * (m * (D + 5 * F) + experts * D * F / tiles) * n / F / machine.copy
        )
        down = max(
            2 * m * n * 2 * F / machine.flops, BF16 * (m * 2 * F + experts * D * 2 * F / tiles) * n / D / machine.copy
        )
        return up, down
    down = max(2 * m * n * F / machine.flops, BF16 * (m * F + experts * D * F / tiles) * n / D / machine.copy)
    return up, down


def unfused(layer: Layer, chosen: np.ndarray, machine: Machine, backward: bool = False) -> list[list[list[Task]]]:
    """The same work as phases, each a queue a rank. An exchange has one worker for each way, and links are its only limit."""
    W = len(chosen)
    up_tiles, down_tiles = tile_seconds(layer, chosen, machine, backward)
    row = layer.d_model * BF16
    counts = np.stack([(chosen == e).sum((1, 2)) for e in range(layer.n_experts)], axis=1)  # [W, E]
    by_rank = counts.reshape(W, W, -1).sum(-1)
    crossing = by_rank * crossings(layer, chosen)
    tiles = (-(-counts.sum(0) // layer.m)).reshape(W, -1).sum(-1)

    def exchange(name: str, rows: np.ndarray) -> list[list[Task]]:
        staggered = [[(w + i) % W for i in range(1, W)] for w in range(W)]
        return [[Task(name, 0.0, (), [(v, rows[w, v] * row)]) for v in staggered[w]] for w in range(W)]

    def products(name: str, seconds: float, columns: int, written: float) -> list[list[Task]]:
        task = Task(name, seconds + layer.m * layer.n * written / machine.copy)
        return [[task] * int(count * -(-columns // layer.n)) for count in tiles]

    def sums(name: str, moved: np.ndarray) -> list[list[Task]]:
        return [[Task(name, moved[w] * row / machine.copy / machine.workers)] * machine.workers for w in range(W)]

    def gradients() -> list[list[Task]]:
        rows = counts.sum(0).reshape(W, -1)
        return [[Task("weight", s) for n in rows[w] for s in gradient_seconds(layer, n, machine)] for w in range(W)]

    return [
        *([] if backward else [exchange("counts", np.full((W, W), 8.0 * layer.n_experts / W / row))]),
        exchange("dispatch", crossing),
        products("up", up_tiles, up_width(layer, backward), 0),
        products("down", down_tiles, layer.d_model, BF16),
        *([gradients()] if backward else []),
        sums("combine", by_rank.sum(0) + crossing.sum(0)),
        exchange("dispatch", crossing.T),
        sums("combine", crossing.sum(1) + chosen.shape[1]),
    ]


def run_phases(phases: Sequence[list[list[Task]]], machine: Machine) -> list[Span]:
    """One after the other, each beginning when all ranks have ended the one before."""
    spans: list[Span] = []
    for queues in phases:
        exchange = any(task.sends for queue in queues for task in queue)
        used = dataclasses.replace(machine, copy=np.inf, workers=len(queues)) if exchange else machine
        start = makespan(spans)
        spans += [
            span._replace(taken=span.taken + start, begin=span.begin + start, end=span.end + start)
            for span in simulate(queues, used)
        ]
    return spans


# ---------------------------------------------------------------- what is printed and drawn

KINDS = {
    "counts": "#7f7f7f",
    "dispatch": "#1f77b4",
    "up": "#2ca02c",
    "down": "#98df8a",
    "weight": "#9467bd",
    "combine": "#ff7f0e",
    "wait": "#eeeeee",
}
LABELS = {
    "counts": "counts",
    "dispatch": "rows sent",
    "up": "GEMM 1",
    "down": "GEMM 2",
    "weight": "gradients of experts",
    "combine": "sums",
    "wait": "waiting",
}


def machine_of(hardware: Hardware, comm_processors: int, matmul_share: float) -> Machine:
    return Machine(
        workers=hardware.processors - comm_processors,
        flops=hardware.rate("bf16") * matmul_share / hardware.processors,
        copy=hardware.bandwidth / hardware.processors,
        link=hardware.hops["intra"].bytes_s,
        latency=hardware.hops["intra"].latency,
    )


def crossed(queues: Sequence[Sequence[Task]]) -> float:
    """Bytes that leave a rank."""
    return sum(size for rank, queue in enumerate(queues) for task in queue for to, size in task.sends if to != rank)


def sides(layer: Layer, chosen: np.ndarray, machine: Machine, backward: bool = False) -> dict[str, float]:
    """Microseconds of both sides; what each has beyond its products and sums alone is communication that nothing hides."""
    queues, phases = fused(layer, chosen, machine, backward), unfused(layer, chosen, machine, backward)
    alone = makespan(run_phases([queues for queues in phases if not crossed(queues)], machine))
    ours, peer = makespan(simulate(queues, machine)), makespan(run_phases(phases, machine))
    return {
        "ours": ours * 1e6,
        "peer": peer * 1e6,
        "exposed": (ours - alone) * 1e6,
        "peer_exposed": (peer - alone) * 1e6,
        "bound": lower_bound(queues, machine) * 1e6,
        "mb": crossed(queues) / 1e6,
        "peer_mb": sum(map(crossed, phases)) / 1e6,
    }


def timeline(axes, spans: Sequence[Span], rank: int, workers: int, until: float) -> None:
    """How many workers of a rank do what, over time."""
    time = np.linspace(0, until, 600)
    counts = {kind: np.zeros_like(time) for kind in KINDS}
    for span in spans:
        if span.rank == rank:
            kind = span.task.kind
            counts[kind] += (time >= span.begin) & (time < span.end)
            counts["wait"] += (time >= span.taken) & (time < span.begin)
    axes.stackplot(time * 1e6, counts.values(), colors=KINDS.values(), labels=LABELS.values(), step="post")
    axes.set(xlim=(0, until * 1e6), ylim=(0, workers), yticks=[])
    axes.set_ylabel(f"rank {rank}", rotation=0, ha="right", va="center")


def plot_timeline(
    layer: Layer, chosen: np.ndarray, machine: Machine, title: str, path: Path, backward: bool = False
) -> None:
    import matplotlib.pyplot as plt

    both = {
        "fused": simulate(fused(layer, chosen, machine, backward), machine),
        "one phase after another": run_phases(unfused(layer, chosen, machine, backward), machine),
    }
    until = max(map(makespan, both.values())) * 1.02
    figure, grid = plt.subplots(len(chosen), 2, figsize=(14, 1 + 0.8 * len(chosen)), sharex=True, squeeze=False)
    for column, (name, spans) in enumerate(both.items()):
        for rank in range(len(chosen)):
            timeline(grid[rank][column], spans, rank, machine.workers, until)
        grid[0][column].set_title(f"{name}: {makespan(spans) * 1e6:.0f} us (simulated)")
        grid[-1][column].set_xlabel("microseconds, simulated")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="lower center", ncols=len(KINDS))
    figure.suptitle(f"SIMULATION, nothing was measured. {title}")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def plot_sweeps(sweeps: dict[str, dict[str, dict[str, float]]], title: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(sweeps), figsize=(14, 4.5), squeeze=False)
    for axis, (name, values) in zip(axes[0], sweeps.items(), strict=True):
        for key, style, label in (
            ("peer", "C1-o", "one phase after another"), ("ours", "C0-o", "fused"), ("bound", "C0:", "fused, lower bound"),
            ("peer_exposed", "C1--s", "of it exposed, one after another"), ("exposed", "C0--s", "of it exposed, fused"),
        ):  # fmt: skip
            axis.plot(list(values), [v[key] for v in values.values()], style, label=label)
        axis.set(xlabel=name, ylabel="microseconds, simulated", ylim=(0, None))
        axis.legend(fontsize=8)
    figure.suptitle(f"SIMULATION, nothing was measured. {title}")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    import compare  # beside this file, where Python looks when it runs it

    parser = argparse.ArgumentParser(description="SIMULATION of the fused layer's schedule")
    parser.add_argument("--hardware", default="h100_sxm", help="a name of recipes/hardware, or a file")
    parser.add_argument("--model", default="7b_moe", help="a name of recipes/model")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a rank, where they are not varied")
    parser.add_argument("--comm-processors", type=int, default=8, help="multiprocessors that the kernel leaves free")
    parser.add_argument("--matmul-share", type=float, default=0.7, help="of the peak rate, reached by a tile's product")
    parser.add_argument("--backward", action="store_true", help="the layer's backward instead of its forward")
    parser.add_argument("--keep", action="store_true", help="as parallel.fused_keep: backward doesn't send X again")
    parser.add_argument("--shared", action="store_true", help="as parallel.fused_shared, against the same kernel and the shared "
                        "expert after it")  # fmt: skip
    parser.add_argument("--plot", action="store_true", help="write results/fused_schedule*.png; needs matplotlib")
    given = parser.parse_args()
    hardware = load(given.hardware)
    require(1 <= given.ranks <= hardware.domain,
            f"--ranks={given.ranks}: must lie in 1..{hardware.domain}, the ranks that links of {hardware.name} join")  # fmt: skip
    model = yaml.safe_load((ROOT / f"recipes/model/{given.model}.yaml").read_text())
    layer = Layer(model["d_model"], model["d_expert"], model["n_experts"], model["router"]["top_k"], keep=given.keep)
    machine = machine_of(hardware, given.comm_processors, given.matmul_share)
    direction = "backward" if given.backward else "forward"
    shape = f"{given.model} on {given.ranks} ranks of {hardware.name}, {direction}"
    assumed = {"simulated": True, "comm_processors": given.comm_processors, "matmul_share": given.matmul_share}
    sweeps: dict[str, dict[str, dict[str, float]]] = {"tokens a rank": {}, "imbalance: exponent of Zipf's law": {}}
    cases = [("tokens a rank", t, t, 0.0) for t in (512, 1024, 2048, 4096)]
    cases += [("imbalance: exponent of Zipf's law", z, given.tokens, z) for z in (0.0, 0.5, 1.0)]
    n = model["d_shared"] // model["d_expert"] if given.shared else 0
    require(n > 0 or not given.shared, f"--model={given.model}: has no shared expert that fits --shared")
    for sweep, at, tokens, zipf in cases:
        chosen = route(layer, given.ranks, tokens, zipf)
        if given.shared:
            alone = shared_seconds(layer, tokens, n, machine, given.backward)
            queues = fused(*with_shared(layer, chosen, n), machine, given.backward)
            inside, kernel = (
                makespan(simulate(q, machine)) for q in (queues, fused(layer, chosen, machine, given.backward))
            )
            compare.report(
                "fused_schedule", f"SIMULATION: {shape}, shared expert in the queue, T {tokens} each, Zipf {zipf}", inside * 1e6,
                (kernel + alone) * 1e6, "the kernel, then the shared expert, simulated", "us (simulated)", False,
                shared=compare.rounded(alone * 1e6), bound=compare.rounded(lower_bound(queues, machine) * 1e6), **assumed,
            )  # fmt: skip
            continue
        found = sides(layer, chosen, machine, given.backward)
        sweeps[sweep][at] = found
        rest = {key: compare.rounded(found[key]) for key in ("exposed", "peer_exposed", "bound", "mb", "peer_mb")}
        compare.report("fused_schedule", f"SIMULATION: {shape}, T {tokens} each, Zipf {zipf}", found["ours"], found["peer"],
                       "one phase after another, simulated", "us (simulated)", False, **rest, **assumed)  # fmt: skip
    if given.plot and not given.shared:
        title, ending = f"{shape} of a layer", "_backward" if given.backward else ""
        plot_sweeps(sweeps, title, RESULTS / f"fused_schedule{ending}_sweeps.png")
        chosen = route(layer, given.ranks, given.tokens, 0.0)
        plot_timeline(layer, chosen, machine, f"{title}, {given.tokens} tokens a rank",
                      RESULTS / f"fused_schedule{ending}.png", given.backward)  # fmt: skip


if __name__ == "__main__":
    main()
