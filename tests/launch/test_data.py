"""Order, windows and opening of training data."""

import json
import os
import shutil
import sys
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.launch.data import (
    Data,
    Shard,
    TokenStream,
    fingerprint,
    open_data,
    permute,
    train_batch,
    val_batch,
)
from moesaic.launch.documents import Source
from moesaic.launch.prepare import prepare
from moesaic.launch.schema import DataConfig
from moesaic.launch.token_shards import hash_unit
from moesaic.launch.tokens import load_tokenizer

SEEDS = st.integers(0, 2**70)


def stream_of(folder: Path, sizes: list[int], seq_len: int) -> tuple[TokenStream, np.ndarray]:
    """A stream over shards of these sizes, and all its tokens."""
    tokens = np.random.default_rng(sum(sizes)).integers(0, 2**16, sum(sizes), dtype=np.uint16)
    shards = []
    for i, part in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        np.save(folder / f"{i}.npy", part)
        shards.append(Shard(folder / f"{i}.npy", part.size, 0, ""))
    return TokenStream(shards, seq_len), tokens


# ---------------------------------------------------------------- order


@settings(deadline=None)
@given(st.integers(1, 3000), SEEDS, st.integers(0, 2**40))
def test_permute_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    image = permute(np.arange(n), n, seed, epoch)
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(n))


@settings(deadline=None)
@given(st.integers(1, 2**40), SEEDS, st.integers(0, 1000))
def test_permute_of_large_n_stays_inside_without_collisions(n: int, seed: int, epoch: int) -> None:
    index = np.unique(np.random.default_rng(n).integers(0, n, 500))
    image = permute(index, n, seed, epoch)
    assert image.min() >= 0 and image.max() < n and np.unique(image).size == index.size
    assert np.array_equal(permute(index[::-1], n, seed, epoch), image[::-1])  # each by itself


@settings(deadline=None)
@given(st.integers(100, 2**40), SEEDS, st.integers(0, 1000))
def test_permute_differs_between_epochs_and_seeds(n: int, seed: int, epoch: int) -> None:
    index = np.arange(100)
    images = [permute(index, n, *pair) for pair in ((seed, epoch), (seed, epoch + 1), (seed + 1, epoch))]
    for i in range(3):
        assert (images[i] == index).mean() < 0.2
        for j in range(i):
            assert (images[i] == images[j]).mean() < 0.2


@pytest.mark.parametrize("n", [2, 3, 10])
def test_permute_is_unbiased(n: int) -> None:
    """Each index goes to each place equally often over seeds: 5 standard deviations of the count bound the deviation."""
    runs = 1000
    counts = np.zeros((n, n))
    for seed in range(runs):
        counts[np.arange(n), permute(np.arange(n), n, seed, 1)] += 1
    assert np.abs(counts - runs / n).max() < 5 * np.sqrt(runs / n * (1 - 1 / n))


def test_permute_never_changes() -> None:
    """A resumed run must find the order that an older version of this code gave it."""
    assert permute(np.arange(8), 8, 0, 0).tolist() == [6, 5, 4, 1, 7, 3, 0, 2]
    assert permute(np.arange(7), 7, 2**70, 1).tolist() == [1, 5, 6, 0, 3, 2, 4]
    assert permute(np.array([0, 12345]), 2**40, 7, 3).tolist() == [649367366016, 486183648411]


# ---------------------------------------------------------------- windows


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 30))
def test_windows_are_those_of_the_concatenation(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seq_len: int
) -> None:
    stream, tokens = stream_of(tmp_path_factory.mktemp("shards"), sizes, seq_len)
    expected = [tokens[at : at + seq_len + 1] for at in range(0, tokens.size - seq_len, seq_len)]
    assert stream.total == tokens.size and stream.windows == len(expected)
    read = val_batch(stream, 0, stream.windows + 7)
    assert read.dtype == np.int64 and read.shape == (len(expected), seq_len + 1)
    assert np.array_equal(read, np.array(expected, np.int64).reshape(-1, seq_len + 1))
    middle = stream.windows // 2
    assert np.array_equal(val_batch(stream, middle, 2), read[middle : middle + 2])
    assert val_batch(stream, stream.windows + 3, 2).shape == (0, seq_len + 1)
    assert train_batch(stream, 0, 5, 0).shape == (0, seq_len + 1)


def test_many_shards_do_not_hold_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.launch.data.OPEN_SHARDS", 4)
    stream, tokens = stream_of(tmp_path, [3] * 50, 2)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert np.array_equal(stream.read(0, stream.total), tokens)
    after = len(os.listdir("/proc/self/fd")) if before else 0
    assert after - before <= 4


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_read_each_window_once_an_epoch(tmp_path: Path, world: int) -> None:
    """Steps of 7 samples, divided unevenly, across three epochs of 23 windows: every window is seen thrice in all."""
    stream, _ = stream_of(tmp_path, [40, 7, 50, 19], 5)
    whole = {tuple(row): number for number, row in enumerate(val_batch(stream, 0, stream.windows).tolist())}
    assert stream.windows == len(whole) == 23
    seen = []
    for step in range(10):
        bounds = [step * 7 + 7 * rank // world for rank in range(world + 1)]
        for first, last in zip(bounds, bounds[1:], strict=False):
            seen += [whole[tuple(row)] for row in train_batch(stream, 3, first, last - first).tolist()]
    for epoch in range(3):
        assert sorted(seen[epoch * 23 : (epoch + 1) * 23]) == list(range(23))
    assert seen[:23] != seen[23:46] != seen[46:69]


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(0, 200), st.integers(0, 50), st.integers(0, 50))
def test_any_position_continues_alike(
    tmp_path_factory: pytest.TempPathFactory, seed: int, first: int, count: int, more: int
) -> None:
    stream, _ = stream_of(tmp_path_factory.mktemp("shards"), [31, 64, 2], 4)
    again = TokenStream(stream.shards, 4)  # a new process knows only the samples consumed
    whole = train_batch(stream, seed, first, count + more)
    parts = [train_batch(stream, seed, first, count), train_batch(again, seed, first + count, more)]
    assert np.array_equal(np.concatenate(parts), whole)


# ---------------------------------------------------------------- opening files


def corpus(folder: Path, count: int = 40, name: str = "text") -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"{i}.txt").write_text(f"This is {name} number {i} of this corpus.\n" * (1 + i % 3))
    return folder


def configured(tmp_path: Path, *files: Path | str, **options: Any) -> DataConfig:
    return DataConfig(files=[str(file) for file in files], cache=str(tmp_path / "cache"), **options)


def texts(stream: TokenStream) -> list[str]:
    return load_tokenizer("bytes").decode(stream.read(0, stream.total - 1)).split(".\n\n")


def test_text_files(tmp_path: Path) -> None:
    corpus(tmp_path / "corpus")
    lines: list[str] = []
    data = open_data(configured(tmp_path, tmp_path / "corpus/*.txt", val_fraction=0.3), 16, lines.append)
    assert data.train.documents + data.val.documents == 40 and data.val.documents > 3
    assert not set(texts(data.train)) & set(texts(data.val))
    for word in ("corpus/*.txt", f"{data.train.total:,} tokens", f"{data.val.total:,} in", "bytes (257 ids)"):
        assert word in data.description
    assert len(lines) == 1 and lines[0].startswith("preparing 40 files")


def test_cache_is_reused_and_noticed_to_be_old(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus")
    config = configured(tmp_path, folder / "*.txt")

    def opened(config: DataConfig = config) -> tuple[str, bool]:
        lines: list[str] = []
        return fingerprint(open_data(config, 16, lines.append)), bool(lines)

    first, made = opened()
    assert made and len(first) == 16
    assert opened() == (first, False)
    changed = folder / "7.txt"
    old = changed.stat()
    changed.write_text(changed.read_text().replace("number", "NUMBER"))  # the same size
    os.utime(changed, ns=(old.st_atime_ns, old.st_mtime_ns + 10**9))
    second, made = opened()
    assert made and second != first
    changed.write_text(changed.read_text().replace("NUMBER", "number"))
    os.utime(changed, ns=(old.st_atime_ns, old.st_mtime_ns + 2 * 10**9))
    assert opened() == (first, True)  # other files, the same tokens
    (folder / "new.txt").write_text("one more")
    third, made = opened()
    assert made and third not in (first, second)
    assert opened(configured(tmp_path, folder / "*.txt", val_fraction=0.5))[1]


def _open_one(config: DataConfig) -> tuple[str, int]:
    data = open_data(config, 16)
    return fingerprint(data), int(train_batch(data.train, 0, 0, 3).sum())


def test_two_processes_prepare_at_once(tmp_path: Path) -> None:
    config = configured(tmp_path, corpus(tmp_path / "corpus", 300) / "*.txt")
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(abs, range(2)))  # both processes are up before the race begins
        results = [future.result() for future in [pool.submit(_open_one, config) for _ in range(2)]]
    assert results[0] == results[1] == _open_one(config)
    assert len(os.listdir(tmp_path / "cache")) == 1  # the loser took its own away


def test_the_slower_process_takes_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The race in one process: another one finishes between our look and our rename."""
    config = configured(tmp_path, corpus(tmp_path / "corpus") / "*.txt")

    def beaten(*args: Any, **kwargs: Any) -> None:
        prepare(*args, **kwargs)
        prepare(*args, **kwargs)

    monkeypatch.setattr("moesaic.launch.data.prepare", beaten)
    assert open_data(config, 16).train.documents > 0
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_prepared_folders_and_val_files(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    sources = {name: [Source(path) for path in sorted(corpus(tmp_path / name, name=name).iterdir())] for name in "abc"}
    prepare(sources["a"], tmp_path / "A", tokenizer, val_fraction=0.4, shard_tokens=200)
    prepare(sources["b"], tmp_path / "B", tokenizer, val_fraction=0.0)

    def names(*files: str, **options: Any) -> list[set[str]]:
        data = open_data(configured(tmp_path, *(tmp_path / file for file in files), **options), 16)
        return [{text[8] for text in texts(stream)} for stream in (data.train, data.val)]

    assert names("A") == [{"a"}, {"a"}]
    assert names("A", "B") == [{"a", "b"}, {"a"}]
    assert names("[AB]", "c/*.txt") == [{"a", "b", "c"}, {"a", "c"}]
    assert names("A", val_files=[f"{tmp_path}/B"]) == [{"a"}, {"b"}]
    assert names("B", val_files=[f"{tmp_path}/A"]) == [{"b"}, {"a"}]
    data = open_data(configured(tmp_path, tmp_path / "c/*.txt", val_files=[f"{tmp_path}/b/*.txt"]), 16)
    assert data.train.documents == data.val.documents == 40  # nothing is held out of the training files
    data = open_data(configured(tmp_path, tmp_path / "A", val_files=[f"{tmp_path}/A"]), 16)
    assert set(texts(data.train)).isdisjoint(texts(data.val))
    with pytest.raises(ValueError, match=r"^data\.val_files=\[\]: must name validation files, .*/B was prepared with"):
        names("B")
    shutil.move(tmp_path / "A", tmp_path / "moved")
    assert fingerprint(open_data(configured(tmp_path, tmp_path / "moved", val_files=[f"{tmp_path}/moved"]), 9)) == (
        fingerprint(data)
    )


def test_python_source(tmp_path: Path) -> None:
    data = open_data(DataConfig(source="python", cache=str(tmp_path)), 512)
    assert data.train.total > 5_000_000
    assert 0.01 < data.val.total / data.train.total < 0.15
    assert data.train.documents > 200 and data.val.documents >= 10
    [folder] = tmp_path.iterdir()
    sources = [one["path"] for one in json.loads((folder / "manifest.json").read_text())["sources"]]
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = {part for path in sources for part in Path(path).relative_to(root).parts}
    assert "argparse.py" in parts and not parts & {"site-packages", "dist-packages", "test", "encodings"}
    # Each file is whole on one side, which its path alone decides.
    held_out = {path for path in sources if hash_unit(Path(path).relative_to(root).as_posix()) < 0.05}
    assert documents(data.val) == [Path(path).read_bytes() for path in sources if path in held_out]
    assert documents(data.train) == [Path(path).read_bytes() for path in sources if path not in held_out]
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in data.description


def documents(stream: TokenStream) -> list[bytes]:
    tokens = stream.read(0, stream.total)
    return [bytes(one[:-1].tolist()) for one in np.split(tokens, np.flatnonzero(tokens == 256) + 1)[:-1]]


# ---------------------------------------------------------------- what is wrong


def line_of(config: DataConfig, seq_len: int = 16) -> str:
    with pytest.raises(ValueError) as error:
        open_data(config, seq_len)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_error_lines(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "corpus")
    text = folder / "*.txt"
    total = open_data(configured(tmp_path, text), 1).train.total
    assert line_of(configured(tmp_path)) == (
        "data.files=[]: must name text or JSONL files, or a folder made by python launch/prepare.py files=... out=..."
    )
    line = line_of(configured(tmp_path, text), total)
    assert line.startswith(f"train.seq_len={total}: longer than the {total:,} tokens of training data in {text} allow")
    open_data(configured(tmp_path, text, val_files=[str(text)]), total - 1)  # the longest that fits
    line = line_of(configured(tmp_path, text), total - 1)
    assert "of validation data in" in line and "data.val_fraction" in line
    assert "data.source=python: must be files" in line_of(DataConfig(source="python", files=["a.txt"]))
    assert line_of(configured(tmp_path, text, val_files=["none.txt"])) == "data.val_files=none.txt: no such file"
    (tmp_path / "bad.txt").write_bytes(b"text\0")
    line = line_of(configured(tmp_path, text, val_files=[str(tmp_path / "bad.txt")]))
    assert line == f"data.val_files={tmp_path}/bad.txt: not a text file, byte 4 is NUL"
    (tmp_path / "file").write_text("in the way")
    blocked = DataConfig(files=[str(text)], cache=str(tmp_path / "file"))
    assert line_of(blocked).startswith(f"data.cache={tmp_path}/file: cannot be written (")
    assert line_of(DataConfig(files=[str(text)], tokenizer="no.json")).startswith(
        "data.tokenizer=no.json: no such file"
    )


def test_damaged_folders(tmp_path: Path) -> None:
    source = Source(corpus(tmp_path / "corpus", 1) / "0.txt")
    folder = tmp_path / "data"
    prepare([source], folder, load_tokenizer("bytes"), val_fraction=0.4)
    config = configured(tmp_path, folder)
    data: Data = open_data(config, 4)
    manifest, [shard] = folder / "manifest.json", folder.glob("train-*.npy")
    whole, raw = json.loads(manifest.read_text()), shard.read_bytes()
    size = len(raw)
    for content, what in (raw[:-3], "missing or truncated"), (b"", "missing or truncated"), (raw + b"x", "damaged"):
        shard.write_bytes(content)
        assert line_of(config, 4).startswith(
            f"data.files={shard}: {what}, {len(content)} bytes, manifest.json says {size}"
        )
    shard.unlink()
    assert line_of(config, 4).startswith(f"data.files={shard}: missing or truncated, 0 bytes")
    with shard.open("wb") as file:  # a header that lies, the size being right
        np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (3,)})
        file.write(raw[128:])
    with pytest.raises(ValueError, match=r"train-.*\.npy has shape \(3,\), its manifest\.json says"):
        train_batch(open_data(config, 4).train, 0, 0, 1)
    shard.write_bytes(raw)
    assert fingerprint(open_data(config, 4)) == fingerprint(data)

    def with_manifest(**changes: Any) -> str:
        manifest.write_text(json.dumps({**whole, **changes}))
        return line_of(config, 4)

    assert with_manifest(format=99).startswith(f"data.files={folder}: its format is 99, must be 1")
    other = whole["tokenizer"] | {"spec": "/their/tokenizer.json", "hash": "0123456789abcdef"}
    assert with_manifest(tokenizer=other).startswith(
        f"data.tokenizer=bytes: must be /their/tokenizer.json, with which {folder} was prepared (hash 0123456789ab, not "
    )
    assert with_manifest(splits={}).startswith(f"data.files={folder}: manifest.json is damaged (KeyError: 'train')")
    manifest.write_text(json.dumps(whole)[:-20])
    assert "manifest.json is damaged (JSONDecodeError" in line_of(config, 4)
