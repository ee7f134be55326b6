"""The fused expert path over two nodes: by all-to-all between them, by the kernels inside each. 2 pretended nodes of 2 ranks."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moesaic.kernels.testing import launches
from moesaic.launch.cli import compose
from moesaic.moe.config import RouterConfig
from moesaic.moe.dispatch import LocalPath
from moesaic.parallel.apply import parallelize
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.expert import wire_figures
from moesaic.parallel.fused import FusedPath, TwoHopFusedPath, fused_paths
from moesaic.parallel.mesh import make_meshes
from moesaic.parallel.two_hop import TwoHopPath
from tests.parallel.pool import Pool
from tests.parallel.test_expert import CONFIG, EXPERTS, D, difference, experts_of, routing_of, run, tokens_of
from tests.parallel.test_fused_low import KNOBS

CPU = torch.device("cpu")
WIDE = dataclasses.replace(CONFIG, router=RouterConfig(top_k=EXPERTS))  # room for every workload
NODES = PLACES = 2
E = EXPERTS // 4
NAMES = ["zipf", "no_tokens", "idle_rank", "single_token"]  # idle_rank: nothing for the second node


def make_path(**knobs: Any) -> FusedPath:
    knobs = {"timeout": 60.0, "node_size": "2"} | knobs
    parallel = ParallelConfig(expert_path="fused", **knobs)
    return fused_paths(WIDE, parallel, make_meshes("cpu", 4), torch.float32, CPU, 45)("layer 0")


def predicted(name: str, once: bool, keep: bool) -> list[Counter]:
    """Bytes that each rank sends, forward and backward, slot by slot, from the routings alone."""
    sent: list[Counter] = [Counter() for _ in range(4)]
    row = 4 * D

    def send(a: int, b: int, **sizes: int) -> None:
        if a != b:
            hop = "intra" if a // PLACES == b // PLACES else "inter"
            sent[a].update({(hop, phase): size for phase, size in sizes.items()})

    for a in range(4):
        for b in range(4):
            if a // PLACES == b // PLACES:
                send(a, b, counts=4 * EXPERTS // NODES)
            elif a % PLACES == b % PLACES:
                send(a, b, counts=8 * (1 + EXPERTS // NODES))
        torch.manual_seed(2 + a)
        x, weights = torch.randn(tokens_of(name, a), D), torch.rand(tokens_of(name, a), EXPERTS)
        routing = routing_of(name, a, x, weights)
        pairs = zip(routing.token_S.tolist(), routing.expert_S.tolist(), strict=True)
        slots = [(token, expert // E) for token, expert in pairs if expert < EXPERTS]

        def via(owner: int, a: int = a) -> int:
            return owner // PLACES * PLACES + a % PLACES

        for _, owner in slots:
            send(a, via(owner), slots=8)
            send(via(owner), a, slots_grad=4)
            send(via(owner), owner, slots=12 + 16)
            send(owner, via(owner), combine=2 * row + 4)
        for _, passer in {(token, via(owner)) for token, owner in slots}:
            send(a, passer, dispatch=row, combine_grad=row)
            send(passer, a, combine=row, dispatch_grad=row)
        for _, owner in set(slots) if once else slots:
            send(via(owner), owner, dispatch=row * (2 if keep else 3))
    return [+counter for counter in sent]


def compare(names: list[str]) -> list[dict[str, Any]]:
    """The largest relative differences to the local path and to two hops of all-to-all on this rank, per workload; 1 where
    something differs that must not."""
    rank = dist.get_rank()
    knobs = [dict(fused_once=True, fused_keep=False), dict(fused_once=False, fused_keep=True)]
    paths = [make_path(**knob) for knob in knobs]
    two_hop = TwoHopPath(dist.group.WORLD, init_device_mesh("cpu", (NODES, PLACES)))
    results = []
    for i, name in enumerate(names):
        path, knob = paths[i % 2], knobs[i % 2]
        assert isinstance(path, TwoHopFusedPath)
        whole, part = experts_of(i == 0), experts_of(i == 0, 4, rank)
        want = run(LocalPath(), whole, name, rank)
        for n, parameter in whole.named_parameters():
            dist.all_reduce(parameter.grad)
            want[n] = parameter.grad.chunk(4)[rank]
        other = run(two_hop, part, name, rank)
        with launches() as kernels:
            got = run(path, part, name, rank)
        sent = Counter({key: n for key, n in path.sent.items() if key != ("intra", "flags")})
        path.sent.clear()
        assert not path.sent
        errors: dict[str, Any] = {key: difference(got[key], want[key]) for key in want}
        errors |= {f"{key}, two hops": difference(got[key], other[key]) for key in want}
        if i < 2:
            part.eval()
            again = run(path, part, name, rank)
            errors |= {f"{key} again": 1.0 for key in want if not torch.equal(again[key], got[key])}
            assert not {phase for _, phase in path.sent} & {"counts", "slots_grad"}  # an evaluation isn't counted
            path.sent.clear()
        expected = predicted(name, knob["fused_once"], knob["fused_keep"])[rank]
        errors["bytes"] = 0.0 if sent == expected else f"{sent} {expected}"
        errors["launches"] = 0.0 if kernels == ["_fused_forward_kernel", "_fused_backward_kernel"] else f"{kernels}"
        results.append(errors)
    return results


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(4, timeout=300) as ranks:
        yield ranks


def test_equals_local_path(pool: Pool) -> None:
    for rank, results in enumerate(pool.run(compare, NAMES)):
        for name, errors in zip(NAMES, results, strict=True):
            wrong = {key: error for key, error in errors.items() if isinstance(error, str) or not error < 2e-6}
            assert not wrong, (rank, name, wrong)


def trained(cases: list[dict[str, Any]]) -> list[Any]:
    """Of two steps of a model spread with these knobs: its path, losses, gradients of the last, and bytes."""
    results = []
    for case in cases:
        router = RouterConfig(top_k=2, rounding="nearest", rounding_tile=4)
        config = dataclasses.replace(CONFIG, vocab_size=31, n_layers=2, d_shared=8, expert_bias=True, router=router)
        parallel = ParallelConfig(expert="4", timeout=60.0, **case)
        torch.manual_seed(0)
        model = parallelize(
            config, parallel, make_meshes("cpu", 4), seed=0, device=CPU, compute=torch.float32, tokens=8
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        tokens, losses = torch.randint(0, 31, (1, 9), generator=torch.Generator().manual_seed(dist.get_rank())), []
        for _ in range(2):
            optimizer.zero_grad()
            out = model(tokens[:, :-1], tokens[:, 1:])
            (out.loss / 32 + out.aux).backward()
            optimizer.step()
            losses.append(out.loss.item())
        grads = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        paths = {type(layer.path).__name__ for layer in model.moe_layers()}
        results.append((paths, losses, grads, wire_figures(model.moe_layers(), 2, CPU)))
    return results


def test_trains_as_two_hops_do(pool: Pool) -> None:
    """With rounding and a shared expert, back to back through one heap; with a limit that drops rows; with nodes of one rank."""
    limit = dict(max_recv_tokens_factor=1.0, overload="drop")
    cases: list[dict[str, Any]] = [
        dict(expert_path="two_hop", node_size="2"),
        dict(expert_path="fused", node_size="2"),
        dict(expert_path="fused", node_size="2", remat="full"),
        dict(expert_path="two_hop", node_size="2", **limit),
        dict(expert_path="fused", node_size="2", **limit),
        dict(expert_path="fused", node_size="1", remat="selective", fused_keep=True),
    ]
    for results in pool.run(trained, cases):
        for i, (paths, losses, grads, wire) in enumerate(results):
            name = "TwoHopPath" if cases[i]["expert_path"] == "two_hop" else "TwoHopFusedPath"
            assert paths == {name}, paths
            _, want_losses, want, _ = results[3 if i in (3, 4) else 0]
            assert losses == pytest.approx(want_losses, rel=1e-6)
            errors = {n: difference(grads[n], want[n]) for n in want}
            assert max(errors.values()) < 1e-5, (cases[i], errors)
            assert wire["moe/wire_inter_bytes"] > 0
            assert (wire["moe/wire_intra_bytes"] > 0) == (cases[i]["node_size"] == "2")
        plain, again = results[1][2], results[2][2]
        assert all(torch.equal(again[n], plain[n]) for n in plain), "what remat computes again is the same"
        (_, losses, *_), (_, limited, *_) = results[0], results[3]
        assert losses != limited  # rows were dropped


def of_fp8() -> dict[str, tuple[float, int, int]]:
    """(relative difference of each gradient to that of two hops of all-to-all, bytes of rows between nodes of both), of unequal
    batches, rows and products of fp8."""
    found = []
    for path, knobs in (("two_hop", {}), ("fused", dict(fused_keep=True))):
        c = compose(["recipe=tiny_moe", *KNOBS, "model.n_experts=8", "model.expert_bias=true", "precision=fp8_block",
                     "precision.layers=[experts]"])  # fmt: skip
        parallel = ParallelConfig(expert="4", expert_path=path, node_size="2", timeout=60.0, **knobs)
        model = parallelize(
            c.model, parallel, make_meshes("cpu", 4), seed=0, device=CPU, compute=torch.float32, precision=c.precision, tokens=24
        )  # fmt: skip
        model.precision.begin(0, 10)
        generator = torch.Generator().manual_seed(dist.get_rank())
        tokens = torch.randint(0, 300, (1, 25 - 7 * dist.get_rank()), generator=generator)
        (model(tokens[:, :-1], tokens[:, 1:]).loss / 24).backward()
        grads = {n: p.grad.full_tensor().clone() for n, p in model.named_parameters()}
        found.append((grads, Counter(model.moe_layers()[0].path.sent)["inter", "dispatch"]))
    (want, one), (got, other) = found
    return {n: (difference(got[n], want[n]), one, other) for n in want}


def test_fp8_as_two_hops_have_it(pool: Pool) -> None:
    """Rows are cast for the way between nodes, and again for the way inside, which changes nothing."""
    for errors in pool.run(of_fp8):
        assert all(error < 2e-6 and one == other > 0 for error, one, other in errors.values()), errors
