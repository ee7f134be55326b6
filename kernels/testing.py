"""Instruments for tests and benchmarks: a harness that holds a kernel to its reference, and counters of memory and launches.

    x = Operation("scale", run=scale, reference=lambda x_ND: 2 * x_ND, inputs=..., shapes=..., tolerance=..., gradients=("x_ND",))
    check(x, "cuda", every=True)

What is checked, and why: see `check`. For every part of it, tests/kernels/test_testing.py has a broken kernel that it notices.
"""

import contextlib
import functools
import inspect
import itertools
import linecache
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from moesaic.kernels.interpret import jit

Results = dict[str, Tensor]
SEEDS = 5
SCALES = (1.0, 1e-4, 1e3)

# ---------------------------------------------------------------- kernels against their references


@dataclass(frozen=True)
class Operation:
    """An operation, and what it is held to.

    run         the launcher: inputs by name -> a tensor, or tensors by name; differentiable
    reference   the same in plain torch, of any floating type; it runs in fp64, with the inputs as `run` gets them
    inputs      (shape, dtype, scale, generator) -> inputs by name, made on the CPU. Which of them are of `dtype` and which are
                multiplied with `scale` is the operation's to say; what isn't a tensor is passed on
    shapes      sizes by name, as `inputs` reads them
    tolerance   by dtype: the largest error of a result or gradient, over the largest magnitude in it. Integers must be equal
    gradients   names of the inputs whose gradients are checked
    scales      sizes of values; (1.0,) where they make no difference
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[Mapping[str, int], torch.dtype, float, torch.Generator], dict[str, Any]]
    shapes: tuple[Mapping[str, int], ...]
    tolerance: Mapping[torch.dtype, float]
    gradients: tuple[str, ...] = ()
    scales: tuple[float, ...] = SCALES


def check(operation: Operation, device: str | torch.device = "cpu", every: bool = False) -> dict[str, float]:
    """Hold an operation to its reference. Returns the largest relative error of each result; AssertionError names what failed.

    Each shape with 5 seeds, over which dtypes and scales of values rotate so that each meets each; `every` runs all
    combinations. For each case:

    - results, and gradients (named as d<input>) for a random upstream, agree with fp64 within the tolerance, and are finite;
    - a second run gives the same bits, though all memory that `torch.empty` and its kin return holds NaN, 0 and False in the
      first, and 1, 1 and True in the second: nothing depends on what was there before, nor on the order of threads;
    - the inputs are what they were.

    Each kernel that is launched is left out in turn, case after case until that changes something: it did run, and matters.
    """
    worst: dict[str, float] = {}
    matters: dict[str, bool] = {}
    for shape, dtype, scale, seed in cases(operation, every):
        what = f"{operation.name} {dict(shape)} {dtype} scale={scale} seed={seed}"
        errors = check_case(operation, shape, dtype, scale, seed, device, what, matters)
        worst |= {name: max(error, worst.get(name, 0.0)) for name, error in errors.items()}
    assert matters, f"{operation.name}: no kernel was launched"
    for kernel, changes in matters.items():
        assert changes, f"{operation.name}: leaving out {kernel} changes nothing"
    return worst


def cases(operation: Operation, every: bool) -> Iterator[tuple[Mapping[str, int], torch.dtype, float, int]]:
    pairs = list(itertools.product(operation.tolerance, operation.scales))
    number = itertools.count()
    for shape, seed in itertools.product(operation.shapes, range(SEEDS)):
        for dtype, scale in pairs if every else [pairs[next(number) % len(pairs)]]:
            yield shape, dtype, scale, seed


def check_case(
    operation: Operation, shape: Mapping[str, int], dtype: torch.dtype, scale: float, seed: int, device: str | torch.device,
    what: str, matters: dict[str, bool] | None = None,
) -> dict[str, float]:  # fmt: skip
    """One case of `check`; property tests draw its arguments themselves. `matters`: whether a kernel is known to, by name."""
    generator = torch.Generator().manual_seed(seed)
    inputs = operation.inputs(shape, dtype, scale, generator)
    exact = _call(operation.reference, operation, inputs, "cpu", torch.float64, seed)
    with launches() as kernels, filled(torch.nan, 0):
        first = _call(operation.run, operation, inputs, device, None, seed, unchanged=what)
    with filled(1.0, 1):
        second = _call(operation.run, operation, inputs, device, None, seed)
    assert first.keys() == exact.keys(), f"{what}: results {sorted(first)}, reference {sorted(exact)}"
    errors = {}
    for name, want in exact.items():
        got = first[name]
        assert same_bits(got, second[name]), f"{what}: {name} differs between runs, or depends on memory nobody wrote"
        assert got.shape == want.shape, f"{what}: {name} has shape {tuple(got.shape)}, reference {tuple(want.shape)}"
        if want.is_floating_point():
            errors[name] = relative_error(got, want)
            limit = operation.tolerance[dtype]
            assert errors[name] <= limit, (
                f"{what}: {name} is off by {errors[name]:.2e} of its size, allowed {limit:.1e}"
            )
        else:
            assert got.to(want.dtype).equal(want), f"{what}: {name} differs from the reference"
    if matters is not None:
        for kernel in dict.fromkeys(kernels):
            if not matters.setdefault(kernel, False):
                with left_out(kernel), filled(torch.nan, 0):
                    without = _call(operation.run, operation, inputs, device, None, seed)
                matters[kernel] = any(not same_bits(first[name], without[name]) for name in first)
    return errors


def _call(
    function: Callable[..., Any], operation: Operation, inputs: dict[str, Any], device: str | torch.device,
    dtype: torch.dtype | None, seed: int, unchanged: str | None = None,
) -> Results:  # fmt: skip
    """Results and gradients on the CPU. Floating inputs are converted to `dtype`, if given."""
    given = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            value = value.detach().to(device, copy=True)
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            value.requires_grad_(name in operation.gradients)
        given[name] = value
    before = {name: value.detach().clone() for name, value in given.items() if isinstance(value, Tensor)}
    out = function(**given)
    results: Results = {"out": out} if isinstance(out, Tensor) else dict(out)
    leaves = {name: given[name] for name in operation.gradients}
    if leaves:
        generator = torch.Generator().manual_seed(seed + 1)
        # As short as the shortest type the operation may return, so that both sides get the same numbers.
        upstreams = {
            name: torch.randn(result.shape, generator=generator).bfloat16().to(result)
            for name, result in results.items()
            if result.requires_grad
        }
        grads = torch.autograd.grad(
            [results[name] for name in upstreams],
            list(leaves.values()),
            list(upstreams.values()),
            materialize_grads=True,
        )
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    if unchanged is not None:
        for name, value in before.items():
            assert same_bits(given[name], value), f"{unchanged}: the input {name} was changed"
    return {name: result.detach().cpu() for name, result in results.items()}


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest |got - want| over the largest finite |want|; infinite where one is finite and the other is not."""
    if want.numel() == 0:
        return 0.0
    got, want = got.double(), want.double()
    finite = want.isfinite()
    if not got[finite].isfinite().all() or not got[~finite].equal(want[~finite]):
        return torch.inf
    if not finite.any():
        return 0.0
    difference, size = (got - want)[finite].abs().max().item(), want[finite].abs().max().item()
    return difference / size if size else (torch.inf if difference else 0.0)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of type, shape and memory: NaN equals NaN, and 0.0 is not -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))


# ---------------------------------------------------------------- what kernels find, and whether they run

Run = Callable[..., Any]


@contextlib.contextmanager
def filled(value: float, integer: int) -> Iterator[None]:
    """What torch allocates without a value holds these: floats `value`, integers `integer`, booleans whether that isn't 0."""

    def filling(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(allocate)
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if not tensor.is_meta:
                floating = tensor.is_floating_point() or tensor.is_complex()
                with torch.no_grad():
                    tensor.fill_(value if floating else integer if tensor.dtype != torch.bool else bool(integer))
            return tensor

        return allocated

    places: list[tuple[Any, str]] = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    places += [(Tensor, name) for name in ("new_empty", "new_empty_strided")]
    originals = [getattr(place, name) for place, name in places]
    for (place, name), original in zip(places, originals, strict=True):
        setattr(place, name, filling(original))
    try:
        yield
    finally:
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, original)


@contextlib.contextmanager
def _launching(instead: Callable[[str, Run], Any]) -> Iterator[None]:
    """Every launch of a kernel, compiled or interpreted, in any thread, becomes instead(name, launch)."""
    originals = [(kind, kind.run) for kind in (JITFunction, InterpretedFunction)]

    def replacement(original: Run) -> Run:
        def run(kernel: Any, *args: Any, warmup: bool = False, **kwargs: Any) -> Any:
            launch = functools.partial(original, kernel, *args, warmup=warmup, **kwargs)
            return launch() if warmup else instead(kernel.__name__, launch)

        return run

    for kind, original in originals:
        kind.run = replacement(original)
    try:
        yield
    finally:
        for kind, original in originals:
            kind.run = original


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the Triton kernels launched, in order, those of backward included. Kernels of torch's own don't count."""
    names: list[str] = []

    def count(name: str, launch: Run) -> Any:
        names.append(name)
        return launch()

    with _launching(count):
        yield names


@contextlib.contextmanager
def left_out(kernel: str) -> Iterator[None]:
    """Launches of the kernel of this name do nothing."""
    with _launching(lambda name, launch: None if name == kernel else launch()):
        yield


@contextlib.contextmanager
def mutated(kernel: Any, old: str, new: str) -> Iterator[None]:
    """The kernel with `old`, which stands in its source once, replaced by `new`: a broken one, that a check must notice.

    It takes the kernel's place in its module, where the launcher must look it up.
    """
    function, name = kernel.fn, kernel.fn.__name__
    source = textwrap.dedent(inspect.getsource(function))
    source = source[source.index("def ") :]
    assert source.count(old) == 1, f"{name}: {old!r} stands {source.count(old)} times in the source"
    source, file = source.replace(old, new), f"<{name} with {new!r}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    made: dict[str, Any] = {}
    exec(compile(source, file, "exec"), function.__globals__, made)
    made[name].__module__ = function.__module__
    function.__globals__[name] = jit(made[name])
    try:
        yield
    finally:
        function.__globals__[name] = kernel
        del linecache.cache[file]


FLOAT_ATOMICS = re.compile(
    r"tt\.atomic_rmw[^\n]*\bfadd\b[^\n]*|tt\.atomic_cas[^\n]*(?:f16|f32|f64)[^\n]*"  # Triton's IR
    r"|\b(?:atom|red)\.[\w.:]*add\.[\w.]*(?:f16|f32|f64)[^\n]*"  # PTX, bf16 included
    r"|\b(?:RED|ATOM|ATOMG|ATOMS)\.[\w.]*ADD\.[\w.]*F(?:16|32|64)[^\n]*"  # SASS
    r"|\b(?:global|flat|buffer|ds)_(?:atomic_)?(?:pk_)?add_(?:rtn_)?(?:f16|bf16|f32|f64)[^\n]*"  # AMD
)


def float_atomics(code: str) -> list[str]:
    """Lines of TTIR, PTX, SASS or AMD assembly that add floats atomically: in an order, and so with a sum, that may change."""
    return FLOAT_ATOMICS.findall(code)


# ---------------------------------------------------------------- memory


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
