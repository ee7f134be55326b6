"""Two sides timed against each other in one run, and the line that says how it went. The benchmarks here import it."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def alternate(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float = 60.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds, by `clock`, of one call of each side, over `rounds` rounds in which each is called once.

    Sides take turns, every other round in the opposite order: what disturbs the machine for a while hits all of them. Call
    each once before, to warm up. No round starts after `seconds`, except the first three.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    begin = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - begin > seconds:
            break
        for name in list(sides)[:: 1 if i % 2 == 0 else -1]:
            start = clock()
            sides[name]()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def report(
    benchmark: str, case: str, ours: float, peer: float, peer_name: str, unit: str, more_is_better: bool, **more: Any
) -> None:
    """Print one result as a line of JSON. `ratio` above 1 is better than the peer, whichever way the unit counts."""
    line = {"benchmark": benchmark, "case": case, "ours": rounded(ours), "peer": rounded(peer), "peer_name": peer_name}
    ratio = ours / peer if more_is_better else peer / ours
    print(json.dumps(line | {"unit": unit, "ratio": round(ratio, 3)} | more), flush=True)


def rounded(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def warn_if_busy() -> None:
    """Say so on stderr when other programs run: a time taken beside them is no measurement."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.5 * cores:
        print(f"warning: load average {load:.1f} on {cores} cores; times are not to be trusted", file=sys.stderr)
