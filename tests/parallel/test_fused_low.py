"""The fused expert path with rows and products of fp8, on two ranks, against the all-to-all path, which emulates them."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.launch.cli import UserError, compose
from moesaic.parallel.apply import parallelize
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.mesh import make_meshes
from tests.parallel.pool import Pool

CPU = torch.device("cpu")
D, F, TOKENS, EXPERTS = 160, 75, 24, 4  # a block of 128 and a bit; gate and up share a block of W_up; odd addresses
KNOBS = [
    f"model.d_model={D}", "model.n_heads=2", "model.n_layers=1", f"model.d_expert={F}", "model.d_shared=0", "model.n_experts=4",
    "model.vocab_size=300", "model.init_std=0.1", "model.router.balance_coef=0", "model.router.z_coef=0",
    "precision.layers=[experts]",
]  # fmt: skip
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "rows": (["precision.dispatch=fp8"], dict(fused_once=False)),
    "products": (["precision=fp8_block"], dict(remat="full")),
    "products, kept": (["precision=fp8_block", "model.expert_bias=true"], dict(fused_keep=True)),
    "high tail": (["precision=fp8_block", "precision.high_tail=0.5"], {}),
}


def step(case: str, path: str) -> tuple[dict[str, Tensor], Counter, list[int]]:
    """(loss and gradients, bytes sent, rows and slots that this rank sent to the other, slots that it got from it)."""
    overrides, knobs = CASES[case]
    c = compose(["recipe=tiny_moe", *KNOBS, *overrides])
    parallel = ParallelConfig(expert="2", expert_path=path, **(knobs if path == "fused" else {}))
    meshes = make_meshes("cpu", 2, 1)
    model = parallelize(
        c.model, parallel, meshes, seed=0, device=CPU, compute=torch.float32, precision=c.precision, tokens=TOKENS
    )
    model.precision.begin(7, 10)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for name, p in model.named_parameters():
        if ".b_" in name:  # zeros at first
            local = p.detach().to_local()
            local.copy_(torch.randn(local.shape, generator=generator))
    tokens = torch.randint(0, 300, (2, TOKENS // 2 + 1), generator=generator)
    layer = model.moe_layers()[0]
    routed: list[Any] = []
    layer.router.register_forward_hook(lambda module, inputs, output: routed.append(output[0]))
    loss = model(tokens[:, :-1], tokens[:, 1:]).loss / TOKENS
    loss.backward()
    found = {n: p.grad.full_tensor().clone() for n, p in model.named_parameters()}
    other, routing = 1 - dist.get_rank(), routed[0]
    away = routing.expert_S // (EXPERTS // 2) == other
    slots = int(away.sum())
    rows = slots if not parallel.fused_once else len(set(routing.token_S[away].tolist()))
    told = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    dist.all_gather(told, torch.tensor(slots))
    return found | {"loss": loss.detach()}, Counter(layer.path.sent), [rows, slots, int(told[other])]


def both(case: str) -> tuple[dict[str, float], Counter, list[int]]:
    expected, _, _ = step(case, "all_to_all")
    found, sent, counts = step(case, "fused")
    errors = {n: ((found[n] - e).abs().max() / e.abs().max()).item() for n, e in expected.items()}
    return errors, sent, counts


def test_equals_the_emulation_and_sends_fewer_bytes() -> None:
    with Pool(2, timeout=600) as pool:
        for case, (_, knobs) in CASES.items():
            for errors, sent, (rows, slots, back) in pool.run(both, case):
                wrong = {n: e for n, e in errors.items() if not e < 2e-6}
                assert not wrong, (case, wrong)
                x, row = 4 * D if case == "high tail" else D + 2, 4 * D
                forward = 2 if knobs.get("remat") else 1
                again = 0 if knobs.get("fused_keep") else x
                assert sent["intra", "dispatch"] == rows * (forward * x + row + again), case
                assert sent["intra", "combine"] == back * ((forward + 1) * row + 4), case
                assert sent["intra", "slots"] == slots * (forward * 12 + 16), case
                assert sent["intra", "counts"] == forward * 4 * EXPERTS, case


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["precision=nvfp4"],
         "precision=nvfp4: experts of parallel.expert_path=fused take the products of fp8_block as it is shipped, no others; "
         "use that, all_to_all, or precision.layers=[attention,dense]"),
        (["precision=fp8_block", "precision.fprop.x.scale=fp32", "precision.fprop.x.rule=amax"],
         "precision=fp8_block: experts of parallel.expert_path=fused take the products of fp8_block as it is shipped, no others; "
         "use that, all_to_all, or precision.layers=[attention,dense]"),
        (["precision=fp8_block", "precision.dispatch=high"],
         "precision.dispatch=high: must be fp8 with precision=fp8_block and parallel.expert_path=fused, whose products read "
         "nothing else"),
        (["precision.combine=logfmt8"], "precision.combine=logfmt8: must be high with parallel.expert_path=fused"),
    ],
)  # fmt: skip
def test_other_recipes_are_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        compose(["recipe=tiny_moe", "parallel.expert_path=fused", *overrides])
    assert str(refused.value) == line


def test_recipes_that_leave_experts_high_are_taken() -> None:
    compose(["recipe=tiny_moe", "parallel.expert_path=fused", "precision=nvfp4", "precision.layers=[attention]"])
