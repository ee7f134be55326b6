"""What low precision costs in quality: validation loss of small models, paired by seed, each recipe against fp32.

    python benchmarks/study_precision.py [tokens=3000000] [seeds=3] [start=0] [runs=main] [jobs=2] [data=]

runs: `main`, the shipped recipes (bf16 only where the CPU has its products: without, one is a hundred times slower); `causes`,
recipes with one thing changed, which tell what a gap comes from; `all`; or names with commas. data: text files, a glob pattern
(default: the Python standard library). Every run is `launch/train.py recipe=tiny_moe` with MODEL's knobs (1.1M active parameters
of 2.3M) in one process of one thread; runs of a seed start from the same weights and see the same batches. With start=0.5 they
start where half of a run in fp32 has led: what is changed by then drifts apart less, so gaps show that are smaller.

One file a run in benchmarks/results/precision/, so that a study goes on where it stopped, and more seeds and tokens add to it;
a run that is interrupted goes on from its last checkpoint, in runs/study_precision/. The summary, with its curves, is
benchmarks/results/precision.md; it is of all runs whose files are there, and `seeds=0` writes it alone. At its end is
what needs no training: errors of casts and of products.
"""

import datetime
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.hadamard import rotate, rotate_back
from moesaic.kernels.quantize import Format, key_of, quantize, random_signs
from moesaic.launch import cli, options
from moesaic.launch.data import open_data, val_batch
from moesaic.launch.generate import load_run, newest_checkpoint
from moesaic.moe.low import lower
from moesaic.moe.model import build
from moesaic.parallel import checkpoint

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "precision"
WORK = ROOT / "runs" / "study_precision"
# Two wide blocks: as many active parameters in four narrow ones take twice as long, of which casts are most.
MODEL = [
    "model.n_layers=2",
    "model.d_model=256",
    "model.n_heads=4",
    "model.d_expert=128",
    "train.seq_len=128",
    "train.global_batch=16",
]
STEP_TOKENS = 16 * 128
POINTS, BATCHES = 12, 16  # evaluations of a run, and batches of each
LATE_POINTS, LATE_BATCHES = 3, 128  # the same of a run with `start`, after it
LEAST_EVERY = 12  # steps between evaluations, each of which takes as long as two or three
TRUNKS: dict[int, Any] = defaultdict(threading.RLock)  # of a seed: held while its trunk is trained
# Of glibc: freed memory stays with the process. Casts make and drop many tensors, and fresh pages are a fifth of their time.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}

P = "precision"
HIGH_BACKWARD = [f"{P}.{product}.{side}.element=null" for product, side in (
    ("dgrad", "dy"), ("dgrad", "w"), ("wgrad", "dy"), ("wgrad", "x"))] + [
    f"{P}.{product}.{knob}" for product in ("dgrad", "wgrad") for knob in ("rotation=0", "signs=none")]  # fmt: skip
HIGH_SOURCES = [f"{P}.dgrad.w.source=high", f"{P}.wgrad.x.source=high"]
HIGH_FORWARD = [f"{P}.fprop.x.element=null", f"{P}.fprop.w.element=null", *HIGH_SOURCES]
ROTATED = [f"{P}.{product}.{knob}" for product in ("fprop", "dgrad", "wgrad") for knob in ("rotation=16", "signs=step")]
NEAREST = [f"{P}.{product}.{side}.rounding=even" for product, side in (
    ("dgrad", "dy"), ("dgrad", "w"), ("wgrad", "dy"), ("wgrad", "x"))]  # fmt: skip
UNSIGNED = [f"{P}.dgrad.signs=none", f"{P}.wgrad.signs=none"]


def plain(element: str) -> list[str]:
    """All six operands in blocks of 16 with e4m3 scales, to the nearest."""
    return [f"{P}={'mxfp8'}", f"{P}.recipe=nv_{element}"] + [
        f"{P}.{product}.{side}.{knob}"
        for product, sides in (("fprop", "xw"), ("dgrad", ("dy", "w")), ("wgrad", ("dy", "x"))) for side in sides
        for knob in (f"element={element}", "block=1x16", "scale=e4m3", "rule=amax")
    ]  # fmt: skip


MAIN = {name: [f"{P}={name}"] for name in "fp32 bf16 fp8_block mxfp8 mxint8 nvfp4 quartet quartet2 mxfp4_deosc".split()}
CAUSES = {
    "quartet2, forward only": [f"{P}=quartet2", *HIGH_BACKWARD, *HIGH_SOURCES],
    "quartet2, backward only": [f"{P}=quartet2", *HIGH_FORWARD],
    "nvfp4, all blocks": [f"{P}=nvfp4", f"{P}.high_last=0"],
    "nvfp4, stochastic forward": [
        f"{P}=nvfp4", f"{P}.high_last=0", f"{P}.fprop.x.rounding=stochastic", f"{P}.fprop.w.rounding=stochastic"],
    "quartet, backward to the nearest": [f"{P}=quartet", *NEAREST],
    # Signs behind the rotation leave the error as it is without any: tests/kernels/test_quantize.py.
    "quartet, backward to the nearest, signs behind the rotation": [f"{P}=quartet", *NEAREST, *UNSIGNED],
    "mxfp4_deosc without de-oscillation": [f"{P}=mxfp4_deosc", f"{P}.deosc_period=0"],
    "4-bit floats, blocks of 16": plain("e2m1"),
    "4-bit integers, blocks of 16": plain("int4"),
    "4-bit floats, blocks of 16, rotated": [*plain("e2m1"), *ROTATED],
    "4-bit integers, blocks of 16, rotated": [*plain("int4"), *ROTATED],
    "nvfp4, last 15 % of steps high": [f"{P}=nvfp4", f"{P}.high_last=0", f"{P}.high_tail=0.15"],
}  # fmt: skip
RUNS = MAIN | CAUSES
UNTRAINED_ALIKE = ("mxfp4_deosc without de-oscillation", "nvfp4, last 15 % of steps high")  # as the recipe, in one step
# What published work says of causes: a run, and the one that it should end above or below.
CONTRASTS = [
    ("quartet2, forward only", "quartet2, backward only"),
    ("nvfp4, stochastic forward", "nvfp4, all blocks"),
    ("quartet, backward to the nearest", "quartet"),
    ("quartet, backward to the nearest, signs behind the rotation", "quartet, backward to the nearest"),
    ("4-bit integers, blocks of 16", "4-bit floats, blocks of 16"),
    ("4-bit integers, blocks of 16, rotated", "4-bit floats, blocks of 16, rotated"),
    ("4-bit integers, blocks of 16, rotated", "4-bit integers, blocks of 16"),
    ("4-bit floats, blocks of 16, rotated", "4-bit floats, blocks of 16"),
]

# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

MEANING = """\
A difference is of the same seed, and its interval that of Student's t over seeds: where it holds 0, these runs tell no gap. Two
runs of a seed drift apart from the first rounding on, so that also what loses next to nothing (bf16, mxint8) ends above or below.
What they can show: that a recipe trains, and gaps that are large against the spread of pairs. What they cannot: the gap of a
model a thousand times larger on a thousand times more text. Published gaps of FP4 grow with tokens per parameter, and those of a
30M model (0.04 to 0.10 nats, arXiv 2601.22813) are measured at 0.75B tokens and more; outliers of activations, which blocks and
rotations are made for, are rare in a model of this size; a router of 8 experts has fewer near ties than one of 256; and what is
emulated has sums in fp32, where hardware rounds more.
"""


LATE = """ Every run of a seed goes on from the same
checkpoint of fp32, weights and moments, so that pairs have half the way, and none of its wildest part, to drift apart in; what a
recipe loses or breaks before is not in it."""


@dataclass
class Options:
    tokens: int = 3_000_000
    seeds: int = 3
    start: float = 0.0
    runs: str = "main"
    jobs: int = 2
    data: str = ""


def file_of(name: str, seed: int, choice: Options) -> Path:
    slug = "".join(c if c.isalnum() or c in "_-" else "_" for c in name.replace(", ", "-").replace(" ", "_"))
    start = f"-start{choice.start:g}" if choice.start else ""
    return RESULTS / f"{slug}-tokens{choice.tokens}{start}-seed{seed}.json"


def run(name: str, seed: int, choice: Options) -> None:
    """One training, unless its file is there."""
    with TRUNKS[seed] if name == "fp32" else nullcontext():
        if not file_of(name, seed, choice).exists():
            train(name, seed, choice)


def train(name: str, seed: int, choice: Options) -> None:
    """One training, and its file. With `start`, that of fp32 is the trunk, whose checkpoint there the others go on from."""
    path = file_of(name, seed, choice)
    steps, folder = choice.tokens // STEP_TOKENS, WORK / path.stem
    begin = round(choice.start * steps)
    every = max(LEAST_EVERY, (steps - begin) // (LATE_POINTS if begin else POINTS))
    knobs = [
        "recipe=tiny_moe", *MODEL, *RUNS[name], f"train.seed={seed}", f"train.steps={steps}",
        "wandb.mode=disabled", "train.sample=0", f"train.eval_batches={LATE_BATCHES if begin else BATCHES}",
        f"train.eval_every={every}", f"train.checkpoint_every={begin or every}", f"train.log_every={max(1, every // 5)}",
        f"optim.warmup={max(1, steps // 20)}",
    ]  # fmt: skip
    if choice.data:
        knobs += ["data.source=files", f"data.files=[{choice.data}]"]
    if "deosc" in name and "without" not in name:  # the recipe's own start is later than these runs end
        knobs += [f"{P}.deosc_start={begin + steps // 8}", f"{P}.deosc_period={max(2, steps // 75)}"]
    left_at = checkpoint.step_folder(WORK / file_of("fp32", seed, choice).stem / "checkpoints", begin)
    own = [f"run_dir={folder}"]
    if begin and name != "fp32":
        with TRUNKS[seed]:
            if not checkpoint.is_checkpoint(left_at):
                train("fp32", seed, choice)
        trunk(left_at, seed, choice)
        if not checkpoint.complete_checkpoints(str(folder / "checkpoints")):
            own.append(f"resume={left_at}")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), *knobs, *own], check=False,
        env=os.environ | KEEP_MEMORY | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name}, seed {seed}: exit code {done.returncode}\n{done.stdout[-2000:]}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated, trained = ([r for r in records if key in r] for key in ("val_loss", "loss"))
    result = {
        "run": name, "seed": seed, "tokens": steps * STEP_TOKENS, "start": begin * STEP_TOKENS,
        "date": datetime.date.today().isoformat(), "command": " ".join(["launch/train.py", *knobs]),
        "val_loss": evaluated[-1]["val_loss"], "val_curve": [[r["tokens"], r["val_loss"]] for r in evaluated],
        "train_curve": [[r["tokens"], round(r["loss"], 5)] for r in trained],
        "grad_norm": statistics.median(r["grad_norm"] for r in trained), "skipped": trained[-1]["skipped"],
    }  # fmt: skip
    if begin:
        result["left_at"] = trunk(left_at, seed, choice)
    elif name == "fp32":
        result["same_weights"] = at_same_weights(folder)
    RESULTS.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(path)
    if not begin or name != "fp32":  # a trunk stays
        shutil.rmtree(folder)
    print(f"{path.stem}: val_loss {result['val_loss']:.4f}", flush=True)


def trunk(path: str, seed: int, choice: Options) -> str:
    """Digest of the checkpoint that a seed's runs leave. ValueError: it is not the one that fp32's result is of."""
    files = checkpoint.read_manifest(path).files
    digest = hashlib.sha256("".join(c for file in files for c in file.checksums).encode()).hexdigest()[:16]
    base = file_of("fp32", seed, choice)
    if base.exists() and json.loads(base.read_text())["left_at"] != digest:
        raise ValueError(
            f"{base.name} is of a trunk with other weights, of another CPU perhaps: move away seed {seed}'s files, or add a seed"
        )
    return digest


def at_same_weights(folder: Path) -> dict[str, list[float]]:
    """With the weights that a run in fp32 ended with, of each recipe: its loss on held-out text minus that of fp32, nats a byte,
    and the relative error of the gradient, over all weights, of one batch: |g - g_fp32| / |g_fp32|."""
    torch.set_num_threads(1)
    path = newest_checkpoint(str(folder))
    config, _, _, device = load_run(path)
    stream = open_data(config.data, config.train.seq_len).val
    first, *others = (torch.from_numpy(val_batch(stream, 16 * i, 16)).to(device) for i in range(5))
    found: dict[str, list[float]] = {}
    exact: list[Tensor] = []
    for name, knobs in RUNS.items():
        precision = cli.compose(["recipe=tiny_moe", *MODEL, *knobs]).precision
        if name in UNTRAINED_ALIKE or not (precision.quantized or name == "fp32"):
            continue
        model = build(config.model, 0, device)
        checkpoint.load_model(path, model)
        lower(model, precision, config.train.seed)
        model.precision.begin(0, 100)
        loss = model(first[:, :-1], first[:, 1:]).loss
        assert loss is not None
        loss.backward()
        gradient = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
        exact = exact or gradient
        error, norm = (
            math.hypot(*(t.norm().item() for t in part))
            for part in ([a - b for a, b in zip(gradient, exact, strict=True)], exact)
        )
        with torch.no_grad():
            losses = [model(batch[:, :-1], batch[:, 1:]).loss.item() / batch[:, 1:].numel() for batch in others]
        found[name] = [statistics.mean(losses), error / norm]
    base = found["fp32"][0]
    return {name: [loss - base, error] for name, (loss, error) in found.items()}


# ---------------------------------------------------------------- without training


def casts() -> str:
    """What casts alone do to a product, in three tables; nothing is trained."""
    rows = [
        "## Casts alone, without training\n",
        CASTS,
        "| draws | " + " | ".join(MEANS) + " |",
        "|---" * (1 + len(MEANS)) + "|",
    ]
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    found = [averaged(x, signs, rounding) for signs, rounding in MEANS.values()]
    rows += [f"| {4**i} | " + " | ".join(f"{f[i]:.2f}" for f in found) + " |" for i in range(len(found[0]))]
    rows += [
        "\n| rows, block | Gaussian | the same, rotated | Student's t of 3 | the same, rotated |\n|---|---|---|---|---|"
    ]
    student = torch.randn(512, 512, generator=torch.Generator().manual_seed(1))
    student /= (torch.randn(3, 512, 512, generator=torch.Generator().manual_seed(2)).square().mean(dim=0)).sqrt()
    data = (torch.randn(512, 512, generator=torch.Generator().manual_seed(3)), student)
    for label, element, block, scale, rule in (
        ("MXFP4, 32", "e2m1", 32, "e8m0", "rceil"), ("MXINT4, 32", "int4", 32, "e8m0", "rceil"),
        ("NVFP4, 16", "e2m1", 16, "e4m3", "amax"), ("NVINT4, 16", "int4", 16, "e4m3", "amax"),
        ("MXFP8, 32", "e4m3", 32, "e8m0", "rceil"), ("MXINT8, 32", "int8", 32, "e8m0", "rceil"),
    ):  # fmt: skip
        form = Format(element, (1, block), scale, rule)
        cells = [f"{product_snr(y, form, size):.2f}" for y in data for size in (0, block)]
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


CASTS = """\
Above: effective bits, -log2(error / norm), of the mean of so many casts of a Gaussian matrix to MXFP4 (rule shrink), rotated by
32 with new signs at each draw. Below: signal to noise, in dB, of a product x W^T of 512 x 512, x of the distribution named, W
Gaussian, both cast; rotated: by as many columns as a block has.
"""
MEANS = {
    "to the nearest, signs before the rotation": ("before", "even"),
    "to the nearest, signs behind it": ("behind", "even"),
    "stochastic, signs before it": ("before", "stochastic"),
    "stochastic, signs behind it": ("behind", "stochastic"),
}


def averaged(x: Tensor, signs: str, rounding: str) -> list[float]:
    """Effective bits of the mean of 1, 4, ..., 256 casts."""
    form, total, found = (
        Format("e2m1", (1, 32), "e8m0", "shrink", rounding),
        torch.zeros_like(x, dtype=torch.float64),
        [],
    )
    for i in range(1, 257):
        s = random_signs(key_of("signs", i), 32, x.device)
        before, behind = (s, torch.ones(x.shape[1])) if signs == "before" else (None, s.repeat(x.shape[1] // 32))
        y = quantize(rotate(x, 32, before) * behind, form, key_of("draw", i)).dequantize() * behind
        total += rotate_back(y, 32, before, x.shape[1])
        if i in (1, 4, 16, 64, 256):
            error = (total / i - x).norm() / x.norm()
            found.append(-math.log2(error.item()))
    return found


def product_snr(x: Tensor, form: Format, size: int) -> float:
    """dB, of a product of both operands cast, rotated by `size` (0: not)."""
    w = torch.randn(512, x.shape[1], generator=torch.Generator().manual_seed(4))
    signs = random_signs(key_of("signs"), size, x.device) if size else None
    a, b = (quantize(rotate(y, size, signs) if size else y, form).dequantize().double() for y in (x, w))
    exact = x.double() @ w.double().T
    return -20 * math.log10(((a @ b.T - exact).norm() / exact.norm()).item())


# ---------------------------------------------------------------- with


def gap(by: dict[tuple[str, int], dict[str, Any]], name: str, base: str) -> tuple[int, float, float]:
    """(pairs, mean difference to `base`, half its 95 % interval)."""
    seeds = [s for (n, s) in by if n == name and (base, s) in by]
    gaps = [by[name, s]["val_loss"] - by[base, s]["val_loss"] for s in seeds]
    if len(gaps) < 2:
        return len(gaps), gaps[0] if gaps else math.nan, math.nan
    half = T95.get(len(gaps) - 1, 1.96) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return len(gaps), statistics.mean(gaps), half


def summary() -> str:
    """Of all results that are there, by number of tokens and where the recipes set in. Writes the curves."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    text = ["# What low precision costs\n", MEANING]
    for tokens, start in sorted({(r["tokens"], r.get("start", 0)) for r in results}):
        by = {(r["run"], r["seed"]): r for r in results if (r["tokens"], r.get("start", 0)) == (tokens, start)}
        dates = sorted({r["date"] for r in by.values()})
        when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        text.append(
            f"## {tokens:,} tokens, {f'the first {start:,} in fp32' if start else 'all by the recipe'} ({when})\n"
        )
        text.append(
            f"Nats a byte on held-out files; seeds and command of each run in its file.{LATE if start else ''}\n"
        )
        text.append("| run | pairs | val_loss | against fp32 | 95 % interval | relative |\n|---|---|---|---|---|---|")
        for name in (n for n in RUNS if any(n == run for run, _ in by)):
            seeds = [seed for n, seed in by if n == name]
            cells = [
                name,
                len(seeds),
                f"{statistics.mean(by[name, seed]['val_loss'] for seed in seeds):.4f}",
                "",
                "",
                "",
            ]
            if name != "fp32":
                pairs, mean, half = gap(by, name, "fp32")
                base = statistics.mean(by["fp32", seed]["val_loss"] for seed in seeds if ("fp32", seed) in by)
                cells[1] = pairs
                cells[3:] = [f"{mean:+.4f}", interval(pairs, half), f"{mean / base:+.2%}"]
            text.append("| " + " | ".join(map(str, cells)) + " |")
        found = [(name, base, *gap(by, name, base)) for name, base in CONTRASTS]
        if any(pairs for _, _, pairs, _, _ in found):
            text.append("\n| run | against | pairs | difference | 95 % interval |\n|---|---|---|---|---|")
            text += [
                f"| {name} | {base} | {pairs} | {mean:+.4f} | {interval(pairs, half)} |"
                for name, base, pairs, mean, half in found
                if pairs
            ]
        text += same_weights([r["same_weights"] for r in by.values() if "same_weights" in r])
        file = f"precision-{tokens}{f'-start{start}' if start else ''}.png"
        draw(by, RESULTS.parent / file, f"{tokens:,} tokens{f', the first {start:,} in fp32' if start else ''}")
        text.append(f"\n![Validation loss above fp32 of the same seed]({file})\n")
    return "\n".join([*text, casts()])


def interval(pairs: int, half: float) -> str:
    return f"± {half:.4f}" if pairs > 1 else "one pair tells none"


def same_weights(each: list[dict[str, list[float]]]) -> list[str]:
    """A table of what `at_same_weights` found for each seed: means, and ranges over seeds."""
    if not each:
        return []
    rows = [
        SAME_WEIGHTS.format(seeds=len(each)),
        "| run | loss above fp32 | range | error of the gradient | range |\n|---|---|---|---|---|",
    ]
    for name in (n for n in RUNS if n in each[0] and n != "fp32"):
        cells = [name]
        for i, form in ((0, "+.4f"), (1, ".3f")):
            values = [one[name][i] for one in each]
            cells += [f"{statistics.mean(values):{form}}", f"{min(values):{form}} to {max(values):{form}}"]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


SAME_WEIGHTS = """
**At the same weights**, those that fp32 ended with ({seeds} seeds): the loss on 8,192 held-out bytes when the forward pass is
that of the recipe, less that of fp32, and the relative error of the whole gradient of one batch of 2,048. No training by the
recipe goes into it, so there is no chance of two runs drifting apart; how the errors of many steps add up, or cancel, it can't
tell.
"""


def draw(by: dict[tuple[str, int], dict[str, Any]], path: Path, title: str) -> None:
    """Left: validation loss, of the seeds that all have; right: above fp32 of the same seed. Means over seeds, ranges shaded."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    shared = set.intersection(*({s for n, s in by if n == name} for name, _ in by))
    for i, name in enumerate(n for n in RUNS if any(run == n for run, _ in by)):
        curves = {s: dict(map(tuple, r["val_curve"])) for (n, s), r in by.items() if n == name}
        style = {"color": f"C{i % 10}", "linestyle": "-" if name in MAIN else "--", "linewidth": 1.2}
        at = sorted(set.intersection(*(set(c) for c in curves.values())) - {0})
        alike = [c for s, c in curves.items() if s in shared or not shared]
        left.plot(at, [statistics.mean(c[t] for c in alike) for t in at], label=name, **style)
        if name == "fp32":
            continue
        paired = {s: c for s, c in curves.items() if ("fp32", s) in by}
        bases = {s: dict(map(tuple, by["fp32", s]["val_curve"])) for s in paired}
        at = [t for t in at if paired and all(t in bases[s] for s in paired)]
        gaps = [[paired[s][t] - bases[s][t] for s in paired] for t in at]
        right.plot(at, [statistics.mean(g) for g in gaps], **style)
        right.fill_between(at, [min(g) for g in gaps], [max(g) for g in gaps], color=style["color"], alpha=0.12)
    left.set(xlabel="tokens", ylabel="validation loss, nats a byte", title=title)
    right.set(xlabel="tokens", ylabel="above fp32, nats", title="difference to fp32 of the same seed")
    right.axhline(0, color="black", linewidth=0.6)
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def chosen(runs: str) -> list[str]:
    here = [n for n in MAIN if n != "bf16" or torch.cpu._is_avx512_bf16_supported()]
    groups = {"main": here, "causes": ["fp32", *CAUSES], "all": list(RUNS)}
    if runs in groups:
        return groups[runs]
    slugs = {file_of(name, 0, Options()): name for name in RUNS}
    names = [slugs.get(file_of(part.strip(), 0, Options()), part) for part in runs.split(",")]
    for name in names:
        if name not in RUNS:
            raise ValueError(
                f"runs={name}: must be main, causes, all, or of {'; '.join(RUNS)} (, and blanks as - and _)"
            )
    return names


def main(choice: Options) -> None:
    for name, least in (("tokens", STEP_TOKENS), ("seeds", 0), ("jobs", 1)):
        if getattr(choice, name) < least:
            raise ValueError(f"{name}={getattr(choice, name)}: must be at least {least}")
    steps = choice.tokens // STEP_TOKENS
    if choice.start and not 0 < round(choice.start * steps) < steps:
        raise ValueError(
            f"start={choice.start}: must be 0, or a share of the {steps} steps that leaves some before and after"
        )
    pairs = [(name, seed) for seed in range(choice.seeds) for name in chosen(choice.runs)]
    with ThreadPoolExecutor(choice.jobs) as pool:
        list(pool.map(lambda pair: run(*pair, choice), pairs))
    if not list(RESULTS.glob("*.json")):
        raise ValueError("seeds=0: there are no results to sum up")
    text = summary()
    (RESULTS.parent / "precision.md").write_text(text)
    print(text)


if __name__ == "__main__":
    options.run(main, Options, __doc__)
