"""Write the model of a run as a Hugging Face folder: config.json, safetensors, tokenizer. One process, tensor by tensor.

python launch/export.py run_dir=runs/demo out=demo-hf family=qwen3_moe dtype=bf16 max_shard_gb=5
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from torch import Tensor

from moesaic.launch import cli, options
from moesaic.launch.generate import newest_checkpoint
from moesaic.launch.tokens import BYTES, Tokenizer, load_tokenizer
from moesaic.moe.hf import new_folder, tensor_shapes, write_tensors
from moesaic.moe.hf_config import format_config
from moesaic.parallel import checkpoint

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Beside a tokenizer.json: what says how it is used.
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass
class Options:
    """run_dir: a run, or one checkpoint of it; out: a folder to make; family: olmoe, mixtral, qwen3_moe or deepseek_v3;
    dtype: bf16 or fp32; max_shard_gb: largest file."""

    run_dir: str = ""
    out: str = ""
    family: str = ""
    dtype: str = "bf16"
    max_shard_gb: float = 5.0


def main(choice: Options) -> None:
    dtype, size = chosen_dtype(choice.dtype), chosen_size(choice.max_shard_gb)
    path = newest_checkpoint(choice.run_dir)
    config = cli.from_dict(checkpoint.read_state(path)["config"])
    tokenizer = load_tokenizer(config.data.tokenizer)
    values = format_config(
        config.model, choice.family, positions=config.train.seq_len, dtype=name_of(dtype), separator=tokenizer.separator
    )
    shapes = tensor_shapes(config.model)

    def read(name: str) -> Tensor:
        value = torch.empty(shapes[name], dtype=torch.float32)
        checkpoint.load_tensors(path, {name: value})
        return value

    with new_folder(Path(choice.out)) as folder:
        write_json(folder / "config.json", values)
        write_json(folder / "generation_config.json", {k: values[k] for k in ("bos_token_id", "eos_token_id")})
        write_tokenizer(folder, tokenizer, config.train.seq_len)
        write_tensors(folder, config.model, choice.family, read, dtype=dtype, max_bytes=size, say=print_now)
    print_now(f"{choice.out}: {path} as {choice.family}, {name_of(dtype)}")


def write_tokenizer(folder: Path, tokenizer: Tokenizer, positions: int) -> None:
    """tokenizer.json, and how transformers is to use it: the files beside the original, or what follows from the separator."""
    # Of a file the original, for `backend` was told to treat special tokens as text.
    text = bytes_tokenizer().to_str() if tokenizer.backend is None else Path(tokenizer.spec).read_text()
    (folder / "tokenizer.json").write_text(text)
    beside = [] if tokenizer.spec == BYTES else [Path(tokenizer.spec).with_name(name) for name in TOKENIZER_FILES]
    for file in beside:
        if file.is_file():
            shutil.copy(file, folder)
    if not (folder / TOKENIZER_FILES[0]).exists():
        separator = tokenizers.Tokenizer.from_str(text).id_to_token(tokenizer.separator)
        uses = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": separator, "eos_token": separator}
        write_json(folder / TOKENIZER_FILES[0], uses | {"model_max_length": positions})


def bytes_tokenizer() -> tokenizers.Tokenizer:
    """The `bytes` of data.tokenizer as a Hugging Face tokenizer: ids 0..255 are bytes, 256 is the separator."""
    # The byte-level alphabet writes the printable bytes as themselves and the others, in order, as U+0100 and on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|doc|>"])
    return tokenizer


def chosen_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype={name}: must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def chosen_size(gigabytes: float) -> int:
    if not gigabytes > 0:
        raise ValueError(f"max_shard_gb={gigabytes}: must be positive")
    return int(min(gigabytes, 1e6) * 1e9)


def name_of(dtype: torch.dtype) -> str:
    """As config.json calls it."""
    return str(dtype).removeprefix("torch.")


def write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def print_now(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    options.run(main, Options, __doc__)
