"""profile=collectives on two ranks: every file is there, the numbers add up, the page opens, and the losses are those of a run
without it."""

import csv
import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from moesaic.launch import chakra_trace, cli, comm_bench
from moesaic.launch.collectives_report import add_up, advise
from moesaic.parallel.collectives import BOTH, KERNEL
from moesaic.parallel.hardware import load
from tests.launch.browser import Browser, needs_browser
from tests.launch.chakra_reader import chakra_nodes
from tests.launch.launches import PROGRAM, Place, finished, launch, losses

SHORT = "train.steps=4 train.checkpoint_every=0 train.eval_every=0".split()


@pytest.fixture(scope="module")
def run_dir(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profiled")
    more = ["profile=collectives", "profile_steps=[2,4]", "wandb.mode=offline"]
    finished(folder, place.knobs(folder / "run", *SHORT, *more))
    return folder / "run"


def table(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "profile" / "collectives.csv").open() as file:
        return list(csv.DictReader(file))


def test_all_files_are_there_and_add_up(run_dir: Path) -> None:
    profile = run_dir / "profile"
    names = {path.relative_to(profile).as_posix() for path in profile.rglob("*") if path.is_file()}
    assert names == {"collectives.csv", "summary.json", "trace.json", "report.html", "layers.png", "bandwidth.png",
                     "imbalance.png", "memory.png", "kineto/rank_0.json.gz", "kineto/rank_1.json.gz",
                     "execution_trace/rank_0.json", "execution_trace/rank_1.json", "execution_trace/rank_0.et",
                     "execution_trace/rank_1.et"}  # fmt: skip
    rows, summary = table(run_dir), json.loads((profile / "summary.json").read_text())
    assert {row["rank"] for row in rows} == {"0", "1"} and {row["step"] for row in rows} == {"2", "4"}
    assert summary["steps"] == [2, 4] and summary["ranks"] == 2 and len(summary["advice"]) == 3
    sent, received = (
        sum(int(row[f"{way}_{hop}_bytes"]) for row in rows for hop in ("intra", "inter"))
        for way in ("sent", "received")
    )
    assert sent == received > 0
    assert summary["sent_bytes"] == summary["sent_by_rows"] == summary["received_by_rows"] == sent / 2
    by_layer = sum(layer["sent_intra_bytes"] + layer["sent_inter_bytes"] for layer in summary["layers"])
    assert by_layer == sent / 2
    for row in rows:
        assert float(row["exposed_ms"]) + float(row["overlapped_ms"]) == pytest.approx(float(row["time_ms"]))
        assert 0 <= float(row["wait_ms"]) <= float(row["time_ms"]) * (1 + 1e-9)
    for i in (0, 1):
        purposes = {row["purpose"] for row in rows if row["layer"] == f"blocks.{i}"}
        assert purposes >= {"counts", "dispatch", "combine", "dispatch_grad", "combine_grad", "weights", "gradients"}
        assert float(summary["imbalance"][f"blocks.{i}"]["expert_max_over_mean"]) >= 1
    events = json.loads((profile / "trace.json").read_text())["traceEvents"]
    lanes = {event["args"]["name"] for event in events if event.get("name") == "thread_name"}
    assert any("blocks.0" in lane for lane in lanes) and any("blocks.1" in lane for lane in lanes)
    page = (profile / "report.html").read_text()
    for i, phase in itertools.product((0, 1), ("forward", "backward")):  # each layer's lane has both
        assert re.search(rf"<title>blocks\.{i}\S* {phase}</title>", page)
    assert f"{sent // 2:,}" in page
    nodes = json.loads((profile / "execution_trace" / "rank_1.json").read_text())["nodes"]
    exchanges = [node["inputs"]["shapes"] for node in nodes if node["name"] == "shared_memory::all_to_all_single"]
    assert exchanges and all(len(shapes) == 2 for shapes in exchanges)  # what arrives, what leaves
    for rank in (0, 1):  # Chakra's has the collectives of the last step, and their bytes
        last = [row for row in rows if (row["rank"], row["step"]) == (str(rank), "4")]
        found = [
            n
            for n in chakra_nodes(profile / "execution_trace" / f"rank_{rank}.et")
            if n["type"] == chakra_trace.COLLECTIVE
        ]
        assert len(found) == sum(int(row["calls"]) for row in last)
        assert sum(n["comm_size"] for n in found) == sum(int(row["buffer_bytes"]) for row in last)
        assert sum(n["sent_intra"] for n in found) == sum(int(row["sent_intra_bytes"]) for row in last)
    assert json.loads(gzip.decompress((profile / "kineto" / "rank_0.json.gz").read_bytes()))["traceEvents"]


def test_tables_and_plots_are_in_wandb(run_dir: Path) -> None:
    """Each under a name of its own: a plot must not take a table's."""
    kept = [path.relative_to(path.parents[2]).as_posix() for path in run_dir.glob("wandb/**/media/*/profile/*")]
    found = {re.sub(r"_\d+_[0-9a-f]+\..*", "", name) for name in kept}
    assert found == {f"table/profile/{name}" for name in ("collectives", "layers", "things")} | {
        f"images/profile/{name}_plot" for name in ("layers", "bandwidth", "imbalance", "memory")
    }


def test_it_changes_no_loss(run_dir: Path, place: Place, tmp_path: Path) -> None:
    finished(tmp_path, place.knobs(tmp_path / "plain", *SHORT))
    assert losses(run_dir) == losses(tmp_path / "plain")
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_folder_that_cannot_be_written_is_one_line_of_both_ranks(place: Place, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("")
    with launch(tmp_path, place.knobs(tmp_path / "run", *SHORT, "profile=collectives")) as running:
        assert running.wait() == 1
        lines = [line for line in running.text().splitlines() if line.startswith("error:")]
    assert lines == [f"error: profile=collectives: {tmp_path}/run/profile: can't be written (Not a directory)"]


@needs_browser
def test_the_page_opens_without_a_network(run_dir: Path, tmp_path: Path) -> None:
    page = run_dir / "profile" / "report.html"
    with Browser(tmp_path) as browser:
        browser.open(page)
        assert browser.requests == [page.as_uri()] and browser.mistakes == []
        titles = browser.evaluate("[...document.querySelectorAll('h2')].map(h => h.textContent)")
        assert (
            "By layer" in titles and "Bandwidth" in titles and any(t.startswith("Timeline of rank 0") for t in titles)
        )
        assert browser.evaluate("document.querySelectorAll('.timeline rect').length") > 20


def test_kernels_of_the_fused_path_are_in_it(place: Place, tmp_path: Path) -> None:
    small = ["train.steps=1", "train.seq_len=8", "train.global_batch=2", "model.n_layers=1", "train.eval_every=0"]
    knobs = place.knobs(
        tmp_path / "run", *small, "parallel.expert_path=fused", "profile=collectives", "profile_steps=[1]"
    )
    finished(tmp_path, knobs)
    rows = [row for row in table(tmp_path / "run") if row["operation"] == KERNEL]
    assert {row["purpose"] for row in rows} == {"counts", "dispatch", "slots", "combine", "flags"}
    assert all(row["layer"] == "blocks.0" and row["phase"] == BOTH for row in rows)
    assert sum(int(row["sent_intra_bytes"]) for row in rows if row["purpose"] == "dispatch") > 0


@pytest.mark.parametrize(("knobs", "line"), [
    (["profile=all"], "profile=all: must be one of none, collectives"),
    (["profile=collectives", "profile_steps=[]"], r"profile_steps=\[\]: must hold steps"),
    (["profile=collectives", "profile_steps=[0,2]"], r"profile_steps=\[0, 2\]: must hold steps, the first of a launch being 1"),
    (["profile=collectives", "profile_steps=[50]", "train.steps=40"], "must hold one of the run's steps, train.steps=40"),
])  # fmt: skip
def test_bad_knobs_are_one_line(knobs: list[str], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        cli.compose(["recipe=tiny_moe", *knobs])


def row_of(layer: str, purpose: str, wait: float, transfer: float, whom: int, inter: int = 0) -> dict[str, Any]:
    zero = dict.fromkeys(("sent_intra_bytes", "received_intra_bytes", "received_inter_bytes", "overlapped_ms"), 0.0)
    return zero | {"layer": layer, "purpose": purpose, "thing": purpose, "calls": 1, "wait_ms": wait,
                   "exposed_ms": wait + transfer, "time_ms": wait + transfer, "waited_for": whom,
                   "sent_inter_bytes": inter, "rank_max_over_mean": 1.0,
                   "expert_max_over_mean": 1.0}  # fmt: skip


def test_advice_names_the_most_expensive() -> None:
    rows = [row_of("blocks.0", "weights", 0.0, 30.0, 0, 10), row_of("blocks.1", "weights", 0.0, 50.0, 0, 10),
            row_of("blocks.1", "gradients", 60.0, 5.0, 3)]  # fmt: skip
    summary = {"step_ms": 1000.0, "things": add_up(rows, 1, 1, "thing"), "imbalance": {}, "expert_ranks": 2}
    first, second, third = advise(summary, rows)
    assert "transfer: weights, most in blocks.1" in first and "parallel.reshard=never" in first
    assert "waiting: gradients" in second and "rank 3" in second
    assert "transfer: gradients" in third


def test_advice_asks_for_balance_where_the_late_rank_is_the_full_one() -> None:
    """Expert groups of two ranks; in blocks.1 the second of each has 1.5 times its share."""
    loads = {"blocks.1": {"expert_max_over_mean": 2.0, "rank_max_over_mean": 1.5, "busiest": 1}}
    told = {}
    for whom in (3, 2):
        rows = [row_of("blocks.1", "gradients", 60.0, 5.0, whom)]
        summary = {"step_ms": 100.0, "things": add_up(rows, 1, 1, "thing"), "imbalance": loads, "expert_ranks": 2}
        told[whom] = advise(summary, rows)[0]
    assert "model.router.balance_coef: it has 1.50 times its share of rows in blocks.1" in told[3]
    assert "a look at rank 2's machine" in told[2]


# ---------------------------------------------------------------- launch/comm_bench.py


def test_links_measured_here_are_hardware_for_the_planner(tmp_path: Path) -> None:
    program = PROGRAM.parent / "comm_bench.py"
    finished(tmp_path, [f"out={tmp_path}/here.yaml", "largest_mb=0.05", "repeats=1"], program=program)
    machine = load(str(tmp_path / "here.yaml"))
    assert machine.name == "here" and machine.node == 2 and machine.hops["intra"].gb_s > 0
    assert machine.hops["inter"] == load("cpu").hops["inter"], "there was none to measure"
    with (tmp_path / "here.csv").open() as file:
        measured = list(csv.DictReader(file))
    assert {row["operation"] for row in measured} == set(comm_bench.OPERATIONS)
    assert all(float(row["seconds"]) > 0 for row in measured)


def test_the_fit_finds_the_link_that_made_the_times() -> None:
    times = [
        comm_bench.Timed("intra", operation, ranks, size, factor * latency * 20e-6 + moved * size / 5e9)
        for ranks, latency in ((2, 1), (8, 3))
        for size in (2**12, 2**18, 2**24)
        for operation, factor, moved in (
            ("all_gather", 1, (ranks - 1) / ranks),
            ("all_reduce", 2, 2 * (ranks - 1) / ranks),
        )
    ]
    link, error = comm_bench.fit(times)
    assert link.gb_s == pytest.approx(5, rel=1e-3) and link.us == pytest.approx(20, rel=1e-3) and error < 1e-3


def test_shares_follow_zipf() -> None:
    assert comm_bench.shares(100, 4, 0) == [25, 25, 25, 25]
    found = comm_bench.shares(1000, 3, 1)
    assert sum(found) == 1000 and found[0] > found[1] > found[2]


@pytest.mark.parametrize("folder", ["a_file", "a_file/below", "/proc/none"])
def test_a_folder_that_cannot_be_written_is_known_before_any_time_is_taken(tmp_path: Path, folder: str) -> None:
    (tmp_path / "a_file").write_text("")
    out = f"{tmp_path / folder}/x.yaml"
    with pytest.raises(ValueError, match=r"can't be written \(") as error:
        comm_bench.check_folder(out)
    assert str(error.value).startswith(f"out={out}: ")
    comm_bench.check_folder(f"{tmp_path}/new/x.yaml")
    assert list((tmp_path / "new").iterdir()) == []
