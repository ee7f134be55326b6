"""The model of the fused protocol: SPIN finds nothing in it, finds every mistake, and runs of the kernels are runs of it."""

import dataclasses
import re

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


@pytest.mark.parametrize("programs", [1, 2])
def test_traces_with_products_apart_are_runs_of_the_model(programs: int) -> None:
    s = dataclasses.replace(ONE, programs=programs, apart=True)
    assert spin.replay(s, run(s, trace=4000)) == ""


def without(event: int):
    """A child whose kernels go on where they would wait for one kind of flag."""

    def change(rank: int, number: int) -> None:
        import triton.language as tl

        from moesaic.kernels import fused_ep, fused_ep_backward, fused_protocol, fused_tasks

        original = fused_protocol.wait_for

        def wait_for(*arguments):
            if int(arguments[3]) == event:
                return tl.full((), 1, tl.int1)
            return original(*arguments)

        for module in (fused_protocol, fused_tasks, fused_ep, fused_ep_backward):
            if hasattr(module, "wait_for"):
                module.wait_for = wait_for

    return change


@pytest.mark.parametrize(("event", "apart"), [(5, False), (9, False), (5, True)])
def test_a_kernel_without_a_wait_is_rejected(event: int, apart: bool) -> None:
    """With one program a rank the plan and h are always there in time and the results are right: the trace alone shows it."""
    s = dataclasses.replace(ONE, apart=apart)
    events = run(s, trace=4000, change=without(event))
    assert all(e[4] != event for e in events)
    # Its programs read without it, or take a task.
    assert re.search(r"^rank \d, program 0, epoch 1, event [01],", spin.replay(s, events))


def test_a_kernel_that_adds_up_slots_before_its_waits_is_rejected() -> None:
    def change(rank: int, number: int) -> None:
        import triton.language as tl

        from moesaic.kernels import fused_protocol, fused_tasks

        recorded, wait, held = fused_protocol.record, fused_tasks.wait_back, []

        def wait_back(*arguments):
            held.append(arguments)  # waited for when all has been read
            return tl.full((), 1, tl.int1)

        def record(kind, *rest):
            recorded(kind, *rest)
            if int(kind) == 1:
                while held:
                    wait(*held.pop())

        fused_tasks.wait_back, fused_tasks.record = wait_back, record

    events = run(ONE, trace=4000, change=change)
    assert any(e[4] == 11 for e in events)  # every wait is made, but late
    assert re.search(r"event 1, .*value 5$", spin.replay(ONE, events))  # that it reads, as a combine task


def test_a_kernel_that_takes_tasks_in_another_order_is_rejected() -> None:
    """Waves of two row tiles where the model is told of waves of one."""
    s = dataclasses.replace(ONE, tokens=(18, 7))
    events = run(dataclasses.replace(s, wave=2), trace=4000)
    assert spin.replay(s, events).startswith("rank ")
