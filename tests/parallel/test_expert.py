"""The all-to-all paths against the local one, on workloads that uneven exchanges get wrong; their bits, and their bytes."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.dispatch import LocalPath
from moesaic.moe.experts import Experts
from moesaic.moe.router import Router, Routing, count_rows, topk_routing
from moesaic.parallel.apply import parallelize
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.expert import AllToAllPath, arrived, fan_out, hops, wire_figures
from moesaic.parallel.mesh import make_meshes
from moesaic.parallel.two_hop import TwoHopPath, node_ranks
from tests.parallel.ranks import run_ranks

EXPERTS, D, F, K = 8, 16, 12, 2
CONFIG = ModelConfig(d_model=D, n_heads=2, n_experts=EXPERTS, d_expert=F, router=RouterConfig(top_k=K))


def test_rows_of_a_leg_by_hand() -> None:
    # Three tokens, two targets: token 0 goes to both, 1 to the second, 2 to the first. Rows: 0 2 | 0 1.
    source, place, bag, starts = fan_out(torch.tensor([[True, False, True], [True, True, False]]), 4)
    assert source.tolist() == [0, 2, 0, 1]
    assert (place[0, 0], place[0, 2], place[1, 0], place[1, 1]) == (0, 1, 0, 1)
    # Token 0 is the sum of rows 0 and 2, token 1 row 3, token 2 row 1.
    assert (bag.tolist(), starts.tolist()) == ([0, 2, 3, 1], [0, 2, 3, 4])
    source, _, bag, starts = fan_out(torch.zeros(2, 3, dtype=torch.bool), 0)
    assert (source.tolist(), bag.tolist(), starts.tolist()) == ([], [], [0, 0, 0, 0])


def test_slots_that_arrived_by_hand() -> None:
    # Two sources with two and one rows, two experts here. Source a: row 0 wants both, row 1 the second; b: row 2 both. Blocks
    # of (source, expert): a0, a1, b0, b1.
    row_S = torch.tensor([0, 0, 1, 2, 2])
    expert, source, slots = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2, 1, 1])
    rows = arrived(row_S, expert, source, slots, 2, 3)
    assert rows.counts_E.tolist() == [2, 3]
    assert rows.source_R.tolist() == [0, 2, 0, 1, 2]
    assert rows.expert_R.tolist() == [0, 0, 1, 1, 1]
    assert (rows.bag.tolist(), rows.starts.tolist()) == ([0, 2, 3, 1, 4], [0, 2, 3, 5])
    # The same blocks in another order give the same rows.
    other = arrived(torch.tensor([0, 0, 1, 2, 2]).roll(2), expert.roll(2), source.roll(2), slots.roll(2), 2, 3)
    assert torch.equal(other.source_R, rows.source_R) and torch.equal(other.bag, rows.bag)
    assert other.slot_R.tolist() == [2, 0, 3, 4, 1]


def test_node_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for local_world, degree, node in [
        (8, 8, 8),
        (16, 8, 8),
        (4, 8, 4),
        (6, 4, 2),
    ]:  # 6: groups begin in the middle of nodes
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world))
        assert node_ranks("auto", degree) == node
    assert (node_ranks("2", 8), node_ranks("16", 8)) == (2, 8)
    with pytest.raises(ValueError, match="parallel.node_size=3: must divide the expert degree, 8, or be a multiple"):
        node_ranks("3", 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert node_ranks("auto", 8) == 8
    assert hops(range(4), 1, 2) == ("intra", "", "inter", "inter")


WORKLOADS = [
    "uniform", "zipf", "one_expert", "idle_rank", "no_tokens", "single_token", "unused_slots",
    "all_experts", "capacity", "rounding", "expert_choice",
]  # fmt: skip
ROUTERS = {
    "capacity": dict(capacity_factor=0.7),
    "rounding": dict(rounding="stochastic", rounding_tile=4),
    "expert_choice": dict(kind="expert_choice", renormalize=True),
}


def tokens_of(name: str, rank: int) -> int:
    if name == "no_tokens":
        return 0 if rank == 0 else 17
    return 1 if name == "single_token" else 19 + 7 * rank


def routing_of(name: str, rank: int, x: Tensor, weights: Tensor) -> Routing:
    """That of a rank's tokens; `weights` (T, E) are what a router would give, or its scores."""
    tokens = len(x)
    generator = torch.Generator().manual_seed(100 * rank + len(name))
    if name in ROUTERS:
        config = ModelConfig(
            d_model=EXPERTS, n_heads=2, n_experts=EXPERTS, d_expert=F, router=RouterConfig(top_k=K, **ROUTERS[name])
        )
        router = Router(config)
        torch.nn.init.eye_(router.weight_ED)  # logits are its input
        torch.manual_seed(rank)
        return router(4 * weights)[0]
    k = EXPERTS if name == "all_experts" else K
    likely = torch.ones(EXPERTS)
    if name == "idle_rank":  # nothing for experts of the last rank
        likely[EXPERTS // 2 :] = 0
    elif name == "zipf":
        likely = 1 / torch.arange(1, EXPERTS + 1)
    ids = torch.zeros(0, k, dtype=torch.int64)
    if tokens:
        ids = torch.multinomial(likely.expand(tokens, EXPERTS), k, generator=generator)
    if name == "one_expert":
        ids = torch.tensor([[5, 2]]).repeat(tokens, 1)
    routing = topk_routing(ids, weights.gather(1, ids), EXPERTS)
    if name == "unused_slots":  # as capacity and rounding leave them: a token without any, others with one or two
        unused_S = torch.arange(ids.numel()) % 3 == 0
        unused_S[:K] = True
        expert_S = routing.expert_S.masked_fill(unused_S, EXPERTS)
        counts_E = count_rows(expert_S[~unused_S], EXPERTS)
        weights_S = routing.weights_S * ~unused_S
        routing = dataclasses.replace(routing, expert_S=expert_S, counts_E=counts_E, weights_S=weights_S, per_token=0)
    return routing


def experts_of(bias: bool, ranks: int = 1, rank: int = 0) -> Experts:
    """Those of the layer, or the share of one rank."""
    torch.manual_seed(1)
    whole = Experts(dataclasses.replace(CONFIG, expert_bias=bias))
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for name, parameter in list(whole.named_parameters()):
        setattr(whole, name, torch.nn.Parameter(parameter.detach().chunk(ranks)[rank].clone()))
    return whole


Run = dict[str, Tensor]


def run(path: Any, experts: Experts, name: str, rank: int, dtype: torch.dtype = torch.float32) -> Run:
    """Output and all gradients of one call."""
    torch.manual_seed(2 + rank)
    tokens = tokens_of(name, rank)
    x, weights = torch.randn(tokens, D).to(dtype).requires_grad_(), torch.rand(tokens, EXPERTS).requires_grad_()
    gradient = torch.randn(tokens, D).to(dtype)
    experts.zero_grad()
    y = path(x, routing_of(name, rank, x, weights), experts)
    y.backward(gradient)
    assert y.dtype == x.grad.dtype == dtype
    assert not y._is_view()  # FSDP2 would warn
    return {"y": y.detach(), "dx": x.grad, "dweights": weights.grad} | {
        n: p.grad.clone() for n, p in experts.named_parameters()
    }


def compare(names: list[str]) -> list[dict[str, float]]:
    """The largest relative differences to the local path on this rank, per workload; 1 where bits differ that must not."""
    rank, world = dist.get_rank(), dist.get_world_size()
    group, results = dist.group.WORLD, []
    paths = [AllToAllPath(group)]
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2))
        paths += [AllToAllPath(group, 2), TwoHopPath(group, mesh)]
    for i, name in enumerate(names):
        bias = i % 2 == 1
        whole, part = experts_of(bias), experts_of(bias, world, rank)
        want = run(LocalPath(), whole, name, rank)
        for n, parameter in whole.named_parameters():
            dist.all_reduce(parameter.grad)
            want[n] = parameter.grad.chunk(world)[rank]
        errors: dict[str, float] = {}
        got = {}
        for path in paths:
            got[path] = run(path, part, name, rank)
            again = run(path, part, name, rank)
            for key in want:
                label = f"{type(path).__name__} {path.node_size} {key}"
                errors[label] = difference(got[path][key], want[key])
                errors[f"{label} again"] = 0.0 if torch.equal(again[key], got[path][key]) else 1.0
        if world == 4:
            flat, two_hop = got[paths[1]], got[paths[2]]
            errors |= {f"two hops {key}": 0.0 if torch.equal(flat[key], two_hop[key]) else 1.0 for key in want}
            if not bias:  # on a CPU alone: grouped_mm is none of fp32's
                low = experts_of(False, world, rank).bfloat16()
                flat, two_hop = (run(path, low, name, rank, torch.bfloat16) for path in paths[1:])
                errors |= {f"bf16 {key}": 0.0 if torch.equal(flat[key], two_hop[key]) else 1.0 for key in want}
        results.append(errors)
    return results


def difference(mine: Tensor, theirs: Tensor) -> float:
    if theirs.numel() == 0 or mine.shape != theirs.shape:
        return 0.0 if mine.shape == theirs.shape else 1.0
    return ((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9)).item()


@pytest.mark.parametrize("world", [2, 4])
def test_equals_local_path(world: int, tmp_path: Path) -> None:
    for rank, results in enumerate(run_ranks(compare, world, tmp_path, WORKLOADS)):
        for name, errors in zip(WORKLOADS, results, strict=True):
            wrong = {key: error for key, error in errors.items() if not error < 2e-6}
            assert not wrong, (rank, name, wrong)


def counted(names: list[str]) -> list[list[Counter]]:
    """Bytes that this rank sent, flat and in two hops, per workload."""
    rank, world = dist.get_rank(), dist.get_world_size()
    part, results = experts_of(False, world, rank), []
    paths = [AllToAllPath(dist.group.WORLD, 2), TwoHopPath(dist.group.WORLD, init_device_mesh("cpu", (2, 2)))]
    for name in names:
        sent = []
        for path in paths:
            part.eval()
            run(path, part, name, rank)
            assert not path.sent  # an evaluation isn't counted
            part.train()
            run(path, part, name, rank)
            sent.append(path.sent.copy())
            path.sent.clear()
        results.append(sent)
    return results


def predicted(name: str, two_hop: bool) -> Counter:
    """Bytes of all ranks, slot by slot, from the routings alone. 4 ranks, nodes of 2."""
    total: Counter = Counter()
    e, row = EXPERTS // 4, 4 * D

    def send(a: int, b: int, phase: str, back: str, size: int, size_back: int) -> None:
        hop = "" if a == b else "intra" if a // 2 == b // 2 else "inter"
        if hop:
            total[hop, phase] += size
            total[hop, back] += size_back

    for rank in range(4):
        torch.manual_seed(2 + rank)
        tokens = tokens_of(name, rank)
        x, weights = torch.randn(tokens, D), torch.rand(tokens, EXPERTS)
        routing = routing_of(name, rank, x, weights)
        slots = [
            (t, e_) for t, e_ in zip(routing.token_S.tolist(), routing.expert_S.tolist(), strict=True) if e_ < EXPERTS
        ]
        visits = {(t, expert // e) for t, expert in slots}
        for other in range(4):
            if not two_hop:
                send(rank, other, "counts", "", 8 * (e + 1), 0)
            elif rank % 2 == other % 2:
                send(rank, other, "counts", "", 8 * (1 + 2 + 2 * e), 0)
            elif rank // 2 == other // 2:
                send(rank, other, "counts", "", 8 * 2 * (1 + e), 0)
        for _, expert in slots:
            if two_hop:
                between = expert // e // 2 * 2 + rank % 2
                send(rank, between, "slots", "slots_grad", 8, 4)
                send(between, expert // e, "slots", "slots_grad", 8, 4)
            else:
                send(rank, expert // e, "slots", "slots_grad", 8, 4)
        legs = [(rank, to) for _, to in visits]
        if two_hop:
            legs = [(rank, node * 2 + rank % 2) for _, node in {(t, to // 2) for t, to in visits}]
            legs += [(to // 2 * 2 + rank % 2, to) for _, to in visits]
        for a, b in legs:
            send(a, b, "dispatch", "combine", row, row)
            send(a, b, "combine_grad", "dispatch_grad", row, row)
    del total["inter", ""], total["intra", ""]
    return total


def test_bytes_on_the_wire_are_those_of_the_formula(tmp_path: Path) -> None:
    ranks = run_ranks(counted, 4, tmp_path, WORKLOADS)
    for i, name in enumerate(WORKLOADS):
        for two_hop in (False, True):
            measured = sum((results[i][two_hop] for results in ranks), Counter())
            assert measured == +predicted(name, two_hop), (name, two_hop)


def in_a_model(knobs: list[dict[str, str]]) -> list[Any]:
    """Of a model spread with these knobs: its paths, gradients of this rank's tokens, and bytes a step, of one and of two
    steps."""
    results = []
    for chosen in knobs:
        config = dataclasses.replace(CONFIG, vocab_size=31, n_layers=2)
        meshes = make_meshes("cpu", 4)
        model = parallelize(
            config, ParallelConfig(**chosen), meshes, seed=0, device=torch.device("cpu"), compute=torch.float32
        )
        paths = [(type(layer.path).__name__, layer.path.node_size) for layer in model.moe_layers()]
        tokens = torch.randint(0, 31, (2, 14), generator=torch.Generator().manual_seed(dist.get_rank()))
        figures = []
        for steps in (1, 2):
            for _ in range(steps):
                model.zero_grad()
                model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
            figures.append(wire_figures(model.moe_layers(), steps, torch.device("cpu")))
        model.reshard()
        results.append((paths, {n: p.grad.full_tensor() for n, p in model.named_parameters()}, figures))
    return results


def test_knobs_choose_the_path_and_bytes_are_logged(tmp_path: Path) -> None:
    knobs = [
        dict(expert_path="two_hop", node_size="2"), dict(expert_path="all_to_all", node_size="2"), dict(expert_path="two_hop"),
    ]  # fmt: skip
    for results in run_ranks(in_a_model, 4, tmp_path, knobs):
        (two, two_gradients, two_bytes), (flat, flat_gradients, flat_bytes), (one_node, _, inside) = results
        assert two == [("TwoHopPath", 2)] * 2 and flat == [("AllToAllPath", 2)] * 2
        assert one_node == [("AllToAllPath", 4)] * 2  # what torchrun started here is one node
        assert all(torch.equal(two_gradients[n], flat_gradients[n]) for n in two_gradients)
        assert two_bytes[0] == two_bytes[1] and flat_bytes[0] == flat_bytes[1]
        assert 0 < two_bytes[0]["moe/wire_inter_bytes"] < flat_bytes[0]["moe/wire_inter_bytes"]
        assert inside[0]["moe/wire_inter_bytes"] == 0
        for figures in (two_bytes[0], flat_bytes[0], inside[0]):
            for hop in ("inter", "intra"):
                layers = [figures[f"moe/layer{i}/wire_{hop}_bytes"] for i in range(2)]
                assert figures[f"moe/wire_{hop}_bytes"] == sum(layers)


class Halves:
    """A codec: rows in bf16."""

    def encode(self, x_TD: Tensor) -> list[Tensor]:
        return [x_TD.bfloat16()]

    def decode(self, payload: list[Tensor], dtype: torch.dtype) -> Tensor:
        return payload[0].to(dtype)


class Bytes:
    """A codec of two tensors: fp8 values as bytes, and a scale for each row."""

    def encode(self, x_TD: Tensor) -> list[Tensor]:
        scale_T1 = x_TD.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 448
        return [(x_TD / scale_T1).to(torch.float8_e4m3fn).view(torch.uint8), scale_T1]

    def decode(self, payload: list[Tensor], dtype: torch.dtype) -> Tensor:
        return payload[0].view(torch.float8_e4m3fn).to(dtype) * payload[1]


class Encoded:
    """What a codec should come to: the local path on rows that went through it, with the gradient straight through."""

    def __init__(self, codec: Any) -> None:
        self.codec = codec

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        through = self.codec.decode(self.codec.encode(x.detach()), x.dtype)
        return LocalPath()(x + (through - x).detach(), routing, experts)


def with_codecs() -> list[tuple[dict[str, float], Counter, Counter]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh, results = init_device_mesh("cpu", (2, 2)), []
    for codec in (Halves(), Bytes()):
        for plain, path in [
            (AllToAllPath(dist.group.WORLD, 2), AllToAllPath(dist.group.WORLD, 2, codec)),
            (TwoHopPath(dist.group.WORLD, mesh), TwoHopPath(dist.group.WORLD, mesh, codec)),
        ]:
            whole, part = experts_of(False), experts_of(False, world, rank)
            want = run(Encoded(codec), whole, "zipf", rank)
            for n, parameter in whole.named_parameters():
                dist.all_reduce(parameter.grad)
                want[n] = parameter.grad.chunk(world)[rank]
            run(plain, part, "zipf", rank)
            got = run(path, part, "zipf", rank)
            results.append(({k: difference(got[k], want[k]) for k in want}, plain.sent, path.sent))
    return results


def test_a_codec_is_around_dispatch_alone(tmp_path: Path) -> None:
    for results in run_ranks(with_codecs, 4, tmp_path):
        for (errors, plain, coded), row in zip(results, [2 * D, 2 * D, D + 4, D + 4], strict=True):
            assert max(errors.values()) < 2e-6, errors
            for hop in ("inter", "intra"):
                assert coded[hop, "dispatch"] * 4 * D == plain[hop, "dispatch"] * row > 0
            for key in plain.keys() | coded.keys():
                assert key[1] == "dispatch" or coded[key] == plain[key]
