"""What a run reads beyond one stream of shards: mixtures of sources, sets that are streamed, and a thread that reads ahead.

All give sample number n as a function of the seed and n alone, on any number of ranks: the samples read stay the whole position
of a run.
"""

import hashlib
import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from moesaic.launch.batches import micro_batches
from moesaic.launch.documents import load_set
from moesaic.launch.schema import TrainConfig
from moesaic.launch.tokens import Tokenizer
from moesaic.moe.config import require
from moesaic.parallel.apply import greatest, total

TURN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
WORLD = 2**64
LANES = 64
BOOKMARK_EVERY, BOOKMARKS = 256, 64  # windows of a lane between two, and how many are kept
AHEAD = 4  # micro-batches


class Source(Protocol):
    """Sequences by number. `windows`: how many until they come again (0: not known)."""

    windows: int
    seq_len: int

    def rows(self, seed: int, index: np.ndarray) -> np.ndarray: ...

    def marks(self) -> list[str]: ...


# ---------------------------------------------------------------- mixtures


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """The sum of floor((a * i + b) / m) for i in 0..n-1, all not negative, in O(log m): Euclid's algorithm on the lattice points
    below the line."""
    total = 0
    while True:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        above = a * n + b
        if above < m:
            return total
        n, b = divmod(above, m)
        m, a = a, m


class Mixture:
    """Sources in the proportions of `weights`.

    Sample g is the point (offset + g / golden ratio) mod 1, and belongs to the source whose part of the unit interval, as wide as
    its weight, holds it: of any run of samples, every source has its share but for one or two (points of this sequence are spread
    as evenly as can be: Weyl, Kronecker). How many of the samples before g a source has had is a sum of floors, known at once. So
    it is also known which of the source's own sequences comes next, and nothing needs to be remembered.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float], sources: Sequence[Source]) -> None:
        self.names, self.weights, self.sources = tuple(names), tuple(weights), tuple(sources)
        self.windows = max(source.windows for source in sources)
        shares = np.cumsum([weight / sum(weights) for weight in weights])
        self.edges = [0, *(int(share * WORLD) for share in shares[:-1].tolist()), WORLD]

    def taken(self, seed: int, samples: int) -> list[int]:
        """How many of the first `samples` samples are of each source."""
        below = [self._below(seed, samples, edge) for edge in self.edges]
        return [b - a for a, b in zip(below, below[1:], strict=False)]

    def _below(self, seed: int, samples: int, edge: int) -> int:
        if edge == 0 or samples == 0:
            return 0
        at = self._offset(seed)
        return floor_sum(samples, WORLD, TURN, at) - floor_sum(samples, WORLD, TURN, at + WORLD - edge) + samples

    def _offset(self, seed: int) -> int:
        return int.from_bytes(hashlib.blake2b(f"mixture {seed}".encode(), digest_size=8).digest(), "big")

    def deal(self, seed: int, first: int, count: int) -> np.ndarray:
        """The source, int64 (count,), of each of the samples first .. first + count - 1."""
        begin = np.uint64((self._offset(seed) + first * TURN) % WORLD)
        points = begin + np.arange(count, dtype=np.uint64) * np.uint64(TURN)  # modulo 2^64 by itself
        return np.searchsorted(np.array(self.edges[1:-1], np.uint64), points, side="right").astype(np.int64)

    def batch(self, seed: int, first: int, count: int) -> np.ndarray:
        out = np.empty((count, self.sources[0].seq_len + 1), np.int64)
        dealt = self.deal(seed, first, count)
        for number, taken in enumerate(self.taken(seed, first)):
            here = dealt == number
            out[here] = self.sources[number].rows(seed, taken + np.arange(np.count_nonzero(here), dtype=np.int64))
        return out

    def marks(self) -> list[str]:
        return [f"{w} {mark}" for w, source in zip(self.weights, self.sources, strict=True) for mark in source.marks()]


# ---------------------------------------------------------------- streaming


class SetStream:
    """The texts of a `datasets:` source, tokenized while they are read and never written.

    The set is read in `lanes`, as many as it has files, at most 64; a lane's documents, one after another with a separator
    behind each, are one stream, and sequence i is window i // lanes of lane i % lanes, in the set's own order and from the
    beginning again at its end. A lane is read by whoever needs it, up to where he needs it. Bookmarks in `cache` say where in the
    set some windows begin, so that a resumed run need not read all that came before; they follow from the set, and without them
    it only takes longer.

    `passed_over`: of each lane, how many records without a text were met on the way from its beginning to where it is read now.
    """

    windows = 0

    def __init__(self, spec: str, knob: str, tokenizer: Tokenizer, text_key: str, seq_len: int, cache: str) -> None:
        self.spec, self.knob, self.tokenizer, self.text_key, self.seq_len = spec, knob, tokenizer, text_key, seq_len
        found = load_set(spec, knob, streaming=True)
        columns = found.column_names or list(next(iter(found), {}))
        require(text_key in columns, f"data.text_key={text_key}: {spec} has no such field, only {', '.join(columns)}")
        self.lanes = min(LANES, found.num_shards)
        self._set = found.select_columns([text_key])
        self._readers: dict[int, Lane] = {}
        self.passed_over = [0] * self.lanes
        name = hashlib.sha256("\n".join([*self.marks(), str(seq_len)]).encode()).hexdigest()[:20]
        self.cache = Path(cache).expanduser() / f"stream-{name}"

    def marks(self) -> list[str]:
        return [f"{self.spec} {self.text_key} {self.lanes} {self.tokenizer.digest}"]

    def part(self, lane: int) -> Any:
        """A lane from its beginning. A new one for each pass: one whose state was set begins there again."""
        return self._set.shard(self.lanes, lane)

    def rows(self, seed: int, index: np.ndarray) -> np.ndarray:
        out = np.empty((len(index), self.seq_len + 1), np.int64)
        for row, i in zip(out, index.tolist(), strict=True):
            window, lane = divmod(i, self.lanes)
            if lane not in self._readers or self._readers[lane].next > window:
                self._readers[lane] = Lane(self, lane, window)
            row[:] = self._readers[lane].read(window)
        return out


class Lane:
    """The windows of one lane from the newest bookmark at or before `window` on. `next`: the first that is still to come."""

    def __init__(self, stream: SetStream, lane: int, window: int) -> None:
        self.stream, self.lane, self.bookmarks = stream, lane, stream.cache / f"{lane:05d}"
        self.part = stream.part(lane)
        self.next, self.tokens, state = 0, np.empty(0, np.int64), None
        stream.passed_over[lane] = 0
        for at in sorted((n for n in self._kept() if n <= window), reverse=True):
            try:
                mark = json.loads((self.bookmarks / f"{at}.json").read_text())
                self.next, self.tokens, state = at, np.array(mark["tokens"], np.int64), mark["state"]
                stream.passed_over[lane] = int(mark["passed_over"])
                break
            except (
                OSError,
                ValueError,
                KeyError,
                TypeError,
            ):  # half written, or pruned meanwhile: an earlier one, or none
                continue
        self.texts = self._texts(state)

    def _kept(self) -> list[int]:
        return [int(path.stem) for path in self.bookmarks.glob("*.json") if path.stem.isdecimal()]

    def _texts(self, state: Any) -> Iterator[str]:
        if state is not None:
            self.part.load_state_dict(state)
        resumed = state is not None
        while True:
            found = False
            for record in self.part:
                text = record[self.stream.text_key]
                if not isinstance(text, str):  # what prepare.py counts as bad
                    self.stream.passed_over[self.lane] += 1
                elif text:
                    found = True
                    yield text.encode("utf-8", "replace").decode()
            require(found or resumed, f"{self.stream.knob}={self.stream.spec}: a part of it holds no text")
            resumed = False
            self.part = self.stream.part(self.lane)

    def read(self, window: int) -> np.ndarray:
        size = self.stream.seq_len
        while True:
            if self.next % BOOKMARK_EVERY == 0 and self.next:
                self._bookmark()
            parts, total = [self.tokens], self.tokens.size
            while total <= size:
                ids = self.stream.tokenizer.encode(next(self.texts)).astype(np.int64)
                parts += [ids, np.array([self.stream.tokenizer.separator], np.int64)]
                total += ids.size + 1
            tokens = np.concatenate(parts)
            self.tokens = tokens[size:]
            self.next += 1
            if self.next > window:
                return tokens[: size + 1]

    def _bookmark(self) -> None:
        path = self.bookmarks / f"{self.next}.json"
        if path.exists():
            return
        try:
            self.bookmarks.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{threading.get_ident()}-{time.time_ns()}")
            passed_over = self.stream.passed_over[self.lane]
            mark = {"tokens": self.tokens.tolist(), "state": self.part.state_dict(), "passed_over": passed_over}
            partial.write_text(json.dumps(mark))
            partial.rename(path)
            for old in sorted(self._kept())[:-BOOKMARKS]:
                (self.bookmarks / f"{old}.json").unlink(missing_ok=True)
        except OSError:  # a full disk: the next resume takes longer
            return


# ---------------------------------------------------------------- reading ahead


class Ahead:
    """Reads the batches of a rank in a thread, AHEAD of them before they are asked for, and measures both sides.

    waited   seconds in which the loop stood still for want of data
    busy     seconds in which the thread read
    tokens   that it read
    """

    def __init__(self, read: Any, first: int, step: int, shares: Sequence[tuple[int, int]]) -> None:
        """read(first, count) gives a batch; `shares` are the (first, count) of one optimizer step, which takes `step` samples."""
        self._read, self._first, self._step, self._shares = read, first, step, shares
        self._ready: queue.Queue[Any] = queue.Queue(AHEAD)
        self._ended = threading.Event()
        self.waited = self.busy = 0.0
        self.tokens = 0
        _reading.append(self)
        self._thread = threading.Thread(target=self._run, name="data", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            for offset, count in self._shares:
                begin = time.perf_counter()
                try:
                    item: Any = self._read(self._first + offset, count)
                    self.tokens += item[:, 1:].size
                except Exception as error:  # told where the batch is asked for
                    item = error
                self.busy += time.perf_counter() - begin
                while not self._ended.is_set():
                    try:
                        self._ready.put((self._first + offset, count, item), timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if self._ended.is_set() or isinstance(item, Exception):
                    return
            self._first += self._step

    def batch(self, first: int, count: int) -> np.ndarray:
        """The next batch, which must be the one of `count` samples from `first` on. Raises what reading it raised."""
        begin = time.perf_counter()
        at, size, item = self._ready.get()
        self.waited += time.perf_counter() - begin
        if isinstance(item, Exception):
            raise item
        assert (at, size) == (first, count), "batches are taken in the order they are read"
        return item

    def lap(self) -> tuple[float, float, int]:
        """waited, busy and tokens since the last lap."""
        result = self.waited, self.busy, self.tokens
        self.waited, self.busy, self.tokens = 0.0, 0.0, 0
        return result

    def close(self) -> None:
        self._ended.set()
        self._thread.join(5)


_reading: list[Ahead] = []


def end_reading() -> None:
    """Close all that is open, also where a run ended with an error."""
    while _reading:
        _reading.pop().close()


def data_figures(
    ahead: Ahead, stream: Any, config: TrainConfig, samples: int, my_losses_B: torch.Tensor, seconds: float, rank: int,
    world: int,
) -> dict[str, Any]:  # fmt: skip
    """Of the reading since the last record: the share of `seconds` in which the rank that waited most stood still for data, and
    the tokens/s that all ranks read at when they do. Of streamed sets, the records without a text that were passed over up to
    where they are read. Of a mixture, the tokens of each source up to now, and its mean cross entropy, nats a token, in the step
    that ended with `samples`: a source that had no sequence in it has none. Collective.

    my_losses_B: of each of this rank's sequences of that step, in order, the sum of its cross entropies."""
    device, names = my_losses_B.device, stream.names if isinstance(stream, Mixture) else ()
    sums = torch.zeros(world + 1 + 2 * len(names), dtype=torch.float64, device=device)
    waited, busy, tokens = ahead.lap()
    sums[rank], sums[world] = waited, tokens / max(busy, 1e-9)
    if names:
        first = samples - config.global_batch + micro_batches(config.global_batch, config, rank, world)[0][0]
        dealt_B = torch.from_numpy(stream.deal(config.seed, first, len(my_losses_B))).to(device)
        mine = torch.stack([my_losses_B.double(), torch.full_like(my_losses_B, config.seq_len, dtype=torch.float64)], 1)
        sums[world + 1 :].view(-1, 2).index_add_(0, dealt_B, mine)
    *waits_W, rate = (found := total(sums).tolist())[: world + 1]
    figures = {"data/wait": max(waits_W) / seconds, "data/tokens_per_s": rate}
    sources = stream.sources if isinstance(stream, Mixture) else (stream,)
    lanes = [count for one in sources if isinstance(one, SetStream) for count in one.passed_over]
    if lanes:  # of each lane by the rank that has read furthest
        figures["data/passed_over"] = int(greatest(torch.tensor(lanes, device=device)).sum())
    for i, (name, taken) in enumerate(zip(names, stream.taken(config.seed, samples) if names else (), strict=True)):
        loss, counted = found[world + 1 + 2 * i :][:2]
        figures |= {f"data/{name}/loss": loss / counted} if counted else {}
        figures[f"data/{name}/tokens"] = taken * config.seq_len
    return figures
