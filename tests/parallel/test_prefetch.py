"""The order in which weights are gathered."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from moesaic.moe.config import ModelConfig
from moesaic.parallel.apply import parallelize
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.mesh import make_meshes
from tests.parallel.test_mesh import ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize("remat", ["none", "selective", "full"])
@pytest.mark.parametrize("dense", [0, 1])
def test_each_block_asks_for_the_next(dense: int, remat: str) -> None:
    """Of 3 blocks, on one of two ranks: a block's weights are asked for before the block before it computes, its experts' too."""
    config = ModelConfig(
        vocab_size=32, d_model=16, n_layers=3, n_heads=2, n_experts=4, d_expert=8, n_dense_layers=dense, d_dense=16
    )
    with ranks(2):
        model = parallelize(
            config,
            ParallelConfig(expert="1", remat=remat),
            make_meshes("cpu", 1),
            seed=0,
            device=CPU,
            compute=torch.float32,
        )
        for i, block in enumerate(model.blocks):
            block.attention.register_forward_pre_hook(
                lambda *_, i=i: record_function(f"computes {i}").__enter__() and None
            )
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            out = model(tokens, tokens)
            with record_function("backward"):
                assert out.loss is not None
                out.loss.backward()
    marks = ("FSDP::all_gather (", "computes", "backward")
    events = sorted((e.time_range.start, e.name) for e in profiler.events() if e.name.startswith(marks))
    names = [name.removeprefix("FSDP::all_gather (").removesuffix(")") for _, name in events]
    half = names.index("backward")
    forward, backward = [n for n in names[:half] if n], [n for n in names[half + 1 :] if not n.startswith("computes")]

    def units(i: int) -> list[str]:
        return [f"blocks.{i}"] + ([f"blocks.{i}.ffn.experts"] if i >= dense else [])

    assert forward == [*units(0), *units(1), "computes 0", *units(2), "computes 1", "computes 2"]
    assert backward == [*units(2), *units(1), *units(0)]
