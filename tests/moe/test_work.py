"""Products of a model by shape: together they are the FLOPs that the convention counts."""

import pytest

from moesaic.launch import cli
from moesaic.moe.flops import flops_per_token
from moesaic.moe.work import block_products, block_traffic, head_product


@pytest.mark.parametrize("recipe", ["tiny_moe", "7b_moe", "olmoe_7b", "qwen3_235b", "deepseek_v3"])
def test_products_are_the_flops_of_the_convention(recipe):
    config = cli.compose([f"recipe={recipe}"])
    model, seq, tokens = config.model, config.train.seq_len, 3 * config.train.seq_len
    total = head_product(model, tokens).flops
    for layer in range(model.n_layers):
        dense = layer < model.n_dense_layers
        total += sum(
            p.flops for p in block_products(model, tokens, seq, dense, tokens * model.router.top_k, model.n_experts)
        )
    assert 3 * total == pytest.approx(tokens * flops_per_token(model, seq), rel=1e-12)


def test_traffic_of_a_layer_by_hand():
    """8 tokens, D 192, 6 heads of 32 and as many keys, 8 experts of 192, K 2 so 16 rows, fp32, 5 of them travelled."""
    model = cli.compose(["recipe=tiny_moe"]).model
    traffic = block_traffic(model, 8, False, 16, 5, 4)
    assert traffic["norms"] == 4 * 8 * (10 * 192 + 4 * 12 * 32)
    assert traffic["router"] == 8 * (8 * 192 + 24 * 8)
    assert traffic["activation"] == 4 * 16 * 3 * 192
    assert traffic["rows"] == 4 * 192 * (16 + 16 + 20)
