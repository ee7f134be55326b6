"""`make parity`: the whole matrix, printed as it runs, and its tables in docs/parity.md."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from importlib.metadata import version
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, assume, given, settings

from tests.parallel.cells import (
    AXES,
    LAYOUTS,
    REFUSED,
    WORKLOADS,
    Cell,
    drawn_cells,
    full_table,
    impossible,
    pairwise_table,
    refused,
)
from tests.parallel.parity import TOLERANCE, Outcome, Unfit, pools, run_cell
from tests.parallel.pool import Pool

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
BEGIN, END = "<!-- written by make parity -->\n", "<!-- end of what make parity writes -->\n"
PoolOf = Callable[[int], Pool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drawn", type=int, default=100, help="configurations drawn at random")
    parser.add_argument("--only", default="", help="layouts whose name contains this; writes no page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()

    def listed(cells: Sequence[Cell]) -> list[Cell]:  # cells of one reference after another
        chosen = [cell for cell in cells if options.only in cell.layout.name]
        return sorted(chosen, key=lambda cell: (cell.layout.world, repr(cell.reference())))

    table = list(run(listed(full_table())))
    pairs = list(run(listed(pairwise_table())))
    no = list(run(listed([Cell(layout) for layout in REFUSED])))
    print("once more, in new processes", flush=True)
    again = {o.cell.layout.name: o.digest for o in run([o.cell for o in table if o.cell.workload == "uniform"])}
    with pools() as pool:
        drawn = [] if options.only else list(run_drawn(options.drawn, pool))
    other = [
        o.cell.layout.name for o in table if o.cell.workload == "uniform" and o.digest != again[o.cell.layout.name]
    ]
    outcomes = [*table, *pairs, *no, *drawn]
    minutes = (time.monotonic() - begin) / 60
    lines = [*layout_table(table, again), "", *axis_table(pairs), "", *details(pairs, drawn), "", *left_out(outcomes)]
    print("\n".join(lines))
    if not options.only:
        text = PAGE.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(
            "\n".join([before + BEGIN, *head(minutes), "", *lines, "", summary(outcomes), "", END.rstrip() + after])
        )
    for outcome in outcomes:
        if outcome.status == "red":
            print(f"red: {outcome.cell}\n{outcome.reason}")
    for name in other:
        print(f"red: {name}: other bits in new processes")
    print(summary(outcomes))
    sys.exit(any(outcome.status == "red" for outcome in outcomes) or bool(other))


def run(cells: Sequence[Cell]) -> Iterator[Outcome]:
    """In new processes every 64 cells: what engines leave behind in a process makes the next cells take longer, at last twice."""
    for first in range(0, len(cells), 64):
        with pools() as pool:
            for i, cell in enumerate(cells[first : first + 64], first + 1):
                start = time.monotonic()
                outcome = run_cell(pool(cell.layout.world), cell)
                tell(f"{i}/{len(cells)}", outcome, time.monotonic() - start)
                yield outcome


def run_drawn(count: int, pool: PoolOf) -> list[Outcome]:
    found: dict[Cell, Outcome] = {}

    def check(cell: Cell) -> None:
        start = time.monotonic()
        try:
            found[cell] = run_cell(pool(cell.layout.world), cell)
        except Unfit:
            assume(False)
        tell(f"drawn {len(found)}/{count}", found[cell], time.monotonic() - start)

    rules = settings(
        max_examples=count, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    rules(given(drawn_cells())(check))()
    return list(found.values())


def tell(number: str, outcome: Outcome, seconds: float) -> None:
    print(f"[{number}] {outcome.status:7} {outcome.error:.0e} {seconds:4.1f} s  {outcome.cell}", flush=True)
    if outcome.status != "green":
        print(f"    {outcome.reason}", flush=True)


def shown(outcome: Outcome) -> str:
    return f"{outcome.error:.0e}".replace("e-0", "e-") if outcome.status == "green" else f"**{outcome.status}**"


def layout_table(table: Sequence[Outcome], again: dict[str, str]) -> list[str]:
    """Layouts and workloads: the largest difference of anything compared."""
    found = {(o.cell.layout.name, o.cell.workload): o for o in table}
    lines = [
        "| layout | ranks | " + " | ".join(WORKLOADS) + " | same seed twice |",
        "|---" * (len(WORKLOADS) + 3) + "|",
    ]
    for layout in LAYOUTS:
        row = [found.get((layout.name, workload)) for workload in WORKLOADS]
        if not any(row):
            continue
        uniform = found[layout.name, "uniform"]
        same = uniform.digest == again[layout.name] and not any(o and "other bits" in o.reason for o in row)
        cells = [shown(o) if o else "-" for o in row]
        lines.append(
            " | ".join([f"| {layout.name}", str(layout.world), *cells, ("same bits" if same else "**other**") + " |"])
        )
    return lines


def axis_table(pairs: Sequence[Outcome]) -> list[str]:
    """Values of the other axes: how many cells have them, and their largest difference."""
    lines = ["| axis | value | cells | green | refused | largest difference |", "|---|---|---|---|---|---|"]
    for name, values in AXES.items():
        for value in values:
            having = [o for o in pairs if getattr(o.cell, name) == value]
            status = [o.status for o in having]
            worst = max((o.error for o in having if o.status == "green"), default=float("nan"))
            lines.append(
                f"| {name} | {value} | {len(having)} | {status.count('green')} | {status.count('refused')} | {worst:.0e} |"
            )
    return lines


def details(pairs: Sequence[Outcome], drawn: Sequence[Outcome]) -> list[str]:
    lines = []
    for title, outcomes in (("pairwise", pairs), ("drawn at random", drawn)):
        lines += [f"<details><summary>The {len(outcomes)} cells, {title}</summary>", ""]
        lines += ["| cell | largest difference | of |", "|---|---|---|"]
        lines += [f"| {o.cell} | {shown(o)} | {o.where} |" for o in outcomes]
        lines += ["", "</details>", ""]
    return lines[:-1]


def left_out(outcomes: Sequence[Outcome]) -> list[str]:
    """What knobs refused, in the cells that were run and in pairs that the table leaves out, and the other pairs left out."""
    lines = ["| refused | with |", "|---|---|"]
    lines += [f"| {o.cell} | `{o.reason}` |" for o in outcomes if o.status == "refused"]
    axes: dict[str, Sequence[Any]] = {"layout": LAYOUTS, "workload": WORKLOADS} | AXES
    pairs = [((a, x), (b, y)) for a, b in combinations(axes, 2) for x, y in product(axes[a], axes[b])]
    grouped: dict[tuple[str, bool], dict[tuple[str, str], list[str]]] = {}
    for (a, x), (b, y) in pairs:
        if why := impossible({a: x, b: y}):
            by_knob = refused({a: x, b: y}) is not None
            if by_knob:
                try:
                    Cell(**{"layout": LAYOUTS[1], a: x, b: y}).config()
                except ValueError as error:
                    # The same rule with another value of the pair has another line: the first one stands for all.
                    why = next(
                        (line for (line, _) in grouped if line.split("=")[0] == str(error).split("=")[0]), str(error)
                    )
            first = x.name if a == "layout" else str(x)
            grouped.setdefault((why, by_knob), {}).setdefault((a, f"{b} {y}"), []).append(first)

    def of(knob: bool) -> list[str]:
        rows = []
        for (why, by_knob), group in grouped.items():
            merged: dict[tuple[str, ...], list[str]] = {}
            for (a, second), firsts in group.items():
                merged.setdefault((a, *firsts), []).append(second)
            for (a, *firsts), seconds in merged.items():
                if by_knob == knob:
                    rows.append(
                        f"| {' or '.join(seconds)}, with {a} {'; '.join(firsts)} | {f'`{why}`' if knob else why} |"
                    )
        return rows

    return [*lines, *of(True), "", "| not to be had | because |", "|---|---|", *of(False)]


def head(minutes: float) -> list[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    return [
        f"`make parity`, {date.today()}, {os.cpu_count()} cores, {minutes:.0f} minutes; Python {platform.python_version()}, "
        f"{packages}, gloo. Numbers are the largest difference of anything compared, relative to the largest entry of its "
        f"tensor; a cell is green up to {TOLERANCE:.0e}."
    ]


def summary(outcomes: Sequence[Outcome]) -> str:
    status = [outcome.status for outcome in outcomes]
    counts = ", ".join(f"{name} {status.count(name)}" for name in ("green", "red", "refused"))
    return f"cells run {len(status)}, {counts}"


if __name__ == "__main__":
    main()
