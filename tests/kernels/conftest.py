"""Where kernels run: interpreted on the CPU, or on the GPU where TRITON_INTERPRET=0 says so (make test-gpu)."""

import pytest

from moesaic.kernels.interpret import INTERPRET


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRET else "cuda"
