"""What is refused: damaged checkpoints, of which each byte matters, hostile ones, and those of another model."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.model import build
from moesaic.parallel import checkpoint, manifest
from tests.parallel.checkpoints import CONFIG, flip, newest, save, started, state_of, train
from tests.parallel.parity import CPU, pools
from tests.parallel.pool import Pool

pytestmark = pytest.mark.xdist_group("checkpoint")  # one process of pytest, so that ranks start once


@pytest.fixture(scope="module")
def pool() -> Iterator[Callable[[int], Pool]]:
    with pools() as pool:
        yield pool


# ---------------------------------------------------------------- corruption


@pytest.fixture(scope="module")
def two_steps(
    pool: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Tensor]]]:
    """Checkpoints of two ranks, and what they hold."""
    root = tmp_path_factory.mktemp("two_steps")
    return root, pool(2).run(save, root, [20, 30], 9)[0]


@pytest.fixture
def root(two_steps: tuple[Path, Any], tmp_path: Path) -> Path:
    shutil.copytree(two_steps[0], tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def assert_refused(root: Path, file: str) -> None:
    """The newest is not used, the line says which of its files is wrong, and the one before is used."""
    found, lines = newest(root)
    assert found == "step_00000020" and len(lines) == 1, lines
    assert f"step_00000030/{file}: " in lines[0] and "\n" not in lines[0], lines


def test_each_region_of_each_file(root: Path) -> None:
    path = root / "step_00000030"
    regions: list[tuple[Path, int, int]] = []
    for file in sorted(path.glob("*.safetensors")):
        end = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8:end])
        pieces = [(file, *(end + at for at in entry["data_offsets"])) for key, entry in header.items() if key[0] != "_"]
        regions += [(file, 0, 8), (file, 8, end), (file, end - 1, end), *pieces]
        assert pieces[-1][2] == file.stat().st_size
    assert len(regions) > 80
    for file, begin, end in regions:
        for at in (begin, end - 1, random.randrange(begin, end)):
            before = file.read_bytes()
            flip(file, at)
            assert_refused(root, file.name)
            file.write_bytes(before)
    assert newest(root) == ("step_00000030", [])


def test_each_byte_of_the_manifest(root: Path) -> None:
    file = root / "step_00000030" / "manifest.json"
    whole_file = file.read_bytes()
    first_line = whole_file.index(b"\n") + 1
    for at in [*range(first_line), *random.sample(range(first_line, len(whole_file)), 150), len(whole_file) - 1]:
        flip(file, at)
        assert_refused(root, "manifest.json")
        file.write_bytes(whole_file)


def test_files_cut_lost_emptied_and_exchanged(root: Path, tmp_path: Path) -> None:
    path = root / "step_00000030"
    shard, other = "shard_00000.safetensors", "shard_00001.safetensors"
    shutil.copytree(path, tmp_path / "good")

    def damaged(work: Callable[[Path], object], file: str = shard) -> None:
        work(path / file)
        assert_refused(root, file)
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "good", path)

    for file in (shard, other, "manifest.json"):
        size = (path / file).stat().st_size
        for kept in (0, 1, size // 2, size - 1):
            damaged(lambda p, kept=kept: p.write_bytes(p.read_bytes()[:kept]), file)
        damaged(lambda p: p.write_bytes(p.read_bytes() + b" "), file)
        damaged(lambda p: shutil.copy(root / "step_00000020" / p.name, p), file)
        damaged(lambda p: (p.unlink(), p.mkdir()), file)
        damaged(lambda p: (p.unlink(), os.mkfifo(p)), file)
        damaged(lambda p: (shutil.move(p, tmp_path / "elsewhere"), p.symlink_to(tmp_path / "elsewhere")), file)
    for file in (shard, other):
        damaged(lambda p: p.unlink(), file)
        damaged(lambda p: shutil.copy(path / (other if p.name == shard else shard), p), file)

    (path / "manifest.json").unlink()
    found, (line,) = newest(root)
    assert found == "step_00000020" and "step_00000030 is not used: " in line and "there is no manifest.json" in line
    shutil.rmtree(path)
    shutil.copytree(root / "step_00000020", path)  # whole, but of another step
    assert_refused(root, "manifest.json")
    shutil.rmtree(path)
    path.write_text("a file")
    assert newest(root)[0] == "step_00000020"


def test_nothing_whole_is_no_new_start(root: Path) -> None:
    for step in (20, 30):
        flip(root / f"step_000000{step}" / "shard_00001.safetensors", 9)
    with pytest.raises(ValueError, match="no checkpoint is whole, of step_00000030, step_00000020"):
        newest(root)


def find_and_load(root: Path) -> tuple[str | None, list[str], dict[str, Tensor]]:
    engine = started(expert=2, seed=7)
    lines: list[str] = []
    path = checkpoint.newest(root, lines.append)
    assert path
    checkpoint.load(path, engine)
    return path, lines, state_of(engine)


def test_all_ranks_agree_on_the_previous_one(
    pool: Callable[[int], Pool], root: Path, two_steps: tuple[Path, list[dict[str, Tensor]]]
) -> None:
    """Whichever rank reads the damage: the first block of the first file, and the last of the last."""
    before = root.with_name("before")
    shutil.copytree(root, before)
    for file, at in (("shard_00000.safetensors", 3), ("shard_00001.safetensors", -1)):
        damaged = root / "step_00000030" / file
        flip(damaged, at % damaged.stat().st_size)
        found = pool(2).run(find_and_load, root)
        for path, lines, state in found:
            assert path == str(root / "step_00000020") and lines == found[0][1]
            assert file in lines[0] and len(lines) == 1
            assert all(torch.equal(state[name], value) for name, value in two_steps[1][0].items())
        shutil.rmtree(root)
        shutil.copytree(before, root)


def load_damaged(path: Path) -> tuple[str, bool]:
    engine = started(seed=7)
    try:
        checkpoint.load(path, engine)
    except checkpoint.CorruptError as error:
        return str(error), True
    return "", False


def test_load_itself_verifies_what_it_reads(pool: Callable[[int], Pool], root: Path) -> None:
    """On all ranks, also where one alone reads the damage."""
    file = root / "step_00000030" / "shard_00000.safetensors"
    flip(file, file.stat().st_size // 2)
    for message, refused in pool(2).run(load_damaged, root / "step_00000030"):
        assert refused and "shard_00000.safetensors: bytes" in message and "do not have their checksum" in message


# ---------------------------------------------------------------- who wants to deceive


def resigned(path: Path, change: Callable[[dict[str, Any]], object], version: str = "1") -> None:
    """Change a manifest and give it the checksum of what it says then."""
    values = json.loads((path / "manifest.json").read_text())
    change(values)
    rest = json.dumps({k: v for k, v in values.items() if k not in ("format", "checksum")})[1:].encode()
    (path / "manifest.json").write_bytes(manifest._first_line(version, rest) + rest)


def piece(values: dict[str, Any], name: str = "model.norm.weight", n: int = 0) -> list[Any]:
    return values["tensors"][name]["pieces"][n]


HOSTILE: list[tuple[str, Callable[[dict[str, Any]], object]]] = [
    *((f"file {name!r}", lambda v, name=name: v["files"][0].update(name=name)) for name in (
        "../step_00000020/shard_00000.safetensors", "/etc/passwd", "a/shard_00000.safetensors", "..", "", "file:///etc/passwd",
        "shard_00000.safetensors\n", "shard_00000.safetensors/../x", None, 3, ["shard_00000.safetensors"])),
    ("file twice", lambda v: v["files"][1].update(name=v["files"][0]["name"])),
    ("negative size", lambda v: v["files"][0].update(size=-1)),
    ("huge size", lambda v: v["files"][0].update(size=10**30)),
    ("larger than it is", lambda v: v["files"][0].update(size=v["files"][0]["size"] + 4)),
    ("no checksums", lambda v: v["files"][0].update(checksums=[])),
    ("checksum of bytes", lambda v: v["files"][0].update(checksums=[1])),
    ("no block", lambda v: v.update(block=0)),
    ("huge block", lambda v: v.update(block=2**40)),
    ("true block", lambda v: v.update(block=True)),
    ("pickled type", lambda v: v["tensors"]["model.norm.weight"].update(dtype="pickle")),
    ("bytes entry", lambda v: v["tensors"]["model.norm.weight"].update(dtype="BYTES", shape=[])),
    ("listed type", lambda v: v["tensors"]["model.norm.weight"].update(dtype=["F32"])),
    ("other type", lambda v: v["tensors"]["model.norm.weight"].update(dtype="F64")),
    ("negative offset", lambda v: piece(v)[2].__setitem__(0, -1)),
    ("fraction", lambda v: piece(v)[3].__setitem__(0, 0.5)),
    ("oversized piece", lambda v: piece(v)[3].__setitem__(0, 10**9)),
    ("overlapping pieces", lambda v: piece(v, n=1)[2].__setitem__(0, 0)),
    ("overlapping bytes", lambda v: piece(v, n=0).__setitem__(1, piece(v, "model.blocks.0.ffn_norm.weight")[1])),
    ("before the file", lambda v: piece(v).__setitem__(1, 0)),
    ("no such file", lambda v: piece(v).__setitem__(0, 99)),
    ("missing piece", lambda v: v["tensors"]["model.norm.weight"]["pieces"].pop()),
    ("a piece of more dimensions", lambda v: (piece(v)[2].append(0), piece(v)[3].append(1))),
    ("many dimensions", lambda v: v["tensors"]["model.norm.weight"].update(shape=[1] * 100)),
    ("huge shape", lambda v: v["tensors"]["model.norm.weight"].update(shape=[2**70])),
    ("no pieces", lambda v: v["tensors"]["model.norm.weight"].update(pieces=None)),
    ("no tensors", lambda v: v.pop("tensors")),
    ("tensors in a list", lambda v: v.update(tensors=[1])),
    ("no state", lambda v: v.update(state="x")),
    ("other step", lambda v: v.update(step=31)),
    ("deep offsets", lambda v: piece(v)[2].__setitem__(0, [[[1]]])),
]  # fmt: skip


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in HOSTILE])
def test_a_manifest_that_lies_is_refused(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    resigned(root / "step_00000030", lambda values: None)
    assert newest(root)[0] == "step_00000030", "the test's own signature"
    resigned(root / "step_00000030", change)
    found, lines = newest(root)
    assert found == "step_00000020" and len(lines) == 1 and "\n" not in lines[0], lines


def test_a_huge_or_deep_manifest_is_not_parsed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "step_00000030" / "manifest.json"
    for rest in (b"[" * 200_000, b'"step": ' + b"9" * 10_000 + b"}"):
        path.write_bytes(manifest._first_line("1", rest) + rest)
        assert_refused(root, "manifest.json")
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no room on disk
    assert_refused(root, "manifest.json")


def test_an_unknown_version_is_told_and_nothing_older_is_taken(root: Path) -> None:
    resigned(root / "step_00000030", lambda values: None, version="2")
    with pytest.raises(checkpoint.FormatError, match="manifest.json: has format 2, this version reads 1"):
        newest(root)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("disguised", [False, True])
def test_a_pickle_is_never_opened(root: Path, tmp_path: Path, disguised: bool) -> None:
    """A folder of torch.distributed.checkpoint whose pickles would make a file; also with a manifest beside them, and in the
    place of a shard."""
    victim, path = tmp_path / "victim", root / "step_00000030"
    bomb = pickle.dumps(Bomb(victim))
    (path / ".metadata").write_bytes(bomb)
    (path / "__0_0.distcp").write_bytes(bomb)
    if disguised:
        (path / "shard_00000.safetensors").write_bytes(bomb)
        assert_refused(root, "shard_00000.safetensors")
    else:
        (path / "manifest.json").unlink()
        model = build(CONFIG, 5, CPU)
        for read in (newest, lambda _: checkpoint.read_state(path), lambda _: checkpoint.load_model(path, model)):
            with pytest.raises(
                checkpoint.FormatError, match=r"is a checkpoint of torch\.distributed\.checkpoint.*not read"
            ):
                read(root)
        checkpoint.remove_leftovers(root)
        assert path.exists(), "somebody's data"
    assert not victim.exists()
    pickle.loads(bomb).close()
    assert victim.exists(), "the bomb is one"


# ---------------------------------------------------------------- another model


def load_other(path: Path, change: dict[str, Any]) -> tuple[str, bool, bool]:
    """The refusal; whether weights and moments stayed as they were, of an engine that trained and of a new one."""
    config = ModelConfig(**(dict(vocab_size=61, d_model=24, n_layers=2, n_heads=2, n_experts=4, d_expert=12,
                                 tie_embeddings=True, router=RouterConfig(top_k=2)) | change))  # fmt: skip
    engine, fresh = started(config=config), started(config=config)
    train(engine, 0, 1)
    untouched, message = [], ""
    for one in (engine, fresh):
        before = state_of(one)
        with pytest.raises(ValueError) as error:
            checkpoint.load(path, one)
        message, after = str(error.value), state_of(one)
        untouched.append(
            before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        )
    return message, untouched[0], untouched[1]


@pytest.mark.parametrize(("change", "line"), [
    (dict(d_expert=16), "tensor model.blocks.0.ffn.experts.w_up_EGD: has shape [4, 24, 24], in this model [4, 32, 24] (and 3 "),
    (dict(n_layers=3), "tensor model.blocks.2."),
    (dict(n_layers=1), "is not in this model"),
    (dict(tie_embeddings=False), "tensor model.head.weight: is not in it, and this model has one of shape [61, 24]"),
])  # fmt: skip
def test_another_model_is_refused_before_anything_is_touched(
    pool: Callable[[int], Pool], root: Path, change: dict[str, Any], line: str
) -> None:
    for message, trained, new in pool(2).run(load_other, root / "step_00000030", change):
        assert trained and new
        assert line in message
        assert "\n" not in message
