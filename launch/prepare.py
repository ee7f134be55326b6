"""Text to token shards, as a program and for the training program.

    python launch/prepare.py files='corpus/*.jsonl' out=data/corpus [tokenizer=bytes] [val_fraction=0.05] [text_key=text]

A prepared folder holds `manifest.json` and, for each split (train, val), shards `train-00000.npy`, …: one-dimensional npy
arrays of token ids, of at most 2^27 tokens. Every document is followed by the tokenizer's separator, which occurs nowhere else,
so documents can be told apart from the tokens alone. One text file is one document; so is one record of a JSONL file.

Which documents are held out is decided by a hash of their text (its first 2^18 characters), so it depends neither on order nor on
place, and copies of a document fall on the same side. Where that leaves one side empty, the document with the lowest (highest)
hash goes there; a single document is cut in two, its last `val_fraction` held out.

Documents are streamed: memory does not grow with the corpus. The folder appears under its name only when it is whole.
"""

import difflib
import glob
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
    """A part of a document: `key` decides the split and is given with the first part only; `file` counts files from 1."""

    text: str
    key: str | None
    last: bool
    file: int


# ---------------------------------------------------------------- finding and reading documents


def expand(patterns: Sequence[str], knob: str, log: Log) -> tuple[list[Path], list[Path]]:
    """The text files, and the prepared folders, that a list of paths and glob patterns names; each once, sorted within a pattern.

    Raises `ValueError` for a path that does not exist, a pattern that matches no file, and an empty file; but empty files
    among others that match a pattern (every Python package has some) are skipped, and the log says so.
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
    require(
        not pending, f"{where}: not a UTF-8 text file, its end cuts the character at byte {offset}; it may be truncated"
    )


def read_jsonl(path: Path, text_key: str, where: str, text_key_knob: str) -> Iterator[str]:
    """The text of each record of a JSONL file; blank lines are passed over.

    Raises `ValueError` naming file and line for a line that is no JSON object or whose `text_key` is missing or no string.
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
            require(isinstance(record, dict), f"{where}:{number}: must be a JSON object, not {str(record)[:40]!r}")
            require(text_key in record,
                    f"{text_key_knob}={text_key}: {path}:{number} has no such field, only {', '.join(record)[:200]}")  # fmt: skip
            text = record[text_key]
            require(isinstance(text, str),
                    f"{text_key_knob}={text_key}: must be a string, but is {str(text)[:40]!r} in {path}:{number}")  # fmt: skip
            try:
                text.encode()
            except UnicodeEncodeError:  # JSON can write half a surrogate pair, and text from the web does
                text = text.encode("utf-8", "replace").decode()
            yield text


def cut(text: str) -> int:
    """Where to end a first piece of `text`, at most PIECE_CHARS characters.

    Best before a line end that follows a letter or digit: there the usual pre-tokenizers (GPT-2's, Llama 3's, Qwen's) divide
    anyhow, so that the pieces have the tokens of the whole. Else before a space, else anywhere.
    """
    at = PIECE_CHARS
    while (at := text.rfind("\n", 1, at)) > 0:
        if text[at - 1].isalnum():
            return at
    at = text.rfind(" ", 1, PIECE_CHARS)
    return at if at > 0 else PIECE_CHARS


def split_document(blocks: Iterable[str], key: str | None, file: int) -> Iterator[Piece]:
    """One document, given in blocks, as pieces of at most PIECE_CHARS characters; none when it is empty."""
    rest, first = "", True
    for block in blocks:
        rest += block
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
                pieces = (piece for text in documents for piece in split_document([text], key, file))
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
        chars += len(piece.text) + 64  # an empty-looking piece costs memory too
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------- writing shards


class ShardWriter:
    """Appends the tokens of one split to shards `{split}-00000.npy`, … of at most `limit` tokens.

    Tokens go straight to the file; the npy header, whose length does not depend on the count, is completed when a shard is full.
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
        """Complete the last shard. The manifest's entries: file, tokens, documents ending in it, bytes, hash of the tokens."""
        if self._file is not None:
            self._end_shard()
        return self.shards

    def _header(self) -> int:
        self._file.seek(0)
        descr = np.lib.format.dtype_to_descr(self.tokenizer.dtype.newbyteorder("<"))
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": descr, "fortran_order": False, "shape": (self._count,)}
        )
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
    """Tokenize `sources` into the new folder `out` and return its manifest. `val_fraction=0`: all documents are in train.

    Raises `ValueError` for bad input (the message opens with `knob`) and `OSError` when the folder cannot
    be written or `out` is there already, not empty. Whatever happens, no half-made folder remains.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.partial")
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
    writer, unit, start, text_bytes = writers["train"], 0.0, 0, 0
    began = said = time.monotonic()
    for batch in batches(read_sources(sources, text_key, knob)):
        for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
            if piece.key is not None:
                unit = hash_unit(piece.key)
                writer = writers["val" if unit < val_fraction else "train"]
                start = writer.total
            writer.append(ids)
            text_bytes += len(piece.text.encode())
            if piece.last:
                writer.end_document()
                document = Extreme(unit, start, writer.total)
                lowest = document if unit < lowest.unit else lowest
                highest = document if unit > highest.unit else highest
        now = time.monotonic()
        if now - said >= PROGRESS_SECONDS:
            said = now
            tokens = sum(one.total for one in writers.values())
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
    """All documents fell on one side: move one, or the end of a single one, to the other. Tokens are copied, not made again."""
    full = "train" if writers["train"].total else "val"
    total = writers[full].total
    lowest, highest = extremes
    if lowest.unit == highest.unit:  # a single text
        start, stop, target = total - max(1, round(total * val_fraction)), total, "val"
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

DEFAULTS = {"files": "", "out": "", "tokenizer": "bytes", "val_fraction": "0.05", "text_key": "text"}


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """`key=value` arguments over DEFAULTS. Raises `ValueError` for anything else."""
    options = dict(DEFAULTS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in DEFAULTS:
            nearest = difflib.get_close_matches(key, DEFAULTS, n=1, cutoff=0)[0]
            raise ValueError(f"{argument}: no such key; did you mean {nearest}=...? (keys: {', '.join(DEFAULTS)})")
        require(bool(equals and value), f"{argument}: must be {key}=value")
        options[key] = value
    for key in ("files", "out"):
        require(options[key] != "", f"{key}=: must be given, as in files='corpus/*.jsonl' out=data/corpus")
    return options


def run(options: dict[str, str]) -> None:
    """Prepare and print the summary. Raises `ValueError` for a user's mistake."""
    listed = options["files"]
    patterns = [one.strip().strip("'\"") for one in listed[1:-1].split(",")] if listed.startswith("[") else [listed]
    try:
        val_fraction = float(options["val_fraction"])
    except ValueError:
        val_fraction = -1.0
    require(0 <= val_fraction < 1, f"val_fraction={options['val_fraction']}: must be a number, at least 0 and below 1")
    out = Path(options["out"]).expanduser().resolve()
    empty = not out.exists() or out.is_dir() and not any(out.iterdir())
    require(empty, f"out={options['out']}: exists already; give a new folder, or remove it")
    tokenizer = load_tokenizer(options["tokenizer"], "tokenizer")
    files, folders = expand(patterns, "files", to_stderr)
    require(not folders, f"files={listed}: {folders[0] if folders else ''} is prepared already")
    began = time.monotonic()
    manifest = prepare(
        [Source(path) for path in files],
        out,
        tokenizer,
        text_key=options["text_key"],
        val_fraction=val_fraction,
        knob="files",
    )
    seconds = time.monotonic() - began
    counts = {split: sum(shard["tokens"] for shard in shards) for split, shards in manifest["splits"].items()}
    documents = sum(shard["documents"] for shards in manifest["splits"].values() for shard in shards)
    tokens = sum(counts.values())
    print(f"prepared {documents:,} documents, {tokens:,} tokens (train {counts['train']:,}, val {counts['val']:,}), "
          f"{manifest['text_bytes']:,} bytes of text, {tokens / seconds:,.0f} tokens/s, in {out}")  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        run(parse(arguments))
    except (ValueError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
