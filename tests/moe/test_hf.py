"""Hugging Face models: against transformers' own, there and back; and what is refused."""

import json
import pickle
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.launch import cli
from moesaic.moe import hf
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.flops import parameter_counts
from moesaic.moe.hf_config import format_config, parse_config, read_config, settle
from moesaic.moe.model import Transformer, build
from moesaic.parallel.apply import parallelize
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.mesh import make_meshes
from tests.parallel.ranks import run_ranks

CPU = torch.device("cpu")
VOCAB = 61
COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, initializer_range=0.2,
    pad_token_id=None, bos_token_id=None, eos_token_id=None, attn_implementation="eager",
)  # fmt: skip
PLAIN = dict(attn_implementation="eager", experts_implementation="eager")  # its grouped products refuse odd widths
EXPERTS: dict[str, dict[str, Any]] = {
    "olmoe": dict(intermediate_size=12, num_experts=6, num_experts_per_tok=2),
    "mixtral": dict(intermediate_size=12, num_local_experts=6, num_experts_per_tok=2),
    "qwen3_moe": dict(
        intermediate_size=20, moe_intermediate_size=12, num_experts=6, num_experts_per_tok=3, head_dim=10
    ),
    "deepseek_v3": dict(
        intermediate_size=20, moe_intermediate_size=12, n_routed_experts=8, num_experts_per_tok=3, n_group=1, topk_group=1,
        kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, first_k_dense_replace=0,
        n_shared_experts=1,
    ),
}  # fmt: skip
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=10_000.0)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("olmoe", dict(router_aux_loss_coef=0.03)),
    ("olmoe", dict(num_key_value_heads=2, norm_topk_prob=True, tie_word_embeddings=True, rope_theta=500.0)),
    ("mixtral", dict(num_key_value_heads=2)),
    ("mixtral", dict(head_dim=10, tie_word_embeddings=True, num_experts_per_tok=3, rms_norm_eps=1e-3)),
    ("qwen3_moe", dict(num_key_value_heads=1, norm_topk_prob=True, mlp_only_layers=[0])),
    ("qwen3_moe", dict(norm_topk_prob=False, tie_word_embeddings=True, decoder_sparse_step=3, mlp_only_layers=[1],
                       rope_parameters=YARN, max_position_embeddings=64)),
    ("deepseek_v3", dict(n_group=4, topk_group=2, q_lora_rank=24, n_shared_experts=2, first_k_dense_replace=1)),
    ("deepseek_v3", dict(norm_topk_prob=False, routed_scaling_factor=1.5, tie_word_embeddings=True, rope_interleave=False,
                         rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.7), max_position_embeddings=64)),
]  # fmt: skip


def twin(kind: str, **changes: Any) -> Any:
    """transformers' model of a family, with random weights everywhere, the routers' biases included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    base = EXPERTS.get(kind, dict(intermediate_size=24))
    config = AutoConfig.for_model(kind, **(COMMON | base | changes))
    model = AutoModelForCausalLM.from_config(config, **(PLAIN if kind in EXPERTS else {}))
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.uniform_(0.5, 1.5)
        for name, value in model.named_buffers():
            if "e_score" in name:
                value.uniform_(-0.1, 0.1)
    return model.float().train()


def saved(model: Any, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    return folder


def load(folder: Path) -> Transformer:
    checkpoint = hf.Checkpoint(folder)
    return build(checkpoint.config, 0, CPU, checkpoint.read_into)


def export(model: Transformer, kind: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    values = dict(model.named_parameters()) | dict(model.named_buffers())
    values = {name: value.detach() for name, value in values.items()}
    with hf.new_folder(folder) as writing:
        config = format_config(model.config, kind, positions=64, dtype=str(dtype).removeprefix("torch."))
        (writing / "config.json").write_text(json.dumps(config))
        options = dict(max_bytes=10**9) | options
        hf.write_tensors(writing, model.config, kind, values.__getitem__, dtype=dtype, **options)


def tokens(vocab: int = VOCAB, sequences: int = 2, length: int = 17) -> Tensor:
    return torch.randint(0, vocab, (sequences, length), generator=torch.Generator().manual_seed(1))


def apart(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def hold_to_transformers(kind: str, changes: dict[str, Any], x: Tensor, tmp_path: Path) -> None:
    """Logits, loss, auxiliary loss, every gradient; and the same logits after import, export, and import by transformers."""
    from transformers import AutoModelForCausalLM

    peer = twin(kind, **changes)
    model = load(saved(peer, tmp_path / "theirs"))
    kwargs = {} if kind == "deepseek_v3" else dict(output_router_logits=True)
    theirs, ours = peer(x, **kwargs), model(x)
    assert apart(ours.logits, theirs.logits) < 1e-5

    # The loss in training: cross entropy and the family's own auxiliary loss, of which DeepSeek-V3 in transformers has none.
    loss = F.cross_entropy(theirs.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    aux = torch.zeros(()) if kind == "deepseek_v3" else peer.config.router_aux_loss_coef * theirs.aux_loss
    torch.testing.assert_close(ours.aux, aux, rtol=1e-5, atol=0)
    (loss + aux).backward()
    out = model(x[:, :-1], x[:, 1:])
    # The last position has no target but is routed: its balance is counted in both.
    (out.loss / x[:, 1:].numel() + ours.aux).backward()
    torch.testing.assert_close(out.loss / x[:, 1:].numel(), loss, rtol=1e-5, atol=0)
    gradients = {name: value.grad for name, value in peer.named_parameters()}
    compared = set()
    for name, parameter in model.named_parameters():
        for piece in hf.layouts(model.config, kind, name)[-1]:
            assert parameter.grad is not None
            assert apart(parameter.grad[piece.place], gradients[piece.name]) < 1e-4, name
            compared.add(piece.name)
    assert compared == gradients.keys()

    export(model, kind, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", local_files_only=True, **PLAIN)
    assert again.config.architectures == [type(peer).__name__]
    assert torch.equal(again(x).logits, peer(x).logits)
    assert read_config(tmp_path / "ours") == model.config


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_equal_to_transformers(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    hold_to_transformers(kind, changes, tokens(), tmp_path)


@pytest.mark.parametrize("kind", EXPERTS)
def test_fused_experts_are_read(kind: str, tmp_path: Path) -> None:
    """transformers 5 holds a layer's experts as one tensor, and writes them so when asked to."""
    peer = twin(kind)
    fused = saved(peer, tmp_path / "fused", save_original_format=False)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in load_file(fused / "model.safetensors"))
    one, other = load(fused).state_dict(), load(saved(peer, tmp_path / "published")).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_pooled_balance_is_transformers_over_k(tmp_path: Path) -> None:
    """Layers that load opposite experts are even together: the pooled loss is near 1, the mean of the layers' losses is not."""
    peer = twin("mixtral", num_hidden_layers=2, router_aux_loss_coef=1.0)
    with torch.no_grad():
        for sign, layer in zip((3, -3), peer.model.layers, strict=True):
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[:, 0] = sign * torch.linspace(-1, 1, 6)
            layer.post_attention_layernorm.weight.fill_(1.0)
        peer.model.embed_tokens.weight[:, 0] = 2.0  # so that the first channel stays positive
    x = tokens()
    want = peer(x, output_router_logits=True).aux_loss
    config = read_config(saved(peer, tmp_path / "m"))
    checkpoint = hf.Checkpoint(tmp_path / "m")
    losses = {}
    for over in ("layers", "micro_batch"):
        router = replace(config.router, balance_over=over, balance_coef=1.0)
        losses[over] = build(replace(config, router=router), 0, CPU, checkpoint.read_into)(x).aux
    torch.testing.assert_close(losses["layers"] * 2, want, rtol=1e-5, atol=0)
    assert losses["micro_batch"] > 1.5 * losses["layers"]


# ---------------------------------------------------------------- files


def test_sharded_files(tmp_path: Path) -> None:
    """transformers' shards are read; ours are of the size asked for, with an index, and transformers reads them."""
    from transformers import AutoModelForCausalLM

    peer = twin("qwen3_moe", mlp_only_layers=[0])
    whole = load(saved(peer, tmp_path / "whole"))
    folder = saved(peer, tmp_path / "many", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert all(torch.equal(a, b) for a, b in zip(load(folder).parameters(), whole.parameters(), strict=True))

    lines: list[str] = []
    export(whole, "qwen3_moe", tmp_path / "ours", max_bytes=20_000, say=lines.append)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) == len(lines) > 3 and lines[-1].endswith("100% done")
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 20_000 for file in files)
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in whole.parameters())
    assert {n: f.name for f in files for n in load_file(f)} == index["weight_map"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", local_files_only=True, **PLAIN)
    assert torch.equal(again(tokens()).logits, peer(tokens()).logits)


def test_bf16_keeps_the_routers_bias_in_fp32(tmp_path: Path) -> None:
    peer = twin("deepseek_v3", n_group=2, topk_group=1)
    model = load(saved(peer, tmp_path / "a"))
    export(model, "deepseek_v3", tmp_path / "b", dtype=torch.bfloat16)
    kinds = {name: value.dtype for name, value in load_file(tmp_path / "b/model.safetensors").items()}
    assert {n for n, kind in kinds.items() if kind != torch.bfloat16} == {n for n in kinds if "e_score_correction" in n}
    assert hf.Checkpoint(tmp_path / "b").dtype == "bfloat16"
    for name, value in load(tmp_path / "b").state_dict().items():
        want = model.state_dict()[name]
        assert torch.equal(value, want if "bias_E" in name else want.bfloat16().float())


def test_one_tensor_of_a_file_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading holds one tensor of a file at a time; writing asks for one parameter at a time and holds one file."""
    folder = saved(twin("olmoe"), tmp_path / "m", max_shard_size="20KB")
    live, most, reads = 0, 0, 0
    open_file = hf.safe_open

    def ended() -> None:
        nonlocal live
        live -= 1

    class Watched:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = open_file(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> Tensor:
            nonlocal live, most, reads
            live, reads = live + 1, reads + 1
            most = max(most, live)
            tensor = self.file.get_tensor(name).clone()
            weakref.finalize(tensor, ended)
            return tensor

    monkeypatch.setattr(hf, "safe_open", Watched)
    checkpoint = hf.Checkpoint(folder)
    assert reads == 0
    model = build(checkpoint.config, 0, CPU, checkpoint.read_into)
    assert (
        most == 1
        and live == 0
        and reads == sum(len(hf.layouts(model.config, "olmoe", n)[0]) for n, _ in model.named_parameters())
    )

    asked: list[str] = []
    alive: list[weakref.ref[Tensor]] = []

    def read(name: str) -> Tensor:
        assert all(ref() is None for ref in alive), name
        asked.append(name)
        value = checkpoint.read(name)
        alive.append(weakref.ref(value))
        return value

    sizes: list[int] = []
    write = hf.save_file

    def sized(tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()))
        write(tensors, *args, **kwargs)

    monkeypatch.setattr(hf, "save_file", sized)
    (tmp_path / "out").mkdir()
    hf.write_tensors(tmp_path / "out", model.config, "olmoe", read, dtype=torch.float32, max_bytes=20_000)
    assert asked == list(hf.tensor_shapes(model.config)) and max(sizes) <= 20_000 and len(sizes) > 3


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(twin("mixtral", num_hidden_layers=1), tmp_path_factory.mktemp("hf") / "tiny")


def changed(source: Path, folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


GATE = "model.layers.0.block_sparse_moe.gate.weight"
DOWN = "model.layers.0.block_sparse_moe.experts.4.w2.weight"


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda t: t.pop(DOWN), rf"no tensor {DOWN}, expected with shape \[32, 12\]"),
        (lambda t: t.update({GATE: t[GATE][:5]}), rf"model.safetensors: tensor {GATE}: has shape \[5, 32\], expected \[6, 32\]"),
        (lambda t: t.update({DOWN: t[DOWN].T.contiguous()}), rf"{DOWN}: has shape \[12, 32\], expected \[32, 12\]"),
        (lambda t: t.update({GATE: t[GATE].to(torch.int8)}), rf"{GATE}: has type I8, expected F32"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
         r"model.safetensors: tensor model.layers.0.self_attn.q_proj.bias: no such parameter in a mixtral model"),
        (lambda t: t.update({f"model.layers.{i}.x": torch.zeros(1) for i in (1, 2)}), r"tensor model.layers.1.x \(and 1 more\)"),
    ],
)  # fmt: skip
def test_wrong_tensors(tiny: Path, tmp_path: Path, edit: Callable[[dict[str, Tensor]], Any], line: str) -> None:
    with pytest.raises(ValueError, match=line) as told:
        hf.Checkpoint(changed(tiny, tmp_path / "m", edit))
    assert "\n" not in str(told.value) and str(tmp_path / "m") in str(told.value)


def test_what_may_be_there(tiny: Path, tmp_path: Path) -> None:
    hf.Checkpoint(
        changed(
            tiny, tmp_path / "m", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
        )
    )
    tied = saved(twin("olmoe", tie_word_embeddings=True), tmp_path / "tied")
    hf.Checkpoint(changed(tied, tmp_path / "n", lambda t: t.update({"lm_head.weight": torch.zeros(VOCAB, 32)})))


def test_prediction_layers_are_left_out_with_a_note(tmp_path: Path) -> None:
    folder = saved(twin("deepseek_v3"), tmp_path / "m")
    extra = {"model.layers.3.eh_proj.weight": torch.zeros(2), "model.layers.3.mlp.gate.weight": torch.zeros(2)}
    checkpoint = hf.Checkpoint(changed(folder, tmp_path / "n", lambda t: t.update(extra)))
    assert len(checkpoint.notes) == 1 and "2 tensors of multi-token prediction" in checkpoint.notes[0]
    with pytest.raises(ValueError, match=r"model.layers.4.eh_proj.weight: no such parameter"):
        hf.Checkpoint(
            changed(folder, tmp_path / "o", lambda t: t.update({"model.layers.4.eh_proj.weight": torch.zeros(2)}))
        )


def test_fp8_as_deepseek_publishes_it(tmp_path: Path) -> None:
    """Each block of 3 x 5 values with a factor of its own; edges hold smaller blocks."""
    folder = saved(twin("deepseek_v3", num_hidden_layers=1), tmp_path / "m")
    expected: dict[str, Tensor] = {}

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if "_proj." in n]:
            value = tensors[name]
            low = (value * 8).to(torch.float8_e4m3fn)
            scale = torch.rand(-(-value.shape[0] // 3), -(-value.shape[1] // 5)) / 8 + 0.01
            tensors |= {name: low, f"{name}_scale_inv": scale}
            expected[name] = torch.stack([
                torch.stack([low[i, j].float() * scale[i // 3, j // 5] for j in range(value.shape[1])])
                for i in range(min(4, value.shape[0]))
            ])  # fmt: skip

    folder = changed(folder, tmp_path / "n", quantize)
    with pytest.raises(ValueError, match=r"_proj.weight: has type F8_E4M3, expected F32"):
        hf.Checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [3, 5]}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = hf.Checkpoint(folder)
    for name in hf.tensor_shapes(checkpoint.config):
        value = checkpoint.read(name)
        for piece in hf.layouts(checkpoint.config, "deepseek_v3", name)[0]:
            if piece.name in expected:
                torch.testing.assert_close(value[piece.place][:4], expected[piece.name], rtol=0, atol=0)
    scale = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    with pytest.raises(ValueError, match="there is no .*o_proj.weight_scale_inv"):
        hf.Checkpoint(changed(folder, tmp_path / "o", lambda t: t.pop(scale)))
    with pytest.raises(ValueError, match=rf"tensor {scale}: has shape"):
        hf.Checkpoint(changed(folder, tmp_path / "p", lambda t: t.update({scale: torch.ones(1, 1)})))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was opened",))


def test_pickles_are_refused_unopened(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (folder / "modeling_evil.py").write_text("raise SystemExit('code of a checkpoint ran')")
    with pytest.raises(ValueError, match=r"no model.safetensors .*pytorch_model.bin is a pickle"):
        hf.Checkpoint(folder)
    for kind in ("model.safetensors", "model.safetensors.index.json"):  # a pickle under another name
        (folder / kind).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ValueError, match=str(folder / kind)):
            hf.Checkpoint(folder)
        (folder / kind).unlink()


@pytest.mark.parametrize(
    ("index", "line"),
    [
        ({"weight_map": {GATE: "../other.safetensors"}}, "weight_map must give a file of this folder"),
        ({"weight_map": {GATE: "/etc/passwd"}}, "weight_map must give a file of this folder"),
        ({"weight_map": [1]}, "weight_map must give a file of this folder"),
        ({"weight_map": {GATE: "model-1.safetensors"}}, r"model-1.safetensors: no such file, but the index names it"),
        ({"weight_map": {"nobody": "all.safetensors"}}, r"all.safetensors: no tensor nobody, but the index names it"),
        ([], "must hold an object"),
    ],
)
def test_wrong_index(tiny: Path, tmp_path: Path, index: Any, line: str) -> None:
    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/all.safetensors")
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=line):
        hf.Checkpoint(tmp_path / "m")


PUBLISHED: dict[str, dict[str, Any]] = {
    kind: {"model_type": kind} | {k: v for k, v in (COMMON | shape).items() if not k.startswith("attn")}
    for kind, shape in (EXPERTS | {"llama": dict(intermediate_size=24)}).items()
}


@pytest.mark.parametrize(
    ("kind", "changes", "line"),
    [
        ("olmoe", dict(clip_qkv=8.0), "clip_qkv=8.0: can't be represented"),
        ("olmoe", dict(model_type="gpt2"), "model_type=gpt2: must be one of olmoe"),
        ("olmoe", dict(hidden_size=None), "no field hidden_size"),
        ("olmoe", dict(hidden_size="32"), "hidden_size=32: must be a whole number"),
        ("olmoe", dict(num_experts=True), "num_experts=True: must be a whole number"),
        ("olmoe", dict(num_experts_per_tok=7), r"model.router.top_k=7: must not exceed"),
        ("mixtral", dict(sliding_window=64, max_position_embeddings=128), "sliding_window=64: can't be represented"),
        ("mixtral", dict(hidden_act="gelu"), "hidden_act=gelu: can't be represented"),
        ("qwen3_moe", dict(attention_bias=True), "attention_bias=True: can't be represented"),
        ("qwen3_moe", dict(use_sliding_window=True, sliding_window=64, max_position_embeddings=128), "sliding_window=64"),
        ("qwen3_moe", dict(mlp_only_layers=[1]), r"mlp_only_layers=\[1\].*dense layers must be the first ones"),
        ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step=2: can't be"),
        ("deepseek_v3", dict(scoring_func="softmax"), "scoring_func=softmax"),
        ("deepseek_v3", dict(topk_method="greedy"), "topk_method=greedy"),
        ("deepseek_v3", dict(num_key_value_heads=2), "num_key_value_heads=2"),
        ("deepseek_v3", dict(moe_layer_freq=2), "moe_layer_freq=2"),
        ("llama", dict(mlp_bias=True), "mlp_bias=True"),
        ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        ("llama", dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "rope_scaling: type=llama3: can't be"),
        ("llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0)), "rope_parameters: type=linear"),
        ("llama", dict(rope_scaling=YARN | dict(truncate=False)), "truncate=False"),
        ("llama", dict(rope_scaling=YARN | dict(attention_factor=2.0)), "attention_factor=2.0"),
        ("llama", dict(rope_scaling=YARN | dict(mscale=0.5)), "mscale=0.5"),
    ],
)  # fmt: skip
def test_what_no_config_can_say(kind: str, changes: dict[str, Any], line: str) -> None:
    parse_config(PUBLISHED[kind], "config.json")
    with pytest.raises(ValueError, match=f"^config.json: .*{line}"):
        parse_config(PUBLISHED[kind] | changes, "config.json")


def test_what_changes_nothing_is_accepted() -> None:
    def config(kind: str, **changes: Any) -> ModelConfig:
        return parse_config(PUBLISHED[kind] | changes, "config.json")[1]

    assert config("mixtral", sliding_window=128, max_position_embeddings=128) == config("mixtral")
    assert config("qwen3_moe", sliding_window=64, use_sliding_window=False) == config("qwen3_moe")
    assert config("olmoe", rope_theta=7) == config("olmoe", rope_parameters=dict(rope_theta=7.0, rope_type="default"))
    assert config("mixtral").rope_theta == 1e6 and config("olmoe").rope_theta == 1e4
    assert config("qwen3_moe").norm_eps == 1e-6 and config("olmoe").norm_eps == 1e-5
    yarn = config(
        "olmoe", rope_scaling=dict(type="yarn", original_max_position_embeddings=8), max_position_embeddings=32
    ).yarn
    assert (yarn.factor, yarn.mscale, yarn.mscale_all_dim) == (4.0, 1.0, 0.0)


# What the published config.json of a model of each family says, and its number of parameters in transformers.
FULL_SIZE: dict[str, tuple[int, dict[str, Any]]] = {
    "olmoe": (6_919_161_856, dict(
        vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False, rope_theta=10000.0, clip_qkv=None)),
    "mixtral": (46_702_792_704, dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2, sliding_window=None, rope_theta=1e6)),
    "qwen3_moe": (30_532_122_624, dict(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], use_sliding_window=False, sliding_window=None, rope_theta=1e6)),
    "deepseek_v3": (671_026_404_352, dict(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
        num_attention_heads=128, num_key_value_heads=128, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8,
        n_group=8, topk_group=4, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5,
        first_k_dense_replace=3, moe_layer_freq=1, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, num_nextn_predict_layers=1, rope_theta=10000, max_position_embeddings=163840,
        rope_scaling=dict(type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1.0,
                          mscale_all_dim=1.0))),
}  # fmt: skip


@pytest.mark.parametrize("kind", FULL_SIZE)
def test_models_of_full_size_have_their_number_of_parameters(kind: str) -> None:
    parameters, values = FULL_SIZE[kind]
    config = parse_config({"model_type": kind, "hidden_act": "silu", "rope_scaling": None} | values, "config.json")[1]
    assert parameter_counts(config).total == parameters
    again = parse_config(format_config(config, kind, positions=4096, dtype="bfloat16"), "config.json")[1]
    assert again == config


def test_the_recipe_of_olmoe_fits_the_published_model() -> None:
    published = parse_config({"model_type": "olmoe"} | FULL_SIZE["olmoe"][1], "config.json")[1]
    recipe = cli.compose(["recipe=olmoe_7b"]).model
    assert settle(recipe, published, False, "") == replace(recipe, n_kv_heads=None, head_dim=None)


def shape(kind: str, **changes: Any) -> ModelConfig:
    config = parse_config(PUBLISHED[kind], "config.json")[1]
    router = {name[7:]: value for name, value in changes.items() if name.startswith("router_")}
    rest = {name: value for name, value in changes.items() if not name.startswith("router_")}
    return replace(config, **rest, router=replace(config.router, **router))


@pytest.mark.parametrize(
    ("made", "kind", "line"),
    [
        (shape("mixtral", d_shared=8), "mixtral", "model.d_shared=8: can't be exported as family=mixtral, which has 0"),
        (shape("mixtral"), "olmoe", "model.qk_norm=none: can't be exported as family=olmoe, which has full"),
        (shape("mixtral", router_renormalize=False), "mixtral", "model.router.renormalize=False"),
        (shape("olmoe", n_dense_layers=1, d_dense=8), "olmoe", "model.n_dense_layers=1"),
        (shape("olmoe", head_dim=10), "olmoe", "model.head_dim=10"),
        (shape("olmoe", router_scale=2.0), "olmoe", "model.router.scale=2.0"),
        (shape("olmoe", activation="geglu"), "olmoe", "model.activation=geglu"),
        (shape("qwen3_moe", expert_bias=True), "qwen3_moe", "model.expert_bias=True"),
        (shape("qwen3_moe", router_kind="expert_choice"), "qwen3_moe", "model.router.kind=expert_choice"),
        (shape("qwen3_moe"), "deepseek_v3", "model.attention=gqa"),
        (shape("deepseek_v3", d_shared=18), "deepseek_v3", "model.d_shared=18.*a multiple of model.d_expert=12"),
        (shape("deepseek_v3", d_shared=0), "deepseek_v3", "model.d_shared=0"),
        (shape("deepseek_v3", router_groups=8, router_groups_kept=4), "deepseek_v3", "model.router.groups=8"),
        (shape("mixtral"), "llama", "family=llama: must be one of olmoe, mixtral, qwen3_moe, deepseek_v3"),
    ],
)  # fmt: skip
def test_what_a_family_can_not_represent(made: ModelConfig, kind: str, line: str) -> None:
    with pytest.raises(ValueError, match=line) as told:
        format_config(made, kind, positions=64, dtype="float32")
    assert "\n" not in str(told.value)


def test_settle() -> None:
    published = shape("mixtral")
    training = RouterConfig(balance_coef=0.5, z_coef=0.1, capacity_factor=2.0)
    got = settle(ModelConfig(router=training, document_mask=False), published, True, "init_from=m")
    assert got.router.balance_coef == 0.5 and got.router.capacity_factor == 2.0 and not got.document_mask
    assert got.router.renormalize and got.d_model == 32
    assert settle(replace(published, n_kv_heads=4, head_dim=8), published, False, "init_from=m") == published
    with pytest.raises(ValueError, match=r"model.d_model=256: init_from=m has 32; model_from_init=true"):
        settle(replace(published, d_model=256), published, False, "init_from=m")
    with pytest.raises(ValueError, match=r"model.d_model=48: init_from=m has 32"):
        settle(ModelConfig(d_model=48), published, True, "init_from=m")
    with pytest.raises(ValueError, match=r"model.router.renormalize=False: init_from=m has True"):
        settle(replace(published, router=RouterConfig()), published, False, "init_from=m")


# ---------------------------------------------------------------- spread over ranks


def spread(folder: str) -> tuple[list[int], dict[str, Tensor]]:
    """The weights of every parameter, gathered, and this rank's own experts of the last layer."""
    checkpoint = hf.Checkpoint(folder)
    meshes, fill = make_meshes("cpu", 2), checkpoint.read_into
    model = parallelize(
        checkpoint.config, ParallelConfig(), meshes, seed=0, device=CPU, compute=torch.float32, fill=fill
    )
    experts = model.blocks[-1].ffn.experts.w_up_EGD
    whole = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
    return list(experts.to_local().shape), whole | dict(model.named_buffers())


def test_two_ranks_with_divided_experts_hold_what_one_process_does(tmp_path: Path) -> None:
    folder = saved(twin("deepseek_v3", first_k_dense_replace=1, tie_word_embeddings=True), tmp_path / "m")
    want = load(folder)
    for local, got in run_ranks(spread, 2, tmp_path, str(folder)):
        assert local == [4, 24, 32]
        assert got.keys() == (dict(want.named_parameters()) | dict(want.named_buffers())).keys()
        assert all(torch.equal(value, want.state_dict()[name]) for name, value in got.items())
