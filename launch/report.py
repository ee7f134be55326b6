"""One HTML file that shows a run, or several side by side. It opens from a disk, and loads nothing.

python launch/report.py run_dir=runs/a                    writes runs/a/report.html; every run does so when it ends
python launch/report.py run_dir=runs/a,runs/b out=both.html
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from moesaic.launch import html_page as html
from moesaic.launch import options
from moesaic.moe.config import require

Record = dict[str, Any]
HEAT_COLUMNS = 120  # steps of a heat map: more could not be told apart
ENDS = ("end", "stopped")

# What has a plot of its own, in this order. Of all other figures there is one plot each, under the head of their group.
PLOTS = {
    "Loss": ("nats a token", ("loss", "val_loss")),
    "Learning rate": ("", ("lr",)),
    "Throughput": ("tokens/s of all ranks", ("tokens_per_s",)),
    "Model FLOP utilization": ("part of the peak", ("mfu",)),
    "Gradient norm": ("before clipping", ("grad_norm",)),
    "Experts' load": ("rows of the busiest expert over the mean, worst layer", ("moe/load_max_over_mean",)),
    "Choices dropped and added": ("a token", ("moe/dropped", "moe/added", "moe/unrouted", "moe/padding")),
    "Memory": ("GiB of the rank that has held most", ("memory_gib",)),
    "Steps left out, jumps of the loss": ("so far", ("skipped", "spikes")),
}


@dataclass
class Options:
    """run_dir: a run, or several with commas; out: the file to write (report.html in the first of them)."""

    run_dir: str = ""
    out: str = ""


@dataclass
class Run:
    """What a run left: `records` of metrics.jsonl, `events` of events.jsonl, `config` as flat knobs, files of `profile`."""

    name: str
    folder: Path
    records: list[Record]
    events: list[Record]
    config: dict[str, Any]
    profile: list[Path]

    def series(self, key: str, x: str) -> html.Series:
        """Values of a figure; what JSON could not hold is NaN, and leaves a gap."""
        found = [r for r in self.records if key in r and x in r]
        return [r[x] for r in found], [math.nan if r[key] is None else float(r[key]) for r in found]

    def last(self, key: str) -> Any:
        return next((r[key] for r in reversed(self.records) if key in r), None)


def main(choice: Options) -> None:
    folders = [Path(part.strip()).expanduser() for part in choice.run_dir.split(",") if part.strip()]
    require(bool(folders), f"run_dir={choice.run_dir}: must name a run, or several with commas")
    out = Path(choice.out).expanduser() if choice.out else folders[0] / "report.html"
    write(folders, out)
    print(out)


def at_end(run_dir: Path) -> None:
    """The report of a run that ends. What can't be read or written is a warning: the run has done its work."""
    try:
        write([run_dir], run_dir / "report.html")
    except (ValueError, OSError) as error:
        print(f"warning: no report: {error}", file=sys.stderr, flush=True)


def write(folders: Sequence[Path], out: Path) -> None:
    """Raises ValueError for a folder that is no run, or a line that is no record; OSError where `out` can't be written."""
    names = [folder.resolve().name for folder in folders]
    names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text(page([read(f, name) for f, name in zip(folders, names, strict=True)], out.resolve().parent))
    partial.replace(out)


def read(folder: Path, name: str) -> Run:
    config = folder / "config.yaml"
    require(config.is_file(), f"run_dir={folder}: must be a run; it has no config.yaml")
    try:
        knobs = yaml.safe_load(config.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{config}: can't be read: {' '.join(str(error).split())}") from None
    require(isinstance(knobs, dict), f"{config}: must hold the knobs of a run")
    records, events = (lines(folder / f"{kind}.jsonl") for kind in ("metrics", "events"))
    profile = sorted(path for path in (folder / "profile").rglob("*") if path.is_file())
    return Run(name, folder, records, events, dict(flat(knobs, "")), profile)


def lines(path: Path) -> list[Record]:
    """Objects of a file with one a line; none without it. A last line without its end is of a run that writes it just now."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True) if path.exists() else [], 1):
        try:
            record = json.loads(line)
            require(isinstance(record, dict) and isinstance(record.get("step"), int), "no step")
            found.append(record)
        except ValueError:
            require(not line.endswith("\n"), f"{path}: line {number} is no record")
    return found


def flat(knobs: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, value in knobs.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# ---------------------------------------------------------------- the page


def page(runs: Sequence[Run], beside: Path) -> str:
    """`beside`: the folder of the page, from which its links lead."""
    several = len(runs) > 1
    x = "tokens" if several else "step"  # runs with other batches meet at the same tokens
    title = " and ".join(run.name for run in runs) if several else f"Run {runs[0].name}"
    return html.page(
        title,
        html.section("Summary", summary(runs)),
        html.section("Events", *(part for run in runs for part in (life(run), events(run)))),
        *(plot(head, unit, keys, runs, x) for head, (unit, keys) in PLOTS.items()),
        html.section("Experts' load over steps and layers", *(load_map(run) for run in runs)),
        *others(runs, x),
        html.section("Configuration", configuration(runs)),
        html.section("Profile", *(links(run, beside) for run in runs)),
    )


def summary(runs: Sequence[Run]) -> str:
    heads = [
        "run",
        "step",
        "tokens",
        "loss",
        "val_loss",
        "least val_loss",
        "tokens/s",
        "MFU",
        "GiB",
        "skipped",
        "launches",
        "ended",
    ]
    rows = []
    for run in runs:
        evaluations = [v for v in run.series("val_loss", "step")[1] if math.isfinite(v)]
        speeds = [median(v) if (v := run.series(key, "step")[1]) else None for key in ("tokens_per_s", "mfu")]
        launches = sum(e["event"] == "start" for e in run.events)
        rows.append([run.name, run.last("step"), run.last("tokens"), run.last("loss"), run.last("val_loss"),
                     min(evaluations, default=None), *speeds, run.last("memory_gib"), run.last("skipped"), launches,
                     run.events[-1]["event"] if run.events and run.events[-1]["event"] in ENDS else "no"])  # fmt: skip
    return html.table(heads, rows) + html.text("tokens/s and MFU: the median of what was logged.")


def clock(event: Record) -> str:
    return datetime.fromtimestamp(event["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")


def events(run: Run) -> str:
    rows: list[list[Any]] = []
    launched = False
    for event in run.events:
        more = {k: v for k, v in event.items() if k not in ("time", "event", "step")}
        told = ", ".join(f"{k} {html.number(v)}" for k, v in more.items() if v != "")
        if event["event"] == "start" and launched:
            told += "; the launch before was killed, or died"
        launched = event["event"] not in ENDS
        rows.append([run.name, clock(event), event["step"], event["event"], told])
    return html.table(["run", "UTC", "step", "event", ""], rows) if rows else html.text(f"{run.name}: no events.jsonl")


def life(run: Run) -> str:
    """A lane of launches, from the first event of each to its last, and a lane of each other kind of event; in minutes."""
    if not run.events:
        return ""
    first = run.events[0]["time"]
    lanes: dict[str, list[html.Slice]] = {f"{run.name} launches": []}
    launch: list[Record] = []
    for event, after in zip(run.events, [*run.events[1:], {"event": "start"}], strict=True):
        launch.append(event)
        at = (event["time"] - first) / 60
        if event["event"] not in ("start", *ENDS):
            lane = lanes.setdefault(f"{run.name} {event['event']}", [])
            lane.append(html.Slice(at, at, event["event"], f"step {event['step']}, {clock(event)}"))
        if after["event"] == "start":
            began = (launch[0]["time"] - first) / 60
            told = f"steps {launch[0]['step']} to {event['step']}, {at - began:.1f} minutes, {launch[0].get('ranks')} ranks"
            lanes[f"{run.name} launches"].append(html.Slice(began, at, "launch", told))
            launch = []
    return html.timeline(lanes, "minutes since the first launch; Ctrl and the wheel zoom")


def plot(head: str, unit: str, keys: Sequence[str], runs: Sequence[Run], x: str) -> str:
    """A section with the figures `keys`, none where no run has one: of one run in one plot, of several in a plot for each figure,
    in which a run has the colour that it has everywhere."""
    keys = [key for key in keys if any(run.series(key, x)[0] for run in runs)]
    if not keys:
        return ""
    if len(runs) == 1:
        drawn = [({key: runs[0].series(key, x) for key in keys}, unit)]
    else:
        told = [f"{key}, {unit}".rstrip(", ") if len(keys) > 1 else unit for key in keys]
        drawn = [({run.name: run.series(key, x) for run in runs}, y) for key, y in zip(keys, told, strict=True)]
    return html.section(head, *(html.lines(series, x, y, log_y=head == "Gradient norm") for series, y in drawn))


def others(runs: Sequence[Run], x: str) -> Iterable[str]:
    """Every other figure that is a number, those of single layers left out, by what stands before its first "/"."""
    shown = {"step", "tokens", *(key for _, keys in PLOTS.values() for key in keys)}
    keys = dict.fromkeys(k for run in runs for r in run.records for k, v in r.items() if isinstance(v, int | float))
    left = [k for k in keys if k not in shown and not k.startswith("moe/layer")]
    for group in sorted({key.partition("/")[0] for key in left}):
        drawn = [html.lines({run.name: run.series(key, x) for run in runs}, x, key)
                 for key in left if key.partition("/")[0] == group]  # fmt: skip
        yield html.section(f"Figures of {group}", *drawn)


def load_map(run: Run) -> str:
    """Rows of the busiest expert of a layer over the mean, layers down, steps across; neighbouring steps by their greatest."""
    records = [r for r in run.records if "moe/layer0/load_max_over_mean" in r]
    layers = 0
    while records and f"moe/layer{layers}/load_max_over_mean" in records[-1]:
        layers += 1
    if not layers:
        return html.text(f"{run.name}: no MoE layers, or no step was logged")
    each = math.ceil(len(records) / HEAT_COLUMNS)
    parts = [records[i : i + each] for i in range(0, len(records), each)]

    def worst(part: Sequence[Record], layer: int) -> float:
        return max(float(r.get(f"moe/layer{layer}/load_max_over_mean") or math.nan) for r in part)

    values = [[worst(part, layer) for part in parts] for layer in range(layers)]
    names = [f"layer {layer}" for layer in range(layers)]
    told = html.text(
        f"{run.name}: the busiest expert's rows over the mean; 1 is even, the darkest is {max(map(max, values)):.2f}."
    )
    return told + html.heat(values, names, [str(part[-1]["step"]) for part in parts], "times the mean")


def configuration(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.config))

    def told(run: Run, name: str) -> str:
        return json.dumps(run.config[name]) if name in run.config else "-"

    rows = [[name, *(told(run, name) for run in runs)] for name in names]
    if len(runs) == 1:
        return html.table(["knob", "value"], rows)
    heads = ["differs", "knob", *(run.name for run in runs)]
    differing = [["yes" if len(set(row[1:])) > 1 else "", *row] for row in rows]
    return html.table(heads, sorted(differing, key=lambda row: row[0] == ""))


def links(run: Run, beside: Path) -> str:
    if not run.profile:
        return html.text(f"{run.name}: none was made")
    paths = {
        f"{run.name}: {path.relative_to(run.folder)}": os.path.relpath(path.resolve(), beside) for path in run.profile
    }
    return html.links(paths)


if __name__ == "__main__":
    options.run(main, Options, __doc__)
