"""Token shards read as training and validation sequences, in an order that is a pure function of seed and position.

The tokens of a split, shards one after another, are one stream; sequence (window) w is its tokens w*S .. w*S + S, that
is S + 1 tokens, of which a model reads the first S and predicts the last S. A run's sample number g, counted over all
ranks and epochs, is window `permute(g mod n)` of epoch g div n. So each window is read once an epoch on any number of
ranks, and one integer, the samples consumed, is the whole position of a run.

Letters: S tokens of a sequence (train.seq_len), n windows of a split.
"""

import glob
import hashlib
import json
import math
import os
import platform
import re
import struct
import sysconfig
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesaic.launch.documents import MANIFEST, SET, Log, Source, expand, identity, read_text
from moesaic.launch.mixture import Ahead, Mixture, SetStream
from moesaic.launch.prepare import prepare
from moesaic.launch.schema import DataConfig
from moesaic.launch.token_shards import FORMAT, digest_of
from moesaic.launch.tokens import Tokenizer, load_tokenizer
from moesaic.moe.config import require

UInts = NDArray[np.uint64]
OPEN_SHARDS = 256  # a mapped file holds a descriptor, and 1,024 is a common limit for a process
FEISTEL_ROUNDS = 8
SAMPLED = 2**15  # tokens of each of 64 places that the digest of another project's file is made of
MEGATRON_TYPES = {1: "<u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}

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
    """One npy file of token ids, or with `dtype` the part of a bare file that begins at byte `offset`. `documents` end in it;
    `digest` is a hash of its tokens, without a header of some of them."""

    path: Path
    tokens: int
    documents: int
    digest: str
    dtype: str = ""
    offset: int = 0

    def open(self) -> np.ndarray:
        """Its tokens, mapped. A plain view of the mapping: np.memmap itself is slow to slice."""
        if self.dtype:
            return np.memmap(self.path, self.dtype, "r", self.offset, (self.tokens,)).view(np.ndarray)
        return np.load(self.path, mmap_mode="r").view(np.ndarray)

    def digest_now(self) -> str:
        """`digest` of what is in the file now. Raises OSError, or ValueError where it holds no such array."""
        if not self.dtype:
            return digest_of(self.path)
        tokens = self.open()  # files of others have no checksum, and to read all of a large one takes minutes
        starts = np.linspace(0, max(0, tokens.size - SAMPLED), 64, dtype=np.int64).tolist()
        parts = b"".join(tokens[at : at + SAMPLED].tobytes() for at in sorted(set(starts)))
        return hashlib.blake2b(f"{tokens.size} {self.dtype} ".encode() + parts, digest_size=16).hexdigest()


Splits = dict[str, list[Shard]]  # train and val, of one prepared folder


class TokenStream:
    """The tokens of a split, its shards one after another, as windows of seq_len + 1 tokens (neighbours share one).

    Files are mapped when first read, so opening a stream costs nothing and memory holds only what the system caches.
    """

    def __init__(self, shards: Sequence[Shard], seq_len: int, vocab_size: int = 2**31) -> None:
        self.shards = tuple(shards)
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.starts = list(accumulate((shard.tokens for shard in shards), initial=0))
        self.total = self.starts.pop()
        self.documents = sum(shard.documents for shard in shards)
        self.windows = max(0, (self.total - 1) // seq_len)
        self._mapped = lru_cache(maxsize=OPEN_SHARDS)(self._map)

    def _map(self, number: int) -> np.ndarray:
        shard = self.shards[number]
        tokens = shard.open()
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
            if self.shards[number].dtype and (largest := int(part.max())) >= self.vocab_size:
                path = self.shards[number].path
                raise ValueError(f"data.tokenizer: {path} has token {largest}, must be below {self.vocab_size}")
            done, number = done + part.size, number + 1
        return out

    def gather(self, windows: np.ndarray) -> np.ndarray:
        """(count,) window numbers -> (count, seq_len + 1) int64 tokens."""
        out = np.empty((len(windows), self.seq_len + 1), np.int64)
        for row, window in zip(out, windows.tolist(), strict=True):
            row[:] = self.read(window * self.seq_len, (window + 1) * self.seq_len + 1)
        return out

    def rows(self, seed: int, index: np.ndarray) -> np.ndarray:
        """Sequences by their number, counted over epochs, each of which has an order of its own."""
        epochs, windows = np.divmod(index, self.windows)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            windows[here] = permute(windows[here], self.windows, seed, epoch)
        return self.gather(windows)

    def marks(self) -> list[str]:
        return [f"{shard.tokens} {shard.digest}" for shard in self.shards]


def train_batch(
    stream: TokenStream | SetStream | Mixture | Ahead, seed: int, first_sample: int, count: int
) -> np.ndarray:
    """Samples first_sample .. first_sample + count - 1 of a run -> int64 (count, seq_len + 1); `count` may be 0."""
    if isinstance(stream, Ahead):
        return stream.batch(first_sample, count)
    if isinstance(stream, Mixture):
        return stream.batch(seed, first_sample, count)
    return stream.rows(seed, np.arange(first_sample, first_sample + count, dtype=np.int64))


def val_batch(stream: TokenStream, first_sample: int, count: int) -> np.ndarray:
    """Windows first_sample .. in stream order -> (count or fewer, seq_len + 1) int64; none past the end."""
    stop = min(first_sample + count, stream.windows)
    return stream.gather(np.arange(min(first_sample, stop), stop, dtype=np.int64))


# ---------------------------------------------------------------- opening what the configuration names


@dataclass(frozen=True)
class Data:
    """What a run reads. `val` is all that is held out, `sets` the same by name (one without a name: ""); `description` is a line
    for people."""

    train: TokenStream | SetStream | Mixture
    val: TokenStream
    tokenizer: Tokenizer
    description: str
    sets: dict[str, TokenStream]

    def shards(self) -> list[Shard]:
        sources = self.train.sources if isinstance(self.train, Mixture) else (self.train,)
        return [shard for one in (*sources, self.val) if isinstance(one, TokenStream) for shard in one.shards]


def open_data(config: DataConfig, seq_len: int, log: Log = lambda line: None) -> Data:
    """The data of a run; text that is not prepared yet is, once, into `config.cache`. `log` takes lines on progress.

    A folder made by launch/prepare.py gives its train split to training and its val split to validation. With
    `val_files`, training still leaves out the val split of folders, text files go to training whole, and validation
    takes the val split of a folder named in `val_files`, or all of one that has none. Any number of processes may call
    this at once.

    With `weights`, each entry of `files` is a source of its own, and without `val_files` a validation set, too.

    Raises `ValueError` for whatever is wrong with the files, their tokenizer, or their size.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    val_fraction = 0.0 if config.val_files else config.val_fraction
    entries = [named(entry) for entry in config.files]

    def opened(patterns: Sequence[str], name: str) -> tuple[TokenStream | SetStream, list[Shard]]:
        """Training data of one source, and its shards that are held out."""
        if any(pattern.startswith(SET) for pattern in patterns):
            require(
                len(patterns) == 1,
                f"data.files={','.join(patterns)}: a set that is streamed needs data.weights beside others",
            )
            require(
                bool(config.val_files), f"data.val_files=[]: must name validation files where {patterns[0]} is streamed"
            )
            return SetStream(patterns[0], "data.files", tokenizer, config.text_key, seq_len, config.cache), []
        splits = _open_files(patterns, "data.files", val_fraction, config, tokenizer, log)
        stream = TokenStream([shard for split in splits for shard in split["train"]], seq_len, tokenizer.vocab_size)
        return _long_enough(stream, "training", name), [shard for split in splits for shard in split["val"]]

    held_out: dict[str, list[Shard]] = {}
    train: TokenStream | SetStream | Mixture
    if config.source == "python":
        given = [*config.files, *config.val_files]
        require(not given, f"data.source=python: must be files to read {', '.join(given)}")
        splits = _open_python(config, tokenizer, log)
        name = f"standard library of Python {platform.python_version()}"
        train, held_out = TokenStream(splits["train"], seq_len), {"": splits["val"]}
        _long_enough(train, "training", name)
    else:
        require(
            bool(config.files),
            "data.files=[]: must name text or JSONL files, or a folder made by "
            "python launch/prepare.py files=... out=...",
        )
        name = ", ".join(config.files)
        name = name if len(name) < 100 else f"{name[:97]}..."
        if config.weights:
            names = [given or Path(path.rstrip("/")).stem for given, path in entries]
            twice = [one for one in names if names.count(one) > 1]
            require(
                not twice, f"data.files={name}: {twice[:1]} twice; name sources apart, as in [a={entries[0][1]},...]"
            )
            streams = [opened([path], path) for _, path in entries]
            train = Mixture(names, config.weights, [stream for stream, _ in streams])
            held_out = {name: shards for name, (_, shards) in zip(names, streams, strict=True) if shards}
        else:
            given = [one for one, _ in entries if one]
            require(
                not given, f"data.weights=[]: must give a weight for each of data.files={name}, for they have names"
            )
            train, shards = opened([path for _, path in entries], name)
            held_out = {"": shards}
        if config.val_files:
            held_out = {}
            for set_name, path in map(named, config.val_files):
                for split in _open_files([path], "data.val_files", 0.0, config, tokenizer, log):
                    held_out.setdefault(set_name, []).extend(split["val"] or split["train"])
    val = TokenStream([shard for shards in held_out.values() for shard in shards], seq_len, tokenizer.vocab_size)
    require(val.total > 0, f"data.val_files=[]: must name validation files, {name} was prepared with val_fraction=0")
    sets = {one: TokenStream(shards, seq_len, tokenizer.vocab_size) for one, shards in held_out.items()}
    for one, stream in sets.items():
        _long_enough(stream, f"validation{f' set {one}' if one else ''}", name)
    kinds = train.sources if isinstance(train, Mixture) else (train,)
    known = [one for one in kinds if isinstance(one, TokenStream)]
    total, number = sum(one.total for one in known), sum(one.documents for one in known)
    streamed = ", some streamed" if 0 < len(known) < len(kinds) else ""
    description = (
        f"{name}: {f'{total:,} tokens in {number:,} documents{streamed}' if known else 'streamed'} to train, {val.total:,} in "
        f"{val.documents:,} to validate, tokenizer {tokenizer.spec} ({tokenizer.vocab_size:,} ids)"
    )
    return Data(train, val, tokenizer, description, sets)


def named(entry: str) -> tuple[str, str]:
    """NAME and PATH of NAME=PATH, or an empty name. A path that is there may hold an equals sign itself."""
    name, equals, path = entry.partition("=")
    plain = not equals or not re.fullmatch(r"[\w.-]+", name) or glob.glob(os.path.expanduser(entry), recursive=True)
    return ("", entry) if plain else (name, path)


def _long_enough(stream: TokenStream, use: str, name: str) -> TokenStream:
    require(
        stream.windows > 0,
        f"train.seq_len={stream.seq_len}: longer than the {stream.total:,} tokens of {use} data in {name} allow, "
        "must be below that" + ("" if use == "training" else "; or set data.val_files or a larger data.val_fraction"),
    )
    return stream


def fingerprint(data: Data) -> str:
    """16 hex digits that tell token data apart: the tokens of both splits, their order, the tokenizer; not the place."""
    parts = [data.tokenizer.digest, *data.train.marks(), "/", *data.val.marks(), "/"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _open_files(
    patterns: Sequence[str], knob: str, val_fraction: float, config: DataConfig, tokenizer: Tokenizer, log: Log
) -> list[Splits]:
    """The splits of every prepared folder, and of the text files taken together, that `patterns` name."""
    files, folders = expand(patterns, knob, log)
    splits = [_open_folder(folder, tokenizer, knob) for folder in folders]
    if foreign := [path for path in files if isinstance(path, Path) and path.suffix == ".bin"]:
        splits += [open_bin(path, knob, val_fraction) for path in foreign]
        files = [path for path in files if path not in foreign]
    if files:
        splits.append(_open_text([Source(path) for path in files], knob, val_fraction, config, tokenizer, log))
    return splits


def open_bin(path: Path, knob: str, val_fraction: float) -> Splits:
    """Tokens in a file of another project, its last `val_fraction` held out. Beside an .idx: Megatron's indexed data set. Else
    bare uint16, as nanoGPT writes, or with llm.c's header of 256 int32.

    Raises `ValueError` where header and size don't agree. What tokens mean nobody says: only that they are below the size of the
    vocabulary is checked, when they are read."""
    size, documents, offset, dtype = path.stat().st_size, 0, 0, "<u2"
    index = path.with_suffix(".idx")
    if index.is_file():
        with index.open("rb") as file:
            magic, version, code, sequences, ends = struct.unpack("<9sQBQQ", file.read(34))
            require(
                magic == b"MMIDIDX\0\0" and version == 1,
                f"{knob}={index}: not an index of Megatron's data sets, version 1",
            )
            require(
                code in MEGATRON_TYPES, f"{knob}={index}: type {code} of tokens, must be one of {list(MEGATRON_TYPES)}"
            )
            lengths = np.fromfile(file, "<i4", sequences)
            pointers = np.fromfile(file, "<i8", sequences)
        dtype, documents = MEGATRON_TYPES[code], ends - 1
        tokens = int(lengths.sum(dtype=np.int64))
        packed = np.array_equal(pointers, (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize)
        require(
            packed and len(pointers) == sequences,
            f"{knob}={index}: its sequences do not follow each other in {path.name}",
        )
    else:
        head = np.fromfile(path, "<i4", 3)
        offset = 1024 if head.size == 3 and head[:2].tolist() == [20240520, 1] else 0
        tokens = int(head[2]) if offset else size // 2
    whole = offset + tokens * np.dtype(dtype).itemsize
    require(
        size == whole and tokens > 0,
        f"{knob}={path}: {size} bytes, must be {whole} for {tokens:,} tokens of {np.dtype(dtype).name}",
    )
    cut = tokens - round(tokens * val_fraction)

    def part(start: int, stop: int, ended: int) -> list[Shard]:
        shard = Shard(path, stop - start, ended, "", dtype, offset + start * np.dtype(dtype).itemsize)
        return [replace(shard, digest=shard.digest_now())] if stop > start else []

    return {"train": part(0, cut, documents), "val": part(cut, tokens, 0)}


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
                why = f"{error.strerror}: {error.filename or folder}"
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
