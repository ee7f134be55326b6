"""launch/export.py and launch/upcycle.py end to end, and runs that start from a Hugging Face folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.launch import cli, train
from moesaic.launch.export import Options, bytes_tokenizer, main
from moesaic.launch.generate import newest_checkpoint
from moesaic.launch.tokens import load_tokenizer
from moesaic.launch.upcycle import Options as UpcycleOptions
from moesaic.launch.upcycle import main as upcycle
from moesaic.moe import hf
from moesaic.moe.model import build
from moesaic.parallel import checkpoint

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = ["model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.d_expert=16", "model.n_experts=4"]
RUN = ["train.steps=2", "train.global_batch=4", "train.seq_len=32", "train.log_every=1", "train.eval_every=0", "train.sample=0",
       "optim.lr=1e-3", "wandb.mode=disabled"]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"Document {i} counts: " + " ".join(str(i * j) for j in range(40)))
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Two ranks, experts divided."""
    folder = tmp_path_factory.mktemp("run")
    launch(
        2, "recipe=tiny_moe", *SMALL, *RUN, *data_of(text, folder), "model.router.renormalize=true", f"run_dir={folder}"
    )
    return folder


def data_of(text: Path, folder: Path) -> list[str]:
    return [f"data.files={text}/*.txt", "data.val_fraction=0.3", f"data.cache={folder}/cache"]


def launch(ranks: int, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return spoken([*command, str(ROOT / "launch/train.py"), *arguments])


def spoken(command: list[str], fails: bool = False) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def apart(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


# ---------------------------------------------------------------- export


def test_a_run_of_two_ranks_becomes_a_folder_that_transformers_reads(run_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "new" / "hf"
    program = [sys.executable, str(ROOT / "launch/export.py"), f"run_dir={run_dir}", f"out={out}"]
    lines = spoken([*program, "family=qwen3_moe", "dtype=fp32", "max_shard_gb=0.00005"])
    assert "100% done" in lines and len(list(out.glob("*.safetensors"))) > 2

    path = newest_checkpoint(str(run_dir))
    config = cli.from_dict(checkpoint.read_state(path)["config"])
    model = build(config.model, 0, CPU)
    checkpoint.load_model(path, model)
    peer = AutoModelForCausalLM.from_pretrained(out, local_files_only=True, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    said = "def f():\n\treturn 'ÿ€'\0<|doc|>"
    ids = torch.tensor([[256, *load_tokenizer("bytes").encode(said[:-7]).tolist(), 256]])
    assert tokenizer("<|doc|>" + said, add_special_tokens=False)["input_ids"] == ids[0].tolist()
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == said[:-7]
    assert tokenizer.eos_token_id == peer.config.eos_token_id == peer.generation_config.eos_token_id == 256
    with torch.no_grad():
        assert apart(model(ids).logits, peer(ids).logits) < 1e-5
    assert peer.config.max_position_embeddings == 32
    assert sorted(p.name for p in out.parent.iterdir()) == ["hf"]


def test_tokenizer_files_go_along(tmp_path: Path) -> None:
    from moesaic.launch.export import write_tokenizer

    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    bytes_tokenizer().save(str(tmp_path / "from/tokenizer.json"))
    (tmp_path / "from/tokenizer_config.json").write_text('{"chat_template": "x"}')
    (tmp_path / "from/tokenization_evil.py").write_text("")
    write_tokenizer(tmp_path / "to", load_tokenizer(str(tmp_path / "from")), 16)
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "to" / name).read_bytes() == (tmp_path / "from" / name).read_bytes()


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        (dict(family="mixtral"), "model.qk_norm=head: can't be exported as family=mixtral, which has none"),
        (dict(family="gpt2"), "family=gpt2: must be one of olmoe"),
        (dict(dtype="int4"), "dtype=int4: must be one of bf16, fp32"),
        (dict(max_shard_gb=0.0), "max_shard_gb=0.0: must be positive"),
        (dict(run_dir="/nowhere"), "run_dir=/nowhere: must be a run that holds a checkpoint"),
        (dict(out=""), "out=: must name a folder"),
        (dict(out="/tmp"), "out=/tmp: exists already"),
    ],
)
def test_what_export_refuses(run_dir: Path, tmp_path: Path, choice: dict[str, Any], line: str) -> None:
    options = dict(run_dir=str(run_dir), out=str(tmp_path / "hf"), family="qwen3_moe") | choice
    with pytest.raises(ValueError, match=line):
        main(Options(**options))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_nothing(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(hf, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        main(Options(run_dir=str(run_dir), out=str(tmp_path / "hf"), family="qwen3_moe"))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- starting from a folder


def here(*knobs: str) -> None:
    train.main(cli.compose(list(knobs)))


@pytest.fixture(scope="module")
def folder(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "hf"
    main(Options(run_dir=str(run_dir), out=str(out), family="qwen3_moe", dtype="fp32"))
    return out


def continued(text: Path, cache: Path, folder: Path, run_dir: Path) -> list[str]:
    return ["recipe=continue_hf", *RUN, *data_of(text, cache), f"init_from={folder}", f"run_dir={run_dir}"]


def test_continue_from_an_export(
    run_dir: Path, folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run starts with the exported weights and the folder's shape and tokenizer; its resume needs the folder no more."""
    moved, second = tmp_path / "moved", tmp_path / "second"
    shutil.copytree(folder, moved)
    knobs = [*continued(text, tmp_path, moved, second), f"data.tokenizer={moved}", "parallel.expert=1"]
    here(*knobs, "train.steps=1", "optim.lr=1e-12", "model.router.z_coef=0.5")
    assert f"weights: {moved} (qwen3_moe)" in capsys.readouterr().out
    before, after = newest_checkpoint(str(run_dir)), newest_checkpoint(str(second))
    config = cli.load(second / "config.yaml")
    assert config.model.d_model == 32 and config.model.router.renormalize and config.model.router.z_coef == 0.5
    one, other = build(config.model, 0, CPU), build(config.model, 1, CPU)
    checkpoint.load_model(before, one)
    checkpoint.load_model(after, other)
    assert all(
        torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )

    shutil.move(moved / "config.json", tmp_path)
    here(*knobs, "train.steps=2", "optim.lr=1e-12", "model.router.z_coef=0.5")
    told = capsys.readouterr().out
    assert "resumed from" in told and "weights:" not in told
    assert [line["step"] for line in metrics(second)] == [1, 2]


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        ([], "data.tokenizer=bytes: init_from=.* has a tokenizer of its own; data.tokenizer=.*hf chooses it"),
        (["data.tokenizer=TOKENIZER", "model=tiny_moe"], "model.d_model=192: init_from=.*hf has 32$"),
        (["data.tokenizer=TOKENIZER", "model_from_init=false"], "model.d_model=256: init_from=.* has 32; model_from_init=true"),
        (["data.tokenizer=TOKENIZER", "model.router.top_k=3"], "model.router.top_k=3: init_from=.* has 2"),
        (["init_from=null"], "init_from=null: must be the folder"),
        (["init_from=/nowhere"], "/nowhere/config.json: No such file"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_folder(folder: Path, text: Path, tmp_path: Path, knobs: list[str], line: str) -> None:
    knobs = [knob.replace("TOKENIZER", str(folder)) for knob in knobs]
    with pytest.raises(cli.UserError, match=line):
        here(*continued(text, tmp_path, folder, tmp_path / "run"), *knobs)


# ---------------------------------------------------------------- upcycling

DENSE: dict[str, Any] = dict(
    vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.2, pad_token_id=None, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
)  # fmt: skip


def dense(kind: str, folder: Path, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(DENSE | changes))).float()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("")
    return model


@pytest.mark.parametrize(
    ("kind", "changes", "options"),
    [
        ("llama", {}, dict(experts=4, top_k=2)),
        (
            "llama",
            dict(head_dim=10, tie_word_embeddings=True),
            dict(experts=3, top_k=3, dtype="fp32", max_shard_gb=3e-5),
        ),
        ("mistral", dict(sliding_window=None), dict(experts=12, top_k=6, d_expert=8)),
        ("qwen3", dict(head_dim=10), dict(experts=4, top_k=2, d_expert=12)),
    ],
)
def test_an_upcycled_model_computes_what_the_dense_one_does(
    tmp_path: Path, kind: str, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    peer = dense(kind, tmp_path / "dense", **changes)
    upcycle(UpcycleOptions(dense=str(tmp_path / "dense"), out=str(tmp_path / "moe"), **options))
    ids = torch.randint(0, 61, (2, 13))
    read = hf.Checkpoint(tmp_path / "moe")
    model = build(read.config, 0, CPU, read.read_into)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", local_files_only=True, attn_implementation="eager")
    with torch.no_grad():
        want = peer(ids).logits
        assert apart(model(ids).logits, want) < 1e-5
        assert apart(again(ids).logits, want) < 1e-5
    assert model.config.n_experts == options["experts"] and model.config.router.top_k == options["top_k"]
    assert (
        again.config.eos_token_id == 2 and again.config.max_position_embeddings == peer.config.max_position_embeddings
    )
    assert (tmp_path / "moe/tokenizer.json").exists() and not (tmp_path / "moe/modeling_evil.py").exists()
    routed = model(ids).counts
    assert (routed > 0).sum() > routed.shape[0] * options["top_k"] or options["top_k"] == options["experts"]


def test_noise_is_relative_and_seeded_per_expert(tmp_path: Path) -> None:
    dense("llama", tmp_path / "dense", intermediate_size=200, hidden_size=48)
    made = {}
    for name, noise, seed in (("a", 0.0, 0), ("b", 0.5, 0), ("c", 0.5, 0), ("d", 0.5, 1)):
        upcycle(UpcycleOptions(str(tmp_path / "dense"), str(tmp_path / name), experts=3, noise=noise, seed=seed))
        read = hf.Checkpoint(tmp_path / name)
        made[name] = {n: read.read(n) for n in hf.tensor_shapes(read.config)}
    assert all(torch.equal(value, made["c"][name]) for name, value in made["b"].items())
    for name, value in made["b"].items():
        if ".experts." not in name:
            assert torch.equal(value, made["a"][name])
            continue
        assert not torch.equal(value, made["d"][name])
        added = value - made["a"][name]
        ratio = added.flatten(1).std(dim=1) / made["a"][name].std()
        torch.testing.assert_close(ratio, torch.full((3,), 0.5), rtol=0.05, atol=0)
        assert torch.corrcoef(added.flatten(1)).fill_diagonal_(0).abs().max() < 0.05
    routers = [made[name]["blocks.0.ffn.router.weight_ED"] for name in "ad"]
    assert not torch.equal(*routers) and 0.01 < routers[0].std() < 0.4


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (dict(d_expert=7), "d_expert=7: must divide the width of the dense layer, 24"),
        (dict(d_expert=8, experts=8, top_k=3), "experts=8: must be a multiple of 3, the slices"),
        (dict(d_expert=8, experts=9, top_k=2), "top_k=2: must be a multiple of 3, the slices"),
        (dict(experts=2, top_k=3), "top_k=3: must lie in 1..experts=2"),
        (dict(noise=-1.0), "noise=-1.0: must not be negative"),
        (dict(dense=""), "dense=: must be a folder"),
        (dict(dtype="fp8"), "dtype=fp8: must be one of"),
    ],
)
def test_what_upcycling_refuses(tmp_path: Path, options: dict[str, Any], line: str) -> None:
    dense("llama", tmp_path / "dense")
    with pytest.raises(ValueError, match=line):
        upcycle(UpcycleOptions(**(dict(dense=str(tmp_path / "dense"), out=str(tmp_path / "moe")) | options)))
    assert not (tmp_path / "moe").exists()


def test_what_has_experts_is_no_dense_model_and_the_reverse(folder: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"dense={folder}: qwen3_moe has experts already; must be one of llama"):
        upcycle(UpcycleOptions(dense=str(folder), out=str(tmp_path / "moe")))
    dense("llama", tmp_path / "dense")
    with pytest.raises(cli.UserError, match=r"init_from=.*dense: llama has no experts; launch/upcycle.py makes some"):
        here(*continued(text, tmp_path, tmp_path / "dense", tmp_path / "run"))
