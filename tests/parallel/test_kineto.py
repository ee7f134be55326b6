"""A Kineto trace of a GPU, made by hand: whose kernels, how long they queued, what of a collective was hidden."""

from typing import Any

import pytest

from moesaic.parallel.collectives import COLLECTIVE, MODULE, PHASE, Event
from moesaic.parallel.kineto import overlap, place, read, union


def x(category: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def launch(
    ts: float, correlation: int, begin: float, dur: float, name: str = "gemm", tid: int = 1
) -> list[dict[str, Any]]:
    return [x("cuda_runtime", "cudaLaunchKernel", ts, 1, tid, correlation=correlation),
            x("kernel", name, begin, dur, 7, correlation=correlation)]  # fmt: skip


EVENTS = [
    x("user_annotation", PHASE + "forward", 0, 100),
    x("user_annotation", MODULE + "blocks.0", 10, 80),
    x("cpu_op", "aten::mm", 12, 8, **{"Sequence number": 5}),
    *launch(14, 1, 20, 30),  # queued for 6
    x("cpu_op", "inner", 15, 2),
    x("user_annotation", MODULE + "blocks.0.ffn", 30, 50),
    x("user_annotation", COLLECTIVE + "0", 40, 20),
    x("cpu_op", "c10d::alltoall", 41, 9),
    *launch(42, 2, 45, 20, "ncclDevKernel_SendRecv"),
    x("cpu_op", "aten::silu", 62, 3, **{"Sequence number": 6}),
    *launch(63, 3, 70, 5),  # queued for 7
    x("user_annotation", PHASE + "backward", 100, 100),
    # autograd's own thread
    x("cpu_op", "autograd::engine::evaluate_function: SiluBackward0", 110, 20, 2, **{"Sequence number": 6}),
    x("cpu_op", "SiluBackward0", 112, 10, 2, **{"Sequence number": 6}),
    *launch(114, 4, 134, 6, tid=2),  # queued for 20
    x("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 140, 20, 2, **{"Sequence number": 5}),
    *launch(150, 5, 151, 9, tid=2),  # queued for 1
    {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": 115, "tid": 2,
     "args": {"Device Type": 1, "Total Allocated": 4096}},
    {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": 116, "tid": 2,
     "args": {"Device Type": 0, "Total Allocated": 9}},
]  # fmt: skip


def test_kernels_belong_to_the_layer_that_launched_them() -> None:
    reading = read(EVENTS, 1)
    work = {key: (w.ops, w.kernels, w.kernels_us, w.queue_us) for key, w in reading.work.items()}
    assert work["blocks.0", "forward"] == (1, 1, 30, 6)
    assert work["blocks.0.ffn", "forward"] == (1, 1, 5, 7), "the collective's kernel is none of it"
    assert work["blocks.0.ffn", "backward"] == (1, 1, 6, 20), "by autograd's number, on another thread"
    assert work["blocks.0", "backward"] == (0, 1, 9, 1)
    assert reading.memory == [(115, 4096, "blocks.0.ffn", "backward")]
    times = {key: (w.ops_us, w.between_us) for key, w in reading.work.items()}
    assert times["blocks.0", "forward"] == (8, 80 - 50 - 8)
    assert times["blocks.0.ffn", "forward"] == (3, 50 - 20 - 3), "without the time in collectives"
    assert times["blocks.0.ffn", "backward"] == (10, 10)
    assert times["", "forward"] == (0, 20)


def test_a_collective_is_exposed_where_nothing_else_computes() -> None:
    event = Event(0, "forward", "blocks.0", "ffn", "dispatch", "all_to_all_single", "g", 1, [0, 1], began=1000.00004)
    shift = place([event], read(EVENTS, 1))
    assert shift == pytest.approx(1e9)
    assert event.began == pytest.approx(1000.000045, abs=1e-9) and event.time == pytest.approx(20e-6, abs=1e-9)
    assert event.exposed == pytest.approx(15e-6, abs=1e-9), "5 of 45..65 lie under the kernel of 20..50"


def test_unions() -> None:
    merged = union([(5, 6), (0, 2), (1, 3), (3, 4)])
    assert merged == [(0, 4), (5, 6)]
    assert overlap((3.5, 5.5), merged) == 1.0 and overlap((7, 9), merged) == 0 and overlap((4.2, 4.8), merged) == 0
