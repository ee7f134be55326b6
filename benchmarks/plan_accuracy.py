"""The planner's time against published training throughput, row by row. A simulation: nothing is measured.

    python benchmarks/plan_accuracy.py [rows.csv [picture.png]]

Rows are those of published_throughput.csv, or of a file with its columns, that say on how many GPUs of which kind a model ran,
how it was spread and with what batch; others are listed, and not predicted. What a row doesn't say is taken as the framework's
default: no recomputation, an even load, exchanges of rows not hidden. `gpu` may also name a file of recipes/hardware or a path;
columns that may be there beside: `overlap`, the part of the exchange of rows that something hides, and `groups` and
`groups_kept`, of a router that keeps that many groups of experts.

A prediction divides the time of computing, not that of collectives, by an efficiency: a constant times three factors, one for
the hardware, one for the precision, one for the framework's release, fitted on the published rows, and those of the file, but
for the predicted model's own: the error is that of a model that the planner never saw. A factor that no other model's rows tell
(of a framework that ran one model only) is 1.

A line for each row; for each model and GPU with several layouts whether the planner ranks its rows; the factors; then JSON.
"""

import csv
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from moesaic.moe.config import MLAConfig, ModelConfig, RouterConfig
from moesaic.moe.flops import flops_per_token
from moesaic.parallel import hardware
from moesaic.parallel.layout import Layout
from moesaic.parallel.time_plan import EFFICIENCY, Pipeline, time_of

FILE = Path(__file__).parent / "published_throughput.csv"
GPUS = {"H100": "h100_sxm", "H200": "h200", "B200": "b200", "B300": "b300", "GB200": "gb200_nvl72", "GB300": "gb300",
        "MI300X": "mi300x", "MI355X": "mi355x"}  # fmt: skip
COLUMNS = """row_id kind framework version_or_date model layers dense_layers hidden heads kv_heads head_dim dense_ffn expert_ffn
experts topk shared vocab seq gbs_seqs mbs n_gpus gpu precision TP PP CP VP EP recompute tok_s_gpu model_tflops_gpu
gflop_per_token_implied""".split()
RIDGE = 0.3  # rows that say "factor 1", for each factor


class Row(NamedTuple):
    """`planned`: tokens a second and GPU at the efficiency of the plan, of whose time `travelling` is the part of collectives."""

    id: str
    model: str
    gpu: str
    precision: str
    release: str
    layout: str
    measured: float
    planned: float
    travelling: float


def model_of(row: dict[str, str]) -> ModelConfig:
    """The shape in a row's columns. Raises ValueError where they don't say it, or it can't be.

    head_dim is a number, or of latent attention `qk128+64/v128 (MLA q_lora1536 kv_lora512)`.
    """

    def number(name: str, default: int | None = None) -> int:
        told = (row.get(name) or "").strip()
        if not told.isdigit() and default is None:
            raise ValueError(f"{name}={told}: must be a whole number")
        return int(told) if told.isdigit() else default or 0

    heads, told = number("heads"), row["head_dim"].strip()
    known = dict(zip(("groups", "groups_kept"), (8, 4) if "DeepSeek-V3" in row["model"] else (1, 1), strict=True))
    groups, kept = (number(name, known[name]) for name in known)
    router = RouterConfig(
        top_k=number("topk"), kind="sigmoid_bias" if groups > 1 else "softmax_topk", groups=groups, groups_kept=kept
    )
    attention: dict[str, Any]
    if latent := re.fullmatch(r"qk(\d+)\+(\d+)/v(\d+) *\(MLA *(?:q_lora(\d+))? *kv_lora(\d+)\)", told):
        nope, rope, value, q_lora, kv_lora = (int(n or 0) for n in latent.groups())
        attention = {"attention": "mla", "mla": MLAConfig(q_lora or None, kv_lora, nope, rope, value)}
    else:
        attention = {"n_kv_heads": number("kv_heads"), "head_dim": number("head_dim")}
    return ModelConfig(
        vocab_size=number("vocab"), d_model=number("hidden"), n_layers=number("layers"), n_heads=heads,
        n_experts=number("experts"), d_expert=number("expert_ffn"), d_shared=number("shared", 0) * number("expert_ffn"),
        n_dense_layers=number("dense_layers", 0), d_dense=number("dense_ffn", 0), router=router, **attention,
    )  # fmt: skip


def plan(row: dict[str, str], efficiency: float = EFFICIENCY["gpu"]) -> Row | str:
    """A row with the planner's tokens a second, or why there is none."""

    def number(name: str, default: int = 1) -> int:
        return int(row[name]) if row[name].strip().isdigit() else default

    gpu = row["gpu"].split()[0]
    if row["kind"] != "e2e":
        return "no whole model"
    if GPUS.get(gpu, gpu) not in hardware.names() and not gpu.endswith(".yaml"):
        return f"no hardware recipe for {row['gpu']}"
    if not row["EP"].strip().isdigit() and not (row["framework"].startswith("NeMo AutoModel") and row["mbs"]):
        return "doesn't say how experts are spread"
    if not row["n_gpus"] or not row["mbs"]:
        return "doesn't say the number of GPUs or the micro-batch"
    if not row["precision"]:
        return "doesn't say the precision"
    try:
        model, machine = model_of(row), hardware.load(GPUS.get(gpu, gpu))
    except ValueError as error:
        return str(error)
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
    # Modules that Megatron recomputes, such as norms and activations, are little of a layer.
    remat = next((mode for mode in ("full", "selective") if f"{mode} AC" in row["recompute"]), "none")
    # Megatron has whole weights on every rank; the others shard them, as FSDP2 does.
    megatron = row["framework"].startswith("Megatron")
    path = "two_hop" if expert > machine.domain else "all_to_all"  # DeepEP and HybridEP send a row once to a node
    layout = Layout(
        world, machine.node, expert, world if megatron else 1, path, "auto", remat, micro, batches, seq // cut
    )
    precision = (
        "bf16" if row["precision"].startswith(("BF16", "FP16")) else "fp4" if "FP4" in row["precision"] else "fp8"
    )
    if precision not in machine.tflops:
        return f"{machine.name} has no {precision}"
    timing = time_of(
        model, layout, machine, precision, router="tf32", attended=seq, sums=2, efficiency=efficiency,
        overlapped=float(row.get("overlap") or 0), pipeline=Pipeline(stages, number("VP")),
    )  # fmt: skip
    tokens = timing.tokens_per_s
    if told > 1.02 * flops:  # multi-token prediction: one more layer and a head
        tokens *= flops / told
    release = f"{row['framework'].split('/')[0]} {row['version_or_date']}".strip()
    name = f"EP{expert} PP{stages}" + f" TP{tensor}" * (tensor > 1) + f" CP{context}" * (context > 1)
    return Row(row["row_id"], row["model"], gpu, precision, release, f"{name} mbs{micro} x{ranks}", measured,
               tokens, timing.share("exposed"))  # fmt: skip


def fit(rows: list[Row]) -> dict[str, float]:
    """ln of the factors by name, least squares with a ridge, of ln(measured / planned), where the time of a plan is that of
    computing over the product of the row's factors, and that of collectives: Gauss-Newton."""
    found = sorted({name for r in rows for name in names(r)})
    has = numpy.array([[name in names(r) for name in found] for r in rows], dtype=float)
    ridge = numpy.diag([RIDGE if name != "all" else 1e-9 for name in found])
    travelling = numpy.array([r.travelling for r in rows])
    faster = numpy.log([r.measured / r.planned for r in rows])
    factors = numpy.zeros(len(found))
    for _ in range(40):
        computing = (1 - travelling) * numpy.exp(-has @ factors)
        slope = has * (computing / (computing + travelling))[:, None]
        error = faster + numpy.log(computing + travelling)
        factors += 0.7 * numpy.linalg.solve(slope.T @ slope + ridge, slope.T @ error - ridge @ factors)
    return dict(zip(found, factors.tolist(), strict=True))


def efficiency_of(r: Row, factors: dict[str, float]) -> float:
    return EFFICIENCY["gpu"] * math.exp(sum(factors.get(name, 0.0) for name in names(r)))


def names(r: Row) -> tuple[str, str, str, str]:
    return "all", f"hardware {r.gpu}", f"precision {r.precision}", f"release {r.release}"


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's; NaN where either holds one value alone."""

    def ranks(values: list[float]) -> list[float]:
        return [sum(x < y for x in values) + (sum(x == y for x in values) - 1) / 2 for y in values]

    return statistics.correlation(ranks(a), ranks(b)) if min(len(set(a)), len(set(b))) > 1 else math.nan


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


def read(path: Path) -> list[dict[str, str]]:
    """Raises ValueError where a column is missing."""
    with path.open(newline="") as file:
        lines = [{name: text or "" for name, text in line.items() if name} for line in csv.DictReader(file)]
    for name in COLUMNS:
        if lines and name not in lines[0]:
            raise ValueError(f"{path}: lacks the column {name}")
    return lines


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    lines = read(path)
    results = [(line, plan(line)) for line in lines]
    rows = [r for _, r in results if isinstance(r, Row)]
    if not rows:
        raise ValueError(f"{path}: no row can be predicted: " + "; ".join(sorted({str(why) for _, why in results})))
    others = (
        [] if path == FILE else [r for r in map(plan, [x for x in read(FILE) if x not in lines]) if isinstance(r, Row)]
    )
    errors: dict[str, float] = {}
    predicted: dict[str, float] = {}
    for held_out in sorted({r.model for r in rows}):
        factors = fit([r for r in others + rows if r.model != held_out])
        for line, r in results:
            if isinstance(r, Row) and r.model == held_out:
                again = plan(line, efficiency_of(r, factors))
                assert isinstance(again, Row)
                predicted[r.id] = again.planned
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
    fitted = {name: round(math.exp(value), 3) for name, value in sorted(fit(others + rows).items())}
    fitted["all"] = round(fitted["all"] * EFFICIENCY["gpu"], 3)
    print("factors, fitted on all rows:", json.dumps(fitted))
    if len(sys.argv) > 2:
        draw(rows, predicted, sys.argv[2])
    unit = "of the measured"
    for case, value, aim, what in (
        ("median error, leaving out the model", statistics.median(absolute), 0.1, unit),
        ("worst error", absolute[-1], 0.1, unit),
        ("rank correlation of the rows of one model and GPU, median", statistics.median(correlations or [math.nan]), 1.0,
         "Spearman"),
    ):  # fmt: skip
        if math.isnan(value):
            continue
        line = {"benchmark": "plan_accuracy", "case": f"{case}; {len(rows)} rows, simulated", "ours": round(value, 3)}
        ratio = value / aim if what == "Spearman" else aim / value
        print(json.dumps(line | {"peer": aim, "peer_name": "aim", "unit": what, "ratio": round(ratio, 2)}))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as mistake:
        sys.exit(f"error: {mistake}")
