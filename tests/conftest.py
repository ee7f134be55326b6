"""What every test runs under: fixed seeds, one thread, and memory that is NaN until somebody writes to it."""

import functools
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
# The same examples in every run, and no example is wrong for being slow on a busy machine.
hypothesis.settings.register_profile("moesaic", derandomize=True, deadline=None)
hypothesis.settings.load_profile("moesaic")

# `with torch.device("meta")` remembers, at its first use, which functions allocate. That must be the real ones, not those that
# `poisoned_memory` puts in their place: it would then build a model of any size in real memory.
with torch.device("cpu"):
    torch.empty(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # `make test` interprets kernels also where there is a GPU.
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU, or TRITON_INTERPRET=1; see make test-gpu"))


@pytest.fixture(scope="session", autouse=True)
def temporary_files() -> Iterator[None]:
    """One folder, removed at the end, for what torchrun and W&B leave in the temporary folder. Not below tmp_path: the names of
    W&B's sockets, which lie in it, can't be long."""
    tempfile.gettempdir()  # remembered: pytest's own folders stay where they are
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="moesaic-", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("TMPDIR", folder)
        yield


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what the framework's own code allocates without a value: NaN in floats, the largest number in integers.

    Fresh memory is often zero, so that a row nobody wrote looks right by luck. Only calls from `moesaic` are filled: torch's
    own `fill_uninitialized_memory` works in deterministic mode alone, which chooses other algorithms than a run does.
    """

    def filling(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(allocate)
        def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if sys._getframe(1).f_globals.get("__name__", "").startswith("moesaic."):
                with torch.no_grad():
                    poison(tensor)
            return tensor

        return filled

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, filling(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, filling(getattr(torch.Tensor, name)))


def poison(tensor: torch.Tensor) -> None:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(torch.nan)
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max)
