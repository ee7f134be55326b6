"""The command line: what people type arrives, what is wrong is told in one line, and Hydra leaves nothing behind."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.launch import cli
from moesaic.launch.schema import Config

ROOT = Path(__file__).resolve().parents[2]


def names_in(group: str) -> str:
    """As a message lists what is shipped."""
    return ", ".join(sorted(path.stem for path in (ROOT / "recipes" / group).glob("*.yaml")))


RECIPES = names_in("recipe")


# --- what people type


@pytest.mark.parametrize(
    ("override", "knob", "value"),
    [
        ("train.steps=7", "train.steps", 7),
        ("train.micro_batch=null", "train.micro_batch", None),
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("parallel.expert=2", "parallel.expert", "2"),
        ("parallel.expert=auto", "parallel.expert", "auto"),
        ("precision=bf16", "precision.compute", "bf16"),
        ("data.files=a.txt", "data.files", ["a.txt"]),
        ("data.files=corpus/*.jsonl", "data.files", ["corpus/*.jsonl"]),
        ("data.files=~/my texts (old)/a=b.txt", "data.files", ["~/my texts (old)/a=b.txt"]),
        ("data.files=[a.txt,b/*.txt]", "data.files", ["a.txt", "b/*.txt"]),
        ("data.files=['a,b.txt']", "data.files", ["a,b.txt"]),
        ("data.files=[]", "data.files", []),
        ("resume=/some/path", "resume", "/some/path"),
        ("run_dir=/runs/lr=0.1", "run_dir", "/runs/lr=0.1"),
        ("run_dir=2026_01_02", "run_dir", "2026_01_02"),
        ("run_dir=1e3", "run_dir", "1e3"),
        ("run_dir='a,b'", "run_dir", "a,b"),
        ("run_dir=/x/${name}-${train.seed}", "run_dir", "/x/tiny_moe-0"),
        ("run_dir=it's", "run_dir", "it's"),
        ('run_dir=a"b', "run_dir", 'a"b'),
        ("wandb.name=null", "wandb.name", None),
        ("wandb.name=true", "wandb.name", "true"),
    ],
)
def test_typed(override, knob, value):
    found: object = cli.compose([override])
    for part in knob.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_tiny_moe_is_the_default():
    assert cli.compose() == cli.compose(["recipe=tiny_moe"])
    assert cli.compose().run_dir == "runs/tiny_moe"


def test_home_folder_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = cli.compose(["run_dir=~/runs/a", "resume=~/runs/b"])
    assert (config.run_dir, config.resume) == ("/home/somebody/runs/a", "/home/somebody/runs/b")


def test_given_files_are_read_instead_of_the_recipes_corpus():
    assert cli.compose().data.source == "python"
    assert cli.compose(["data.files=a.txt"]).data.source == "files"


def test_knobs_of_the_command_contract():
    assert {
        "run_dir", "resume", "train.steps", "train.seed", "train.checkpoint_every", "train.log_every", "train.eval_every",
        "train.eval_batches", "train.global_batch", "train.micro_batch", "train.seq_len", "train.sample", "data.files",
        "parallel.expert", "parallel.expert_path", "model.router.kind", "wandb.mode",
    } <= set(cli.knobs())  # fmt: skip
    assert cli.groups() == ["data", "model", "parallel", "precision", "recipe"]


# --- what is wrong


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.stpes=5", "train.stpes: unknown; nearest: train.steps"),
        ("+train.stpes=5", "train.stpes: unknown; nearest: train.steps"),
        ("train={stpes: 5}", "train.stpes: unknown; nearest: train.steps"),
        ("+foo={}", "foo: unknown"),
        ("lr=1", "lr: unknown; nearest: optim.lr"),
        ("recpie=7b_moe", "recpie: unknown; nearest: recipe"),
        ("train.steps=abc", "train.steps=abc: must be a whole number"),
        ("train.steps=1.5", "train.steps=1.5: must be a whole number"),
        ("train.steps=null", "train.steps=null: must be a whole number"),
        ("train.micro_batch=x", "train.micro_batch=x: must be a whole number, or null"),
        ("optim.lr=fast", "optim.lr=fast: must be a number"),
        ("model.tie_embeddings=5.5", "model.tie_embeddings=5.5: must be true or false"),
        ("parallel.expert=null", "parallel.expert=null: must be text"),
        ("data.files=null", "data.files=null: must be a list of texts: [a,b]"),
        ("train=5", "train=5: is a group of knobs, such as train.steps"),
        (
            "recipe=7b_mo",
            f"recipe=7b_mo: unknown; nearest: 7b_moe; must be one of {RECIPES}",
        ),
        ("recipe=foo", f"recipe=foo: unknown; must be one of {RECIPES}"),
        ("precision=fp8", f"precision=fp8: unknown; nearest: mxfp8; must be one of {names_in('precision')}"),
        ("train.steps", "train.steps: must be written knob=value"),
        ("train.steps=1=2", "train.steps=1=2: can't be read; put the value in quotes: \"train.steps='...'\""),
        ("run_dir=${nme}", "run_dir: Interpolation key 'nme' not found"),
        ("model.router.top_k=9", "model.router.top_k=9: must not exceed model.n_experts=8"),
        ("train.steps=0", "train.steps=0: must be at least 1"),
        ("run_dir=", "run_dir=: must not be empty"),
        ("optim.lr=nan", "optim.lr=nan: must be positive"),
        ("optim.beta2=1", "optim.beta2=1.0: must be in 0..1, without 1"),
        ("optim.schedule=step", "optim.schedule=step: must be one of cosine, wsd"),
        ("data.source=web", "data.source=web: must be one of python, files"),
        ("train.micro_batch=32", "train.micro_batch=32: must not exceed train.global_batch=8"),
        ("parallel.expert=3", "parallel.expert=3: must divide model.n_experts=8"),
        ("parallel.node_size=none", "parallel.node_size=none: must be auto or a positive number"),
        ("parallel.expert=all", "parallel.expert=all: must be auto or a positive number"),
        (
            "parallel.expert_path=fast",
            "parallel.expert_path=fast: must be one of auto, local, all_to_all, two_hop, fused",
        ),
    ],
)
def test_mistake(override, line):
    with pytest.raises(cli.UserError) as caught:
        cli.compose([override])
    assert str(caught.value) == line


def test_mistake_of_two_knobs():
    with pytest.raises(cli.UserError) as caught:
        cli.compose(["parallel.expert=2", "parallel.expert_path=local"])
    assert str(caught.value) == "parallel.expert=2: must be 1 or auto with parallel.expert_path=local"


def test_several_values_without_multirun():
    for override in ("train.steps=1,2", "train.steps=choice(1,2)", "data.files=a.txt,b.txt"):
        with pytest.raises(cli.UserError) as caught:
            cli.compose([override])
        assert str(caught.value).startswith(f"{override}: a sweep needs --multirun; a list is written [a,b]")
        assert "\n" not in str(caught.value)


# --- files of a run


def test_save_and_load(tmp_path):
    config = cli.compose(["recipe=7b_moe", "data.files=a b.txt", "train.micro_batch=4", "run_dir=/x/${name}"])
    cli.save(config, tmp_path / "config.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert "run_dir: /x/7b_moe" in (tmp_path / "config.yaml").read_text().splitlines()
    assert cli.load(tmp_path / "config.yaml") == config
    assert cli.from_dict(dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, "No such file or directory"),
        ("train:\n  stpes: 5\n", "train.stpes: unknown; nearest: train.steps"),
        ("train:\n  steps: -1\n", "train.steps=-1: must be at least 1"),
        ("- a\n", "must hold the knobs of a run"),
    ],
)
def test_load_what_is_no_config(tmp_path, text, line):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(cli.UserError) as caught:
        cli.load(path)
    assert str(caught.value) == f"{path}: {line}"


# --- a program


@pytest.fixture
def program(monkeypatch, tmp_path):
    """`program(main, *arguments)`: what `cli.run(main)` does with a command line, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # set, so that it is put back
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def start(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        cli.run(main)

    return start


def refuse(config: Config) -> None:
    raise cli.UserError(f"train.steps={config.train.steps}: too many")


def test_run_calls_main_and_hydra_writes_nothing(program, tmp_path):
    seen: list[Config] = []
    program(seen.append, "train.steps=3", "data.files=*.txt")
    assert seen == [cli.compose(["train.steps=3", "data.files=*.txt"])]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train.steps=9"], "train.steps=9: too many"),
        (["train.stpes=9"], "train.stpes: unknown; nearest: train.steps"),
        (["train.steps=0"], "train.steps=0: must be at least 1"),
        (["recipe=foo"], f"recipe=foo: unknown; must be one of {RECIPES}"),
        (["--stpes"], "unrecognized arguments: --stpes"),
        (["--multirun", "train.steps=1,x"], "train.steps=x: must be a whole number"),
    ],
)
def test_a_mistake_ends_the_program_with_one_line(program, monkeypatch, capfd, arguments, line):
    with pytest.raises(SystemExit) as ended:
        program(refuse, *arguments)
    assert ended.value.code == 2
    assert capfd.readouterr() == ("", f"error: {line}\n")

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        program(refuse, *arguments)
    assert ended.value.code == 2
    assert capfd.readouterr() == ("", "")


def test_a_rank_alone_in_its_trouble_says_so(program, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(cli, "GRACE", 0.0)
    with pytest.raises(SystemExit):
        program(refuse, "train.steps=9")
    assert capfd.readouterr().err == "error on rank 3: train.steps=9: too many\n"


def test_a_bug_in_main_keeps_its_traceback(program):
    def main(config: Config) -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="^ours$"):
        program(main)
    with pytest.raises(ValueError, match="^ours$"):
        program(main, "--multirun", "train.steps=1,2")


def test_multirun(program, tmp_path):
    seen = []
    program(lambda c: seen.append((c.train.steps, c.run_dir)), "--multirun", "train.steps=4,5", "run_dir=sweep")
    assert seen == [(4, "sweep/0"), (5, "sweep/1")]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0", "1", "multirun.yaml", "sweep"]


def test_show_config_and_help(program, capfd):
    program(refuse, "--cfg", "job", "train.steps=33")
    assert "  steps: 33\n" in capfd.readouterr().out
    with pytest.raises(SystemExit) as ended:
        program(refuse, "--help")
    assert not ended.value.code
    assert f"recipe: {RECIPES}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train:\n  stpes: 5\n", "recipe/mine.yaml: train.stpes: unknown; nearest: train.steps"),
        ("train:\n  steps: x\n", "recipe/mine.yaml: train.steps=x: must be a whole number"),
        ("defaults:\n  - override /model: foo\n", f"model=foo: unknown; must be one of {names_in('model')}"),
        ("train: [\n", None),
    ],
)
def test_mistake_in_a_recipe_of_ones_own(program, tmp_path, capfd, text, line):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\n" + text)
    with pytest.raises(SystemExit) as ended:
        program(refuse, "--config-dir", str(tmp_path), "recipe=mine")
    assert ended.value.code == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert error == f"error: {line}\n" if line else "recipe/mine.yaml" in error


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "start", [[str(ROOT / "launch" / "train.py")], ["-m", "moesaic.launch.train"]], ids=["file", "module"]
)
def test_train_finds_the_recipes_from_anywhere(start, tmp_path):
    """As torchrun starts a file, with launch/ first on sys.path, and as a module."""
    command = [sys.executable, *start, "--cfg", "job", "recipe=7b_moe"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "d_model: 1536" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_rank_0_alone_speaks_under_torchrun(tmp_path):
    """Also when rank 1 meets the mistake long before it: torchrun ends every rank when one has exited."""
    (tmp_path / "program.py").write_text(
        "import os, time\n"
        "from moesaic.launch import cli\n"
        "time.sleep(2 if os.environ['RANK'] == '0' else 0)\n"
        "cli.run(lambda config: None)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "program.py"), "train.stpes=5"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [
        "error: train.stpes: unknown; nearest: train.steps"
    ]
    assert 'program.py", line' not in done.stderr
    assert "exitcode  : 2" in done.stderr
