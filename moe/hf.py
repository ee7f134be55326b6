"""Hugging Face checkpoints: a folder with config.json and safetensors, read and written tensor by tensor.

One table a family says where each of our parameters lies in the files, whole or in pieces: queries, keys and values are one
matrix here and three there, gate and up projections one here and two there, a layer's experts one tensor here and 3 E there.
The same table serves both directions.

Nothing in a folder is ever run: JSON and safetensors are read, pickles are refused. At no time is there more in memory than one
of our parameters and one tensor of a file; writing, one file.

Letters: L layers, E experts, F width of an expert, D model width.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moesaic.moe.config import ModelConfig, require
from moesaic.moe.hf_config import FAMILIES, check_family, parse_config, read_config, read_json
from moesaic.moe.model import Transformer

__all__ = ["FAMILIES", "Checkpoint", "Piece", "layouts", "new_folder", "read_config", "tensor_shapes", "write_tensors"]

# ---------------------------------------------------------------- names

# Ours -> theirs; l is the layer, e each expert in turn. Several names: stacked along the rows of ours, in this order.
Table = dict[str, tuple[str, ...]]
_COMMON: Table = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    "blocks.l.attention_norm.weight": ("model.layers.l.input_layernorm.weight",),
    "blocks.l.ffn_norm.weight": ("model.layers.l.post_attention_layernorm.weight",),
    "blocks.l.attention.wo.weight": ("model.layers.l.self_attn.o_proj.weight",),
}
_GQA: Table = {
    "blocks.l.attention.wqkv.weight": (
        "model.layers.l.self_attn.q_proj.weight",
        "model.layers.l.self_attn.k_proj.weight",
        "model.layers.l.self_attn.v_proj.weight",
    ),
}
_QK_NORMS: Table = {
    "blocks.l.attention.q_norm.weight": ("model.layers.l.self_attn.q_norm.weight",),
    "blocks.l.attention.k_norm.weight": ("model.layers.l.self_attn.k_norm.weight",),
}
_MLA: Table = {
    "blocks.l.attention.wq.weight": ("model.layers.l.self_attn.q_proj.weight",),
    "blocks.l.attention.wq_a.weight": ("model.layers.l.self_attn.q_a_proj.weight",),
    "blocks.l.attention.q_norm.weight": ("model.layers.l.self_attn.q_a_layernorm.weight",),
    "blocks.l.attention.wq_b.weight": ("model.layers.l.self_attn.q_b_proj.weight",),
    "blocks.l.attention.wkv_a.weight": ("model.layers.l.self_attn.kv_a_proj_with_mqa.weight",),
    "blocks.l.attention.kv_norm.weight": ("model.layers.l.self_attn.kv_a_layernorm.weight",),
    "blocks.l.attention.wkv_b.weight": ("model.layers.l.self_attn.kv_b_proj.weight",),
}
_DENSE: Table = {
    "blocks.l.ffn.w_up.weight": ("model.layers.l.mlp.gate_proj.weight", "model.layers.l.mlp.up_proj.weight"),
    "blocks.l.ffn.w_down.weight": ("model.layers.l.mlp.down_proj.weight",),
}
_EXPERTS: Table = {
    "blocks.l.ffn.router.weight_ED": ("model.layers.l.mlp.gate.weight",),
    "blocks.l.ffn.experts.w_up_EGD": (
        "model.layers.l.mlp.experts.e.gate_proj.weight",
        "model.layers.l.mlp.experts.e.up_proj.weight",
    ),
    "blocks.l.ffn.experts.w_down_EDF": ("model.layers.l.mlp.experts.e.down_proj.weight",),
}
_MIXTRAL: Table = {
    "blocks.l.ffn.router.weight_ED": ("model.layers.l.block_sparse_moe.gate.weight",),
    "blocks.l.ffn.experts.w_up_EGD": (
        "model.layers.l.block_sparse_moe.experts.e.w1.weight",
        "model.layers.l.block_sparse_moe.experts.e.w3.weight",
    ),
    "blocks.l.ffn.experts.w_down_EDF": ("model.layers.l.block_sparse_moe.experts.e.w2.weight",),
}
_DEEPSEEK: Table = {
    "blocks.l.ffn.router.bias_E": ("model.layers.l.mlp.gate.e_score_correction_bias",),
    "blocks.l.ffn.shared.w_up.weight": (
        "model.layers.l.mlp.shared_experts.gate_proj.weight",
        "model.layers.l.mlp.shared_experts.up_proj.weight",
    ),
    "blocks.l.ffn.shared.w_down.weight": ("model.layers.l.mlp.shared_experts.down_proj.weight",),
}
TABLES: dict[str, Table] = {
    "olmoe": _COMMON | _GQA | _QK_NORMS | _EXPERTS,
    "mixtral": _COMMON | _GQA | _MIXTRAL,
    "qwen3_moe": _COMMON | _GQA | _QK_NORMS | _EXPERTS | _DENSE,
    "deepseek_v3": _COMMON | _MLA | _EXPERTS | _DENSE | _DEEPSEEK,
    "llama": _COMMON | _GQA | _DENSE,
    "mistral": _COMMON | _GQA | _DENSE,
    "qwen3": _COMMON | _GQA | _QK_NORMS | _DENSE,
}
# How transformers 5 holds every family's experts in memory, and may save them: shaped as ours.
_FUSED: Table = {
    "blocks.l.ffn.router.weight_ED": ("model.layers.l.mlp.gate.weight",),
    "blocks.l.ffn.experts.w_up_EGD": ("model.layers.l.mlp.experts.gate_up_proj",),
    "blocks.l.ffn.experts.w_down_EDF": ("model.layers.l.mlp.experts.down_proj",),
}


@dataclass(frozen=True)
class Piece:
    """A tensor of a file and its place in one of our parameters: `parameter[place]`."""

    name: str
    place: tuple[int | slice, ...]


def layouts(config: ModelConfig, kind: str, name: str) -> list[list[Piece]]:
    """The ways in which a model of family `kind` may hold our parameter `name`: as published, then as transformers 5 fuses it."""
    if name == "head.weight" and config.tie_embeddings:
        name = "embedding.weight"
    layer = re.match(r"blocks\.(\d+)\.", name)
    key = re.sub(r"^blocks\.\d+\.", "blocks.l.", name)
    tables = [TABLES[kind]] + ([_FUSED] if key in _FUSED else [])
    return [
        [
            Piece(theirs.replace(".l.", f".{layer[1]}." if layer else "").replace(".e.", f".{expert}."), place)
            for expert in (range(config.n_experts) if ".e." in table[key][0] else [None])
            for theirs, place in zip(table[key], _places(config, key, len(table[key]), expert), strict=True)
        ]
        for table in tables
    ]


def _places(config: ModelConfig, key: str, pieces: int, expert: int | None) -> list[tuple[int | slice, ...]]:
    """Where the pieces stacked in our parameter lie in it, or in its part of one expert."""
    first = () if expert is None else (expert,)
    if pieces == 1:
        return [first]
    if ".wqkv." in key:
        rows = [config.n_heads * config.head_width] + [config.kv_heads * config.head_width] * 2
    else:
        width = config.d_expert if ".experts." in key else config.d_shared if ".shared." in key else config.d_dense
        rows = [width, width]
    ends = [sum(rows[: i + 1]) for i in range(pieces)]
    return [(*first, slice(end - count, end)) for end, count in zip(ends, rows, strict=True)]


def tensor_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of all that a model saves: parameters, a tied head not counted, and the routers' biases; in its order."""
    with torch.device("meta"):
        model = Transformer(config)
    shapes: dict[str, torch.Size] = {}
    for prefix, module in model.named_modules():
        owned = [*module.named_parameters(prefix, recurse=False), *module.named_buffers(prefix, recurse=False)]
        shapes |= {name: value.shape for name, value in owned}
    if config.tie_embeddings:
        del shapes["head.weight"]
    return shapes


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Entry:
    """What the header of a file says of a tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str


_FLOATS = ("F32", "BF16", "F16", "F64")


class Checkpoint:
    """A folder of one of the `FAMILIES`, with all names, shapes and types checked against its config.json.

    kind    its family
    config  its shape, see moesaic.moe.hf_config.read_config
    notes   lines on what is in the folder and was left out
    dtype   the type of most of its values, as config.json calls it: float32, bfloat16, …

    Raises ValueError, one line naming file and tensor, for whatever is missing, left over, of another shape or not a number.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "config.json"
        values = read_json(path)
        self.kind, self.config = parse_config(values, str(path))
        self.values = values
        self.notes: list[str] = []
        self._block = _scaled_blocks(values, str(path))
        self._open: dict[str, Any] = {}
        self._entries = self._read_headers()
        self._pieces = self._find_pieces()
        self.dtype = values.get("torch_dtype") or values.get("dtype") or "float32"

    @torch.no_grad()
    def read_into(self, name: str, out: Tensor) -> None:
        """Fill `out`, our whole parameter or buffer `name`, of any floating type and device."""
        for piece in self._pieces[name]:
            out[piece.place].copy_(self._tensor(piece.name))

    def read(self, name: str) -> Tensor:
        """Our whole parameter or buffer `name`, in fp32 on the CPU."""
        shape = self._shapes["embedding.weight" if name == "head.weight" and self.config.tie_embeddings else name]
        value = torch.empty(shape, dtype=torch.float32)
        self.read_into(name, value)
        return value

    def _tensor(self, name: str) -> Tensor:
        entry = self._entries[name]
        tensor = self._file(entry.file).get_tensor(name)
        if entry.dtype in _FLOATS:
            return tensor
        # DeepSeek-V3 as published: fp8 values, each block of 128 x 128 with its own factor.
        scale = self._file(self._entries[f"{name}_scale_inv"].file).get_tensor(f"{name}_scale_inv")
        rows, columns = self._block
        wide = scale.repeat_interleave(rows, 0)[: tensor.shape[0]].repeat_interleave(columns, 1)[:, : tensor.shape[1]]
        return wide.mul_(tensor.float())

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            require(path.is_file(), f"{path}: no such file, but the index names it")
            try:
                self._open[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not a safetensors file ({error})") from error
        return self._open[name]

    def _read_headers(self) -> dict[str, _Entry]:
        """What lies where, by the headers of the files that the folder's index names."""
        single, index = "model.safetensors", self.folder / "model.safetensors.index.json"
        if (self.folder / single).is_file():
            where = {name: single for name in self._file(single).keys()}  # noqa: SIM118  # no dict
        elif index.is_file():
            where = read_json(index).get("weight_map", {})
            plain = isinstance(where, dict) and all(isinstance(f, str) and Path(f).name == f for f in where.values())
            require(plain, f"{index}: weight_map must give a file of this folder for each tensor")
        else:
            pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(self.folder.glob(pattern))]
            why = f"; {pickles[0]} is a pickle, which could run code and is not read: convert it" if pickles else ""
            raise ValueError(f"{self.folder}: no model.safetensors and no model.safetensors.index.json{why}")
        entries: dict[str, _Entry] = {}
        for file in sorted(set(where.values())):
            handle = self._file(file)
            for name in handle.keys():  # noqa: SIM118
                part = handle.get_slice(name)
                entries[name] = _Entry(file, tuple(part.get_shape()), part.get_dtype())
        for name, file in where.items():
            require(name in entries, f"{self.folder / file}: no tensor {name}, but the index names it")
        return entries

    def _find_pieces(self) -> dict[str, list[Piece]]:
        """The pieces of each of our parameters, after checks that they are there, and nothing else."""
        self._shapes = tensor_shapes(self.config)
        found: dict[str, list[Piece]] = {}
        for name, shape in self._shapes.items():
            ways = layouts(self.config, self.kind, name)
            found[name] = next((way for way in ways if way[0].name in self._entries), ways[0])
            whole = torch.empty(shape, device="meta")
            for piece in found[name]:
                self._check(piece.name, tuple(whole[piece.place].shape))
        if self.config.tie_embeddings:
            found["head.weight"] = found["embedding.weight"]
        known = {piece.name for pieces in found.values() for piece in pieces}
        known |= {f"{name}_scale_inv" for name in known if self._entries[name].dtype not in _FLOATS}
        self._check_rest(sorted(set(self._entries) - known))
        return found

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        require(name in self._entries, f"{self.folder}: no tensor {name}, expected with shape {list(shape)}")
        entry = self._entries[name]
        where = f"{self.folder / entry.file}: tensor {name}"
        require(entry.shape == shape, f"{where}: has shape {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype in _FLOATS:
            return
        rows, columns = self._block
        require(entry.dtype == "F8_E4M3" and bool(rows) and len(shape) == 2,
                f"{where}: has type {entry.dtype}, expected {', '.join(_FLOATS[:-1])} or {_FLOATS[-1]}")  # fmt: skip
        scale = self._entries.get(f"{name}_scale_inv")
        expected = (-(-shape[0] // rows), -(-shape[1] // columns))
        require(scale is not None, f"{where}: has type {entry.dtype}, but there is no {name}_scale_inv")
        assert scale is not None
        require(scale.shape == expected and scale.dtype == "F32",
                f"{self.folder / scale.file}: tensor {name}_scale_inv: has shape {list(scale.shape)} and type {scale.dtype}, "
                f"expected {list(expected)} and F32")  # fmt: skip

    def _check_rest(self, names: list[str]) -> None:
        """Refuse tensors that the model has no place for, but for three kinds that it can do without."""
        first = self.config.n_layers
        extra_layers = self.values.get("num_nextn_predict_layers") or 0
        predicting = [n for n in names if (m := re.match(r"model\.layers\.(\d+)\.", n))
                      and self.kind == "deepseek_v3" and first <= int(m[1]) < first + extra_layers]  # fmt: skip
        if predicting:
            self.notes.append(
                f"{self.folder}: {len(predicting)} tensors of multi-token prediction are left out (layer {first} on)"
            )
        tied = {"lm_head.weight"} if self.config.tie_embeddings else set()
        left = [n for n in names if n not in {*predicting, *tied} and not n.endswith(".rotary_emb.inv_freq")]
        if left:
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise ValueError(f"{self.folder / self._entries[left[0]].file}: tensor {left[0]}{more}: no such parameter in a "
                             f"{self.kind} model of config.json's shape")  # fmt: skip


def _scaled_blocks(values: dict[str, Any], where: str) -> tuple[int, int]:
    """Rows and columns that share a factor of fp8 values, or (0, 0) where nothing is quantized."""
    told = values.get("quantization_config")
    if not told:
        return 0, 0
    block: Any = told.get("weight_block_size") if isinstance(told, dict) and told.get("quant_method") == "fp8" else None
    good = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    require(
        good, f"{where}: quantization_config={told}: can't be represented; must be null, or fp8 with weight_block_size"
    )
    return block[0], block[1]


# ---------------------------------------------------------------- writing


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when all went well, so that nobody finds half of it; else it is removed."""
    require(str(path) not in ("", "."), "out=: must name a folder to make")
    require(not path.exists(), f"out={path}: exists already")
    writing = path.with_name(path.name + ".partial")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        yield writing
        writing.rename(path)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def write_tensors(
    folder: Path, config: ModelConfig, kind: str, read: Callable[[str], Tensor], *,
    dtype: torch.dtype, max_bytes: int, say: Callable[[str], None] = lambda line: None,
) -> None:  # fmt: skip
    """Write a model's weights under their published names as safetensors files of at most `max_bytes` (or one tensor), with an
    index where there are several. `read` gives a whole parameter or buffer by our name; it is asked once for each, in order.

    `say` gets a line when a file is done. Router biases are written in fp32, whatever `dtype`.
    """
    check_family(config, kind)
    shapes = tensor_shapes(config)
    files: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        whole = torch.empty(shape, device="meta")
        for piece in layouts(config, kind, name)[0]:
            size = whole[piece.place].numel() * _stored(name, dtype).itemsize
            if files[-1] and sum(files[-1].values()) + size > max_bytes:
                files.append({})
            files[-1][piece.name] = size
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    names = names if len(files) > 1 else ["model.safetensors"]
    total, written = sum(sum(file.values()) for file in files), 0

    waiting: dict[str, Tensor] = {}
    todo = list(zip(names, files, strict=True))
    for name in shapes:
        value = read(name)
        for piece in layouts(config, kind, name)[0]:
            # A copy in any case: a view would keep the whole parameter in memory.
            waiting[piece.name] = value[piece.place].to("cpu", _stored(name, dtype), copy=True).contiguous()
            if len(waiting) == len(todo[0][1]):
                file, sizes = todo.pop(0)
                save_file(waiting, folder / file, metadata={"format": "pt"})
                waiting.clear()
                written += sum(sizes.values())
                say(f"{file}: {sum(sizes.values()) / 1e9:.2f} GB, {written / total:.0%} done")
        del value
    assert not todo and not waiting
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {t: f for f, ts in zip(names, files, strict=True) for t in ts},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def _stored(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith("router.bias_E") else dtype
