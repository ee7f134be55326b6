"""On a GPU: the harness over every operation, compiled, in every combination of shape, seed, type and scale. The experts' are in
test_experts.py."""

import pytest

from moesaic.kernels.testing import Operation, check
from tests.kernels.operations import ROUTING
from tests.kernels.test_cross_entropy_triton import OPERATION as CROSS_ENTROPY
from tests.kernels.test_grouped_gemm import VARLEN_K, VARLEN_M
from tests.kernels.test_rope import OPERATION as ROPE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "operation", [*ROUTING, VARLEN_M, VARLEN_K, CROSS_ENTROPY, ROPE], ids=lambda operation: operation.name
)
def test_equals_the_specification(operation: Operation) -> None:
    check(operation, "cuda", every=True)
