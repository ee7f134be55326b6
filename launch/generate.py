"""Write text with a trained model, in one process.

python launch/generate.py run_dir=runs/demo prompt='def ' tokens=200 temperature=0.8 top_k=50 seed=0
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesaic.launch import cli, options
from moesaic.launch.tokens import Tokenizer, load_tokenizer
from moesaic.moe.model import Transformer, build
from moesaic.parallel import checkpoint, storage


@dataclass
class Options:
    """run_dir: a run, or one checkpoint of it; top_k=0 samples from the whole vocabulary, temperature=0 takes the best token."""

    run_dir: str = ""
    prompt: str = ""
    tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    seed: int = 0


@torch.no_grad()
def sample_tokens(
    model: Transformer, prompt_S: Tensor, tokens: int, context: int, *, temperature: float, top_k: int, seed: int
) -> list[int]:
    """`tokens` ids after the prompt (int64, at least one), each from the last `context` ids. Every rank of a spread model
    must call it, with the same arguments; all get the same ids, for they draw from the same seed on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    ids = prompt_S.tolist()
    model.eval()
    for _ in range(tokens):
        logits = model(torch.tensor([ids[-context:]], device=prompt_S.device)).logits[0, -1].float().cpu()
        if temperature == 0:
            ids.append(int(logits.argmax()))
            continue
        if 0 < top_k < logits.numel():
            logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
        logits -= logits.max()  # so that a very low temperature divides to -inf, never to inf
        ids.append(int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)))
    model.train()
    return ids[prompt_S.numel() :]


def sample_text(
    model: Transformer, tokenizer: Tokenizer, prompt: str, tokens: int, context: int, *,
    temperature: float = 0.8, top_k: int = 0, seed: int = 0, device: torch.device,
) -> str:  # fmt: skip
    """Prompt and continuation. The model first sees the separator, as at the start of every document it learnt from."""
    ids = torch.tensor([tokenizer.separator, *tokenizer.encode(prompt).tolist()], device=device)
    new = sample_tokens(model, ids, tokens, context, temperature=temperature, top_k=top_k, seed=seed)
    return prompt + tokenizer.decode(new)


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


def main(choice: Options) -> None:
    for name in ("tokens", "temperature", "top_k"):
        if getattr(choice, name) < 0:
            raise ValueError(f"{name}={getattr(choice, name)}: must not be negative")
    if not math.isfinite(choice.temperature):
        raise ValueError(f"temperature={choice.temperature}: must be a finite number")
    path = newest_checkpoint(choice.run_dir)
    config = cli.from_dict(checkpoint.read_state(path)["config"])
    tokenizer = load_tokenizer(config.data.tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(config.model, 0, device)
    checkpoint.load_model(path, model)
    knobs = {name: getattr(choice, name) for name in ("temperature", "top_k", "seed")}
    print(sample_text(model, tokenizer, choice.prompt, choice.tokens, config.train.seq_len, device=device, **knobs))


if __name__ == "__main__":
    options.run(main, Options, __doc__)
