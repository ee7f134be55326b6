"""Look at checkpoints, verify, rewrite and export them. One process, with no more in memory than one tensor.

python launch/checkpoint.py list run_dir=runs/demo
python launch/checkpoint.py verify run_dir=runs/demo                              every byte; exit code 1 where one is wrong
python launch/checkpoint.py reshard run_dir=runs/demo out=s3://bucket/demo files=1     the newest one, elsewhere, in 1 file
python launch/checkpoint.py export run_dir=runs/demo out=demo-hf family=qwen3_moe       see launch/export.py

run_dir is a run, a folder or URL that holds checkpoints, or one checkpoint.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.launch import export, options
from moesaic.launch.generate import checkpoint_root, newest_checkpoint
from moesaic.moe.config import require
from moesaic.parallel import checkpoint, shards, storage
from moesaic.parallel.manifest import File, Manifest, encode, folders
from moesaic.parallel.shards import DTYPES, Piece


@dataclass
class Options:
    """run_dir: a run, a folder that holds checkpoints, or one checkpoint."""

    run_dir: str = ""


@dataclass
class ReshardOptions:
    """out: the folder or URL to make the checkpoint in, under the name of its step; files: how many hold its tensors."""

    run_dir: str = ""
    out: str = ""
    files: int = 1


def list_checkpoints(choice: Options) -> None:
    for path in found(choice.run_dir):
        try:
            manifest = checkpoint.read_manifest(path)
        except ValueError as error:
            print(error)
            continue
        tokens = manifest.state.get("tokens")
        told = f", {tokens:,} tokens" if isinstance(tokens, int) else ""
        print(f"{path}: step {manifest.step}{told}; {len(manifest.tensors)} tensors, {size(manifest)}")


def verify(choice: Options) -> None:
    bad = False
    for path in found(choice.run_dir):
        try:
            manifest = checkpoint.read_manifest(path)
            problems = checkpoint.verify(manifest)
        except ValueError as error:
            problems = [str(error)]
        bad = bad or bool(problems)
        print("\n".join(problems) if problems else f"{path}: whole, {size(manifest)}", flush=True)
    if bad:
        sys.exit(1)


def reshard(choice: ReshardOptions) -> None:
    require(choice.out != "", "out=: must name a folder or URL")
    require(choice.files >= 1, f"files={choice.files}: must be at least 1")
    manifest = checkpoint.read_manifest(newest_checkpoint(choice.run_dir))
    path = checkpoint.step_folder(choice.out, manifest.step)
    require(not storage.names(path), f"out={choice.out}: holds {path} already")
    storage.make_folder(path)
    files, placed = [], []
    for i, pieces in enumerate(dealt(manifest, choice.files)):
        name = f"shard_{i:05d}.safetensors"
        written = shards.write(storage.join(path, name), pieces, whole(manifest, pieces))
        files.append(File(name, written.size, written.checksums))
        placed += [(piece, i, start) for piece, start in zip(pieces, written.starts, strict=True)]
    storage.write_last(storage.join(path, checkpoint.MANIFEST), encode(manifest.step, manifest.state, files, placed))
    print(f"{path}: {size(checkpoint.read_manifest(path))}, of {manifest.path}")


def dealt(manifest: Manifest, files: int) -> list[list[Piece]]:
    """Whole tensors, for each file: the largest first, to the file that has least."""
    result: list[list[Piece]] = [[] for _ in range(files)]
    loads = [0] * files
    pieces = [Piece(name, t.dtype, t.shape, (0,) * len(t.shape), t.shape) for name, t in manifest.tensors.items()]
    for piece in sorted(pieces, key=lambda piece: -piece.bytes):
        file = loads.index(min(loads))
        result[file].append(piece)
        loads[file] += piece.bytes
    return [sorted(mine, key=shards.place_in_file) for mine in result]


def whole(manifest: Manifest, pieces: list[Piece]) -> Iterator[Tensor]:
    for piece in pieces:
        value = torch.empty(piece.shape, dtype=DTYPES[piece.dtype])
        checkpoint.read_into(manifest, {piece.name: value})
        yield value


def found(run_dir: str) -> list[str]:
    """`run_dir` if it is a checkpoint, else all that it holds, complete or not. Raises ValueError where there are none."""
    path = run_dir.rstrip("/")
    if path and checkpoint.is_checkpoint(path):
        return [path]
    paths = [path for path, _ in folders(checkpoint_root(path))] if path else []
    require(bool(paths), f"run_dir={run_dir}: must be a run that holds checkpoints, or a checkpoint")
    return paths


def size(manifest: Manifest) -> str:
    return f"{len(manifest.files)} file{'s' if len(manifest.files) > 1 else ''}, {manifest.bytes / 1e9:.3g} GB"


COMMANDS: dict[str, tuple[Callable[[Any], None], type]] = {
    "list": (list_checkpoints, Options),
    "verify": (verify, Options),
    "reshard": (reshard, ReshardOptions),
    "export": (export.main, export.Options),
}

if __name__ == "__main__":
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        options.run(*COMMANDS[command], __doc__, arguments)
    if command in ("-h", "--help"):
        print(__doc__)
        sys.exit(0)
    print(f"error: {command}: must be one of {', '.join(COMMANDS)}", file=sys.stderr)
    sys.exit(2)
