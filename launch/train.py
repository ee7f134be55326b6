"""Train a Mixture-of-Experts language model. Read it from top to bottom.

    torchrun --nproc-per-node 2 launch/train.py recipe=tiny_moe run_dir=runs/demo
    torchrun --nproc-per-node 8 launch/train.py recipe=7b_moe data.files=data/corpus train.steps=20000
    torchrun --nproc-per-node 8 launch/train.py recipe=continue_hf init_from=models/OLMoE-1B-7B data.files=data/corpus

A step's batch is `train.global_batch` sequences, dealt to ranks in order, each rank's share in micro-batches. A micro-batch of
one rank is the routing domain. The loss of a step is the token mean over the global batch.
"""

# ruff: noqa: E402
import os

PARENT = os.getppid()  # before the imports, which take seconds: it may die meanwhile

import dataclasses
import faulthandler
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moesaic.kernels import autotune
from moesaic.kernels.symmetric import FusedError, HeapError
from moesaic.kernels.tiles import TILES, known_tile, rounding_tile
from moesaic.launch import cli, guards, report
from moesaic.launch.collectives_report import Profile
from moesaic.launch.data import TokenStream, fingerprint, open_data, train_batch, val_batch
from moesaic.launch.generate import sample_texts
from moesaic.launch.metrics import (
    Meter,
    MetricsLog,
    memory_gib,
    peak_flops,
    progress_header,
    progress_line,
    start_wandb,
)
from moesaic.launch.mixture import Ahead, data_figures, end_reading
from moesaic.launch.optim import learning_rate, make_optimizer, set_lr
from moesaic.launch.schema import Config, TrainConfig
from moesaic.launch.tokens import check_vocab
from moesaic.moe.attention import document_ids
from moesaic.moe.balance import load_figures, update_bias
from moesaic.moe.flops import flops_per_token, parameter_counts
from moesaic.moe.hf import Checkpoint
from moesaic.moe.hf_config import MOE_FAMILIES, settle, shape_knobs
from moesaic.moe.model import Output, Transformer
from moesaic.parallel import checkpoint, storage, trace
from moesaic.parallel.apply import expert_path, greatest, parallelize, start_engine, total
from moesaic.parallel.deoscillate import Deoscillation
from moesaic.parallel.engine import Engine
from moesaic.parallel.expert import wire_figures
from moesaic.parallel.mesh import check_degrees, end_with_parent, expert_degree, leave_after, make_meshes, start
from moesaic.parallel.overload import OverloadError
from moesaic.parallel.two_hop import node_ranks

T = TypeVar("T")
MICRO_BATCH_TOKENS = 16_384


def main(config: Config) -> None:
    end_with_parent(PARENT)
    check_devices()
    device = start()
    try:
        train(config, device)
    except OverloadError as error:
        raise cli.UserError(str(error)) from error
    except (checkpoint.SaveError, FusedError, HeapError) as error:
        raise guards.RunEndedError(str(error)) from error
    finally:
        end_reading()
        guards.end_listening()
        trace.unwatch()
        dist.destroy_process_group()


def train(config: Config, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    say = print_now if rank == 0 else lambda line: None
    run_dir = Path(config.run_dir)
    checkpoints = config.train.checkpoint_dir or str(run_dir / "checkpoints")

    # --- what must be right before anything large is made: a mistake on one rank ends all of them with its line
    together(lambda: check_root(config.train.checkpoint_dir))
    source = together(lambda: find_checkpoint(config, checkpoints, say))
    saved: dict[str, Any] = together(
        lambda: checkpoint.read_state(source) if source else {"step": 0, "samples": 0, "tokens": 0}
    )
    weights = together(lambda: settle_model(config, saved))
    local = config.parallel.expert_path == "local"
    expert = together(lambda: expert_degree("1" if local else config.parallel.expert, config.model.n_experts, world))
    together(lambda: check_degrees(expert, config.parallel.replicate, world))
    together(lambda: node_ranks(config.parallel.node_size, expert))
    first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
    together(lambda: open_data(config.data, config.train.seq_len, say) if first_of_node else None)
    data = together(lambda: open_data(config.data, config.train.seq_len))
    together(lambda: check_vocab(config.model.vocab_size, data.tokenizer))
    shared = agree_on(lambda: fingerprint(data))
    together(lambda: check_same_data(fingerprint(data), shared))
    together(lambda: check_resume(config, fingerprint(data), saved, source) if source else None)
    together(lambda: check_tiles(config, device))
    chosen = agree_on(lambda: choose_tiles(config, run_dir / "tiles.json" if source else None, device, expert, say))
    together(lambda: autotune.use(chosen, device, f"train.tiles={config.train.tiles}") if chosen else None)
    together(lambda: make_run_dir(run_dir, checkpoints) if rank == 0 else None)
    data_watch = together(lambda: guards.DataWatch(data))
    health = guards.Health(config.train, saved.get("health", {}))

    # --- the model, spread over the ranks
    compute = compute_dtype(config, device)
    meshes = make_meshes(device.type, expert, config.parallel.replicate)
    fill = weights.read_into if weights else None
    model = parallelize(
        config.model, config.parallel, meshes, seed=config.train.seed, device=device, compute=compute, fill=fill,
        precision=config.precision, tokens=most_tokens(config.train),
    )  # fmt: skip
    engine = start_engine(config.parallel, model, make_optimizer(model, config.optim))
    torch.manual_seed(config.train.seed * 1_000_003 + rank)
    step, samples, tokens = saved["step"], saved["samples"], saved["tokens"]
    if source:
        checkpoint.load(source, engine)
        say(f"resumed from {source}: step {step}, {tokens:,} tokens")
    if weights:
        say("\n".join([f"weights: {config.init_from} ({weights.kind})", *weights.notes]))

    # --- what the run leaves behind
    def open_log() -> MetricsLog:
        checkpoint.remove_leftovers(checkpoints)
        cli.save(config, run_dir / "config.yaml")
        if chosen:
            autotune.write(chosen, run_dir / "tiles.json")
        return MetricsLog(run_dir, step)

    log = together(open_log if rank == 0 else nothing)
    wandb = start_wandb(config, run_dir, dataclasses.asdict(config)) if rank == 0 else None

    def record(figures: dict[str, Any]) -> None:
        if log and wandb:
            log.write(figures)
            wandb.log(figures)

    def note(event: str, **more: Any) -> None:
        if log and wandb:
            log.note(event, step, **more)
            wandb.log({"step": step, f"event/{event}": 1})

    def last_good() -> str:
        complete = checkpoint.complete_checkpoints(checkpoints)
        return f"the last checkpoint is {complete[-1]}" if complete else "there is no checkpoint yet"

    every = config.train
    saver = checkpoint.Saver(checkpoints, every.keep_checkpoints, every.async_checkpoint, every.checkpoint_on_error)
    separator = data.tokenizer.separator if config.model.document_mask else None
    flops = flops_per_token(config.model, config.train.seq_len)
    dist.barrier()  # all ranks measure at once, as they will compute
    peak, peak_name = peak_flops(device, compute)
    counts = parameter_counts(config.model)
    say(f"data: {data.description}")
    vocab, ids = config.model.vocab_size, data.tokenizer.vocab_size
    if vocab > 4 * ids:
        say(
            f"warning: model.vocab_size={vocab}: data.tokenizer={data.tokenizer.spec} has {ids} tokens, the rest are never used"
        )
    say(
        f"model: {counts.total / 1e6:.1f}M parameters, {counts.active / 1e6:.1f}M active a token; "
        f"{config.model.n_experts} experts, {config.model.router.top_k} a token"
    )
    quantized = f", but those of precision={config.precision.recipe} (emulated)" if config.precision.quantized else ""
    say(
        f"ranks: {world} ({device.type}), parallel.expert={expert} ({expert_path(config.parallel, meshes)}), "
        f"parallel.replicate={config.parallel.replicate}; "
        f"{str(compute).removeprefix('torch.')} products{quantized}"
    )
    say(f"MFU is relative to {world} x {peak / 1e9:,.0f} GFLOP/s: {peak_name}")
    say(progress_header())
    note("start", ranks=world, source=source or "")
    deoscillation = Deoscillation(model, engine) if config.precision.deosc_period else None
    if deoscillation:
        deoscillation.start(step)

    # --- the loop
    steps = every.steps
    if step >= steps:
        say(f"nothing to do: {source} is at step {step}, and train.steps={steps}")
    val_loss = None
    logged, evaluated, kept = tokens, saved.get("evaluated", step), step
    guards.listen()  # until here there is nothing to save, and a signal ends a rank at once
    asked = guards.agree(torch.zeros((), device=device), guards.asked())[1]
    profile = Profile(config, engine, device, expert, step, wandb, say) if config.profile != "none" else None
    trace.watch(config.parallel.timeout, run_dir / "hang", print_error)
    reading = (every.global_batch, micro_batches(every.global_batch, every, rank, world))
    ahead = Ahead(lambda first, count: train_batch(data.train, every.seed, first, count), samples, *reading)
    meter = Meter()
    meter.start()
    while True:
        model.precision.begin(min(step, steps - 1), steps)
        # Between steps: look at the data, evaluate, save, leave.
        ended = step >= steps
        evaluating = every.eval_every and (step % every.eval_every == 0 or ended) and evaluated != step and not asked
        saving = (ended or (every.checkpoint_every and step % every.checkpoint_every == 0)) and kept != step
        meter.stop()
        if evaluating or saving:
            together(data_watch.check if first_of_node else nothing, guards.RunEndedError)
        if evaluating:
            losses, asked = evaluate_sets(engine, data.sets, config.train, device, separator)
            if losses:
                evaluated, val_loss = step, losses["val_loss"]
                record({"step": step, "tokens": tokens, **losses})
                say(
                    f"step {step}: "
                    + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
                    + " nats a token"
                )
        if saving or (asked and kept != step):
            guards.check_finite(engine, step, last_good)
            state = {"step": step, "samples": samples, "tokens": tokens, "evaluated": evaluated, "world": world}
            state |= {"data": fingerprint(data), "health": health.state(), "config": dataclasses.asdict(config)}
            with trace.unhurried():
                saver.save(step, engine, state, wait=ended or asked)
            kept = step
            note("checkpoint")
        if ended or asked:
            break
        meter.start()

        # A step. Where loss or gradient is not finite, on any rank, it changes nothing but these counts, on all of them.
        lr = learning_rate(step, steps, config.optim)
        set_lr(engine.optimizer, lr)
        if profile:
            profile.begin(step + 1)
        my_loss, rows_LE, figures_LF = train_step(engine, ahead, config.train, samples, device, separator)
        loss, asked = guards.agree(my_loss, guards.asked())
        norm = engine.step(config.optim.clip, skip=not math.isfinite(loss)).item()
        if profile:
            meter.stop()
            profile.end(rows_LE)
            meter.start()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if deoscillation and (snapped := deoscillation.after(step + 1)) is not None:
            say(f"step {step + 1}: {snapped:,} weights that hopped between two values were put on one")
        if config.model.router.kind == "sigmoid_bias" and finite:
            update_bias(model, total(rows_LE))
        step += 1
        samples += config.train.global_batch
        tokens += config.train.global_batch * config.train.seq_len
        jump = health.see(loss, finite)

        if step % every.log_every == 0 or step == steps or jump or not finite:
            rows_LE, figures_LF = total(rows_LE), total(figures_LF)
            figures = {"step": step, "tokens": tokens, "loss": loss, "grad_norm": norm, "lr": lr}
            steps_since = (tokens - logged) // (every.global_batch * every.seq_len)
            seconds = meter.lap()
            rate = (tokens - logged) / seconds
            logged = tokens
            figures |= {"tokens_per_s": rate, "mfu": rate * flops / (peak * world)}
            figures |= {"skipped": health.skipped, "spikes": health.spikes}
            figures |= load_figures(rows_LE.cpu(), figures_LF.cpu())
            figures |= wire_figures(model.moe_layers(), steps_since, device)
            figures |= {"memory_gib": greatest(memory_gib(device)).item()}
            figures |= data_figures(ahead, data.train, every, samples, seconds, rank, world)
            record(figures)
            say(progress_line(figures, steps))
        if not finite:
            what = "gradient" if math.isfinite(loss) else "loss"
            say(f"warning: step {step} is left out on all ranks: its {what} is not finite")
            note("skipped", what=what)
            health.check(step, last_good)
        if jump:
            say(f"warning: step {step}: its loss, {loss:.4f}, is a jump: {jump:.0f} deviations above those before")
            note("spike", loss=loss)
        if jump and every.on_spike == "rewind":
            with trace.unhurried():
                saver.finish()
                back = checkpoint.newest(checkpoints, say)
            if back is None:
                say("warning: train.on_spike=rewind: there is no checkpoint to go back to yet")
                continue
            saved, jumped_at = checkpoint.read_state(back), step
            health.rewind(saved["step"])
            with trace.unhurried():
                checkpoint.load(back, engine)
            health.restore(saved["health"])
            if deoscillation:
                deoscillation.start(saved["step"])
            step, tokens, evaluated = saved["step"], saved["tokens"], saved["evaluated"]  # but not `samples`
            logged, kept = tokens, step
            if log:
                log = MetricsLog(run_dir, step)
            record({"step": step, "tokens": tokens, "rewound_from": jumped_at})
            note("rewind", jumped_at=jumped_at)
            say(f"went back from step {jumped_at} to {back}; the data read since is passed over")

    end_reading()
    if profile:
        profile.finish()
    trace.unwatch()
    saver.finish()
    dist.barrier()  # rank 0 may be the host of the store in which others still look whether the last save is complete
    if asked and not ended:
        say(
            f"asked to stop: {last_good()}; the same command goes on" if step else "asked to stop before the first step"
        )
    if every.sample and not asked:
        (text,) = sample_texts(
            engine.model, data.tokenizer, [""], every.sample, every.seq_len, seed=every.seed, device=device
        )
        say(f"--- sample\n{text}\n---")
    note("stopped" if asked and not ended else "end")
    if log and wandb:
        report.at_end(run_dir)
        wandb.finish()
    if val_loss is not None:
        say(f"final val_loss {val_loss:.4f}")
    elsewhere = f"; {checkpoints}" if every.checkpoint_dir else ""
    say(
        f"files: {run_dir}/metrics.jsonl, report.html, config.yaml, {'' if elsewhere else 'checkpoints/, '}wandb/{elsewhere}"
    )


def train_step(
    engine: Engine,
    stream: TokenStream | Ahead,
    config: TrainConfig,
    first_sample: int,
    device: torch.device,
    separator: int | None,
) -> list[torch.Tensor]:
    """Gradients of one global batch, added into the parameters' `.grad`.

    Each micro-batch gathers the weights and adds its gradients over the ranks at once: more traffic than holding whole
    gradients until the last one, and no more memory than a single micro-batch needs.

    Returns this rank's part of the loss, fp32 scalar, its rows per MoE layer and expert, int64 (L, E), and its routing figures,
    fp32 (L, 6), as in moesaic.moe.model.Output; their sums over ranks are the step's.
    """
    sums: list[torch.Tensor] = []
    global_tokens = config.global_batch * config.seq_len
    my_batches = micro_batches(config.global_batch, config, dist.get_rank(), dist.get_world_size())
    for i, (first, count) in enumerate(my_batches, 1):
        batch = torch.from_numpy(train_batch(stream, config.seed, first_sample + first, count)).to(device)
        engine.model.precision.tokens(first_sample + first, count, config.seq_len, device)
        out = predict(engine.model, batch, separator)
        assert out.loss is not None
        share = count * config.seq_len / global_tokens
        engine.backward(out.loss / global_tokens + out.aux * share, last=i == len(my_batches))
        parts = [out.loss.detach() / global_tokens, out.counts, out.figures]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    engine.model.precision.tokens(None)
    return sums


def predict(model: Transformer, batch: torch.Tensor, separator: int | None) -> Output:
    """The model's losses over sequences (B, S + 1): with a `separator`, a token sees its own document only."""
    tokens, targets = batch[:, :-1], batch[:, 1:]
    return model(tokens, targets, None if separator is None else document_ids(tokens, separator))


def micro_batches(sequences: int, config: TrainConfig, rank: int, world: int) -> list[tuple[int, int]]:
    """(first, count) of each micro-batch of `rank`, of `sequences` dealt to all ranks in order.

    Every rank gets equally many micro-batches, for each is a collective: where a share is smaller, the last ones hold fewer
    sequences, or none.
    """
    largest = -(-sequences // world)
    micro = config.micro_batch
    if micro is None:
        micro = -(-largest // -(-largest * config.seq_len // MICRO_BATCH_TOKENS))
    first = rank * (sequences // world) + min(rank, sequences % world)
    end = first + sequences // world + (rank < sequences % world)
    return [
        (min(first + i * micro, end), max(0, min(micro, end - first - i * micro))) for i in range(-(-largest // micro))
    ]


def most_tokens(config: TrainConfig) -> int:
    """Tokens of a micro-batch, at most, in training and evaluation, whatever remains for the last batch."""
    micro = config.micro_batch
    if micro is None:
        micro = min(config.global_batch, max(1, MICRO_BATCH_TOKENS // config.seq_len))
    return micro * config.seq_len


def evaluate_sets(
    engine: Engine, sets: dict[str, TokenStream], config: TrainConfig, device: torch.device, separator: int | None
) -> tuple[dict[str, float], bool]:
    """val_loss over all sets, in proportion to the sequences looked at, and val_loss/NAME of those that have names; nothing
    where a rank was asked to stop meanwhile."""
    losses: dict[str, float] = {}
    weighted = sequences = 0.0
    for name, stream in sets.items():
        loss, asked = evaluate(engine, stream, config, device, separator)
        if loss is None:
            return {}, asked
        looked_at = min(config.eval_batches * config.global_batch, stream.windows)
        weighted, sequences = weighted + loss * looked_at, sequences + looked_at
        losses |= {f"val_loss/{name}": loss} if name else {}
    return {"val_loss": weighted / sequences, **losses}, asked


@torch.no_grad()
def evaluate(
    engine: Engine, stream: TokenStream, config: TrainConfig, device: torch.device, separator: int | None
) -> tuple[float | None, bool]:
    """Mean cross entropy, nats a token, over the first `eval_batches * global_batch` held-out sequences (or all there are), and
    whether a rank was asked to stop meanwhile: then there is no mean."""
    engine.model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    sequences = min(config.eval_batches * config.global_batch, stream.windows)
    for start_at in range(0, sequences, config.global_batch):
        batch_size = min(config.global_batch, sequences - start_at)
        for first, count in micro_batches(batch_size, config, dist.get_rank(), dist.get_world_size()):
            batch = torch.from_numpy(val_batch(stream, start_at + first, count)).to(device)
            out = predict(engine.model, batch, separator)
            assert out.loss is not None
            loss += out.loss
        if asked := guards.agree(loss, guards.asked())[1]:
            break
    engine.model.train()
    engine.rest()
    return (None if asked else total(loss).item() / (sequences * config.seq_len)), asked


def check_devices() -> None:
    """Refuse more ranks than GPUs on this machine, where any rank would fail in a way of its own."""
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if torch.cuda.is_available() and ranks > gpus:
        raise cli.UserError(f"--nproc-per-node={ranks}: must not exceed the number of GPUs here, {gpus}")


def check_tiles(config: Config, device: torch.device) -> None:
    """Raises ValueError where rounding is on, or the kernels are asked for, and the device's tiles are not known."""
    if config.model.router.rounding != "none":
        rounding_tile(device, config.model.router.rounding_tile)
    if config.model.experts_backend == "triton" and not known_tile(device):
        raise ValueError(f"model.experts_backend=triton: no tiles are known for {device}, only for {', '.join(TILES)}")


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


def check_root(url: str | None) -> None:
    """Raises ValueError where `train.checkpoint_dir` is a URL that can't be opened here."""
    try:
        storage.check_root(url or "")
    except ValueError as error:
        raise ValueError(f"train.checkpoint_dir={error}") from error


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


def print_now(line: str) -> None:
    print(line, flush=True)


def print_error(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    faulthandler.enable()  # a data file that was cut short under a mapping ends the process with SIGBUS
    leave_after(lambda: cli.run(main))
