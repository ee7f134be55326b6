"""A prepared folder: token shards and their manifest, written and verified.

launch/prepare.py says what is in one.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.launch.documents import MANIFEST
from moesaic.launch.tokens import BYTES, Tokenizer, load_tokenizer
from moesaic.moe.config import require

FORMAT = 1
SHARD_TOKENS = 2**27


class ShardWriter:
    """Appends tokens to shards `{name}-000.npy`, … of at most `limit` tokens.

    Tokens go straight to the file; the npy header, whose length does not depend on the count, is completed at the end.
    """

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer, limit: int) -> None:
        self.folder, self.name, self.tokenizer, self.limit = folder, name, tokenizer, limit
        self.total = 0
        self.open_document = False  # the last token written is not a separator
        self.shards: list[dict[str, Any]] = []
        self._file: Any = None
        self._count = self._documents = 0

    def append(self, ids: np.ndarray) -> None:
        while ids.size:
            if self._file is None:
                self._file = (self.folder / f"{self.name}-{len(self.shards):03d}.npy").open("wb")
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


def write_json(path: Path, value: Any) -> None:
    """On disk and whole, or not there."""
    partial = path.with_suffix(".new")
    with partial.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def digest_of(path: Path) -> str:
    """The hash of a shard's tokens as they are in the file now. Raises OSError, or ValueError where it holds no array."""
    return hashlib.blake2b(np.ascontiguousarray(np.load(path, mmap_mode="r")).data, digest_size=16).hexdigest()


def verify(folder: Path, knob: str) -> dict[str, Any]:
    """Read every byte of a prepared folder, return its manifest. Raises `ValueError` that names the first file that is wrong."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        tokenizer = manifest["tokenizer"]
        for entry in (one for split in manifest["splits"].values() for one in split):
            path = folder / entry["file"]
            require(digest_of(path) == entry["hash"], f"{knob}={path}: is damaged")
        if tokenizer["spec"] != BYTES:
            path = folder / "tokenizer.json"
            same = load_tokenizer(str(path), knob).digest == tokenizer["hash"]
            require(same, f"{knob}={path}: is not the one it was prepared with")
    except OSError as error:
        raise ValueError(f"{knob}={path}: cannot be read ({error.strerror})") from error
    except (EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        if str(error).startswith(f"{knob}="):
            raise
        raise ValueError(f"{knob}={path}: is damaged ({type(error).__name__}: {error})") from error
    return manifest
