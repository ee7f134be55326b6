"""One global gradient norm, whatever the sharding of each parameter."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic.parallel.fragment import Fragment


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, fp32 scalar, equal on every rank. Collective."""
    return norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `largest` (0: leave them); returns the norm before. Collective."""
    return clip([p.grad for p in parameters if p.grad is not None], largest)


@torch.no_grad()
def norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, fp32 scalar, equal on every rank. Collective.

    Each rank adds the squares of what it holds, divided by the number of ranks that hold the same: a tensor sharded over
    all ranks counts in full, one that lives on a mesh of fewer ranks, or is replicated over some of them, by its share.
    `torch.nn.utils.get_total_norm` can't: it stacks DTensors, and refuses two meshes.
    """
    squares = [torch.linalg.vector_norm(local(t), dtype=torch.float32).square() / holders(t) for t in tensors]
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def clip(tensors: Iterable[Tensor], largest: float) -> Tensor:
    """Scale tensors so that their common norm is at most `largest` (0: leave them); returns the norm before. Collective."""
    tensors = list(tensors)
    before = norm(tensors)
    if largest > 0:
        torch._foreach_mul_([local(t) for t in tensors], (largest / (before + 1e-6)).clamp(max=1.0))
    return before


def local(tensor: Tensor) -> Tensor:
    """The values of `tensor` that this rank holds, in place."""
    if isinstance(tensor, Fragment):
        return tensor.flat
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def holders(tensor: Tensor) -> int:
    """How many ranks hold the same values of `tensor` as this one."""
    world = dist.get_world_size()
    if isinstance(tensor, Fragment):
        return 1
    if not isinstance(tensor, DTensor):
        return world
    shards = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        assert not placement.is_partial(), f"pending reduction: {placement}"
        shards *= 1 if placement.is_replicate() else size
    return world // shards
