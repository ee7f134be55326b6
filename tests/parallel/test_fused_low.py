"""The fused expert path in low precision, on two ranks, against the all-to-all path, which emulates it: rows and products of fp8
in the kernels, and recipes whose products are apart from them."""

import time
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.kernels.symmetric import FusedError
from moesaic.launch.cli import UserError, compose
from moesaic.moe.low import LowExperts, Weight
from moesaic.moe.precision import Precision
from moesaic.parallel.apart import products_inside
from moesaic.parallel.apply import parallelize
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.expert import AllToAllPath
from moesaic.parallel.fused import coded
from moesaic.parallel.mesh import make_meshes
from tests.parallel.pool import Pool
from tests.parallel.test_expert import CONFIG, WORKLOADS, difference, experts_of, routing_of, run, tokens_of
from tests.parallel.test_expert import EXPERTS as EXPERTS_OF
from tests.parallel.test_expert import D as D_OF
from tests.parallel.test_fused import all_to, make_path

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
NEAR = 2e-3


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
    return distances(found, expected), sent, counts


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor, |error| / |expected|. Products of other shapes add up in another order on some CPUs, and a last bit may
    move a code: far less than what a recipe's casts do, some hundredths."""
    return {n: ((found[n] - e).norm() / e.norm()).item() for n, e in expected.items()}


def test_equals_the_emulation_and_sends_fewer_bytes() -> None:
    with Pool(2, timeout=600) as pool:
        for case, (_, knobs) in CASES.items():
            for errors, sent, (rows, slots, back) in pool.run(both, case):
                wrong = {n: e for n, e in errors.items() if not e < NEAR}
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
                wrong = {n: e for n, e in errors.items() if not e < NEAR}
                assert not wrong, (case, wrong)
                x, row = D + 2 if "rows of fp8" in case else 4 * D, 4 * D
                forward = 2 if knobs.get("remat") == "full" else 1  # up to the experts
                slot = 16 + 8 * compose(["recipe=tiny_moe", *overrides]).precision.chance
                assert sent["intra", "dispatch"] == rows * (forward * x + row), case
                assert sent["intra", "combine"] == back * (2 * row + 4), case
                assert sent["intra", "slots"] == slots * (forward * slot + 12), case
                assert sent["intra", "counts"] == forward * 4 * EXPERTS, case


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(difference(found[n], e) for n, e in expected.items())


def low_part(recipe: str, bias: bool) -> Any:
    """A rank's experts, by a recipe."""
    part = experts_of(bias, 2, dist.get_rank())
    config = compose(["recipe=tiny_moe", f"precision={recipe}"]).precision
    part.low = LowExperts(Precision(config), "layer 0", part.w_up_EGD.shape[0] * 2)
    return part


def workloads() -> list[tuple[str, str, float]]:
    """(recipe, workload, the largest difference to the all-to-all path): in training, and where nothing is kept."""
    found, rank = [], dist.get_rank()
    other = AllToAllPath(dist.group.WORLD)
    for recipe, bias, once in (("mxint8", True, True), ("quartet", False, False)):
        path, part = make_path(fused_once=once), low_part(recipe, bias)
        path.space.numbers = True
        path.space.tokens = -1
        for name in WORKLOADS:
            expected, got = run(other, part, name, rank), run(path, part, name, rank)
            found.append((recipe, name, worst(got, expected)))
        part.eval()
        torch.manual_seed(2 + rank)
        tokens = tokens_of("zipf", rank)
        x, weights = torch.randn(tokens, D_OF), torch.rand(tokens, EXPERTS_OF)
        with torch.inference_mode():
            routing = routing_of("zipf", rank, x, weights)
            found.append((recipe, "inference", difference(path(x, routing, part), other(x, routing, part))))
    part, path = low_part("mxint8", False), make_path()
    path.space.compute, path.space.tokens = torch.bfloat16, -1
    expected, got = (run(p, part, "zipf", rank, torch.bfloat16) for p in (other, path))
    return [*found, ("mxint8", "bf16", worst(got, expected))]


def test_every_workload_with_products_apart() -> None:
    """In bf16 each result is rounded, where the other path rounds a sum."""
    with Pool(2, timeout=600) as pool:
        for errors in pool.run(workloads):
            wrong = [case for case in errors if not case[2] < (2e-2 if case[1] == "bf16" else 2e-6)]
            assert not wrong and len(errors) == 2 * len(WORKLOADS) + 3, wrong


def through_a_run(path: str, remat: str) -> dict[str, Tensor]:
    """Steps before and in the high tail, of an evaluation and two micro-batches each, of a model whose first block is high."""
    c = compose(["recipe=tiny_moe", *KNOBS, "precision=mxint8", "model.n_layers=2", "precision.high_first=1",
                 "precision.high_tail=0.5"])  # fmt: skip
    meshes, found = make_meshes("cpu", 2, 1), {}
    model = parallelize(
        c.model, ParallelConfig(expert="2", expert_path=path, remat=remat), meshes, seed=0, device=CPU, compute=torch.float32,
        precision=c.precision, tokens=TOKENS,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in (1, 8):
        model.precision.begin(step, 10)
        batches = [torch.randint(0, 300, (2, length + 1), generator=generator) for length in (5, TOKENS // 2)]
        model.eval()
        with torch.no_grad():
            found[f"evaluation {step}"] = model(batches[0][:, :-1], batches[0][:, 1:]).loss.clone()
        model.train()
        for i, tokens in enumerate(batches):
            loss = model(tokens[:, :-1], tokens[:, 1:]).loss
            loss.backward()
            found[f"loss {step} {i}"] = loss.detach()
    return found | {n: p.grad.full_tensor().clone() for n, p in model.named_parameters()}


def runs_differ(remat: str) -> float:
    expected = through_a_run("all_to_all", remat)
    return max(distances(through_a_run("fused", remat), expected).values())


def test_inside_and_apart_in_one_run() -> None:
    with Pool(2, timeout=600) as pool:
        for remat in ("none", "full"):
            assert max(pool.run(runs_differ, remat)) < NEAR, remat


def room_for_x_again(*knobs: str) -> int:
    c = compose(["recipe=tiny_moe", *KNOBS, "model.n_layers=2", *knobs])
    model = parallelize(
        c.model, ParallelConfig(expert="2", expert_path="fused"), make_meshes("cpu", 2, 1), seed=0, device=CPU,
        compute=torch.float32, precision=c.precision, tokens=TOKENS,
    )  # fmt: skip
    return int(next(iter(model.moe_layers())).path.space.setting.heap.regions["again"][0][0])


def test_a_run_has_room_for_x_again_where_it_travels_again() -> None:
    with Pool(2, timeout=600) as pool:
        assert pool.run(room_for_x_again, "precision=mxint8") == [0, 0]
        for knobs in (["precision=fp32"], ["precision=mxint8", "precision.high_first=1"]):
            assert min(pool.run(room_for_x_again, *knobs)) > 0, knobs


def told_late(what: str) -> str:
    """As on CUDA, where the host doesn't wait for a launch before it goes on; the error of this rank."""
    rank, part = dist.get_rank(), low_part("mxfp8", False)
    room = dict(tokens=25, max_recv_tokens_factor=1.0) if what == "room" else dict(timeout=1.0)
    path = make_path(CONFIG, **room)
    space = path.space
    if space.tokens < 25:
        space.reserve(25)
    failed = space.setting.heap.view("failed")
    space.check = lambda told: space.watched.append((None, failed.clone(), told))
    x, weights = torch.randn(25, D_OF), torch.rand(25, EXPERTS_OF)
    until = time.monotonic() + 100
    while what == "met" and rank == 1 and not failed.any() and time.monotonic() < until:
        time.sleep(0.1)  # until rank 0 has given up waiting for this one
    with pytest.raises(FusedError) as error:
        path(x, all_to(25, [6, 7], weights), part)
    dist.barrier = lambda *a: None
    return str(error.value)


@pytest.mark.parametrize(("what", "line"), [("room", "has no room: "), ("met", "waited in vain for `met` of rank 1")])
def test_a_failure_is_told_before_rows_are_believed(what: str, line: str) -> None:
    with Pool(2, timeout=120) as pool:
        for told in pool.run(told_late, what):
            assert told.startswith("parallel.expert_path=fused, dispatch in forward of layer 0: rank ") and line in told


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
