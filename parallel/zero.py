"""The engine of DeepSpeed: ZeRO (arXiv 1910.02054) for the dense parameters, FSDP2 for the experts.

DeepSpeed takes every parameter for one that all ranks hold alike. Experts divided over ranks break that: marked the way its
own layer marks them they crash stages 0 to 2, and at stage 3 one rank's silently overwrite another's. So it never sees them. The
model that it holds has none among its modules; they stay with FSDP2, as in the other engine, with AdamW groups of their own
and the same numbers in them. What joins the two is here: one gradient norm, one learning rate, one checkpoint.

    zero_stage   of the dense parameters, every rank holds      of the experts, a rank holds its share of the moments and
    0            weights, gradients, moments                    gradients; gathered weights until the end of backward
    1            weights, gradients, a share of the moments     the same
    2            weights, a share of gradients and moments      the same
    3            a share of each, and what it computes with     gathers weights again in backward
"""

import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moesaic.moe.experts import Experts
from moesaic.moe.layer import MoE
from moesaic.moe.model import Block, Transformer
from moesaic.parallel.clip import clip as clip_tensors
from moesaic.parallel.clip import local
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.engine import MOMENTS, count_steps, make_moments, set_steps
from moesaic.parallel.fragment import Fragment

BUCKET = 2**25  # values that are reduced or gathered at once


def import_deepspeed(device: torch.device) -> Any:
    """The deepspeed module, silent and with nothing to compile."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # which torchrun sets
    # It calls collectives by names that torch gave up.
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)
    import deepspeed

    # On a CPU it would compile collectives over shared memory, on every rank at once, if a compiler can be found. They are for
    # one machine only, and we have none of its kernels in use: tell it that no operation of its own can be built here.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def settings(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration. What it would do besides, accumulation, clipping, the learning rate, is the engine's."""
    zero = {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": BUCKET}
    elif stage > 0:
        zero |= {"compute_grad_norm": False}
    return {
        "train_micro_batch_size_per_gpu": 1,  # it only counts samples with it
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",  # it refuses a sum at stage 3
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # which would wait for the device at each forward
        "zero_optimization": zero,
    }


class ZeroEngine:
    """See moesaic.parallel.engine.Engine. `model` comes from `parallelize`, `optimizer` is AdamW over all its parameters.

    Raises RuntimeError where experts changed while DeepSpeed took over the rest.
    """

    def __init__(self, parallel: ParallelConfig, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        assert parallel.zero_stage is not None
        self.stage = parallel.zero_stage
        self.module = model
        self.experts = hide_experts(model)
        self.expert_optimizer = split(optimizer, {p for _, p in self._expert_parameters()})
        self.dense_optimizer = optimizer
        self.optimizer = Joint(optimizer, self.expert_optimizer)

        deepspeed = import_deepspeed(next(model.parameters()).device)
        self.fragments = deepspeed.utils
        if self.stage == 3:
            gather_with_others(model, deepspeed.zero.register_external_parameter)
        before = checksums(self.experts.values())
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(self.stage))
        check_experts(before, checksums(self.experts.values()))
        self.zero = self.model.optimizer  # at stage 0 the optimizer itself
        self.skip = False
        # ZeRO can leave out a step where gradients overflow, and clears what it keeps of them. It asks us, who see the experts.
        if self.stage == 3:
            self.zero._get_norm_groups = lambda: [float("inf") if self.skip else 0.0]
        elif self.stage > 0:
            self.zero.check_grad_overflow = True
            self.zero.has_overflow = lambda _: self.skip

    # ---------------------------------------------------------------- a step

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss, scale_wrt_gas=False)
        if last and self.stage == 3:  # from the mean to the sum
            torch._foreach_mul_([local(self._part(p, "grad")) for p in self._dense().values()], dist.get_world_size())

    def step(self, clip: float, skip: bool = False) -> Tensor:
        norm = clip_tensors(self.gradients().values(), clip).cpu()
        self.skip = skip or not norm.isfinite()
        if self.stage == 0 and self.skip:
            self.model.zero_grad()
        else:
            self.model.step()
        if self.expert_optimizer:
            if not self.skip:
                self.expert_optimizer.step()
            self.expert_optimizer.zero_grad(set_to_none=True)
        return norm

    def rest(self) -> None:
        for experts in self.experts.values():
            if isinstance(experts, FSDPModule):
                experts.reshard()

    # ---------------------------------------------------------------- tensors by name

    def weights(self) -> dict[str, Tensor]:
        dense = {name: self._part(p, "weight") for name, p in self._dense().items()}
        return dense | {n: t.detach() for n, t in [*self._expert_parameters(), *self.module.named_buffers()]}

    def gradients(self) -> dict[str, Tensor]:
        dense = {name: self._part(p, "grad") for name, p in self._dense().items()}
        return dense | {name: p.grad for name, p in self._expert_parameters() if p.grad is not None}

    def moments(self) -> dict[str, Tensor]:
        parts = {f"{m}.{name}": self._part(p, m) for name, p in self._dense().items() for m in MOMENTS}
        if self.expert_optimizer:
            state = self.expert_optimizer.state
            parts |= {f"{m}.{name}": state[p][m] for name, p in self._expert_parameters() for m in MOMENTS}
        return parts

    def steps(self) -> Tensor:
        return count_steps(self.dense_optimizer)

    def make_moments(self) -> None:
        make_moments(self.dense_optimizer, self._flat())
        if self.expert_optimizer:
            make_moments(self.expert_optimizer, (p for _, p in self._expert_parameters()))

    def loaded(self, steps: Tensor) -> None:
        set_steps(self.dense_optimizer, steps)
        if self.expert_optimizer:
            set_steps(self.expert_optimizer, steps)
        if self.stage in (1, 2):
            self.zero.update_lp_params()
        if self.stage == 3:
            for i in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(i)

    def _dense(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def _expert_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{prefix}.{n}", p) for prefix, e in self.experts.items() for n, p in e.named_parameters()]

    def _flat(self) -> list[Tensor]:
        """What AdamW's state is of: the parameters themselves or the flat tensors that ZeRO made of them."""
        if self.stage == 0:
            return [*self._dense().values()]
        return self.zero.single_partition_of_fp32_groups if self.stage < 3 else self.zero.fp32_partitioned_groups_flat

    def _part(self, p: Any, what: str) -> Tensor:
        """What this rank has of a dense parameter's `weight`, `grad` or moment: all of it at stage 0, else a fragment."""
        if self.stage == 0:
            return p.detach() if what == "weight" else p.grad if what == "grad" else self.dense_optimizer.state[p][what]
        if self.stage < 3:
            return self._flat_part(p, what)
        if what == "weight":
            flat = self.fragments.safe_get_local_fp32_param(p)
        elif what == "grad":
            flat = self.fragments.safe_get_local_grad(p)
        else:
            flat = self.fragments.safe_get_local_optimizer_state(p, what)
        n = p.ds_numel  # the last ranks' parts are padded
        start = min(dist.get_rank() * flat.numel(), n)
        return Fragment(flat[: n - start], start, p.ds_shape)

    def _flat_part(self, p: Any, what: str) -> Fragment:
        """The same at stages 1 and 2, where all parameters of a group lie one after the other, a rank holding a run of them."""
        at = p._hp_mapping
        if at is None:  # all of it lies on other ranks
            return Fragment(p.new_empty(0, dtype=torch.float32), 0, p.shape)
        if what == "weight":
            flat = at.hp_fragment
        elif what == "grad":
            flat = at.get_lp_grad_fragment(p._index_in_param_group).flatten()
        else:
            state = self.dense_optimizer.state[self._flat()[at.param_group_index]][what]
            flat = state.narrow(0, at.hp_fragment_address.start, at.hp_fragment_address.numel)
        return Fragment(flat, at.lp_fragment_address.start, p.shape)


class Joint:
    """The groups of DeepSpeed's optimizer and those of the experts' as one list."""

    def __init__(self, *optimizers: torch.optim.Optimizer | None) -> None:
        self.optimizers = [optimizer for optimizer in optimizers if optimizer]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]


def hide_experts(model: Transformer) -> dict[str, Experts]:
    """Take the experts out of the modules of `model`, where their layers still find them. Returns them by their names there."""
    hidden = {}
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if isinstance(block.ffn, MoE):
            experts = block.ffn.experts
            del block.ffn.experts
            block.ffn.__dict__["experts"] = experts
            hidden[f"blocks.{i}.ffn.experts"] = experts
    return hidden


def gather_with_others(model: Transformer, register: Callable[[nn.Module, Tensor], None]) -> None:
    """Tell ZeRO-3 which modules need weights that are not their own; it gathers a module's before its forward and backward."""
    register(model, model.head.weight)  # the cross entropy is computed in the model's own forward
    for layer in model.moe_layers():
        # Hooks on a module's outputs announce its backward, and don't see those of the router inside a record.
        others = [layer.router, *([layer.path.shared] if layer.path.shared is not None else [])]
        for weight in (p for part in others for p in part.parameters()):
            register(layer, weight)


def split(optimizer: torch.optim.Optimizer, parameters: set[nn.Parameter]) -> torch.optim.AdamW | None:
    """Move `parameters` from an AdamW to one of their own, with groups of the same values."""
    assert isinstance(optimizer, torch.optim.AdamW)
    groups = []
    for group in optimizer.param_groups:
        moved = [p for p in group["params"] if p in parameters]
        group["params"] = [p for p in group["params"] if p not in parameters]
        if moved:
            groups.append(group | {"params": moved})
    return torch.optim.AdamW(groups) if groups else None


@torch.no_grad()
def checksums(experts: Iterable[Experts]) -> Tensor:
    """A number for the experts that each rank holds, int64 (ranks,). Collective.

    The bits as integers, times their positions, added modulo 2^64: exact, where the order of a floating sum may vary.
    """
    sums = []
    for part in (row for e in experts for p in e.parameters() for row in local(p.detach())):
        bits = part.flatten().view(torch.int32).long()
        sums.append((bits * torch.arange(1, bits.numel() + 1, device=bits.device)).sum())
    mine = torch.stack(sums) if sums else torch.zeros(1, dtype=torch.int64)
    mine = (mine * torch.arange(1, mine.numel() + 1, device=mine.device)).sum()
    result = mine.new_empty(dist.get_world_size())
    dist.all_gather_single(result, mine[None])
    return result


def check_experts(before: Tensor, after: Tensor) -> None:
    """Raises RuntimeError on all ranks where any rank's experts are not what they were."""
    for rank, (old, new) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
        if old != new:
            same = [other for other, value in enumerate(after.tolist()) if value == new and other != rank]
            raise RuntimeError(
                f"DeepSpeed changed the experts of rank {rank} when it started"
                + (f"; they are those of ranks {same} now" if same else "")
            )
