"""Checkpoints on disk: which are kept, which count, what is in them, how they are written and read."""

import contextlib
import io
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import hypothesis
import numpy as np
import pytest
import torch
import torch.distributed as dist
import xxhash
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from moesaic.moe.model import build
from moesaic.parallel import checkpoint, manifest, shards, storage
from tests.parallel.checkpoints import CONFIG, flip, names, newest, save, started, state_of, train
from tests.parallel.parity import CPU, pools
from tests.parallel.pool import Pool

pytestmark = pytest.mark.xdist_group("checkpoint")  # one process of pytest, so that ranks start once


@pytest.fixture(scope="module")
def pool() -> Iterator[Callable[[int], Pool]]:
    with pools() as pool:
        yield pool


def test_only_the_newest_are_kept_and_only_complete_ones_count(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert checkpoint.complete_checkpoints(root) == [] and newest(root) == (None, [])
    pool(1).run(save, root, [1, 2, 3, 12, 12], 2)  # the last one again, as after a resume from an earlier checkpoint
    assert names(root) == ["step_00000003", "step_00000012"]
    (root / "step_00000030").mkdir()  # no manifest
    shutil.copy(root / "step_00000012" / "shard_00000.safetensors", root / "step_00000030")
    (root / "notes").mkdir()
    assert [Path(p).name for p in checkpoint.complete_checkpoints(root)] == ["step_00000003", "step_00000012"]
    found, (line,) = newest(root)
    assert found == "step_00000012" and "step_00000030 is not used" in line and "there is no manifest.json" in line
    checkpoint.remove_leftovers(root)
    assert names(root) == ["notes", "step_00000003", "step_00000012"]
    # A resume from step 3 left the future that held step 12.
    pool(1).run(save, root, [5], 2)
    assert names(root) == ["notes", "step_00000003", "step_00000005"]


def test_a_step_saved_again_by_fewer_ranks_leaves_nothing_of_the_first(
    pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    pool(2).run(save, tmp_path, [7])
    assert names(tmp_path / "step_00000007") == ["manifest.json", "shard_00000.safetensors", "shard_00001.safetensors"]
    pool(1).run(save, tmp_path, [7])
    assert names(tmp_path / "step_00000007") == ["manifest.json", "shard_00000.safetensors"]


def drawn_before_and_after(root: Path) -> tuple[Tensor, Tensor]:
    """What this rank draws next after a save, and after a load of it by an engine that has drawn other numbers."""
    torch.manual_seed(100 + dist.get_rank())
    checkpoint.Saver(root, 9, background=False).save(1, started(), {})
    expected = torch.rand(3)
    torch.manual_seed(5)
    checkpoint.load(checkpoint.step_folder(root, 1), started())
    return expected, torch.rand(3)


def test_each_rank_goes_on_with_its_own_random_numbers(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    (one, one_again), (other, other_again) = pool(2).run(drawn_before_and_after, tmp_path)
    assert torch.equal(one, one_again) and torch.equal(other, other_again) and not torch.equal(one, other)


# ---------------------------------------------------------------- what is in the files


LAYOUTS = [(1, {}), (2, dict(expert=2)), (4, dict(replicate=2)), (4, dict(expert=2, replicate=4)), (4, dict(expert=2))]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_files_hold_each_value_once_and_ranks_write_equal_shares(
    pool: Callable[[int], Pool], tmp_path: Path, world: int, layout: dict[str, int]
) -> None:
    """Read with the safetensors library, put together by the names of the pieces alone."""
    ((state,), *others) = pool(world).run(save_one, tmp_path, layout)
    assert all(set(other[0]) == set(state) for other in others)
    path = tmp_path / "step_00000003"
    files = {f: load_file(path / f) for f in names(path) if f.endswith(".safetensors")}
    assert len(files) == world
    values = {name: torch.full_like(t, torch.nan) for name, t in state.items()}
    for pieces in files.values():
        for key, piece in pieces.items():
            name, _, offsets = key.partition("@")
            if name in values:
                begin = [int(o) for o in offsets.split(",")] if offsets else [0] * piece.ndim
                box = tuple(slice(o, o + n) for o, n in zip(begin, piece.shape, strict=True))
                assert values[name][box].isnan().all(), f"{key} is there twice"
                values[name][box] = piece
    for name, value in state.items():
        assert torch.equal(values[name], value), name
    sizes = [sum(p.nbytes for k, p in pieces.items() if not k.startswith("rng")) for pieces in files.values()]
    largest = max(p.nbytes for pieces in files.values() for p in pieces.values())
    assert sum(sizes) == sum(t.nbytes for t in state.values()) + 4  # and AdamW's count of steps
    assert max(sizes) - min(sizes) <= largest
    assert {f"rng.{rank}" for rank in range(world)} <= {k for pieces in files.values() for k in pieces}


def save_one(root: Path, layout: dict[str, int]) -> list[dict[str, Tensor]]:
    return save(root, [3], **layout)


def test_one_process_reads_what_many_wrote(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    state = pool(4).run(save_one, tmp_path, dict(expert=2))[0][0]
    path = tmp_path / "step_00000003"
    assert checkpoint.read_state(path) == {"step": 3}
    model = build(CONFIG, 5, CPU)
    checkpoint.load_model(path, model)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(value, state[f"model.{name}"]), name
    one = {"norm.weight": torch.zeros(24)}
    checkpoint.load_tensors(path, one)
    assert torch.equal(one["norm.weight"], state["model.norm.weight"])
    with pytest.raises(
        ValueError, match=r"step_00000003: tensor model.norm.weight: has shape \[24\], in this model \[25\]"
    ):
        checkpoint.load_tensors(path, {"norm.weight": torch.zeros(25)})


@hypothesis.given(st.data())
def test_any_box_of_a_piece_is_read_right(data: st.DataObject) -> None:
    """Against numpy's slicing, with blocks so small that every way of reading is taken."""
    shape = data.draw(st.lists(st.integers(1, 7), max_size=4))

    def box() -> tuple[list[int], list[int]]:
        begin = [data.draw(st.integers(0, n - 1)) for n in shape]
        return begin, [data.draw(st.integers(1, n - b)) for n, b in zip(shape, begin, strict=True)]

    dtype = data.draw(st.sampled_from(["F32", "BF16", "U8", "I64"]))
    whole = torch.randint(0, 250, shape).to(shards.DTYPES[dtype])
    piece = shards.Piece("t", dtype, tuple(shape), *map(tuple, box()))
    wanted = shards.Piece("t", dtype, tuple(shape), *map(tuple, box()))
    values = whole[tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))]
    out = torch.zeros([*wanted.sizes[:-1], wanted.sizes[-1] + 1] if shape else [], dtype=whole.dtype)
    out = (
        out[..., : wanted.sizes[-1]]
        if shape and data.draw(st.booleans())
        else torch.zeros(wanted.sizes, dtype=out.dtype)
    )
    before = data.draw(st.integers(0, 30))
    content = b"x" * before + bytes(shards.bytes_of(values)) + b"y" * data.draw(st.integers(0, 30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BLOCK", data.draw(st.sampled_from([8, 24, 64, 1000])))
        block = data.draw(st.integers(1, 50))
        sums = [xxhash.xxh3_64_hexdigest(content[i : i + block]) for i in range(0, len(content), block)]
        with memory_file(content) as path, shards.VerifiedFile(path, len(content), sums, block) as file:
            if shards.meet(piece, wanted):
                shards.fill(file, before, piece, wanted, out)
    expected = torch.full(shape, 0, dtype=whole.dtype)
    inside = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))
    expected[inside] = whole[inside]
    assert torch.equal(out, expected[tuple(slice(o, o + n) for o, n in zip(wanted.offsets, wanted.sizes, strict=True))])


class memory_file:
    """A file of fsspec's memory."""

    def __init__(self, content: bytes) -> None:
        self.path = "memory://box"
        with storage.writer(self.path) as file:
            file.write(content)

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *error: object) -> None:
        storage.remove_folder(self.path, "")


@hypothesis.given(st.data())
def test_pieces_that_overlap_or_leave_a_gap_are_found(data: st.DataObject) -> None:
    """Against counting every value."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    pieces = [((0,) * len(shape), shape)]
    for _ in range(data.draw(st.integers(0, 5))):  # cut one in two
        offsets, sizes = pieces.pop(data.draw(st.integers(0, len(pieces) - 1)))
        d = data.draw(st.integers(0, len(shape) - 1))
        cut = data.draw(st.integers(0, sizes[d]))
        pieces += [(offsets, (*sizes[:d], cut, *sizes[d + 1 :]))] if cut else []
        if cut < sizes[d]:
            offsets = (*offsets[:d], offsets[d] + cut, *offsets[d + 1 :])
            pieces += [(offsets, (*sizes[:d], sizes[d] - cut, *sizes[d + 1 :]))]
    if data.draw(st.booleans()):  # and move one
        offsets, sizes = pieces.pop()
        pieces.append((tuple(data.draw(st.integers(0, n)) for n in shape), sizes))
    count = np.zeros([2 * n for n in shape], int)
    for offsets, sizes in pieces:
        count[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] += 1
    inside = count[tuple(slice(0, n) for n in shape)]
    good = (inside == 1).all() and count.sum() == inside.sum()
    try:
        manifest._check_cover("t", shape, [manifest.Placed(0, 0, o, s) for o, s in pieces])
        found = True
    except ValueError:
        found = False
    assert found == good


# ---------------------------------------------------------------- saving while training goes on


def save_behind(root: Path) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Two saves whose writing is held up: what was to be saved, and what was seen."""
    engine = started(expert=2)
    saver = checkpoint.Saver(root, keep=9)
    gate, write, seen = threading.Event(), shards.write, {}
    in_flight: list[int] = []

    def slow(*arguments: Any) -> Any:
        in_flight.append(threading.active_count())
        assert gate.wait(60)
        return write(*arguments)

    shards.write = slow  # type: ignore[assignment]
    try:
        train(engine, 0, 1)
        states = [state_of(engine)]
        saver.save(1, engine, {})
        train(engine, 1, 4)  # collectives, and weights that change, while the save waits
        seen["complete while held up"] = checkpoint.complete_checkpoints(root)
        threading.Timer(0.3, gate.set).start()
        states.append(state_of(engine))
        saver.save(4, engine, {})
        seen["complete when the next begins"] = checkpoint.complete_checkpoints(root)
        train(engine, 4, 5)
        saver.finish()
    finally:
        shards.write = write
    seen["threads"] = saver.thread is None
    return states, seen


def test_training_goes_on_beside_a_save_and_two_never_overlap(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    results = pool(2).run(save_behind, tmp_path)
    for _, seen in results:
        assert seen["complete while held up"] == [] and seen["threads"]
        assert seen["complete when the next begins"][:1] == [str(tmp_path / "step_00000001")]
    for step, state in zip((1, 4), results[0][0], strict=True):
        assert_holds(tmp_path / f"step_{step:08d}", state)


def assert_holds(path: Path | str, state: dict[str, Tensor]) -> None:
    read = {name: torch.zeros_like(value) for name, value in state.items()}
    checkpoint.read_into(checkpoint.read_manifest(path), read)
    for name, value in state.items():
        assert torch.equal(read[name], value), name


def full_disk(root: Path, on_error: str, background: bool) -> dict[str, Any]:
    """Save, save where the disk is full for rank 1, save again where it is not."""
    engine = started()
    train(engine, 0, 1)
    saver = checkpoint.Saver(root, 1, background, on_error)
    saver.save(1, engine, {}, wait=True)
    make_folder, raised = storage.make_folder, []

    def make_full_folder(folder: str) -> None:
        make_folder(folder)
        Path(folder, "shard_00001.safetensors").symlink_to("/dev/full")

    storage.make_folder = make_full_folder  # type: ignore[assignment]
    try:
        for wait in (False, True):
            try:
                saver.save(2, engine, {}, wait)
                saver.finish()
            except checkpoint.SaveError as error:
                raised.append((wait, str(error)))
    finally:
        storage.make_folder = make_folder
    left = names(root)
    train(engine, 1, 2)
    saver.save(3, engine, {})
    saver.finish()
    return {"raised": raised, "left": left, "at the end": names(root)}


@pytest.mark.parametrize("on_error", ["continue", "stop"])
@pytest.mark.parametrize("background", [True, False])
def test_a_write_that_fails_loses_nothing(
    pool: Callable[[int], Pool], tmp_path: Path, on_error: str, background: bool
) -> None:
    """The operating system refuses a rank's file. Training goes on unless asked; the last save of a run raises in any case."""
    results = pool(2).run(full_disk, tmp_path, on_error, background)
    assert results[0] == results[1]
    assert results[0]["left"] == ["step_00000001"] and results[0]["at the end"] == ["step_00000003"]
    assert [wait for wait, _ in results[0]["raised"]] == ([False, True] if on_error == "stop" else [True])
    line = results[0]["raised"][-1][1]
    for word in ("the checkpoint of step 2 was not written: rank 1: ", "No space left on device", "step_00000001"):
        assert word in line
    told = (Path(pool(2).folder.name) / str(pool(2).starts) / "output0").read_text()
    assert f"error: {line}" in told


def test_memory_for_the_copy_is_locked_once_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU needs, with a stand-in for its driver."""
    calls: list[tuple[Any, ...]] = []

    class Driver:
        def cudaHostRegister(self, *arguments: int) -> int:
            calls.append(("lock", *arguments))
            return 0

        def cudaHostUnregister(self, *arguments: int) -> None:
            calls.append(("free", *arguments))

    monkeypatch.setattr(torch.cuda, "cudart", Driver)
    host = torch.zeros(100, dtype=torch.uint8)
    address = host.data_ptr()
    checkpoint.pin(host)
    assert calls == [("lock", address, 100, 0)]
    del host
    assert calls[1:] == [("free", address)]


# ---------------------------------------------------------------- not on a file system


class ObjectStore(fsspec.AbstractFileSystem):
    """objects:///path: a store as S3 is one, kept in files. There are no folders and no renaming; an object is there when its
    writing ends."""

    protocol = "objects"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("objects://").rstrip("/")

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        place = Path(self._strip_protocol(path))
        found = sorted(place.iterdir()) if place.is_dir() else [place]
        if not place.exists():
            raise FileNotFoundError(path)
        kinds = {True: "directory", False: "file"}
        entries = [{"name": str(p), "size": p.stat().st_size, "type": kinds[p.is_dir()]} for p in found]
        return entries if detail else [e["name"] for e in entries]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        if mode == "rb":
            return open(path, "rb")

        class Written(io.BytesIO):
            def close(self) -> None:
                if not self.closed:
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
                    Path(path).write_bytes(self.getvalue())
                super().close()

        return Written()

    def rm_file(self, path: str) -> None:
        if Path(path).is_file():
            Path(path).unlink()
        elif not Path(path).exists():
            raise FileNotFoundError(path)
        with contextlib.suppress(OSError):
            Path(path).rmdir() if Path(path).is_dir() else Path(path).parent.rmdir()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def mv(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError

    mkdir = move = rename = mv


def save_objects(root: str) -> tuple[str | None, list[str], bool]:
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
    states = save(root, [1, 2, 5], keep=2, background=True, expert=2)  # type: ignore[arg-type]
    engine = started(expert=1, seed=5)
    lines: list[str] = []
    path = checkpoint.newest(root, lines.append)
    assert path
    checkpoint.load(path, engine)
    loaded = state_of(engine)
    return path, lines, all(torch.equal(loaded[name], value) for name, value in states[-1].items())


def test_an_object_store(pool: Callable[[int], Pool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"objects://{tmp_path}/run"
    assert pool(2).run(save_objects, root) == [(f"{root}/step_00000005", [], True)] * 2
    assert names(tmp_path / "run") == ["step_00000002", "step_00000005"]
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
    assert [Path(p).name for p in checkpoint.complete_checkpoints(root)] == ["step_00000002", "step_00000005"]
    flip(tmp_path / "run" / "step_00000005" / "shard_00001.safetensors", 5000)
    found, (line,) = newest(root)  # type: ignore[arg-type]
    assert found == "step_00000002" and f"{root}/step_00000005/shard_00001.safetensors: bytes" in line
    model = build(CONFIG, 5, CPU)
    checkpoint.load_model(f"{root}/step_00000002", model)
    (tmp_path / "run" / "step_00000005" / "manifest.json").unlink()
    checkpoint.remove_leftovers(root)
    assert names(tmp_path / "run") == ["step_00000002"]


@pytest.mark.parametrize(("url", "words"), [("nowhere://a", "Protocol not known: nowhere"), ("gs://a/b", "gcsfs")])
def test_a_url_that_cannot_be_opened(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{url}: .*{words}"):
        storage.check_root(url)
