"""Every shipped recipe composes, passes its checks, builds, and has the size that its name says."""

from pathlib import Path

import pytest
import torch
import yaml

from moesaic.launch import cli
from moesaic.moe.config import ModelConfig
from moesaic.moe.flops import parameter_counts
from moesaic.moe.model import Transformer

# tests/parallel/test_hardware.py has those of hardware/, which no run chooses.
FILES = sorted(path.relative_to(cli.RECIPES) for path in cli.RECIPES.rglob("*.yaml") if path.parent.name != "hardware")
RECIPES = [path.stem for path in FILES if path.parent.name == "recipe"]
CHOICES = [(path.parent.name, path.stem) for path in FILES if path.parent.name]


def by_hand(model: ModelConfig, experts: int) -> int:
    """Parameters with `experts` routed experts in a layer: all of them, or the K that one token meets."""
    d, width = model.d_model, model.head_width
    if model.attention == "mla":
        q, kv, heads = model.mla.q_lora_rank, model.mla.kv_lora_rank, model.n_heads
        qkvo = d * q + q * heads * (128 + 64) + d * (kv + 64) + kv * heads * (128 + 128) + heads * 128 * d
        norms = 2 * d + q + kv
    else:
        qkvo = d * width * (2 * model.n_heads + 2 * model.kv_heads)
        norms = 2 * d + {"none": 0, "head": 2 * width, "full": width * (model.n_heads + model.kv_heads)}[model.qk_norm]
    router = d * model.n_experts
    moe = router + experts * 3 * d * model.d_expert + 3 * d * model.d_shared
    dense = 3 * d * model.d_dense
    layers = (
        model.n_layers * (qkvo + norms) + (model.n_layers - model.n_dense_layers) * moe + model.n_dense_layers * dense
    )
    return layers + d + (1 if model.tie_embeddings else 2) * model.vocab_size * d


def test_there_are_recipes():
    assert {"tiny_moe", "7b_moe", "olmoe_7b"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    config = cli.compose([f"recipe={name}"])
    assert config.name == name
    assert config.run_dir == f"runs/{name}"
    with torch.device("meta"):
        model = Transformer(config.model)
    built = sum(parameter.numel() for parameter in model.parameters())
    counts = parameter_counts(config.model)
    assert built == counts.total == by_hand(config.model, config.model.n_experts)
    assert counts.active == by_hand(config.model, config.model.router.top_k)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # transformers' OlmoeForCausalLM of the published configuration has 6,919,161,856 parameters.
        ("olmoe_7b", 6_919_161_856, 1_282_017_280),
        ("7b_moe", 6_768_556_544, 1_106_246_144),
        # 671B and 37B, 235B and 22B as published.
        ("deepseek_v3", 671_026_404_352, 37_552_282_624),
        ("qwen3_235b", 235_093_634_560, 22_190_763_520),
    ],
)
def test_size(name, total, active):
    model = cli.compose([f"recipe={name}"]).model
    assert by_hand(model, model.n_experts) == total
    assert by_hand(model, model.router.top_k) == active
    assert "7b" not in name or 6.5e9 < total < 7.5e9


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_file_can_be_chosen(group, name):
    """A file of a group is found by its name, and says what it sets in knobs that arrive."""
    config = cli.compose([f"{group}={name}"])
    chosen = yaml.safe_load((cli.RECIPES / group / f"{name}.yaml").read_text())
    part = config if group == "recipe" else getattr(config, group)
    chosen.pop("defaults", None)
    assert_holds(part, chosen)


def assert_holds(part: object, chosen: dict) -> None:
    for knob, value in chosen.items():
        found = getattr(part, knob)
        if isinstance(value, dict):
            assert_holds(found, value)
        else:
            # YAML 1.1 reads 2e-3, without a point, as text.
            assert found == type(found)(value), knob


def test_no_file_lies_where_nobody_looks():
    root = yaml.safe_load((cli.RECIPES / "train.yaml").read_text())
    groups = {next(iter(entry)) for entry in root["defaults"] if isinstance(entry, dict)} - {
        "override hydra/job_logging",
        "override hydra/hydra_logging",
    }
    assert {path.parent for path in FILES} == {Path(), *map(Path, groups)}
    assert [path.name for path in FILES if path.parent == Path()] == ["train.yaml"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_group_on_the_command_line_wins_over_the_recipe(name):
    """Recipes choose their model by name and set no shape themselves: what they would set beats the user's choice."""
    assert cli.compose([f"recipe={name}", "model=tiny_moe"]).model == cli.compose(["recipe=tiny_moe"]).model
    assert cli.compose([f"recipe={name}", "precision=fp32"]).precision.compute == "fp32"
    assert cli.compose([f"recipe={name}", "parallel=local"]).parallel.expert_path == "local"
