"""One MoE layer, forward and backward, against transformers' and against the machine's dense matrix products.

    python benchmarks/moe_layer.py

Router, experts and combination of the same weights on the same input; fp32, two threads. The peer is the fastest of transformers'
expert implementations. A second line a shape gives the layer's FLOP/s (18 T K D F, a multiply-add counts 2, of the experts alone)
as a part of what a square matrix product reaches in the same run, by torch.mm and, where ours uses it (moesaic.kernels.products),
by oneDNN; then the time of the router alone, plain and with token rounding (tile 128), beside the whole layer's. Where outputs or
input gradients differ, nothing is timed.
"""

import copy
import dataclasses
from collections.abc import Callable

import compare
import torch
import transformers
from torch import Tensor
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from moesaic.kernels.products import by_onednn, mm
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.layer import MoE
from moesaic.moe.model import initialize

THREADS, ROUNDS = 2, 15
SHAPES = [(2048, 256, 128, 32, 4), (4096, 512, 256, 64, 8)]
EXPERTS = ("eager", "grouped_mm")  # batched_mm copies an expert's weights for every row: minutes at these shapes
DENSE = 1024


def our_layer(d: int, f: int, experts: int, k: int) -> MoE:
    config = ModelConfig(
        d_model=d, n_heads=2, n_experts=experts, d_expert=f, init_std=0.05, router=RouterConfig(top_k=k)
    )
    with torch.device("meta"):
        layer = MoE(config)
    initialize(layer, "ffn.", config, 0, torch.device("cpu"))
    return layer


def peer_layer(ours: MoE, d: int, f: int, experts: int, k: int, implementation: str) -> OlmoeSparseMoeBlock:
    config = OlmoeConfig(
        hidden_size=d, intermediate_size=f, num_experts=experts, num_experts_per_tok=k, norm_topk_prob=False
    )
    config._experts_implementation = implementation
    layer = OlmoeSparseMoeBlock(config)
    values = {
        "gate.weight": ours.router.weight_ED, "experts.gate_up_proj": ours.experts.w_up_EGD,
        "experts.down_proj": ours.experts.w_down_EDF,
    }  # fmt: skip
    layer.load_state_dict(values, strict=True)
    return layer


def runner(forward: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    def run() -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        y = forward(leaf)
        y.backward(dy)
        assert leaf.grad is not None
        return y.detach(), leaf.grad

    return run


def router_runner(layer: MoE, x: Tensor, rounding: str) -> Callable[[], None]:
    """The layer's router by itself, forward and backward."""
    config = dataclasses.replace(layer.router.config, rounding=rounding, rounding_tile=128)
    router = copy.deepcopy(layer.router)
    router.config = config

    def run() -> None:
        routing, _ = router(x.detach().requires_grad_())
        routing.weights_S.sum().backward()

    return run


def main() -> None:
    compare.warn_if_busy()
    torch.set_num_threads(THREADS)
    a, b = torch.randn(DENSE, DENSE), torch.randn(DENSE, DENSE)
    for tokens, d, f, experts, k in SHAPES:
        torch.manual_seed(0)
        x, dy = torch.randn(tokens, d), torch.randn(tokens, d)
        ours = our_layer(d, f, experts, k)
        sides = {"ours": runner(lambda v, layer=ours: layer(v)[0], x, dy)}
        for name in EXPERTS:
            peer = peer_layer(ours, d, f, experts, k, name)
            sides[name] = runner(lambda v, layer=peer: layer(v[None])[0], x, dy)
        want = sides["ours"]()
        for name in EXPERTS:
            for mine, theirs in zip(want, sides[name](), strict=True):
                error = ((mine - theirs.view_as(mine)).abs().max() / theirs.abs().max()).item()
                if error > 1e-4:
                    raise SystemExit(f"outputs or gradients of {name} differ by {error}; nothing is timed")
        routers = {rule: router_runner(ours, x, rule) for rule in ("none", "nearest", "score")}
        dense = {"torch.mm": lambda: torch.mm(a, b)}
        if by_onednn():
            dense["oneDNN"] = lambda: mm(a, b)
        seconds = compare.alternate(sides | routers | dense, ROUNDS)
        case = f"T {tokens}, D {d}, F {f}, E {experts}, K {k}, fp32, {THREADS} threads, forward + backward"
        best = min(EXPERTS, key=lambda name: seconds[name])
        peer_name = f"transformers {transformers.__version__} OLMoE block, {best} experts"
        rates = {name: tokens / value for name, value in seconds.items()}
        compare.report("moe_layer", case, rates["ours"], rates[best], peer_name, "tokens/s", more_is_better=True)
        reached = 18 * tokens * k * d * f / seconds["ours"] / 1e9
        for library in dense:
            rate, name = 2 * DENSE**3 / seconds[library] / 1e9, f"{DENSE}^3 matrix product, {library}"
            compare.report("moe_layer", case, reached, rate, name, "GFLOP/s", more_is_better=True)
        for rule in routers:
            name = f"{case}; router alone, rounding={rule}"
            mine, whole = 1e3 * seconds[rule], 1e3 * seconds["ours"]
            compare.report("moe_layer", name, mine, whole, "the whole layer, ours", "ms", more_is_better=False)


if __name__ == "__main__":
    main()
