"""launch/plan.py: what it tells, and its mistakes in one line."""

import json

import pytest

from moesaic.launch import plan


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        plan.program(arguments)
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err


@pytest.mark.parametrize("recipe", ["7b_moe", "qwen3_235b", "deepseek_v3"])
def test_a_plan(capsys, recipe):
    code, out, err = run(capsys, f"recipe={recipe}", "hardware=gb300", "nodes=16", "price=5", "parallel.expert=64")
    assert (code, err) == (0, "")
    for word in ("A simulation", "GFLOP a token", "memory of a rank", "fits", "time of a step", "tokens a day", "what to change",
                 "what if", "for the run", "a rank sends in a step"):  # fmt: skip
        assert word in out, word


def test_search_and_dry_run(capsys):
    code, out, err = run(
        capsys, "recipe=7b_moe", "hardware=h100_sxm", "nodes=2", "model.n_layers=2", "parallel.expert=8", "train.micro_batch=1",
        "search=true", "dry_run=true",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "why the first" in out and "parallel.expert=" in out
    assert "bytes: the same" in out


def test_json_says_that_it_is_simulated(capsys):
    code, out, _ = run(capsys, "recipe=tiny_moe", "hardware=cpu", "nodes=1", "json=true")
    told = json.loads(out)
    assert code == 0 and told["simulated"] is True
    assert told["fits"] is True and told["step_s"] == pytest.approx(sum(told["parts_s"].values()))


def test_what_does_not_fit_is_said(capsys):
    _, out, _ = run(capsys, "recipe=deepseek_v3", "hardware=h100_sxm", "nodes=1", "search=true")
    assert "DOES NOT FIT" in out
    assert "none fits; the smallest needs" in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["hardware=h1000"], "hardware=h1000: unknown; nearest: "),
        (["nodes=0"], "nodes=0: must be at least 1"),
        (["nodes=two"], "nodes=two: must be a whole number"),
        (["search=yes"], "search=yes: must be true or false"),
        (["nodes=300"], "train.global_batch=1024: leaves some of 2400 ranks without a sequence"),
        (["parallel.expert=7"], "parallel.expert=7: must divide"),
        (["products=fp4"], "precision=fp4: hardware=h100_sxm has"),
        (["parallel.engine=deepspeed"], "parallel.engine=deepspeed: only fsdp is planned"),
        (["node=3"], "node=3"),
        (["hardware=cpu", "nodes=2", "dry_run=true"], "precision.compute=fp32: a dry run needs bf16"),
    ],
)
def test_mistakes(capsys, arguments, line):
    code, out, err = run(capsys, "recipe=7b_moe", *arguments)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert line in err or line == "node=3"
