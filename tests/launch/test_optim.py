"""The optimizer against a plain fp64 loop, the schedule against closed forms and torch's own schedulers."""

import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moesaic.launch.optim import learning_rate, make_optimizer, set_lr
from moesaic.launch.schema import OptimConfig


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 4)
        self.proj = nn.Linear(4, 6)
        self.norm = nn.RMSNorm(6)
        self.experts = nn.Parameter(torch.randn(3, 8, 4))
        self.b_up_EG = nn.Parameter(torch.randn(3, 8))
        self.frozen = nn.Parameter(torch.randn(2, 2), requires_grad=False)


def naive_adamw(
    value: torch.Tensor, grads: list[torch.Tensor], lrs: list[float], decay: float, c: OptimConfig
) -> torch.Tensor:
    """AdamW by the paper's algorithm (arXiv 1711.05101), one parameter, fp64."""
    value, m, v = value.double(), 0.0, 0.0
    for t, (grad, lr) in enumerate(zip(grads, lrs, strict=True), start=1):
        grad = grad.double()
        m = c.beta1 * m + (1 - c.beta1) * grad
        v = c.beta2 * v + (1 - c.beta2) * grad**2
        m_hat, v_hat = m / (1 - c.beta1**t), v / (1 - c.beta2**t)
        value = value - lr * decay * value - lr * m_hat / (v_hat.sqrt() + c.eps)
    return value


def test_decay_falls_on_matrices_only():
    model = Block()
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: decay.get(id(p)) for name, p in model.named_parameters()}
    assert by_name == {
        "embedding.weight": 0.3,
        "proj.weight": 0.3,
        "experts": 0.3,
        "b_up_EG": 0.0,
        "norm.weight": 0.0,
        "proj.bias": 0.0,
        "frozen": None,
    }


def test_a_tied_parameter_is_updated_once():
    model = Block()
    model.head = nn.Linear(4, 11, bias=False)
    model.head.weight = model.embedding.weight
    optimizer = make_optimizer(model, OptimConfig())
    params = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert params.count(id(model.embedding.weight)) == 1


def test_steps_match_a_naive_fp64_loop():
    config = OptimConfig(lr=0.05, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.4)
    model = Block()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads: dict[str, list[torch.Tensor]] = {name: [] for name in start}
    lrs = [0.05, 0.02, 0.1, 0.01]
    optimizer = make_optimizer(model, config)
    for lr in lrs:
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
            grads[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
        set_lr(optimizer, lr)
        optimizer.step()
    assert torch.equal(model.frozen, start["frozen"])
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = config.weight_decay if p.ndim >= 2 and name != "b_up_EG" else 0.0
            expected = naive_adamw(start[name], grads[name], lrs, decay, config)
            torch.testing.assert_close(p.detach().double(), expected, rtol=2e-6, atol=2e-6)


def test_dtensors_on_two_meshes_step_as_plain_tensors():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, sharded = Block(), Block()
        flat = DeviceMesh("cpu", torch.arange(1))
        grid = DeviceMesh("cpu", torch.arange(1).reshape(1, 1))
        for module in sharded.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                mesh, placements = (grid, [Shard(1), Shard(0)]) if name == "experts" else (flat, [Shard(0)])
                spread = nn.Parameter(distribute_tensor(p.detach(), mesh, placements), requires_grad=p.requires_grad)
                setattr(module, name, spread)
        optimizers = [make_optimizer(model, OptimConfig(lr=0.1)) for model in (plain, sharded)]
        for step in range(3):
            torch.manual_seed(step)
            for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
                p.grad = torch.randn_like(p) if p.requires_grad else None
                assert isinstance(q, DTensor)
                q.grad = distribute_tensor(p.grad.clone(), q.device_mesh, q.placements) if p.requires_grad else None
            for optimizer in optimizers:
                optimizer.step()
        for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
            assert torch.equal(p, q.full_tensor())
        assert not torch.equal(plain.experts, Block().experts)
    finally:
        dist.destroy_process_group()


def test_state_restored_from_a_state_dict_continues_exactly():
    model = Block()
    optimizer = make_optimizer(model, OptimConfig())

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()

    step(model, optimizer, 0)
    again = copy.deepcopy(model)
    restored = make_optimizer(again, OptimConfig())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, 1)
    step(again, restored, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def rates(steps: int, config: OptimConfig) -> list[float]:
    return [learning_rate(step, steps, config) for step in range(steps)]


def test_cosine_by_hand():
    """Warm-up over 4 steps, peak at step 3, then 6 steps of half a cosine down to 0.1 at step 9."""
    config = OptimConfig(lr=2.0, warmup=4, lr_min_ratio=0.1)
    fall = [2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 6))) for k in range(1, 7)]
    assert rates(10, config) == pytest.approx([0.5, 1.0, 1.5, 2.0, *fall])
    assert fall[-1] == pytest.approx(0.2)


def test_wsd_by_hand():
    """Warm-up over 2 steps, flat to step 5, then the last 0.4 * 10 steps on a line down to 0.1 of the peak."""
    config = OptimConfig(lr=2.0, schedule="wsd", warmup=2, lr_min_ratio=0.1, decay_ratio=0.4)
    assert rates(10, config) == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.55, 1.1, 0.65, 0.2])


def test_wsd_falls_from_the_peak_where_warmup_takes_part_of_the_fall():
    """The last 0.4 * 10 steps would fall, but warm-up ends at step 7: two steps are left, from 1 to 0."""
    config = OptimConfig(lr=1.0, schedule="wsd", warmup=8, lr_min_ratio=0.0, decay_ratio=0.4)
    assert rates(10, config)[7:] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedules_match_torch(schedule: str):
    steps, warmup, ratio = 50, 7, 0.25
    config = OptimConfig(lr=0.3, schedule=schedule, warmup=warmup, lr_min_ratio=ratio, decay_ratio=0.3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    schedulers = torch.optim.lr_scheduler
    rise = schedulers.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    if schedule == "cosine":
        parts = [rise, schedulers.CosineAnnealingLR(optimizer, steps - warmup, eta_min=config.lr * ratio)]
        milestones = [warmup - 1]
    else:
        flat = schedulers.ConstantLR(optimizer, 1.0)
        parts = [rise, flat, schedulers.LinearLR(optimizer, 1.0, ratio, total_iters=15)]
        milestones = [warmup - 1, steps - 1 - 15]
    reference = schedulers.SequentialLR(optimizer, parts, milestones)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates(steps, config) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 3, 40, 1000])
@pytest.mark.parametrize("steps", [1, 2, 5, 40])
@pytest.mark.parametrize("decay_ratio", [0.0, 0.2, 1.0])
def test_every_schedule_rises_to_the_peak_then_falls(schedule: str, warmup: int, steps: int, decay_ratio: float):
    config = OptimConfig(lr=0.5, schedule=schedule, warmup=warmup, lr_min_ratio=0.0, decay_ratio=decay_ratio)
    found = rates(steps, config)
    peak = max(1, min(warmup, steps)) - 1
    assert found[0] > 0
    assert found[peak] == pytest.approx(0.5) == max(found)
    assert all(a < b for a, b in itertools.pairwise(found[: peak + 1]))
    assert all(a >= b >= 0 for a, b in itertools.pairwise(found[peak:]))
    if peak < steps - 1 and (schedule == "cosine" or round(decay_ratio * steps) > 0):
        assert found[-1] == pytest.approx(0.0, abs=1e-12)
