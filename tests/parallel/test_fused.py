"""The fused expert path against the local one: numbers, bits, launches, bytes, failures, and its branch for CUDA."""

import dataclasses
import os
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.kernels.symmetric import FusedError, LostError
from moesaic.kernels.testing import launches
from moesaic.launch.cli import UserError, compose
from moesaic.moe.config import RouterConfig
from moesaic.moe.dispatch import LocalPath
from moesaic.moe.layer import FeedForward
from moesaic.moe.low import LowExperts
from moesaic.moe.precision import Precision
from moesaic.moe.router import topk_routing
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.fused import FusedPath, Space, as_experts, as_shared, fused_paths, most_slots, with_shared
from moesaic.parallel.layout import layout_of
from moesaic.parallel.overload import limit_of
from tests.parallel.pool import Pool, RanksFailed
from tests.parallel.test_expert import (
    CONFIG,
    EXPERTS,
    ROUTERS,
    WORKLOADS,
    D,
    F,
    K,
    difference,
    experts_of,
    routing_of,
    run,
    tokens_of,
)

CPU = torch.device("cpu")
WIDE = dataclasses.replace(CONFIG, router=RouterConfig(top_k=EXPERTS))  # room for every workload


def make_path(config: Any = WIDE, tokens: int = 45, **knobs: Any) -> FusedPath:
    knobs = {"timeout": 60.0} | knobs
    space = Space(dist.group.WORLD, config, ParallelConfig(expert_path="fused", **knobs), torch.float32, CPU)
    space.reserve(tokens)
    return FusedPath(space, layer="layer 0")


def predicted(name: str, rank: int, world: int, once: bool, keep: bool) -> Counter:
    """Bytes that a rank sends, forward and backward, from its routing and the others' alone."""
    sent: Counter = Counter()
    e, row = EXPERTS // world, 4 * D
    routings = []
    for r in range(world):
        torch.manual_seed(2 + r)
        x, weights = torch.randn(tokens_of(name, r), D), torch.rand(tokens_of(name, r), EXPERTS)
        routings.append(routing_of(name, r, x, weights))

    def slots(r: int) -> list[tuple[int, int]]:
        pairs = zip(routings[r].token_S.tolist(), routings[r].expert_S.tolist(), strict=True)
        return [(t, x // e) for t, x in pairs if x < EXPERTS]

    out = [s for s in slots(rank) if s[1] != rank]
    values = len(set(out)) if once else len(out)
    back = sum(owner == rank for r in range(world) if r != rank for _, owner in slots(r))
    sent["intra", "counts"] = (world - 1) * 4 * EXPERTS
    sent["intra", "dispatch"] = values * row * (2 if keep else 3)
    sent["intra", "slots"] = len(out) * (12 + 16)
    sent["intra", "combine"] = back * (2 * row + 4)
    return +sent


def compare(names: list[str]) -> list[dict[str, Any]]:
    """The largest relative differences to the local path on this rank, per workload; 1 where something differs that must not."""
    rank, world = dist.get_rank(), dist.get_world_size()
    knobs = [dict(fused_once=True, fused_keep=False), dict(fused_once=False, fused_keep=True)]
    paths = [make_path(**knob) for knob in knobs]
    results = []
    for i, name in enumerate(names):
        path, knob = paths[i % 2], knobs[i % 2]
        bias = i % 2 == 1
        whole, part = experts_of(bias), experts_of(bias, world, rank)
        want = run(LocalPath(), whole, name, rank)
        for n, parameter in whole.named_parameters():
            dist.all_reduce(parameter.grad)
            want[n] = parameter.grad.chunk(world)[rank]
        part.eval()
        first = run(path, part, name, rank)
        assert path.counters_WP.sum(dim=0)[1:3].tolist() == [0, 0] or path.counters_WP[:, 0].sum() == 0
        path.sent.clear()
        part.train()
        with launches() as kernels:
            got = run(path, part, name, rank)
        flags = ("intra", "flags")
        sent = Counter({key: n for key, n in path.sent.items() if key != flags})
        path.sent.clear()
        assert not path.sent
        wrong = {f"{key} again": 1.0 for key in want if not torch.equal(first[key], got[key])}
        errors = {key: difference(got[key], want[key]) for key in want} | wrong
        expected = predicted(name, rank, world, knob["fused_once"], knob["fused_keep"])
        errors["bytes"] = 0.0 if sent == expected else f"{sent} {expected}"
        errors["launches"] = 0.0 if kernels == ["_fused_forward_kernel", "_fused_backward_kernel"] else f"{kernels}"
        results.append(errors)
    return results


@pytest.mark.parametrize(
    ("world", "names"), [(2, WORKLOADS), (4, ["zipf", "idle_rank", "single_token", "unused_slots", "no_tokens"])]
)
def test_equals_local_path(world: int, names: list[str]) -> None:
    with Pool(world, timeout=300) as pool:
        for rank, results in enumerate(pool.run(compare, names)):
            for name, errors in zip(names, results, strict=True):
                wrong = {key: error for key, error in errors.items() if isinstance(error, str) or not error < 2e-6}
                assert not wrong, (rank, name, wrong)


def test_most_slots() -> None:
    for name, router in ROUTERS.items():
        config = dataclasses.replace(CONFIG, router=RouterConfig(top_k=K, **router))
        for rank in range(4):
            torch.manual_seed(rank)
            x, weights = torch.randn(tokens_of(name, rank), D), torch.rand(tokens_of(name, rank), EXPERTS)
            used = int(routing_of(name, rank, x, weights).counts_E.sum())
            assert used <= most_slots(config, len(x), 4) <= len(x) * EXPERTS, name
    assert most_slots(CONFIG, 10, 16) == 10 * K


# ---------------------------------------------------------------- the shared expert in the queue


def shared_of(n: int) -> FeedForward:
    torch.manual_seed(7)
    shared = FeedForward(D, n * F)
    for parameter in shared.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return shared


class Beside:
    """A path, and the shared expert outside of it."""

    def __init__(self, path: Any, shared: FeedForward) -> None:
        self.path, self.beside = path, shared

    def __call__(self, x: Tensor, routing: Any, experts: Any) -> Tensor:
        return self.path(x, routing, experts) + self.beside(x)


def shared_run(path: Any, shared: FeedForward, part: Any, name: str, rank: int) -> dict[str, Tensor]:
    shared.zero_grad()
    got = run(path, part, name, rank)
    return got | {f"shared {n}": p.grad.clone() for n, p in shared.named_parameters()}


def compare_shared(names: list[str]) -> list[dict[str, Any]]:
    """As `compare`, with a shared expert as wide as n experts: in the kernels, and beside the local path."""
    rank, world = dist.get_rank(), dist.get_world_size()
    cases = [(1, dict(fused_once=True, fused_keep=False)), (3, dict(fused_once=False, fused_keep=True)),
             (2, dict(fused_once=True, fused_keep=True))]  # fmt: skip
    paths = [make_path(dataclasses.replace(WIDE, d_shared=n * F), fused_shared=True, **knobs) for n, knobs in cases]
    results = []
    for i, name in enumerate(names):
        (n, knobs), path = cases[i % 3], paths[i % 3]
        shared, whole, part = shared_of(n), experts_of(i % 2 == 1), experts_of(i % 2 == 1, world, rank)
        want = shared_run(Beside(LocalPath(), shared), shared, whole, name, rank)
        for key, parameter in whole.named_parameters():
            dist.all_reduce(parameter.grad)
            want[key] = parameter.grad.chunk(world)[rank]
        path.shared = shared
        first = shared_run(path, shared, part, name, rank)
        path.sent.clear()
        got = shared_run(path, shared, part, name, rank)
        sent = Counter({key: count for key, count in path.sent.items() if key != ("intra", "flags")})
        expected = predicted(name, rank, world, knobs["fused_once"], knobs["fused_keep"])
        expected["intra", "counts"] += (world - 1) * 4 * n * world  # no row of it leaves the rank
        errors: dict[str, Any] = {key: difference(got[key], want[key]) for key in want}
        errors |= {f"{key} again": 1.0 for key in want if not torch.equal(first[key], got[key])}
        errors["bytes"] = 0.0 if sent == expected else f"{sent} {expected}"
        results.append(errors)
    return results


@pytest.mark.parametrize(
    ("world", "names"),
    [(1, ["uniform", "single_token"]), (2, WORKLOADS), (4, ["zipf", "no_tokens", "unused_slots"])],
)
def test_shared_expert_in_the_queue_equals_beside(world: int, names: list[str]) -> None:
    with Pool(world, timeout=300) as pool:
        for rank, results in enumerate(pool.run(compare_shared, names)):
            for name, errors in zip(names, results, strict=True):
                wrong = {key: error for key, error in errors.items() if isinstance(error, str) or not error < 2e-6}
                assert not wrong, (rank, name, wrong)


def test_shared_slots_by_hand() -> None:
    """2 ranks of 2 experts, this one the second; of 1 shared expert: experts 0 and 3 are shared, 1 2 and 4 5 routed."""
    ids, weights = torch.tensor([[3, 0], [1, 2]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    routing = with_shared(topk_routing(ids, weights, 4), 1, 2, 1)
    assert routing.expert_S.tolist() == [5, 1, 3, 2, 4, 3] and routing.per_token == 3
    assert routing.token_S.tolist() == [0, 0, 0, 1, 1, 1]
    assert routing.counts_E.tolist() == [0, 1, 1, 2, 1, 1]
    assert torch.equal(routing.weights_S, torch.tensor([0.7, 0.3, 1.0, 0.6, 0.4, 1.0]))
    unused = dataclasses.replace(topk_routing(ids, weights, 4), expert_S=torch.tensor([3, 4, 4, 2]), per_token=0)
    unused = with_shared(dataclasses.replace(unused, counts_E=torch.tensor([0, 0, 1, 1])), 2, 2, 0)
    assert unused.expert_S.tolist() == [7, 8, 8, 6, 0, 1, 0, 1]  # 8 for none
    assert unused.token_S.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert unused.counts_E.tolist() == [2, 2, 0, 0, 0, 0, 1, 1]
    up, down = torch.randn(2 * 3 * F, D), torch.randn(D, 3 * F)
    back = as_shared(*as_experts(up, down, F, torch.float32), up)
    assert torch.equal(back[0], up) and torch.equal(back[1], down)
    up_1, _ = as_experts(up[: 2 * F], down[:, :F].contiguous(), F, torch.float32)
    assert up_1.data_ptr() == up.data_ptr()  # as wide as one expert: nothing is copied


def shared_rows_are_beside_the_limit() -> str:
    """All routed rows go to rank 1: with room for an even load of them it is still too few, and never because of shared rows."""
    config = dataclasses.replace(CONFIG, d_shared=2 * F)
    path = make_path(config, tokens=60, max_recv_tokens_factor=1.0, fused_shared=True)
    path.shared = shared_of(2)
    rank, part = dist.get_rank(), experts_of(False, 2, dist.get_rank())
    x, weights = torch.randn(60, D), torch.rand(60, EXPERTS)
    path(x, all_to(60, [0, 4], weights), part)  # an even load
    with pytest.raises(RuntimeError) as failed:
        path(x, all_to(60, [4, 5], weights), part)
    return f"{rank}: {failed.value}"


def dropped_in_an_evaluation() -> float:
    """The same load, which does not fit: dropped as training drops it, though nobody asked the path to admit it."""
    config = dataclasses.replace(CONFIG, d_shared=2 * F)
    path = make_path(config, tokens=60, max_recv_tokens_factor=1.0, overload="drop", fused_shared=True)
    path.shared, path.limit = shared_of(2), limit_of(path.space.parallel, "layer 0")
    part, x, weights = experts_of(False, 2, dist.get_rank()), torch.randn(60, D), torch.rand(60, EXPERTS)
    routing = all_to(60, [4, 5], weights)
    want = path(x, path.admit(routing), part)
    part.eval()
    assert path.admit(routing).dropped > 0
    return difference(path(x, routing, part), want)


def test_an_evaluation_drops_what_has_no_room() -> None:
    with Pool(2) as pool:
        assert pool.run(dropped_in_an_evaluation) == [0.0, 0.0]


def test_a_limit_bounds_routed_rows_and_leaves_shared_ones() -> None:
    with Pool(2) as pool:
        for line in pool.run(shared_rows_are_beside_the_limit):
            assert "has no room: " in line and "tiles of rows come to rank 1" in line


@pytest.mark.parametrize(
    ("knob", "line"),
    [
        ("fused_keep=true", "parallel.fused_keep=true: must be false with parallel.expert_path=all_to_all"),
        ("fused_once=false", "parallel.fused_once=false: must be true with parallel.expert_path=all_to_all"),
    ],
)
def test_knobs_of_the_kernels_are_refused_where_there_are_none(knob: str, line: str) -> None:
    with pytest.raises(UserError) as refused:
        compose(["recipe=tiny_moe", "parallel.expert_path=all_to_all", f"parallel.{knob}"])
    assert str(refused.value) == line


QUEUE = ["recipe=tiny_moe", "parallel.expert_path=fused", "parallel.fused_shared=true"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["parallel.expert_path=all_to_all"], "parallel.fused_shared=true: must be false with parallel.expert_path=all_to_all"),
        (["model.d_shared=0"], "model.d_shared=0: must be positive with parallel.fused_shared=true"),
        (["model.d_shared=100", "model.d_expert=48"],
         "model.d_shared=100: must be a multiple of model.d_expert=48 with parallel.fused_shared=true"),
        (["model.activation=geglu"],
         "model.activation=geglu: must be swiglu, the shared expert's, with parallel.fused_shared=true"),
        (["precision.dispatch=fp8"], "precision.dispatch=fp8: must be high with parallel.fused_shared=true"),
        (["precision=fp8_block", "precision.dispatch=high", "precision.layers=[attention,dense]"],
         "precision.layers=['attention', 'dense']: must be without dense with parallel.fused_shared=true"),
    ],
)  # fmt: skip
def test_where_a_shared_expert_cannot_be_in_the_queue(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        compose([*QUEUE, "model.d_shared=192", *overrides])
    assert str(refused.value) == line


def test_a_shared_expert_is_not_in_the_queue_of_several_nodes() -> None:
    config = compose([*QUEUE, "model.d_shared=192", "parallel.expert=4", "parallel.node_size=2"])
    with pytest.raises(ValueError) as refused:
        layout_of(config.model, config.parallel, 4, 4, 1, 1, 8, "fp32")
    assert str(refused.value) == (
        "parallel.fused_shared=true: must be false where an expert group is in 2 nodes, whose ranks compute each other's tokens"
    )
    with pytest.raises(ValueError, match="must be false where an expert group is in 2 nodes"):
        fused_paths(
            config.model,
            config.parallel,
            SimpleNamespace(expert_parallel=4, experts=MagicMock()),
            torch.float32,
            CPU,
            None,
        )


# ---------------------------------------------------------------- what goes wrong


def one_rank_dies(how: str) -> str:
    """Rank 1 dies, or stops, when it has sent its first row; what the others raise."""
    from moesaic.kernels import interpret

    path = make_path(timeout=2.0 if how == "die" else 1.0)
    rank, part = dist.get_rank(), experts_of(False, dist.get_world_size(), dist.get_rank())
    if how == "stall, products apart":
        part.low = LowExperts(Precision(compose(["recipe=tiny_moe", "precision=mxfp8"]).precision), "layer 0", EXPERTS)
    run(path, part, "uniform", rank)
    if rank == 1:
        calls = iter(range(10**9))

        def stop(original: Any) -> Any:
            def store(*arguments: Any, **named: Any) -> Any:
                if next(calls) == 40:
                    if how == "die":
                        os._exit(3)
                    time.sleep(15)
                return original(*arguments, **named)

            return store

        builder = interpret.InterpreterBuilder
        builder.create_masked_store = stop(builder.create_masked_store)
    try:
        run(path, part, "uniform", rank)
    except Exception as error:
        dist.barrier = lambda *a: None
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("how", ["die", "stall", "stall, products apart"])
def test_a_rank_that_dies_or_stops_ends_all_with_its_name(how: str) -> None:
    with Pool(2, timeout=280, patience=200) as pool:
        if how == "die":
            with pytest.raises(RanksFailed) as failed:
                pool.run(one_rank_dies, how)
            assert list(failed.value.lost) == [1]
            pool.run(compare, ["uniform"])  # started anew, with memory of its own
        else:
            told = pool.run(one_rank_dies, how)
            where = "forward" if how == "stall" else "dispatch in forward"
            assert all(
                line.startswith(f"LostError: parallel.expert_path=fused, {where} of layer 0: rank 0") for line in told
            )
            assert all("waited in vain for" in line and "of rank 1" in line for line in told), told


def seen_in_launches() -> list[bool]:
    from moesaic.kernels import fused_ep, fused_ep_backward
    from moesaic.parallel import trace

    path, part, seen = make_path(), experts_of(False, 1, 0), []

    def noting(launch: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            seen.append(trace._state.unhurried)
            return launch(*arguments, **named)

        return run

    with (
        patch.object(fused_ep, "forward", noting(fused_ep.forward)),
        patch.object(fused_ep_backward, "backward", noting(fused_ep_backward.backward)),
    ):
        run(path, part, "single_token", 0)
    return [*seen, trace._state.unhurried]


def test_the_watchdog_leaves_a_launch_to_its_own_waits() -> None:
    with Pool(1) as pool:
        assert pool.run(seen_in_launches) == [[True, True, False]]


def test_a_call_beyond_the_room_is_refused_and_rows_beyond_it_end_all_ranks() -> None:
    with Pool(2) as pool:
        for told in pool.run(beyond_the_room):
            assert told["tokens"] == (
                "parallel.expert_path=fused: 26 tokens in a call of layer 0, its memory is made for 25; "
                "reserve more, on all ranks"
            )
            # 2 ranks send all 2 * 25 slots to rank 1, which has room for 1.0 times an even load, 50, and a tile of each expert.
            # Both ranks see it; what the other one says may come after this one has looked.
            assert told["rows"].startswith(
                tuple(
                    f"parallel.expert_path=fused, forward of layer 0: rank {one} of the group has no room: "
                    for one in range(2)
                )
            )
            assert "tiles of rows come to rank 1" in told["rows"]
            assert told["grown"] == 45
            assert told["order"].startswith(
                tuple(
                    f"parallel.expert_path=fused, forward of layer 0: launch 3 of rank {one} of the group is call {one + 1} "
                    f"forward, that of rank {1 - one} is call {2 - one} forward: all ranks must call the same layers in the "
                    "same order"
                    for one in range(2)
                )
            )


def beyond_the_room() -> dict[str, Any]:
    rank, told = dist.get_rank(), {}
    part = experts_of(False, 2, rank)
    path = make_path(CONFIG, tokens=25, max_recv_tokens_factor=1.0)
    x, weights = torch.randn(26, D), torch.rand(26, EXPERTS)
    with pytest.raises(ValueError) as refused:
        path(x, routing_of("uniform", rank, x, weights), part)
    told["tokens"] = str(refused.value)
    x, weights = torch.randn(25, D), torch.rand(25, EXPERTS)
    with pytest.raises(FusedError) as failed:
        path(x, all_to(25, [6, 7], weights), part)
    assert not isinstance(failed.value, LostError)  # ranks started anew would end so again
    told["rows"] = str(failed.value)
    path = make_path(tokens=3)
    path.space.reserve(2)
    path.space.reserve(20 + 25 * rank)
    run(path, part, "uniform", rank)
    told["grown"] = path.space.tokens
    other = [FusedPath(path.space, layer="layer 0") for _ in range(2)][rank]
    with pytest.raises(RuntimeError) as failed:
        run(other, part, "uniform", rank)
    return told | {"order": str(failed.value)}


def all_to(tokens: int, experts: list[int], weights: Tensor) -> Any:
    ids = torch.tensor([experts]).repeat(tokens, 1)
    return topk_routing(ids, weights.gather(1, ids), EXPERTS)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["parallel.comm_sms=-1"], "parallel.comm_sms=-1: must not be negative"),
        (["parallel.expert_path=pushed"], "parallel.expert_path=pushed: must be one of auto, local, all_to_all, two_hop, fused"),
    ],
)  # fmt: skip
def test_knobs_that_are_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        compose(["recipe=tiny_moe", *overrides])
    assert str(refused.value) == line


# ---------------------------------------------------------------- what only a GPU runs


def on_a_pretend_gpu() -> None:
    """The branch for CUDA of one rank of a group, with the calls of torch's symmetric memory noted."""
    import torch.distributed._symmetric_memory as symmetric

    calls = MagicMock()
    calls.empty.side_effect = lambda size, dtype, device: torch.full((size,), 7, dtype=dtype)
    rank = dist.get_rank()

    def mapped(memory: Tensor, group: Any) -> Any:
        bases = [1 << 20, 1 << 30]
        bases[rank] = memory.data_ptr() - 256
        return SimpleNamespace(buffer_ptrs=bases)

    calls.rendezvous.side_effect = mapped
    space = make_path().space
    space.device = torch.device("cuda", 0)
    with (
        patch.multiple(symmetric, empty=calls.empty, rendezvous=calls.rendezvous),
        patch.object(torch.cuda, "synchronize") as wait,
    ):
        memory, kept, addresses = space.device_memory(512, space.exchange)
    other = [1 << 20, 1 << 30][1 - rank]
    assert memory.count_nonzero() == 0 and len(kept) == 1
    assert addresses[rank] == memory.data_ptr() and addresses[1 - rank] == other + 256
    assert calls.rendezvous.call_args.args == (memory, space.group) and wait.called

    # Nothing is read before it has come: failures of a launch are told by a later one.
    failed = torch.zeros(2, 8, dtype=torch.int32)
    failed[1] = torch.tensor([1, 2, 5, -1, 0, 9, 8, 9])
    on_device = MagicMock(is_cuda=True, to=lambda device, non_blocking: failed)
    events = [MagicMock(**{"query.return_value": False}), MagicMock(**{"query.return_value": True})]
    space.setting = SimpleNamespace(heap=SimpleNamespace(view=lambda name: on_device))
    with patch.object(torch.cuda, "Event", side_effect=events):
        space.check("forward of a")
        space.look()
        events[0].query.return_value = True
        events[1].query.side_effect = [False, True]
        space.watched.append((events[1], failed, "backward of b"))
        with pytest.raises(RuntimeError) as told:
            space.look()  # once the host has waited for the device: before what was computed is used
        assert events[1].query.call_count == 2  # before memory that its launches use may go
    streams = [SimpleNamespace(cuda_stream=n) for n in (7, 7, 8)]
    with patch.object(torch.cuda, "current_stream", side_effect=streams):
        space.one_stream()
        space.one_stream()
        with pytest.raises(RuntimeError, match="all launches of a group must be on one stream"):
            space.one_stream()
    assert str(told.value) == (
        "parallel.expert_path=fused, forward of a: rank 1 of the group waited in vain for `arrived` of rank 0, tile 5 in "
        "launch 9: expected 9, saw 8"
    )


def test_branch_for_cuda() -> None:
    with Pool(2) as pool:
        pool.run(on_a_pretend_gpu)


def test_grid_leaves_multiprocessors_to_collectives() -> None:
    from moesaic.kernels.fused_ep import grid_programs

    with patch("moesaic.kernels.fused_ep.processors", return_value=132):
        assert grid_programs(torch.device("cuda"), 16) == 116
        with pytest.raises(
            ValueError, match="parallel.comm_sms=132: must be below the multiprocessors of the device, 132"
        ):
            grid_programs(torch.device("cuda"), 132)
    assert grid_programs(CPU, 16) == 1


def check_operation() -> None:
    """torch's own checks: schema, autograd registration, and that fake tensors have the shapes of real ones; alone in a group."""
    from torch.library import opcheck

    from moesaic.moe.dispatch import sorted_rows
    from moesaic.parallel import fused

    for keep, n in ((False, 0), (True, 0), (False, 2)):
        config = dataclasses.replace(CONFIG, d_shared=n * F)
        path, part = make_path(config, tokens=7, fused_keep=keep, fused_shared=n > 0), experts_of(keep)
        x, weights = torch.randn(7, D), torch.rand(7, EXPERTS)
        routing = routing_of("uniform", 0, x, weights)
        shared = [None, None]
        if n:
            routing = with_shared(routing, n, 1, 0)
            shared = [torch.randn(2 * n * F, D, requires_grad=True), torch.randn(D, n * F, requires_grad=True)]
        rows = sorted_rows(routing, part, x)
        w_up, w_down, *biases = [p.detach().requires_grad_() for p in part.parameters()]
        arguments = (
            x.requires_grad_(), routing.weights_S[rows.slot_R], w_up, w_down, rows.source_R, rows.expert_R, rows.bag, rows.starts,
            rows.counts_E, "swiglu", path.number, False, *[None] * 4, *(biases or [None] * 2), *shared,
        )  # fmt: skip
        opcheck(fused._op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_operation_for_autograd() -> None:
    with Pool(1) as pool:
        pool.run(check_operation)
