"""A run of values of a tensor whose other values lie on other ranks: what DeepSpeed's ZeRO leaves of a parameter."""

import math
from collections.abc import Iterator
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


class Fragment(Tensor):
    """Values `start` to `start + flat.numel()`, in row-major order, of a tensor of `shape`. `flat` is (n,), and may be empty.

    It gives its `boxes`, and so is saved and loaded, in place, as a part of the whole; and `full_tensor`, as a DTensor does. It
    can do nothing else.
    """

    flat: Tensor
    start: int

    @staticmethod
    def __new__(cls, flat: Tensor, start: int, shape: torch.Size) -> Self:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=flat.dtype, device=flat.device)

    def __init__(self, flat: Tensor, start: int, shape: torch.Size) -> None:
        assert flat.ndim == 1 and start >= 0 and start + flat.numel() <= math.prod(shape), (flat.shape, start, shape)
        self.flat, self.start = flat.detach(), start

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{function} on a fragment: use its values, .flat, or the whole, .full_tensor()")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Fragment({self.flat.numel()} values from {self.start} of {tuple(self.shape)})"

    def full_tensor(self) -> Tensor:
        """The whole tensor, on every rank. Collective: the fragments of all ranks make up the tensor."""
        whole = self.flat.new_zeros(self.numel())
        whole[self.start : self.start + self.flat.numel()] = self.flat
        dist.all_reduce(whole)
        return whole.view(self.shape)

    def boxes(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
        """Offsets and sizes of each box in the whole, and its values, a view of `flat`."""
        at = 0
        for offsets, sizes in boxes(tuple(self.shape), self.start, self.start + self.flat.numel()):
            n = math.prod(sizes)
            yield offsets, sizes, self.flat[at : at + n].view(sizes)
            at += n


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """The boxes that make up values `start` to `end` (row-major) of a tensor, in order; at most two per dimension, and one.

    Of (3, 4), 2 to 9:  . . a a    the end of a row, whole rows, the beginning of a row
                        b b b b
                        c . . .
    """
    if start == end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    (first, skipped), (last, rest) = divmod(start, row), divmod(end, row)

    def within(i: int, begin: int, stop: int) -> Iterator[Box]:
        for offsets, sizes in boxes(shape[1:], begin, stop):
            yield (i, *offsets), (1, *sizes)

    if first == last:
        yield from within(first, skipped, rest)
        return
    if skipped:
        yield from within(first, skipped, row)
        first += 1
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    yield from within(last, 0, rest)
