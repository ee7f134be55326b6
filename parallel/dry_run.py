"""The real model without memory: what a rank of any world would keep and send, counted instead of computed.

`dry_run` builds the model with the real `parallelize` in a process group of any number of ranks that exists in this process
alone, on tensors that have shapes and no values (torch's FakeTensorMode), runs one micro-batch forward and backward, and counts
the bytes of every storage while it lives and every collective with its group. A world of 1,024 ranks fits a laptop.

It takes the way of a GPU, though the tensors say that they are a CPU's: without a GPU, torch can't give a gradient to a tensor of
one. What differs is put in its place: the experts' grouped products, fused norms and attention that keeps its inputs, its output
and a number a row, as flash attention and flex_attention do. The experts' backend is `torch`, whose temporaries are larger than
the kernels'; products are not quantized, which is emulated. Where the host would read how many rows come from where, it reads the
even load of moesaic.parallel.layout. The fused path's kernels are their shapes, too: what they store elsewhere is not seen here.
"""

import contextlib
import dataclasses
import functools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from moesaic.kernels import cross_entropy, permute
from moesaic.kernels.rms_norm import RMSNorm
from moesaic.kernels.symmetric import starts
from moesaic.moe import attention, experts
from moesaic.moe.config import ModelConfig, require
from moesaic.moe.precision import PrecisionConfig
from moesaic.parallel import apply, fused, two_hop
from moesaic.parallel import expert as expert_path
from moesaic.parallel.clip import clip_gradients
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.fsdp import FSDPEngine
from moesaic.parallel.fused import FusedPath, Space, heap_regions
from moesaic.parallel.layout import Layout, Load, load_of
from moesaic.parallel.mesh import make_meshes

COLLECTIVES = {
    "_allgather_base_": "all_gather", "allgather_into_tensor_coalesced_": "all_gather", "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce", "alltoall_base_": "all_to_all",
}  # fmt: skip
Issued = Counter[tuple[str, str, int, int]]


@dataclass
class Counted:
    """Bytes of one rank. `issued`: how often (phase, operation, ranks, size) was issued, sizes as in layout.Collective.

    weights, gradients, moments  of this rank's shards
    heap         of the fused path, on every rank
    kept         what lives between forward and backward beside them, of each layer, gathered weights left out
    gathered     gathered weights that live there
    peak         the most that lived at once, moments included; peak_forward, peak_backward: of each pass, without moments
    """

    issued: Issued = field(default_factory=Counter)
    weights: int = 0
    gradients: int = 0
    moments: int = 0
    heap: int = 0
    kept: list[int] = field(default_factory=list)
    rest: int = 0
    gathered: int = 0
    peak_forward: int = 0
    peak_backward: int = 0

    @property
    def peak(self) -> int:
        return self.moments + max(self.peak_forward, self.peak_backward)


class Ledger(TorchDispatchMode):
    """Counts storages while they live, and collectives. `gathered` are those that hold weights for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.weights: dict[int, int] = {}
        self.now = self.gathered = self.peak = 0
        self.phase = "build"
        self.issued: Issued = Counter()

    def _set(self, key: int, size: int) -> None:
        change = size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.now += change
        if key in self.weights:
            self.gathered += change
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int) -> None:
        self._set(key, 0)
        del self.sizes[key]
        self.weights.pop(key, None)

    def _made(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self._set(key, storage.nbytes())
            weakref.finalize(storage, self._freed, key)

    def holds_weights(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes and key not in self.weights:
            self.weights[key] = 1
            self.gathered += self.sizes[key]

    def resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 lets a gathered weight go by giving its storage no bytes, and takes them back later."""
        self._made(storage)
        self.holds_weights(storage)
        self._set(storage._cdata, storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # a distributed tensor is seen as what it does with its local one
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._collective(func.__name__.split(".")[0], args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._made(tensor.untyped_storage())
        if func.namespace == "moesaic" and "fused_experts" in func.__name__:
            # What a launch allocates and lets go: a, and dh in backward (moesaic.kernels.fused_ep, fused_ep_backward); and the
            # matrices of a shared expert, side by side.
            back = "backward" in func.__name__
            h, w_down = (args[2], args[7]) if back else (out[1], args[3])
            used = h.shape[0] * (w_down.shape[2] + back * h.shape[1]) * h.element_size()
            shared = args[-5:-3] if back else args[-2:]
            if (
                shared[1] is not None and shared[1].shape[1] > w_down.shape[2]
            ):  # moesaic.parallel.fused.as_experts copies
                used += sum(w.nbytes for w in shared)
            self.peak = max(self.peak, self.now + used)
        return out

    def _collective(self, name: str, args: Any) -> None:
        operation = COLLECTIVES.get(name)
        if operation is None:
            assert name in ("barrier", "broadcast_"), name
            return
        group = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
        ranks = dist.ProcessGroup.unbox(group).size()
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        largest = max(t.numel() * t.element_size() for t in tensors)
        if operation == "all_to_all":  # (output, input)
            largest = tensors[1].numel() * tensors[1].element_size()
        if operation == "all_gather":
            self.holds_weights(tensors[0].untyped_storage())
        self.issued[self.phase, operation, ranks, largest] += 1


def dry_run(model: ModelConfig, layout: Layout, parallel: ParallelConfig) -> Counted:
    """One micro-batch of rank 0. Makes a process group, and ends it; raises ValueError where there is one already, and for
    products in fp32, whose grouped form has no shapes without values."""
    require(layout.compute == "bf16", f"precision.compute={layout.compute}: a dry run needs bf16")
    require(
        layout.zero is None,
        "parallel.engine=deepspeed: a dry run needs fsdp; DeepSpeed takes no tensors without memory",
    )
    slots, ranks = layout.tokens * model.router.top_k, layout.expert
    even = layout.hops in ("local", "fused") or slots % ranks == 0
    require(
        even,
        f"train.seq_len={layout.seq_len}: a dry run needs tokens * top_k, {slots}, to be a multiple of parallel.expert={ranks}",
    )
    require(not dist.is_initialized(), "dry_run: needs a process without a process group")
    model = dataclasses.replace(model, experts_backend="torch")
    parallel = dataclasses.replace(parallel, expert=str(layout.expert), node_size=str(layout.node))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world)
    try:
        with as_a_gpu(load_of(model, layout), layout):
            return _counted(model, layout, parallel)
    finally:
        dist.destroy_process_group()


def _counted(model: ModelConfig, layout: Layout, parallel: ParallelConfig) -> Counted:
    device, counted = torch.device("cpu"), Counted()
    meshes = make_meshes("cpu", layout.expert, layout.replicate)
    ledger = Ledger()
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        ledger.resized(storage)
        return result

    outputs = FSDPParam.init_all_gather_outputs

    def init_all_gather_outputs(self: FSDPParam, *args: Any, **kwargs: Any) -> None:
        outputs(self, *args, **kwargs)
        for gathered in self.all_gather_outputs:
            ledger.holds_weights(gathered.untyped_storage())

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize_))
        stack.enter_context(mock.patch.object(FSDPParam, "init_all_gather_outputs", init_all_gather_outputs))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(ledger)
        net = apply.parallelize(
            model, parallel, meshes, seed=0, device=device, compute=torch.bfloat16, fill=lambda name, tensor: None,
            tokens=layout.tokens,
        )  # fmt: skip
        if layout.hops != "local":
            wire = PrecisionConfig(dispatch=layout.dispatch, combine=layout.combine)
            apply.set_codecs(net, wire, tail=False)
        paths = [layer.path for layer in net.moe_layers() if isinstance(layer.path, FusedPath)]
        counted.heap = starts(paths[0].space.setting.heap.regions)[1] if paths else 0
        local = [p.to_local() if isinstance(p, DTensor) else p for p in net.parameters()]
        counted.weights = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in local}.values())
        counted.moments = 2 * counted.weights
        engine = FSDPEngine(net, torch.optim.AdamW(net.parameters()))
        before = ledger.now
        marks: list[int] = []
        for block in net.blocks:
            block.register_forward_pre_hook(lambda *_: marks.append(ledger.now - ledger.gathered))
            block.register_forward_hook(lambda *_: marks.append(ledger.now - ledger.gathered))
        tokens = torch.zeros(layout.micro_batch, layout.seq_len, dtype=torch.int64)
        ledger.phase, ledger.peak = "forward", ledger.now
        out = net(tokens, tokens)
        assert out.loss is not None
        counted.kept = [after - ahead for ahead, after in zip(marks[::2], marks[1::2], strict=True)]
        counted.gathered = ledger.gathered
        counted.rest = ledger.now - ledger.gathered - before - sum(counted.kept)
        counted.peak_forward, ledger.peak, ledger.phase = ledger.peak, ledger.now, "backward"
        engine.backward(out.loss / 2 + out.aux, last=True)
        counted.gradients = sum(
            {
                g.untyped_storage()._cdata: g.untyped_storage().nbytes() for g in map(_local_gradient, net.parameters())
            }.values()
        )
        counted.peak_backward, ledger.phase = ledger.peak, "optimizer"
        del out
        clip_gradients(net.parameters(), 1.0)
    counted.issued = ledger.issued
    return counted


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    grad = parameter.grad
    assert grad is not None
    return grad.to_local() if isinstance(grad, DTensor) else grad


# ---------------------------------------------------------------- the way of a GPU


class _FlashAttention(torch.autograd.Function):
    """The shapes of attention in one kernel, which keeps its inputs, its output and an fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = q.new_empty(*q.shape[:3], v.shape[3])
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:3], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors  # all of them, to the end
        return tuple(torch.empty_like(x) for x in inputs[:3])


class _FusedNorm(torch.autograd.Function):
    """The shapes of a norm in one kernel, which keeps its input and an fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _allocate(module: nn.Module, prefix: str, config: ModelConfig, seed: int, device: torch.device, fill: Any) -> None:
    """As `moesaic.moe.model.initialize`: torch's `to_empty` exchanges tensors in place, which fake ones don't allow."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty(parameter.shape, device=device)))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def _with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


def _reserve(target: str, space: Any, tokens: int) -> None:
    """In the place of Space.reserve: as many bytes, shared with nobody."""
    ranks = space.ranks * space.nodes
    shapes = heap_regions(space.config, space.parallel, ranks, tokens, space.compute, target, nodes=space.nodes)
    space.memory, space.tokens = torch.empty(starts(shapes)[1], dtype=torch.uint8), tokens
    space.setting = SimpleNamespace(heap=SimpleNamespace(regions=shapes))


def _paths(*args: Any) -> Callable[..., Any]:
    return _with_values(_with_values(two_hop.communicating_path)(*args))


def _even(load: Load, layout: Layout, *tensors: Tensor) -> list[list[int]]:
    """What `read` would read off the device, in the order in which the paths ask."""
    ranks, places, nodes = layout.expert, layout.expert_node, layout.nodes
    rows, slots = [load.rows] * ranks, [load.slots] * ranks
    more_rows, more_slots = _spread(load.received, ranks), _spread(load.computed, ranks)
    if layout.hops == "fused":  # AllToAllPath.plan, between nodes
        out, slots_out = [load.node_rows] * nodes, [load.slots * places] * nodes
        return [out, slots_out, out, slots_out, [load.node_rows * nodes], []]
    if len(tensors) == 6:  # AllToAllPath.plan
        return [rows, slots, more_rows, more_slots, [load.node_rows * nodes], []]
    assert len(tensors) == 9, len(tensors)  # TwoHopPath.plan
    out, slots_out = [load.node_rows] * nodes, [load.slots * places] * nodes
    out2, slots_out2 = [load.rows * nodes] * places, [load.slots * nodes] * places
    in2, slots_in2 = _spread(load.received, places), _spread(load.computed, places)
    return [out, slots_out, out, slots_out, out2, slots_out2, in2, slots_in2, []]


def _spread(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


@contextlib.contextmanager
def as_a_gpu(load: Load, layout: Layout) -> Iterator[None]:
    """In the block, a CPU's tensors take the way of a GPU's, and the host reads an even load."""
    with contextlib.ExitStack() as stack:
        put = stack.enter_context

        def replace(owner: Any, **values: Any) -> None:
            for name, value in values.items():
                put(mock.patch.object(owner, name, value))

        replace(experts, _forward_loop=experts._forward_grouped, _backward_loop=experts._backward_grouped)
        replace(RMSNorm, forward=lambda norm, x: _FusedNorm.apply(x, norm.weight))
        replace(attention, _causal=lambda q, k, v, scale: _FlashAttention.apply(q, k, v))
        replace(attention, _turn=lambda x, cos, sin, direction: torch.empty_like(x))
        replace(cross_entropy, CHUNK_BYTES_CPU=cross_entropy.CHUNK_BYTES)
        replace(FSDPModule, set_custom_all_gather=lambda *_: None, set_custom_reduce_scatter=lambda *_: None)
        replace(Space, reserve=functools.partialmethod(lambda space, n: _reserve(layout.target, space, n)))
        for module in (expert_path, two_hop):
            replace(module, read=functools.partial(_even, load, layout))
        replace(permute, on_host=lambda tensor: False)
        replace(apply, initialize=_allocate, communicating_path=_paths)
        replace(fused, nodes_mesh=_with_values(two_hop.nodes_mesh))
        # What a mesh says of its ranks are values.
        replace(DeviceMesh, __init__=_with_values(DeviceMesh.__init__))
        # Once an operation, it learns a DTensor's shape from fake tensors of the whole: of all experts, which no rank has.
        meta = ShardingPropagator._propagate_tensor_meta_non_cached
        replace(ShardingPropagator, _propagate_tensor_meta_non_cached=_with_values(meta))
        yield
