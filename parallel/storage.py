"""Files of checkpoints: on a file system, or wherever an fsspec URL points (s3://bucket/run, gs://…, with the user's packages).

Object stores can't rename, and put a file there whole or not at all; a file system can do neither in one go. What both give is a
file that is written after others are safe, and that is whole when it is there: `write_last`. Nothing more is asked of either.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem


def join(folder: str | Path, *names: str) -> str:
    return "/".join([str(folder).rstrip("/") or "/", *names])


def names(folder: str | Path) -> list[str]:
    """What is in a folder, sorted; nothing where there is none."""
    fs, path = _where(folder)
    fs.invalidate_cache()  # others write there
    try:
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return []


def exists(path: str) -> bool:
    fs, path = _where(path)
    fs.invalidate_cache()
    return bool(fs.exists(path))


def same(one: str, other: str) -> bool:
    """Whether two paths lead to one place."""
    (fs, path), (other_fs, other_path) = _where(one), _where(other)
    if _local(fs) and _local(other_fs):
        return os.path.realpath(path) == os.path.realpath(other_path)
    return fs == other_fs and path.rstrip("/") == other_path.rstrip("/")


def size(path: str) -> int:
    """Bytes of a file. Raises OSError where there is none, or something else: to open a pipe would wait for ever, and a symbolic
    link may lead out of the folder."""
    fs, path = _where(path)
    if _local(fs):
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is no regular file")
        return found.st_size
    return int(fs.info(path)["size"])


@contextlib.contextmanager
def reader(path: str) -> Iterator[BinaryIO]:
    """A file to `seek` and `readinto`. On a file system a symbolic link is refused, as by `size`."""
    fs, path = _where(path)
    if _local(fs):
        with open(path, "rb", 0, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
            yield file
    else:
        with fs.open(path, "rb") as file:
            yield file


@contextlib.contextmanager
def writer(path: str) -> Iterator[BinaryIO]:
    """A new file. When the block ends it is safe: it survives a loss of power."""
    fs, path = _where(path)
    if not _local(fs):
        with fs.open(path, "wb") as file:
            yield file
        return
    with open(path, "wb", 0) as local_file:
        yield local_file
        os.fsync(local_file.fileno())
    _sync_folder(path)


def write_last(path: str, data: bytes) -> None:
    """A small file that is there whole, and safe, or not at all."""
    fs, where = _where(path)
    if not _local(fs):
        fs.pipe_file(where, data)
        return
    with writer(f"{where}.tmp") as file:
        file.write(data)
    os.replace(f"{where}.tmp", where)
    _sync_folder(where)


def make_folder(folder: str | Path) -> None:
    """The folder and those above it; where a URL has no folders, nothing."""
    fs, path = _where(folder)
    fs.makedirs(path, exist_ok=True)
    if _local(fs):
        _sync_folder(path)


def remove_folder(folder: str, first: str) -> None:
    """Delete a folder, its file `first` before the others. Nothing happens where there is none."""
    fs, path = _where(folder)
    fs.invalidate_cache()
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(f"{path}/{first}")
    if _local(fs):
        if os.path.isdir(path):
            _sync_folder(f"{path}/{first}")
            shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)


def check_root(root: str) -> None:
    """Raises ValueError where `root` is a URL that fsspec can't open, such as s3:// without the package s3fs."""
    _where(root)


def _where(path: str | Path) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(str(path))
    except (ValueError, ImportError) as error:
        raise ValueError(f"{path}: {error}") from error


def _local(fs: Any) -> bool:
    return isinstance(fs, LocalFileSystem)


def _sync_folder(path: str) -> None:
    """Make what happened to the names beside `path` safe."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some systems that are mounted from elsewhere can't
            raise
    finally:
        os.close(folder)
