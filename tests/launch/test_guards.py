"""Steps that are not finite, losses that jump, data that changes: what a run does then."""

import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moesaic.launch import cli, guards, train
from moesaic.launch.data import open_data
from moesaic.launch.schema import DataConfig, TrainConfig
from moesaic.parallel import checkpoint
from moesaic.parallel.fsdp import FSDPEngine
from moesaic.parallel.fused import FusedError
from tests.launch.launches import Place, here, losses, records, tensors
from tests.parallel.ranks import run_ranks


def shard(t: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it; on one rank parameters may not be sharded at all."""
    return t.to_local() if isinstance(t, DTensor) else t


def agreed() -> tuple[float, bool]:
    rank = dist.get_rank()
    return guards.agree(torch.tensor(0.25 + rank), asked=rank == 1)


def test_one_rank_that_is_asked_to_stop_stops_all(tmp_path: Path) -> None:
    assert run_ranks(agreed, 3, tmp_path) == [(3.75, True)] * 3


def test_a_jump_is_seen_in_any_noise_and_at_any_level():
    rng = random.Random(0)
    for level, noise in ((3.0, 0.05), (0.02, 0.001), (11.0, 0.0)):
        before = [rng.gauss(level, noise) for _ in range(guards.WINDOW)]
        assert guards.deviations(level, before) < 1
        assert guards.deviations(level + 20 * max(noise, 0.01 * level), before) > 15
        for i in range(0, guards.WINDOW, 3):  # a third of them wild: the rest still says what is usual
            before[i] *= 40
        assert guards.deviations(level, before) < 1
        assert guards.deviations(level + 20 * max(noise, 0.01 * level), before) > 5
    assert guards.deviations(1e9, [1.0] * (guards.FEWEST - 1)) == 0.0
    assert guards.deviations(-1e9, [1.0] * guards.FEWEST) < 0, "a fall is none"


def test_noise_alone_is_no_jump():
    rng = random.Random(1)
    health = guards.Health(TrainConfig(), {})
    jumps = [health.see(3 + 2 * math.exp(-i / 300) + rng.gauss(0, 0.1), True) for i in range(20_000)]
    assert not any(jumps) and health.spikes == 0


def test_health_goes_on_where_it_was_saved():
    rng = random.Random(2)
    seen = [(rng.gauss(3, 0.1) + 9 * (rng.random() < 0.02), rng.random() < 0.9) for _ in range(400)]
    one, other = guards.Health(TrainConfig(), {}), guards.Health(TrainConfig(), {})
    for i, (loss, finite) in enumerate(seen):
        if i % 50 == 7:
            other = guards.Health(TrainConfig(), other.state())
        assert one.see(loss, finite) == other.see(loss, finite)
    assert one.state() == other.state() and one.skipped > 10 and one.spikes > 2


def poison(monkeypatch: pytest.MonkeyPatch, kind: str, steps: range) -> None:
    """In these steps, counted from 1, a gradient is NaN or infinite, or the loss is: with finite gradients, which happens where
    the logit of a target is minus infinity."""
    count = 0
    real = FSDPEngine.step
    real_train_step = train.train_step

    def step(self: FSDPEngine, clip: float, skip: bool = False) -> torch.Tensor:
        if count in steps and kind != "loss":
            shard(self.model.head.weight.grad)[3, 1] = {"nan": math.nan, "inf": -math.inf}[kind]
        return real(self, clip, skip)

    def train_step(*args: Any) -> Any:
        nonlocal count
        count += 1
        loss, *rest = real_train_step(*args)
        return [loss + math.inf if count in steps and kind == "loss" else loss, *rest]

    monkeypatch.setattr(FSDPEngine, "step", step)
    monkeypatch.setattr(train, "train_step", train_step)


@pytest.mark.parametrize("kind", ["nan", "inf", "loss"])
def test_a_step_that_is_not_finite_changes_nothing(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    poison(monkeypatch, kind, range(3, 5))
    run_dir = tmp_path / "run"
    knobs = "train.steps=5 train.checkpoint_every=1 train.keep_checkpoints=5 model.router.kind=sigmoid_bias".split()
    here(*place.knobs(run_dir, *knobs, "train.eval_every=0"))
    after = [tensors(checkpoint.step_folder(run_dir / "checkpoints", step)) for step in range(1, 6)]
    for name, value in after[1].items():
        if not name.startswith("rng."):
            for later in after[2:4]:
                assert torch.equal(value, later[name]), name
    assert any(name.endswith("bias_E") for name in after[0])
    moved = [name for name in after[1] if not torch.equal(after[1][name], after[4][name])]
    assert {name.partition(".")[0] for name in moved} == {"model", "optim"}
    assert after[4]["optim.step"] == 3, "AdamW's own count has not moved with them"
    assert [r["skipped"] for r in records(run_dir)] == [0, 0, 1, 2, 2]
    last = checkpoint.read_state(checkpoint.step_folder(run_dir / "checkpoints", 5))
    assert (last["step"], last["samples"], last["health"]["in_a_row"]) == (5, 20, 0), "the data has moved on"


def test_a_first_step_that_is_left_out_is_saved_and_gone_on_from(place: Place, tmp_path: Path) -> None:
    """There is nothing that an optimizer has made by then."""
    run_dir = tmp_path / "run"
    knobs = place.knobs(run_dir, "train.eval_every=0", "train.log_every=1")
    real = train.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", lambda *args: [(out := real(*args))[0] * math.nan, *out[1:]])
        here(*knobs, "train.steps=1")
    assert checkpoint.read_state(checkpoint.step_folder(run_dir / "checkpoints", 1))["health"]["skipped"] == 1
    here(*knobs, "train.steps=2")
    assert [r["skipped"] for r in records(run_dir)] == [1, 1]
    assert tensors(checkpoint.step_folder(run_dir / "checkpoints", 2))["optim.step"] == 1


def test_too_many_of_them_end_the_run_with_a_line(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, "nan", range(4, 100))
    run_dir = tmp_path / "run"
    with pytest.raises(guards.RunEndedError, match=r"train.max_skipped=3.* 3 steps in a row, up to step 6") as ended:
        here(*place.knobs(run_dir, "train.max_skipped=3", "train.checkpoint_every=2", "train.eval_every=0"))
    assert ended.value.code == 3 and "\n" not in str(ended.value)
    assert str(ended.value).endswith(f"the last checkpoint is {checkpoint.step_folder(run_dir / 'checkpoints', 4)}")
    assert [step for step, *_ in losses(run_dir)] == [1, 2, 3, 4, 5, 6]


def test_weights_that_are_not_finite_are_never_saved(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However they came to be: here a bit flips in memory after a step."""
    real, count = FSDPEngine.step, 0

    def step(self: FSDPEngine, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal count
        norm, count = real(self, *args, **kwargs), count + 1
        if count == 4:
            with torch.no_grad():
                shard(self.model.blocks[1].ffn.experts.w_down_EDF)[0, 0, 0] = math.inf
        return norm

    monkeypatch.setattr(FSDPEngine, "step", step)
    run_dir = tmp_path / "run"
    with pytest.raises(guards.RunEndedError, match=r"step 4: a weight or moment is not finite.*step_00000002"):
        here(*place.knobs(run_dir, "train.checkpoint_every=2", "train.eval_every=0"))
    assert [Path(path).name for path in checkpoint.complete_checkpoints(run_dir / "checkpoints")] == ["step_00000002"]


def test_a_failed_launch_is_told_before_its_gradients_are_used(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA, where the host has gone on without waiting for it: here `settle` says so in the third step."""
    real, calls, steps = FSDPEngine.step, iter(range(1, 10)), []

    def step(self: FSDPEngine, *args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(len(steps) + 1)
        return real(self, *args, **kwargs)

    def settle(model: Any) -> None:
        if next(calls) == 3:
            raise FusedError("a launch failed")

    monkeypatch.setattr(FSDPEngine, "step", step)
    monkeypatch.setattr(train, "settle", settle)
    with pytest.raises(guards.RunEndedError, match="a launch failed"):
        here(*place.knobs(tmp_path / "run", "train.checkpoint_every=1", "train.eval_every=0"))
    assert steps == [1, 2], "weights were changed by gradients that no launch computed"
    newest = checkpoint.complete_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert Path(newest).name == "step_00000002"


def jump_at(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> list[int]:
    """Whenever one of the samples `bad` is in a step, its loss comes out 50 higher. Returns the first sample of each step."""
    firsts: list[int] = []
    real, real_agree = train.train_step, guards.agree

    def train_step(engine: Any, stream: Any, config: Any, first: int, *rest: Any) -> Any:
        firsts.append(first)
        return real(engine, stream, config, first, *rest)

    def agree(loss: torch.Tensor, asked: bool) -> tuple[float, bool]:
        whole, stop = real_agree(loss, asked)
        training = loss.dtype == torch.float32 and firsts and loss.item() > 0
        return whole + 50 * bool(training and bad & set(range(firsts[-1], firsts[-1] + 4))), stop

    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(guards, "agree", agree)
    return firsts


def test_a_jump_is_logged_and_training_goes_on(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    firsts = jump_at(monkeypatch, {4 * 36 + 1})
    here(*place.knobs(tmp_path / "run", "train.eval_every=0"))
    assert "step 37: its loss, 5" in capsys.readouterr().out
    assert firsts == list(range(0, 160, 4))
    assert [r["spikes"] for r in records(tmp_path / "run")] == [0] * 36 + [1] * 4


def test_a_rewind_goes_on_after_the_data_that_caused_the_jump(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Step 37 jumps: back to step 35, and on with the samples after those of step 37. A run that is killed after that, and so
    must do it again, ends with the same bits; so does one that is led there by hand."""
    firsts = jump_at(monkeypatch, {4 * 36 + 1})
    knobs = [*"train.on_spike=rewind train.checkpoint_every=5 train.eval_every=0 train.keep_checkpoints=9".split()]
    run_dir = tmp_path / "run"
    here(*place.knobs(run_dir, *knobs))
    back = checkpoint.step_folder(run_dir / "checkpoints", 35)
    assert f"went back from step 37 to {back}" in capsys.readouterr().out
    assert firsts == [*range(0, 148, 4), *range(148, 168, 4)]
    assert [step for step, *_ in losses(run_dir)] == list(range(1, 41))
    assert [r["rewound_from"] for r in records(run_dir) if "rewound_from" in r] == [37]
    end = checkpoint.step_folder(run_dir / "checkpoints", 40)
    assert checkpoint.read_state(end)["samples"] == 168 and checkpoint.read_state(end)["step"] == 40

    killed = tmp_path / "killed"
    shutil.copytree(run_dir, killed)
    shutil.rmtree(checkpoint.step_folder(killed / "checkpoints", 40))
    here(*place.knobs(killed, *knobs))
    again = tensors(checkpoint.step_folder(killed / "checkpoints", 40))
    assert all(torch.equal(value, again[name]) for name, value in tensors(end).items())
    assert losses(killed) == losses(run_dir)

    by_hand = tmp_path / "by_hand"
    shutil.copytree(run_dir, by_hand)
    shutil.rmtree(checkpoint.step_folder(by_hand / "checkpoints", 40))
    real = checkpoint.read_state
    monkeypatch.setattr(checkpoint, "read_state", lambda path: real(path) | {"samples": 148})
    here(*place.knobs(by_hand, *knobs))
    other = tensors(checkpoint.step_folder(by_hand / "checkpoints", 40))
    assert all(torch.equal(value, other[name]) for name, value in tensors(end).items())


def test_a_loss_that_jumps_on_any_data_ends_the_run(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jump_at(monkeypatch, set(range(4 * 36, 10_000)))
    knobs = "train.on_spike=rewind train.max_rewinds=2 train.checkpoint_every=5 train.eval_every=0"
    with pytest.raises(guards.RunEndedError, match=r"train.max_rewinds=2: .* returns to step 35"):
        here(*place.knobs(tmp_path / "run", *knobs.split()))


def test_a_jump_before_the_first_checkpoint_is_only_told(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    jump_at(monkeypatch, {4 * 36})
    here(*place.knobs(tmp_path / "run", *"train.on_spike=rewind train.checkpoint_every=0 train.eval_every=0".split()))
    assert "there is no checkpoint to go back to" in capsys.readouterr().out


# ---------------------------------------------------------------- data


@pytest.fixture
def watch(place: Place, tmp_path: Path) -> tuple[guards.DataWatch, Path]:
    cache = tmp_path / "cache"
    files = DataConfig(files=[f"{place.folder}/corpus/*.txt"], cache=str(cache), val_fraction=0.1)
    data = open_data(files, 64)
    return guards.DataWatch(data), data.train.shards[0].path


def test_data_that_only_looks_new_is_the_same(watch: tuple[guards.DataWatch, Path]) -> None:
    dog, path = watch
    dog.check()
    os.utime(path)
    dog.check()
    copy = path.with_suffix(".copy")
    shutil.copyfile(path, copy)
    copy.replace(path)
    dog.check()
    path.chmod(0o600)
    dog.check()


@pytest.mark.parametrize("how", ["a token", "a token, times kept", "shorter", "gone", "no array"])
def test_data_that_changed_is_named(watch: tuple[guards.DataWatch, Path], how: str) -> None:
    dog, path = watch
    stat = path.stat()
    if how.startswith("a token"):
        tokens = np.load(path)
        tokens[tokens.size // 2] ^= 1
        np.save(path, tokens)
        if "kept" in how:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            assert path.stat().st_size == stat.st_size
    elif how == "shorter":
        np.save(path, np.load(path)[:-1])
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(b"nothing")
    with pytest.raises(guards.RunEndedError, match=r"data\.files: ") as error:
        dog.check()
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- what is asked


def test_a_run_that_is_asked_during_evaluation_evaluates_when_it_goes_on(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    uninterrupted, run_dir = tmp_path / "uninterrupted", tmp_path / "run"
    knobs = ["train.steps=6", "train.eval_every=3", "train.checkpoint_every=0"]
    here(*place.knobs(uninterrupted, *knobs))
    real = train.val_batch

    def val_batch(*args: Any) -> Any:
        guards._asked = True
        return real(*args)

    monkeypatch.setattr(train, "val_batch", val_batch)
    for _ in range(2):
        monkeypatch.setattr(guards, "_asked", False)
        here(*place.knobs(run_dir, *knobs))
        assert "asked to stop: the last checkpoint is " in capsys.readouterr().out
        assert [r["step"] for r in records(run_dir)] == [1, 2, 3], "the second time nothing is left to save"
    monkeypatch.setattr(train, "val_batch", real)
    monkeypatch.setattr(guards, "_asked", False)
    here(*place.knobs(run_dir, *knobs))
    assert [(r["step"], r.get("val_loss")) for r in records(run_dir)] == [
        (r["step"], r.get("val_loss")) for r in records(uninterrupted)
    ]


def test_a_run_that_is_asked_before_its_first_step_leaves(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(guards, "_asked", True)
    here(*place.knobs(tmp_path / "run"))
    assert "asked to stop before the first step" in capsys.readouterr().out
    assert records(tmp_path / "run") == [] and not checkpoint.complete_checkpoints(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize(
    ("knob", "told"),
    [
        ("train.on_spike=back", "must be one of log, rewind"),
        ("train.max_skipped=0", "must be at least 1"),
        ("train.spike=-1", "must not be negative"),
        ("parallel.timeout=0", "must lie in 1..1e7 seconds"),
    ],
)
def test_knobs_out_of_their_range(knob: str, told: str) -> None:
    with pytest.raises(cli.UserError, match=told):
        cli.compose([knob])
    with pytest.raises(cli.UserError, match="train.spike=0: must be above 0"):
        cli.compose(["train.spike=0", "train.on_spike=rewind"])
