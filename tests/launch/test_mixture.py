"""Mixtures, streamed sets, other projects' token files, validation sets by name, and reading ahead."""

import itertools
import json
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.launch import batches, cli, mixture, train
from moesaic.launch.data import TokenStream, fingerprint, open_data, train_batch
from moesaic.launch.mixture import Ahead, Mixture, SetStream, floor_sum
from moesaic.launch.optim import make_optimizer
from moesaic.launch.schema import DataConfig, TrainConfig
from moesaic.launch.tokens import load_tokenizer
from moesaic.moe.model import build
from moesaic.parallel.fsdp import FSDPEngine
from tests.launch.launches import Place, here, losses, records
from tests.launch.test_data import stream_of

BYTES = load_tokenizer("bytes")

# ---------------------------------------------------------------- mixtures


@given(st.integers(0, 60), st.integers(1, 50), st.integers(0, 10**6), st.integers(0, 10**6))
def test_floor_sum(n: int, m: int, a: int, b: int) -> None:
    assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


def mixed(folder: Path, weights: list[float]) -> Mixture:
    streams = []
    for i in range(len(weights)):
        (folder / str(i)).mkdir()
        streams.append(stream_of(folder / str(i), [97 + 20 * i], 5)[0])
    return Mixture([str(i) for i in range(len(weights))], weights, streams)


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [5, 1e-3, 2, 90], [1 / 3] * 3])
def test_the_samples_of_each_source_are_counted_at_once(tmp_path: Path, weights: list[float]) -> None:
    sources = mixed(tmp_path, weights)
    shares = np.array(weights) / sum(weights)
    for seed in (0, 1, 2**70):
        dealt = sources.deal(seed, 0, 3000)
        for samples in (0, 1, 2, 17, 1000, 3000):
            counts = np.bincount(dealt[:samples], minlength=len(weights))
            assert sources.taken(seed, samples) == counts.tolist()
            # Far within sampling error, which would be sqrt(n p (1 - p)).
            assert np.abs(counts - samples * shares).max() < 4
        middle = sources.deal(seed, 1234, 300)
        assert np.array_equal(middle, dealt[1234:1534])
    far = 10**15
    assert sum(sources.taken(3, far)) == far
    assert np.abs(np.array(sources.taken(3, far)) / far - shares).max() < 1e-12
    ahead = np.array(sources.taken(3, far + 500)) - np.array(sources.taken(3, far))
    assert ahead.tolist() == np.bincount(sources.deal(3, far, 500), minlength=len(weights)).tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_read_one_global_sequence(tmp_path: Path, world: int) -> None:
    """Each source's own windows once an epoch, in an order of its own; the global sequence is the same on any number of ranks."""
    sources = mixed(tmp_path, [0.6, 0.3, 0.1])
    steps, batch = 60, 7
    dealt = sources.deal(4, 0, steps * batch)
    turns = np.zeros(3, int)
    expected = []
    for source in dealt:
        expected.append(train_batch(sources.sources[source], 4, int(turns[source]), 1)[0])
        turns[source] += 1
    config = TrainConfig(global_batch=batch, micro_batch=2, seq_len=5)
    found = []
    for step in range(steps):
        for rank in range(world):
            for first, count in batches.micro_batches(batch, config, rank, world):
                found += list(train_batch(sources, 4, step * batch + first, count))
    assert np.array_equal(np.array(found), np.array(expected))
    windows = sources.sources[0].windows
    first_epoch = np.array(expected)[dealt == 0][:windows]
    assert len({tuple(row) for row in first_epoch.tolist()}) == windows


def corpus(folder: Path, letter: str, count: int = 40) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}.txt").write_text(f"{letter * 20} {i} " * (3 + i % 5))
    return folder


def test_sources_and_validation_sets_have_names(tmp_path: Path) -> None:
    a, b = corpus(tmp_path / "aaa", "a"), corpus(tmp_path / "bbb", "b")

    def opened(*files: str, **more: Any) -> Any:
        return open_data(DataConfig(files=list(files), cache=str(tmp_path / "cache"), **more), 16)

    data = opened(f"first={a}/*.txt", f"{b}/*.txt", weights=[3, 1])
    assert data.train.names == ("first", "*") and sorted(data.sets) == ["*", "first"]
    rows = train_batch(data.train, 0, 0, 400)
    assert 299 <= (rows == ord("a")).any(axis=1).sum() <= 301
    data = opened(
        f"x={a}/*.txt", f"y={b}/*.txt", weights=[1, 1], val_files=[f"p={a}/1.txt", f"q={b}/1.txt", f"q={b}/2.txt"]
    )
    assert {name: stream.documents for name, stream in data.sets.items()} == {"p": 1, "q": 2}
    assert data.val.documents == 3 and len(data.shards()) == 5
    other = opened(f"x={a}/*.txt", f"y={b}/*.txt", weights=[1, 2], val_files=[f"{a}/1.txt"])
    assert fingerprint(other) != fingerprint(
        opened(f"x={a}/*.txt", f"y={b}/*.txt", weights=[1, 3], val_files=[f"{a}/1.txt"])
    )
    (tmp_path / "year=1").mkdir()
    (tmp_path / "year=1" / "a.txt").write_text("plain " * 99)
    assert isinstance(opened(f"{tmp_path}/year=1/*.txt").train, TokenStream)
    with pytest.raises(ValueError, match=r"^data\.weights=\[\]: must give a weight for each"):
        opened(f"x={a}/*.txt")
    with pytest.raises(ValueError, match=r"\['a'\] twice; name sources apart"):
        opened(f"a={a}/*.txt", f"a={b}/*.txt", weights=[1, 1])
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(cli.UserError, match=r"^data\.weights=.*: must be a positive number for each of the 2"):
            cli.compose([f"data.files=[x={a},y={b}]", f"data.weights={weights}".replace(" ", "")])


def test_a_run_of_a_mixture(place: Place, tmp_path: Path) -> None:
    """Tokens by source, losses by validation set, and how long the loop waited are in its records; resumed, it goes on alike."""
    corpus(tmp_path / "aaa", "a"), corpus(tmp_path / "bbb", "b")
    knobs = place.knobs(
        tmp_path / "run", f"data.files=[x={tmp_path}/aaa/*.txt,y={tmp_path}/bbb/*.txt]", "data.weights=[3,1]",
        f"data.val_files=[x={tmp_path}/aaa/1.txt,y={tmp_path}/bbb/1.txt]", f"data.cache={tmp_path}/cache",
        "train.seq_len=16", "train.checkpoint_every=4", "train.eval_every=8",
    )  # fmt: skip
    here(*knobs, "train.steps=8", f"run_dir={tmp_path}/whole")
    here(*knobs, "train.steps=4")
    here(*knobs, "train.steps=8", "optim.schedule=cosine")
    whole = records(tmp_path / "whole")
    *steps, evaluation = whole
    assert evaluation["val_loss"] == pytest.approx(
        np.average([evaluation["val_loss/x"], evaluation["val_loss/y"]], weights=sizes(tmp_path)), rel=1e-6
    )
    assert [r["data/x/tokens"] + r["data/y/tokens"] for r in steps] == [r["tokens"] for r in steps]
    assert steps[-1]["data/x/tokens"] == pytest.approx(0.75 * steps[-1]["tokens"], abs=3 * 16)
    for r in steps:  # in step 1..8, 4 samples each: those of a source that has none are not in its record
        had = {
            name: b - a
            for name, a, b in zip("xy", *(_mixture(knobs).taken(0, 4 * (r["step"] - i)) for i in (1, 0)), strict=True)
        }
        assert sum(n * r.get(f"data/{name}/loss", 0) for name, n in had.items()) / 4 == pytest.approx(
            r["loss"], rel=1e-6
        )
        assert [f"data/{name}/loss" in r for name in "xy"] == [n > 0 for n in had.values()]
    assert all(0 <= r["data/wait"] <= 1.01 and r["data/tokens_per_s"] > 0 for r in steps)
    assert [step for step, *_ in losses(tmp_path / "run")] == list(range(1, 9))


def _mixture(knobs: list[str]) -> Mixture:
    config = cli.compose(knobs)
    stream = open_data(config.data, config.train.seq_len).train
    assert isinstance(stream, Mixture)
    return stream


@pytest.mark.parametrize("world", [1, 2, 3])
def test_losses_by_source_are_those_of_its_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """Of a step in micro-batches on so many ranks, against the model asked of one sequence at a time."""
    stream = mixed(tmp_path, [3.0, 1.0, 2.0, 1e-9])
    knobs = "train.seed=2 train.seq_len=5 train.global_batch=10 train.micro_batch=2 model.n_layers=1 model.d_model=16"
    config = cli.compose(
        [*knobs.split(), *"model.n_heads=2 model.n_experts=4 model.d_expert=32 model.vocab_size=65536".split()]
    )
    model = build(config.model, 1, torch.device("cpu"))
    engine = FSDPEngine(model, make_optimizer(model, config.optim))
    monkeypatch.setattr(train.dist, "get_world_size", lambda: world)
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(mixture, "total", lambda part: parts.append(part) or sum(parts))
    loss, first = 0.0, 37
    for rank in range(world):
        monkeypatch.setattr(train.dist, "get_rank", lambda rank=rank: rank)
        my_loss, *_, my_losses_B = train.train_step(engine, stream, config.train, first, torch.device("cpu"), None)
        ahead: Any = SimpleNamespace(lap=lambda: (0.0, 1.0, 0))
        figures = mixture.data_figures(ahead, stream, config.train, first + 10, my_losses_B, 1.0, rank, world)
        loss += my_loss.item()
    wanted: dict[int, list[float]] = {}
    for i, source in enumerate(stream.deal(2, first, 10).tolist()):
        tokens = torch.from_numpy(stream.batch(2, first + i, 1))
        wanted.setdefault(source, []).append(model(tokens[:, :-1], tokens[:, 1:]).loss.item() / 5)
    assert set(wanted) == {0, 1, 2}
    found = {key: value for key, value in figures.items() if key.endswith("/loss")}
    assert found == pytest.approx({f"data/{source}/loss": np.mean(each) for source, each in wanted.items()}, rel=1e-5)
    whole = sum(len(each) * found[f"data/{source}/loss"] for source, each in wanted.items())
    assert whole / 10 == pytest.approx(loss, rel=1e-6)


def sizes(folder: Path) -> list[int]:
    return [min(8, (len((folder / name / "1.txt").read_bytes())) // 16) for name in ("aaa", "bbb")]


# ---------------------------------------------------------------- other projects' files


def write_megatron(path: Path, documents: list[list[int]], dtype: Any, code: int) -> None:
    lengths = np.array([len(one) for one in documents], np.int32)
    with path.with_suffix(".idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([code]))
        file.write(len(documents).to_bytes(8, "little") + (len(documents) + 1).to_bytes(8, "little"))
        file.write(lengths.tobytes())
        file.write(((np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize).tobytes())
        file.write(np.arange(len(documents) + 1, dtype=np.int64).tobytes())
    path.write_bytes(np.array([token for one in documents for token in one], dtype).tobytes())


@pytest.mark.parametrize("kind", ["megatron-uint16", "megatron-int32", "nanogpt", "llm.c"])
def test_token_files_of_other_projects(tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    documents = [rng.choices(range(257), k=rng.randrange(5, 40)) for _ in range(30)]
    tokens = [token for one in documents for token in one]
    path = tmp_path / "x.bin"
    if kind.startswith("megatron"):
        write_megatron(path, documents, *(("<u2", 8) if kind.endswith("16") else ("<i4", 4)))
    else:
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, len(tokens)
        path.write_bytes((header.tobytes() if kind == "llm.c" else b"") + np.array(tokens, np.uint16).tobytes())
    data = open_data(DataConfig(files=[str(path)], val_fraction=0.2), 7)
    cut = len(tokens) - round(0.2 * len(tokens))
    assert data.train.read(0, data.train.total).tolist() == tokens[:cut]
    assert data.val.read(0, data.val.total).tolist() == tokens[cut:]
    assert data.train.documents == (30 if kind.startswith("megatron") else 0)
    before = fingerprint(data)
    raw = path.read_bytes()
    path.write_bytes(raw[:-20] + bytes(20))
    assert fingerprint(open_data(DataConfig(files=[str(path)], val_fraction=0.2), 7)) != before
    path.write_bytes(raw[:-3])
    if kind != "nanogpt" or len(raw[:-3]) % 2:
        with pytest.raises(ValueError, match=rf"^data\.files={path}: {len(raw) - 3} bytes, must be "):
            open_data(DataConfig(files=[str(path)], val_fraction=0.2), 7)


def test_a_token_that_the_tokenizer_lacks_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(np.full(100, 257, np.uint16).tobytes())
    data = open_data(DataConfig(files=[str(path)], val_fraction=0.2), 7)
    with pytest.raises(ValueError, match=rf"^data\.tokenizer: {path} has token 257, must be below 257"):
        train_batch(data.train, 0, 0, 1)
    write_megatron(path, [[1, 2]], np.float32, 7)
    with pytest.raises(ValueError, match=r"x\.idx: type 7 of tokens, must be one of"):
        open_data(DataConfig(files=[str(path)], val_fraction=0.2), 7)


# ---------------------------------------------------------------- streaming


@pytest.fixture
def hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))


def streamed(folder: Path, files: int) -> tuple[str, list[list[int]]]:
    """A source of so many files, and the tokens of each, its documents in order."""
    rng = random.Random(files)
    names, tokens = [], []
    for i in range(files):
        texts = ["".join(rng.choices("abcdé ", k=max(0, rng.randrange(-9, 40)))) for _ in range(23)]
        names.append(folder / f"s{i}.jsonl")
        names[-1].write_text("".join(json.dumps({"text": text or None}) + "\n" for text in texts))
        tokens.append([token for text in texts if text for token in [*text.encode(), 256]])
    return f"datasets:json?data_files={','.join(map(str, names))}&split=train", tokens


def nulls_before(path: Path, tokens: int) -> int:
    """Records without a text before the one that holds token number `tokens`, the file read again and again."""
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    nulls = 0
    for text in itertools.cycle(texts):
        tokens -= len(text.encode()) + 1 if text else 0
        nulls += text is None
        if tokens <= 0:
            return nulls
    raise AssertionError


@pytest.mark.parametrize("files", [1, 3])
def test_a_streamed_set_is_one_sequence_from_any_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hf: None, files: int
) -> None:
    """Sample i is window i // lanes of file i % lanes; at the end of a file it begins again. Nothing is lost or doubled."""
    monkeypatch.setattr(mixture, "BOOKMARK_EVERY", 5)
    spec, tokens = streamed(tmp_path, files)
    size = 11
    count = files * (2 * max(map(len, tokens)) // size)

    def expected(i: int) -> list[int]:
        window, lane = divmod(i, files)
        return [tokens[lane][at % len(tokens[lane])] for at in range(window * size, (window + 1) * size + 1)]

    wanted = np.array([expected(i) for i in range(count)])

    def fresh(cache: str = "cache") -> SetStream:
        return SetStream(spec, "data.files", BYTES, "text", size, str(tmp_path / cache))

    assert fresh().lanes == files
    stream = fresh()
    for first in range(0, count, 7):  # three ranks, in turn, with one stream each would read the same
        assert np.array_equal(train_batch(stream, 0, first, min(7, count - first)), wanted[first : first + 7])
    passed_over = [nulls_before(tmp_path / f"s{i}.jsonl", count // files * size + 1) for i in range(files)]
    assert stream.passed_over == passed_over and min(passed_over) > 0
    assert list((tmp_path / "cache").rglob("*.json")), "bookmarks were made"
    for first in (0, 3, count // 2, count - 9):
        for cache in ("cache", "none"):
            assert np.array_equal(train_batch(fresh(cache), 0, first, 9), wanted[first : first + 9])
        assert np.array_equal(train_batch(stream, 0, first, 9), wanted[first : first + 9])  # also backwards
    read: list[int] = []
    late = fresh()
    real = mixture.Lane.read
    monkeypatch.setattr(mixture.Lane, "read", lambda self, window: read.append(self.next) or real(self, window))
    train_batch(late, 0, count - files, files)
    assert late.passed_over == passed_over, "as if all had been read"
    assert min(read) > count // files - 8, "from a bookmark near by"
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text("{")  # a broken one does no harm
    assert np.array_equal(train_batch(fresh(), 0, count - 9, 9), wanted[count - 9 :])


def test_a_streaming_run_goes_on_after_a_kill(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hf: None
) -> None:
    """The same losses, bit for bit, as the uninterrupted run: no document lost or doubled."""
    monkeypatch.setattr(mixture, "BOOKMARK_EVERY", 3)
    spec, _ = streamed(tmp_path, 2)
    knobs = [
        *place.knobs("none", "train.seq_len=16", "train.steps=10", "train.checkpoint_every=3", "train.eval_every=0"),
        f'data.files=["web={spec}","text={place.folder}/corpus/*.txt"]', "data.weights=[2,1]",
    ]  # fmt: skip
    here(*knobs, f"run_dir={tmp_path}/whole", f"data.cache={tmp_path}/c1")
    real = train.train_step

    def killed(engine: Any, ahead: Any, config: Any, first: int, *rest: Any) -> Any:
        if first == 8 * 4:
            raise KeyboardInterrupt
        return real(engine, ahead, config, first, *rest)

    monkeypatch.setattr(train, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        here(*knobs, f"run_dir={tmp_path}/run", f"data.cache={tmp_path}/c2")
    monkeypatch.setattr(train, "train_step", real)
    here(*knobs, f"run_dir={tmp_path}/run", f"data.cache={tmp_path}/c2")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    by_source = [
        [[record.get(f"data/{name}/loss") for name in ("web", "text")] for record in records(tmp_path / run)]
        for run in ("run", "whole")
    ]
    assert by_source[0] == by_source[1] and records(tmp_path / "run")[-1]["data/passed_over"] > 0
    shutil.rmtree(tmp_path / "c2")
    with pytest.raises(cli.UserError, match=r"^data\.val_files=\[\]: must name validation files where datasets:"):
        here(*knobs, "data.val_files=[]", f"run_dir={tmp_path}/run2")


# ---------------------------------------------------------------- reading ahead


def test_reading_ahead_keeps_the_order_and_tells_mistakes() -> None:
    asked: list[tuple[int, int]] = []

    def read(first: int, count: int) -> np.ndarray:
        if first >= 30:
            raise ValueError("the disk is gone")
        asked.append((first, count))
        time.sleep(0.002)
        return np.full((count, 4), first)

    ahead = Ahead(read, 10, 5, [(0, 3), (3, 2)])
    for first in (10, 15, 20, 25):
        assert (ahead.batch(first, 3) == first).all() and (ahead.batch(first + 3, 2) == first + 3).all()
    with pytest.raises(ValueError, match="the disk is gone"):
        ahead.batch(30, 3)
    assert asked == [(10 + 5 * i + o, n) for i in range(4) for o, n in ((0, 3), (3, 2))]
    waited, busy, tokens = ahead.lap()
    assert tokens == 20 * 3 and busy > 8 * 0.002 and waited > 0
    assert ahead.lap() == (0.0, 0.0, 0)
    mixture.end_reading()
    assert not ahead._thread.is_alive()
    slow = Ahead(lambda first, count: np.zeros((count, 2)), 0, 1, [(0, 1)])
    mixture.end_reading()  # also where nobody takes what was read
    assert not slow._thread.is_alive()
