"""What a run records in W&B, killed and resumed, against its metrics.jsonl; the panels against the figures of a run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from moesaic.launch import wandb_panels
from moesaic.parallel import checkpoint
from tests.launch.launches import ROOT, Place, finished, kill, launch, records, until
from tests.launch.test_metrics import wandb_files, wandb_records


def test_a_killed_run_that_goes_on_is_whole_in_wandb_and_each_figure_has_its_panel(place: Place, tmp_path: Path):
    run_dir = tmp_path / "run"
    sources = f"data.files=[a={place.folder}/corpus/*.txt,b={place.folder}/held_out.txt]"
    knobs = [k for k in place.knobs(run_dir, "train.checkpoint_every=20", "train.eval_every=20") if "files" not in k]
    knobs = [k for k in knobs if k != "wandb.mode=disabled"] + [sources, "data.weights=[3,1]", "data.val_fraction=0.3"]
    with launch(tmp_path, [*knobs, "wandb.mode=offline", "train.steps=100000"]) as running:
        until(lambda: bool(checkpoint.complete_checkpoints(str(run_dir / "checkpoints"))), 120)
        for pid in [*running.ranks(), running.agent.pid]:
            kill(pid)
    finished(tmp_path, [*knobs, "wandb.mode=offline", f"train.steps={records(run_dir)[-1]['step'] + 5}"])

    told = [
        r["history"]["item"] for file in wandb_files(run_dir) for r in wandb_records(file) if r["type"] == "history"
    ]
    assert len(wandb_files(run_dir)) == 2
    for record in records(run_dir):
        assert any(record.items() <= item.items() for item in told), record

    keys = {key for item in told for key in item if key != "step" and not key.startswith("_")}
    assert {"event/start", "data/a/loss", "val_loss/b", "moe/layer1/wire_intra_bytes", "loss"} <= keys
    for key in keys:
        panels = [panel for section in wandb_panels.PANELS.values() for panel in section if panel.holds(key)]
        assert len(panels) == 1, key


def test_the_page_shows_these_panels():
    assert wandb_panels.table() in (ROOT / "docs" / "report.md").read_text()


@pytest.mark.skipif(importlib.util.find_spec("wandb_workspaces") is None, reason="needs wandb-workspaces")
def test_the_view_that_would_be_sent(tmp_path: Path):
    wandb_panels.main(wandb_panels.Options(entity="team", out=str(tmp_path / "view.json")))
    view = json.loads((tmp_path / "view.json").read_text())
    sections = view["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections[: len(wandb_panels.PANELS)]] == list(wandb_panels.PANELS)
    for section, panels in zip(sections, wandb_panels.PANELS.values(), strict=False):
        assert [panel["config"]["xAxis"] for panel in section["panels"]] == ["step"] * len(panels)
    assert sections[0]["panels"][0]["config"]["metrics"] == ["loss", "val_loss"]


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"^entity=: must name"):
        wandb_panels.main(wandb_panels.Options())
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ValueError, match=r"needs wandb-workspaces: pip install"):
        wandb_panels.main(wandb_panels.Options(entity="team"))
