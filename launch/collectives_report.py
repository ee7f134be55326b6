"""profile=collectives: traces the chosen steps of a run, and writes what they say into run_dir/profile/.

collectives.csv       each collective of each layer, by rank and step (moesaic.parallel.collectives.rows has the columns)
summary.json          totals, by layer, by what it is for; host work and kernel queues by layer; imbalance; memory; advice
report.html, *.png    the same to look at; layers, bandwidth, imbalance, memory
trace.json            for ui.perfetto.dev or chrome://tracing: two lanes a layer, of the last chosen step
kineto/              of each rank and the last chosen step: torch's own trace
execution_trace/     of the same: rank_N.json, torch's, of every operator; rank_N.et, Chakra's, of collectives and work between
"""

import csv
import gzip
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ExecutionTraceObserver, ProfilerActivity, profile

from moesaic.launch import chakra_trace
from moesaic.launch import html_page as html
from moesaic.launch.metrics import WandbRun
from moesaic.launch.schema import Config
from moesaic.launch.startup import together
from moesaic.parallel import collectives as c
from moesaic.parallel import kineto, trace
from moesaic.parallel.engine import Engine

MIB = 2**20
DRAWN = 8  # ranks in trace.json and in the plots of memory
ROWS, TOLD = "rows to experts and back", "what is told about rows"
THINGS = {"counts": TOLD, "slots": TOLD, "slots_grad": TOLD} | dict.fromkeys(
    ("dispatch", "combine", "combine_grad", "dispatch_grad"), ROWS
)
PARTS = {"transfer": "transfer_ms", "wait": "wait_ms", "overlapped": "overlapped_ms"}
Row = dict[str, Any]


class Profile:
    """`begin` and `end` stand around every step; outside the chosen ones they do nothing, and nothing is wrapped. Collective."""

    def __init__(
        self, config: Config, engine: Engine, device: torch.device, experts: int, done: int, wandb: WandbRun | None,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """experts: ranks over which they are divided. done: steps before this launch."""
        self.config, self.engine, self.device, self.experts = config, engine, device, experts
        self.wandb, self.say, self.rank = wandb, say, dist.get_rank()
        self.folder = Path(config.run_dir) / "profile"
        self.chosen = {done + n for n in config.profile_steps if done + n <= config.train.steps}
        if not self.chosen:
            left = config.train.steps - done
            say(f"warning: profile_steps={config.profile_steps}: {left} steps are left, none of these is traced")
            return
        together(self._make_folders)
        node = config.parallel.node_size
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if node == "auto" else int(node)
        self.recorder = c.Recorder(local)
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else each start and stop is a line of every rank
        self.activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        with profile(activities=self.activities):
            pass  # the first start is the slow one
        self.offset = c.clock_offset()
        self.open: ExitStack | None = None
        self.mine: Row = {"rows": [], "steps": {}, "sent": Counter(), "unseen": Counter()}
        self.loads: dict[int, torch.Tensor] = {}

    def _make_folders(self) -> None:
        try:
            for name in ("kineto", "execution_trace"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
                (self.folder / name / f"rank_{self.rank}.json").touch()
                (self.folder / name / f"rank_{self.rank}.json").unlink()
        except OSError as error:
            raise ValueError(f"profile=collectives: {self.folder}: can't be written ({error.strerror})") from None

    def begin(self, step: int) -> None:
        if step not in self.chosen:
            return
        self.step, self.open = step, ExitStack()
        self.recorder.clear()
        observer = None
        if step == max(self.chosen):
            path = self.folder / "execution_trace" / f"rank_{self.rank}.json"
            observer = ExecutionTraceObserver().register_callback(str(path))
        self.tracer = self.open.enter_context(
            profile(
                activities=self.activities,
                profile_memory=True,
                record_shapes=observer is not None,
                execution_trace_observer=observer,
            )
        )
        self.open.enter_context(c.recording(self.recorder, self.engine))
        self.began = time.monotonic()

    def end(self, rows_LE: torch.Tensor) -> None:
        """rows_LE: this rank's rows by MoE layer and expert."""
        if self.chosen and self.open is not None:
            with trace.unhurried():
                self._end(self.open, rows_LE)

    def _end(self, tracing: ExitStack, rows_LE: torch.Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - self.began
        tracing.close()
        self.open = None
        events, mine, path = self.recorder.events, self.mine, self.folder / "kineto" / f"rank_{self.rank}.json.gz"
        try:
            self.tracer.export_chrome_trace(str(path))
            with gzip.open(path, "rt") as file:
                reading = kineto.read(json.load(file)["traceEvents"], int(self.device.type == "cuda"))
        except (OSError, EOFError, ValueError, RuntimeError) as error:  # a full disk must not end the training
            print(f"warning: rank {self.rank}: {path}: can't be written, and so not read ({error})", flush=True)
            reading = kineto.Reading()
        shift = kineto.place(events, reading)
        c.exchange(events, self.recorder.groups, self.offset, self.device)
        rows_LE = rows_LE.clone()
        dist.all_reduce(rows_LE)
        self.loads[self.step] = rows_LE.cpu()
        names = {g: getattr(group, "group_desc", g) for g, group in self.recorder.groups.items()}
        names = {g: "all ranks" if n == "default_pg" else n.removeprefix("mesh_") for g, n in names.items()}
        mine["rows"] += c.rows(events, self.step, self.rank, names)
        mine["steps"][self.step] = 1e3 * seconds
        mine["sent"] += self.recorder.sent
        mine["unseen"] += self.recorder.unseen
        mine["work"] = [{"module": m, "phase": p} | vars(work) for (m, p), work in reading.work.items()]
        zero = 1e6 * self.began
        mine["peak"] = max(reading.memory, key=lambda m: m[1], default=None)
        if self.rank < DRAWN:
            mine["memory"] = [((t + shift - zero) / 1e3, size) for t, size, *_ in reading.memory]
            mine["spans"] = [(m, p, b + shift - zero, e - b) for m, p, b, e in reading.spans]
            mine["calls"] = [self._drawn(e, zero) for e in events]
        if self.step == max(self.chosen):
            path = self.folder / "execution_trace" / f"rank_{self.rank}.et"
            try:
                path.write_bytes(
                    chakra_trace.execution_trace(events, self.rank, names, self.began, self.began + seconds)
                )
            except OSError as error:
                print(f"warning: rank {self.rank}: {path}: can't be written ({error})", flush=True)
            self.finish()

    def _drawn(self, e: c.Event, zero: float) -> Row:
        title = " ".join(filter(None, (e.module, e.purpose)))
        told = {"operation": e.operation, "phase": e.phase, "sent": e.sent, "received": e.received, "ranks": e.ranks,
                "wait_us": 1e6 * e.wait, "waited_for": e.behind, "exposed_us": 1e6 * e.exposed}  # fmt: skip
        begin = 1e6 * e.began - zero
        return {"layer": e.layer, "title": title, "begin": begin, "us": 1e6 * e.time, "told": told}

    def finish(self) -> None:
        """Write what was traced, if anything was and is not written yet."""
        if not self.chosen or not self.mine["steps"]:
            return
        told: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(self.mine, told if self.rank == 0 else None)
        self.chosen = set()
        if self.rank == 0:
            try:
                self._write(told)
            except OSError as error:  # a full disk must not end the training
                self.say(f"warning: {self.folder}: the profile can't be written ({error.strerror or error})")

    def _write(self, ranks: list[Row]) -> None:
        rows = [row for told in ranks for row in told["rows"]]
        loads = imbalance(self.config, self.loads, self.experts)
        for row in rows:
            load = loads.get(row["layer"], {})
            row |= {name: load.get(name) for name in ("expert_max_over_mean", "rank_max_over_mean")}
        summary = summarize(rows, ranks, loads, self.device.type, self.experts)
        with (self.folder / "collectives.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["rank"])
            writer.writeheader()
            writer.writerows(rows)
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        (self.folder / "trace.json").write_text(json.dumps(chrome_trace(ranks)))
        counts_LE = torch.stack([*self.loads.values()]).sum(dim=0).tolist()
        (self.folder / "report.html").write_text(
            report(self.config.name, summary, rows, ranks, counts_LE), encoding="utf-8"
        )
        pictures = draw(self.folder, summary, rows, ranks, counts_LE)
        if self.wandb and self.config.wandb.mode != "disabled":
            import wandb

            tables: Row = {}
            for name, found in (("collectives", rows), ("layers", summary["layers"]), ("things", summary["things"])):
                columns = list(dict.fromkeys(k for row in found for k in row))
                tables[f"profile/{name}"] = wandb.Table(columns, [[row.get(k) for k in columns] for row in found])
            self.wandb.log(
                {"step": self.step} | tables | {f"profile/{p.stem}_plot": wandb.Image(str(p)) for p in pictures}
            )
        steps = ", ".join(map(str, summary["steps"]))
        self.say(f"profile of step {steps}: {summary['step_ms']:.1f} ms a step, {summary['exposed_ms']:.1f} in collectives; "
                 f"{summary['sent_bytes'] / 1e6:,.2f} MB sent by all ranks a step")  # fmt: skip
        for line in summary["advice"]:
            self.say(f"  {line}")
        self.say(f"  {self.folder}/report.html, collectives.csv, summary.json, trace.json")


def imbalance(config: Config, loads: dict[int, torch.Tensor], experts: int) -> dict[str, Row]:
    """Of each MoE layer by name: rows of the busiest expert, and of the busiest rank of an expert group, over the mean; and which
    rank of such a group that is."""
    if not loads:
        return {}
    counts_LE = torch.stack([*loads.values()]).sum(dim=0).double()
    counts_LW = counts_LE.view(len(counts_LE), experts, -1).sum(dim=2)
    of_experts, of_ranks = ((n / n.mean(dim=1, keepdim=True).clamp(min=1e-9)).tolist() for n in (counts_LE, counts_LW))
    first = config.model.n_dense_layers
    return {
        f"blocks.{first + i}": {
            "expert_max_over_mean": max(e),
            "rank_max_over_mean": max(r),
            "busiest": r.index(max(r)),
        }
        for i, (e, r) in enumerate(zip(of_experts, of_ranks, strict=True))
    }


def add_up(rows: Sequence[Row], steps: int, ranks: int, *keys: str) -> list[Row]:
    """Sums of rows that agree in `keys`: bytes and calls of all ranks a step, times of a rank a step. The longest first."""
    sums: dict[tuple[Any, ...], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        found = sums[tuple(row[k] for k in keys)]
        for name in ("calls", "sent_intra_bytes", "sent_inter_bytes", "received_intra_bytes", "received_inter_bytes"):
            found[name] += row[name] / steps
        found["wait_ms"] += min(row["wait_ms"], row["exposed_ms"]) / steps / ranks
        for name in ("time_ms", "exposed_ms", "overlapped_ms"):
            found[name] += row[name] / steps / ranks
    made: list[Row] = []
    for names, found in sums.items():
        transfer = max(0.0, found["exposed_ms"] - found["wait_ms"])
        made.append(dict(zip(keys, names, strict=True)) | dict(found) | {"transfer_ms": transfer})
    return sorted(made, key=lambda row: -row["exposed_ms"])


def summarize(rows: list[Row], ranks: list[Row], loads: dict[str, Row], device: str, experts: int) -> Row:
    steps = sorted(ranks[0]["steps"])
    share = 1 / len(steps) / len(ranks)
    for row in rows:
        row["thing"] = THINGS.get(row["purpose"], row["purpose"])
    count = len(steps), len(ranks)
    layers, things = add_up(rows, *count, "layer"), add_up(rows, *count, "thing")
    whole = (add_up(rows, *count) or [Counter()])[0]
    late: Counter[int] = Counter()
    for row in rows:
        if row["waited_for"] is not None:
            late[row["waited_for"]] += row["wait_ms"]
    work: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for told in ranks:
        for w in told["work"]:
            layer = c.attribute("", w["module"])[0]
            for name, value in w.items():
                if name not in ("module", "phase"):
                    work[layer, w["phase"]][name] += value / len(ranks)
    peaks = [{"rank": r, "bytes": t["peak"][1], "module": t["peak"][2], "phase": t["peak"][3]}
             for r, t in enumerate(ranks) if t["peak"]]  # fmt: skip
    summary: Row = {
        "steps": steps, "ranks": len(ranks), "expert_ranks": experts, "device": device,
        "step_ms": sum(sum(t["steps"].values()) for t in ranks) * share,
        "exposed_ms": whole["exposed_ms"], "wait_ms": whole["wait_ms"], "overlapped_ms": whole["overlapped_ms"],
        "calls": whole["calls"],
        # counted as they were asked for, apart from the rows
        "sent_bytes": sum(sum(t["sent"].values()) for t in ranks) / len(steps),
        "sent_by_rows": whole["sent_intra_bytes"] + whole["sent_inter_bytes"],
        "received_by_rows": whole["received_intra_bytes"] + whole["received_inter_bytes"],
        "calls_without_bytes": dict(sum((t["unseen"] for t in ranks), Counter())),
        "waited_for_ms": {str(r): ms * share for r, ms in late.most_common(8)},
        "layers": [row | loads.get(row["layer"], {}) for row in layers], "things": things,
        "host": [{"layer": layer, "phase": phase} | dict(w) for (layer, phase), w in work.items()],
        "imbalance": loads, "memory_peaks": peaks,
        "memory_is": "bytes allocated" if device == "cuda" else "bytes allocated since tracing began, the model left out",
        "launches": "kernels and their queue (TKLQT)" if device == "cuda" else
                    "a CPU launches no kernels: operators, their time, and the time between them instead",
    }  # fmt: skip
    return summary | {"advice": advise(summary, rows)}


def advise(summary: Row, rows: list[Row]) -> list[str]:
    """The three most expensive things, and what to try."""
    share = 100 / max(summary["step_ms"], 1e-9)
    found: list[tuple[float, str]] = []
    for thing in summary["things"]:
        name, mine = thing["thing"], [row for row in rows if row["thing"] == thing["thing"]]
        layers = add_up(mine, 1, 1, "layer")
        where = f"most in {layers[0]['layer']}" if len(layers) > 1 else layers[0]["layer"]
        inter, intra = thing["sent_inter_bytes"], thing["sent_intra_bytes"]
        if name == ROWS:
            try_it = (
                "parallel.expert_path=two_hop, or groups of experts in the router"
                if inter > intra
                else "fewer ranks in parallel.expert"
            )
        elif name == TOLD:
            try_it = "a larger train.micro_batch: these are many small messages, and each micro-batch sends them again"
        elif name == "weights":
            try_it = (
                "parallel.reshard=never if memory allows, or a larger train.micro_batch: each gathers the weights again"
            )
        elif name == "gradients":
            try_it = "a larger train.micro_batch: each adds gradients over the ranks" + (
                ", and parallel.replicate keeps part of that inside a node" if inter else ""
            )
        else:
            try_it = "nothing here: it is small, and its time is that of the slowest rank or the link's latency"
        found.append((thing["transfer_ms"], f"transfer: {name}, {where}; try {try_it}"))
        late: Counter[int] = Counter()
        for row in mine:
            if row["waited_for"] is not None:
                late[row["waited_for"]] += row["wait_ms"]
        if late.total():
            whom, much = late.most_common(1)[0]
            slow = max(add_up(mine, 1, 1, "layer"), key=lambda row: row["wait_ms"])["layer"]
            load = summary["imbalance"].get(slow, {"rank_max_over_mean": 1.0, "busiest": 0})
            if load["rank_max_over_mean"] >= 1.1 and whom % summary["expert_ranks"] == load["busiest"]:
                over = load["rank_max_over_mean"]
                try_it = f"a higher model.router.balance_coef: it has {over:.2f} times its share of rows in {slow}"
            elif much > 0.7 * late.total():
                try_it = f"a look at rank {whom}'s machine: it is late, and rows are not why"
            else:
                try_it = "nothing in the layout: the ranks are late in turn, as on a shared machine"
            share_of = 100 * much / late.total()
            found.append(
                (thing["wait_ms"], f"waiting: {name}, {where}, for rank {whom} in {share_of:.0f}% of it; try {try_it}")
            )
    best = sorted(found, reverse=True)[:3]
    return [f"{i}. {ms:.2f} ms a step, {ms * share:.1f}%, {text}" for i, (ms, text) in enumerate(best, 1) if ms > 0]


# ---------------------------------------------------------------- what is drawn


def chrome_trace(ranks: list[Row]) -> Row:
    """A process for each rank; for each layer a lane of its modules and one of its collectives; memory as a counter."""
    made: list[Row] = []
    for rank, told in enumerate(ranks[:DRAWN]):
        lanes: dict[str, int] = {}

        def lane(name: str, lanes: dict[str, int] = lanes) -> int:
            return lanes.setdefault(name, len(lanes))

        made.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
        for module, phase, begin, us in told["spans"]:
            where = lane(c.attribute("", module)[0] if module else "phases")
            made.append(
                {"ph": "X", "pid": rank, "tid": where, "ts": begin, "dur": us, "cat": phase, "name": module or phase}
            )
        made += [{"ph": "X", "pid": rank, "tid": lane(f"{e['layer']}: collectives"), "ts": e["begin"], "dur": e["us"],
                  "cat": "collective", "name": e["title"], "args": e["told"]} for e in told["calls"]]  # fmt: skip
        made += [
            {"ph": "C", "pid": rank, "ts": 1e3 * ms, "name": "memory", "args": {"bytes": size}}
            for ms, size in told["memory"]
        ]
        for name, at in lanes.items():
            common = {"ph": "M", "pid": rank, "tid": at}
            made.append(common | {"name": "thread_name", "args": {"name": name}})
            made.append(common | {"name": "thread_sort_index", "args": {"sort_index": at}})
    return {"traceEvents": made, "displayTimeUnit": "ms"}


def speeds(rows: list[Row]) -> dict[str, tuple[list[float], list[float]]]:
    """By operation: bytes of a call, and bus bandwidth in GB/s."""
    found: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for row in rows:
        if row["bus_gb_s"]:
            xs, ys = found[row["operation"]]
            xs.append(row["buffer_bytes"] / row["calls"])
            ys.append(row["bus_gb_s"])
    return dict(sorted(found.items()))


def by_layer(summary: Row) -> dict[str, dict[str, float]]:
    def order(row: Row) -> tuple[int, int, str]:
        place = row["layer"].split()[0].removeprefix("blocks.")
        return (0, int(place), row["layer"]) if place.isdecimal() else (1, 0, row["layer"])

    return {
        row["layer"]: {part: row[name] for part, name in PARTS.items()} for row in sorted(summary["layers"], key=order)
    }


def records(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(k for row in rows for k in row))
    return html.table(columns, [[row.get(k) for k in columns] for row in rows])


def report(name: str, summary: Row, rows: list[Row], ranks: list[Row], counts_LE: list[list[int]]) -> str:
    lanes: dict[str, list[html.Slice]] = defaultdict(list)
    drawn = ranks[0]
    for module, phase, begin, us in drawn["spans"]:
        layer = c.attribute("", module)[0] if module else "phases"
        # Backward has no ranges of modules: the operators of their parts stand for them.
        if not module or module.count(".") < 2 or phase == "backward":
            kind = phase if phase in ("forward", "backward") or not module else "other"
            lanes[layer].append(html.Slice(begin / 1e3, (begin + us) / 1e3, kind, f"{module} {phase}"))
    for e in drawn["calls"]:
        title = f"{e['title']}: {e['told']['operation']}, {e['us'] / 1e3:.3f} ms, sent {sum(e['told']['sent'].values()):,} bytes"
        lanes[e["layer"]].append(html.Slice(e["begin"] / 1e3, (e["begin"] + e["us"]) / 1e3, "collective", title))
    experts = list(map(str, range(len(counts_LE[0]) if counts_LE else 0)))
    shares = [[n * len(row) / max(1, sum(row)) for n in row] for row in counts_LE]
    memory = {f"rank {r}": ([at for at, _ in t["memory"]], [size / MIB for _, size in t["memory"]])
              for r, t in enumerate(ranks[:DRAWN]) if t["memory"]}  # fmt: skip
    steps = ", ".join(map(str, summary["steps"]))
    totals = (
        "step_ms",
        "exposed_ms",
        "wait_ms",
        "overlapped_ms",
        "calls",
        "sent_bytes",
        "sent_by_rows",
        "received_by_rows",
    )
    return html.page(
        f"{name}: collectives of step {steps}",
        html.text(f"{summary['ranks']} ranks, {summary['device']}. Times are of a rank and step, bytes and calls of all ranks. "
                  "Of a collective, transfer is what is exposed and no wait for a later rank."),
        html.points(line.partition(". ")[2] for line in summary["advice"]),
        html.section("In all", html.table(("figure", "a step"), [(k, summary[k]) for k in totals])),
        html.section("By layer", html.bars(by_layer(summary), "ms"), records(summary["layers"])),
        html.section("What it is for", records(summary["things"])),
        html.section(f"Timeline of rank 0, step {summary['steps'][-1]}", html.timeline(lanes, "ms")),
        html.section("Bandwidth", html.lines(speeds(rows), "bytes of a call", "bus bandwidth, GB/s",
                                             log_x=True, log_y=True, dots=True)),
        html.section("Imbalance", html.text("Rows of each expert over the mean, by MoE layer."),
                     html.heat(shares, list(summary["imbalance"]), experts, "times the mean"),
                     html.table(("layer", "busiest expert over mean", "busiest rank over mean", "which of its group"),
                                [(k, *v.values()) for k, v in summary["imbalance"].items()])),
        html.section("Memory", html.text(f"{summary['memory_is']}, during the step."), html.lines(memory, "ms", "MiB"),
                     html.table(("rank", "bytes", "module", "phase"), [list(p.values()) for p in summary["memory_peaks"]])),
        html.section("Host and kernels", html.text(f"{summary['launches']}. Of the last chosen step."),
                     records(summary["host"])),
        html.section("Every collective", records(rows[:5000])),
    )  # fmt: skip


def draw(folder: Path, summary: Row, rows: list[Row], ranks: list[Row], counts_LE: list[list[int]]) -> list[Path]:
    """The plots as PNG files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made: list[Path] = []

    def save(name: str, figure: Any, axes: Any, x: str, y: str, key: bool = True) -> None:
        axes.set(xlabel=x, ylabel=y)
        if key and axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False)
        figure.savefig(folder / f"{name}.png", dpi=90, bbox_inches="tight")
        pyplot.close(figure)
        made.append(folder / f"{name}.png")

    bars = by_layer(summary)
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.28 * len(bars)))
    left = [0.0] * len(bars)
    for i, part in enumerate(PARTS):
        wide = [parts[part] for parts in bars.values()]
        axes.barh(list(bars), wide, left=left, color=html.colour(i), label=part)
        left = [a + b for a, b in zip(left, wide, strict=True)]
    axes.invert_yaxis()
    save("layers", figure, axes, "ms a step", "")
    figure, axes = pyplot.subplots(figsize=(8, 3.5))
    for i, (name, (xs, ys)) in enumerate(speeds(rows).items()):
        axes.loglog(xs, ys, "o", ms=4, alpha=0.7, color=html.colour(i), label=name)
    save("bandwidth", figure, axes, "bytes of a call", "bus bandwidth, GB/s")
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.3 * len(counts_LE)))
    if counts_LE:
        shown = axes.imshow(
            [[n * len(row) / max(1, sum(row)) for n in row] for row in counts_LE], aspect="auto", cmap="Blues", vmin=0
        )
        figure.colorbar(shown, label="rows over the mean")
        axes.set_yticks(range(len(counts_LE)), list(summary["imbalance"]))
    save("imbalance", figure, axes, "expert", "")
    figure, axes = pyplot.subplots(figsize=(8, 3))
    for i, told in enumerate(ranks[:DRAWN]):
        at, sizes = zip(*(told["memory"] or [(0, 0)]), strict=True)
        axes.plot(at, [size / MIB for size in sizes], lw=1, color=html.colour(i), label=f"rank {i}")
    save("memory", figure, axes, "ms", summary["memory_is"].replace("bytes", "MiB"))
    return made
