"""Pages as a browser sees them: what is drawn, that tables sort, and that no text of theirs becomes markup."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from moesaic.launch import html_page as html
from moesaic.launch.html_page import Slice
from tests.launch.browser import Browser, needs_browser

EVIL = '"><script>window.evil = 1</script><img src=x onerror="window.evil = 2">\x01&amp;</script>'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def every_kind(name: str) -> str:
    rows = [[name, 30, 2.5], ["b", 4, math.nan], ["a10", 1000, -1.0], ["a9", 200, None]]
    return html.page(
        name,
        html.section(name, html.text(name), html.points([name]), html.table(["name", "count", name], rows)),
        html.section(
            "plots",
            html.lines({name: ([1, 2, 3, 4], [1.0, math.nan, 3.0, 4.0]), "other": ([1, 4], [2.0, 8.0])}, name, name),
            html.lines({"dots": ([0, 10, 1000], [5.0, 50.0, 0.0])}, "x", "y", log_x=True, log_y=True, dots=True),
            html.bars({name: {name: 1.0, "b": 3.0}, "second": {"b": 2.0}}, name),
            html.heat([[1.0, 2.0], [4.0, math.nan]], [name, "row"], [name, "column"], name),
            html.timeline({name: [Slice(1.0, 2.0, name, name), Slice(2.0, 5.0, "b", "t")], "empty": []}, name),
        ),
    )


@needs_browser
def test_a_page_is_whole_and_quiet(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(every_kind(EVIL))
    browser.open(path)
    assert browser.requests == [path.as_uri()] and browser.mistakes == []
    assert browser.evaluate("typeof window.evil") == "undefined"
    assert browser.evaluate("document.querySelector('h1').textContent") == EVIL
    assert browser.evaluate("document.querySelector('p').textContent") == EVIL
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.evaluate("document.querySelectorAll('script').length") == 1
    assert browser.evaluate("document.querySelectorAll('.timeline svg').length") == 2
    widths = browser.evaluate(
        "[...document.querySelectorAll('.timeline rect')].map(r => r.getBoundingClientRect().width)"
    )
    assert widths[1] == pytest.approx(3 * widths[0], rel=1e-3), "as long as they lasted"
    bars = browser.evaluate("[...document.querySelectorAll('section:nth-of-type(2) > svg')].at(-2).innerHTML")
    assert re.findall(r'width="([\d.]+)"', bars) == ["140.0", "420.0", "280.0"]


@needs_browser
def test_tables_sort_both_ways(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(every_kind("a2"))
    browser.open(path)

    def sorted_by(column: int) -> list[str]:
        browser.evaluate(f"document.querySelectorAll('th button')[{column}].click()")
        return browser.evaluate(f"[...document.querySelectorAll('tbody tr')].map(r => r.cells[{column}].textContent)")

    assert sorted_by(0) == ["a2", "a9", "a10", "b"]
    assert sorted_by(0) == ["b", "a10", "a9", "a2"]
    assert sorted_by(1) == ["4", "30", "200", "1,000"], "by value, not by letters"
    assert sorted_by(2) == ["-1", "2.5", "nan", ""]
    assert browser.evaluate("[...document.querySelectorAll('th')].map(h => h.ariaSort)") == [None, None, "ascending"]


@needs_browser
def test_a_timeline_zooms_where_the_pointer_is(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(every_kind("name"))
    browser.open(path)
    box = "document.querySelector('.timeline svg').getBoundingClientRect()"
    wheel = (
        "document.querySelector('.timeline svg').dispatchEvent(new WheelEvent('wheel', {{deltaY: {}, ctrlKey: true, "
    )
    wheel += "bubbles: true, cancelable: true, clientX: " + box + ".left + " + box + ".width / 4}}))"
    seen = "document.querySelector('.timeline svg').getAttribute('viewBox').split(' ').map(Number)"
    browser.evaluate(wheel.format(-300 * math.log(2)))
    x, _, wide, _ = browser.evaluate(seen)
    assert (x, wide) == (pytest.approx(1.5, rel=1e-2), pytest.approx(2.0)), "2 stays where it was"
    browser.evaluate(wheel.format(3000))
    assert browser.evaluate(seen) == [1, 0, 4, 1], "no further out than the whole"


def test_numbers_read_well() -> None:
    shown = [html.number(v) for v in (0, 0.0, 1234567, 1.5, 0.012344, 12345.678, 1e-9, math.nan, None, "x", 1e20)]
    assert shown == ["0", "0", "1,234,567", "1.5", "0.01234", "12,346", "1e-09", "nan", "", "x", "1e+20"]


def test_plots_mark_round_numbers_and_keep_their_extremes() -> None:
    xs = list(range(100_001))
    drawn = html.lines({"s": (xs, [float(x == 50_001) for x in xs])}, "x", "y")
    svg = ElementTree.fromstring(drawn[drawn.index("<svg") :])
    labels = [node.text for node in svg.iter("text")]
    assert {"0", "20,000", "100,000", "0.2", "1"} <= set(labels)
    (line,) = svg.iter("polyline")
    at = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    assert len(at) <= 2000 and min(y for _, y in at) == html.TOP, "one value in a hundred thousand is still seen"
    assert "nothing to draw" in html.lines({"s": ([1.0], [math.nan])}, "x", "y")


@needs_browser
def test_a_moment_of_a_timeline_is_seen_at_any_zoom(browser: Browser, tmp_path: Path) -> None:
    """Three pixels wide, a tenth of the way along a lane of hours, before zooming and after."""
    path = tmp_path / "page.html"
    path.write_text(
        html.page("p", html.timeline({"lane": [Slice(0.0, 9e3, "a", "a"), Slice(900.0, 900.0, "b", "b")]}, "s"))
    )
    browser.open(path)
    lane = "document.querySelector('.timeline svg')"
    mark = (
        f"(() => {{ const r = {lane}.querySelector('path').getBoundingClientRect(), s = {lane}.getBoundingClientRect();"
    )
    mark += " return (r.x + r.width / 2 - s.x) / s.width; })()"
    assert browser.evaluate(mark) == pytest.approx(0.1, abs=0.01)
    style = f"(() => {{ const s = getComputedStyle({lane}.querySelector('path')); return [s.strokeWidth, s.vectorEffect]; }})()"
    assert browser.evaluate(style) == ["3px", "non-scaling-stroke"]
