"""One global gradient norm, whatever the sharding of each parameter."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, fp32 scalar, equal on every rank. Collective.

    Each rank adds the squares of what it holds, divided by the number of ranks that hold the same: a parameter sharded over
    all ranks counts in full, one that lives on a mesh of fewer ranks, or is replicated over some of them, by its share.
    `torch.nn.utils.get_total_norm` can't: it stacks DTensors, and refuses two meshes.
    """
    world = dist.get_world_size()
    squares: list[Tensor] = []
    for p in parameters:
        if p.grad is None:
            continue
        local, holders = p.grad, world
        if isinstance(p.grad, DTensor):
            local = p.grad.to_local()
            mesh = p.grad.device_mesh
            shards = 1
            for size, placement in zip(mesh.shape, p.grad.placements, strict=True):
                assert not placement.is_partial(), f"pending reduction: {placement}"
                shards *= 1 if placement.is_replicate() else size
            holders = world // shards
        squares.append(torch.linalg.vector_norm(local, dtype=torch.float32).square() / holders)
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `largest` (0: leave them); returns the norm before. Collective."""
    parameters = list(parameters)
    norm = gradient_norm(parameters)
    if largest > 0:
        scale = (largest / (norm + 1e-6)).clamp(max=1.0)
        local = [g.to_local() if isinstance(g, DTensor) else g for p in parameters if (g := p.grad) is not None]
        torch._foreach_mul_(local, scale)
    return norm
