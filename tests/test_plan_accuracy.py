"""What the comparison with published throughput makes of a row: the model's shape, the fit, rows of a user's own."""

import csv
import json
import math

import pytest

from benchmarks import plan_accuracy
from benchmarks.plan_accuracy import FILE, Row, efficiency_of, fit, model_of, plan, read
from moesaic.launch import cli
from moesaic.moe.flops import flops_per_token, parameter_counts

LINES = {line["row_id"]: line for line in read(FILE)}


@pytest.mark.parametrize(("row", "recipe"), [("1", "deepseek_v3"), ("9", "qwen3_235b")])
def test_a_shape_in_columns_is_that_of_the_recipe(row, recipe):
    told, known = model_of(LINES[row]), cli.compose([f"recipe={recipe}"]).model
    assert flops_per_token(told, 4096) == flops_per_token(known, 4096)
    assert parameter_counts(told).total == pytest.approx(parameter_counts(known).total, rel=1e-5)  # norms of heads
    assert (told.router.top_k, told.router.groups, told.router.groups_kept) == (
        known.router.top_k, known.router.groups, known.router.groups_kept,
    )  # fmt: skip


def test_flops_of_rows_are_those_that_were_published():
    """Tokens and TFLOPS are published with three digits or four. Left out: DeepSeek-V3 with multi-token prediction, and GPT-OSS,
    half of whose layers attend over 128 positions: this model has neither."""
    seen = 0
    for line in LINES.values():
        told = float(line["gflop_per_token_implied"] or 0)
        if (
            told
            and line["kind"] == "e2e"
            and line["seq"]
            and line["model"].startswith(("Qwen3", "DeepSeek-V3"))
            and told < 255
        ):
            own = flops_per_token(model_of(line), int(line["seq"])) / 1e9
            assert own == pytest.approx(told, rel=0.0125), line["row_id"]
            seen += 1
    assert seen > 50


def test_the_fit_finds_factors_that_rows_were_made_with():
    """Collectives take their time whatever the efficiency: 40% of the plan's time in some rows, none in others."""
    truth = {"all": -0.1, "hardware A": 0.2, "hardware B": -0.2, "release old": -0.3, "release new": 0.3}
    rows = []
    for gpu in "AB":
        for release in ("old", "new"):
            for travelling in (0.0, 0.4):
                scale = math.exp(truth["all"] + truth[f"hardware {gpu}"] + truth[f"release {release}"])
                time = (1 - travelling) / scale + travelling
                rows.append(Row("", "m", gpu, "bf16", release, "", 1000 / time, 1000, travelling))
    found = fit(rows * 500)  # so many that the ridge weighs nothing
    for r in rows:
        scale = efficiency_of(r, found) / efficiency_of(r, {})
        assert (1 - r.travelling) / scale + r.travelling == pytest.approx(1000 / r.measured, rel=1e-3)


def test_more_computing_speed_never_makes_a_plan_slower():
    slow, fast = (plan(LINES["60"], efficiency) for efficiency in (0.3, 0.9))
    assert isinstance(slow, Row) and isinstance(fast, Row)
    assert slow.planned < fast.planned < 3 * slow.planned and slow.travelling < fast.travelling


def own_rows(folder, **changes):
    """A run on hardware and of a framework that no published row has, of a model that hasn't either."""
    line = LINES["9"] | {"row_id": "mine", "model": "Mine", "gpu": "mi300x", "precision": "BF16", "framework": "mine", "EP": "8",
                         "hidden": "2048", "tok_s_gpu": "3000"} | changes  # fmt: skip
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, line)
        writer.writeheader()
        writer.writerow(line)
    return folder / "rows.csv"


def test_a_row_of_ones_own(tmp_path, monkeypatch, capsys):
    few = [LINES[i] for i in ("1", "6", "8", "10", "163")]
    monkeypatch.setattr(plan_accuracy, "read", lambda path: few if path == FILE else read(path))
    monkeypatch.setattr("sys.argv", ["plan_accuracy.py", str(own_rows(tmp_path))])
    plan_accuracy.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "mine" and "tokens/s/GPU" in lines[0] and "EP8" in lines[0]
    assert [json.loads(line)["case"].partition(",")[0] for line in lines if line.startswith("{")] == [
        "median error", "worst error; 1 rows",
    ]  # fmt: skip
    fitted = json.loads(next(line for line in lines if line.startswith("factors")).partition(": ")[2])
    assert "hardware GB300" in fitted and fitted["hardware mi300x"] != 1  # what the published rows and its own tell


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"gpu": "h1000"}, "no hardware recipe for h1000"),
        ({"gpu": "nowhere.yaml"}, "hardware=nowhere.yaml: unknown"),
        ({"experts": ""}, "experts=: must be a whole number"),
        ({"head_dim": "wide"}, "head_dim=wide: must be a whole number"),
        ({"precision": "NVFP4"}, "mi300x has no fp4"),
        ({"precision": ""}, "doesn't say the precision"),
        ({"EP": "512"}, "EP=512 doesn't fit"),
        ({"topk": "500"}, "model.router.top_k=500"),
    ],
)
def test_a_row_that_says_too_little_is_told(tmp_path, monkeypatch, changes, why):
    monkeypatch.setattr("sys.argv", ["plan_accuracy.py", str(own_rows(tmp_path, **changes))])
    with pytest.raises(ValueError, match="no row can be predicted: ") as error:
        plan_accuracy.main()
    assert why in str(error.value)


def test_a_column_that_is_missing_is_named(tmp_path):
    (tmp_path / "rows.csv").write_text("row_id,gpu\n1,H100\n")
    with pytest.raises(ValueError, match="lacks the column kind"):
        read(tmp_path / "rows.csv")
