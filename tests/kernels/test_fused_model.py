"""The model of the fused protocol: SPIN finds nothing in it, finds every mistake, and runs of the kernels are runs of it."""

import dataclasses

import pytest

from tests.kernels import spin
from tests.kernels.schedules import Schedule, run

FORWARD_BACKWARD = ((0, 0, False), (0, 0, True))
ONE = Schedule(3, 2, 1, 4, 2, (5, 3), 0.0, True, False, 1, 0.0, FORWARD_BACKWARD)


@pytest.fixture(autouse=True)
def _spin() -> None:
    spin.require_spin()


def test_two_ranks() -> None:
    found = spin.check({"W": 2, "P": 1, "N": 2}, optimize="-O2")
    assert found.ok, found.told
    assert found.states > 100_000


@pytest.mark.parametrize("name", spin.MUTATIONS)
def test_a_mistake_is_found(name: str) -> None:
    found = spin.mutated(name)
    assert "errors: 1" in found.told, found.told


@pytest.mark.parametrize("programs", [1, 2])
def test_traces_are_runs_of_the_model(programs: int) -> None:
    s = dataclasses.replace(ONE, programs=programs)
    assert spin.replay(s, run(s, trace=4000)) == ""


def without(*names: str):
    """A child whose kernels skip these functions, as if they had succeeded."""

    def change(rank: int, number: int) -> None:
        from moesaic.kernels import fused_ep, fused_ep_backward

        for module in (fused_ep, fused_ep_backward):
            for name in names:
                if hasattr(module, name):
                    setattr(module, name, lambda *arguments: True)

    return change


def test_a_kernel_without_a_wait_is_rejected() -> None:
    """With one program a rank h is always there in time, and the results are right: the trace alone shows it."""
    events = run(ONE, trace=4000)
    for dropped in (3, 5, 7, 9, 11):  # every wait on a kind of flag, as it would be without
        assert spin.replay(ONE, [event for event in events if event[4] != dropped]) != "", dropped
