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


def nccl(
    index: int, ts: float, begin: float, dur: float, operation: str, kernel: str, stream: int, ranks: list[int]
) -> list[dict[str, Any]]:
    """A collective as torch 2.13 with Kineto and NCCL 2.2x writes it: our range, the operator, `record_param_comms` with its
    arguments, NCCL's own range, the launch, and a kernel with the same arguments on a stream of its own."""
    told = {"Collective name": operation, "In msg nelems": 4096, "Out msg nelems": 8192, "Group size": len(ranks),
            "dtype": "BFloat16", "Process Group Name": "1", "Process Group Description": "mesh_shard",
            "Process Group Ranks": str(ranks)}  # fmt: skip
    correlation = 1000 + index
    return [
        x("user_annotation", f"{COLLECTIVE}{index}", ts, 14),
        x("cpu_op", f"c10d::{operation}", ts + 1, 12),
        x("cpu_op", "record_param_comms", ts + 2, 10, **told),
        x("user_annotation", f"nccl:{operation}", ts + 3, 8),
        x("cuda_runtime", "cudaLaunchKernelExC", ts + 4, 3, correlation=correlation, External_id=correlation),
        {"ph": "X", "cat": "kernel", "name": kernel, "ts": begin, "dur": dur, "pid": 0, "tid": stream,
         "args": told | {"device": 0, "stream": stream, "correlation": correlation, "grid": [24, 1, 1], "warps per SM": 3.6}},
        {"ph": "X", "cat": "gpu_user_annotation", "name": f"nccl:{operation}", "ts": begin, "dur": dur, "pid": 0, "tid": stream},
        {"ph": "s", "cat": "ac2g", "id": correlation, "ts": ts + 4, "tid": 1}, {"ph": "f", "cat": "ac2g", "id": correlation,
                                                                               "ts": begin, "tid": stream, "bp": "e"},
    ]  # fmt: skip


def test_kernels_of_nccl_on_streams_of_their_own() -> None:
    """Collectives on two streams, one under a product, one partly, one alone; a product that waits in the queue."""
    gather = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    reduce = "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    events = [
        x("user_annotation", PHASE + "forward", 0, 400),
        x("user_annotation", MODULE + "blocks.1", 5, 300),
        *nccl(0, 10, 40, 60, "all_gather_into_tensor", gather, 20, [0, 1]),
        x("cpu_op", "aten::mm", 30, 6, **{"Sequence number": 9}),
        *launch(31, 1, 60, 80, "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64"),
        *launch(33, 2, 140, 10, "nvjet_tst_128x256"),
        *nccl(1, 50, 130, 50, "reduce_scatter_tensor", reduce, 24, [0, 1]),
        *nccl(2, 80, 200, 30, "all_to_all_single", "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 20, [0, 1]),
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
        {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "ts": 0, "dur": 400, "tid": "Profiler"},
    ]  # fmt: skip
    reading = read(events, 1)
    assert {i: spans for i, spans in reading.kernels.items()} == {0: [(40, 100)], 1: [(130, 180)], 2: [(200, 230)]}
    assert sorted(reading.computing) == [(60, 140), (140, 150)], "no kernel of NCCL is work"
    work = reading.work["blocks.1", "forward"]
    assert (work.kernels, work.kernels_us, work.queue_us) == (2, 90, (60 - 31) + (140 - 33)), (
        "TKLQT, collectives left out"
    )
    assert work.ops == 1 and work.ops_us == 6, "what a collective does on the host is none of it"
    calls = [
        Event(i, "forward", "blocks.1", "ffn", purpose, operation, "g", i + 1, [0, 1], began=(5e6 + ts) / 1e6)
        for i, (ts, purpose, operation) in enumerate([
            (10, "weights", "all_gather_single"), (50, "gradients", "reduce_scatter_single"),
            (80, "dispatch", "all_to_all_single")])
    ]  # fmt: skip
    assert place(calls, reading) == pytest.approx(5e6)
    assert [round(1e6 * e.time) for e in calls] == [60, 50, 30]
    assert [round(1e6 * e.exposed) for e in calls] == [20, 30, 30], (
        "40 of the first and 20 of the second lie under products"
    )
    assert [round(1e6 * e.began - 5e6) for e in calls] == [40, 130, 200], "skew is of kernels, not of the host"
