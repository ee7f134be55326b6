"""The layout of Weights & Biases' panels for a project's runs, the figures of a run's report: a saved view of the project.

    python launch/wandb_panels.py entity=TEAM [project=moesaic] [name=Moesaic]
    python launch/wandb_panels.py entity=TEAM out=view.json

The first makes the view, with `pip install 'moesaic[panels]'` and a login; the second writes what it would send, offline.
A run's offline files are sent with `wandb sync run_dir/wandb/offline-run-*`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.launch import options


@dataclass(frozen=True)
class Panel:
    """Lines over `step`: one for each key of `keys`, patterns of whole keys of metrics.jsonl (or of events, event/NAME)."""

    keys: tuple[str, ...]
    log: bool = False

    def holds(self, key: str) -> bool:
        return any(re.fullmatch(pattern, key) for pattern in self.keys)


# Every figure that a run logs is in one of them; docs/report.md shows this table, and a test holds both to a run.
PANELS: dict[str, tuple[Panel, ...]] = {
    "Loss": (Panel(("loss", "val_loss")), Panel((r"val_loss/.+",)), Panel((r"data/.+/loss",)), Panel(("lr",))),
    "Speed": (Panel(("tokens_per_s",)), Panel(("mfu",)), Panel(("memory_gib",)), Panel(("tokens",))),
    "Health": (Panel(("grad_norm",), log=True), Panel(("skipped", "spikes")), Panel(("rewound_from", r"event/.+"))),
    "Experts": (
        Panel(("moe/load_max_over_mean",)),
        Panel(("moe/load_cv", "moe/dead_fraction")),
        Panel(("moe/load_entropy", "moe/router_entropy")),
        Panel(("moe/dropped", "moe/added", "moe/unrouted", "moe/padding")),
        Panel(("moe/wire_inter_bytes", "moe/wire_intra_bytes")),
    ),
    "Layers": tuple(
        Panel((rf"moe/layer\d+/{name}",))
        for name in ("load_max_over_mean", "load_cv", "dead_fraction", "load_entropy", "router_entropy", "dropped",
                     "added", "unrouted", "padding", "wire_inter_bytes", "wire_intra_bytes")
    ),
    "Data": (Panel(("data/wait",)), Panel(("data/tokens_per_s",)), Panel((r"data/.+/tokens", "data/passed_over"))),
}  # fmt: skip


def table() -> str:
    """`PANELS` as the Markdown table of docs/report.md."""
    rows = ["| section | panels: lines over `step` |", "|---|---|"]
    for head, panels in PANELS.items():
        told = ["`" + "`, `".join(panel.keys) + "`" + (", logarithmic" if panel.log else "") for panel in panels]
        rows.append(f"| {head} | {'; '.join(told)} |")
    return "\n".join(rows)


@dataclass
class Options:
    """entity: whose project; project: which; name: of the view; out: a file to write instead of sending."""

    entity: str = ""
    project: str = "moesaic"
    name: str = "Moesaic"
    out: str = ""


def workspace(choice: Options) -> Any:
    """The view as wandb-workspaces has it. Raises ValueError without that package."""
    try:
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports.v2 import LinePlot
    except ImportError as error:
        raise ValueError(
            f"launch/wandb_panels.py: needs wandb-workspaces: pip install 'moesaic[panels]' ({error})"
        ) from error

    def plot(panel: Panel) -> Any:
        fixed = [key for key in panel.keys if re.escape(key).replace("\\", "") == key]
        which = {"y": fixed} if len(fixed) == len(panel.keys) else {"metric_regex": "|".join(panel.keys)}
        return LinePlot(x="step", title=", ".join(panel.keys), log_y=panel.log, **which)

    sections = [
        workspaces.Section(name=head, is_open=head != "Layers", panels=[plot(p) for p in panels])
        for head, panels in PANELS.items()
    ]
    return workspaces.Workspace(entity=choice.entity, project=choice.project, name=choice.name, sections=sections)


def main(choice: Options) -> None:
    if not choice.entity:
        raise ValueError("entity=: must name the user or team of the project")
    view = workspace(choice)
    if choice.out:
        spec = view._to_model().model_dump(by_alias=True, mode="json")
        Path(choice.out).write_text(json.dumps(spec, indent=1), encoding="utf-8")
        print(f"wrote {choice.out}")
        return
    try:
        view.save()
    except Exception as error:  # wandb's own, of many kinds
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"entity={choice.entity} project={choice.project}: the view was not made ({told})") from error
    print(f"made {view.url}")


if __name__ == "__main__":
    options.run(main, Options, __doc__)
