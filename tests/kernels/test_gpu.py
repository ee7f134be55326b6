"""On a GPU: the harness over every operation, compiled, in every combination of shape, seed, type and scale."""

import pytest

from moesaic.kernels.testing import Operation, check
from tests.kernels.operations import ROUTING

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("operation", ROUTING, ids=lambda operation: operation.name)
def test_equals_the_specification(operation: Operation) -> None:
    check(operation, "cuda", every=True)
