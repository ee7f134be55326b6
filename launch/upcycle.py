"""Make a Mixture of Experts from a dense Llama, Mistral or Qwen3 model: every expert starts as its feed-forward layer.

python launch/upcycle.py dense=models/Llama-2-7b-hf out=llama-8x experts=8 top_k=2
torchrun --nproc-per-node 8 launch/train.py recipe=continue_hf init_from=llama-8x data.tokenizer=llama-8x data.files=data/corpus

The result is a Mixtral (of a Llama or Mistral) or a Qwen3-MoE (of a Qwen3), and computes what the dense model does: a token's
K weights add up to 1, and its experts are equal (Sparse Upcycling, arXiv 2212.05055). With `noise`, they differ from the start.

With d_expert = d / G of a dense width d, an expert is one of G slices of a copy. The slices of a copy share their row of the
router, so a token, with K a multiple of G, gets whole copies; their outputs are G times larger, for each has 1/G of the
copy's weight. Training parts the slices, which then are experts of their own (arXiv 2410.07524).
"""

import dataclasses
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesaic.launch import options
from moesaic.launch.export import DTYPES, TOKENIZER_FILES, chosen_dtype, chosen_size, name_of, print_now, write_json
from moesaic.moe.config import ModelConfig, RouterConfig, require
from moesaic.moe.hf import Checkpoint, new_folder, tensor_shapes, write_tensors
from moesaic.moe.hf_config import format_config
from moesaic.moe.model import init_parameter

FAMILY = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}


@dataclass
class Options:
    """dense: a folder with config.json and safetensors; out: a folder to make; noise: standard deviation of what is added to each
    expert's weights, in units of theirs; d_expert: width of an expert (0: that of the dense layer); dtype: bf16 or fp32 (auto:
    the dense model's)."""

    dense: str = ""
    out: str = ""
    experts: int = 8
    top_k: int = 2
    d_expert: int = 0
    noise: float = 0.0
    seed: int = 0
    dtype: str = "auto"
    max_shard_gb: float = 5.0


def upcycled(dense: ModelConfig, experts: int, top_k: int, d_expert: int = 0) -> ModelConfig:
    """The shape of the model with experts. Raises ValueError naming the option that does not fit."""
    width = d_expert or dense.d_dense
    require(width > 0 and dense.d_dense % width == 0,
            f"d_expert={d_expert}: must divide the width of the dense layer, {dense.d_dense}")  # fmt: skip
    slices = dense.d_dense // width
    require(1 <= top_k <= experts, f"top_k={top_k}: must lie in 1..experts={experts}")
    for name, value in (("experts", experts), ("top_k", top_k)):
        require(value % slices == 0, f"{name}={value}: must be a multiple of {slices}, the slices of the dense layer that "
                f"d_expert={d_expert} makes")  # fmt: skip
    router = RouterConfig(top_k=top_k, renormalize=True, balance_over="layers", balance_coef=0.01 * top_k, z_coef=0.0)
    return dataclasses.replace(dense, n_dense_layers=0, d_dense=0, n_experts=experts, d_expert=width, router=router)


def make_tensor(name: str, dense: Checkpoint, config: ModelConfig, noise: float, seed: int) -> Tensor:
    """The parameter `name` of the model with experts, fp32."""
    slices = dense.config.d_dense // config.d_expert
    if ".router." in name:
        # One row for a copy, so that all its slices are chosen together.
        rows = torch.empty(config.n_experts // slices, config.d_model)
        init_parameter(name, rows, config, seed)
        return rows.repeat_interleave(slices, dim=0)
    if ".experts." not in name:
        return dense.read(name)
    whole = dense.read(name.replace("experts.w_up_EGD", "w_up.weight").replace("experts.w_down_EDF", "w_down.weight"))
    if "w_up" in name:
        parts = whole.view(2, slices, config.d_expert, -1).transpose(0, 1).reshape(slices, 2 * config.d_expert, -1)
    else:
        parts = whole.view(-1, slices, config.d_expert).transpose(0, 1) * slices
    result = parts.repeat(config.n_experts // slices, 1, 1)
    if noise:
        scale = noise * parts.std()
        for expert, weights in enumerate(result):
            digest = hashlib.sha256(f"{seed}:{name}:{expert}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            weights += scale * torch.randn(weights.shape, generator=generator)
    return result


def main(choice: Options) -> None:
    size = chosen_size(choice.max_shard_gb)
    require(choice.dense != "", "dense=: must be a folder with config.json and safetensors")
    require(choice.noise >= 0, f"noise={choice.noise}: must not be negative")
    dense = Checkpoint(choice.dense)
    require(
        dense.kind in FAMILY,
        f"dense={choice.dense}: {dense.kind} has experts already; must be one of {', '.join(FAMILY)}",
    )
    kind = FAMILY[dense.kind]
    own = {"bfloat16": "bf16", "float16": "bf16"}.get(dense.dtype, "fp32")
    dtype = DTYPES[own] if choice.dtype == "auto" else chosen_dtype(choice.dtype)
    config = upcycled(dense.config, choice.experts, choice.top_k, choice.d_expert)
    positions = dense.values.get("max_position_embeddings", 4096)
    values = format_config(config, kind, positions=positions, dtype=name_of(dtype))
    values |= {key: dense.values.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with new_folder(Path(choice.out)) as folder:
        write_json(folder / "config.json", values)
        for name in ("tokenizer.json", "tokenizer.model", "generation_config.json", *TOKENIZER_FILES):
            if (dense.folder / name).is_file():
                shutil.copy(dense.folder / name, folder)
        write_tensors(
            folder, config, kind, lambda name: make_tensor(name, dense, config, choice.noise, choice.seed),
            dtype=dtype, max_bytes=size, say=print_now,
        )  # fmt: skip
    gain = sum(s.numel() for s in tensor_shapes(config).values()) / sum(
        s.numel() for s in tensor_shapes(dense.config).values()
    )
    print_now(f"{choice.out}: {choice.dense} as {kind}, {choice.experts} experts, {gain:.1f} times the parameters")


if __name__ == "__main__":
    options.run(main, Options, __doc__)
