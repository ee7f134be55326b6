"""Instruments for tests and benchmarks: what an operation keeps for backward, and how much memory it needs on the way."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


def saved_bytes(function: Callable[[], Any], ignore: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of `function()`: each storage once, in full, without those of `ignore`.

    Works under FakeTensorMode, where shapes cost no memory.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    ignored = {tensor.untyped_storage()._cdata for tensor in ignore}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # held until the bytes are counted, or a freed storage's address could be another's
    total = sum(size for address, size in kept.items() if address not in ignored)
    del result
    return total


class PeakMemory(TorchDispatchMode):
    """While active, the bytes of all storages that operations make and that are alive: `now`, and the most there were, `peak`.

    What existed before does not count. An operation's own scratch memory is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def now(self) -> int:
        self._alive = {key: pair for key, pair in self._alive.items() if not pair[0].expired()}
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        known = {a.untyped_storage()._cdata for a in inputs}
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known:  # views and results written in place are not new
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out
