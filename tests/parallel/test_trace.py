"""Which collective a rank is in, for which layer; and what the watchdog says when one never ends."""

import json
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.parallel import trace
from moesaic.parallel.apply import parallelize, start_engine, total
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.mesh import make_meshes
from tests.parallel.ranks import run_ranks


def calls_of_a_step(replicate: int) -> list[tuple[str, str, int]]:
    """(operation, purpose, ranks of its group) of the second step of a small model of two layers, on this rank."""
    trace.observe()
    trace.observe()
    config = ModelConfig(d_model=16, n_heads=2, n_layers=2, n_experts=4, d_expert=12, router=RouterConfig(top_k=2))
    meshes = make_meshes("cpu", 2, replicate)
    model = parallelize(
        config, ParallelConfig(expert="2", replicate=replicate), meshes, seed=0, device=torch.device("cpu"), compute=torch.float32
    )  # fmt: skip
    engine = start_engine(ParallelConfig(), model, torch.optim.AdamW(model.parameters()))
    seen: list[trace.Call] = []
    real = trace.Call
    for step in range(2):
        if step == 1:
            trace.Call = lambda *a: seen.append(real(*a)) or seen[-1]  # type: ignore[assignment,misc,func-returns-value]
        tokens = torch.randint(0, 100, (2, 9))
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        assert loss is not None
        engine.backward(loss, last=True)
        engine.step(1.0)
        total(loss.detach())
    trace.Call = real  # type: ignore[misc]
    assert all(call.ended is not None and (call.ended >= call.began or call.ended == 0) for call in seen)
    for group in {call.group for call in seen}:
        numbers = [call.number for call in seen if call.group == group]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "none is missed, none twice"
    return [(call.operation, call.purpose, len(trace._state.ranks[call.group])) for call in seen]


def test_every_collective_of_a_step_has_a_layer(tmp_path: Path) -> None:
    one, other = run_ranks(calls_of_a_step, 2, tmp_path, 1)
    assert one == other
    for layer in (0, 1):
        block, ffn = f"blocks.{layer}", f"blocks.{layer}.ffn"
        for phase in ("counts", "slots", "dispatch", "combine", "combine_grad", "dispatch_grad", "slots_grad"):
            assert one.count(("all_to_all_single", f"{ffn} {phase}", 2)) == 1, phase
        gathered = [c for c in one if c[:2] == ("all_gather_single", f"{block} weights")]
        assert len(gathered) == 2, "in forward, and again in backward, fetched ahead by another layer or not"
        assert one.count(("reduce_scatter_single", f"{block} gradients", 2)) == 1
    assert one.count(("reduce_scatter_single", "the rest gradients", 2)) == 1
    tail = [(operation, purpose.partition(":")[0]) for operation, purpose, _ in one[-2:]]
    assert tail == [("all_reduce", "norm in parallel/clip.py"), ("all_reduce", "total in parallel/apply.py")]
    assert all(purpose for _, purpose, _ in one)


def test_sums_over_copies_have_a_layer_too(tmp_path: Path) -> None:
    one, _ = run_ranks(calls_of_a_step, 2, tmp_path, 2)
    sums = [purpose for operation, purpose, _ in one if operation == "all_reduce"]
    assert {"blocks.0 gradients", "blocks.1 gradients", "the rest gradients"} <= set(sums)


def word(
    last: list[Any], inside: bool, counts: dict[str, int], at: float = 100.0, stalled: bool = True
) -> dict[str, Any]:
    ranks = {"0": [0, 1, 2, 3], "7": [0, 1], "8": [2, 3]}
    return {"at": at, "stalled": stalled, "still": 31.0, "inside": inside, "last": last, "counts": counts, "ranks": ranks,
            "place": "read in launch/data.py:127"}  # fmt: skip


def test_a_report_names_rank_layer_and_collective() -> None:
    """Ranks 0 and 1 exchange rows and rank 1 never came, for it reads a file; rank 2 waits for all; rank 3 is stopped."""
    words = {
        0: word([5, "all_to_all_single", "blocks.1.ffn dispatch", "7"], True, {"0": 9, "7": 5}),
        1: word([9, "all_reduce", "norm in parallel/clip.py:39", "0"], False, {"0": 9, "7": 4}),
        2: word([10, "all_reduce", "total in parallel/apply.py:90", "0"], True, {"0": 10, "8": 6}),
        3: word([9, "all_reduce", "norm in parallel/clip.py:39", "0"], True, {"0": 9, "8": 6}, at=60.0, stalled=False),
    }
    lines = trace.report(words, 5, now=101.0, timeout=30, fresh=10).splitlines()
    assert lines[0].startswith("parallel.timeout=30: ")
    assert "rank 1 did not come to all_to_all_single for blocks.1.ffn dispatch" in lines[0]
    assert "rank 3 did not come to all_reduce for total in parallel/apply.py:90" in lines[0]
    assert "rank 2" not in lines[0]
    assert (
        lines[1] == "  rank 0: since 31 s waits in all_to_all_single number 5 of ranks 0-1, for blocks.1.ffn dispatch"
    )
    assert lines[2].startswith(
        "  rank 1: since 31 s is at read in launch/data.py:127, after all_reduce number 9 of ranks 0-3"
    )
    assert lines[4].startswith("  rank 3: is silent since 41 s, before that: waits in all_reduce number 9")
    assert lines[5] == "  rank 4: never said a word"
    assert trace.short([0, 2]) == "0,2" and trace.short([3]) == "3"


def test_where_all_ranks_are_the_same_nobody_is_blamed() -> None:
    """As on a GPU: the host goes on after it has asked for a collective, and every rank has asked for as many."""
    last = [4, "all_reduce", "x", "0"]
    text = trace.report({r: word(last, False, {"0": 4}) for r in range(4)}, 4, 101.0, 30, 10)
    assert text.startswith("parallel.timeout=30: no rank moved, and none is behind the others\n")
    words = {r: word(last, False, {"0": 4}, at=100.0 if r else 60.0) for r in range(4)}
    text = trace.report(
        words, 4, 101.0, 30, 10
    )  # none is behind in collectives, for there are none of what it waits for
    assert text.startswith("parallel.timeout=30: rank 0 is silent\n  rank 0: is silent since 41 s, before that: ")


class Stub(trace.Watchdog):
    def __init__(self, store: dist.Store, folder: Path) -> None:
        self.told: list[str] = []
        self.codes: list[int] = []
        super().__init__(0.4, store, 1, 2, folder, self.told.append, self.codes.append)


def test_the_watchdog_barks_only_when_nothing_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Executes also what is there for NCCL, with a stand-in for its recorder."""
    monkeypatch.setattr(trace, "_state", trace._State())
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"of NCCL", raising=False)
    store = dist.HashStore()
    dog = Stub(store, tmp_path / "hang")
    dog.start()
    for _ in range(10):
        time.sleep(0.1)
        trace._state.moved = time.monotonic()
    with trace.unhurried():
        time.sleep(1)
    assert dog.codes == [] and json.loads(store.get("word/1"))["stalled"] is False
    call = trace.Call(3, "all_reduce", "blocks.0 gradients", "g", time.monotonic())
    trace._state.last, trace._state.counts, trace._state.ranks = call, {"g": 3}, {"g": [0, 1]}
    dog.join(10)
    assert dog.codes == [trace.HUNG] and len(dog.told) == 1
    assert "rank 0 did not come to all_reduce for blocks.0 gradients" in dog.told[0]
    assert {"entries", "version"} <= pickle.loads((tmp_path / "hang" / "gloo" / "rank_1").read_bytes()).keys()
    assert (tmp_path / "hang" / "nccl" / "rank_1").read_bytes() == b"of NCCL"


def test_the_watchdog_is_quiet_where_the_run_ends_by_itself_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that comes while it asks the others knows more than it does."""
    monkeypatch.setattr(trace, "_state", trace._State())
    dog = Stub(dist.HashStore(), tmp_path)
    dog.say = lambda stalled: dog.over.set() if stalled else None  # the main thread's error, in the middle of the end
    dog.start()
    dog.join(10)
    assert not dog.is_alive() and dog.codes == [] and dog.told == []


def test_the_watchdog_speaks_where_the_store_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_state", trace._State())

    class Gone(dist.HashStore):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Connection reset by peer")

    dog = Stub(Gone(), tmp_path)
    dog.start()
    dog.join(10)
    assert dog.codes == [trace.HUNG] and "store of the run is gone (Connection reset" in dog.told[0]


def test_a_purpose_belongs_to_a_thread() -> None:
    """Saves tell each other from a thread of their own."""
    found: list[Any] = []
    with trace.within("outer"):
        with trace.within("inner"):
            thread = threading.Thread(target=lambda: found.append(getattr(trace._local, "purpose", None)))
            thread.start()
            thread.join()
            found.append(trace._local.purpose)
        found.append(trace._local.purpose)
    assert found == [None, "inner", "outer"]
