"""FSDP2 over the two meshes of a run: dense parameters over `shard`, experts over those ranks that hold the same ones, both in
copies where the meshes have a dimension of replicas (HSDP: gradients are summed over a copy's ranks, then over copies)."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moesaic.moe.experts import Experts
from moesaic.moe.layer import MoE
from moesaic.moe.model import Block, Transformer
from moesaic.parallel import shared
from moesaic.parallel.clip import clip_gradients
from moesaic.parallel.engine import MOMENTS, count_steps, make_moments, set_steps
from moesaic.parallel.mesh import Meshes

# What fully_shard calls reshard_after_forward, by `parallel.reshard`.
RESHARD = {"auto": None, "always": True, "never": False}


class FSDPEngine:
    """See moesaic.parallel.engine.Engine. `optimizer` holds the parameters of the sharded model."""

    def __init__(self, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def backward(self, loss: Tensor, last: bool) -> None:
        # Each micro-batch adds its gradients over the ranks of a copy: kept whole until the last one, they would take 4 bytes for
        # each of all parameters. What it adds over copies is sharded already, and can wait at no cost.
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_all_reduce(last)
        loss.backward()

    def step(self, clip: float, skip: bool = False) -> Tensor:
        norm = clip_gradients(self.model.parameters(), clip).cpu()
        if norm.isfinite() and not skip:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def rest(self) -> None:
        # FSDP2 leaves weights whole after a forward pass without a backward one: the root's, with parallel.reshard=never all.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def weights(self) -> dict[str, Tensor]:
        return {name: t.detach() for name, t in [*self.model.named_parameters(), *self.model.named_buffers()]}

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def moments(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        return {f"{m}.{name}": state[p][m] for name, p in self.model.named_parameters() for m in MOMENTS}

    def steps(self) -> Tensor:
        return count_steps(self.optimizer)

    def make_moments(self) -> None:
        make_moments(self.optimizer, self.model.parameters())

    def loaded(self, steps: Tensor) -> None:
        set_steps(self.optimizer, steps)


def divide_experts(experts: Experts, meshes: Meshes) -> None:
    """Keep this rank's experts: each weight (E, ...) becomes a DTensor sharded over `expert`, holding rows w*e to (w+1)*e."""
    mesh = meshes.experts["expert"]
    for name, weight in list(experts.named_parameters(recurse=False)):
        local = weight.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
        setattr(experts, name, nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False)))


def shard_experts(experts: Experts, meshes: Meshes, policy: MixedPrecisionPolicy, reshard: bool | None) -> None:
    """Shard over `expert_shard` what `divide_experts` left: by the first dimension that divides, so by expert, or within each."""
    shards = meshes.experts["expert_shard"].size()

    def placement(weight: nn.Parameter) -> Shard:
        shape = weight.to_local().shape if isinstance(weight, DTensor) else weight.shape
        return Shard(next((d for d, size in enumerate(shape) if size % shards == 0), 0))

    _shard(experts, meshes.expert_copies, policy, reshard, placement)


def shard_block(block: Block, meshes: Meshes, policy: MixedPrecisionPolicy, reshard: bool | None) -> None:
    """Two or three groups a block: experts; the router by itself where the rest computes in low precision; all else."""
    if isinstance(block.ffn, MoE):
        shard_experts(block.ffn.experts, meshes, policy, reshard)
        if policy.param_dtype is not torch.float32:
            # Its routing has views, of which FSDP2 warns: a change in place would lose its hook. Nothing changes them.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            full = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
            _shard(block.ffn.router, meshes.dense, full, reshard)
    _shard(block, meshes.dense, policy, reshard)


def shard_root(model: nn.Module, meshes: Meshes, policy: MixedPrecisionPolicy, reshard: bool | None) -> None:
    """Embedding, last norm and head."""
    _shard(model, meshes.dense, policy, reshard)


def prefetch(model: Transformer) -> None:
    """Let weights travel while others are in use: a block's, its router's and its experts' during the block before, in backward
    during the block after. Else experts would be asked for after the wait for the counts of an exchange.

    Two blocks are whole at a time. More would only take more memory: gathering a block takes less time than computing one, or
    the links are the bottleneck however early one asks.
    """
    if not isinstance(model, FSDPModule):
        return
    root: list[FSDPModule] = [model]
    units: list[list[FSDPModule]] = [[m for m in b.modules() if isinstance(m, FSDPModule)] for b in model.blocks]
    for now, later in itertools.pairwise([root, *units]):  # a block, then its router, then its experts
        now[0].set_modules_to_forward_prefetch(later)
    for now, later in itertools.pairwise([root, *units[::-1]]):  # a block, then its experts, then its router
        now[0].set_modules_to_backward_prefetch([later[0], *later[:0:-1]])


def _shard(
    module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool | None,
    placement: Callable[[nn.Parameter], Shard] | None = None,
) -> None:  # fmt: skip
    """Hand the parameters of `module` that no part of it has taken yet to FSDP2.

    Not where one rank holds them all and computes with them as they are: FSDP2 would copy each weight twice a step and each
    gradient three times.
    """
    if mesh.size() == 1 and policy.param_dtype is torch.float32:
        return
    parts = [
        m for m in module.modules() if isinstance(m, Experts) and m is not module and not isinstance(m, FSDPModule)
    ]
    sharded = fully_shard(
        module, mesh=mesh, reshard_after_forward=reshard, shard_placement_fn=placement, mp_policy=policy,
        ignored_params={p for part in parts for p in part.parameters()},
    )  # fmt: skip
    # The loss is divided by the tokens of the global batch before backward, so gradients of all ranks are added and divided
    # by nothing: one rule for dense and expert parameters, whatever the degrees and however unequal the ranks' batches.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    if mesh.device_type == "cpu":
        sharded.set_custom_all_gather(GatherDirectly())  # type: ignore[arg-type]  # which has what it asks for
        sharded.set_custom_reduce_scatter(SumDirectly())  # type: ignore[arg-type]


class _Allocate:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class GatherDirectly(_Allocate):
    """All-gather as one exchange, and while the caller computes: FSDP2 waits for what is returned."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        work: dist.Work = shared.all_gather_single(output_tensor, input_tensor, group=group, async_op=True)
        return work


class SumDirectly(_Allocate):
    """Reduce-scatter as one exchange."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        assert op == dist.ReduceOp.SUM and not async_op, (op, async_op)
        shared.reduce_scatter_single(output_tensor, input_tensor, group=group)
