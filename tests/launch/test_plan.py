"""launch/plan.py: what it tells, and its mistakes in one line."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from moesaic.launch import cli, options, plan
from moesaic.parallel.layout import collectives, load_of
from moesaic.parallel.memory_plan import heap_of


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


def test_the_documented_plan(capsys):
    """The pages that quote this command tell what it says today."""
    _, out, _ = run(capsys, "recipe=7b_moe", "hardware=h100_sxm", "nodes=8")
    used, held = re.search(r"GiB: (\S+) of (\S+): fits", out).groups()
    step = re.search(r"time of a step: (\S+) s", out)[1]
    docs = Path(__file__).resolve().parents[2] / "docs"
    planning, whole_run = (" ".join((docs / name).read_text().split()) for name in ("planning.md", "run_7b.md"))
    assert f"GiB: {used} of {held}: fits" in planning and f"time of a step: {step} s" in planning
    assert f"{used} of {held} GiB" in whole_run and f"a step of {float(step):.1f} s" in whole_run


def test_search_and_dry_run(capsys):
    code, out, err = run(
        capsys, "recipe=7b_moe", "hardware=h100_sxm", "nodes=2", "model.n_layers=2", "parallel.expert=8", "train.micro_batch=1",
        "search=true", "dry_run=true",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "why the first" in out and "precision=bf16: the best with fp32 is" in out
    assert (
        "with products in fp8, where docs/precision.md has kernels, the best were" in out
        and "products=fp8 parallel.expert=" in out
    )
    assert "bytes: the same" in out


def test_json_says_that_it_is_simulated(capsys):
    code, out, _ = run(capsys, "recipe=tiny_moe", "hardware=cpu", "nodes=1", "json=true")
    told = json.loads(out)
    assert code == 0 and told["simulated"] is True
    assert told["fits"] is True and told["step_s"] == pytest.approx(sum(told["parts_s"].values()))
    # At the peak, in the last layer's experts, its output is there no more.
    assert len(told["kept_by_layer"]) == 4
    assert told["memory"]["activations"] == sum(told["kept_by_layer"]) - 4 * 192 * 4 * 256
    assert told["largest_micro_batch"] >= told["layout"]["micro_batch"] and told["sent_bytes"]["all_to_all"] > 0


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
        (["precision=nvfp4"], "precision=nvfp4: hardware=h100_sxm has products of fp32, tf32, bf16, fp8, none of fp4;"),
        (
            ["precision=fp8_block", "precision.high_last=99"],
            "precision.high_last=99: with precision.high_first=0 leaves none",
        ),
        (["precision=fp8_block", "precision.layers=[]"], "precision.layers=[]: must name one of"),
        (["parallel.engine=deepspeed", "dry_run=true"], "parallel.engine=deepspeed: a dry run needs fsdp"),
        (["price=abc"], "price=abc: must be a number"),
        (["price=inf"], "price=inf: must be a number, not negative"),
        (["dry_run=maybe"], "dry_run=maybe: must be true or false"),
        (["node=3"], "node=3"),
        (["hardware=cpu", "nodes=2", "dry_run=true"], "precision.compute=fp32: a dry run needs bf16"),
    ],
)
def test_mistakes(capsys, arguments, line):
    code, out, err = run(capsys, "recipe=7b_moe", *arguments)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert line in err or line == "node=3"


def planned(*knobs: str) -> plan.Plan:
    return plan.make_plan(cli.compose(["recipe=7b_moe", *knobs]), plan.PlanOptions(hardware="b200", nodes=1))


@pytest.mark.parametrize(
    ("knob", "experts", "attention"),
    [("high_tail=0.5", 0.5, 0.5), ("high_first=20", 0.5, 0.5), ("high_last=10", 0.75, 0.75), ("layers=[experts]", 1, 0),
     ("layers=[attention]", 0, 1)],
)  # fmt: skip
def test_what_a_recipe_leaves_high_takes_as_long_as_bf16(knob, experts, attention):
    """Of 40 blocks, all of them with experts."""
    high, low, mixed = (
        planned(*knobs).timing.parts
        for knobs in (["precision=bf16"], ["precision=mxfp8"], ["precision=mxfp8", f"precision.{knob}"])
    )
    for name, part in (("experts up", experts), ("wqkv", attention)):
        key = "MoE layer", "forward", f"product {name}"
        assert low[key] < high[key]
        assert mixed[key] == pytest.approx(part * low[key] + (1 - part) * high[key])
    key = "MoE layer", "forward", "memory quantize"
    assert 0 < mixed[key] < low[key] and key not in high


@pytest.mark.parametrize("path", ["all_to_all", "two_hop", "fused"])
def test_numbers_of_tokens_are_planned_where_chance_needs_them(path):
    """8 bytes a row, over both hops; on the fused path a slot."""
    knobs = ["parallel.expert=8", f"parallel.expert_path={path}", f"parallel.node_size={4 if path == 'two_hop' else 8}",
             "parallel.max_recv_tokens_factor=2"]  # fmt: skip
    sizes = []
    for name in ("mxfp8", "quartet2"):
        p = planned(*knobs, f"precision={name}")
        load = load_of(p.config.model, p.layout)
        sizes.append(sum(c.size for c in collectives(p.config.model, p.layout, [1]) if c.phase == "forward"))
    rows = {"all_to_all": 8 * load.rows, "two_hop": 2 * load.node_rows + 8 * load.rows, "fused": 8 * load.slots}[path]
    assert sizes[1] - sizes[0] == 8 * rows


@pytest.mark.parametrize("name", ["none/plan.png", "plan.notaformat"])
def test_a_picture_that_cannot_be_written_loses_nothing(capsys, tmp_path, name):
    code, out, err = run(capsys, "recipe=tiny_moe", "hardware=cpu", f"picture={tmp_path / name}")
    assert code == 2 and "what to change" in out
    assert err.startswith(f"error: picture={tmp_path / name}: can't be written (") and err.count("\n") == 1


@pytest.mark.parametrize(
    "knobs",
    [
        ["parallel.engine=deepspeed", "parallel.zero_stage=1", "parallel.expert=8", "search=true"],
        ["parallel.expert_path=fused", "parallel.expert=8", "parallel.max_recv_tokens_factor=1.5"],
        [
            "parallel.expert_path=fused",
            "parallel.expert=8",
            "parallel.max_recv_tokens_factor=1.5",
            "precision=mxfp8",
            "parallel.remat=selective",
        ],
    ],
)
def test_both_engines_and_the_fused_path_are_planned(capsys, knobs):
    code, out, err = run(capsys, "recipe=7b_moe", "nodes=2", *knobs)
    assert (code, err) == (0, "") and "time of a step" in out and "what to change" in out
    assert ("symmetric heap" in out) == ("parallel.expert_path=fused" in knobs)
    if "search=true" in knobs:
        first = next(line for line in out.splitlines() if line.startswith("   1 "))
        assert "parallel.engine=deepspeed parallel.zero_stage=1" in first and "reshard" not in first


def test_a_shared_expert_in_the_kernels_stays_in_a_node(capsys):
    """What parallel.fused_shared refuses is no answer of a search: expert groups of several nodes, products of fp8."""
    knobs = ["parallel.expert_path=fused", "parallel.fused_shared=true", "parallel.max_recv_tokens_factor=1.5"]
    code, out, err = run(capsys, "recipe=7b_moe", "nodes=2", "parallel.expert=8", *knobs, "search=true")
    assert (code, err) == (0, "")
    layouts = [line for line in out.splitlines() if "parallel.expert=" in line]
    assert layouts and not any("parallel.expert=16" in line or "fp8" in line for line in layouts)
    code, _, err = run(capsys, "recipe=7b_moe", "nodes=2", "parallel.expert=16", *knobs)
    assert code == 2 and err.startswith(
        "error: parallel.fused_shared=true: must be false where an expert group is in 2 nodes"
    )


def test_heap_of_fp8_products_has_their_tiles():
    """An expert's rows end in whole tiles of 64, not 128."""
    knobs = [
        "parallel.expert_path=fused",
        "parallel.max_recv_tokens_factor=1.5",
        "parallel.expert=8",
        "precision=fp8_block",
    ]
    rows = {}
    for layers in ("[attention]", "[attention,experts]"):
        made = plan.make_plan(
            cli.compose(["recipe=7b_moe", *knobs, "precision.dispatch=fp8", f"precision.layers={layers}"]),
            options.parse(plan.PlanOptions, ["nodes=1"]),
        )
        rows[layers] = heap_of(made.config.model, made.layout)["rows"][0][0]
    apart = cli.compose(["recipe=7b_moe", *knobs, "precision.dispatch=high"])
    made = plan.make_plan(apart, options.parse(plan.PlanOptions, ["nodes=1"]))
    assert made.timing.hidden["exchange of rows"] == 0
    assert heap_of(made.config.model, made.layout)["again"][0][0] == 0  # X never travels again
    assert made.layout.apart and heap_of(made.config.model, made.layout)["rows"][0][0] == rows["[attention]"]
    own = rows["[attention]"] - rows["[attention,experts]"]
    assert own == 64 * made.config.model.n_experts // 8


def advice(gib, *arguments, nodes):
    made = plan.make_plan(
        cli.compose(["recipe=7b_moe", *arguments]), options.parse(plan.PlanOptions, [f"nodes={nodes}"])
    )
    made = dataclasses.replace(made, machine=dataclasses.replace(made.machine, memory_gib=gib))
    return [line.partition(":")[0] for line in plan.advise(made, made.memory.total <= made.machine.memory)], made


def test_advice_needs_no_more_memory_than_there_is():
    """16 ranks in two nodes; experts on every rank are fastest, and take 44.0 GiB."""
    told, made = advice(45, nodes=2)
    assert told[0] == "parallel.expert=1" and made.memory.total > 45 * 2**30
    told, _ = advice(43, nodes=2)
    assert told and "parallel.expert=1" not in told


def test_advice_is_said_once():
    """One node: a copy in all and a copy a node are the same."""
    told, _ = advice(70, "parallel.replicate=8", nodes=1)
    assert told.count("parallel.replicate=1") == 1


def test_experts_on_every_rank_are_never_uneven(capsys):
    plans = [run(capsys, "recipe=7b_moe", "parallel.expert=1", f"imbalance={i}", "json=true")[1] for i in (1, 2)]
    assert plans[0].replace('"imbalance": 1.0', "") == plans[1].replace('"imbalance": 2.0', "")


def test_the_example_of_the_documentation_is_what_is_told(capsys):
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    command, shown = re.findall(r"^```\w+\n(.*?)^```", page, re.S | re.M)[:2]
    _, out, _ = run(capsys, *command.split()[2:])
    lines = iter(out.splitlines())
    for line in filter(str.strip, shown.splitlines()):  # in this order; parts are left out
        assert line.strip() == "…" or any(told.startswith(line.rstrip("…")) for told in lines), line
