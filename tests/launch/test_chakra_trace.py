"""Collectives as Chakra's execution trace: a step worked by hand."""

from typing import Any

from moesaic.launch.chakra_trace import COLLECTIVE, COMPUTE, execution_trace, varint
from moesaic.parallel.collectives import KERNEL, Event
from tests.launch.chakra_reader import chakra_nodes


def event(index: int, operation: str, began: float, ended: float, exposed: float, **more: Any) -> Event:
    return Event(index, "forward", f"blocks.{index}", "ffn", "dispatch", operation, "g", index + 1, [0, 1], began,
                 buffer=1000 * (index + 1), sent={"intra": 500, "inter": 7}, ended=ended, exposed=exposed, **more)  # fmt: skip


def test_a_step_by_hand() -> None:
    """Of 10 ms from second 100 on. The exchange (1 to 3 ms, of which 1 waiting for the other rank) holds the rank up; the
    gathering (4 to 8 ms) runs beside its work, and ends before the last reduction is issued, which therefore waits for it."""
    step = [
        event(0, "all_to_all_single", 100.001, 100.003, 0.002, wait=0.001),
        event(1, "all_gather_into_tensor", 100.004, 100.008, 0.0),
        event(2, KERNEL, 0.0, 0.0, 0.0),
        event(3, "reduce_scatter_tensor", 100.005, 100.009, 0.0),
        event(4, "all_reduce", 100.0085, 100.0095, 0.001),
    ]
    nodes = chakra_nodes(execution_trace(step, 3, {"g": "experts"}, 100.0, 100.010))
    shown = [(n["id"], n["type"], n["data_deps"], n["start_time_micros"], n["duration_micros"]) for n in nodes]
    assert shown == [
        (1, COMPUTE, [], 0, 1000),
        (2, COLLECTIVE, [1], 1000, 1000),  # without the wait
        (3, COMPUTE, [1, 2], 3000, 1000),
        (4, COLLECTIVE, [3], 4000, 4000),
        (5, COMPUTE, [3], 4000, 1000),
        (6, COLLECTIVE, [5], 5000, 4000),
        (7, COMPUTE, [5], 5000, 3500),
        (8, COLLECTIVE, [7], 8500, 1000),
        (9, COMPUTE, [7, 4, 6, 8], 9500, 500),
    ]
    kinds = [n["comm_type"] for n in nodes if n["type"] == COLLECTIVE]
    assert kinds == [6, 2, 7, 0]  # ALL_TO_ALL, ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE
    first = nodes[1]
    assert (first["comm_size"], first["pg_name"], first["ranks"], first["layer"], first["sent_intra"], first["sent_inter"]) == (
        1000, "experts", "0-1", "blocks.0", 500, 7,
    )  # fmt: skip


def test_numbers_of_any_length() -> None:
    assert [varint(n) for n in (0, 127, 128, 300)] == [b"\0", b"\x7f", b"\x80\x01", b"\xac\x02"]
    large = event(0, "barrier", 5e5, 5e5 + 1, 1.0)
    large.buffer = 2**40 + 3
    nodes = chakra_nodes(execution_trace([large], 0, {}, 1.0, 5e5 + 2))
    assert (
        nodes[1]["comm_size"] == 2**40 + 3
        and nodes[1]["comm_type"] == 9
        and nodes[0]["duration_micros"] == 5 * 10**11 - 10**6
    )
