"""SPIN on kernels/fused_ep.pml: the campaign of `make model-check`, mistakes made on purpose, traces of the kernels replayed.

python -m tests.kernels.spin
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kernels.schedules import TILE, Schedule, inputs

MODEL = Path(__file__).resolve().parents[2] / "kernels/fused_ep.pml"
Places = Mapping[str, int]


class Checked(NamedTuple):
    """ok: nothing was violated, and the search came to its end."""

    ok: bool
    states: int
    told: str


def require_spin() -> None:
    if not (shutil.which("spin") and shutil.which("gcc")):
        pytest.skip("needs spin and gcc")


def check(sizes: Places, search: Sequence[str] = ("-DCOLLAPSE",), run: Sequence[str] = (), model: str | None = None,
          related: bool = False, trace: str = "", optimize: str = "-O0") -> Checked:  # fmt: skip
    """Check a model, which is the repository's unless given as text. Raises RuntimeError where SPIN or gcc can't make one."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.pml").write_text(model or MODEL.read_text())
        defines = [f"-D{name}={value}" for name, value in sizes.items()] + ["-DRELATED"] * related
        if trace:
            Path(folder, "trace.pml").write_text(trace)
            defines.append("-DTRACE")
        for command in (["spin", "-a", *defines, "model.pml"],
                        ["gcc", optimize, "-w", "-DSAFETY", "-DMEMLIM=5500", *search, "-o", "pan", "pan.c"]):  # fmt: skip
            made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if made.returncode:
                raise RuntimeError(f"{' '.join(command)}: {made.stdout}{made.stderr}")
        told = subprocess.run(["./pan", "-m200000", *run], cwd=folder, capture_output=True, text=True).stdout
    states = re.search(r"(\d+) states, stored", told)
    complete = "Search not completed" not in told and "max search depth too small" not in told
    return Checked("errors: 0" in told and complete, int(states[1]) if states else 0, told)


# ---------------------------------------------------------------- traces


def layout(s: Schedule) -> tuple[list[str], int]:
    """What the launches of a schedule are of, as statements that fill the model's tables, and the most row tiles of a rank.

    Made from the routing alone; it shares no code with the kernels.
    """
    e, m, lines, most = s.experts // s.ranks, TILE.m, [], 1
    alias: dict[tuple[int, int, int, int], int] = {}
    needs: dict[tuple[int, int, int, int], int] = {}
    sources: dict[tuple[int, int, int], int] = {}
    steps = [step for step in s.steps for _ in range(1 + s.apart)]  # apart: rows out, results back
    for n, (layer, batch, back) in enumerate(steps, 1):
        lines.append(f"backward[{n}] = {int(back)}")
        ranks = inputs(s, layer, batch)
        for w in range(s.ranks):
            first_tile = 0
            holder: dict[tuple[int, int], int] = {}
            for x in range(w * e, w * e + e):
                place = first_tile * m
                for source, given in enumerate(ranks):
                    begin = int(given.rows.counts_E[:x].sum())
                    for token in given.rows.source_R[begin : begin + int(given.rows.counts_E[x])].tolist():
                        tile = place // m
                        sources[n, w, tile] = sources.get((n, w, tile), 0) | 1 << source
                        held = holder.setdefault((source, token), tile) if s.once else tile
                        if held != tile:
                            alias[n, w, tile, source] = alias.get((n, w, tile, source), 0) | 1 << held
                        key = n, source, token // TOKENS, w
                        needs[key] = needs.get(key, 0) | 1 << tile
                        place += 1
                tiles = -(-(place - first_tile * m) // m)
                lines += [f"expert[({n} * W + {w}) * TILES + {first_tile + t}] = {x - w * e}" for t in range(tiles)]
                first_tile += tiles
            lines.append(f"tiles[{n} * W + {w}] = {first_tile}")
            most = max(most, first_tile)
    lines += [f"sources[({n} * W + {w}) * TILES + {t}] = {bits}" for (n, w, t), bits in sources.items()]
    lines += [f"alias[(({n} * W + {w}) * TILES + {t}) * W + {q}] = {bits}" for (n, w, t, q), bits in alias.items()]
    lines += [f"needs[(({n} * W + {q}) * {ROOM} + {c}) * W + {w}] = {bits}" for (n, q, c, w), bits in needs.items()]
    lines += [f"token_tiles[{w}] = {-(-tokens // TOKENS)}" for w, tokens in enumerate(s.tokens)]
    return lines, most


TOKENS, ROOM = 16, 4  # tokens of a combine task; combine tasks that a trace has room for
WAITS = (3, 7, 9, 11)


def in_order(events: Sequence[Sequence[int]]) -> list[list[int]]:
    """A trace as the model would write it: of the waits of a task each once, sorted, at the end of them all.

    A flag that was seen stays as it is until the launch ends, so a wait may be told later than it was over.
    """
    waits: dict[tuple[int, int], list[list[int]]] = {}
    ordered: list[list[int]] = []
    own: dict[tuple[int, int], int] = {}
    for _, *event in events:
        rank, program, _, kind, tile, index, peer, _ = event
        held = waits.setdefault((rank, program), [])
        if kind in WAITS:
            # The row tile itself comes before tiles that hold its values.
            own.setdefault((rank, program), tile)
            held.append(event)
            continue
        if kind in (1, 13) and held:
            first = own.pop((rank, program))
            keyed = {(e[4] != first if e[3] == 7 else 0, e[6] if e[3] != 9 else 0, e[4], e[5]): e for e in held}
            ordered += [keyed[key] for key in sorted(keyed)]
            held.clear()
        if kind in (8, 9):
            event[6] = -1
        if kind == 4:
            event[6] = -1
        ordered.append(event)
    for event in ordered:
        if event[3] in (4, 5, 8, 9):
            event[6] = -1
        if event[3] == 5:
            event[4] = event[5] = -1
    return ordered


def replay(s: Schedule, events: Sequence[Sequence[int]]) -> str:
    """Empty if the model has a run with these events; else the first event that it has none with, or what the run violates."""
    lines, tiles = layout(s)
    ft, back_ft, nt, gates = (-(-size // TILE.n) for size in (2 * s.f, s.f, s.d, 2 * s.f))
    n = len(s.steps) * (1 + s.apart)
    sizes = {"W": s.ranks, "P": s.programs, "N": n, "X": s.experts // s.ranks, "BM": TILE.m, "TILES": tiles, "FT": ft, "NT": nt,
             "WAVE": s.wave, "MT": nt * back_ft + gates * nt} | ({"APART": 1} if s.apart else {})  # fmt: skip
    records = in_order(events)
    head = [
        "#undef CT",
        "#define CT token_tiles[w]",
        f"#define UPS(n) (backward[n] -> {back_ft} : {ft})",
        "#define ALIAS(n, w, t, s, u) ((alias[(((n) * W + (w)) * TILES + (t)) * W + (s)] >> (u)) & 1)",
        f"#define NEEDS(n, s, c, w, t) ((needs[(((n) * W + (s)) * {ROOM} + (c)) * W + (w)] >> (t)) & 1)",
        f"int alias[(N + 1) * W * TILES * W], needs[(N + 1) * W * {ROOM} * W];",
        "byte token_tiles[W]; bool accepted;",
        "proctype replay() {",
    ]
    body = [f"log ? {', '.join(map(str, event))};" for event in records]
    tail = ["skip }", f"inline choose() {{ {'; '.join(lines)}; run replay() }}"]
    found = check(sizes, ("-DVECTORSZ=8192",), ("-E",), trace="\n".join(head + body + tail))
    if "assertion violated" in found.told:
        violated = re.search(r"assertion violated (.*?) \(at", found.told)
        return "" if violated and "accepted" in violated[1] else f"violated: {violated[1] if violated else found.told}"
    after = [int(line) for line in re.findall(r"trace\.pml:(\d+), state", found.told)]  # which no run reaches
    if not after:
        raise RuntimeError(found.told)
    event = records[max(0, min(after) - len(head) - 2)]  # the one before: reached, but no run goes on from it
    names = ("rank", "program", "epoch", "event", "tile", "index", "peer", "value")
    return ", ".join(f"{name} {value}" for name, value in zip(names, event, strict=True))


# ---------------------------------------------------------------- mistakes

Change = tuple[str, str]
# What each is, what it changes, and in which sizes it shows. Every text must stand in the model once.
MUTATIONS: dict[str, tuple[list[Change], Places]] = {
    "plan does not wait": ([("met PARITY(w, n, i) == n; EVENT(3", "EVENT(3")], {}),
    "no wait for the plan": ([("planned[w] == n; known", "known")], {"P": 2, "N": 1}),
    "up does not wait for rows": ([("arrived TILE(w, t, s) == n;", "skip;")], {}),
    "up does not wait for rows held elsewhere": (
        [("i, j) -> wait_arrived(j, i)", "i, j) -> skip")], {"W": 1, "P": 3, "X": 2, "N": 1, "BM": 1, "WAVE": 2}),
    "down does not wait": ([(":: kind == DOWN -> wait_ready(tile)", ":: kind == DOWN -> skip")], {"P": 2, "N": 1}),
    "down waits for one column": ([("j < UPS(n) -> ready", "j < 1 -> ready")], {"P": 2, "N": 1, "FT": 2}),
    "weight does not wait": ([("i) == tile -> wait_ready(i)", "i) == tile -> skip")], {"W": 1, "P": 3, "N": 1}),
    "combine does not wait": ([("back RETURN(w, i, j, column) == n;", "skip;")], {}),
    "counts after their flag": ([("counts PARITY(i, n, w) = n; i++", "met PARITY(i, n, w) = n; i++"),
                                 ("i, n); met PARITY(i, n, w) = n; i++", "i, n); counts PARITY(i, n, w) = n; i++")], {}),
    "rows after their flag": ([("-> rows TILE(peer, tile, w) = n", "-> arrived TILE(peer, tile, w) = n"),
                               ("peer, n); arrived TILE(peer, tile, w) = n", "peer, n); rows TILE(peer, tile, w) = n")], {}),
    "h after its flag": ([("UP -> h LOCAL(w, tile, column) = n", "UP -> ready LOCAL(w, tile, column) = n"),
                          ("NIL, n); ready LOCAL(w, tile, column) = n", "NIL, n); h LOCAL(w, tile, column) = n")],
                         {"P": 2, "N": 1}),
    "slots after their flag": ([("-> slots RETURN(a, w, tile, column) = n", "-> back RETURN(a, w, tile, column) = n"),
                                ("i, n); back RETURN(i, w, tile, column) = n", "i, n); slots RETURN(i, w, tile, column) = n")],
                              {}),
    "one set of counts for all launches": ([("[((w) * 2 + (n) % 2) * W + (s)]", "[(w) * 2 * W + (s)]")], {}),
    "any flag will do": ([("arrived TILE(w, t, s) == n;", "arrived TILE(w, t, s) > 0;")], {}),
    "any returned row will do": ([("back RETURN(w, i, j, column) == n;", "back RETURN(w, i, j, column) > 0;")], {}),
    "epoch does not advance": ([("queue[w] = 0; epoch[w] = n", "queue[w] = 0")], {}),
    "queue is not reset": ([("done[w] = 0; queue[w] = 0;", "done[w] = 0;")], {}),
    "finished programs are not reset": ([("-> done[w] = 0; queue", "-> queue")], {}),
    "down before up": ([("kind = UP; tile = first", "kind = DOWN; tile = first "),
                        ("kind = DOWN; tile = first +", "kind = UP; tile = first +")], {}),
    "a launch before the last has ended": ([("epoch[w] == n - 1; ", "skip; ")], {"W": 1, "P": 2, "N": 3}),
    "a task taken twice": (
        [("queue[w]; queue[w] = queue[w] + 1;", "queue[w] }; atomic { queue[w] = number + 1;")], {"P": 2, "N": 1}),
    "rows out without a wait for them": ([("arrived TILE(w, t, s) == n;", "skip;")], {"APART": 1, "N": 2}),
    "results back without a wait for the others' plans": (
        [("met PARITY(w, n, i) == n; EVENT(3", "EVENT(3")], {"APART": 1, "N": 4}),
    "results added up without a wait": ([("back RETURN(w, i, j, column) == n;", "skip;")], {"APART": 1, "N": 2}),
    "no flag for other ranks": ([(":: HAS(n, w, tile, i) -> EVENT(10", ":: i == w && HAS(n, w, tile, i) -> EVENT(10")], {}),
}  # fmt: skip


def mutated(name: str) -> Checked:
    changes, sizes = MUTATIONS[name]
    model = MODEL.read_text()
    for old, new in changes:
        assert model.count(old) == 1, f"{name}: {old!r} stands {model.count(old)} times in the model"
        model = model.replace(old, new)
    return check({"W": 2, "P": 1, "N": 2} | sizes, model=model)


# ---------------------------------------------------------------- the campaign

ALL, SEEDS = (["-DCOLLAPSE"], ["-w26"]), range(1, 5)
# 2^24 bits, three for a state, end a search; the hash factor is bits for each state that it stored.
SAMPLE = (["-DBITSTATE", "-DT_RAND", "-DP_RAND"], ["-w24", "-k3"])
Campaign = tuple[Places, bool, tuple[list[str], list[str]]]
CAMPAIGN: dict[str, Campaign] = {
    "2 ranks, 2 programs, 2 launches, all": ({"W": 2, "P": 2, "N": 2}, False, ALL),
    "2 ranks, 1 program, 3 launches, all": ({"W": 2, "P": 1, "N": 3}, False, ALL),
    "2 ranks, 1 program, 2 launches, one row a tile, all": ({"W": 2, "P": 1, "N": 2, "BM": 1}, False, ALL),
    "2 ranks, 1 program, 1 launch, 2 experts a rank, rows shared, all": (
        {"W": 2, "P": 1, "N": 1, "X": 2, "BM": 1, "FT": 2, "NT": 2, "WAVE": 2}, False, ALL),
    "3 ranks, 1 program, 2 launches, chosen counts": ({"W": 3, "P": 1, "N": 2}, True, ALL),
    "products apart, 2 ranks, 2 programs, 2 launches, all": ({"W": 2, "P": 2, "N": 2, "APART": 1}, False, ALL),
    "products apart, 2 ranks, 1 program, 4 launches, all": ({"W": 2, "P": 1, "N": 4, "APART": 1}, False, ALL),
    "products apart, 2 ranks, 1 program, 2 launches, 2 experts a rank, rows shared, all": (
        {"W": 2, "P": 1, "N": 2, "X": 2, "BM": 1, "NT": 2, "APART": 1}, False, ALL),
    "products apart, 3 ranks, 1 program, 2 launches, chosen counts": ({"W": 3, "P": 1, "N": 2, "APART": 1}, True, ALL),
} | {
    f"3 ranks, 2 programs, 2 launches, a sample in the order of seed {seed}": (
        {"W": 3, "P": 2, "N": 2}, False, (SAMPLE[0], [*SAMPLE[1], f"-RS{seed}", f"-h{seed}"]))
    for seed in SEEDS
}  # fmt: skip


def main() -> int:
    """Prints a line a search; only those whose name has the word given, if one is."""
    bad, only = 0, " ".join(sys.argv[1:])
    for name, (sizes, related, (search, run)) in CAMPAIGN.items():
        if only not in name:
            continue
        found = check(sizes, search, run, related=related, optimize="-O2")
        sampled = re.search(r"hash factor: [^\n]*", found.told)
        memory = re.search(r"([\d.]+)\ttotal actual memory", found.told)
        bad += not found.ok
        told = "ok    " if found.ok else "CUT OFF" if "errors: 0" in found.told else "FAILED"
        print(f"{told} {name}: {found.states:,} states, {memory[1] if memory else '?'} MB{'; ' + sampled[0] if sampled else ''}",
              flush=True)  # fmt: skip
        if not found.ok:
            print(found.told)
    return bad


if __name__ == "__main__":
    sys.exit(main())
