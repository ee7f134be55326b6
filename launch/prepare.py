"""Text to token shards, as a program and for the training program.

    python launch/prepare.py files='corpus/*.jsonl' out=data/corpus [tokenizer=bytes] [val_fraction=0.05] [text_key=text]

`files` is a path, a glob pattern (** reaches into subfolders) or a list of them in brackets: [a.txt,more/*.md].

A prepared folder holds `manifest.json` and, for each split (train, val), shards `train-00000.npy`, …: one-dimensional
npy arrays of token ids, of at most 2^27 tokens. Every document is followed by the tokenizer's separator, which occurs
nowhere else, so documents can be told apart from the tokens alone. One text file is one document; so is one record of a
JSONL file.

Which documents are held out is decided by a hash of their text (its first 2^18 characters), so it depends neither on
order nor on place, and copies of a document fall on the same side. Where that leaves one side empty, the document with
the lowest (highest) hash goes there; a single document is cut in two, its last `val_fraction` held out.

Documents are streamed: memory does not grow with the corpus. The folder appears under its name only when it is whole.
"""

import glob
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moesaic.launch.options import run
from moesaic.launch.tokens import Tokenizer, load_tokenizer
from moesaic.moe.config import require

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 2**27
PIECE_CHARS = 2**18  # a longer document is tokenized in pieces
BATCH_CHARS = 2**22  # text tokenized at once; with PIECE_CHARS it bounds memory
PROGRESS_SECONDS = 5.0
JSONL = (".jsonl", ".ndjson")

Log = Callable[[str], None]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Source(NamedTuple):
    """A text or JSONL file. `key`: what its split is decided by (None: by the text of each document)."""

    path: Path
    key: str | None = None


class Piece(NamedTuple):
    """A part of a document. `key` decides the split and comes with the first part only; `file` counts files from 1."""

    text: str
    key: str | None
    last: bool
    file: int


# ---------------------------------------------------------------- finding and reading documents


def expand(patterns: Sequence[str], knob: str, log: Log) -> tuple[list[Path], list[Path]]:
    """The text files, and the prepared folders, that paths and glob patterns name; each once, sorted within a pattern.

    Raises `ValueError` for a path that does not exist, a pattern that matches no file, and an empty file; but empty
    files among others that match a pattern (every Python package has some) are skipped, and the log says so.
    """
    files: dict[Path, None] = {}
    folders: dict[Path, None] = {}
    for pattern in patterns:
        where = f"{knob}={pattern}"
        name = os.path.abspath(os.path.expanduser(pattern))
        literal = os.path.exists(name) or not glob.has_magic(name)  # a name may have brackets in it
        matches = [Path(name)] if literal else [Path(match) for match in sorted(glob.glob(name, recursive=True))]
        prepared = [path for path in matches if (path / MANIFEST).is_file()]
        plain = [path for path in matches if path.is_file()]
        empty = [path for path in plain if path.stat().st_size == 0]
        if not prepared and not plain:
            require(not literal or os.path.exists(name), f"{where}: no such file")
            require(literal, f"{where}: the pattern matches no file")
            require(os.path.isdir(name), f"{where}: is not a regular file")
            raise ValueError(f"{where}: a folder without {MANIFEST}, so not made by launch/prepare.py; "
                             f"for the text files in it give {pattern.rstrip('/')}/**/*.txt")  # fmt: skip
        require(bool(prepared) or len(empty) < len(plain), f"{where}: {empty[0] if empty else ''} is empty")
        if empty:
            log(f"{where}: skipped {len(empty):,} empty of {len(plain):,} files, the first is {empty[0]}")
        files |= dict.fromkeys(path for path in plain if path not in set(empty))
        folders |= dict.fromkeys(prepared)
    return list(files), list(folders)


def read_text(path: Path, where: str) -> Iterator[str]:
    """The text of a UTF-8 file in blocks, byte for byte (line ends are kept) but for a byte-order mark.

    Raises `ValueError`, opening with `where`, at the first byte that is NUL or no UTF-8.
    """
    offset, pending = 0, b""
    with path.open("rb") as file:
        while block := file.read(PIECE_CHARS):
            data = pending + block
            if offset == 0 and data.startswith(b"\xef\xbb\xbf"):
                offset, data = 3, data[3:]
            nul = data.find(b"\0")
            require(nul < 0, f"{where}: not a text file, byte {offset + nul} is NUL")
            try:
                end = len(data)
                text = data.decode()
            except UnicodeDecodeError as error:
                end = error.start  # a character cut by the block's end is taken up with the next block
                cut = error.end == len(data) and error.reason == "unexpected end of data"
                require(cut, f"{where}: not a UTF-8 text file, byte {offset + end} is invalid")
                text = data[:end].decode()
            offset, pending = offset + end, data[end:]
            yield text
    require(not pending, f"{where}: not a UTF-8 text file, or truncated: its end cuts the character at byte {offset}")


def read_jsonl(path: Path, text_key: str, where: str, text_key_knob: str) -> Iterator[str]:
    """The text of each record of a JSONL file; blank lines are passed over.

    Raises `ValueError` naming file and line where a line is no JSON object, or its `text_key` is missing or no string.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                record = json.loads(raw.decode())
            except (ValueError, RecursionError) as error:  # ValueError: of JSON and of UTF-8
                what = f"byte {error.start} is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
                last = "" if file.read(1) else "; this is the last line, the file may be truncated"
                raise ValueError(f"{where}:{number}: not valid JSON ({what}){last}") from error
            at = f"{path}:{number}"
            if not isinstance(record, dict):
                raise ValueError(f"{where}:{number}: must be a JSON object, not {str(record)[:40]!r}")
            if text_key not in record:
                fields = ", ".join(record)[:200]
                raise ValueError(f"{text_key_knob}={text_key}: {at} has no such field, only {fields or 'none'}")
            text = record[text_key]
            if not isinstance(text, str):
                raise ValueError(f"{text_key_knob}={text_key}: must be a string, {at} has {str(text)[:40]!r}")
            try:
                text.encode()
            except UnicodeEncodeError:  # JSON can write half a surrogate pair, and text from the web does
                text = text.encode("utf-8", "replace").decode()
            yield text


def cut(text: str) -> int:
    """Where to end a first piece of `text`, at most PIECE_CHARS characters.

    Best before a line end that follows a letter or digit: there the usual pre-tokenizers (GPT-2's, Llama 3's, Qwen's)
    divide anyhow, so that the pieces have the tokens of the whole. Else before a space, else anywhere.
    """
    at = PIECE_CHARS
    while (at := text.rfind("\n", 1, at)) > 0:
        if text[at - 1].isalnum():
            return at
    at = text.rfind(" ", 1, PIECE_CHARS)
    return at if at > 0 else PIECE_CHARS


def blocks(text: str) -> Iterator[str]:
    return (text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS))


def split_document(parts: Iterable[str], key: str | None, file: int) -> Iterator[Piece]:
    """One document, given in parts, as pieces of at most PIECE_CHARS characters; none when it is empty."""
    rest, first = "", True
    for part in parts:
        rest += part
        while len(rest) > PIECE_CHARS:
            at = cut(rest)
            yield Piece(rest[:at], (key or rest[:PIECE_CHARS]) if first else None, False, file)
            rest, first = rest[at:], False
    if rest:
        yield Piece(rest, (key or rest) if first else None, True, file)


def read_sources(sources: Sequence[Source], text_key: str, knob: str) -> Iterator[Piece]:
    """Every document of every source in order. Raises `ValueError` naming the file that has none or cannot be read."""
    for file, (path, key) in enumerate(sources, start=1):
        where = f"{knob}={path}"
        empty = True
        try:
            if path.suffix in JSONL:
                documents = read_jsonl(path, text_key, where, knob[: knob.rfind(".") + 1] + "text_key")
                pieces: Iterator[Piece] = (
                    piece for text in documents for piece in split_document(blocks(text), key, file)
                )
            else:
                pieces = split_document(read_text(path, where), key, file)
            for piece in pieces:
                empty = False
                yield piece
        except OSError as error:
            raise ValueError(f"{where}: cannot be read ({error.strerror})") from error
        require(not empty, f"{where}: is empty, it holds no text")


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Groups of pieces worth tokenizing at once."""
    batch: list[Piece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text) + 64  # the last term: small pieces cost memory too
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------- writing shards


class ShardWriter:
    """Appends the tokens of one split to shards `{split}-00000.npy`, … of at most `limit` tokens.

    Tokens go straight to the file; the npy header, whose length does not depend on the count, is completed at the end.
    """

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, limit: int) -> None:
        self.folder, self.split, self.tokenizer, self.limit = folder, split, tokenizer, limit
        self.total = 0
        self.open_document = False  # the last token written is not a separator
        self.shards: list[dict[str, Any]] = []
        self._file: Any = None
        self._count = self._documents = 0

    def append(self, ids: np.ndarray) -> None:
        while ids.size:
            if self._file is None:
                self._file = (self.folder / f"{self.split}-{len(self.shards):05d}.npy").open("wb")
                self._hash = hashlib.blake2b(digest_size=16)
                self._count = self._documents = 0
                self._header_size = self._header()
            part = ids[: self.limit - self._count]
            raw = part.astype(self.tokenizer.dtype, copy=False).tobytes()
            self._file.write(raw)
            self._hash.update(raw)
            self._count += part.size
            self._documents += int(np.count_nonzero(part == self.tokenizer.separator))
            self.total += part.size
            self.open_document = bool(part[-1] != self.tokenizer.separator)
            ids = ids[part.size :]
            if self._count == self.limit:
                self._end_shard()

    def end_document(self) -> None:
        if self.open_document:
            self.append(np.array([self.tokenizer.separator]))

    def close(self) -> list[dict[str, Any]]:
        """Complete the last shard. The manifest's entries: file, tokens, documents that end in it, bytes, hash of tokens."""
        if self._file is not None:
            self._end_shard()
        return self.shards

    def _header(self) -> int:
        self._file.seek(0)
        header = {"descr": self.tokenizer.dtype.str, "fortran_order": False, "shape": (self._count,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return int(self._file.tell())

    def _end_shard(self) -> None:
        assert self._header() == self._header_size
        # On disk before the folder gets its name: a power cut must not leave a whole-looking folder.
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = Path(self._file.name)
        self.shards.append({"file": path.name, "tokens": self._count, "documents": self._documents,
                            "bytes": path.stat().st_size, "hash": self._hash.hexdigest()})  # fmt: skip
        self._file = None


def hash_unit(key: str) -> float:
    """A number in [0, 1) that depends on `key` only."""
    return (int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 11) / 2**53


def prepare(
    sources: Sequence[Source],
    out: Path,
    tokenizer: Tokenizer,
    *,
    text_key: str = "text",
    val_fraction: float = 0.05,
    knob: str = "data.files",
    log: Log = to_stderr,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Tokenize `sources` into the new folder `out`, return its manifest. `val_fraction=0`: all documents are in train.

    Raises `ValueError` for bad input (the message opens with `knob`) and `OSError` when the folder cannot be written or
    `out` is there already, not empty. No half-made folder remains, unless the process is killed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f"{out.name}.partial-{uuid.uuid4().hex[:12]}")
    folder.mkdir()
    try:
        writers = {split: ShardWriter(folder, split, tokenizer, shard_tokens) for split in ("train", "val")}
        extremes, text_bytes = _tokenize(sources, writers, tokenizer, text_key, val_fraction, knob, log)
        if val_fraction > 0 and min(writer.total for writer in writers.values()) == 0:
            _fill_empty_split(folder, writers, extremes, val_fraction, tokenizer, shard_tokens)
        manifest = {
            "format": FORMAT,
            "tokenizer": {
                "spec": tokenizer.spec,
                "hash": tokenizer.digest,
                "vocab_size": tokenizer.vocab_size,
                "separator": tokenizer.separator,
            },
            "dtype": tokenizer.dtype.name,
            "text_bytes": text_bytes,
            "val_fraction": val_fraction,
            "text_key": text_key,
            "splits": {split: writer.close() for split, writer in writers.items()},
            "sources": [{"path": str(path), "bytes": path.stat().st_size} for path, _ in sources],
        }
        with (folder / MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.rename(folder, out)  # fails where another process has put a folder meanwhile
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


class Extreme(NamedTuple):
    """The document of lowest or highest hash: its place in its split's tokens."""

    unit: float
    start: int
    stop: int


def _tokenize(
    sources: Sequence[Source],
    writers: dict[str, ShardWriter],
    tokenizer: Tokenizer,
    text_key: str,
    val_fraction: float,
    knob: str,
    log: Log,
) -> tuple[tuple[Extreme, Extreme], int]:
    """Write every document to its split. Returns the documents of lowest and highest hash, and the bytes of text."""
    lowest, highest = Extreme(2.0, 0, 0), Extreme(-1.0, 0, 0)
    separator = np.array([tokenizer.separator], tokenizer.dtype)
    totals = dict.fromkeys(writers, 0)
    split, unit, start, text_bytes = "train", 0.0, 0, 0
    began = said = time.monotonic()
    for batch in batches(read_sources(sources, text_key, knob)):
        arrays: dict[str, list[np.ndarray]] = {name: [] for name in writers}  # one write a batch: documents are short
        for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
            if piece.key is not None:
                unit = hash_unit(piece.key)
                split = "val" if unit < val_fraction else "train"
                start = totals[split]
            arrays[split].append(ids)
            totals[split] += ids.size
            text_bytes += len(piece.text.encode())
            if piece.last:
                arrays[split].append(separator)
                totals[split] += 1
                document = Extreme(unit, start, totals[split])
                lowest = document if unit < lowest.unit else lowest
                highest = document if unit > highest.unit else highest
        for name, parts in arrays.items():
            if parts:
                writers[name].append(np.concatenate(parts))
        now = time.monotonic()
        if now - said >= PROGRESS_SECONDS:
            said = now
            tokens = sum(totals.values())
            log(f"preparing: file {batch[-1].file:,} of {len(sources):,}, {text_bytes / 1e6:,.1f} MB of text, "
                f"{tokens:,} tokens, {tokens / (now - began):,.0f} tokens/s")  # fmt: skip
    return (lowest, highest), text_bytes


def _fill_empty_split(
    folder: Path,
    writers: dict[str, ShardWriter],
    extremes: tuple[Extreme, Extreme],
    val_fraction: float,
    tokenizer: Tokenizer,
    shard_tokens: int,
) -> None:
    """All documents fell on one side: move one, or the end of a single one, to the other, by copying their tokens."""
    full = "train" if writers["train"].total else "val"
    total = writers[full].total
    lowest, highest = extremes
    if lowest.unit == highest.unit:  # a single text
        start, stop, target = total - min(max(1, round(total * val_fraction)), total - 1), total, "val"
    elif full == "train":
        start, stop, target = lowest.start, lowest.stop, "val"
    else:
        start, stop, target = highest.start, highest.stop, "train"
    other = "train" if target == "val" else "val"
    old = []
    for shard in writers[full].close():
        path = folder / f"old-{shard['file']}"
        (folder / shard["file"]).rename(path)
        old.append(path)
    for split in writers:
        writers[split] = ShardWriter(folder, split, tokenizer, shard_tokens)
    offset = 0
    for path in old:
        tokens = np.load(path, mmap_mode="r").view(np.ndarray)
        first, last = (min(max(edge - offset, 0), tokens.size) for edge in (start, stop))
        for begin, end, split in ((0, first, other), (first, last, target), (last, tokens.size, other)):
            for at in range(begin, end, BATCH_CHARS):
                writers[split].append(tokens[at : min(at + BATCH_CHARS, end)])
        offset += tokens.size
        path.unlink()
    for writer in writers.values():
        writer.end_document()


# ---------------------------------------------------------------- the program


@dataclass
class Options:
    """What the program takes; the module's docstring explains."""

    files: str = ""
    out: str = ""
    tokenizer: str = "bytes"
    val_fraction: float = 0.05
    text_key: str = "text"


def main(options: Options) -> None:
    """Prepare and print a summary. Raises `ValueError`, or `OSError` when `out` cannot be written."""
    for name in ("files", "out"):
        require(getattr(options, name) != "", f"{name}=: must be given, as in files='corpus/*.jsonl' out=data/corpus")
    require(0 <= options.val_fraction < 1, f"val_fraction={options.val_fraction}: must be at least 0 and below 1")
    out = Path(options.out).expanduser().resolve()
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    require(free, f"out={options.out}: exists already; must be a new or an empty folder")
    tokenizer = load_tokenizer(options.tokenizer, "tokenizer")
    listed = options.files
    patterns = [one.strip() for one in listed[1:-1].split(",")] if listed.startswith("[") else [listed]
    files, folders = expand(patterns, "files", to_stderr)
    require(not folders, f"files={listed}: {folders[0] if folders else ''} is prepared already")
    began = time.monotonic()
    manifest = prepare([Source(path) for path in files], out, tokenizer, knob="files",
                       text_key=options.text_key, val_fraction=options.val_fraction)  # fmt: skip
    seconds = time.monotonic() - began
    train, val = (sum(shard["tokens"] for shard in manifest["splits"][split]) for split in ("train", "val"))
    documents = sum(shard["documents"] for shards in manifest["splits"].values() for shard in shards)
    print(f"prepared {documents:,} documents, {train + val:,} tokens (train {train:,}, val {val:,}), "
          f"{manifest['text_bytes']:,} bytes of text, {(train + val) / seconds:,.0f} tokens/s, in {out}")  # fmt: skip


if __name__ == "__main__":
    run(main, Options, __doc__)
