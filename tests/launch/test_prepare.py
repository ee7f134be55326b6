"""Tokenizers, reading of documents, shards and launch/prepare.py."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from moesaic.launch import documents as documents_module
from moesaic.launch import prepare as prepare_module
from moesaic.launch.documents import Source, expand
from moesaic.launch.prepare import main, prepare
from moesaic.launch.token_shards import hash_unit
from moesaic.launch.tokens import Tokenizer, check_vocab, load_tokenizer

BYTES = load_tokenizer("bytes")
SEPARATOR = 256


def train_bpe(path: Path, special: list[str], *, truncate: bool = False) -> None:
    """A byte-level BPE, GPT-2's kind, of a few hundred tokens."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = [Path(__file__).read_text(), "über naïve 漢字 the and of to in is"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    if truncate:
        bpe.enable_truncation(4)
        bpe.enable_padding(length=50)
    # As Llama's do, it would put a special token before each text that it is given.
    bpe.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    bpe.save(str(path))


@pytest.fixture
def bpe(tmp_path: Path) -> Tokenizer:
    path = tmp_path / "bpe" / "tokenizer.json"
    path.parent.mkdir()
    train_bpe(path, ["<|im_start|>", "<|endoftext|>"], truncate=True)
    return load_tokenizer(str(path))


def documents(folder: Path, split: str, tokenizer: Tokenizer = BYTES) -> list[str]:
    """The documents of a split, recovered from its tokens alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    shards = [np.load(folder / shard["file"]) for shard in manifest["splits"][split]]
    if not shards:
        return []
    tokens = np.concatenate(shards)
    assert tokens[-1] == tokenizer.separator
    ends = np.flatnonzero(tokens == tokenizer.separator)
    return [tokenizer.decode(one[one != tokenizer.separator]) for one in np.split(tokens, ends + 1)[:-1]]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return path


def run(tmp_path: Path, *sources: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    out = tmp_path / f"out{random.random()}"
    return out, prepare([Source(path) for path in sources], out, options.pop("tokenizer", BYTES), **options)


# ---------------------------------------------------------------- tokenizers


@settings(deadline=None)
@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    ids = BYTES.encode(text)
    assert ids.dtype == np.uint16 and ids.size == len(text.encode()) and (ids.size == 0 or ids.max() < 256)
    assert BYTES.decode(ids) == text


@settings(deadline=None)
@given(st.lists(st.integers(0, 400)))
def test_bytes_decode_takes_any_ids(ids: list[int]) -> None:
    text = BYTES.decode(ids)
    assert text.count("\n") == ids.count(ord("\n")) + ids.count(SEPARATOR)
    assert ("�" in text) >= any(i > SEPARATOR for i in ids)


def test_bpe(bpe: Tokenizer) -> None:
    assert bpe.separator == 1 and bpe.dtype == np.uint16
    text = "The naïve 漢字 of <|endoftext|> and <|im_start|> is plain text 🙂\n"
    ids = bpe.encode(text)
    # The file's truncation to 4 and padding to 50 are off, and special tokens come from no text.
    assert ids.size > 20 and not {0, 1} & set(ids.tolist())
    assert bpe.decode(ids) == text
    assert [one.tolist() for one in bpe.encode_batch([text, "a", ""])] == [ids.tolist(), bpe.encode("a").tolist(), []]
    assert bpe.decode([*bpe.encode("a"), 1, *bpe.encode("b"), 10**6]) == "a\nb"
    assert load_tokenizer(str(Path(bpe.spec).parent)).digest == bpe.digest  # a folder that holds tokenizer.json


def test_vocab_size_counts_gaps_in_ids(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    backend.add_special_tokens(["</s>"])
    backend.save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.vocab_size == 70_001 and tokenizer.dtype == np.uint32
    assert tokenizer.encode("b").tolist() == [70_000]
    check_vocab(70_001, tokenizer)
    with pytest.raises(ValueError, match=r"model\.vocab_size=70000: must be at least 70001, .*data\.tokenizer=/"):
        check_vocab(70_000, tokenizer)


def test_tokenizer_errors(tmp_path: Path) -> None:
    missing, broken, nameless = (tmp_path / name for name in ("none.json", "broken.json", "nameless.json"))
    broken.write_text('{"version": "1.0"')
    train_bpe(nameless, ["[PAD]"])
    for path, rule in (missing, "no such file"), (broken, "not a Hugging Face"), (nameless, r"no special.*\[PAD\]"):
        with pytest.raises(ValueError, match=rf"^data\.tokenizer={path}: {rule}") as error:
            load_tokenizer(str(path))
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------- documents and splits


@pytest.mark.parametrize("batch", [1, 500, 2**22])
@pytest.mark.parametrize("piece", [13, 2**18])
def test_documents_keep_text_and_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, piece: int) -> None:
    monkeypatch.setattr(documents_module, "BATCH_CHARS", batch)
    monkeypatch.setattr(documents_module, "PIECE_CHARS", piece)
    rng = random.Random(0)
    texts = ["".join(rng.choices("ab \n漢é🙂", k=rng.randrange(1, 60))) for _ in range(300)]
    jsonl = write_jsonl(tmp_path / "a.jsonl", texts)
    plain = tmp_path / "b.md"
    plain.write_bytes("line\r\nüber\r".encode())
    out, manifest = run(tmp_path, jsonl, plain, val_fraction=0.2, shard_tokens=97)
    for split in ("train", "val"):
        shards = manifest["splits"][split]
        assert [shard["file"] for shard in shards] == [f"{split}-00000-{i:03d}.npy" for i in range(len(shards))]
        assert all(shard["tokens"] == 97 for shard in shards[:-1]) and 0 < shards[-1]["tokens"] <= 97
        for shard in shards:
            assert (out / shard["file"]).stat().st_size == shard["bytes"]
            tokens = np.load(out / shard["file"], mmap_mode="r")
            assert tokens.shape == (shard["tokens"],) and tokens.dtype == np.uint16
            assert shard["documents"] == np.count_nonzero(tokens == SEPARATOR)
    whole = [*texts, "line\r\nüber\r"]
    assert documents(out, "train") == [text for text in whole if hash_unit(text[:piece]) >= 0.2]
    assert documents(out, "val") == [text for text in whole if hash_unit(text[:piece]) < 0.2]
    assert 30 < len(documents(out, "val")) < 90
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in whole)
    assert sorted(os.listdir(tmp_path)) == sorted(["a.jsonl", "b.md", out.name])  # nothing half-made remains


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_long_documents_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, bom: bytes, bpe: Tokenizer
) -> None:
    """Small blocks cut characters and lines everywhere; the document is the same, and so are its tokens."""
    monkeypatch.setattr(documents_module, "PIECE_CHARS", 61)
    monkeypatch.setattr(documents_module, "BATCH_CHARS", 200)
    rng = random.Random(1)
    words = ["the", "naïve", "漢字", "🙂", "def", "x1", "(", "    ", "\n\n"]
    text = "".join("".join(rng.choices(words, k=rng.randrange(1, 9))) + "end\n" for _ in range(100)) + "ü"
    path = tmp_path / f"a.{kind}"
    record = text.encode() if kind == "txt" else json.dumps({"text": text}, ensure_ascii=False).encode()
    path.write_bytes(bom + record)
    for tokenizer in BYTES, bpe:
        out, manifest = run(tmp_path, path, tokenizer=tokenizer, val_fraction=0)
        tokens = np.load(out / "train-00000-000.npy")
        assert tokens.tolist() == [*tokenizer.encode(text), tokenizer.separator]
        assert manifest["text_bytes"] == len(text.encode())


def test_pieces_without_good_places_to_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "PIECE_CHARS", 7)
    for i, text in enumerate(("x" * 50, "\n" * 50, " " * 50, "a b" * 20, "\n" + "y" * 30, ".\n" * 30)):
        path = tmp_path / f"{i}.txt"
        path.write_text(text)
        out, _ = run(tmp_path, path, val_fraction=0)
        assert documents(out, "train") == [text]


def test_split_does_not_depend_on_order_or_place(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(200)]
    splits = []
    for seed in range(2):
        random.Random(seed).shuffle(texts)
        (tmp_path / f"{seed}").mkdir()
        out, _ = run(tmp_path, write_jsonl(tmp_path / f"{seed}" / "a.jsonl", texts), val_fraction=0.3)
        splits.append({split: set(documents(out, split)) for split in ("train", "val")})
    assert splits[0] == splits[1] and splits[0]["train"] | splits[0]["val"] == set(texts)


def test_one_document_is_split_by_position(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "".join(random.Random(2).choices("abc\n", k=10_001))
    path.write_text(text)
    out, manifest = run(tmp_path, path, val_fraction=0.1, shard_tokens=777)
    [train], [val] = documents(out, "train"), documents(out, "val")
    assert train + val == text and len(val) == 999  # of 10,002 tokens 1,000, a separator among them
    assert [sum(one["documents"] for one in manifest["splits"][split]) for split in ("train", "val")] == [1, 1]
    assert sorted(os.listdir(out)) == sorted(
        ["manifest.json", *(one["file"] for split in manifest["splits"].values() for one in split)]
    )


@pytest.mark.parametrize(("fraction", "moved"), [(1e-9, "val"), (1 - 1e-9, "train")])
def test_an_empty_side_gets_a_document(tmp_path: Path, fraction: float, moved: str) -> None:
    texts = [f"text {i} " * (i + 1) for i in range(7)]
    out, _ = run(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts), val_fraction=fraction, shard_tokens=40)
    chosen = (min if moved == "val" else max)(texts, key=hash_unit)
    other = "train" if moved == "val" else "val"
    assert documents(out, moved) == [chosen]
    assert documents(out, other) == [text for text in texts if text != chosen]


def test_copies_of_a_document_and_empty_records(tmp_path: Path) -> None:
    texts = ["same"] * 4 + [""] * 3
    out, _ = run(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts), val_fraction=0.25)
    assert documents(out, "train") == ["same"] * 3 and documents(out, "val") == ["same"]


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83dz"}\n\n{"text": "\\ud83d\\ude42"}\n')
    out, _ = run(tmp_path, path, val_fraction=0)
    assert documents(out, "train") == ["a?z", "🙂"]


# ---------------------------------------------------------------- what is wrong with the input


def bad(tmp_path: Path, name: str, content: bytes, *, text_key: str = "text") -> str:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        run(tmp_path, path, text_key=text_key)
    assert not list(tmp_path.glob("out*")), "no half-made folder remains"
    line = str(error.value)
    assert "\n" not in line and str(path) in line
    return line.replace(str(path), "PATH")


@pytest.mark.parametrize("offset", [0, 100, 2**18 - 1, 2**18, 2**18 + 5, 700_000])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_binary_file_names_the_byte(tmp_path: Path, offset: int, start: bytes) -> None:
    text = start + "é".encode() * 350_000
    at = len(start) + offset // 2 * 2
    content = text[:at] + b"\0" + text[at:]
    assert bad(tmp_path, "a.txt", content) == f"data.files=PATH: not a text file, byte {at} is NUL"
    content = text[:at] + b"\xff" + text[at:]
    assert bad(tmp_path, "a.txt", content) == f"data.files=PATH: not a UTF-8 text file, byte {at} is invalid"


def test_file_that_ends_within_a_character(tmp_path: Path) -> None:
    line = bad(tmp_path, "a.txt", b"ab" + "漢".encode()[:2])
    assert line == "data.files=PATH: not a UTF-8 text file, or truncated: its end cuts the character at byte 2"


def test_jsonl_errors(tmp_path: Path) -> None:
    good = b'{"text": "a", "id": 1}\n'
    line = bad(tmp_path, "a.jsonl", good + b"\n" + b'{"text": "b}\n' + good)
    assert line.startswith("data.files=PATH:3: not valid JSON (") and "truncated" not in line
    line = bad(tmp_path, "a.jsonl", good * 2 + b'{"text": "b')
    assert line.startswith("data.files=PATH:3: not valid JSON (") and line.endswith("the file may be truncated")
    assert bad(tmp_path, "a.jsonl", good + b'"b"\n') == "data.files=PATH:2: must be a JSON object, not 'b'"
    line = bad(tmp_path, "a.jsonl", good, text_key="body")
    assert line == "data.text_key=body: PATH:1 has no such field, only text, id"
    line = bad(tmp_path, "a.jsonl", good + b'{"text": null}\n')
    assert line == "data.text_key=text: must be a string, PATH:2 has 'None'"
    assert "PATH:2: not valid JSON (byte 10 is not UTF-8)" in bad(tmp_path, "a.jsonl", good + b'{"text": "\xff"}\n')
    assert "PATH:1: not valid JSON" in bad(tmp_path, "a.jsonl", b"[" * 200_000)
    assert bad(tmp_path, "a.jsonl", b"\n \n") == "data.files=PATH: is empty, it holds no text"


def test_expand(tmp_path: Path) -> None:
    lines: list[str] = []
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/d.md", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "sub/empty.md").touch()
    run_out, _ = run(tmp_path, tmp_path / "a.txt")

    def found(*patterns: str) -> tuple[list[str], list[str]]:
        files, folders = expand([f"{tmp_path}/{pattern}" for pattern in patterns], "data.files", lines.append)
        return [str(path.relative_to(tmp_path)) for path in files], [path.name for path in folders]

    assert found("b.txt", "*.txt", "**/*.txt") == (["b.txt", "a.txt", "odd[1].txt", "sub/c.txt"], [])
    assert found("odd[1].txt") == (["odd[1].txt"], [])
    assert found("out*", "*/c.txt") == (["sub/c.txt"], [run_out.name])
    assert not lines
    assert found("sub/*.md") == (["sub/d.md"], [])
    assert lines == [
        f"data.files={tmp_path}/sub/*.md: skipped 1 empty of 2 files, the first is {tmp_path}/sub/empty.md"
    ]
    rules = {
        "none.txt": "no such file",
        "*.none": "the pattern matches no file",
        "sub": "a folder without manifest.json",
        "sub/e*.md": f"{tmp_path}/sub/empty.md is empty",
        "sub/empty.md": f"{tmp_path}/sub/empty.md is empty",
    }
    for pattern, rule in rules.items():
        with pytest.raises(ValueError) as error:
            found("a.txt", pattern)
        assert str(error.value).startswith(f"data.files={tmp_path}/{pattern}: {rule}")


# ---------------------------------------------------------------- the program


def program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(prepare_module.__file__).absolute().parents[1]
    root = root.parent if root.name == "moesaic" else root
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, str(root / "launch" / "prepare.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=60)


def test_program(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [f"one {i}" for i in range(50)], key="body")
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n')
    done = program("files=*.jsonl", "out=data/corpus", "text_key=body", "val_fraction=0.2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokens = 50 * len("one ") + 10 + 40 * 2 + 3 + 51
    assert done.stdout.startswith(f"prepared 51 documents, {tokens} tokens (train ")
    assert f"{tokens - 51} bytes of text" in done.stdout and f"in {tmp_path}/data/corpus" in done.stdout
    assert len(documents(tmp_path / "data/corpus", "train") + documents(tmp_path / "data/corpus", "val")) == 51
    again = program("files=[a.jsonl, b.jsonl]", "out=data/corpus", "text_key=body", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == "error: out=data/corpus: exists already; must be a new or an empty folder\n"


def test_program_list_of_files_into_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("first")
    Path("b.txt").write_text("second")
    Path("out").mkdir()
    main(prepare_module.Options(files="[a.txt, b.txt]", out="out", val_fraction=0))
    assert documents(Path("out"), "train") == ["first", "second"]
    assert capsys.readouterr().out.startswith("prepared 2 documents, 13 tokens (train 13, val 0), 11 bytes")


def test_program_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("x" * 1000)
    mistakes = {
        "files=: must be given": {"out": "o"},
        "out=: must be given": {"files": "a.txt"},
        "val_fraction=1.0: must be": {"files": "a.txt", "out": "o", "val_fraction": 1.0},
        "tokenizer=no.json: no such file": {"files": "a.txt", "out": "o", "tokenizer": "no.json"},
        "files=b.txt: no such file": {"files": "b.txt", "out": "o"},
        "text_key=text: must be a string": {"files": "a.jsonl", "out": "o"},
        "out=a.txt: exists already": {"files": "a.txt", "out": "a.txt"},
        "files=prepared: .*/prepared is prepared already": {"files": "prepared", "out": "o"},
    }
    Path("a.jsonl").write_text('{"text": 1}')
    main(prepare_module.Options(files="a.txt", out="prepared"))
    for line, options in mistakes.items():
        with pytest.raises(ValueError, match=f"^{line}"):
            main(prepare_module.Options(**options))  # type: ignore[arg-type]
    assert not Path("o").exists()
    wrong = program("filse=a.txt", "out=o", cwd=tmp_path)
    assert wrong.returncode == 2 and "filse: unknown; nearest: files" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(documents_module, "BATCH_CHARS", 1)
    lines: list[str] = []
    run(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["one", "two"]), log=lines.append)
    assert len(lines) == 2 and lines[1].startswith("preparing: 0 of 1 parts, 0.0 MB of text, 8 tokens, ")
