"""The page of a run: what it shows is what the run recorded, in a browser; several runs side by side; what is no run."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moesaic.launch import report
from tests.launch.browser import Browser, needs_browser
from tests.launch.launches import Place, here, records


@pytest.fixture(scope="module")
def run_dir(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was told to end after 8 steps, and went on to 12, with what a profile would leave."""
    run_dir = tmp_path_factory.mktemp("runs") / "first <run>"
    for steps in (8, 12):
        here(*place.knobs(run_dir, f"train.steps={steps}", "train.checkpoint_every=4", "train.eval_every=4"))
    (run_dir / "profile").mkdir()
    (run_dir / "profile" / "step #4.html").write_text("<p>profile</p>")
    return run_dir


class Words(HTMLParser):
    """The words of a page, a table's rows as lists, and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.heads: list[str] = []
        self.links: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag == "h2":
            self.heads.append("")
        if tag == "a":
            self.links.append(dict(attrs)["href"])

    def handle_data(self, data):
        if self.inside == "td":
            self.rows[-1][-1] += data
        if self.inside == "h2":
            self.heads[-1] += data

    def handle_endtag(self, tag):
        self.inside = ""


def test_every_run_ends_with_its_report(run_dir: Path):
    words = Words((run_dir / "report.html").read_text())
    (summary,) = [row for row in words.rows if row[:3] == ["first <run>", "12", f"{12 * 4 * 64:,}"]]
    found = records(run_dir)
    assert summary[-2:] == ["2", "end"], "two launches, the last one ended"
    assert float(summary[5]) == pytest.approx(min(r["val_loss"] for r in found if "val_loss" in r), rel=1e-3)
    events = [(int(row[2]), row[3]) for row in words.rows if len(row) == 5 and row[0] == "first <run>"]
    assert events == [(0, "start"), (4, "checkpoint"), (8, "checkpoint"), (8, "end"),
                      (8, "start"), (12, "checkpoint"), (12, "end")]  # fmt: skip
    assert {*report.PLOTS, "Events", "Configuration", "Profile"} <= set(words.heads)
    assert ["train.global_batch", "4"] in words.rows
    assert all(0.01 < r["memory_gib"] < 100 for r in found if "loss" in r)


def test_a_launch_that_was_killed_is_told(run_dir: Path, tmp_path: Path):
    copy = tmp_path / "killed"
    copy.mkdir()
    (copy / "config.yaml").write_bytes((run_dir / "config.yaml").read_bytes())
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    (copy / "events.jsonl").write_text(
        "\n".join(json.dumps(e) for e in events if e["event"] != "end") + '\n{"time": 1, "ste'
    )
    report.write([copy], tmp_path / "page.html")
    words = Words((tmp_path / "page.html").read_text())
    assert [row[4] for row in words.rows if len(row) == 5 and row[3] == "start"][1].endswith("was killed, or died")
    assert next(row[-2:] for row in words.rows if row[:1] == ["killed"]) == ["2", "no"]


@needs_browser
def test_a_browser_draws_what_was_recorded(run_dir: Path, tmp_path: Path):
    report.main(report.Options(run_dir=str(run_dir)))
    with Browser(tmp_path) as browser:
        browser.open(run_dir / "report.html")
        assert browser.requests == [(run_dir / "report.html").as_uri()] and browser.mistakes == []
        section = "[...document.querySelectorAll('section')].find(s => s.querySelector('h2').textContent === {!r})"
        curve = browser.evaluate(section.format("Loss") + ".querySelector('polyline').getAttribute('points')")
        heights = [float(p.split(",")[1]) for p in curve.split()]
        losses = [r["loss"] for r in records(run_dir) if "loss" in r]
        assert len(heights) == len(losses) == 12
        scale = (heights[-1] - heights[0]) / (losses[-1] - losses[0])
        assert heights == pytest.approx([heights[0] + scale * (loss - losses[0]) for loss in losses], abs=0.2)
        cells = browser.evaluate(
            f"[...{section.format('Experts’ load over steps and layers'.replace('’', chr(39)))}.querySelectorAll('rect')]"
            ".map(r => [r.querySelector('title').textContent, Number(r.getAttribute('fill-opacity'))])"
        )
        expected = {(f"layer {n}", str(r["step"])): r[f"moe/layer{n}/load_max_over_mean"]
                    for n in range(2) for r in records(run_dir) if "loss" in r}  # fmt: skip
        assert len(cells) == len(expected)
        for title, opacity in cells:
            value = expected[tuple(title.split(":")[0].split(", "))]
            assert opacity == pytest.approx(0.05 + 0.95 * value / max(expected.values()), abs=1e-3), title
        link = "document.querySelector('section:last-of-type a')"
        assert browser.evaluate(f"decodeURIComponent({link}.pathname)").endswith("first <run>/profile/step #4.html")
        before = browser.evaluate("document.querySelector('.timeline svg').getAttribute('viewBox')")
        browser.evaluate("document.querySelector('.timeline svg').dispatchEvent(new WheelEvent('wheel', "
                         "{deltaY: -300, ctrlKey: true, bubbles: true, cancelable: true, clientX: 400}))")  # fmt: skip
        assert browser.evaluate("document.querySelector('.timeline svg').getAttribute('viewBox')") != before


def test_runs_side_by_side(run_dir: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    knobs = (run_dir / "config.yaml").read_text().replace("global_batch: 4", "global_batch: 8")
    (other / "config.yaml").write_text(knobs)
    (other / "metrics.jsonl").write_text('{"step": 1, "tokens": 512, "loss": null, "data/wait": 0.5}\n{"step": 2, "tok')
    report.main(report.Options(run_dir=f"{run_dir},{other}", out=str(tmp_path / "both.html")))
    words = Words((tmp_path / "both.html").read_text())
    rows = {row[1]: row for row in words.rows if row and row[0] in ("yes", "") and len(row) == 4}
    assert rows["train.global_batch"] == ["yes", "train.global_batch", "4", "8"]
    assert rows["train.seq_len"][0] == "" and "Figures of data" in words.heads
    (link,) = words.links
    assert (tmp_path / link.replace("%20", " ").replace("%23", "#").replace("%3C", "<").replace("%3E", ">")).is_file()
    assert other.name in [row[0] for row in words.rows if row]


def test_a_run_has_its_colour_everywhere(run_dir: Path, tmp_path: Path):
    """Of two runs, the first without an evaluation: each figure has a plot of its own, and the second its colour in all."""
    short = tmp_path / "short"
    short.mkdir()
    (short / "config.yaml").write_bytes((run_dir / "config.yaml").read_bytes())
    kept = [json.dumps(record) for record in records(run_dir) if "val_loss" not in record]
    (short / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    report.main(report.Options(run_dir=f"{short},{run_dir}", out=str(tmp_path / "both.html")))
    text = (tmp_path / "both.html").read_text()
    colours = {name: set(re.findall(rf'stroke="(#\w+)" stroke-width="1.5"><title>{name}</title>', text))
               for name in ("short", "first &lt;run&gt;")}  # fmt: skip
    assert list(map(len, colours.values())) == [1, 1] and not set.intersection(*colours.values())
    assert "<div>val_loss, nats a token</div>" in text and "<div>moe/dropped, a token</div>" in text


def test_what_is_no_run(run_dir: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"run_dir=: must name a run"):
        report.main(report.Options())
    with pytest.raises(ValueError, match="must be a run; it has no config.yaml"):
        report.main(report.Options(run_dir=str(tmp_path)))
    (tmp_path / "config.yaml").write_text("name: a")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is no record"):
        report.main(report.Options(run_dir=str(tmp_path)))
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "metrics.jsonl").write_text("")
    report.main(report.Options(run_dir=str(tmp_path)))
    assert math.isfinite((tmp_path / "report.html").stat().st_size)
