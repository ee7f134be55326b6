"""Mistakes made on purpose, each one that some framework has shipped: the matrix must turn red.

A mutation patches the product in a worker, for the time of a cell. tests.parallel.test_parity says which cells it breaks.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from moesaic.kernels import permute
from moesaic.moe import router
from moesaic.parallel import clip, expert, fsdp

Patches = list[Any]


def expert_gradients_divided() -> Patches:
    """FSDP2's default, the mean over the ranks that hold the same experts, which is not the sum over all."""
    right = fsdp.shard_experts

    def wrong(experts: Any, meshes: Any, policy: Any) -> None:
        right(experts, meshes, policy)
        experts.set_gradient_divide_factor(float(dist.get_world_size()))

    return [patch.object(fsdp, "shard_experts", wrong)]


def norm_of_shards_alone() -> Patches:
    """Each rank clips by what it holds."""
    local = SimpleNamespace(get_world_size=dist.get_world_size, all_reduce=lambda tensor: None)
    return [patch.object(clip, "dist", local)]


def norm_averaged() -> Patches:
    """The mean of the ranks' norms (github.com/deepspeedai/DeepSpeed/issues/8475)."""

    def wrong(parameters: Any) -> torch.Tensor:
        squares = [clip_local(p.grad).square().sum() for p in parameters]
        norm = torch.stack(squares).sum().sqrt()
        dist.all_reduce(norm)
        return norm / dist.get_world_size()

    return [patch.object(clip, "gradient_norm", wrong)]


def clip_local(gradient: Any) -> torch.Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def norm_counts_experts_often() -> Patches:
    """A replicated gradient counts once for each rank that holds it."""

    def wrong(parameters: Any) -> torch.Tensor:
        total = torch.stack([clip_local(p.grad).square().sum() for p in parameters]).sum()
        dist.all_reduce(total)
        return total.sqrt() * (1 + 1e-4)

    return [patch.object(clip, "gradient_norm", wrong)]


def combine_in_any_order() -> Patches:
    """A token's rows are added as they come, as atomics do: right to 1e-5, other bits in every run."""
    anything = torch.Generator().manual_seed(torch.seed() % 2**31)

    def wrong(y_RD: torch.Tensor, bag: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
        if starts is None and bag.numel():
            bag = bag[:, torch.randperm(bag.shape[1], generator=anything)]
        return permute.sum_bags(y_RD, bag, starts)

    return [patch.object(expert, "sum_bags", wrong)]


def combine_to_other_tokens() -> Patches:
    """What comes home is one row off."""
    right = expert._Combine.forward

    def wrong(ctx: Any, y_RD: torch.Tensor, rows: Any) -> torch.Tensor:
        return right(ctx, y_RD.roll(1, 0), rows)

    return [patch.object(expert._Combine, "forward", staticmethod(wrong))]


def dispatch_gradient_doubled() -> Patches:
    """The loss is right, and every gradient through dispatch twice itself (github.com/pytorch/pytorch/issues/160285)."""
    right = expert._AllToAll.backward

    def wrong(ctx: Any, grad: torch.Tensor) -> Any:
        return right(ctx, 2 * grad)

    return [patch.object(expert._AllToAll, "backward", staticmethod(wrong))]


def router_weights_to_other_rows() -> Patches:
    """Rows are paired with the weights of their neighbours (github.com/huggingface/transformers/issues/45473)."""
    right = expert.exchange

    def wrong(rows: torch.Tensor, send: list[int], receive: list[int], group: Any) -> torch.Tensor:
        return right(rows.roll(1, 0) if rows.shape[1] == 1 else rows, send, receive, group)

    return [patch.object(expert, "exchange", wrong)]


def gradients_not_summed() -> Patches:
    """The reduce-scatter of gradients gives each rank its own part."""
    right = dist.reduce_scatter_tensor

    def wrong(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        work = right(output, input, *args, **kwargs)
        group = kwargs.get("group")
        if work is not None:
            work.wait()
        output.copy_(input.chunk(dist.get_world_size(group))[dist.get_rank(group)])
        return work

    return [patch.object(dist, "reduce_scatter_tensor", wrong)]


def loss_averaged() -> Patches:
    """The loss is divided by the ranks once more."""

    def wrong(self: Any, loss: torch.Tensor, last: bool) -> None:
        (loss / dist.get_world_size()).backward()

    return [patch.object(fsdp.FSDPEngine, "backward", wrong)]


def same_experts_everywhere() -> Patches:
    """Every rank begins with the experts of rank 0."""
    right = fsdp.divide_experts

    def wrong(experts: Any, meshes: Any) -> None:
        for weight in experts.parameters(recurse=False):
            first = weight.detach().chunk(meshes.expert_parallel)[0]
            weight.data.copy_(first.repeat(meshes.expert_parallel, *[1] * (weight.ndim - 1)))
        right(experts, meshes)

    return [patch.object(fsdp, "divide_experts", wrong)]


def another_route() -> Patches:
    """The last rank sends its first token to the second-best experts."""
    right = router.stable_topk

    def wrong(scores_TE: torch.Tensor, k: int) -> torch.Tensor:
        chosen = right(scores_TE, k)
        if dist.get_rank() == dist.get_world_size() - 1 and scores_TE.shape[0] and k < scores_TE.shape[1]:
            chosen[0] = right(scores_TE[:1], k + 1)[0, 1:]
        return chosen

    return [patch.object(router, "stable_topk", wrong)]


MUTATIONS: dict[str, Callable[[], Patches]] = {
    make.__name__: make
    for make in (
        expert_gradients_divided, norm_of_shards_alone, norm_averaged, norm_counts_experts_often, combine_in_any_order,
        combine_to_other_tokens, dispatch_gradient_doubled, router_weights_to_other_rows, gradients_not_summed,
        loss_averaged, same_experts_everywhere, another_route,
    )
}  # fmt: skip


@contextlib.contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """The product broken by the mutation of this name (None: whole)."""
    with contextlib.ExitStack() as stack:
        for change in MUTATIONS[name]() if name else ():
            stack.enter_context(change)
        yield
