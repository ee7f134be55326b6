"""Does token rounding cost quality? Validation loss of small models, paired by seed: plain top-K against rounded experts.

    python benchmarks/study_rounding.py [steps=300] [seeds=3] [tile=128] [jobs=2]      (`make study-rounding`)

Every run is `launch/train.py recipe=tiny_moe` in one process of one thread; all rules of a seed start from the same weights and
see the same batches. Tile 128 is a GPU's; a batch of 8 x 256 tokens gives an expert 512 rows on average, 4 tiles. One file a run
in benchmarks/results/rounding/, so a study that was stopped goes on where it was, and more seeds add to it; the table is
printed and written to benchmarks/results/rounding.md.
"""

import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.launch import options

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "rounding"
RULES = ("none", "nearest", "up", "down")
COLUMNS = ("rounding", "val_loss", "spread", "against top-K", "its spread", "rows added", "rows dropped", "padding")

MEANING = """\
What this can show: that a rule is carried out, what it does to the numbers of rows, and a loss that is large against the spread
of the seeds. What it cannot: a difference of a few thousandths of a nat, which such rules make in models a thousand times larger
(SonicMoE, arXiv 2512.14080, table 6: at most 0.05 in a perplexity of 13 to 16, and 0.16 for `down`), or that experts of another
number and width, or another number of tiles per expert, behave the same. A model of 4M parameters and a few hundred
thousand bytes is far from trained.
"""


@dataclass
class Options:
    steps: int = 300
    seeds: int = 3
    tile: int = 128
    jobs: int = 2


def run(rule: str, seed: int, choice: Options) -> dict[str, Any]:
    """One training; its figures, from its file if it was done before with the same steps and tile."""
    name = f"{rule}-tile{choice.tile}-steps{choice.steps}-seed{seed}"
    path = RESULTS / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        knobs = [
            "recipe=tiny_moe", f"run_dir={folder}", f"train.seed={seed}", f"train.steps={choice.steps}", "wandb.mode=disabled",
            f"model.router.rounding={rule}", f"model.router.rounding_tile={choice.tile}", "train.sample=0",
            f"train.eval_every={choice.steps}", f"train.checkpoint_every={choice.steps}", "train.log_every=1",
        ]  # fmt: skip
        subprocess.run(
            [sys.executable, str(ROOT / "launch" / "train.py"), *knobs],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    training = [record for record in records if "loss" in record]
    later = training[len(training) // 2 :]  # when the router has settled
    result = {
        "rule": rule, "seed": seed, "steps": choice.steps, "tile": choice.tile, "tokens": training[-1]["tokens"],
        "date": datetime.date.today().isoformat(), "command": "launch/train.py " + " ".join(knobs[:1] + knobs[2:]),
        "val_loss": records[-1]["val_loss"],
        **{k: statistics.mean(r[f"moe/{k}"] for r in later) for k in ("padding", "added", "dropped", "load_cv")},
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}: val_loss {result['val_loss']:.4f}", flush=True)
    return result


def table(results: list[dict[str, Any]], choice: Options) -> str:
    """Mean and standard deviation over seeds; differences are of the same seed."""
    by = {(r["rule"], r["seed"]): r for r in results}
    seeds = sorted({r["seed"] for r in results})

    def spread(values: list[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else math.nan

    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for rule in RULES:
        losses = [by[rule, s]["val_loss"] for s in seeds]
        gaps = [by[rule, s]["val_loss"] - by["none", s]["val_loss"] for s in seeds]
        mean = {k: statistics.mean(by[rule, s][k] for s in seeds) for k in ("added", "dropped", "padding")}
        cells = [rule, f"{statistics.mean(losses):.4f}", f"{spread(losses):.4f}", f"{statistics.mean(gaps):+.4f}"]
        cells += [f"{spread(gaps):.4f}", *(f"{mean[k]:.2%}" for k in ("added", "dropped", "padding"))]
        lines.append("| " + " | ".join(cells) + " |")
    dates = sorted({r["date"] for r in results})
    return (
        f"# Token rounding, {choice.steps} steps ({results[0]['tokens']:,} tokens), {len(seeds)} seeds, tile {choice.tile}\n\n"
        f"`python benchmarks/study_rounding.py steps={choice.steps} seeds={choice.seeds} tile={choice.tile}`, {dates[-1]}. "
        "Loss in nats a byte on held-out files, always with plain top-K; mean and standard deviation over seeds. Rows added and "
        "dropped: per token; padding: rows that tiles would add to those of the training's own routing.\n\n"
        + "\n".join(lines)
        + "\n\n"
        + MEANING
    )  # fmt: skip


def main(choice: Options) -> None:
    for name in ("steps", "seeds", "tile", "jobs"):
        if getattr(choice, name) < 1:
            raise ValueError(f"{name}={getattr(choice, name)}: must be at least 1")
    pairs = [(rule, seed) for seed in range(choice.seeds) for rule in RULES]
    with ThreadPoolExecutor(choice.jobs) as pool:
        results = list(pool.map(lambda pair: run(*pair, choice), pairs))
    text = table(results, choice)
    (RESULTS.parent / "rounding.md").write_text(text)
    print(text)


if __name__ == "__main__":
    options.run(main, Options, __doc__)
