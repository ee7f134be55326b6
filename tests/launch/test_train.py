"""The command itself, `torchrun --standalone --nproc-per-node 2 launch/train.py ...`, on a very small model.

What needs no second rank and no kill runs in this process, through the same `cli.run(main)` that ends the program: a
launch costs seconds.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moesaic.kernels.symmetric import FusedError, HeapError, LostError
from moesaic.launch import cli, startup, train
from moesaic.launch.data import open_data, train_batch
from moesaic.launch.optim import make_optimizer
from moesaic.moe.model import build
from moesaic.parallel import checkpoint
from moesaic.parallel.fsdp import FSDPEngine
from tests.launch.launches import (
    KEPT,
    PROGRAM,
    ROOT,
    STEPS,
    Place,
    assert_same_end,
    evaluations,
    finished,
    here,
    launch,
    losses,
    records,
    tensors,
)

# ---------------------------------------------------------------- mistakes


@pytest.fixture
def mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Runs the program in this process with these arguments, and returns the one line with which it ends."""

    def run(arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # which the program sets: undone at the end
        with pytest.raises(SystemExit) as stop:
            cli.run(train.main)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


MISTAKES = [
    (["model.n_experts=3", "parallel.expert=2"], ["parallel.expert=2", "must divide model.n_experts=3"]),
    (["model.router.top_k=5"], ["model.router.top_k=5", "must not exceed model.n_experts=4"]),
    (["train.seq_len=1000000"], ["train.seq_len=1000000", "longer than"]),
    (["recipe=tiny_mo"], ["recipe=tiny_mo", "must be one of", "nearest: tiny_moe"]),
    (["train.stesp=3"], ["train.stesp", "unknown", "nearest: train.steps"]),
    (["train.steps=many"], ["train.steps=many", "must be a whole number"]),
    (["parallel.expert=2"], ["parallel.expert=2", "must divide the number of ranks, 1"]),
    (["data.files=/no/such/*.txt"], ["data.files", "/no/such/*.txt", "no"]),
    (["resume=nonsense"], ["resume=nonsense", "must be auto, never, a checkpoint"]),
    (["run_dir=/proc/run"], ["run_dir=/proc/run", "cannot be made"]),
    (["train.seed=99999999999999999"], ["train.seed=99999999999999999", "must be below"]),
    (["model.init_std=-1"], ["model.init_std=-1", "must not be negative"]),
    (["parallel.engine=zero"], ["parallel.engine=zero", "must be one of fsdp, deepspeed"]),
    (["parallel.zero_stage=2"], ["parallel.zero_stage=2", "must be null with parallel.engine=fsdp"]),
    (["parallel.engine=deepspeed", "parallel.reshard=never"], ["parallel.reshard=never", "must be auto"]),
    (["parallel.reshard=yes"], ["parallel.reshard=yes", "must be one of auto, always, never"]),
    (["parallel.remat=all"], ["parallel.remat=all", "must be one of none, selective, full"]),
    (["parallel.replicate=2"], ["parallel.replicate=2", "must divide the number of ranks, 1"]),
    (["parallel.overload=drop"], ["parallel.overload=drop", "parallel.max_recv_tokens_factor"]),
    (
        ["parallel.max_recv_tokens_factor=inf"],
        ["parallel.max_recv_tokens_factor=inf", "and finite, or null"],
    ),
    (["precision=nvfp4", "model.n_layers=1"], ["precision.high_first=0", "leaves none of model.n_layers=1"]),
    (["model.vocab_size=100"], ["model.vocab_size=100", "must be at least 257"]),
]


@pytest.mark.parametrize(("knobs", "words"), MISTAKES, ids=[knobs[0] for knobs, _ in MISTAKES])
def test_a_mistake_is_one_line(
    place: Place, tmp_path: Path, mistake: Callable[[list[str]], str], knobs: list[str], words: list[str]
) -> None:
    line = mistake(place.knobs(tmp_path / "run", *knobs))
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


def test_what_the_fused_kernels_do_not_have_is_one_line(
    place: Place, tmp_path: Path, mistake: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesaic.kernels import fused_ep

    knobs = place.knobs(tmp_path / "run", "parallel.expert_path=fused", "precision=fp8_block", "parallel.comm_sms=132")

    def refused(device: torch.device, spared: int) -> int:
        raise ValueError(f"parallel.comm_sms={spared}: must be below the multiprocessors of the device, 132")

    monkeypatch.setattr(fused_ep, "grid_programs", refused)
    assert mistake(knobs).startswith("error: parallel.comm_sms=132: must be below the multiprocessors")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("error", "code"), [(LostError, 4), (FusedError, 3), (HeapError, 3)])
def test_a_rank_that_waited_in_vain_may_be_started_anew(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    error: type[Exception], code: int,
) -> None:  # fmt: skip
    """Not one whose rows have no room: with those it would end again, and so its torchrun is ended."""
    killed: list[int] = []

    def fail(*_: Any) -> None:
        raise error("rank 0 of the group")

    monkeypatch.setattr(train, "train", fail)
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *place.knobs(tmp_path / "run")])
    for name, value in (("HYDRA_FULL_ERROR", ""), ("LOCAL_RANK", "0"), ("TORCHELASTIC_MAX_RESTARTS", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main)
    assert stop.value.code == code and capsys.readouterr().err == "error: rank 0 of the group\n"
    assert killed == ([] if code == 4 else [os.getppid()])


def test_more_ranks_than_gpus_is_one_line(
    place: Place, tmp_path: Path, mistake: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    line = mistake(place.knobs(tmp_path / "run"))
    assert line == "error: --nproc-per-node=2: must not exceed the number of GPUs here, 1"


def test_a_large_recipe_without_data_says_what_is_missing(mistake: Callable[[list[str]], str]) -> None:
    line = mistake(["recipe=7b_moe"])
    assert line.startswith("error: data.files=[]: must") and "launch/prepare.py" in line


def test_resuming_what_does_not_fit_is_one_line(
    place: Place, reference: tuple[Path, str], tmp_path: Path, mistake: Callable[[list[str]], str]
) -> None:
    run_dir, _ = reference
    (tmp_path / "other.txt").write_text("another text " * 1000)
    for knobs, words in [
        (["resume=never"], ["resume=never", f"run_dir={run_dir} holds checkpoints"]),
        (["model.d_model=48"], ["model.d_model=48", "was made with 32"]),
        (["train.seq_len=32"], ["train.seq_len=32", "was made with 64"]),
        (["model.router.top_k=1"], ["model.router.top_k=1", "was made with 2"]),
        (["model.router.kind=sigmoid_bias"], ["model.router.kind=sigmoid_bias", "was made with softmax_topk"]),
        ([f"data.files={tmp_path}/other.txt"], ["data.files", "other.txt", "other data"]),
        ([f"resume={tmp_path}"], [f"resume={tmp_path}", "must be auto, never, a checkpoint"]),
        ([f"resume={run_dir}/checkpoints/step_00000030"], ["must be auto", f"run_dir={run_dir} holds step_00000040"]),
    ]:
        line = mistake(place.knobs(run_dir, *knobs))
        assert line.startswith("error: ")
        for word in words:
            assert word in line
    assert losses(run_dir)[-1][0] == STEPS


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        (["train.stesp=3"], ["train.stesp: unknown; nearest: train.steps"]),
        (["parallel.expert=4"], ["parallel.expert=4: must divide the number of ranks, 2"]),
        (["parallel.node_size=3"], ["parallel.node_size=3: must divide the expert degree, 2, or be a multiple of it"]),
        (["parallel.max_recv_tokens_factor=1"], ["parallel.max_recv_tokens_factor=1: rank ", "in blocks.0.ffn"]),
    ],
    ids=lambda value: value[0].partition("=")[0],
)
def test_of_two_ranks_one_tells_the_mistake(place: Place, tmp_path: Path, knobs: list[str], words: list[str]) -> None:
    assert_mistake(tmp_path, place.knobs(tmp_path / "run", *knobs), words)


def test_the_large_recipe_without_data_on_two_ranks(tmp_path: Path) -> None:
    assert_mistake(tmp_path, ["recipe=7b_moe", "parallel.expert=2"], ["data.files=[]: must", "launch/prepare.py"])


def test_of_two_resuming_ranks_one_tells_the_mistake(place: Place, reference: tuple[Path, str], tmp_path: Path) -> None:
    run_dir, _ = reference
    assert_mistake(tmp_path, place.knobs(run_dir, "model.d_model=48"), ["model.d_model=48: ", "was made with 32"])


def assert_mistake(folder: Path, knobs: list[str], words: list[str]) -> None:
    """A launch ends within a minute with code 2 of its ranks, one line and no traceback of ours."""
    with launch(folder, knobs) as running:
        assert running.wait(60) != 0
        text = running.text()
        (line,) = re.findall("^.*error(?: on rank .)?: .*$", text.partition("exitcode")[0], re.M)
        assert line.startswith("error: ")
        for word in words:
            assert word in line
        assert re.search(r"exitcode\s*: 2\b", text)
        for ours in (ROOT / folder for folder in ("launch", "moe", "parallel", "moesaic")):
            assert f'File "{ours}' not in text


# ---------------------------------------------------------------- an uninterrupted run


def test_an_uninterrupted_run(reference: tuple[Path, str]) -> None:
    run_dir, text = reference
    assert [step for step, *_ in losses(run_dir)] == list(range(1, STEPS + 1))
    assert losses(run_dir)[-1][1] < losses(run_dir)[0][1] - 0.5
    assert [step for step, _ in evaluations(run_dir)] == [30, STEPS]
    assert f"final val_loss {evaluations(run_dir)[-1][1]:.4f}" in text
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_00000030", "step_00000040"]
    assert not (run_dir / "wandb").exists()
    sample = re.search("--- sample\n(.+)\n---", text, re.S)
    assert sample is not None and 0 < len(sample[1].encode("utf-8", "replace")) <= 4 * 25
    assert cli.load(run_dir / "config.yaml") == cli.from_dict(
        checkpoint.read_state(checkpoint.step_folder(run_dir / "checkpoints", STEPS))["config"]
    )


def test_another_process_finds_the_same_val_loss(reference: tuple[Path, str]) -> None:
    run_dir, _ = reference
    for step, val_loss in evaluations(run_dir):
        path = checkpoint.step_folder(run_dir / "checkpoints", step)
        config = cli.from_dict(checkpoint.read_state(path)["config"])
        model = build(config.model, 1, torch.device("cpu"))
        checkpoint.load_model(path, model)
        stream = open_data(config.data, config.train.seq_len).val
        total, windows = 0.0, min(8, stream.windows)
        for window in range(windows):
            tokens = torch.from_numpy(stream.read(window * 64, (window + 1) * 64 + 1))[None]
            with torch.no_grad():
                logits = model(tokens[:, :-1]).logits
            total += F.cross_entropy(logits[0].double(), tokens[0, 1:], reduction="sum").item()
        assert total / (windows * 64) == pytest.approx(val_loss, rel=1e-6)


def test_a_step_adds_the_gradients_of_the_global_batch(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sequences on two ranks, in micro-batches of one, the last of rank 1 empty: played by one process that adds up.

    Wanted: the mean cross entropy of all tokens, and of each micro-batch's auxiliary loss, large here, its share of the tokens.
    """
    aux = "model.router.balance_coef=3 model.router.z_coef=0.5".split()
    config = cli.compose(place.knobs("none", "train.global_batch=3", "train.micro_batch=1", *aux))
    stream = open_data(config.data, config.train.seq_len).train
    device = torch.device("cpu")
    ours, theirs = build(config.model, 1, device), build(config.model, 1, device)
    engine = FSDPEngine(ours, make_optimizer(ours, config.optim))
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 2)
    got = torch.zeros(())
    for rank in range(2):
        monkeypatch.setattr(train.dist, "get_rank", lambda: rank)
        loss, rows_LE, figures_LF, losses_B = train.train_step(engine, stream, config.train, 5, device, None)
        got += loss
        assert losses_B.shape == (2 - rank,) and losses_B.sum().item() / (3 * 64) == pytest.approx(
            loss.item(), rel=1e-6
        )
        assert rows_LE.sum() == 2 * 2 * 64 * (2 - rank) and figures_LF[:, 0].tolist() == [64 * (2 - rank)] * 2
    want = torch.zeros(())
    for sample in (5, 6, 7):
        tokens = torch.from_numpy(train_batch(stream, config.train.seed, sample, 1))
        out = theirs(tokens[:, :-1], tokens[:, 1:])
        (out.loss / (3 * 64) + out.aux / 3).backward()
        want += out.loss.detach() / (3 * 64)
    torch.testing.assert_close(got, want)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert (p.grad - q.grad).abs().max() <= 1e-5 * q.grad.abs().max(), name


def test_a_run_without_experts(place: Place, tmp_path: Path) -> None:
    here(*place.knobs(tmp_path / "run", *"model.n_dense_layers=2 model.d_dense=64 train.steps=2".split()))
    assert len(losses(tmp_path / "run")) == 2


def test_a_run_that_is_done_has_nothing_to_do(
    place: Place, reference: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(reference[0], tmp_path / "run")
    before = records(tmp_path / "run")
    here(*place.knobs(tmp_path / "run"))
    assert f"nothing to do: {tmp_path}/run/checkpoints/step_00000040 is at step 40" in capsys.readouterr().out
    assert records(tmp_path / "run") == before


def test_a_run_starts_from_another_ones_checkpoint(
    place: Place, reference: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one rank instead of two, which changes the routing domains of the auxiliary losses, and no more."""
    run_dir, _ = reference
    start = f"{run_dir}/checkpoints/step_00000030"
    here(*place.knobs(tmp_path / "run", f"resume={start}", "train.eval_every=40"))
    assert f"resumed from {start}: step 30, {30 * 4 * 64:,} tokens" in capsys.readouterr().out
    assert [step for step, *_ in losses(tmp_path / "run")] == list(range(31, STEPS + 1))
    for ours, theirs in zip(losses(tmp_path / "run"), losses(run_dir)[30:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert evaluations(tmp_path / "run")[-1] == pytest.approx(evaluations(run_dir)[-1], rel=1e-4)


def test_a_resumed_run_draws_the_same_chances_and_keeps_the_bias(place: Place, tmp_path: Path) -> None:
    """Rounding by chance draws from the random state of the checkpoint, and the routers' bias is in it."""
    knobs = "model.router.kind=sigmoid_bias model.router.rounding=stochastic model.router.rounding_tile=16".split()
    here(*place.knobs(tmp_path / "whole", *knobs, f"train.checkpoint_every={KEPT}", "train.eval_every=0"))
    kept, end = (checkpoint.step_folder(tmp_path / "whole" / "checkpoints", step) for step in (KEPT, STEPS))
    here(*place.knobs(tmp_path / "resumed", *knobs, f"resume={kept}", "train.eval_every=0"))
    assert_same_end(tmp_path / "whole", tmp_path / "resumed")
    assert records(tmp_path / "whole")[-1]["moe/added"] > 0
    before, after = tensors(kept), tensors(end)
    biases = [name for name in after if name.endswith(".bias_E")]
    assert len(biases) == 2
    for name in [*biases, "rng.0"]:
        assert not torch.equal(before[name], after[name])
    assert all(before[name].abs().max() > 0 for name in biases)


def test_a_gpu_of_unknown_tile_trains_but_does_not_round(place: Place) -> None:
    unknown = torch.device("meta")  # stands for one
    startup.check_tiles(cli.compose(place.knobs("none")), unknown)
    with pytest.raises(ValueError, match=r"model\.router\.rounding_tile=null: no tile is known for meta"):
        startup.check_tiles(cli.compose(place.knobs("none", "model.router.rounding=up")), unknown)
    rounds = place.knobs("none", "model.router.rounding=up", "model.router.rounding_tile=64")
    startup.check_tiles(cli.compose(rounds), unknown)


def test_deepspeed_trains_the_same(place: Place, reference: tuple[Path, str], tmp_path: Path) -> None:
    """ZeRO-3 goes on from a checkpoint of FSDP2, writes one, evaluates and samples; every line it prints is ours."""
    run_dir, printed = reference
    start_from = checkpoint.step_folder(run_dir / "checkpoints", STEPS - 10)
    engine = "parallel.engine=deepspeed parallel.zero_stage=3 train.eval_every=30 train.sample=25".split()
    text = finished(tmp_path, place.knobs(tmp_path / "run", *engine, f"resume={start_from}"))
    want, got = losses(run_dir)[STEPS - 10 :], losses(tmp_path / "run")
    assert [step for step, *_ in got] == [step for step, *_ in want]
    for one, other in zip(got, want, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert evaluations(tmp_path / "run")[-1][1] == pytest.approx(evaluations(run_dir)[-1][1], rel=1e-4)
    assert (tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}" / checkpoint.MANIFEST).is_file()

    def first_words(lines: str) -> set[str]:
        return {line.split()[0].partition("/")[0].rstrip(":") for line in lines.splitlines() if line.strip()}

    before_sample = text.partition("--- sample")[0]
    known = first_words(printed) | {"resumed"} | {str(step) for step in range(STEPS + 1)}
    assert first_words(before_sample) <= known


# ---------------------------------------------------------------- any batch on any number of ranks


def test_the_division_of_a_batch_does_not_matter(place: Place, tmp_path: Path) -> None:
    """Two ranks learn what one learns from the whole batch at once.

    A batch of one sequence leaves rank 1 without any; one of three is dealt 2 and 1, in one micro-batch or in two, of which
    rank 1's last is empty. Auxiliary losses, which are those of a micro-batch, are off. One launch does it all, as a sweep.
    """
    common = "train.steps=3 train.eval_every=3 model.router.balance_coef=0 model.router.z_coef=0".split()
    sweep = ["train.global_batch=1,3", "train.micro_batch=null,1"]
    finished(tmp_path, ["--multirun", *place.knobs(tmp_path / "divided", *common, *sweep)])
    for batch in (1, 3):
        whole = tmp_path / f"whole{batch}"
        here(*place.knobs(whole, *common, f"train.global_batch={batch}"))
        for number, micro in enumerate((None, 1), start=2 * (batch == 3)):
            divided = tmp_path / "divided" / str(number)
            config = cli.load(divided / "config.yaml")
            assert (config.train.global_batch, config.train.micro_batch) == (batch, micro)
            assert len(losses(divided)) == 3
            for ours, theirs in zip(losses(divided), losses(whole), strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5)
            assert evaluations(divided)[0] == pytest.approx(evaluations(whole)[0], rel=1e-5)


def test_other_layouts_train_the_same(place: Place, tmp_path: Path) -> None:
    """Copies, weights that stay gathered, and recomputation, against plain FSDP2. One launch, as a sweep."""
    sweep = ["parallel.replicate=1,2", "parallel.reshard=always,never", "parallel.remat=selective,full"]
    ends = ["train.steps=3", "optim.schedule=wsd", "train.eval_every=0"]
    finished(tmp_path, ["--multirun", *place.knobs(tmp_path / "swept", *ends, *sweep)])
    finished(tmp_path, place.knobs(tmp_path / "plain", *ends))
    for number in range(8):
        swept = losses(tmp_path / "swept" / str(number))
        assert len(swept) == 3
        for ours, theirs in zip(swept, losses(tmp_path / "plain"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
