"""The command itself, `torchrun --standalone --nproc-per-node 2 launch/train.py ...`, on a very small model.

What needs no second rank and no kill runs in this process, through the same `cli.run(main)` that ends the program: a
launch costs seconds.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed import HashStore

from moesaic.launch import cli, train
from moesaic.launch.data import open_data, train_batch
from moesaic.launch.optim import make_optimizer
from moesaic.moe.model import build
from moesaic.parallel import checkpoint
from moesaic.parallel.fsdp import FSDPEngine
from moesaic.parallel.mesh import meet

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "launch" / "train.py"
STEPS = 40
KEPT = 20  # the step of the checkpoint that a killed run goes on from
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in Linux's /proc")


@dataclass(frozen=True)
class Place:
    """A corpus of its own, and the knobs of a model that trains on it at a hundred steps a second."""

    folder: Path

    def knobs(self, run_dir: Path | str, *more: str) -> list[str]:
        return [
            f"run_dir={run_dir}",
            f"data.files={self.folder}/corpus/*.txt",
            f"data.val_files={self.folder}/held_out.txt",
            f"data.cache={self.folder}/cache",
            *"model.d_model=32 model.n_layers=2 model.n_heads=2 model.n_experts=4 model.d_expert=32".split(),
            *"train.seq_len=64 train.global_batch=4 train.eval_batches=2 train.log_every=1 train.sample=0".split(),
            *f"train.steps={STEPS} optim.warmup=10 wandb.mode=disabled".split(),
            *more,
        ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    words = "router expert dispatch combine token shard batch the a of and".split()
    corpus = random.Random(0)
    (folder / "corpus").mkdir()
    for path in [*(folder / "corpus" / f"{i}.txt" for i in range(10)), folder / "held_out.txt"]:
        path.write_text(" ".join(corpus.choice(words) for _ in range(400)))
    return Place(folder)


# ---------------------------------------------------------------- launches


@dataclass
class Launch:
    """A running torchrun: `agent`, and what its ranks and itself print, in `output`. `tag` is in the environment of all."""

    agent: subprocess.Popen[bytes]
    output: Path
    tag: str

    def ranks(self) -> list[int]:
        """Process ids of the ranks that live: children of the agent."""
        return [pid for pid in processes(self.tag) if parent(pid) == self.agent.pid]

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait(self, seconds: float = 150) -> int:
        return self.agent.wait(seconds)


@contextlib.contextmanager
def launch(folder: Path, knobs: list[str], *options: str, program: Path = PROGRAM) -> Iterator[Launch]:
    """`torchrun OPTIONS launch/train.py KNOBS` in `folder`. All processes it starts are gone when the block ends."""
    tag = f"MOESAIC_TEST_LAUNCH={uuid.uuid4().hex}"
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = inherited | {"OMP_NUM_THREADS": "1", "MOESAIC_TEST_LAUNCH": tag.partition("=")[2]}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    output = folder / f"{tag[-8:]}.log"
    with output.open("wb") as file:
        agent = subprocess.Popen(
            [*torchrun, str(program), *knobs], cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )  # fmt: skip
    running = Launch(agent, output, tag)
    try:
        yield running
    except BaseException:
        print(running.text()[-6000:])
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()
        for pid in processes(tag):  # the agent's death does not end ranks of broken code
            kill(pid)


def finished(folder: Path, knobs: list[str], *options: str, program: Path = PROGRAM) -> str:
    """What a launch that succeeds prints."""
    with launch(folder, knobs, *options, program=program) as running:
        assert running.wait() == 0
        return running.text()


def processes(tag: str) -> list[int]:
    """Process ids, zombies not counted, of all whose environment holds `tag`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if tag.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def until(condition: Callable[[], bool], seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; none before there is one."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(run_dir) if "loss" in r]


def evaluations(run_dir: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["val_loss"]) for r in records(run_dir) if "val_loss" in r]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, whole, in one process."""
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    whole = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in saved.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
        dcp.load(whole, checkpoint_id=path, no_dist=True)
    return whole


def assert_same_end(run_dir: Path, other: Path) -> None:
    """The last checkpoints of two runs: parameters, moments, random states and position are equal bit for bit."""
    paths = [checkpoint.step_folder(run / "checkpoints", STEPS) for run in (run_dir, other)]
    left, right = map(tensors, paths)
    assert left.keys() == right.keys()
    for kind in ("model.", "optim.exp_avg.", "optim.exp_avg_sq.", "rng."):
        assert any(name.startswith(kind) for name in left)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    states = [checkpoint.read_state(path) for path in paths]
    for knob in ("step", "samples", "tokens", "data", "world"):
        assert states[0][knob] == states[1][knob]
    assert states[0]["samples"] == STEPS * 4


@pytest.fixture(scope="module")
def reference(place: Place) -> tuple[Path, str]:
    """The run directory of a run of 40 steps that nothing interrupts, and what it printed. Tests leave it as it is."""
    run_dir = place.folder / "reference"
    elsewhere = place.folder / "elsewhere"
    elsewhere.mkdir()
    knobs = place.knobs(run_dir, *"train.checkpoint_every=10 train.keep_checkpoints=2 train.eval_every=30".split())
    text = finished(elsewhere, [*knobs, "train.sample=25"])
    assert [path.suffix for path in elsewhere.iterdir()] == [".log"], "writes nothing where it is started"
    return run_dir, text


def here(*knobs: str) -> None:
    """A whole run in this process, the only rank of it."""
    train.main(cli.compose(knobs))


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
    (["parallel.engine=deepspeed", "precision.compute=bf16"], ["precision.compute=bf16", "must be fp32 or auto"]),
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
        loss, rows_LE, figures_LF = train.train_step(engine, stream, config.train, 5, device, None)
        got += loss
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
    train.check_rounding(cli.compose(place.knobs("none")), unknown)
    with pytest.raises(ValueError, match=r"model\.router\.rounding_tile=null: no tile is known for meta"):
        train.check_rounding(cli.compose(place.knobs("none", "model.router.rounding=up")), unknown)
    rounds = place.knobs("none", "model.router.rounding=up", "model.router.rounding_tile=64")
    train.check_rounding(cli.compose(rounds), unknown)


# ---------------------------------------------------------------- kills


@needs_proc
def test_a_killed_run_goes_on_bit_for_bit(place: Place, reference: tuple[Path, str], tmp_path: Path) -> None:
    """Steps 1.., SIGKILL to all processes between the checkpoint of step 20 and the end, and the same command again."""
    uninterrupted, _ = reference
    run_dir = tmp_path / "run"
    knobs = place.knobs(run_dir, "train.checkpoint_every=20", "train.eval_every=30", "wandb.mode=offline")
    checkpoints = run_dir / "checkpoints"
    for _ in range(3):
        shutil.rmtree(run_dir, ignore_errors=True)
        with launch(tmp_path, knobs) as running:
            until(lambda: any(step > KEPT + 1 for step, *_ in losses(run_dir)) or running.agent.poll() is not None)
            victims = [running.agent.pid, *running.ranks()]
            for pid in victims:
                kill(pid)
            until(lambda: not set(victims[1:]) & set(processes(running.tag)), 10)
            assert len(victims) == 3 and running.wait() == -signal.SIGKILL
        if not checkpoint.step_folder(checkpoints, STEPS).exists():
            break
    else:
        pytest.fail("three runs ended before the kill")
    assert checkpoint.complete_checkpoints(checkpoints) == [checkpoint.step_folder(checkpoints, KEPT)]
    # What a kill during a save leaves; and a line that a kill cut short.
    (checkpoints / "step_00000033.tmp").mkdir()
    (checkpoints / "step_00000033.tmp" / "state.json").write_text("{}")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')

    text = finished(tmp_path, knobs)
    assert f"resumed from {checkpoint.step_folder(checkpoints, KEPT)}: step {KEPT}, {KEPT * 4 * 64:,} tokens" in text
    assert losses(run_dir) == losses(uninterrupted)
    assert evaluations(run_dir) == evaluations(uninterrupted)
    assert_same_end(run_dir, uninterrupted)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000020", "step_00000040"]
    assert [path for path in run_dir.glob("wandb/**/offline-run-*/*.wandb") if path.stat().st_size > 0]


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
    assert (tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}" / checkpoint.STATE_FILE).is_file()

    def first_words(lines: str) -> set[str]:
        return {line.split()[0].partition("/")[0].rstrip(":") for line in lines.splitlines() if line.strip()}

    before_sample = text.partition("--- sample")[0]
    known = first_words(printed) | {"resumed"} | {str(step) for step in range(STEPS + 1)}
    assert first_words(before_sample) <= known


@needs_proc
def test_torchrun_restarts_a_run_whose_rank_was_killed(
    place: Place, reference: tuple[Path, str], tmp_path: Path
) -> None:
    uninterrupted, _ = reference
    run_dir = tmp_path / "run"
    knobs = place.knobs(run_dir, *"train.checkpoint_every=20 train.keep_checkpoints=1 train.eval_every=0".split())
    with launch(tmp_path, [*knobs, "resume=never"], "--max-restarts=1") as running:
        until(lambda: any(step > KEPT + 1 for step, *_ in losses(run_dir)))
        victim = running.ranks()[-1]
        kill(victim)
        until(lambda: victim not in processes(running.tag), 10)
        assert losses(run_dir)[-1][0] < STEPS, "killed too late"
        assert running.wait() == 0
        text = running.text()
    assert f"resumed from {checkpoint.step_folder(run_dir / 'checkpoints', KEPT)}: step {KEPT}, " in text
    assert losses(run_dir) == losses(uninterrupted)
    assert_same_end(run_dir, uninterrupted)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000040"]
    assert evaluations(run_dir) == [] and "val_loss" not in text, "train.eval_every=0 means never"


def test_a_restarted_rank_meets_none_of_the_dead() -> None:
    """Ranks on one store, as torchrun keeps it: the second three find the words of the first, one of whom died early."""
    store = HashStore()
    store.set("word/2", "the word of one that never got its answer")
    names = []
    for _ in range(2):
        with ThreadPoolExecutor(3) as ranks:
            one, two, three = ranks.map(lambda rank: meet(store, rank, 3), range(3))
        assert one == two == three
        names.append(one)
    assert names[0] != names[1]


@needs_proc
@pytest.mark.parametrize("moment", ["importing", "training"])
def test_ranks_end_with_their_agent(place: Place, tmp_path: Path, moment: str) -> None:
    run_dir = tmp_path / "run"
    knobs = place.knobs(run_dir, "train.steps=1000000", "train.eval_every=0", "train.checkpoint_every=0")

    def is_importing(pid: int) -> bool:
        with contextlib.suppress(OSError):
            return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
        return False

    with launch(tmp_path, knobs) as running:
        until(lambda: len(running.ranks()) == 2)
        ranks = running.ranks()
        if moment == "importing":
            until(lambda: all(is_importing(pid) for pid in ranks))
        else:
            until(lambda: len(losses(run_dir)) > 2)
        kill(running.agent.pid)
        assert running.wait() == -signal.SIGKILL
        until(lambda: not set(ranks) & set(processes(running.tag)), 120 if moment == "importing" else 20)


SLOW_THREADS = """
import glob, os, runpy, sys
from moesaic.launch import metrics

class Meter(metrics.Meter):
    def __init__(self):  # the loop begins: the threads exist
        super().__init__()
        for comm in glob.glob("/proc/self/task/*/comm"):
            if "gloo" in open(comm).read():
                os.sched_setscheduler(int(comm.split("/")[4]), os.SCHED_IDLE, os.sched_param(0))

metrics.Meter = Meter
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
program, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(program, run_name="__main__")
"""


@needs_proc
def test_a_busy_machine_does_not_abort_a_run_at_its_end(place: Place, tmp_path: Path) -> None:
    """Threads of the process group run only when the main thread waits, and so still hold the last tensors when it ends."""
    program = tmp_path / "slow_threads.py"
    program.write_text(SLOW_THREADS)
    knobs = place.knobs(tmp_path / "run", "train.steps=2", "train.eval_every=2", "train.sample=5")
    assert "files: " in finished(tmp_path, [str(PROGRAM), *knobs], program=program)


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
