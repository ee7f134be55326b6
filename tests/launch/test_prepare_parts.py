"""Preparation in parts: every kind of input, several processes, kills, bad records, a tokenizer learnt from the data."""

import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.launch import prepare as prepare_module
from moesaic.launch.data import open_data
from moesaic.launch.documents import Source
from moesaic.launch.prepare import Options, main, prepare
from moesaic.launch.schema import DataConfig
from moesaic.launch.token_shards import hash_unit, verify
from moesaic.launch.tokens import load_tokenizer
from tests.launch.launches import ROOT
from tests.launch.test_prepare import documents, write_jsonl

BYTES = load_tokenizer("bytes")


def some_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = "router expert dispatch Zürich 漢字 combine\n token".split(" ")
    return [f"{i}: " + " ".join(rng.choices(words, k=rng.randrange(1, 30))) for i in range(count)]


def tokens_of(folder: Path) -> dict[str, list[int]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {
        split: [token for one in shards for token in np.load(folder / one["file"]).tolist()]
        for split, shards in manifest["splits"].items()
    }


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "PART_BYTES", 1500)


def as_file(folder: Path, kind: str, texts: list[str]) -> Path | str:
    """The same documents in one of the kinds, compressed ones as two members or frames."""
    path = write_jsonl(folder / "texts.jsonl", texts)
    lines = path.read_bytes().splitlines(keepends=True)
    halves = [b"".join(lines[:20]), b"".join(lines[20:])]
    if kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)))
        return folder / "a.jsonl.gz"
    pa = pytest.importorskip("pyarrow")
    if kind == "jsonl.zst":
        (folder / "a.jsonl.zst").write_bytes(b"".join(pa.compress(half, "zstd", asbytes=True) for half in halves))
        return folder / "a.jsonl.zst"
    if kind == "parquet":
        import pyarrow.parquet

        table = pa.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=17)
        return folder / "a.parquet"
    datasets = pytest.importorskip("datasets")
    if kind == "saved":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "saved")
        return f"datasets:{folder}/saved"
    return f"datasets:json?data_files={path}&split=train"


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "saved", "datasets"])
def test_every_kind_gives_the_same_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: None, kind: str
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    texts = some_texts(100)
    manifest = prepare([Source(as_file(tmp_path, kind, texts))], tmp_path / "out", BYTES, val_fraction=0.2)
    assert documents(tmp_path / "out", "train") == [text for text in texts if hash_unit(text) >= 0.2]
    assert documents(tmp_path / "out", "val") == [text for text in texts if hash_unit(text) < 0.2]
    assert manifest["bad"]["records"] == 0
    parts = {one["file"].split("-")[1] for one in manifest["splits"]["train"]}
    assert len(parts) == 1 if kind.startswith("jsonl.") else len(parts) > 3


def test_tokens_do_not_depend_on_the_number_of_processes(tmp_path: Path, small_parts: None) -> None:
    files = [write_jsonl(tmp_path / f"{i}.jsonl", some_texts(60, i)) for i in range(2)]
    (tmp_path / "c.txt").write_text("a text " * 400)
    sources = [Source(path) for path in [*files, tmp_path / "c.txt"]]
    for processes in (1, 2):
        prepare(sources, tmp_path / f"out{processes}", BYTES, processes=processes)
    manifests = [json.loads((tmp_path / f"out{n}" / "manifest.json").read_text()) for n in (1, 2)]
    assert manifests[0] == manifests[1] and len(manifests[0]["splits"]["train"]) > 5
    assert tokens_of(tmp_path / "out1") == tokens_of(tmp_path / "out2")
    whole = [text for i in range(2) for text in some_texts(60, i)] + ["a text " * 400]
    assert sorted(documents(tmp_path / "out1", "train") + documents(tmp_path / "out1", "val")) == sorted(whole)


def test_lines_that_begin_in_a_part_are_read_there_whatever_its_edges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = some_texts(7)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    size = path.stat().st_size
    for part in [11, 37, size - 1, size]:  # shorter than a line, too: some parts hold nothing
        monkeypatch.setattr(prepare_module, "PART_BYTES", part)
        prepare([Source(path)], tmp_path / f"out{part}", BYTES, val_fraction=0)
        assert documents(tmp_path / f"out{part}", "train") == texts


# ---------------------------------------------------------------- kills

SLOWED = """
import sys, time
from moesaic.launch import documents, options, prepare
prepare.PART_BYTES = 1500
documents.BATCH_CHARS = 500
real = prepare.batches
def slow(pieces):
    for batch in real(pieces):
        time.sleep(0.01)
        yield batch
prepare.batches = slow
if __name__ == "__main__":
    options.run(prepare.main, prepare.Options, "")
"""


def test_killed_at_any_moment_no_document_is_lost_or_doubled(tmp_path: Path) -> None:
    """SIGKILL again and again; at last it ends, and has never written anew what was recorded."""
    texts = some_texts(150)
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "slowed.py").write_text(SLOWED)
    command = [sys.executable, "slowed.py", "files=a.jsonl", "out=out", "val_fraction=0.2", "processes=2"]
    kills, written = 0, {}
    for attempt in range(40):
        process = subprocess.Popen(
            command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        before = len(list(tmp_path.glob("out.partial/part-*.json")))
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() < begun + 60:
            recorded = len(list(tmp_path.glob("out.partial/part-*.json")))
            if attempt < 4 and recorded >= before + 1 + attempt % 2:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        output = process.communicate()
        folder = tmp_path / ("out" if (tmp_path / "out").exists() else "out.partial")
        for path in folder.glob("*.npy"):
            if (tmp_path / f"out.partial/part-{path.name.split('-')[1]}.json").exists() or folder.name == "out":
                assert written.setdefault(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
    assert kills >= 2 and "going on: " in output[1], output
    assert documents(tmp_path / "out", "train") == [text for text in texts if hash_unit(text) >= 0.2]
    assert documents(tmp_path / "out", "val") == [text for text in texts if hash_unit(text) < 0.2]
    assert not (tmp_path / "out.partial").exists()
    manifest = verify(tmp_path / "out", "verify")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        ["manifest.json", *(one["file"] for split in manifest["splits"].values() for one in split)]
    )


def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """A preparation that ends in its third part."""
    real = prepare_module.tokenize_part

    def fails(job: Any, part: int, tick: Any) -> Any:
        if part == 3:
            raise KeyboardInterrupt
        return real(job, part, tick)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "tokenize_part", fails)
        with pytest.raises(KeyboardInterrupt):
            main(Options(files=f"{tmp_path}/a.jsonl", out=f"{tmp_path}/out", processes=1, **options))


def test_a_folder_begun_with_other_input_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    texts = some_texts(60)
    write_jsonl(tmp_path / "a.jsonl", texts)
    begun(tmp_path, monkeypatch)
    assert len(list((tmp_path / "out.partial").glob("part-*.json"))) == 3
    with pytest.raises(ValueError, match=r"out: .*out\.partial holds the beginning of another preparation"):
        main(Options(files=f"{tmp_path}/a.jsonl", out=f"{tmp_path}/out", val_fraction=0.2))
    with (
        prepare_module.alone_in(tmp_path / "out.partial"),
        pytest.raises(ValueError, match="is being written by another process"),
    ):
        main(Options(files=f"{tmp_path}/a.jsonl", out=f"{tmp_path}/out"))
    shard = next((tmp_path / "out.partial").glob("train-00001-*.npy"))
    shard.write_bytes(shard.read_bytes()[:-2])  # as a power cut may leave it: done again
    main(Options(files=f"{tmp_path}/a.jsonl", out=f"{tmp_path}/out"))
    assert sorted(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")) == sorted(texts)


# ---------------------------------------------------------------- bad records


def test_bad_records_are_told_by_line_counted_and_end_it_past_a_limit(
    tmp_path: Path, small_parts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = some_texts(60)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    lines = path.read_text().splitlines(keepends=True)
    lines[4], lines[33], lines[59] = '{"text": \n', '{"id": 1}\n', '{"text": 5}\n'
    path.write_text("".join(lines))
    (tmp_path / "z.txt").write_bytes(b"some text " * 300 + b"\xff")
    files = f"[{path}, {tmp_path}/z.txt]"
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        main(Options(files=files, out=str(out), max_bad=4, processes=processes))
        printed = capsys.readouterr()
        for told in (f"{path}:5: not valid JSON", f"{path}:34 has no such field, only id", f"{path}:60 has '5'",
                     f"{tmp_path}/z.txt: not a UTF-8 text file, byte 3000"):  # fmt: skip
            assert f"{told}" in printed.err
        assert "4 bad records passed over" in printed.out
        assert json.loads((out / "manifest.json").read_text())["bad"]["records"] == 4
        rest = [text for i, text in enumerate(texts) if i not in (4, 33, 59)]
        assert sorted(documents(out, "train") + documents(out, "val")) == sorted(rest)
    with pytest.raises(ValueError, match="; that makes [34] bad records, max_bad=2$"):
        main(Options(files=files, out=f"{tmp_path}/more", max_bad=2, processes=1))
    main(
        Options(files=files, out=f"{tmp_path}/more", max_bad=4, processes=1)
    )  # a higher limit goes on where that ended
    with pytest.raises(ValueError, match=r"a\.jsonl:5: not valid JSON"):
        main(Options(files=files, out=f"{tmp_path}/none", processes=1))  # of several, any may meet the first one


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_compressed_file_that_was_cut_short_is_told(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = some_texts(3000)
    path = as_file(tmp_path, kind, texts)
    assert isinstance(path, Path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=rf"^files={path}: cannot be read \("):
        main(Options(files=str(path), out=f"{tmp_path}/none"))
    main(Options(files=str(path), out=f"{tmp_path}/out", max_bad=1, val_fraction=0))
    kept = documents(tmp_path / "out", "train")
    assert kept == texts[: len(kept)] and 20 <= len(kept) < 3000
    assert f"passed over: files={path}: cannot be read (" in capsys.readouterr().err


def test_parquet_rows_and_columns(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"body": ["a", None, "c"]}), tmp_path / "a.parquet", row_group_size=1)
    with pytest.raises(ValueError, match=r"data\.text_key=text: .*a\.parquet has no such field, only body"):
        prepare([Source(tmp_path / "a.parquet")], tmp_path / "out", BYTES)
    with pytest.raises(ValueError, match=r"data\.text_key=body: must be a string, .*a\.parquet row 2 has 'None'"):
        prepare([Source(tmp_path / "a.parquet")], tmp_path / "out", BYTES, text_key="body")
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"b\.parquet: not a Parquet file"):
        prepare([Source(tmp_path / "b.parquet")], tmp_path / "out", BYTES)


@pytest.mark.parametrize(
    ("query", "what"),
    [("?data_files={path}", r"must choose a split, with \?split=train"), ("?spilt=train", "spilt: unknown, must be one of"),
     ("?data_files=/no/file.jsonl&split=train", "FileNotFoundError")],
)  # fmt: skip
def test_a_wrong_datasets_source_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: str, what: str
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    spec = f"datasets:json{query.format(path=path)}"
    with pytest.raises(ValueError, match=rf"^files=datasets:json.*: .*{what}") as error:
        main(Options(files=spec, out=f"{tmp_path}/out"))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- a tokenizer of its own, and checksums


def test_a_bpe_learnt_from_the_data(tmp_path: Path, small_parts: None) -> None:
    texts = some_texts(120)
    write_jsonl(tmp_path / "a.jsonl", [*texts, "<|endoftext|> is text"])
    main(
        Options(files=f"{tmp_path}/a.jsonl", out=f"{tmp_path}/out", tokenizer="bpe:300", val_fraction=0.2, processes=2)
    )
    tokenizer = load_tokenizer(f"{tmp_path}/out")
    assert tokenizer.vocab_size == 300 and tokenizer.separator == 0
    found = documents(tmp_path / "out", "train", tokenizer) + documents(tmp_path / "out", "val", tokenizer)
    assert sorted(found) == sorted(
        [*texts, "<|endoftext|> is text"]
    )  # also the words of a special token, in workers too
    assert sum(map(len, tokens_of(tmp_path / "out").values())) < 0.7 * sum(len(text.encode()) for text in texts)
    config = DataConfig(files=[f"{tmp_path}/out"], tokenizer=f"{tmp_path}/out")
    assert open_data(config, 16).tokenizer.vocab_size == 300
    with pytest.raises(
        ValueError, match=rf"^data\.tokenizer=bytes: must be {tmp_path}/out/tokenizer\.json, with which"
    ):
        open_data(DataConfig(files=[f"{tmp_path}/out"]), 16)
    for spec in ("bpe:", "bpe:257", "bpe:x"):
        with pytest.raises(ValueError, match=f"^tokenizer={spec}: must be bpe: and a number above 257"):
            main(Options(files=f"{tmp_path}/a.jsonl", out=f"{tmp_path}/o", tokenizer=spec))


def test_verify_finds_a_flipped_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", some_texts(30))
    main(Options(files=f"{tmp_path}/a.jsonl", out=f"{tmp_path}/out", val_fraction=0.3))
    capsys.readouterr()
    main(Options(verify=f"{tmp_path}/out"))
    assert capsys.readouterr().out.startswith(f"{tmp_path}/out: whole, 30 documents, ")
    shard = next((tmp_path / "out").glob("val-*.npy"))
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"^verify={shard}: is damaged"):
        main(Options(verify=f"{tmp_path}/out"))


def test_a_full_disk_is_told_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: None
):
    path = write_jsonl(tmp_path / "texts.jsonl", some_texts(60))
    options = Options(files=str(path), out=str(tmp_path / "out"), processes=1)
    append, written = prepare_module.ShardWriter.append, []

    def full(writer: Any, ids: Any) -> None:
        written.append(ids)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write() does: it names no file
        append(writer, ids)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.ShardWriter, "append", full)
        with pytest.raises(
            ValueError, match=rf"^out={tmp_path}/out: cannot be written \(No space left on device\); the same"
        ):
            main(options)
    main(options)
    prepare([Source(path)], tmp_path / "plain", BYTES, knob="files")
    assert tokens_of(tmp_path / "out") == tokens_of(tmp_path / "plain")


def test_verify_stands_alone():
    with pytest.raises(ValueError, match=r"^verify=a: must stand alone"):
        main(Options(verify="a", files="b"))
