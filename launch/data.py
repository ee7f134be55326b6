"""Token shards read as training and validation sequences, in an order that is a pure function of seed and position.

The tokens of a split, shards one after another, are one stream; sequence (window) w is its tokens w*S .. w*S + S, that
is S + 1 tokens, of which a model reads the first S and predicts the last S. A run's sample number g, counted over all
ranks and epochs, is window `permute(g mod n)` of epoch g div n. So each window is read once an epoch on any number of
ranks, and one integer, the samples consumed, is the whole position of a run.

Letters: S tokens of a sequence (train.seq_len), n windows of a split.
"""

import hashlib
import json
import math
import os
import platform
import sysconfig
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesaic.launch.documents import MANIFEST, Log, Source, expand, identity, read_text
from moesaic.launch.prepare import prepare
from moesaic.launch.schema import DataConfig
from moesaic.launch.token_shards import FORMAT
from moesaic.launch.tokens import Tokenizer, load_tokenizer
from moesaic.moe.config import require

UInts = NDArray[np.uint64]
OPEN_SHARDS = 256  # a mapped file holds a descriptor, and 1,024 is a common limit for a process
FEISTEL_ROUNDS = 8

# Tests, which most distributions leave out, and character tables, which are numbers rather than text.
NOT_CORPUS = ("test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__")


# ---------------------------------------------------------------- the order of samples


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Images, int64, of `index` (1-D, values in 0..n-1) under a pseudo-random permutation of 0..n-1; 1 <= n <= 2^40.

    Nothing of size n is made. A number below a*b, a and b about sqrt(n), is a pair (left, right); a round adds a hash of
    one half to the other, modulo a or b, which can be undone, so all rounds together are a bijection of 0..a*b-1. An
    image that falls into n..a*b-1 is mapped again until it does not, which keeps the bijection. (Generalised Feistel
    cipher with cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.)
    """
    assert 1 <= n <= 2**40
    sqrt = math.isqrt(n - 1) + 1
    a, b = np.uint64(sqrt), np.uint64(-(-n // sqrt))
    key = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    x: UInts = np.array(index, np.uint64)
    assert x.size == 0 or int(x.max()) < n
    outside = np.ones(x.shape, bool)
    while outside.any():
        left, right = np.divmod(x[outside], b)
        for number, round_key in enumerate(np.frombuffer(key, "<u8").astype(np.uint64)):
            if number % 2 == 0:
                left = (left + _mix(right, round_key) % a) % a
            else:
                right = (right + _mix(left, round_key) % b) % b
        x[outside] = left * b + right
        outside = x >= np.uint64(n)
    return x.astype(np.int64)


def _mix(x: UInts, key: np.uint64) -> UInts:
    """A 64-bit hash of each x: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014), keyed."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---------------------------------------------------------------- shards and streams


@dataclass(frozen=True)
class Shard:
    """One npy file of token ids. `documents` end in it; `digest` is a hash of its tokens."""

    path: Path
    tokens: int
    documents: int
    digest: str


Splits = dict[str, list[Shard]]  # train and val, of one prepared folder


class TokenStream:
    """The tokens of a split, its shards one after another, as windows of seq_len + 1 tokens (neighbours share one).

    Files are mapped when first read, so opening a stream costs nothing and memory holds only what the system caches.
    """

    def __init__(self, shards: Sequence[Shard], seq_len: int) -> None:
        self.shards = tuple(shards)
        self.seq_len = seq_len
        self.starts = list(accumulate((shard.tokens for shard in shards), initial=0))
        self.total = self.starts.pop()
        self.documents = sum(shard.documents for shard in shards)
        self.windows = max(0, (self.total - 1) // seq_len)
        self._mapped = lru_cache(maxsize=OPEN_SHARDS)(self._map)

    def _map(self, number: int) -> np.ndarray:
        shard = self.shards[number]
        # A plain view of the mapping: np.memmap itself is slow to slice.
        tokens: np.ndarray = np.load(shard.path, mmap_mode="r").view(np.ndarray)
        require(
            tokens.shape == (shard.tokens,),
            f"data.files: {shard.path} has shape {tokens.shape}, its {MANIFEST} says ({shard.tokens},)",
        )
        return tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of the stream, int64."""
        assert 0 <= start <= stop <= self.total
        out = np.empty(stop - start, np.int64)
        done, number = 0, bisect_right(self.starts, start) - 1
        while done < out.size:
            offset = start + done - self.starts[number]
            part = self._mapped(number)[offset : offset + out.size - done]
            out[done : done + part.size] = part
            done, number = done + part.size, number + 1
        return out

    def gather(self, windows: np.ndarray) -> np.ndarray:
        """(count,) window numbers -> (count, seq_len + 1) int64 tokens."""
        out = np.empty((len(windows), self.seq_len + 1), np.int64)
        for row, window in zip(out, windows.tolist(), strict=True):
            row[:] = self.read(window * self.seq_len, (window + 1) * self.seq_len + 1)
        return out


def train_batch(stream: TokenStream, seed: int, first_sample: int, count: int) -> np.ndarray:
    """Samples first_sample .. first_sample + count - 1 of a run -> int64 (count, seq_len + 1); `count` may be 0."""
    sample = np.arange(first_sample, first_sample + count, dtype=np.int64)
    epochs, windows = np.divmod(sample, stream.windows)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        windows[here] = permute(windows[here], stream.windows, seed, epoch)
    return stream.gather(windows)


def val_batch(stream: TokenStream, first_sample: int, count: int) -> np.ndarray:
    """Windows first_sample .. in stream order -> (count or fewer, seq_len + 1) int64; none past the end."""
    stop = min(first_sample + count, stream.windows)
    return stream.gather(np.arange(min(first_sample, stop), stop, dtype=np.int64))


# ---------------------------------------------------------------- opening what the configuration names


@dataclass(frozen=True)
class Data:
    """What a run reads; `description` is a line for people."""

    train: TokenStream
    val: TokenStream
    tokenizer: Tokenizer
    description: str


def open_data(config: DataConfig, seq_len: int, log: Log = lambda line: None) -> Data:
    """The data of a run; text that is not prepared yet is, once, into `config.cache`. `log` takes lines on progress.

    A folder made by launch/prepare.py gives its train split to training and its val split to validation. With
    `val_files`, training still leaves out the val split of folders, text files go to training whole, and validation
    takes the val split of a folder named in `val_files`, or all of one that has none. Any number of processes may call
    this at once.

    Raises `ValueError` for whatever is wrong with the files, their tokenizer, or their size.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if config.source == "python":
        named = [*config.files, *config.val_files]
        require(not named, f"data.source=python: must be files to read {', '.join(named)}")
        splits = [_open_python(config, tokenizer, log)]
        held_out, name = splits, f"standard library of Python {platform.python_version()}"
    else:
        require(
            bool(config.files),
            "data.files=[]: must name text or JSONL files, or a folder made by "
            "python launch/prepare.py files=... out=...",
        )
        val_fraction = 0.0 if config.val_files else config.val_fraction
        splits = _open_files(config.files, "data.files", val_fraction, config, tokenizer, log)
        held_out, name = splits, ", ".join(config.files)
        if config.val_files:
            held_out = _open_files(config.val_files, "data.val_files", 0.0, config, tokenizer, log)
            held_out = [{"val": split["val"] or split["train"]} for split in held_out]
    name = name if len(name) < 100 else f"{name[:97]}..."
    train = TokenStream([shard for split in splits for shard in split["train"]], seq_len)
    val = TokenStream([shard for split in held_out for shard in split["val"]], seq_len)
    require(val.total > 0, f"data.val_files=[]: must name validation files, {name} was prepared with val_fraction=0")
    for stream, use in (train, "training"), (val, "validation"):
        require(
            stream.windows > 0,
            f"train.seq_len={seq_len}: longer than the {stream.total:,} tokens of {use} data in {name} allow, "
            "must be below that" + ("; or set data.val_files or a larger data.val_fraction" if stream is val else ""),
        )
    description = (
        f"{name}: {train.total:,} tokens in {train.documents:,} documents to train, {val.total:,} in "
        f"{val.documents:,} to validate, tokenizer {tokenizer.spec} ({tokenizer.vocab_size:,} ids)"
    )
    return Data(train, val, tokenizer, description)


def fingerprint(data: Data) -> str:
    """16 hex digits that tell token data apart: the tokens of both splits, their order, the tokenizer; not the place."""
    parts = [data.tokenizer.digest]
    for stream in (data.train, data.val):
        parts += [f"{shard.tokens} {shard.digest}" for shard in stream.shards] + ["/"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _open_files(
    patterns: Sequence[str], knob: str, val_fraction: float, config: DataConfig, tokenizer: Tokenizer, log: Log
) -> list[Splits]:
    """The splits of every prepared folder, and of the text files taken together, that `patterns` name."""
    files, folders = expand(patterns, knob, log)
    splits = [_open_folder(folder, tokenizer, knob) for folder in folders]
    if files:
        splits.append(_open_text([Source(path) for path in files], knob, val_fraction, config, tokenizer, log))
    return splits


def _open_python(config: DataConfig, tokenizer: Tokenizer, log: Log) -> Splits:
    """The splits of this interpreter's standard library. A file's path in it, not its text, decides where it goes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in NOT_CORPUS)
        paths = [Path(folder) / name for name in sorted(files) if name.endswith(".py")]
        sources += [Source(path, path.relative_to(root).as_posix()) for path in paths]
    require(bool(sources), f"data.source=python: no *.py files in {root}; must be files, with data.files=...")
    return _open_text(sources, "data.source", config.val_fraction, config, tokenizer, log, keep=_is_text)


def _is_text(source: Source) -> bool:
    try:
        return any(list(read_text(Path(source.path), "")))
    except (ValueError, OSError):  # a few files are in another encoding on purpose
        return False


def _open_text(
    sources: Sequence[Source],
    knob: str,
    val_fraction: float,
    config: DataConfig,
    tokenizer: Tokenizer,
    log: Log,
    keep: Callable[[Source], bool] | None = None,
) -> Splits:
    """The splits of `sources`, those that `keep` accepts, prepared in a folder of `config.cache` if they are not yet.

    The folder's name is a hash of all that decides its content, files by path, size and time of change. Processes that make it at
    the same time each write their own; the first to finish gives it the name, and the others take that one.
    """
    decides = [FORMAT, tokenizer.digest, config.text_key, val_fraction, [identity(source, knob) for source in sources]]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:20]
    folder = Path(config.cache).expanduser().absolute() / key
    if not (folder / MANIFEST).exists():
        log(f"preparing {len(sources):,} files, once, in {folder}")
        chosen = [source for source in sources if keep is None or keep(source)]
        try:
            prepare(chosen, folder, tokenizer, text_key=config.text_key, val_fraction=val_fraction, knob=knob, log=log)
        except OSError as error:
            if not (folder / MANIFEST).exists():
                why = f"{error.strerror}: {error.filename}"
                raise ValueError(f"data.cache={config.cache}: cannot be written ({why})") from error
    return _open_folder(folder, tokenizer, "data.cache")


def _open_folder(folder: Path, tokenizer: Tokenizer, knob: str) -> Splits:
    """The shards, by split, of a prepared folder, after checking that they are whole and made with `tokenizer`."""
    again = "remove the folder and prepare it again"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version = manifest["format"]
        require(version == FORMAT, f"{knob}={folder}: its format is {version}, must be {FORMAT}; {again}")
        made_with, splits = manifest["tokenizer"], manifest["splits"]
        require(
            made_with["hash"] == tokenizer.digest,
            f"data.tokenizer={tokenizer.spec}: must be {made_with['spec']}, with which {folder} was prepared "
            f"(hash {made_with['hash'][:12]}, not {tokenizer.digest[:12]})",
        )
        for entry in splits["train"] + splits["val"]:
            path = folder / entry["file"]
            found, size = path.stat().st_size if path.exists() else 0, entry["bytes"]
            what = "missing or truncated" if found < size else "damaged"
            require(found == size, f"{knob}={path}: {what}, {found} bytes, {MANIFEST} says {size}; {again}")
        return {
            split: [Shard(folder / one["file"], one["tokens"], one["documents"], one["hash"]) for one in splits[split]]
            for split in ("train", "val")
        }
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{knob}={folder}: {MANIFEST} is damaged ({why}); {again}") from error
