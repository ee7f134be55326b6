"""The planner's time against published training throughput, row by row. A simulation: nothing is measured.

    python benchmarks/plan_accuracy.py [rows.csv [picture.png]]

Rows are those of published_throughput.csv, or of a file with its columns, that say on how many GPUs of which kind a model ran,
how it was spread and with what batch; others are listed, and not predicted. What a row doesn't say is taken as the framework's
default: no recomputation, an even load, exchanges of rows not hidden.

A prediction is the planner's step time divided by an efficiency: a constant times three factors, one for the hardware, one for
the precision, one for the framework's release, fitted without any row of the predicted model: the error is that of a model that
the planner never saw. A factor that no other model's rows tell (of a framework that ran one model only) is 1.

A line for each row; for each model and GPU with several layouts whether the planner ranks its rows; the factors; then JSON.
"""

import csv
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from moesaic.launch import cli
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.flops import flops_per_token
from moesaic.parallel import hardware
from moesaic.parallel.layout import Layout
from moesaic.parallel.time_plan import Pipeline, time_of

FILE = Path(__file__).parent / "published_throughput.csv"
GPUS = {"H100": "h100_sxm", "H200": "h200", "B200": "b200", "B300": "b300", "GB200": "gb200_nvl72", "GB300": "gb300",
        "MI300X": "mi300x", "MI355X": "mi355x"}  # fmt: skip
RIDGE = 0.3  # rows that say "factor 1", for each factor


class Row(NamedTuple):
    id: str
    model: str
    gpu: str
    precision: str
    release: str
    layout: str
    measured: float  # tokens a second and GPU
    planned: float


def model_of(row: dict[str, str]) -> ModelConfig:
    """The shape in a row's columns; what they leave out is that of the published configuration."""
    if "DeepSeek-V3" in row["model"]:
        return cli.compose(["recipe=deepseek_v3"]).model
    n = {
        name: int(row[name])
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "experts", "topk", "expert_ffn", "vocab")
    }
    return ModelConfig(
        vocab_size=n["vocab"], d_model=n["hidden"], n_layers=n["layers"], n_heads=n["heads"], n_kv_heads=n["kv_heads"],
        head_dim=n["head_dim"], n_experts=n["experts"], d_expert=n["expert_ffn"], router=RouterConfig(top_k=n["topk"]),
    )  # fmt: skip


def plan(row: dict[str, str]) -> Row | str:
    """A row with the planner's tokens a second, or why there is none."""

    def number(name: str, default: int = 1) -> int:
        return int(row[name]) if row[name].strip().isdigit() else default

    gpu = row["gpu"].split()[0]
    if row["kind"] != "e2e":
        return "no whole model"
    if gpu not in GPUS:
        return f"no hardware recipe for {row['gpu']}"
    if not row["EP"].strip().isdigit() and not (row["framework"].startswith("NeMo AutoModel") and row["mbs"]):
        return "doesn't say how experts are spread"
    if not row["n_gpus"] or not row["mbs"]:
        return "doesn't say the number of GPUs or the micro-batch"
    model, machine = model_of(row), hardware.load(GPUS[gpu])
    ranks, tensor, context, stages = number("n_gpus"), number("TP"), number("CP"), number("PP")
    # Of a sequence that isn't told, 4,096: what the published FLOPs of a token come to.
    seq, expert = number("seq", 4096), number("EP", 8)
    flops = flops_per_token(model, seq)
    told = float(row["gflop_per_token_implied"] or 0) * 1e9
    measured = float(row["tok_s_gpu"] or 0) or float(row["model_tflops_gpu"]) * 1e12 / (told or flops)
    data = ranks // (tensor * context * stages)
    micro = number("mbs")
    batches = max(1, round(number("gbs_seqs", micro * data) / (micro * data)))
    # Ranks of one stage; those of tensor and context parallelism share a sequence.
    world = ranks // stages
    cut = tensor * context
    if seq % cut or expert > world:
        return f"EP={expert} doesn't fit {world} ranks of a stage"
    remat = "full" if "full AC" in row["recompute"] else "none"
    megatron = row["framework"].startswith(
        "Megatron"
    )  # whole weights on every rank; the others shard them, as FSDP2 does
    path = "two_hop" if expert > machine.domain else "all_to_all"  # DeepEP and HybridEP send a row once to a node
    layout = Layout(
        world, machine.node, expert, world if megatron else 1, path, "auto", remat, micro, batches, seq // cut
    )
    precision = "bf16" if row["precision"].startswith("BF16") else "fp8"
    timing = time_of(
        model, layout, machine, precision, router="tf32", attended=seq, sums=2,
        pipeline=Pipeline(stages, number("VP")),
    )  # fmt: skip
    tokens = timing.tokens_per_s
    if told > 1.02 * flops:  # multi-token prediction: one more layer and a head
        tokens *= flops / told
    release = f"{row['framework'].split('/')[0]} {row['version_or_date']}".strip()
    name = f"EP{expert} PP{stages}" + f" TP{tensor}" * (tensor > 1) + f" CP{context}" * (context > 1)
    return Row(row["row_id"], row["model"], gpu, precision, release, f"{name} mbs{micro} x{ranks}", measured, tokens)


def fit(rows: list[Row]) -> dict[str, float]:
    """ln of the factors by name, least squares with a ridge: measured = planned * product of the row's factors."""
    factors: dict[str, float] = defaultdict(float)
    for _ in range(200):  # coordinate by coordinate: the problem is small and convex
        residual: dict[str, list[float]] = defaultdict(list)
        for kind in range(4):
            residual.clear()
            for r in rows:
                name = names(r)[kind]
                residual[name].append(math.log(r.measured / r.planned) - sum(factors[n] for n in names(r) if n != name))
            for name, values in residual.items():
                factors[name] = sum(values) / (len(values) + (RIDGE if kind else 0))
    return factors


def names(r: Row) -> tuple[str, str, str, str]:
    return "all", f"hardware {r.gpu}", f"precision {r.precision}", f"release {r.release}"


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's."""

    def ranks(values: list[float]) -> list[float]:
        return [sum(x < y for x in values) + (sum(x == y for x in values) - 1) / 2 for y in values]

    return statistics.correlation(ranks(a), ranks(b))


def draw(rows: list[Row], predicted: dict[str, float], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 5), layout="constrained")
    for model in sorted({r.model for r in rows}):
        own = [r for r in rows if r.model == model]
        axis.scatter([r.measured for r in own], [predicted[r.id] for r in own], s=14, label=model)
    ends = [min(r.measured for r in rows) / 2, max(r.measured for r in rows) * 2]
    axis.plot(ends, ends, color="black", linewidth=0.8)
    axis.set(
        xscale="log", yscale="log", xlabel="published tokens/s of a GPU", ylabel="planned, model never seen (simulated)"
    )
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    with path.open() as file:
        results = [(line, plan(line)) for line in csv.DictReader(file)]
    rows = [r for _, r in results if isinstance(r, Row)]
    errors: dict[str, float] = {}
    predicted: dict[str, float] = {}
    for held_out in sorted({r.model for r in rows}):
        factors = fit([r for r in rows if r.model != held_out])
        for r in rows:
            if r.model == held_out:
                predicted[r.id] = r.planned * math.exp(sum(factors[n] for n in names(r)))
                errors[r.id] = predicted[r.id] / r.measured - 1
    for r in rows:
        print(f"{r.id:>4} {r.release[-28:]:28} {r.model:16} {r.gpu:6} {r.precision:5} {r.layout:24} measured {r.measured:8,.0f}  "
              f"planned {predicted[r.id]:8,.0f} tokens/s/GPU  {errors[r.id]:+.0%}")  # fmt: skip
    for line, why in results:
        if isinstance(why, str):
            print(f"{line['row_id']:>4} {line['model']:16} not predicted: {why}")
    correlations = []
    for model in sorted({r.model for r in rows}):
        for gpu in sorted({r.gpu for r in rows}):
            own = [r for r in rows if r.model == model and r.gpu == gpu]
            if len({r.layout for r in own}) >= 3 and len(own) >= 3:
                rho = rank_correlation([r.measured for r in own], [predicted[r.id] for r in own])
                correlations.append(rho)
                print(
                    f"{model:16} {gpu:6} {len(own)} rows, {len({r.layout for r in own})} layouts: rank correlation {rho:+.2f}"
                )
    absolute = sorted(abs(e) for e in errors.values())
    for model in sorted({r.model for r in rows}):
        own = [r for r in rows if r.model == model]
        rho = rank_correlation([r.measured for r in own], [predicted[r.id] for r in own])
        error = statistics.median(abs(errors[r.id]) for r in own)
        print(f"{model:16} {len(own)} rows, all GPUs: rank correlation {rho:+.2f}, median error {error:.0%}")
    fitted = {name: round(math.exp(value), 3) for name, value in sorted(fit(rows).items())}
    print("factors, fitted on all rows:", json.dumps(fitted))
    if len(sys.argv) > 2:
        draw(rows, predicted, sys.argv[2])
    unit = "of the measured"
    for case, value, aim, what in (
        ("median error, leaving out the model", statistics.median(absolute), 0.1, unit),
        ("worst error", absolute[-1], 0.1, unit),
        ("rank correlation of the rows of one model and GPU, median", statistics.median(correlations), 1.0, "Spearman"),
    ):
        line = {"benchmark": "plan_accuracy", "case": f"{case}; {len(rows)} rows, simulated", "ours": round(value, 3)}
        ratio = value / aim if what == "Spearman" else aim / value
        print(json.dumps(line | {"peer": aim, "peer_name": "aim", "unit": what, "ratio": round(ratio, 2)}))


if __name__ == "__main__":
    main()
