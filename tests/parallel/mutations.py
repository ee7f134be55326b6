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
from moesaic.moe import replay, router
from moesaic.parallel import apply, clip, expert, fsdp

Patches = list[Any]


def expert_gradients_divided() -> Patches:
    """FSDP2's default, the mean over the ranks that hold the same experts, which is not the sum over all."""
    right = fsdp.shard_experts

    def wrong(experts: Any, *arguments: Any) -> None:
        right(experts, *arguments)
        experts.set_gradient_divide_factor(float(dist.get_world_size()))

    return [patch.object(fsdp, "shard_experts", wrong)]


def norm_of_shards_alone() -> Patches:
    """Each rank clips by what it holds."""
    local = SimpleNamespace(get_world_size=dist.get_world_size, all_reduce=lambda tensor: None)
    return [patch.object(clip, "dist", local)]


def norm_averaged() -> Patches:
    """The mean of the ranks' norms (github.com/deepspeedai/DeepSpeed/issues/8475)."""

    def wrong(tensors: Any) -> torch.Tensor:
        norm = torch.stack([clip.local(t).square().sum() for t in tensors]).sum().sqrt()
        dist.all_reduce(norm)
        return norm / dist.get_world_size()

    return [patch.object(clip, "norm", wrong)]


def norm_of_dense_alone() -> Patches:
    """Experts are left out (github.com/NVIDIA/Megatron-LM/pull/5916)."""
    right = clip.norm
    return [patch.object(clip, "norm", lambda tensors: right([t for t in tensors if t.ndim < 3]))]


def norm_counts_copies() -> Patches:
    """A gradient counts once for each rank that holds it."""
    return [patch.object(clip, "holders", lambda tensor: 1)]


def combine_in_any_order() -> Patches:
    """A token's rows are added as they come, as atomics do: right to 1e-5, other bits in every run."""
    anything = torch.Generator().manual_seed(torch.seed() % 2**31)

    def wrong(y_RD: torch.Tensor, bag: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        mixed = torch.randperm(bag.numel(), generator=anything)
        owner = torch.arange(starts.numel() - 1).repeat_interleave(starts.diff())
        return permute.sum_bags(y_RD, bag[mixed[owner[mixed].argsort(stable=True)]], starts)

    return [patch.object(expert, "sum_bags", wrong)]


def combine_to_other_tokens() -> Patches:
    """What comes home is one token off."""
    right = expert._Combine.forward

    def wrong(ctx: Any, y_ND: torch.Tensor, *others: Any) -> torch.Tensor:
        return right(ctx, y_ND, *others).roll(1, 0)

    return [patch.object(expert._Combine, "forward", staticmethod(wrong))]


def dispatch_gradient_doubled() -> Patches:
    """The loss is right, and every gradient through dispatch twice itself (github.com/pytorch/pytorch/issues/160285)."""
    right = expert._Dispatch.backward

    def wrong(ctx: Any, dx_ND: torch.Tensor, dweights_S: torch.Tensor) -> Any:
        return right(ctx, 2 * dx_ND, dweights_S)

    return [patch.object(expert._Dispatch, "backward", staticmethod(wrong))]


def router_weights_to_other_rows() -> Patches:
    """Rows are paired with the weights of their neighbours (github.com/huggingface/transformers/issues/45473)."""
    right = expert.Leg.send_slots

    def wrong(leg: Any, row_S: torch.Tensor, weights_S: torch.Tensor) -> Any:
        return right(leg, row_S, weights_S.roll(1, 0))

    return [patch.object(expert.Leg, "send_slots", wrong)]


def gradients_not_summed() -> Patches:
    """The reduce-scatter of gradients gives each rank its own part."""

    def wrong(self: Any, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, **_: Any) -> None:
        output_tensor.copy_(input_tensor.chunk(dist.get_world_size(group))[dist.get_rank(group)])

    return [patch.object(fsdp.SumDirectly, "__call__", wrong)]


def copies_not_summed() -> Patches:
    """The gradients of the copies that HSDP makes are not added."""

    def wrong(self: Any, loss: torch.Tensor, last: bool) -> None:
        with patch.object(dist, "all_reduce", lambda tensor, **_: None):
            loss.backward()

    return [patch.object(fsdp.FSDPEngine, "backward", wrong)]


def loss_averaged() -> Patches:
    """The loss is divided by the ranks once more."""

    def wrong(self: Any, loss: torch.Tensor, last: bool) -> None:
        (loss / dist.get_world_size()).backward()

    return [patch.object(fsdp.FSDPEngine, "backward", wrong)]


def same_experts_everywhere() -> Patches:
    """Every rank begins with the experts of rank 0, as DeepSpeed's ZeRO-3 leaves experts that are plain parameters."""
    right = apply.divide_experts

    def wrong(experts: Any, meshes: Any) -> None:
        for weight in experts.parameters(recurse=False):
            first = weight.detach().chunk(meshes.expert_parallel)[0]
            weight.data.copy_(first.repeat(meshes.expert_parallel, *[1] * (weight.ndim - 1)))
        right(experts, meshes)

    return [patch.object(apply, "divide_experts", wrong)]


def zero_gradients_averaged() -> Patches:
    """DeepSpeed's default for what it reduces: the mean over ranks."""
    from moesaic.parallel import zero

    right = zero.settings
    return [patch.object(zero, "settings", lambda stage: right(stage) | {"gradient_allreduce_op": "mean"})]


def zero_overwrites_experts() -> Patches:
    """Rank 0's take the place of the others', as at DeepSpeed's stage 3, and nobody looks."""
    from moesaic.parallel import zero

    right = zero.hide_experts

    def wrong(model: Any) -> Any:
        hidden = right(model)
        for experts in hidden.values():
            for weight in experts.parameters():
                dist.broadcast(clip.local(weight.detach()), src=0)
        return hidden

    return [patch.object(zero, "hide_experts", wrong)]


def routed_again() -> Patches:
    """Recomputation sends each token where its neighbour went (github.com/NVIDIA-NeMo/Automodel/issues/2635)."""
    right = replay.once

    def wrong(name: str, decide: Callable[[], Any]) -> Any:
        decision = right(name, decide)
        again = replay.replaying() and isinstance(decision, torch.Tensor) and decision.ndim == 2
        return decision.roll(1, 0) if again else decision

    return [patch.object(router, "once", wrong)]


def another_route() -> Patches:
    """The last rank sends its first token to the second-best experts."""
    right = router.stable_topk

    def wrong(scores_TE: torch.Tensor, k: int) -> torch.Tensor:
        chosen = right(scores_TE, k)
        if dist.get_rank() == dist.get_world_size() - 1 and scores_TE.shape[0] and k < scores_TE.shape[1]:
            chosen[0] = right(scores_TE[:1], k + 1)[0, 1:]
        return chosen

    return [patch.object(router, "stable_topk", wrong)]


# The mistakes, and a cell in which each shows: its layout, and axes that are not as by default.
MUTATIONS: dict[str, tuple[Callable[[], Patches], str, dict[str, str]]] = {
    f"{make.__name__}, {layout}": (make, layout, axes)
    for make, layout, axes in (
        (expert_gradients_divided, "EP 2 x FSDP 2", {}),
        (norm_of_shards_alone, "EP 2", {}),
        (norm_averaged, "EP 2", {}),
        (norm_averaged, "ZeRO-2, EP 2", {}),
        (norm_of_dense_alone, "FSDP 2", {}),
        (norm_counts_copies, "HSDP 2 x 2", {}),
        (combine_in_any_order, "EP 4, 2 experts a rank", {"model": "top 4"}),  # two rows can be added in either order
        (combine_to_other_tokens, "EP 2", {}),
        (dispatch_gradient_doubled, "EP 2", {}),
        (router_weights_to_other_rows, "EP 4 in two hops, 2 experts a rank", {}),
        (gradients_not_summed, "FSDP 2", {}),
        (copies_not_summed, "HSDP 2 x 2", {}),
        (loss_averaged, "FSDP 2", {}),
        (same_experts_everywhere, "EP 2", {}),
        (zero_gradients_averaged, "ZeRO-2, EP 2", {}),
        (zero_overwrites_experts, "ZeRO-3, EP 2", {}),
        (routed_again, "FSDP 2", {"remat": "full"}),
        (another_route, "FSDP 2", {}),
    )
}


@contextlib.contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """The product broken by the mutation of this name (None: whole)."""
    with contextlib.ExitStack() as stack:
        for change in MUTATIONS[name][0]() if name else ():
            stack.enter_context(change)
        yield
