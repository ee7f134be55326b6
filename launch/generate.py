"""Write text with a trained model, in one process.

python launch/generate.py run_dir=runs/demo prompt='def ' tokens=200 temperature=0.8 top_k=50 seed=0
python launch/generate.py run_dir=runs/demo prompts=prompts.txt batch=16       a prompt a line; a JSON object a line comes out
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.launch import cli, options
from moesaic.launch.schema import Config
from moesaic.launch.tokens import Tokenizer, load_tokenizer
from moesaic.moe.attention import KVCache
from moesaic.moe.model import Transformer, build
from moesaic.parallel import checkpoint, storage


@dataclass
class Options:
    """run_dir: a run, or one checkpoint of it; prompts: a file of them, `batch` at once; top_k=0 samples from
    the whole vocabulary, temperature=0 takes the best token."""

    run_dir: str = ""
    prompt: str = ""
    prompts: str = ""
    batch: int = 16
    tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    seed: int = 0


@torch.no_grad()
def sample_tokens(
    model: Transformer, prompts: Sequence[Tensor], tokens: int, context: int, *, temperature: float, top_k: int, seed: int,
    ends: Callable[[int, list[int]], bool] = lambda row, new: False,
) -> list[list[int]]:  # fmt: skip
    """`tokens` ids after each of the prompts (int64, at least one id), each from the last `context` ids; none are made any more
    once `ends(row, ids so far)` was true of all rows. Every rank of a spread model must call it, with the same arguments; all get
    the same ids, those of rank 0, which draws on the CPU from the seeds seed + row.

    Up to `context` ids, keys and values are kept and a step computes one new position of each prompt, padded on the left. Beyond,
    the window moves, with it what every position has seen, and each step computes all of it.
    """
    device = prompts[0].device
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    ids = [prompt.tolist() for prompt in prompts]
    done = [False] * len(prompts)
    attentions = [block.attention for block in getattr(model, "blocks", [])]
    length = max(map(len, ids))
    pads = [length - len(row) for row in ids]
    for attention in attentions:
        attention.cache = KVCache(torch.tensor(pads, device=device))
    seen = 0  # positions that the caches hold
    model.eval()
    try:
        for _ in range(tokens):
            cached = bool(attentions) and length <= context
            if cached:
                rows = [[0] * pad + row for pad, row in zip(pads, ids, strict=True)]
                batch = torch.tensor([row[seen:] for row in rows], device=device)
                logits_BV = model(batch, start=seen).logits[:, -1].float().cpu()
                seen = length
            else:
                for attention in attentions:
                    attention.cache = None
                logits_BV = torch.cat([
                    model(torch.tensor([row[-context:]], device=device)).logits[:, -1].float().cpu() for row in ids
                ])  # fmt: skip
            next_B = torch.zeros(len(ids), dtype=torch.int64)
            if not dist.is_initialized() or dist.get_rank() == 0:
                picked = zip(logits_BV, generators, strict=True)
                next_B = torch.tensor([chosen(logits_V, temperature, top_k, g) for logits_V, g in picked])
            if dist.is_initialized():  # ranks whose logits differ in a bit would call the model another number of times
                next_B = next_B.to(device)
                dist.broadcast(next_B, src=0)
            for row, token in enumerate(next_B.tolist()):
                ids[row].append(token)
                done[row] = done[row] or ends(row, ids[row][prompts[row].numel() :])
            length += 1
            if all(done):
                break
    finally:
        for attention in attentions:
            attention.cache = None
        model.train()
    return [row[prompt.numel() :] for row, prompt in zip(ids, prompts, strict=True)]


def chosen(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if 0 < top_k < logits_V.numel():
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], -torch.inf)
    logits_V = logits_V - logits_V.max()  # so that a very low temperature divides to -inf, never to inf
    return int(torch.multinomial((logits_V / temperature).softmax(0), 1, generator=generator))


def sample_texts(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int, context: int, *,
    temperature: float = 0.8, top_k: int = 0, seed: int = 0, device: torch.device,
) -> list[str]:  # fmt: skip
    """Prompts and continuations. The model first sees the separator, as at the start of every document it learnt from."""
    ids = [torch.tensor([tokenizer.separator, *tokenizer.encode(one).tolist()], device=device) for one in prompts]
    new = sample_tokens(model, ids, tokens, context, temperature=temperature, top_k=top_k, seed=seed)
    return [prompt + tokenizer.decode(row) for prompt, row in zip(prompts, new, strict=True)]


def newest_checkpoint(run_dir: str) -> str:
    """`run_dir` itself if it is a checkpoint, else the newest complete one of the run, or of a folder that holds checkpoints
    alone. Raises ValueError where there is none."""
    path = os.path.expanduser(run_dir).rstrip("/")
    if run_dir:
        checkpoint.refuse_pickles(path)
        if checkpoint.is_checkpoint(path):
            return path
    found = checkpoint.complete_checkpoints(checkpoint_root(path)) if run_dir else []
    if not found:
        raise ValueError(f"run_dir={run_dir}: must be a run that holds a checkpoint, or a checkpoint")
    return found[-1]


def checkpoint_root(run_dir: str) -> str:
    """Where the checkpoints of a run are: where its configuration says, else in itself."""
    config = Path(run_dir) / "config.yaml"
    where = cli.load(config).train.checkpoint_dir if config.is_file() else None
    inside = f"{run_dir}/checkpoints"
    return where or (inside if storage.names(inside) else run_dir)


def read_prompts(path: str) -> list[str]:
    """A prompt a line. Raises ValueError."""
    try:
        prompts = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        told = error.strerror if isinstance(error, OSError) else f"not UTF-8: {error}"
        raise ValueError(f"prompts={path}: cannot be read ({told})") from error
    if not prompts:
        raise ValueError(f"prompts={path}: holds no prompt")
    return prompts


def main(choice: Options) -> None:
    for name in ("tokens", "temperature", "top_k"):
        if getattr(choice, name) < 0:
            raise ValueError(f"{name}={getattr(choice, name)}: must not be negative")
    if not math.isfinite(choice.temperature):
        raise ValueError(f"temperature={choice.temperature}: must be a finite number")
    if choice.batch < 1:
        raise ValueError(f"batch={choice.batch}: must be at least 1")
    prompts = read_prompts(choice.prompts) if choice.prompts else [choice.prompt]
    path = newest_checkpoint(choice.run_dir)
    config, tokenizer, model, device = load_run(path)
    knobs = {name: getattr(choice, name) for name in ("temperature", "top_k", "seed")}
    for first in range(0, len(prompts), choice.batch):
        some = prompts[first : first + choice.batch]
        knobs["seed"] = choice.seed + first
        texts = sample_texts(model, tokenizer, some, choice.tokens, config.train.seq_len, device=device, **knobs)
        for prompt, text in zip(some, texts, strict=True):
            print(json.dumps({"prompt": prompt, "text": text}) if choice.prompts else text, flush=True)


def load_run(path: str) -> tuple[Config, Tokenizer, Transformer, torch.device]:
    """Configuration, tokenizer and model of a checkpoint, the model on the GPU where there is one."""
    config = cli.from_dict(checkpoint.read_state(path)["config"])
    tokenizer = load_tokenizer(config.data.tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(config.model, 0, device)
    checkpoint.load_model(path, model)
    return config, tokenizer, model, device


if __name__ == "__main__":
    options.run(main, Options, __doc__)
