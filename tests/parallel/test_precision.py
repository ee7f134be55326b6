"""Every recipe of low precision on two ranks, with both engines and expert paths, against one process."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.launch import cli
from moesaic.launch.optim import make_optimizer
from moesaic.moe.low import lower
from moesaic.moe.model import build
from moesaic.parallel.apply import parallelize, start_engine
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.deoscillate import Deoscillation
from moesaic.parallel.mesh import make_meshes
from moesaic.parallel.shards import parts
from tests.parallel.ranks import run_ranks

CPU = torch.device("cpu")
RECIPES = "fp8_block mxfp8 mxint8 nvfp4 quartet quartet2 mxfp4_deosc".split()
KNOBS = [
    "model.d_model=64", "model.n_layers=2", "model.n_heads=2", "model.d_expert=48", "model.d_shared=32", "model.n_experts=6",
    "model.vocab_size=320", "model.router.balance_coef=0", "model.router.z_coef=0", "precision.high_last=0", "model.init_std=0.1",
]  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "local": dict(expert="1"),
    "all_to_all": dict(expert="2"),
    "all_to_all, remat": dict(expert="2", remat="full"),
    "deepspeed": dict(expert="2", engine="deepspeed", zero_stage=2),
    "deepspeed, local": dict(expert="1", engine="deepspeed", zero_stage=3),
    "fused": dict(expert="2", expert_path="fused"),
    "deepspeed, fused": dict(expert="2", engine="deepspeed", zero_stage=2, expert_path="fused"),
}
SEQUENCES, LENGTH = 2, 40


def config(recipe: str, *knobs: str) -> Any:
    return cli.compose(["recipe=tiny_moe", f"precision={recipe}", *KNOBS, *knobs])


def batch(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 256, (SEQUENCES, LENGTH + 1), generator=generator)


def backward(model: Any, rank: int, step: Any = None) -> float:
    """The loss of a rank's micro-batch, whose gradients are added into the parameters."""
    model.precision.begin(3, 10)
    model.precision.tokens(rank * SEQUENCES, SEQUENCES, LENGTH, CPU)
    tokens = batch(rank)
    loss = model(tokens[:, :-1], tokens[:, 1:]).loss / (2 * SEQUENCES * LENGTH)
    (step or Tensor.backward)(loss)
    return float(loss.detach())


def on_a_rank(
    recipes: list[str], layouts: dict[str, dict[str, Any]], *knobs: str
) -> dict[tuple[str, str], tuple[float, dict[str, Tensor]]]:
    found = {}
    for layout, chosen in layouts.items():
        parallel = ParallelConfig(**chosen)
        meshes = make_meshes("cpu", int(parallel.expert), 1)
        for recipe in recipes:
            c = config(recipe, *knobs)
            model = parallelize(
                c.model, parallel, meshes, seed=0, device=CPU, compute=torch.float32, precision=c.precision
            )
            engine = start_engine(parallel, model, make_optimizer(model, c.optim))
            loss = torch.tensor(backward(engine.model, dist.get_rank(), lambda x: engine.backward(x, last=True)))
            dist.all_reduce(loss)
            whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in engine.gradients().items()}
            found[layout, recipe] = (loss.item(), {n: g.clone() for n, g in whole.items()})
    return found if dist.get_rank() == 0 else {}


def snr(x: Tensor, reference: Tensor) -> float:
    return -10 * math.log10(((x - reference).square().sum() / reference.square().sum()).item() + 1e-20)


# Decibels between layouts whose ranks compute other rows. The embedding's gradient comes of row-wise casts alone, which are equal
# bit by bit, chance included, but for those with a factor of the tensor (nvfp4, quartet2). In the gradients of experts' weights,
# other rows meet in a block.
ROW_WISE = {"nvfp4": 7, "quartet2": 8}
BLOCKS = {"fp8_block": 60, "mxfp8": 60, "mxint8": 38, "mxfp4_deosc": 9, "quartet": 9, "nvfp4": 5, "quartet2": 7}


def test_layouts_agree(tmp_path: Path) -> None:
    found = run_ranks(on_a_rank, 2, tmp_path, RECIPES, LAYOUTS, timeout=200)[0]
    for recipe in RECIPES:
        c = config(recipe)
        model = build(c.model, 0, CPU)
        lower(model, c.precision)
        loss = sum(backward(model, rank) for rank in range(2))
        expected = {n: p.grad for n, p in model.named_parameters()}
        for layout, knobs in LAYOUTS.items():
            other, gradients = found[layout, recipe]
            same_rows = knobs["expert"] == "1"  # only sums over ranks are in another order
            assert other == pytest.approx(loss, rel=3e-3 if recipe in ROW_WISE and not same_rows else 1e-6), (
                recipe,
                layout,
            )
            for name, gradient in expected.items():
                least = 100 if same_rows else BLOCKS[recipe] if ".experts." in name else ROW_WISE.get(recipe, 100)
                assert snr(gradients[name], gradient) > least, (recipe, layout, name)


def test_two_hops_agree(tmp_path: Path) -> None:
    """Over two nodes of two ranks: rows of fp8, and the numbers of tokens that chance depends on, arrive in two hops."""
    layouts = {path: dict(expert="4", expert_path=path, node_size="2") for path in ("two_hop", "fused")}
    recipes = ["fp8_block", "quartet"]
    knobs = ["model.n_experts=8"]
    found = run_ranks(on_a_rank, 4, tmp_path, recipes, layouts, *knobs, timeout=200)[0]
    for recipe in recipes:
        c = config(recipe, *knobs)
        model = build(c.model, 0, CPU)
        lower(model, c.precision)
        loss = sum(backward(model, rank) for rank in range(4))
        for path in layouts:
            other, gradients = found[path, recipe]
            assert other == pytest.approx(loss, rel=1e-6), (recipe, path)
            for name, p in model.named_parameters():
                assert p.grad is not None
                least = BLOCKS[recipe] if ".experts." in name else 100
                assert snr(gradients[name], p.grad) > least, (recipe, path, name)


NATIVE, SMALL = ["fp8_block", "mxfp8"], ["model.n_layers=1", "model.d_shared=0", "model.n_experts=4"]


def by_kernels() -> dict[str, tuple[float, dict[str, Tensor]]]:
    found = {}
    parallel, meshes = ParallelConfig(expert="2"), make_meshes("cpu", 2, 1)
    for recipe in NATIVE:
        c = config(recipe, "model.experts_backend=triton", *SMALL)
        model = parallelize(c.model, parallel, meshes, seed=0, device=CPU, compute=torch.float32, precision=c.precision)
        engine = start_engine(parallel, model, make_optimizer(model, c.optim))
        loss = torch.tensor(backward(engine.model, dist.get_rank(), lambda x: engine.backward(x, last=True)))
        dist.all_reduce(loss)
        found[recipe] = loss.item(), {n: g.full_tensor().clone() for n, g in engine.gradients().items()}
    return found if dist.get_rank() == 0 else {}


def test_kernels_are_the_emulation(tmp_path: Path) -> None:
    """Attention, experts on both ranks and their gradients, by kernels on two ranks; emulated in one process."""
    for recipe, (loss, gradients) in run_ranks(by_kernels, 2, tmp_path, timeout=200)[0].items():
        c = config(recipe, "model.experts_backend=torch", *SMALL)
        model = build(c.model, 0, CPU)
        lower(model, c.precision)
        assert loss == pytest.approx(sum(backward(model, rank) for rank in range(2)), rel=1e-6)
        for name, p in model.named_parameters():
            assert p.grad is not None
            assert snr(gradients[name], p.grad) > 60, (recipe, name)  # what a last bit moves to the next code


def deoscillate() -> dict[str, tuple[int, dict[str, Tensor], dict[str, Tensor]]]:
    """Six steps by hand: a weight that crosses a boundary at each, one that moves away, the rest at rest."""
    found = {}
    for layout, knobs in LAYOUTS.items():
        if "remat" in layout:
            continue
        parallel = ParallelConfig(**knobs)
        meshes = make_meshes("cpu", int(parallel.expert), 1)
        c = config("mxfp4_deosc", "precision.deosc_period=6", "precision.deosc_start=2", "precision.deosc_ratio=16")
        model = parallelize(c.model, parallel, meshes, seed=0, device=CPU, compute=torch.float32, precision=c.precision)
        engine = start_engine(parallel, model, make_optimizer(model, c.optim))
        model.precision.begin(0, 100)
        deoscillation = Deoscillation(model, engine)
        weights = {n: t for n, t in engine.weights().items() if n in NAMES}
        whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for n, t in weights.items()}
        deoscillation.start(0)
        for step in range(1, 9):
            for name, t in weights.items():
                for piece, values in parts(name, t):
                    box = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))
                    values.copy_(moved(whole[name], step)[box])
            engine.loaded(engine.steps())
            snapped = deoscillation.after(step)
            assert (snapped is None) == (step != 8), step
        assert snapped is not None and deoscillation.state
        model.precision.high = True  # from here to the end of the run
        assert deoscillation.after(9) is None and not deoscillation.state
        after = {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in weights.items()}
        found[layout] = (snapped, {n: moved(w, 8) for n, w in whole.items()}, after)
    return found


NAMES = ("blocks.0.attention.wo.weight", "blocks.1.ffn.experts.w_down_EDF")


def moved(w: Tensor, step: int) -> Tensor:
    """Of block (0, 0): (0, 0) sets the scale, (1, 1) hops about a boundary, (2, 2) grows."""
    w = w.clone()
    for matrix in w.view(-1, *w.shape[-2:]):
        matrix[:32, :32] = 0.0
        matrix[0, 0] = 6.0
        matrix[1, 1] = 2.5 + 0.001 * (-1) ** step  # 2 or 3
        matrix[2, 2] = 0.3 * step
    return w


def test_weights_that_hop_are_put_on_a_value(tmp_path: Path) -> None:
    for layout, (snapped, before, after) in run_ranks(deoscillate, 2, tmp_path)[0].items():
        assert snapped == 1 + 6, layout  # one of each matrix; six experts
        for name, w in before.items():
            for old, new in zip(w.view(-1, *w.shape[-2:]), after[name].view(-1, *w.shape[-2:]), strict=True):
                expected = old.clone()
                expected[1, 1] = 3.0
                assert torch.equal(new, expected), (layout, name)
