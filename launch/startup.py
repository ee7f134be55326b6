"""What a run settles before anything large is made. Everything here runs on all ranks: what one of them refuses, all refuse with
the same line (`together`); what one has found, all go by (`agree_on`)."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moesaic.kernels import autotune
from moesaic.kernels.tiles import TILES, known_tile, rounding_tile
from moesaic.launch import cli
from moesaic.launch.batches import micro_batches
from moesaic.launch.schema import Config
from moesaic.moe.hf import Checkpoint
from moesaic.moe.hf_config import MOE_FAMILIES, settle, shape_knobs
from moesaic.moe.low import check_low
from moesaic.moe.precision import Precision
from moesaic.parallel import checkpoint, storage

T = TypeVar("T")


def check_devices() -> None:
    """Refuse more ranks than GPUs on this machine, where any rank would fail in a way of its own."""
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if torch.cuda.is_available() and ranks > gpus:
        raise cli.UserError(f"--nproc-per-node={ranks}: must not exceed the number of GPUs here, {gpus}")


def check_root(url: str | None) -> None:
    """Raises ValueError where `train.checkpoint_dir` is a URL that can't be opened here."""
    try:
        storage.check_root(url or "")
    except ValueError as error:
        raise ValueError(f"train.checkpoint_dir={error}") from error


def find_checkpoint(config: Config, root: str, say: Callable[[str], None]) -> str | None:
    """The checkpoint to start from: what `resume` says. After a restart by torchrun, the newest of the run itself. Collective."""
    own = agree_on(lambda: checkpoint.complete_checkpoints(root))
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if config.resume == "auto" or (restarted and own):
        return checkpoint.newest(root, say)
    if config.resume == "never":
        if own and not restarted:
            raise ValueError(f"resume=never: run_dir={config.run_dir} holds checkpoints; choose another run_dir")
        return None
    path = config.resume.rstrip("/")
    agree_on(lambda: checkpoint.refuse_pickles(path))
    if agree_on(lambda: checkpoint.is_checkpoint(path)):
        problems = checkpoint.verify_together(agree_on(lambda: checkpoint.read_manifest(path)))
        if problems:
            raise ValueError(f"resume={path}: {problems[0]}")
        found: str | None = path
    else:
        found = checkpoint.newest(path, say) or checkpoint.newest(f"{path}/checkpoints", say)
    if not found:
        raise ValueError(f"resume={config.resume}: must be auto, never, a checkpoint, or a run_dir that holds one")
    if own and not storage.same(found, own[-1]):  # steps done again would mix with those that are there
        raise ValueError(f"resume={config.resume}: must be auto, for run_dir={config.run_dir} holds {Path(own[-1]).name}; "
                         "or choose another run_dir")  # fmt: skip
    return found


def settle_model(config: Config, saved: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint of `init_from`, where the run starts from it; with `model_from_init`, `config.model` gets its shape: the
    saved one's where the run resumes."""
    if "config" in saved:
        if config.model_from_init:
            before = cli.from_dict(saved["config"]).model
            config.model = settle(config.model, before, True, f"the checkpoint in run_dir={config.run_dir}")
        return None
    if config.init_from is None:
        if config.model_from_init:
            raise ValueError(
                "init_from=null: must be the folder to take model and weights from, with model_from_init=true"
            )
        return None
    weights = Checkpoint(config.init_from)
    if weights.kind not in MOE_FAMILIES:
        raise ValueError(f"init_from={config.init_from}: {weights.kind} has no experts; launch/upcycle.py makes some")
    if config.data.tokenizer == "bytes" and (weights.folder / "tokenizer.json").is_file():
        raise ValueError(f"data.tokenizer=bytes: init_from={config.init_from} has a tokenizer of its own; "
                         f"data.tokenizer={config.init_from} chooses it")  # fmt: skip
    config.model = settle(config.model, weights.config, config.model_from_init, f"init_from={config.init_from}")
    return weights


def check_tiles(config: Config, device: torch.device) -> None:
    """Raises ValueError where rounding is on, or the kernels are asked for, and the device's tiles are not known, or the recipe
    has nothing to quantize, or the device no products of it."""
    if config.model.router.rounding != "none":
        rounding_tile(device, config.model.router.rounding_tile)
    if config.model.experts_backend == "triton" and not known_tile(device):
        raise ValueError(f"model.experts_backend=triton: no tiles are known for {device}, only for {', '.join(TILES)}")
    if config.precision.quantized:
        check_low(config.precision, config.model)
        Precision(config.precision, backend=config.model.experts_backend).native(device)


def choose_tiles(
    config: Config, own: Path | None, device: torch.device, expert: int, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The record of tiles that `train.tiles` asks for (None: the table's), as moesaic.kernels.autotune has it. A run that goes on
    keeps to its `own`: with other tiles token rounding would choose other tokens."""
    if config.train.tiles == "table":
        return None
    if own and own.is_file():
        return autotune.read(own)
    if config.train.tiles != "autotune":
        try:
            return autotune.read(config.train.tiles)
        except ValueError as error:
            raise ValueError(f"train.tiles={error}") from error
    model, sequences = (
        config.model,
        micro_batches(config.train.global_batch, config.train, 0, dist.get_world_size())[0][1],
    )
    g = model.d_expert * (1 if model.activation == "relu2" else 2)
    shape = autotune.layer_shape(sequences * config.train.seq_len, model.d_model, model.d_expert, g, model.n_experts,
                                 model.router.top_k, expert)  # fmt: skip
    return autotune.tuned(device, shape, say=say)


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The type of matrix products that `precision.compute` names; auto: bf16 on CUDA, fp32 on a CPU, where bf16 is slow."""
    if config.precision.compute == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision.compute]


def make_run_dir(run_dir: Path, checkpoints: str) -> None:
    for knob, folder in (("run_dir", str(run_dir)), ("train.checkpoint_dir", checkpoints)):
        try:
            storage.make_folder(folder)
        except OSError as error:
            raise ValueError(f"{knob}={folder}: cannot be made or written ({error.strerror or error})") from error


def check_same_data(mine: str, shared: str) -> None:
    if mine != shared:  # such as other versions of Python, whose libraries differ
        raise ValueError(
            f"data.files: rank {dist.get_rank()} reads other data than rank 0; every node must see the same files"
        )


def check_resume(config: Config, data: str, saved: dict[str, Any], source: str | None) -> None:
    """Refuse what would silently train another model, or skip and repeat data."""
    made_with = cli.from_dict(saved["config"])
    model, model_before = shape_knobs(config.model), shape_knobs(made_with.model)
    pairs = [(f"model.{k}", model[k], model_before[k]) for k in model]
    pairs += [(f"train.{k}", getattr(config.train, k), getattr(made_with.train, k)) for k in ("seed", "seq_len")]
    for knob, value, before in pairs:
        if value != before:
            raise ValueError(f"{knob}={value}: {source} was made with {before}")
    if data != saved["data"]:
        raise ValueError(f"data.files={config.data.files}: {source} was made with other data, or another tokenizer")


def together(work: Callable[[], T], kind: type[cli.UserError] = cli.UserError) -> T:
    """`work` on every rank. A ValueError, or a file that can't be read, on any of them becomes a `kind` on all: nobody waits for
    one that has left."""
    result: T | None = None
    mistake: str | None = None
    try:
        result = work()
    except (ValueError, OSError) as error:
        mistake = str(error)
    mistakes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(mistakes, mistake)
    for line in mistakes:
        if line is not None:
            raise kind(line)
    return result  # type: ignore[return-value]


def agree_on(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank; a ValueError there is a UserError everywhere."""
    box = [together(lambda: work() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def nothing() -> None: ...
