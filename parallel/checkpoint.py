"""Sharded checkpoints: one folder a step, whole or not there at all.

    checkpoints/step_00000100/   __0_0.distcp, __1_0.distcp, …   tensors, each rank's shards (torch.distributed.checkpoint)
                                 .metadata                       which file holds which part of which tensor
                                 state.json                      everything else: step, samples, tokens, configuration

A folder is written as `step_00000100.tmp` and renamed when every rank is done; only a complete one has the final name.
Tensors are saved by name as whole tensors that happen to lie in pieces, so another number of ranks, another division of
experts or another engine loads them too.
"""

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from moesaic.parallel.engine import Engine

STATE_FILE = "state.json"
_COMPLETE = re.compile(r"step_(\d{8,})")


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first; none where the folder does not exist."""
    if not root.is_dir():
        return []
    found = [
        (int(m[1]), p) for p in root.iterdir() if (m := _COMPLETE.fullmatch(p.name)) and (p / STATE_FILE).is_file()
    ]
    return [path for _, path in sorted(found)]


def remove_leftovers(root: Path) -> None:
    """Delete what a killed save or removal left. For one process, before anything is saved."""
    for path in root.glob("step_*.tmp") if root.is_dir() else ():
        shutil.rmtree(path)


def save(root: Path, step: int, engine: Engine, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` and delete all but the newest `keep`. Collective.

    `state`: JSON-able, read back by `read_state`. Raises what the file system raises; older checkpoints are then untouched.
    """
    final = step_folder(root, step)
    writing = final.with_name(final.name + ".tmp")
    tensors = _tensors(engine)
    tensors[_rng_key()] = torch.get_rng_state()
    dcp.save(tensors, checkpoint_id=writing)
    if dist.get_rank() == 0:
        with open(writing / STATE_FILE, "w") as file:
            json.dump(state, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():  # the same step again, after a resume from an earlier one
            _remove(final)
        writing.rename(final)
        for old in complete_checkpoints(root)[:-keep]:
            _remove(old)
    dist.barrier()
    return final


def load(path: Path, engine: Engine) -> None:
    """Fill weights, buffers, moments and the CPU random generator from a checkpoint, in place. Collective.

    A rank that did not exist when it was saved keeps its random state.
    """
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    engine.make_moments()
    tensors = _tensors(engine)
    if _rng_key() in saved:
        tensors[_rng_key()] = torch.get_rng_state()
    dcp.load(tensors, checkpoint_id=path)
    engine.loaded(tensors["optim.step"])
    if _rng_key() in saved:
        torch.set_rng_state(tensors[_rng_key()])


def load_model(path: Path, model: nn.Module) -> None:
    """Fill the weights of a model in one process, with or without a process group, whatever layout saved them."""
    load_tensors(path, {n: value.detach() for n, value in [*model.named_parameters(), *model.named_buffers()]})


def load_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill whole parameters and buffers, by their names in the model, in one process, whatever layout saved them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
        dcp.load({f"model.{name}": value for name, value in tensors.items()}, checkpoint_id=path, no_dist=True)


def read_state(path: Path) -> dict[str, Any]:
    """What `save` was given as `state`."""
    with open(path / STATE_FILE) as file:
        return json.load(file)


def _tensors(engine: Engine) -> dict[str, Tensor]:
    tensors = {"optim.step": engine.steps()}
    tensors |= {f"model.{name}": t for name, t in engine.weights().items()}
    return tensors | {f"optim.{name}": moment for name, moment in engine.moments().items()}


def _rng_key() -> str:
    return f"rng.{dist.get_rank()}"


def _remove(folder: Path) -> None:
    # Under its final name a half-deleted folder would pass for a complete one.
    doomed = folder.with_name(folder.name + ".old.tmp")
    folder.rename(doomed)
    shutil.rmtree(doomed)
