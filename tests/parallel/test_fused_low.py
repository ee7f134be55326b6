"""The fused expert path in low precision, on two ranks, against the all-to-all path, which emulates it: rows and products of fp8
in the kernels, and recipes whose products are apart from them."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.launch.cli import UserError, compose
from moesaic.moe.low import Weight
from moesaic.moe.precision import Precision
from moesaic.parallel.apart import products_inside
from moesaic.parallel.apply import parallelize
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.fused import coded
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
APART: dict[str, tuple[list[str], dict[str, Any]]] = {
    "mxfp8": (["precision=mxfp8", "model.expert_bias=true"], dict(fused_once=False)),
    "mxint8, rows of fp8": (["precision=mxint8", "precision.dispatch=fp8"], dict(fused_keep=True)),
    "fp8_block, high rows": (["precision=fp8_block", "precision.dispatch=high"], {}),
    "nvfp4": (["precision=nvfp4", "precision.high_last=0"], dict(remat="full")),
    "quartet": (["precision=quartet"], dict(remat="selective")),
    "quartet2": (["precision=quartet2"], {}),
    "mxfp4_deosc": (["precision=mxfp4_deosc"], {}),
}
BOTH = CASES | APART


def step(case: str, path: str) -> tuple[dict[str, Tensor], Counter, list[int]]:
    """(loss and gradients, bytes sent, rows and slots that this rank sent to the other, slots that it got from it)."""
    overrides, knobs = BOTH[case]
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


def test_products_apart_from_the_kernels() -> None:
    """The same casts of the same rows, chance included: a token's number travels with them."""
    with Pool(2, timeout=600) as pool:
        for case, (overrides, knobs) in APART.items():
            for errors, sent, (rows, slots, back) in pool.run(both, case):
                wrong = {n: e for n, e in errors.items() if not e < 2e-6}
                assert not wrong, (case, wrong)
                x, row = D + 2 if "rows of fp8" in case else 4 * D, 4 * D
                forward = 2 if knobs.get("remat") == "full" else 1  # up to the experts
                slot = 16 + 8 * compose(["recipe=tiny_moe", *overrides]).precision.chance
                assert sent["intra", "dispatch"] == rows * (forward * x + row), case
                assert sent["intra", "combine"] == back * (2 * row + 4), case
                assert sent["intra", "slots"] == slots * (forward * slot + 12), case
                assert sent["intra", "counts"] == forward * 4 * EXPERTS, case


@pytest.mark.parametrize(
    ("overrides", "target", "inside"),
    [
        (["precision=fp8_block"], "sm_90a", True),
        (["precision=fp8_block"], "gfx950", False),
        (["precision=fp8_block", "precision.dispatch=high"], "sm_90a", False),
        (["precision=fp8_block", "precision.fprop.x.scale=fp32", "precision.fprop.x.rule=amax"], "sm_90a", False),
        (["precision=fp8_block", "precision.layers=[attention]"], "sm_90a", False),
        (["precision=nvfp4"], "sm_90a", False),
    ],
)
def test_where_products_are(overrides: list[str], target: str, inside: bool) -> None:
    config = compose(["recipe=tiny_moe", "parallel.expert_path=fused", *overrides])
    assert products_inside(config.precision, target) == inside


def test_weights_of_the_kernels_are_cast_alike_on_a_gpu() -> None:
    """There by a kernel, on a CPU by the emulation."""
    config = compose(["recipe=tiny_moe", "precision=fp8_block"]).precision
    w = torch.randn(3, 150, 260, generator=torch.Generator().manual_seed(0))
    both = [coded(Weight(Precision(config, backend=backend), "w"), w) for backend in ("torch", "triton")]
    for one, other in zip(*both, strict=True):
        assert torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


def test_the_way_back_is_high() -> None:
    with pytest.raises(UserError) as refused:
        compose(["recipe=tiny_moe", "parallel.expert_path=fused", "precision.combine=logfmt8"])
    assert str(refused.value) == "precision.combine=logfmt8: must be high with parallel.expert_path=fused"
