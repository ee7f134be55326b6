"""The one place where a model is spread over ranks."""

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

from moesaic.moe.config import ModelConfig
from moesaic.moe.dispatch import ExpertPath
from moesaic.moe.layer import MoE
from moesaic.moe.low import lower
from moesaic.moe.model import Block, Fill, Transformer, initialize
from moesaic.moe.precision import PrecisionConfig
from moesaic.parallel.apart import all_apart, products_inside
from moesaic.parallel.cast import compute_in
from moesaic.parallel.codec import codecs
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.engine import Engine
from moesaic.parallel.expert import AllToAllPath
from moesaic.parallel.fsdp import RESHARD, FSDPEngine, divide_experts, prefetch, shard_block, shard_experts, shard_root
from moesaic.parallel.fused import fused_paths
from moesaic.parallel.mesh import Meshes
from moesaic.parallel.remat import recompute
from moesaic.parallel.trace import name_groups
from moesaic.parallel.two_hop import communicating_path


def parallelize(
    config: ModelConfig, parallel: ParallelConfig, meshes: Meshes, *, seed: int, device: torch.device, compute: torch.dtype,
    fill: Fill | None = None, precision: PrecisionConfig | None = None, tokens: int | None = None,
) -> Transformer:  # fmt: skip
    """A model with initial weights, or those that `fill` gives, spread over the ranks of `meshes`. Collective. In this order:

    1. Build on the meta device: nothing is allocated. What `precision` quantizes computes so from here on.
    2. Block by block: allocate, fill with the initial weights of (seed, name) or by `fill`, keep this rank's experts, shard
       with FSDP2 (the experts first, then the block). A rank never holds more than one whole block.
    3. The same for embedding, norm and head.
       With parallel.engine=deepspeed only the experts are sharded; every rank builds all dense weights, which are cast where
       they are used, and `start_engine` hands them to DeepSpeed.
    4. Put the expert path that `parallel` names into every MoE layer, and the sum over ranks that statistics over the global
       batch go through; then what `parallel.remat` says into every block.

    Gradients are sums over ranks: divide the loss by the tokens of the global batch. `compute` is the type of matrix
    products; parameters, gradients and their sums are fp32. `tokens`: those of a forward pass, at most, on any rank, for which
    expert_path=fused makes room (None: as many as the first one has).
    """
    # Inputs are not cast: a block's are in `compute` already, but for the rotary tables, whose angles need fp32.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    with torch.device("meta"):
        model = Transformer(config)
    low = precision or PrecisionConfig()
    lower(model, low, seed)
    path, fsdp = expert_path(parallel, meshes), parallel.engine == "fsdp"
    new_path: Callable[[str], ExpertPath] | None = None
    if path == "fused":
        inside, numbers = products_inside(low, device), low.quantizes("experts") and low.chance
        kernels = (
            dataclasses.replace(parallel, fused_keep=True) if all_apart(low, device) else parallel
        )  # no room for X again
        new_path = fused_paths(config, kernels, meshes, compute, device, tokens, inside, numbers)
    elif path != "local":
        new_path = communicating_path(path, parallel, meshes)
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        initialize(block, f"blocks.{i}.", config, seed, device, fill)
        if isinstance(block.ffn, MoE):
            block.ffn.reduce = total
            if meshes.expert_parallel > 1:
                divide_experts(block.ffn.experts, meshes)
            if new_path:
                block.ffn.path = new_path(f"blocks.{i}.ffn")
                block.ffn.path.shared = block.ffn.shared if parallel.fused_shared else None
        if fsdp:
            shard_block(block, meshes, policy, RESHARD[parallel.reshard])
        elif isinstance(block.ffn, MoE):
            shard_experts(block.ffn.experts, meshes, policy, reshard=parallel.zero_stage == 3)
    for name in ("embedding", "norm", "head"):
        initialize(getattr(model, name), f"{name}.", config, seed, device, fill)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    if fsdp:
        shard_root(model, meshes, policy, RESHARD[parallel.reshard])
        prefetch(model)
    elif compute is not torch.float32:
        compute_in(model, compute)
    if new_path:
        model.precision.switch = switch = functools.partial(set_codecs, model, low)
        switch(False)
    name_groups(model)
    recompute(model, parallel.remat)
    return model


def start_engine(parallel: ParallelConfig, model: Transformer, optimizer: torch.optim.Optimizer) -> Engine:
    """The engine that `parallel.engine` names, for a model that `parallelize` made and the AdamW of all its parameters. Both are
    the engine's from then on. Collective."""
    if parallel.engine == "deepspeed":
        from moesaic.parallel.zero import ZeroEngine  # not before it is asked for: DeepSpeed takes a while to import

        engine: Engine = ZeroEngine(parallel, model, optimizer)
    else:
        engine = FSDPEngine(model, optimizer)
    engine.make_moments()  # now, not in the first step: that may be left out, and be followed by a save
    return engine


def set_codecs(model: Transformer, low: PrecisionConfig, tail: bool) -> None:
    """Rows travel as `precision.dispatch` and `precision.combine` say, and in the high tail of a run as they are."""
    for layer in model.moe_layers():
        assert isinstance(layer.path, AllToAllPath)
        both = ("high", "high") if tail else (low.dispatch, low.combine)
        layer.path.codec, layer.path.back = codecs(*both, model.config.d_model)


def expert_path(parallel: ParallelConfig, meshes: Meshes) -> str:
    """The name of the expert path: `parallel.expert_path`, where that is auto the one that `meshes` call for."""
    path = parallel.expert_path
    if path == "auto":
        path = "all_to_all" if meshes.expert_parallel > 1 else "local"
    assert path != "local" or meshes.expert_parallel == 1, (path, meshes.expert_parallel)
    return path


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, a new tensor. Collective."""
    value = value.clone()
    dist.all_reduce(value)
    return value


def greatest(value: torch.Tensor) -> torch.Tensor:
    """The greatest over all ranks, a new tensor. Collective."""
    value = value.clone()
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value
