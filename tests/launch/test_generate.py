"""launch/generate.py, on the checkpoint of a run of a few steps."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moesaic.launch import cli, generate, options, train
from moesaic.moe.model import build

PROGRAM = Path(__file__).resolve().parents[2] / "launch" / "generate.py"
Sample = Callable[..., str]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    words = random.Random(0).choices("router expert dispatch combine".split(), k=2000)
    (folder / "words.txt").write_text(" ".join(words))
    knobs = [
        f"run_dir={folder}/run data.files={folder}/words.txt data.val_files={folder}/words.txt data.cache={folder}/cache",
        "model.d_model=32 model.n_layers=2 model.n_heads=2 model.n_experts=4 model.d_expert=32 optim.lr=0.01 optim.warmup=5",
        "train.steps=60 train.checkpoint_every=20 train.keep_checkpoints=2 train.seq_len=32 train.global_batch=8",
        "train.eval_every=0 train.sample=0 train.log_every=60 wandb.mode=disabled",
    ]
    train.main(cli.compose(" ".join(knobs).split()))
    return folder / "run"


@pytest.fixture
def sample(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sample:
    """What the program prints with these options, through the call that ends it."""

    def run(**choice: object) -> str:
        arguments = {"run_dir": run_dir, "tokens": 40} | choice
        monkeypatch.setattr(sys, "argv", ["generate.py", *(f"{name}={value}" for name, value in arguments.items())])
        with pytest.raises(SystemExit) as stop:
            options.run(generate.main, generate.Options, generate.__doc__)
        printed = capsys.readouterr()
        assert (stop.value.code, printed.err) == (0, "")
        return printed.out

    return run


def test_one_seed_gives_one_text(sample: Sample) -> None:
    text = sample(prompt="router ", seed=1)
    assert text.startswith("router ") and text.endswith("\n")
    assert len(text.encode()) >= len("router ") + 40
    assert sample(prompt="router ", seed=1) == text
    assert sample(prompt="router ", seed=2) != text


def test_temperature_0_takes_the_best_token(sample: Sample) -> None:
    best = sample(temperature=0, seed=1)
    assert sample(temperature=0, seed=2) == best
    assert sample(top_k=1, seed=3) == best, "the best of one is the best"
    assert sample(temperature=1e-40, seed=4) == best, "it falls to zero smoothly"
    assert sample(temperature=0, tokens=20).rstrip("\n") == best.rstrip("\n")[:20]


def test_top_k_leaves_the_k_best(sample: Sample) -> None:
    """A very high temperature makes all that remain equally likely: 256 bytes and the separator, or five of them."""
    few, many = (
        {sample(prompt="router", tokens=1, temperature=1e6, top_k=top_k, seed=seed) for seed in range(20)} for top_k in (5, 0)
    )  # fmt: skip
    assert 2 <= len(few) <= 5 < len(many)
    assert sample(prompt="router", tokens=1, temperature=0) in few


def test_it_has_learnt_the_words(sample: Sample) -> None:
    """Not the initial weights: 257 tokens at random hold a letter of these words once in twenty."""
    assert sum(letter in "router expert dispatch combine" for letter in sample(tokens=100)) > 70


def test_the_newest_checkpoint_or_the_one_that_is_named(run_dir: Path, sample: Sample) -> None:
    newest = run_dir / "checkpoints" / "step_00000060"
    assert sample(run_dir=newest) == sample()
    assert sample(run_dir=run_dir / "checkpoints" / "step_00000040") != sample()


class SumsContext(nn.Module):
    """Its best token is the sum of all that it sees, modulo 50."""

    def forward(self, tokens_BS: torch.Tensor) -> SimpleNamespace:
        best_BS = tokens_BS.sum(dim=1, keepdim=True).expand_as(tokens_BS) % 50
        return SimpleNamespace(logits=F.one_hot(best_BS, 50))


def test_the_model_sees_the_newest_tokens_that_fit_its_context() -> None:
    """1 2 3, context 2: 2 + 3 is 5, 3 + 5 is 8; context 4: 1 + 2 + 3 is 6, 1 + 2 + 3 + 6 is 12, 2 + 3 + 6 + 12 is 23."""
    prompt_S = torch.tensor([1, 2, 3])
    for context, expected in [(2, [5, 8, 13, 21]), (4, [6, 12, 23, 44])]:
        (new,) = generate.sample_tokens(SumsContext(), [prompt_S], 4, context, temperature=0, top_k=0, seed=0)
        assert new == expected


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_a_batch_with_a_cache_gives_what_each_prompt_gives_alone(attention: str) -> None:
    """Prompts of different lengths, some longer than others' continuations, past the context too: the ids of a plain loop that
    computes everything anew for every token."""
    knobs = "model.d_model=32 model.n_layers=2 model.n_heads=4 model.n_kv_heads=2 model.n_experts=4 model.d_expert=32".split()
    if attention == "mla":
        knobs = [
            *knobs[:3],
            *knobs[4:],
            "model.attention=mla",
            "model.qk_norm=none",
            "model.mla.kv_lora_rank=8",
            "model.mla.q_lora_rank=null",
        ]
        knobs += ["model.mla.qk_nope_head_dim=8", "model.mla.qk_rope_head_dim=4", "model.mla.v_head_dim=8"]
    model = build(cli.compose(knobs).model, 3, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # so that tokens differ clearly
    prompts = [torch.randint(257, (n,)) for n in (3, 11, 1, 7)]
    context, tokens = 18, 12
    new = generate.sample_tokens(model, prompts, tokens, context, temperature=0.7, top_k=20, seed=5)
    for row, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(5 + row)
        ids = prompt.tolist()
        for _ in range(tokens):
            with torch.no_grad():
                logits = model.eval()(torch.tensor([ids[-context:]])).logits[0, -1]
            best = logits.topk(20)
            p = torch.zeros(logits.numel()).scatter_(0, best.indices, (best.values / 0.7).softmax(0))
            ids.append(int(torch.multinomial(p, 1, generator=generator)))
        assert new[row] == ids[prompt.numel() :]
    assert all(block.attention.cache is None for block in model.blocks)


def test_ranks_take_the_tokens_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else, where their logits differ in a bit, they could call the model unequally often, and wait for each other."""
    model = build(cli.compose(["recipe=tiny_moe", "model.n_layers=1"]).model, 0, torch.device("cpu"))
    monkeypatch.setattr(generate.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(generate.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(generate.dist, "broadcast", lambda tokens, src: tokens.fill_(7) if src == 0 else None)
    assert generate.sample_tokens(model, [torch.tensor([1, 2])], 3, 8, temperature=0.0, top_k=0, seed=0) == [[7, 7, 7]]


def test_a_file_of_prompts(sample: Sample, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("router\n\nexpert dispatch\n")
    lines = [json.loads(line) for line in sample(prompts=tmp_path / "prompts.txt", batch=2, tokens=9).splitlines()]
    assert [line["prompt"] for line in lines] == ["router", "", "expert dispatch"]
    assert lines[2]["text"] + "\n" == sample(prompt="expert dispatch", seed=2, tokens=9)


def test_a_prompt_longer_than_the_context(sample: Sample) -> None:
    prompt = "router expert dispatch " * 5
    assert sample(prompt=prompt, tokens=3).startswith(prompt)


def test_no_tokens(sample: Sample) -> None:
    assert sample(prompt="router", tokens=0) == "router\n"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("run_dir=/no/such/run", ["run_dir=/no/such/run: must be a run that holds a checkpoint"]),
        ("run_dir=", ["run_dir=: must be a run"]),
        ("temprature=1", ["temprature: unknown", "nearest: temperature"]),
        ("tokens=many", ["tokens=many: must be a whole number"]),
        ("tokens=-1", ["tokens=-1: must not be negative"]),
        ("temperature=-0.5", ["temperature=-0.5: must not be negative"]),
        ("temperature=nan", ["temperature=nan: must be a finite number"]),
        ("temperature=inf", ["temperature=inf: must be a finite number"]),
        ("batch=0", ["batch=0: must be at least 1"]),
        ("top_k=-2", ["top_k=-2: must not be negative"]),
        ("prompt", ["prompt: must be written name=value"]),
    ],
)
def test_a_mistake_is_one_line(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str, words: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", f"run_dir={run_dir}", argument])
    with pytest.raises(SystemExit) as stop:
        options.run(generate.main, generate.Options, generate.__doc__)
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out) == (2, "")
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_the_program(run_dir: Path, tmp_path: Path, sample: Sample) -> None:
    """From another folder, as a process of its own: the same text, and nothing left behind."""
    for arguments, code in [(["prompt=expert ", "tokens=40"], 0), (["top_k=-1"], 2)]:
        done = subprocess.run(
            [sys.executable, str(PROGRAM), f"run_dir={run_dir}", *arguments], cwd=tmp_path, capture_output=True,
            text=True, timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        if code == 0:
            assert (done.stdout, done.stderr) == (sample(prompt="expert "), "")
        else:
            assert done.stderr == "error: top_k=-1: must not be negative\n"
    assert list(tmp_path.iterdir()) == []


def test_files_of_prompts_that_can_not_be(tmp_path: Path):
    (tmp_path / "empty").touch()
    (tmp_path / "bytes").write_bytes(b"a\xff")
    for name, told in (
        ("none", r"cannot be read \(No such file"),
        ("empty", "holds no prompt"),
        ("bytes", r"cannot be read \(not UTF-8"),
    ):
        with pytest.raises(ValueError, match=rf"^prompts={tmp_path / name}: {told}"):
            generate.main(generate.Options(prompts=str(tmp_path / name)))
