"""Text to token shards, as a program and for the training program.

    python launch/prepare.py files='corpus/*.jsonl' out=data/corpus [tokenizer=bytes] [val_fraction=0.05] [text_key=text]
                             [processes=0] [max_bad=0]
    python launch/prepare.py verify=data/corpus

`files` is a path, a glob pattern (** reaches into subfolders), a source of the `datasets` library, as in
datasets:allenai/c4?name=en&split=train, or a list of them in brackets: [a.txt,more/*.md]. Text (one document a file), JSONL
and Parquet (one a record), the first two also as .gz and .zst. `tokenizer` is bytes, a Hugging Face tokenizer.json, or bpe:N:
N tokens learnt from the data. `processes=0` takes one for each core.

A prepared folder holds `manifest.json`, `tokenizer.json` (but for bytes) and, for each split (train, val), shards:
one-dimensional npy arrays of token ids. Every document is followed by the tokenizer's separator, which occurs nowhere else, so
documents can be told apart from the tokens alone.

The input is cut into parts of some MB, each prepared by one process into shards of its own, `train-00012-000.npy`, and then
recorded. So tokens and their order do not depend on the number of processes; and the same command, given again after a kill, does
not read again what is recorded, and begins the other parts anew. Until all is done the folder is called `out`.partial.

A record that can't be used is told by file and line, counted in the manifest, and passed over; more than `max_bad` of them end
the work.

Which documents are held out is decided by a hash of their text (its first 2^18 characters), so it depends neither on
order nor on place, and copies of a document fall on the same side. Where that leaves one side empty, the document with
the lowest (highest) hash goes there; a single document is cut in two, its last `val_fraction` held out.

Documents are streamed: memory does not grow with the corpus.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from moesaic.launch import documents
from moesaic.launch.documents import MANIFEST, Log, Slice, Source, batches, expand, identity, read_slice, slices
from moesaic.launch.options import run
from moesaic.launch.token_shards import FORMAT, SHARD_TOKENS, ShardWriter, hash_unit, verify, write_json
from moesaic.launch.tokens import BYTES, Tokenizer, load_tokenizer, train_bpe
from moesaic.moe.config import require

PART_BYTES = 2**24  # of input: what a kill costs at most, per process
MOST_PARTS = 8192
BPE_CHARS = 2**28  # of text that a BPE is learnt from, taken from all parts alike
MOST_BPE = 2**20  # tokens: the library reserves memory for all of them at once, and aborts where there is none
TOLD_BAD = 20  # bad records that are told; the others are counted
PROGRESS_SECONDS = 5.0


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- a part


class Extreme(NamedTuple):
    """The document of lowest or highest hash: its place in its split's tokens of its part."""

    unit: float
    start: int
    stop: int
    part: int


@dataclass(frozen=True)
class Job:
    """All that decides what a part comes to."""

    folder: Path
    parts: list[list[Slice]]
    tokenizer: Tokenizer
    text_key: str
    val_fraction: float
    knob: str
    shard_tokens: int
    max_bad: int

    def shard_name(self, split: str, part: int) -> str:
        return f"{split}-{part:05d}"

    def record(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.json"


def make_parts(sources: Sequence[Source], knob: str) -> list[list[Slice]]:
    """Consecutive slices of the sources, in groups of about PART_BYTES, or more where that makes too many."""
    total = sum(one.size for source in sources for one in slices(source, knob, 2**30))
    size = max(PART_BYTES, total // MOST_PARTS)
    parts: list[list[Slice]] = []
    filled = size
    for source in sources:
        for one in slices(source, knob, size):
            if filled + one.size > size:
                parts.append([])
                filled = 0
            parts[-1].append(one)
            filled += one.size
    return parts


def tokenize_part(job: Job, part: int, tick: Callable[[int, int], bool]) -> dict[str, Any]:
    """Write the shards of a part, and then its record, which is returned: shards by split, bytes of text, its documents of lowest
    and highest hash, bad records. `tick` is told of bytes and tokens, and stops it by returning False.

    Raises `ValueError` past `max_bad` bad records."""
    writers = {
        split: ShardWriter(job.folder, job.shard_name(split, part), job.tokenizer, job.shard_tokens)
        for split in ("train", "val")
    }
    lowest, highest = Extreme(2.0, 0, 0, part), Extreme(-1.0, 0, 0, part)
    separator = np.array([job.tokenizer.separator], job.tokenizer.dtype)
    totals = dict.fromkeys(writers, 0)
    split, unit, start, text_bytes = "train", 0.0, 0, 0
    bad: list[str] = []

    def note(line: str) -> None:
        bad.append(line)
        check_bad(bad, len(bad), job)

    pieces = (piece for one in job.parts[part] for piece in read_slice(one, job.text_key, job.knob, note))
    for batch in batches(pieces):
        arrays: dict[str, list[np.ndarray]] = {name: [] for name in writers}  # one write a batch: documents are short
        size = tokens = 0
        for piece, ids in zip(batch, job.tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
            if piece.key is not None:
                unit = hash_unit(piece.key)
                split = "val" if unit < job.val_fraction else "train"
                start = totals[split]
            arrays[split].append(ids)
            totals[split] += ids.size
            size += len(piece.text.encode())
            tokens += ids.size + piece.last
            if piece.last:
                arrays[split].append(separator)
                totals[split] += 1
                document = Extreme(unit, start, totals[split], part)
                lowest = document if unit < lowest.unit else lowest
                highest = document if unit > highest.unit else highest
        for name, parts in arrays.items():
            if parts:
                writers[name].append(np.concatenate(parts))
        text_bytes += size
        if not tick(size, tokens):
            raise ValueError("stopped")
    result = {"splits": {name: writer.close() for name, writer in writers.items()}, "text_bytes": text_bytes,
              "lowest": lowest, "highest": highest, "bad": len(bad), "told": bad[:TOLD_BAD]}  # fmt: skip
    write_json(job.record(part), result)
    return result


def check_bad(told: Sequence[str], count: int, job: Job) -> None:
    if count > job.max_bad:
        raise ValueError(
            told[-1] + (f"; that makes {count:,} bad records, max_bad={job.max_bad}" if job.max_bad else "")
        )


def recorded(job: Job, part: int) -> dict[str, Any] | None:
    """The record of a part, if it is done and its shards are there."""
    try:
        result = json.loads(job.record(part).read_text())
        shards = [shard for split in result["splits"].values() for shard in split]
        whole = all((job.folder / shard["file"]).stat().st_size == shard["bytes"] for shard in shards)
        return result if whole else None
    except (OSError, ValueError, KeyError):
        return None


# ---------------------------------------------------------------- many parts


class Progress:
    """A bar on a terminal, else a line to `log` every few seconds."""

    def __init__(self, job: Job, log: Log) -> None:
        self.log, self.parts = log, len(job.parts)
        self.sizes = [sum(one.size for one in part) for part in job.parts]
        self.began = self.said = time.monotonic()
        self.done = self.text_bytes = self.tokens = 0
        shown = log is to_stderr and sys.stderr.isatty()
        self.bar = tqdm(total=sum(self.sizes), unit="B", unit_scale=True, disable=not shown)

    def tick(self, text_bytes: int = 0, tokens: int = 0) -> bool:
        self.text_bytes += text_bytes
        self.tokens += tokens
        now = time.monotonic()
        rate = f"{self.tokens:,} tokens, {self.tokens / max(now - self.began, 1e-9):,.0f} tokens/s"
        if not self.bar.disable:
            self.bar.set_postfix_str(rate)
        elif now - self.said >= PROGRESS_SECONDS:
            self.said = now
            self.log(
                f"preparing: {self.done:,} of {self.parts:,} parts, {self.text_bytes / 1e6:,.1f} MB of text, {rate}"
            )
        return True

    def end_part(self, part: int) -> None:
        self.done += 1
        self.bar.update(self.sizes[part])


def tokenize_parts(job: Job, processes: int, log: Log) -> list[dict[str, Any]]:
    """The records of all parts, those that are not there yet made by so many processes."""
    results = [recorded(job, part) for part in range(len(job.parts))]
    progress = Progress(job, log)
    bad, told = 0, 0

    def take(part: int, result: dict[str, Any]) -> None:
        nonlocal bad, told
        results[part] = result
        bad += result["bad"]
        for line in result["told"][: TOLD_BAD - told]:
            log(f"passed over: {line}")
            told += 1
        if result["bad"]:
            check_bad(result["told"], bad, job)
        progress.end_part(part)

    with contextlib.closing(progress.bar):
        for part, result in enumerate(results):
            if result is not None:
                take(part, result)
        todo = [part for part, result in enumerate(results) if result is None]
        if todo and len(todo) < len(results):
            log(f"going on: {len(results) - len(todo):,} of {len(results):,} parts are done")
        for part in todo:
            for old in job.folder.glob(f"*-{part:05d}-*.npy"):
                old.unlink()
        if min(processes, len(todo)) <= 1:
            for part in todo:
                take(part, tokenize_part(job, part, progress.tick))
        else:
            for part, result in in_processes(job, todo, processes, progress):
                take(part, result)
    return results  # type: ignore[return-value]


def in_processes(job: Job, todo: list[int], processes: int, progress: Progress) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not forked: a fork copies the locks of whatever threads tokenizers and Arrow have at that moment.
    context = get_context("spawn")
    text_bytes, tokens, stop = context.Value("q"), context.Value("q"), context.Event()
    start = (job, text_bytes, tokens, stop, os.getpid())
    with ProcessPoolExecutor(min(processes, len(todo)), context, _start_worker, start) as pool:
        try:
            waiting = iter(todo)
            running = {pool.submit(_work, part): part for part in islice(waiting, 2 * processes)}
            while running:
                ended, _ = wait(running, 0.5, FIRST_COMPLETED)
                progress.tick(text_bytes.value - progress.text_bytes, tokens.value - progress.tokens)
                for future in ended:
                    yield running.pop(future), future.result()
                    running |= {pool.submit(_work, part): part for part in islice(waiting, 1)}
        except BrokenProcessPool as error:
            raise ValueError(
                "processes: one was killed, perhaps for want of memory; the same command goes on"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


_worker: Any = None


def _start_worker(job: Job, text_bytes: Any, tokens: Any, stop: Any, parent: int) -> None:
    global _worker
    job = replace(
        job, tokenizer=load_tokenizer(job.tokenizer.spec)
    )  # one that was sent here has forgotten its settings
    documents.end_with(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core

    def tick(more_bytes: int, more_tokens: int) -> bool:
        for total, more in ((text_bytes, more_bytes), (tokens, more_tokens)):
            with total.get_lock():
                total.value += more
        return not stop.is_set()

    _worker = (job, tick)


def _work(part: int) -> dict[str, Any]:
    job, tick = _worker
    return tokenize_part(job, part, tick)


# ---------------------------------------------------------------- the whole


def prepare(
    sources: Sequence[Source],
    out: Path,
    tokenizer: Tokenizer | int,
    *,
    text_key: str = "text",
    val_fraction: float = 0.05,
    knob: str = "data.files",
    log: Log = to_stderr,
    shard_tokens: int = SHARD_TOKENS,
    processes: int = 1,
    max_bad: int = 0,
    resume: bool = False,
) -> dict[str, Any]:
    """Tokenize `sources` into the new folder `out`, return its manifest. `val_fraction=0`: all documents are in train. A number
    as the tokenizer: so many tokens of BPE are learnt first.

    With `resume`, what an earlier call left unfinished in `out`.partial is gone on with; without, nothing half-made remains,
    unless the process is killed. Raises `ValueError` for bad input (the message opens with `knob`) and `OSError` when the folder
    cannot be written or `out` is there already, not empty.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f"{out.name}.partial" + ("" if resume else f"-{uuid.uuid4().hex[:12]}"))
    folder.mkdir(exist_ok=resume)
    with contextlib.ExitStack() as stack:
        if resume:
            stack.enter_context(alone_in(folder))
            stack.callback(remove_if_begun, folder)
        else:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        who = tokenizer.digest if isinstance(tokenizer, Tokenizer) else f"bpe:{tokenizer}"
        decides = [FORMAT, who, text_key, val_fraction, shard_tokens, [identity(source, knob) for source in sources]]
        check_plan(folder, hashlib.sha256(json.dumps(decides).encode()).hexdigest())
        if not (folder / MANIFEST).exists():
            parts = make_parts(sources, knob)
            tokenizer = keep_tokenizer(folder, tokenizer, parts, text_key, knob, max_bad, log)
            job = Job(folder, parts, tokenizer, text_key, val_fraction, knob, shard_tokens, max_bad)
            results = tokenize_parts(job, processes, log)
            require(any(shard["tokens"] for one in results for split in one["splits"].values() for shard in split),
                    f"{knob}={sources[0].path}: holds no text, nor does any other file")  # fmt: skip
            splits = joined(job, results)
            write_json(folder / MANIFEST, {
                "format": FORMAT,
                "tokenizer": {
                    "spec": BYTES if tokenizer.backend is None else str(out / "tokenizer.json"),
                    "hash": tokenizer.digest,
                    "vocab_size": tokenizer.vocab_size,
                    "separator": tokenizer.separator,
                },
                "dtype": tokenizer.dtype.name,
                "text_bytes": sum(one["text_bytes"] for one in results),
                "val_fraction": val_fraction,
                "text_key": text_key,
                "splits": splits,
                "sources": [described(source, parts) for source in sources],
                "bad": {"records": sum(one["bad"] for one in results),
                        "told": [line for one in results for line in one["told"]][:TOLD_BAD]},
            })  # fmt: skip
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        keep = {MANIFEST, "tokenizer.json", *(one["file"] for split in manifest["splits"].values() for one in split)}
        for path in folder.iterdir():
            if path.name not in keep:
                path.unlink()
        os.rename(folder, out)  # fails where another process has put a folder meanwhile
    return manifest


def described(source: Source, parts: list[list[Slice]]) -> dict[str, Any]:
    if isinstance(source.path, Path):
        return {"path": str(source.path), "bytes": source.path.stat().st_size}
    return {"path": source.path, "bytes": sum(one.size for part in parts for one in part if one.source == source)}


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raises `ValueError` while another process is at work in `folder`."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"out: {folder} is being written by another process") from error
    finally:
        os.close(held)


def remove_if_begun(folder: Path) -> None:
    """Remove a folder in which nothing is done yet that another call could use."""
    if folder.exists() and not any(folder.glob("part-*.json")) and not (folder / MANIFEST).exists():
        shutil.rmtree(folder, ignore_errors=True)


def check_plan(folder: Path, decides: str) -> None:
    plan = folder / "plan.json"
    if plan.exists():
        require(json.loads(plan.read_text()) == decides, f"out: {folder} holds the beginning of another preparation: files, "
                "tokenizer or options are not those it began with; remove it")  # fmt: skip
    else:
        write_json(plan, decides)


def keep_tokenizer(
    folder: Path, tokenizer: Tokenizer | int, parts: list[list[Slice]], text_key: str, knob: str, max_bad: int, log: Log
) -> Tokenizer:
    """The tokenizer as the prepared folder will carry it; learnt from the beginning of every part where it is a number."""
    path = folder / "tokenizer.json"
    if isinstance(tokenizer, Tokenizer):
        if tokenizer.backend is not None:
            shutil.copyfile(tokenizer.spec, path)
            return load_tokenizer(str(path))
        return tokenizer
    if not path.exists():
        began = time.monotonic()
        bad: list[str] = []

        def texts() -> Iterator[str]:
            for part in parts:
                left = BPE_CHARS // len(parts)
                for piece in (piece for one in part for piece in read_slice(one, text_key, knob, bad.append)):
                    yield piece.text[:left]
                    left -= len(piece.text)
                    if left <= 0:
                        break

        log(f"learning {tokenizer:,} tokens from up to {BPE_CHARS / 1e6:,.0f} million characters")
        train_bpe(texts(), tokenizer, path)
        log(f"learnt in {time.monotonic() - began:.0f} s")
    return load_tokenizer(str(path))


def joined(job: Job, results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The shards of all parts, by split. Where a split has none, a document of the other one becomes its own."""
    splits = {split: [shard for one in results for shard in one["splits"][split]] for split in ("train", "val")}
    if job.val_fraction == 0 or all(splits.values()):
        return splits
    lowest = min((Extreme(*one["lowest"]) for one in results), key=lambda document: document.unit)
    highest = max((Extreme(*one["highest"]) for one in results), key=lambda document: document.unit)
    full = "train" if splits["train"] else "val"
    total = sum(shard["tokens"] for shard in results[lowest.part]["splits"][full])
    if lowest.unit == highest.unit and sum(shard["documents"] for shard in splits[full]) == 1:
        cut = total - min(max(1, round(total * job.val_fraction)), total - 1)
        document, target = lowest._replace(start=cut, stop=total), "val"
    else:
        document, target = (lowest, "val") if full == "train" else (highest, "train")
    moved = move_document(job, results[document.part]["splits"][full], document, target)
    other = "train" if target == "val" else "val"
    splits[full] = [shard for one in results[: document.part] for shard in one["splits"][full]]
    splits[full] += moved[other] + [shard for one in results[document.part + 1 :] for shard in one["splits"][full]]
    splits[target] = moved[target]
    return splits


def move_document(job: Job, shards: list[dict[str, Any]], document: Extreme, target: str) -> dict[str, list[Any]]:
    """The tokens of `shards` written again, those of the document to `target`, the others to the other split."""
    writers = {
        split: ShardWriter(job.folder, f"{job.shard_name(split, document.part)}-moved", job.tokenizer, job.shard_tokens)
        for split in ("train", "val")
    }
    other = "train" if target == "val" else "val"
    offset = 0
    for shard in shards:
        tokens = np.load(job.folder / shard["file"], mmap_mode="r").view(np.ndarray)
        first, last = (min(max(edge - offset, 0), tokens.size) for edge in (document.start, document.stop))
        for begin, end, split in ((0, first, other), (first, last, target), (last, tokens.size, other)):
            for at in range(begin, end, documents.BATCH_CHARS):
                writers[split].append(tokens[at : min(at + documents.BATCH_CHARS, end)])
        offset += tokens.size
    for writer in writers.values():
        writer.end_document()
    return {split: writer.close() for split, writer in writers.items()}


# ---------------------------------------------------------------- the program


@dataclass
class Options:
    """What the program takes; the module's docstring explains."""

    files: str = ""
    out: str = ""
    tokenizer: str = "bytes"
    val_fraction: float = 0.05
    text_key: str = "text"
    processes: int = 0
    max_bad: int = 0
    verify: str = ""


def counts(manifest: dict[str, Any]) -> str:
    train, val = (sum(shard["tokens"] for shard in manifest["splits"][split]) for split in ("train", "val"))
    number = sum(shard["documents"] for shards in manifest["splits"].values() for shard in shards)
    return f"{number:,} documents, {train + val:,} tokens (train {train:,}, val {val:,})"


def main(options: Options) -> None:
    """Prepare and print a summary. Raises `ValueError`."""
    if options.verify:
        require(
            not options.files and not options.out, f"verify={options.verify}: must stand alone, without files or out"
        )
        print(f"{options.verify}: whole, {counts(verify(Path(options.verify).expanduser(), 'verify'))}")
        return
    for name in ("files", "out"):
        require(getattr(options, name) != "", f"{name}=: must be given, as in files='corpus/*.jsonl' out=data/corpus")
    require(0 <= options.val_fraction < 1, f"val_fraction={options.val_fraction}: must be at least 0 and below 1")
    for name in ("processes", "max_bad"):
        require(getattr(options, name) >= 0, f"{name}={getattr(options, name)}: must not be negative")
    out = Path(options.out).expanduser().resolve()
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    require(free, f"out={options.out}: exists already; must be a new or an empty folder")
    listed = options.files
    patterns = [one.strip() for one in listed[1:-1].split(",")] if listed.startswith("[") else [listed]
    files, folders = expand(patterns, "files", to_stderr)
    require(not folders, f"files={listed}: {folders[0] if folders else ''} is prepared already")
    began = time.monotonic()
    tokenizer = chosen_tokenizer(options.tokenizer)
    try:
        manifest = prepare(
            [Source(path) for path in files], out, tokenizer, knob="files", text_key=options.text_key,
            val_fraction=options.val_fraction, processes=options.processes or os.cpu_count() or 1, max_bad=options.max_bad,
            resume=True,
        )  # fmt: skip
    except OSError as error:
        told = error.strerror or error
        raise ValueError(f"out={options.out}: cannot be written ({told}); the same command goes on") from error
    bad = manifest["bad"]["records"]
    print(f"prepared {counts(manifest)}, {manifest['text_bytes']:,} bytes of text, "
          f"{f'{bad:,} bad records passed over, ' if bad else ''}{time.monotonic() - began:.1f} s, in {out}")  # fmt: skip


def chosen_tokenizer(spec: str) -> Tokenizer | int:
    """What `tokenizer=` names; of bpe:N the number."""
    if not spec.startswith("bpe:"):
        return load_tokenizer(spec, "tokenizer")
    size = spec.removeprefix("bpe:")
    fits = size.isdecimal() and 256 + 1 < int(size) <= MOST_BPE
    require(fits, f"tokenizer={spec}: must be bpe: and a number above 257, at most {MOST_BPE}")
    return int(size)


if __name__ == "__main__":
    run(main, Options, __doc__)
