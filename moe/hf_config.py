"""config.json of Hugging Face models: to a ModelConfig and back.

Four families of Mixture-of-Experts models, and three dense ones to make experts from (launch/upcycle.py). Fields are read and
written by their published names. What a ModelConfig can't say is refused, never dropped: a model that computes something else
is worse than none.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from moesaic.moe.config import MLAConfig, ModelConfig, RouterConfig, YarnConfig, require


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    architecture  the class in transformers
    width         the field that holds the width of a routed expert; of a dense family "", for it has none
    norm_eps, rope_theta   what transformers takes where the field is absent
    needs         the knobs that its models have in common, with their values
    """

    architecture: str
    width: str
    norm_eps: float
    rope_theta: float
    needs: dict[str, Any]


_PLAIN = {"attention": "gqa", "activation": "swiglu", "expert_bias": False, "router.kind": "softmax_topk", "router.scale": 1.0,
          "d_shared": 0}  # fmt: skip
FAMILIES = {
    "olmoe": Family("OlmoeForCausalLM", "intermediate_size", 1e-5, 1e4, _PLAIN | {"qk_norm": "full", "n_dense_layers": 0}),
    "mixtral": Family("MixtralForCausalLM", "intermediate_size", 1e-5, 1e6,
                      _PLAIN | {"qk_norm": "none", "n_dense_layers": 0, "router.renormalize": True}),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", "moe_intermediate_size", 1e-6, 1e4, _PLAIN | {"qk_norm": "head"}),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", "moe_intermediate_size", 1e-6, 1e4,
                          {"attention": "mla", "activation": "swiglu", "expert_bias": False, "router.kind": "sigmoid_bias"}),
    "llama": Family("LlamaForCausalLM", "", 1e-6, 1e4, _PLAIN | {"qk_norm": "none"}),
    "mistral": Family("MistralForCausalLM", "", 1e-6, 1e4, _PLAIN | {"qk_norm": "none"}),
    "qwen3": Family("Qwen3ForCausalLM", "", 1e-6, 1e4, _PLAIN | {"qk_norm": "head"}),
}  # fmt: skip
MOE_FAMILIES = tuple(kind for kind, family in FAMILIES.items() if family.width)

# Knobs that say how a model is trained or run, and not what it computes: no checkpoint decides them.
TRAINING = {
    "init_std", "document_mask", "experts_backend", "chunk_mib", "router.bias_rate", "router.capacity_factor", "router.rounding",
    "router.rounding_tile", "router.balance_over", "router.balance_coef", "router.z_coef",
}  # fmt: skip


# ---------------------------------------------------------------- reading


_REQUIRED: Any = object()
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "an object",
    list: "a list",
}


@dataclass(frozen=True)
class Fields:
    """The fields of a config.json, checked as they are taken; null means absent. `where` names the file in messages."""

    values: dict[str, Any]
    where: str

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        value = self.values.get(name)
        if value is None:
            require(default is not _REQUIRED, f"{self.where}: no field {name}")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        require(type(value) is kind, f"{self.where}: {name}={value}: must be {_WORDS[kind]}")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse a field that says what no ModelConfig can; `allowed` are the values that change nothing."""
        value = self.values.get(name)
        require(value is None or value in allowed,
                f"{self.where}: {name}={value}: can't be represented; must be "
                f"{' or '.join(map(str, (*allowed, 'null')))}")  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file. Raises ValueError that names the file."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    require(isinstance(values, dict), f"{path}: must hold an object")
    return values


def read_config(folder: str | Path) -> ModelConfig:
    """The shape that a folder's config.json describes. Raises ValueError naming file and field for what can't be represented.

    Balance knobs are those of the family's own auxiliary loss, as transformers adds it in training: `balance_over=layers` with
    `balance_coef` K times `router_aux_loss_coef`, for its loss is K when all is even; no z-loss. DeepSeek-V3 has none.
    """
    path = Path(folder) / "config.json"
    return parse_config(read_json(path), str(path))[1]


def parse_config(values: dict[str, Any], where: str) -> tuple[str, ModelConfig]:
    """The family and the shape that the fields of a config.json describe; see `read_config`."""
    fields = Fields(values, where)
    kind = fields.take("model_type", str)
    require(kind in FAMILIES, f"{where}: model_type={kind}: must be one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    fields.only("hidden_act", "silu")
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    fields.only("clip_qkv")
    fields.only("partial_rotary_factor", 1.0)
    _check_window(fields, kind)
    theta, yarn = _rope(fields, family)
    n_layers, n_heads = fields.take("num_hidden_layers", int), fields.take("num_attention_heads", int)
    shape: dict[str, Any] = dict(
        vocab_size=fields.take("vocab_size", int),
        d_model=fields.take("hidden_size", int),
        n_layers=n_layers,
        n_heads=n_heads,
        rope_theta=theta,
        yarn=yarn,
        norm_eps=fields.take("rms_norm_eps", float, family.norm_eps),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        init_std=fields.take("initializer_range", float, 0.02),
        attention=family.needs["attention"],
        qk_norm=family.needs.get("qk_norm", "none"),
    )
    try:
        if kind == "deepseek_v3":
            fields.only("num_key_value_heads", n_heads)
            shape |= dict(mla=_latent(fields))
        else:
            kv_heads, width = fields.take("num_key_value_heads", int, None), fields.take("head_dim", int, None)
            shape |= dict(n_kv_heads=None if kv_heads == n_heads else kv_heads)
            shape |= dict(head_dim=width if width != shape["d_model"] / max(n_heads, 1) else None)
        if not family.width:
            dense = dict(n_dense_layers=n_layers, d_dense=fields.take("intermediate_size", int))
            return kind, ModelConfig(**shape, **dense, n_experts=1, router=RouterConfig(top_k=1))
        n_dense = _leading_dense(fields, kind, n_layers)
        counts = ("num_experts", "num_local_experts", "n_routed_experts")
        shape |= dict(
            n_experts=fields.take(next((name for name in counts if values.get(name) is not None), counts[0]), int),
            d_expert=fields.take(family.width, int),
            n_dense_layers=n_dense,
            d_dense=fields.take("intermediate_size", int) if n_dense else 0,
        )
        if kind == "deepseek_v3":
            shape |= dict(d_shared=shape["d_expert"] * fields.take("n_shared_experts", int, 1))
        return kind, ModelConfig(**shape, router=_router(fields, kind))
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where}: {error}") from error


def _check_window(fields: Fields, kind: str) -> None:
    """Refuse attention that sees fewer positions than the model has."""
    window = fields.take("sliding_window", int, None)
    ignored = kind.startswith("qwen3") and not fields.take("use_sliding_window", bool, False)
    if window is not None and not ignored:
        positions = fields.take("max_position_embeddings", int)
        require(window >= positions, f"{fields.where}: sliding_window={window}: can't be represented; must be null, "
                f"or at least max_position_embeddings={positions}")  # fmt: skip


def _rope(fields: Fields, family: Family) -> tuple[float, YarnConfig]:
    """Rotary base and scaling, from `rope_theta` and `rope_scaling` or from transformers 5's `rope_parameters`."""
    name = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    rope = Fields(fields.take(name, dict, {}), f"{fields.where}: {name}")
    theta = rope.take("rope_theta", float, fields.take("rope_theta", float, family.rope_theta))
    kind = rope.take("rope_type", str, rope.take("type", str, "default"))
    rope.only("partial_rotary_factor", 1.0)
    if kind == "default":
        return theta, YarnConfig()
    require(kind == "yarn", f"{rope.where}: type={kind}: can't be represented; must be yarn or default")
    original = rope.take("original_max_position_embeddings", int, None)
    if original is None:
        original = fields.take("max_position_embeddings", int)
    factor = rope.take("factor", float, None)
    if factor is None:
        factor = fields.take("max_position_embeddings", int) / original
    rope.only("truncate", True)
    mscale, mscale_all_dim = rope.take("mscale", float, 0.0), rope.take("mscale_all_dim", float, 0.0)
    if not mscale_all_dim:
        # transformers then ignores mscale; DeepSeek's code does not. They agree where it is 1.
        rope.only("mscale", 0, 1)
        mscale = 1.0
    require(mscale > 0, f"{rope.where}: mscale={mscale}: must be positive, beside mscale_all_dim={mscale_all_dim}")
    yarn = YarnConfig(factor, original, rope.take("beta_fast", float, 32.0), rope.take("beta_slow", float, 1.0),
                      mscale, mscale_all_dim)  # fmt: skip
    given = rope.take("attention_factor", float, None)
    made = (1 + 0.1 * mscale * math.log(factor)) / (1 + 0.1 * mscale_all_dim * math.log(factor))
    require(given is None or math.isclose(given, made, rel_tol=1e-6), f"{rope.where}: attention_factor={given}: can't be "
            f"represented; must be {made}, as follows from the other fields")  # fmt: skip
    return theta, yarn


def _latent(fields: Fields) -> MLAConfig:
    widths = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return MLAConfig(
        q_lora_rank=fields.take("q_lora_rank", int, None),
        rope_interleave=fields.take("rope_interleave", bool, True),
        **{name: fields.take(name, int) for name in widths},
    )


def _leading_dense(fields: Fields, kind: str, n_layers: int) -> int:
    """The number of dense blocks, which must be the first ones."""
    if kind == "deepseek_v3":
        fields.only("moe_layer_freq", 1)
        return min(fields.take("first_k_dense_replace", int, 3), n_layers)
    if kind != "qwen3_moe":
        return 0
    only, step = fields.take("mlp_only_layers", list, []), fields.take("decoder_sparse_step", int, 1)
    require(step >= 1, f"{fields.where}: decoder_sparse_step={step}: must be at least 1")
    dense = [layer for layer in range(n_layers) if layer in only or (layer + 1) % step]
    require(dense == list(range(len(dense))), f"{fields.where}: mlp_only_layers={only}, decoder_sparse_step={step}: can't be "
            f"represented; dense layers must be the first ones, not {dense}")  # fmt: skip
    return len(dense)


def _router(fields: Fields, kind: str) -> RouterConfig:
    top_k = fields.take("num_experts_per_tok", int)
    if kind == "deepseek_v3":
        fields.only("scoring_func", "sigmoid")
        fields.only("topk_method", "noaux_tc")
        return RouterConfig(
            kind="sigmoid_bias",
            top_k=top_k,
            renormalize=fields.take("norm_topk_prob", bool, True),
            scale=fields.take("routed_scaling_factor", float, 2.5),
            groups=fields.take("n_group", int),
            groups_kept=fields.take("topk_group", int),
            balance_coef=0.0,
            z_coef=0.0,
        )
    coef = fields.take("router_aux_loss_coef", float, 0.01 if kind == "olmoe" else 0.001)
    renormalize = kind == "mixtral" or fields.take("norm_topk_prob", bool, False)
    return RouterConfig(
        top_k=top_k, renormalize=renormalize, balance_over="layers", balance_coef=coef * top_k, z_coef=0.0
    )


# ---------------------------------------------------------------- writing


def format_config(
    config: ModelConfig, kind: str, *, positions: int, dtype: str, separator: int | None = None
) -> dict[str, Any]:
    """The fields of config.json for a model of family `kind`, such that transformers 4 and 5 and vLLM read them.

    positions   longest sequence, `max_position_embeddings`; with YaRN it follows from the model instead
    dtype       of the tensors: bfloat16, float32, …
    separator   id of the token that ends a document, and stands before the first

    Raises ValueError naming the knob for what the family can't represent.
    """
    check_family(config, kind)
    family, yarn, router = FAMILIES[kind], config.yarn, config.router
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.d_dense or config.d_expert,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "torch_dtype": dtype,
        "bos_token_id": separator,
        "eos_token_id": separator,
        "pad_token_id": None,
        "num_experts_per_tok": router.top_k,
    }
    if yarn.factor > 1:
        values["max_position_embeddings"] = round(yarn.original_max_position_embeddings * yarn.factor)
        rope = {"rope_type": "yarn", "type": "yarn"} | dataclasses.asdict(yarn)
        if not yarn.mscale_all_dim:
            del rope["mscale"], rope["mscale_all_dim"]
        values["rope_scaling"] = rope
    if config.attention == "gqa" and kind != "olmoe":
        values["head_dim"] = config.head_width
    if kind == "deepseek_v3":
        return values | _format_deepseek(config)
    values["router_aux_loss_coef"] = router.balance_coef / router.top_k
    values["num_local_experts" if kind == "mixtral" else "num_experts"] = config.n_experts
    if kind == "mixtral":
        return values | {"sliding_window": None}
    values["norm_topk_prob"] = router.renormalize
    if kind == "qwen3_moe":
        values |= {"moe_intermediate_size": config.d_expert, "decoder_sparse_step": 1, "use_sliding_window": False}
        values |= {"sliding_window": None, "mlp_only_layers": list(range(config.n_dense_layers))}
    return values


def _format_deepseek(config: ModelConfig) -> dict[str, Any]:
    router = config.router
    return dataclasses.asdict(config.mla) | {
        "moe_intermediate_size": config.d_expert,
        "n_routed_experts": config.n_experts,
        "n_shared_experts": config.d_shared // config.d_expert,
        "first_k_dense_replace": config.n_dense_layers,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": router.renormalize,
        "routed_scaling_factor": router.scale,
        "n_group": router.groups,
        "topk_group": router.groups_kept,
    }


def check_family(config: ModelConfig, kind: str) -> None:
    """Raise ValueError naming the knob unless family `kind` can represent the model."""
    require(kind in MOE_FAMILIES, f"family={kind}: must be one of {', '.join(MOE_FAMILIES)}")
    for knob, needed in FAMILIES[kind].needs.items():
        value = attrgetter(knob)(config)
        require(value == needed, f"model.{knob}={value}: can't be exported as family={kind}, which has {needed}")
    yarn = config.yarn
    require(yarn.factor == 1 or (yarn.mscale > 0 if yarn.mscale_all_dim else yarn.mscale == 1),
            f"model.yarn.mscale={yarn.mscale}: can't be exported beside model.yarn.mscale_all_dim={yarn.mscale_all_dim}; both "
            "must be positive, or mscale 1 and mscale_all_dim 0")  # fmt: skip
    if kind == "olmoe":
        require(config.head_width * config.n_heads == config.d_model,
                f"model.head_dim={config.head_width}: can't be exported as family=olmoe, whose heads have width "
                f"model.d_model / model.n_heads")  # fmt: skip
    if kind == "deepseek_v3":
        require(config.d_shared > 0 and config.d_shared % config.d_expert == 0,
                f"model.d_shared={config.d_shared}: can't be exported as family=deepseek_v3, which has a multiple of "
                f"model.d_expert={config.d_expert}, at least one")  # fmt: skip
        require(config.n_experts // config.router.groups >= 2,
                f"model.router.groups={config.router.groups}: can't be exported as family=deepseek_v3, whose groups have two "
                f"experts or more of model.n_experts={config.n_experts}")  # fmt: skip


# ---------------------------------------------------------------- a run's configuration beside a checkpoint's


def settle(chosen: ModelConfig, published: ModelConfig, take: bool, where: str) -> ModelConfig:
    """The model of a run that starts from a checkpoint, which `where` names: its shape, with the `TRAINING` knobs of the run.

    Raises ValueError naming the first knob of the shape on which the two differ. With `take`, knobs left at their default
    are no choice, and don't count.
    """
    default, told = shape_knobs(ModelConfig()), shape_knobs(chosen)
    for knob, value in shape_knobs(published).items():
        if told[knob] != value and not (take and told[knob] == default[knob]):
            hint = "" if take else "; model_from_init=true takes the shape from there"
            raise ValueError(f"model.{knob}={told[knob]}: {where} has {value}{hint}")
    router = {name: getattr(chosen.router, name) for name in _fields(chosen.router) if f"router.{name}" in TRAINING}
    own = {name: getattr(chosen, name) for name in _fields(chosen) if name in TRAINING}
    return dataclasses.replace(published, router=dataclasses.replace(published.router, **router), **own)


def _fields(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


def shape_knobs(config: ModelConfig) -> dict[str, Any]:
    """Every knob that says what the model computes, by its name under `model.`; those without effect have their default."""
    values: dict[str, Any] = {}
    nested = {"mla": config.attention == "mla", "yarn": config.yarn.factor > 1, "router": True}
    for name in _fields(config):
        value = getattr(config, name)
        if name in nested:
            value = value if nested[name] else type(value)()
            values |= {f"{name}.{inner}": getattr(value, inner) for inner in _fields(value)}
        else:
            values[name] = value
    if config.attention == "gqa":
        values |= {"n_kv_heads": config.kv_heads, "head_dim": config.head_width}
    if not config.n_dense_layers:
        values["d_dense"] = 0
    return {name: value for name, value in values.items() if name not in TRAINING}
