"""The order in which weights are gathered."""

from typing import Any

import pytest
import torch

from moesaic.moe.config import ModelConfig
from moesaic.parallel import fsdp, trace
from moesaic.parallel.apply import parallelize
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.mesh import make_meshes
from tests.parallel.test_mesh import ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("remat", ["none", "selective", "full"])
@pytest.mark.parametrize("dense", [0, 1])
def test_each_block_asks_for_the_next(
    dense: int, remat: str, compute: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3 blocks, on one of two ranks: a block's weights are asked for before the block before it computes, its experts' too;
    in backward, before the block after it. In bf16 the router is a group of its own."""
    config = ModelConfig(
        vocab_size=32, d_model=16, n_layers=3, n_heads=2, n_experts=4, d_expert=8, n_dense_layers=dense, d_dense=16
    )
    seen: list[str] = []
    gather = fsdp.GatherDirectly.__call__

    def noted(*arguments: Any, **keywords: Any) -> Any:
        seen.append(trace._local.purpose.removesuffix(" weights"))
        return gather(*arguments, **keywords)

    monkeypatch.setattr(fsdp.GatherDirectly, "__call__", noted)
    with ranks(2):
        model = parallelize(
            config, ParallelConfig(expert="1", remat=remat), make_meshes("cpu", 1), seed=0, device=CPU, compute=compute
        )
        for i, block in enumerate(model.blocks):
            block.attention.register_forward_pre_hook(lambda *_, i=i: seen.append(f"computes {i}"))
            block.attention.register_full_backward_pre_hook(lambda *_, i=i: seen.append(f"backward {i}"))
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        loss = model(tokens, tokens).loss
        seen.append("backward")
        assert loss is not None
        loss.backward()
    half = seen.index("backward")
    forward, backward = seen[:half], [name for name in seen[half + 1 :] if not name.startswith("computes")]

    def units(i: int, way: int) -> list[str]:
        parts = ["router", "experts"] if compute is torch.bfloat16 else ["experts"]
        return [f"blocks.{i}"] + [f"blocks.{i}.ffn.{part}" for part in parts[::way] if i >= dense]

    first, second, third = (units(i, 1) for i in range(3))
    assert forward == ["the rest", *first, *second, "computes 0", *third, "computes 1", "computes 2"]
    third, second, first = (units(i, -1) for i in (2, 1, 0))
    assert backward == [*third, *second, "backward 2", *first, "backward 1", "backward 0"]
