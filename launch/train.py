"""Train a Mixture-of-Experts language model. Read it from top to bottom.

    torchrun --nproc-per-node 2 launch/train.py recipe=tiny_moe run_dir=runs/demo
    torchrun --nproc-per-node 8 launch/train.py recipe=7b_moe data.files=data/corpus data.tokenizer=data/corpus
    torchrun --nproc-per-node 8 launch/train.py recipe=continue_hf init_from=models/olmoe data.tokenizer=models/olmoe …

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
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesaic.kernels import autotune
from moesaic.kernels.symmetric import FusedError, HeapError, LostError
from moesaic.launch import cli, guards, report
from moesaic.launch.batches import micro_batches, most_tokens
from moesaic.launch.collectives_report import Profile
from moesaic.launch.data import TokenStream, fingerprint, open_data, train_batch, val_batch
from moesaic.launch.generate import sample_texts
from moesaic.launch.metrics import (
    TOLD_AGAIN,
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
from moesaic.launch.startup import (
    agree_on,
    check_devices,
    check_resume,
    check_root,
    check_same_data,
    check_tiles,
    choose_tiles,
    compute_dtype,
    find_checkpoint,
    make_run_dir,
    nothing,
    settle_model,
    together,
)
from moesaic.launch.tokens import check_vocab
from moesaic.moe.attention import document_ids
from moesaic.moe.balance import load_figures, update_bias
from moesaic.moe.flops import flops_per_token, parameter_counts
from moesaic.moe.model import Output, Transformer
from moesaic.moe.precision import without_effect
from moesaic.parallel import checkpoint, trace
from moesaic.parallel.apart import products_inside
from moesaic.parallel.apply import expert_path, greatest, parallelize, start_engine, total
from moesaic.parallel.deoscillate import Deoscillation
from moesaic.parallel.engine import Engine
from moesaic.parallel.expert import wire_figures
from moesaic.parallel.fused import check_fused, settle
from moesaic.parallel.mesh import check_degrees, end, end_with_parent, expert_degree, leave_after, make_meshes, start
from moesaic.parallel.overload import OverloadError
from moesaic.parallel.two_hop import node_ranks


def main(config: Config) -> None:
    end_with_parent(PARENT)
    check_devices()
    device = start()
    try:
        train(config, device)
    except OverloadError as error:
        raise cli.UserError(str(error)) from error
    except LostError as error:
        raise guards.HungError(str(error)) from error
    except (checkpoint.SaveError, FusedError, HeapError) as error:
        raise guards.RunEndedError(str(error)) from error
    finally:
        end_reading()
        guards.end_listening()
        trace.unwatch()
        end(device)


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
    if config.parallel.expert_path == "fused":
        together(lambda: check_fused(config.parallel, expert, device))
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

    if log and wandb:
        for figures in log.newest(TOLD_AGAIN):
            wandb.log(figures)

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
    for line in without_effect(config.precision, every.steps):
        say(f"warning: {line}")
    quantized = ""
    if config.precision.quantized:
        told = model.precision.told(device)
        if config.parallel.expert_path == "fused" and config.precision.quantizes("experts"):
            where = "in" if products_inside(config.precision, device) else "apart from"
            told += f", those of routed experts {where} the fused kernels"
        quantized = f", but those of precision={config.precision.recipe} ({told})"
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
            settle(model)
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
        my_loss, rows_LE, figures_LF, my_losses_B = train_step(engine, ahead, config.train, samples, device, separator)
        loss, asked = guards.agree(my_loss, guards.asked())
        settle(model)
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
            figures |= data_figures(ahead, data.train, every, samples, my_losses_B, seconds, rank, world)
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
        settle(model)
        say(f"--- sample\n{text}\n---")
    note("stopped" if asked and not ended else "end")
    if log and wandb:
        report.at_end(run_dir)
        wandb.finish()
    if val_loss is not None:
        say(f"final val_loss {val_loss:.4f}")
    files = ["metrics.jsonl", "report.html", "config.yaml"]
    files += ["checkpoints/"] * (not every.checkpoint_dir) + ["wandb/"] * (config.wandb.mode != "disabled")
    say(f"files: {run_dir}/{', '.join(files)}" + (f"; {checkpoints}" if every.checkpoint_dir else ""))


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
    fp32 (L, 6), as in moesaic.moe.model.Output; their sums over ranks are the step's. And of each of this rank's sequences, in
    order, the sum of its cross entropies, fp32 (B,).
    """
    sums: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    global_tokens = config.global_batch * config.seq_len
    my_batches = micro_batches(config.global_batch, config, dist.get_rank(), dist.get_world_size())
    for i, (first, count) in enumerate(my_batches, 1):
        batch = to_device(train_batch(stream, config.seed, first_sample + first, count), device)
        engine.model.precision.tokens(first_sample + first, count, config.seq_len, device)
        out = predict(engine.model, batch, separator)
        assert out.loss is not None and out.losses is not None
        losses.append(out.losses)
        share = count * config.seq_len / global_tokens
        engine.backward(out.loss / global_tokens + out.aux * share, last=i == len(my_batches))
        parts = [out.loss.detach() / global_tokens, out.counts, out.figures]
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
    engine.model.precision.tokens(None)
    return [*sums, torch.cat(losses)]


def to_device(batch: np.ndarray, device: torch.device) -> torch.Tensor:
    """To a GPU from locked memory: else the host would wait there for all that the GPU has yet to do."""
    host = torch.from_numpy(batch)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def predict(model: Transformer, batch: torch.Tensor, separator: int | None) -> Output:
    """The model's losses over sequences (B, S + 1): with a `separator`, a token sees its own document only."""
    tokens, targets = batch[:, :-1], batch[:, 1:]
    return model(tokens, targets, None if separator is None else document_ids(tokens, separator))


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
            batch = to_device(val_batch(stream, start_at + first, count), device)
            out = predict(engine.model, batch, separator)
            assert out.loss is not None
            loss += out.loss
        if asked := guards.agree(loss, guards.asked())[1]:
            break
    engine.model.train()
    engine.rest()
    return (None if asked else total(loss).item() / (sequences * config.seq_len)), asked


def print_now(line: str) -> None:
    print(line, flush=True)


def print_error(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    faulthandler.enable()  # a data file that was cut short under a mapping ends the process with SIGBUS
    leave_after(lambda: cli.run(main, in_jobs=True))
