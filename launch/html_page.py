"""Reports as one HTML file that opens from a disk: no network, no library; tables that sort, plots as SVG.

    page("A run", section("Loss", text("..."), lines({"train": (steps, losses)}, "step", "nats a token")), ...)

Every function gives HTML, and `page` takes nothing else; names, texts and numbers are escaped here, whatever is in them. What is
drawn is in the file before a script runs: scripts only sort tables, zoom timelines and show a value under the pointer.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple
from urllib.parse import quote

# Okabe and Ito's colours, which most of the colour-blind tell apart, and three more (jfly.uni-koeln.de/color).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999933", "#882255", "#44aa99", "#777777")
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 860, 260, 70, 36, 38, 8  # of a plot, in pixels
Series = tuple[Sequence[float], Sequence[float]]


class Slice(NamedTuple):
    """A stretch of a timeline's lane. `kind` decides its colour; `title` is shown under the pointer."""

    start: float
    end: float
    kind: str
    title: str


STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --text: #222; --back: #fff }
@media (prefers-color-scheme: dark) { :root { --text: #ddd; --back: #16181b } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 1100px; margin: 2em auto;
  padding: 0 1em }
h2 { margin-top: 2em; border-bottom: 1px solid var(--line) }
.scroll { overflow: auto; max-height: 32em }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th { position: sticky; top: 0; background: var(--back); text-align: left }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer }
th[aria-sort=ascending] button::after { content: " \\2191" } th[aria-sort=descending] button::after { content: " \\2193" }
td, th { padding: 2px 10px; border-bottom: 1px solid var(--soft); white-space: nowrap } td.n { text-align: right }
th { white-space: normal; vertical-align: bottom } th button { text-align: left }
svg { max-width: 100% } svg text { font: 11px system-ui, sans-serif; fill: var(--text) }
.key span { margin-right: 1.2em; white-space: nowrap; font-size: 13px } .key i { display: inline-block; width: 11px; height: 11px;
  margin-right: 5px; border-radius: 2px }
.lane { display: flex; align-items: center; font-size: 12px } .lane b { width: 190px; font-weight: 400; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; flex: none } .lane svg { flex: 1; height: 18px; background: var(--soft);
  margin: 1px 0; min-width: 0 }
.range { margin-left: 190px; font-size: 12px; display: flex; justify-content: space-between }
"""

SCRIPT = """
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0], at = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  head.parentElement.querySelectorAll("th").forEach(th => th.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => { const cell = row.cells[at]; return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent };
  const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : typeof a === "number" ? -1
    : typeof b === "number" ? 1 : a.localeCompare(b, undefined, {numeric: true});
  [...body.rows].sort((a, b) => (up ? 1 : -1) * order(key(a), key(b))).forEach(row => body.append(row));
}));
document.querySelectorAll(".timeline").forEach(view => {
  const whole = view.dataset.range.split(" ").map(Number), names = view.querySelectorAll(".range span");
  let [from, to] = whole;
  const show = () => {
    view.querySelectorAll("svg").forEach(svg => svg.setAttribute("viewBox", `${from} 0 ${to - from} 1`));
    names[0].textContent = from.toFixed(3); names[2].textContent = to.toFixed(3);
  };
  view.addEventListener("wheel", event => {
    const svg = event.target.closest("svg");
    if (!svg || !event.ctrlKey) return;
    event.preventDefault();
    const box = svg.getBoundingClientRect(), at = from + (to - from) * (event.clientX - box.left) / box.width;
    const scale = Math.exp(event.deltaY / 300);
    from = Math.max(whole[0], at - (at - from) * scale); to = Math.min(whole[1], at + (to - at) * scale);
    show();
  }, {passive: false});
  let held = null;
  view.addEventListener("pointerdown", event => { if (event.target.closest("svg")) held = event.clientX });
  window.addEventListener("pointerup", () => { held = null });
  view.addEventListener("pointermove", event => {
    if (held === null) return;
    let by = (held - event.clientX) / view.querySelector("svg").getBoundingClientRect().width * (to - from);
    by = Math.max(whole[0] - from, Math.min(whole[1] - to, by));
    from += by; to += by; held = event.clientX;
    show();
  });
  view.addEventListener("dblclick", () => { [from, to] = whole; show() });
});
"""


def page(title: str, *parts: str) -> str:
    """A whole document. It may load nothing: its own policy forbids it."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n{''.join(parts)}<script>{SCRIPT}</script></body></html>\n"
    )


def section(heading: str, *parts: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>\n{''.join(parts)}</section>\n"


def text(*paragraphs: str) -> str:
    return "".join(f"<p>{escape(p)}</p>\n" for p in paragraphs)


def points(lines: Iterable[str]) -> str:
    return f"<ol>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ol>\n"


def links(targets: Mapping[str, str]) -> str:
    """A list of names that lead to files, given by paths relative to the page."""
    items = (f'<li><a href="{escape(quote(path))}">{escape(name)}</a></li>' for name, path in targets.items())
    return f"<ul>{''.join(items)}</ul>\n"


def number(value: Any) -> str:
    """As a person reads it: thousands apart, whole numbers whole, four digits of what has more."""
    if isinstance(value, float) and math.isfinite(value):
        if value.is_integer() and abs(value) < 1e15:
            return f"{value:,.0f}"
        if 1e-3 <= abs(value) < 1e7:
            digits = max(0, 3 - math.floor(math.log10(abs(value))))
            shown = f"{value:,.{digits}f}"
            return shown.rstrip("0").rstrip(".") if "." in shown else shown
        return f"{value:.3g}"
    return (
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else "" if value is None else str(value)
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Sorts by a column when its head is clicked: numbers by value, None and NaN last among them, texts by their letters."""
    # A long name may break where its words end, so that a wide table needs less room.
    head = "".join(f"<th><button>{escape(c).replace('_', '_<wbr>')}</button></th>" for c in columns)
    body = []
    for row in rows:
        cells = []
        for value in row:
            if isinstance(value, int | float):
                v = value if math.isfinite(value) else -math.inf if value < 0 else math.inf
                v_text = repr(float(v)).replace("inf", "Infinity")
                cells.append(f'<td class="n" data-v="{v_text}">{escape(number(value))}</td>')
            else:
                cells.append(f"<td>{escape(number(value))}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>\n'


def key(names: Sequence[str]) -> str:
    """Which colour is whose."""
    spans = (f'<span><i style="background:{colour(i)}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="key">{"".join(spans)}</div>\n'


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def lines(
    series: Mapping[str, Series], x: str, y: str, *, log_x: bool = False, log_y: bool = False, dots: bool = False
) -> str:
    """A plot of (xs, ys) by name, as lines or dots. A value that is not finite, or not above 0 on a logarithmic axis, leaves a
    gap. More than 2,000 points of a series are thinned to the least and greatest of each neighbourhood."""
    usable = {name: _usable(*xy, log_x, log_y) for name, xy in series.items()}
    runs = {name: [_thin(run) for run in found] for name, found in usable.items()}
    every = [p for found in runs.values() for run in found for p in run]
    if not every:
        return text("nothing to draw")
    to_x, x_ticks = _axis([p[0] for p in every], LEFT, WIDTH - RIGHT, log_x)
    to_y, y_ticks = _axis([p[1] for p in every], HEIGHT - BOTTOM, TOP, log_y)
    parts = [
        _line(LEFT, to_y(v), WIDTH - RIGHT, to_y(v)) + _label(LEFT - 6, to_y(v) + 4, number(v), "end") for v in y_ticks
    ]
    parts += [_label(to_x(v), HEIGHT - BOTTOM + 15, number(v), "middle") for v in x_ticks]
    parts += [_label(WIDTH / 2, HEIGHT - 6, x, "middle")]
    for i, (name, found) in enumerate(runs.items()):
        for run in found:
            if dots or len(run) == 1:
                parts += [
                    f'<circle cx="{to_x(a):.1f}" cy="{to_y(b):.1f}" r="3" fill="{colour(i)}" fill-opacity=".7">'
                    f"<title>{escape(f'{name}: {number(a)}, {number(b)}')}</title></circle>"
                    for a, b in run
                ]
            else:
                at = " ".join(f"{to_x(a):.1f},{to_y(b):.1f}" for a, b in run)
                title = f"<title>{escape(name)}</title>"
                parts.append(
                    f'<polyline points="{at}" fill="none" stroke="{colour(i)}" stroke-width="1.5">{title}</polyline>'
                )
    names = key(list(series)) if len(series) > 1 else ""
    return f"{names}<div>{escape(y)}</div>{_svg(WIDTH, HEIGHT, parts)}"


def bars(rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """A bar for each row, made of its parts one after the other."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    longest = max((sum(parts.values()) for parts in rows.values()), default=0) or 1.0
    drawn, at, width = [], 0, WIDTH - 300
    for row, parts in rows.items():
        drawn.append(_label(212, at + 13, row[:34], "end"))
        x = 220.0
        for name, value in parts.items():
            wide, tip = value / longest * width, escape(f"{row}, {name}: {number(value)} {unit}")
            drawn.append(f'<rect x="{x:.1f}" y="{at + 2}" width="{wide:.1f}" height="14" fill="{colour(names.index(name))}">'
                         f"<title>{tip}</title></rect>")  # fmt: skip
            x += wide
        drawn.append(_label(x + 5, at + 13, f"{number(float(sum(parts.values())))} {unit}", "start"))
        at += 20
    return f"{key(names)}{_svg(WIDTH, at + 4, drawn)}"


def heat(values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], unit: str) -> str:
    """A map of values, the greatest darkest."""
    top = max((v for row in values for v in row if math.isfinite(v)), default=0) or 1.0
    wide, tall = min(40.0, (WIDTH - 160) / max(1, len(columns))), 18
    drawn = []
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        drawn.append(_label(142, i * tall + 13, name[:24], "end"))
        for j, (column, v) in enumerate(zip(columns, row, strict=True)):
            tip = escape(f"{name}, {column}: {number(float(v))} {unit}")
            shade = max(0.0, v / top) if math.isfinite(v) else 0.0
            drawn.append(f'<rect x="{150 + j * wide:.1f}" y="{i * tall}" width="{wide:.1f}" height="{tall}" '
                         f'fill="{COLOURS[0]}" fill-opacity="{0.05 + 0.95 * shade:.3f}"><title>{tip}</title></rect>')  # fmt: skip
    every = max(1, math.ceil(len(columns) * 22 / (WIDTH - 160)))
    below = len(rows) * tall + 14
    drawn += [_label(150 + (j + 0.5) * wide, below, columns[j], "middle") for j in range(0, len(columns), every)]
    return _svg(WIDTH, below + 8, drawn)


def timeline(lanes: Mapping[str, Sequence[Slice]], unit: str) -> str:
    """Lanes of slices over one axis; one that ends where it starts is a mark as wide at any zoom. Ctrl and the wheel zoom, the
    pointer drags, a double click shows all again."""
    every = [s for lane in lanes.values() for s in lane]
    if not every:
        return text("nothing to draw")
    first, last = min(s.start for s in every), max(s.end for s in every)
    last = last if last > first else first + 1
    kinds = list(dict.fromkeys(s.kind for s in every))
    thin = (last - first) / 4000  # narrower could not be seen
    drawn = []
    for name, lane in lanes.items():
        rects = "".join(
            f'<rect x="{s.start:.6g}" width="{max(s.end - s.start, thin):.6g}" height="1" fill="{colour(kinds.index(s.kind))}">'
            f"<title>{escape(s.title)}</title></rect>"
            if s.end > s.start
            else f'<path d="M{s.start:.6g} 0V1" stroke="{colour(kinds.index(s.kind))}" stroke-width="3" '
            f'vector-effect="non-scaling-stroke"><title>{escape(s.title)}</title></path>'
            for s in lane
        )
        drawn.append(f'<div class="lane"><b title="{escape(name)}">{escape(name)}</b>'
                     f'<svg viewBox="{first:.9g} 0 {last - first:.9g} 1" preserveAspectRatio="none">{rects}</svg></div>'
                     )  # fmt: skip
    middle = escape(f"{unit}; ctrl and the wheel zoom, the pointer drags")
    axis = f'<div class="range"><span>{first:.3f}</span><span>{middle}</span><span>{last:.3f}</span></div>'
    return f'{key(kinds)}<div class="timeline" data-range="{first!r} {last!r}">{"".join(drawn)}{axis}</div>\n'


# ---------------------------------------------------------------- how a plot is laid out


def _usable(xs: Sequence[float], ys: Sequence[float], log_x: bool, log_y: bool) -> list[list[tuple[float, float]]]:
    """The stretches of points that can be drawn."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x) and (y > 0 or not log_y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thin(run: list[tuple[float, float]], most: int = 1998) -> list[tuple[float, float]]:
    if len(run) <= most:
        return run
    size = math.ceil(len(run) / (most // 2 - 1))
    kept = run[:1]
    for start in range(0, len(run), size):
        near = run[start : start + size]
        kept += sorted({min(near, key=lambda p: p[1]), max(near, key=lambda p: p[1])})
    return [*kept, run[-1]]


def _axis(values: Sequence[float], start: float, end: float, log: bool) -> tuple[Any, list[float]]:
    """From values to pixels, and the values that get a mark."""
    low, high = min(values), max(values)
    if log:
        low, high = math.floor(math.log10(low)), math.ceil(math.log10(high))
        high = max(high, low + 1)
        ticks = [10.0**e for e in range(low, high + 1, max(1, (high - low) // 6))]
    else:
        if high == low:
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        step = 10.0 ** math.floor(math.log10((high - low) / 4))
        step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
        ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    scale = (end - start) / (high - low)
    return lambda v: start + ((math.log10(v) if log else v) - low) * scale, ticks


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">{"".join(parts)}</svg>\n'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#8884"/>'


def _label(x: float, y: float, words: str, anchor: str) -> str:
    # What XML forbids would end the drawing.
    clean = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "?", words)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(clean)}</text>'
