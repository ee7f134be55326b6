"""Ahead-of-time compilation of every kernel for every target, on a machine without a GPU, and what the binaries say.

    python -m moesaic.kernels.targets [--only NAME] [--target NAME] [--jobs N] [--page docs/kernels.md]

What is compiled: a file of this folder that has kernels has `compile_cases(target)`, which returns a dictionary from the name of
a case to a function without arguments. The function calls the file's own launchers, with tensors on the meta device of the
shapes of a real run. No kernel is launched: `recorded` writes down each launch, with its arguments and options, and that is
compiled as the launch would have been: the same types, constants, alignments, warps and stages. A launcher asks for its tiles
as ever: `tiles.target_name` of a meta tensor is the target that is compiled for. So nothing is declared twice:

    def compile_cases(target: str) -> Cases:
        x_TD, w_VD = meta(4096, 2048), meta(32768, 2048)
        return {"D 2048, V 32768, bf16": lambda: launch(x_TD, w_VD)}

Launches of a case that give the same binary count once; those of the same kernel that don't are rows of their own. A launcher
that needs a value from the device (`.item()`) fails here, as it has no value to read.

A row fails, and with it the command, on a register spill, on an atomic operation on floats (its sum would depend on the order of
arrival), on more shared memory than the target has, when the compiler fails, and when a product of 16-bit or narrower operands,
`tl.dot`, doesn't use the target's matrix instruction: wgmma, tcgen05, MFMA. What the columns mean: `Row`.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.kernels import inspection, roofline, tiles
from moesaic.kernels.inspection import TARGETS, Row

Cases = dict[str, Callable[[], object]]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A contiguous tensor without memory, as `compile_cases` passes it to launchers."""
    return torch.empty(shape, dtype=dtype, device="meta")


class Launch(NamedTuple):
    """One recorded launch: `kernel[grid](*args, **options)`."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


def recorded(run: Callable[[], object], target: str) -> list[Launch]:
    """The launches that `run()` makes, in order, none of them carried out. Of an autotuned kernel, one for each configuration."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any = None, warmup: bool = False, **options: Any) -> None:
        launches.append(Launch(kernel, args, options))

    def every_configuration(tuner: Any, *args: Any, **options: Any) -> None:
        for config in tuner.configs:
            tuner.fn.run(*args, **{**options, **config.all_kwargs()})

    saved = JITFunction.run, Autotuner.run
    JITFunction.run, Autotuner.run = record, every_configuration
    try:
        with tiles.meta_is(target):
            run()
    finally:
        JITFunction.run, Autotuner.run = saved
    return launches


def gpu_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(TARGETS[target].backend, TARGETS[target].arch, TARGETS[target].lanes)


def specialized(launch: Launch, target: str) -> tuple[Any, Any]:
    """(source, options) that `triton.compile` takes: what the launch would have compiled on a device of the target."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(gpu_target(target))
    given = {"debug": False, "instrumentation_mode": ""} | launch.options
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(*launch.args, **given)
    options, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, given)
    return ASTSource(kernel, signature, constants, attributes), options


def modules() -> list[str]:
    """Files of this folder that have cases, by name."""
    return [
        path.stem for path in sorted(Path(__file__).parent.glob("*.py")) if "\ndef compile_cases(" in path.read_text()
    ]


@functools.cache
def launches_of(module: str, target: str) -> dict[tuple[str, str], Launch]:
    """By (kernel, case): the launches of a file's cases that compile to something new."""
    source = importlib.import_module(f"moesaic.kernels.{module}" if module in modules() else module)
    found: dict[tuple[str, str], Launch] = {}
    known = set()
    for case, run in source.compile_cases(target).items():
        for launch in recorded(run, target):
            compiled, options = specialized(launch, target)
            key = (launch.kernel.fn.__qualname__, compiled.hash(), str(options))
            if key in known:
                continue
            known.add(key)
            name = f"{module}.{launch.kernel.fn.__name__.strip('_').removesuffix('_kernel')}"
            number = 1
            while (name, unique := case if number == 1 else f"{case} #{number}") in found:
                number += 1
            found[name, unique] = launch
    return found


def compile_launch(launch: Launch, target: str, kernel: str = "", case: str = "") -> Row:
    """Compile one launch and read its binary. Compiler errors are in the row."""
    import triton

    began = time.perf_counter()
    try:
        source, options = specialized(launch, target)
        with contextlib.redirect_stdout(sys.stderr):  # where a failing ptxas prints
            compiled = triton.compile(source, target=gpu_target(target), options=options.__dict__)
        row = inspection.read(compiled.asm, compiled.metadata, target)
    except Exception as raised:
        error: BaseException = raised
        while error.__cause__ is not None:  # the compiler's errors in a called function are wrapped once for each call
            error = error.__cause__
        row = Row(target=target, error=" ".join(f"{type(error).__name__}: {error}".split())[-300:])
    return dataclasses.replace(row, kernel=kernel, case=case, seconds=time.perf_counter() - began)


# ---------------------------------------------------------------- many at once


def _prepare(folder: str) -> None:
    # An interpreted function cannot be compiled. Triton reads the variable when it is imported, so nothing above imports it.
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_CACHE_DIR"] = folder
    torch.set_num_threads(1)


def _names(item: tuple[str, str]) -> list[tuple[str, str]]:
    return list(launches_of(*item))


def _compile(item: tuple[str, str, str, str]) -> Row:
    module, target, kernel, case = item
    return compile_launch(launches_of(module, target)[kernel, case], target, kernel, case)


def _pool(workers: int, folder: str) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=(folder,))


def listed(sources: Iterable[str], targets: Iterable[str]) -> list[tuple[str, str, str]]:
    """(kernel, case, target) of every row that `compile_all` gives, without compiling."""
    pairs = list(itertools.product(sources, targets))
    with _pool(1, "") as worker:
        found = worker.map(_names, pairs)
        return [(*name, target) for (_, target), names in zip(pairs, found, strict=True) for name in names]


def compile_all(sources: Iterable[str], targets: Iterable[str], jobs: int) -> Iterator[Row]:
    """A row for every launch of the cases of `sources` (files of this folder, or other modules, by name) and every target.

    Compiles in processes of its own, `jobs` at once, with a cache that begins empty. A compiler that crashes ends its process:
    what was under way is then compiled alone, so that only the guilty row fails.
    """
    pairs = list(itertools.product(sources, targets))
    with tempfile.TemporaryDirectory(prefix="moesaic-kernels-") as folder:
        items: list[tuple[str, str, str, str]] = []
        again: list[tuple[str, str, str, str]] = []
        with _pool(jobs, folder) as workers:
            for pair, names in zip(pairs, workers.map(_names, pairs), strict=True):
                items += [(*pair, kernel, case) for kernel, case in names]
            futures = [workers.submit(_compile, item) for item in items]
            for item, future in zip(items, futures, strict=True):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    again.append(item)
        for item in again:
            with _pool(1, folder) as worker:
                try:
                    yield worker.submit(_compile, item).result()
                except BrokenProcessPool:
                    _, target, kernel, case = item
                    yield Row(target=target, kernel=kernel, case=case, error="the compiler ended its process")


# ---------------------------------------------------------------- the command


def write_page(page: Path, name: str, table: str) -> None:
    """Put a table between the page's two markers of this name."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    text = page.read_text()
    if begin not in text or end not in text:
        raise ValueError(f"--page={page}: has no lines {begin.strip()} and {end}")
    head, rest = text.split(begin)
    page.write_text(head + begin + "\n" + table + "\n" + end + rest.split(end)[1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="compile every kernel for every target; exit 1 where one is not as it must be"
    )
    parser.add_argument(
        "--only", action="append", choices=modules(), help="a file of kernels/; may be given more than once"
    )
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="may be given more than once")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    parser.add_argument(
        "--page", type=Path, help="put the table between the markers of this page, if everything was compiled"
    )
    given = parser.parse_args(arguments)
    rows, began = [], time.perf_counter()
    for row in compile_all(given.only or modules(), given.target or TARGETS, given.jobs):
        rows.append(row)
        print(row.line(), flush=True)
    failed = [row for row in rows if row.faults()]
    slowest = {row.kernel: 0.0 for row in rows}
    for row in rows:
        slowest[row.kernel] += row.seconds
    print("\nseconds to compile, all cases and targets of a kernel together:")
    for kernel, seconds in slowest.items():
        print(f"  {seconds:6.1f}  {kernel}")
    for row in failed:
        print(f"FAILED {row.target} {row.kernel} [{row.case}]: {'; '.join(row.faults())}")
    print(f"{len(rows)} compiled, {len(failed)} failed, {time.perf_counter() - began:.0f} s, {given.jobs} at once")
    if given.page and not (given.only or given.target):
        write_page(given.page, "make kernels", inspection.table(rows))
        write_page(given.page, "roofline", roofline.table())
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
