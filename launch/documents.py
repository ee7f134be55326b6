"""Documents out of text, JSONL, Parquet, compressed files and whatever the `datasets` library reads, in slices.

A source is a file, or `datasets:PATH?name=en&split=train&data_files=a,b`, what datasets.load_dataset (or load_from_disk) is
given. One text file is one document; so is one record of the others, its field `text_key`.
"""

import ctypes
import glob
import gzip
import io
import json
import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from moesaic.moe.config import require

MANIFEST = "manifest.json"
PIECE_CHARS = 2**18  # a longer document is tokenized in pieces
BATCH_CHARS = 2**22  # text tokenized at once; with PIECE_CHARS it bounds memory
SET = "datasets:"
SET_OPTIONS = ("name", "split", "data_files", "data_dir", "revision")
JSONL, PARQUET, COMPRESSED = (".jsonl", ".ndjson"), (".parquet",), (".gz", ".zst")
TO_THE_END = 2**62

Log = Callable[[str], None]
BadRecord = Callable[[str], None]  # takes the line that says where a record is, and what is wrong with it


class Source(NamedTuple):
    """A file, or the text of a `datasets:` source. `key`: what its split is decided by (None: by the text of each document)."""

    path: Path | str
    key: str | None = None


class Slice(NamedTuple):
    """What is read at once of a source: bytes start..stop-1 of JSONL (the lines that begin there), row groups of Parquet, rows of
    `datasets`; of the others all. `size`: about the bytes of text in it."""

    source: Source
    start: int
    stop: int
    size: int


class Piece(NamedTuple):
    """A part of a document. `key` decides the split and comes with the first part only."""

    text: str
    key: str | None
    last: bool


def end_with(parent: int) -> None:
    """Ask the system to kill this process when `parent` dies (Linux). moesaic.parallel has the same for ranks, and torch."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------- finding documents


def expand(patterns: Sequence[str], knob: str, log: Log) -> tuple[list[Path | str], list[Path]]:
    """The files and `datasets:` sources, and the prepared folders, that paths and glob patterns name; each once, sorted within a
    pattern.

    Raises `ValueError` for a path that does not exist, a pattern that matches no file, and an empty file; but empty
    files among others that match a pattern (every Python package has some) are skipped, and the log says so.
    """
    files: dict[Path | str, None] = {}
    folders: dict[Path, None] = {}
    for pattern in patterns:
        require(pattern != "", f"{knob}=: must name a file, a pattern or a datasets: source")
        if pattern.startswith(SET):
            files[pattern] = None
            continue
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


def kind_of(path: Path) -> str:
    """The suffix that says what is in a file, without that of its compression."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def identity(source: Source, knob: str) -> list[Any]:
    """What changes when the source does: size and time of a file, the fingerprint that `datasets` gives. Raises ValueError."""
    if isinstance(source.path, str):
        found = load_set(source.path, knob)
        return [source.path, source.key, len(found), found._fingerprint]
    try:
        stat = source.path.stat()
    except OSError as error:
        raise ValueError(f"{knob}={source.path}: cannot be read ({error.strerror})") from error
    return [str(source.path), source.key, stat.st_size, stat.st_mtime_ns]


def slices(source: Source, knob: str, size: int) -> Iterator[Slice]:
    """`source` in slices of about `size` bytes, where its kind can be cut."""
    if isinstance(source.path, str):
        found = load_set(source.path, knob)
        rows = max(1, len(found) * size // max(1, found.data.nbytes))
        for start in range(0, len(found), rows):
            stop = min(start + rows, len(found))
            yield Slice(source, start, stop, found.data.nbytes * (stop - start) // len(found))
    elif kind_of(source.path) in PARQUET:
        with open_parquet(source.path, f"{knob}={source.path}") as file:
            for group in range(file.metadata.num_row_groups):
                yield Slice(source, group, group + 1, file.metadata.row_group(group).total_byte_size)
    else:
        total = source.path.stat().st_size
        if source.path.suffix in JSONL:
            for start in range(0, total, size):
                yield Slice(source, start, min(start + size, total), min(size, total - start))
        else:
            yield Slice(source, 0, TO_THE_END, total * (4 if source.path.suffix in COMPRESSED else 1))


def optional(module: str, where: str) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise ValueError(f"{where}: needs {module.partition('.')[0]}; pip install 'moesaic[data]'") from error


def load_set(spec: str, knob: str, streaming: bool = False) -> Any:
    """The split that a `datasets:` source names. Raises ValueError for whatever the library does not like."""
    where = f"{knob}={spec}"
    datasets = optional("datasets", where)
    path, _, query = spec.removeprefix(SET).partition("?")
    options: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
    unknown = [name for name in options if name not in SET_OPTIONS]
    require(path != "", f"{where}: must name what to load, as in datasets:json?data_files=a.jsonl&split=train")
    require(not unknown, f"{where}: {', '.join(unknown)}: unknown, must be one of {', '.join(SET_OPTIONS)}")
    if "data_files" in options:
        options["data_files"] = options["data_files"].split(",")
    datasets.disable_progress_bars()
    try:
        if (Path(path).expanduser() / "state.json").is_file():  # of Dataset.save_to_disk
            found = datasets.load_from_disk(str(Path(path).expanduser()))
            return found.to_iterable_dataset() if streaming else found
        found = datasets.load_dataset(path, streaming=streaming, **options)
    except Exception as error:  # of any kind: it may run into whatever files and networks do
        told = [
            f"{type(one).__name__}: {one}" for one in (error, error.__cause__) if one
        ]  # often only the cause says what
        raise ValueError(f"{where}: {' '.join('; '.join(told).split())[:400]}") from error
    if isinstance(found, dict):
        raise ValueError(f"{where}: must choose a split, with ?split={'|'.join(found)}")
    return found


# ---------------------------------------------------------------- reading them


def open_bytes(path: Path, where: str) -> io.BufferedIOBase:
    """The bytes of a file, decompressed, all members or frames of it."""
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        # Not `zstandard`, whose reader takes a file that was cut short for a whole one.
        return io.BufferedReader(optional("pyarrow", where).input_stream(str(path), compression="zstd"))
    return path.open("rb")


def open_parquet(path: Path, where: str) -> Any:
    parquet = optional("pyarrow.parquet", where)
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # Arrow's own are ValueErrors
        raise ValueError(f"{where}: not a Parquet file ({' '.join(str(error).split())})") from error


def read_text(path: Path, where: str) -> Iterator[str]:
    """The text of a UTF-8 file in blocks, byte for byte (line ends are kept) but for a byte-order mark.

    Raises `ValueError`, opening with `where`, at the first byte that is NUL or no UTF-8.
    """
    offset, pending = 0, b""
    with open_bytes(path, where) as file:
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


def read_jsonl(one: Slice, text_key: str, where: str, text_key_knob: str, bad: BadRecord) -> Iterator[str]:
    """The text of each record that begins in a slice of a JSONL file; blank lines are passed over. Lines that are no JSON object,
    or whose `text_key` is missing or no string, go to `bad`, named by file and line."""
    path = Path(one.source.path)
    with open_bytes(path, where) as file:
        if one.start:
            file.seek(one.start - 1)
            file.readline()
        first = at = file.tell() if one.start else 0
        number = 0

        def line() -> int:
            return number + lines_before(path, first)  # read again, but only where there is something to tell

        while at < one.stop and (raw := file.readline()):
            number += 1
            text = raw.removeprefix(b"\xef\xbb\xbf") if at == 0 else raw
            at += len(raw)
            if not text.strip():
                continue
            try:
                record = json.loads(text.decode())
            except (ValueError, RecursionError) as error:  # ValueError: of JSON and of UTF-8
                what = f"byte {error.start} is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
                last = "" if file.peek(1) else "; this is the last line, the file may be truncated"  # type: ignore[attr-defined]
                bad(f"{where}:{line()}: not valid JSON ({what}){last}")
                continue
            if isinstance(record, dict):
                yield from checked(record, text_key, lambda: f"{path}:{line()}", text_key_knob, bad)
            else:
                bad(f"{where}:{line()}: must be a JSON object, not {str(record)[:40]!r}")


def lines_before(path: Path, offset: int) -> int:
    count = 0
    with path.open("rb") as file:
        while offset > 0 and (block := file.read(min(2**20, offset))):
            count += block.count(b"\n")
            offset -= len(block)
    return count


def checked(
    record: dict[str, Any], text_key: str, at: Callable[[], str], text_key_knob: str, bad: BadRecord
) -> Iterator[str]:
    """The text of a record, if it has one."""
    if text_key not in record:
        bad(f"{text_key_knob}={text_key}: {at()} has no such field, only {', '.join(record)[:200] or 'none'}")
    elif not isinstance(record[text_key], str):
        bad(f"{text_key_knob}={text_key}: must be a string, {at()} has {str(record[text_key])[:40]!r}")
    else:
        text = record[text_key]
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can write half a surrogate pair, and text from the web does
            text = text.encode("utf-8", "replace").decode()
        yield text


def read_columns(one: Slice, text_key: str, knob: str, text_key_knob: str, bad: BadRecord) -> Iterator[str]:
    """The texts of a slice of a Parquet file or a `datasets:` source. Rows, counted from 1, whose text is none go to `bad`."""
    path = one.source.path
    if isinstance(path, str):
        found = load_set(path, knob)
        fields, first = found.column_names, one.start
        require_field(text_key, fields, str(path), text_key_knob)
        part = found.select(range(one.start, one.stop)).select_columns([text_key]).with_format("arrow")
        batches: Iterable[Any] = (batch[text_key] for batch in part.iter(1024))
    else:
        file = open_parquet(path, f"{knob}={path}")
        fields = file.schema_arrow.names
        first = sum(file.metadata.row_group(group).num_rows for group in range(one.start))
        require_field(text_key, fields, str(path), text_key_knob)
        rows = file.iter_batches(1024, row_groups=range(one.start, one.stop), columns=[text_key])
        batches = (batch.column(0) for batch in rows)
    row = first
    for column in batches:
        for value in column:
            row += 1
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:  # Arrow does not look
                bad(f"{knob}={path}: row {row}: byte {error.start} is not UTF-8")
            else:
                place = f"{path} row {row}".__str__
                yield from checked({text_key: text}, text_key, place, text_key_knob, bad)


def require_field(text_key: str, fields: Sequence[str], at: str, text_key_knob: str) -> None:
    require(text_key in fields, f"{text_key_knob}={text_key}: {at} has no such field, only {', '.join(fields)[:200]}")


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


def split_document(parts: Iterable[str], key: str | None) -> Iterator[Piece]:
    """One document, given in parts, as pieces of at most PIECE_CHARS characters; none when it is empty."""
    rest, first = "", True
    for part in parts:
        rest += part
        while len(rest) > PIECE_CHARS:
            at = cut(rest)
            yield Piece(rest[:at], (key or rest[:PIECE_CHARS]) if first else None, False)
            rest, first = rest[at:], False
    if rest:
        yield Piece(rest, (key or rest) if first else None, True)


def read_slice(one: Slice, text_key: str, knob: str, bad: BadRecord) -> Iterator[Piece]:
    """Every document of a slice, in order. What can't be used of it goes to `bad`; a source that is wrong as a whole, such as a
    Parquet file without the field, raises `ValueError`."""
    path, key = one.source
    where, text_key_knob = f"{knob}={path}", f"{knob[: knob.rfind('.') + 1]}text_key"
    seen = 0
    whole = one.start == 0 and (isinstance(path, str) or one.stop in (TO_THE_END, path.stat().st_size))

    def note(line: str) -> None:
        nonlocal seen
        seen += 1
        bad(line)

    try:
        if isinstance(path, Path) and kind_of(path) not in JSONL + PARQUET:
            for _ in read_text(path, where):  # to its end, before anything of it is written
                pass
            documents: Iterable[Iterable[str]] = [read_text(path, where)]
        elif isinstance(path, Path) and kind_of(path) in JSONL:
            documents = map(blocks, read_jsonl(one, text_key, where, text_key_knob, note))
        else:
            documents = map(blocks, read_columns(one, text_key, knob, text_key_knob, note))
        for document in documents:
            seen += 1
            yield from split_document(document, key)
        if whole and not seen:
            bad(f"{where}: is empty, it holds no text")
    except (OSError, EOFError, zlib.error) as error:
        told = error.strerror if isinstance(error, OSError) and error.strerror else f"{error}, after {seen:,} records"
        bad(f"{where}: cannot be read ({told})")
    except ValueError as error:
        if isinstance(path, Path) and kind_of(path) not in JSONL + PARQUET:
            bad(str(error))
        else:
            raise


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
