"""What a traced step says of its collectives: bytes against shapes, in every layout; who waited; nothing left behind."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from moesaic.launch.schema import Config
from moesaic.moe.model import Transformer
from moesaic.parallel import collectives, trace
from moesaic.parallel.apply import parallelize, start_engine, total
from moesaic.parallel.collectives import (
    ACTS,
    BOTH,
    REST,
    Recorder,
    attribute,
    bus_factor,
    exchange,
    recording,
    rows,
    traffic,
)
from moesaic.parallel.engine import Engine
from moesaic.parallel.mesh import make_meshes
from tests.parallel.cells import LAYOUTS, Cell, Layout
from tests.parallel.pool import Pool

pytestmark = pytest.mark.xdist_group("collectives")
pools: dict[int, Pool] = {}
COUNTED = {*ACTS, "flags"} - {"weights", "gradients"}  # by the expert paths themselves


@pytest.fixture(scope="module", autouse=True)
def ends() -> Iterator[None]:
    yield
    for pool in pools.values():
        pool.close()
    pools.clear()


def on_ranks(world: int, function: Any, *arguments: Any) -> list[Any]:
    if world not in pools:
        pools[world] = Pool(world)
    return pools[world].run(function, *arguments)


def started(config: Config) -> Engine:
    trace.observe()
    meshes = make_meshes("cpu", int(config.parallel.expert), config.parallel.replicate)
    model = parallelize(
        config.model, config.parallel, meshes, seed=0, device=torch.device("cpu"), compute=torch.float32
    )
    return start_engine(config.parallel, model, torch.optim.AdamW(model.parameters()))


def step(engine: Engine, config: Config, seed: int) -> None:
    torch.manual_seed(100 * seed + dist.get_rank())
    tokens = torch.randint(0, 61, (config.train.micro_batch, config.train.seq_len + 1))
    loss = engine.model(tokens[:, :-1], tokens[:, 1:]).loss
    engine.backward(loss, last=True)
    engine.step(1.0)


def traced(config: Config, prefetch: bool = True) -> tuple[list[dict[str, Any]], dict[Any, int], dict[str, int]]:
    """Rows of this rank's second step, what the expert paths counted of it, and what the recorder added up."""
    engine = started(config)
    model = getattr(engine, "module", engine.model)
    for module in model.modules():
        if isinstance(module, FSDPModule) and not prefetch:
            module.set_modules_to_forward_prefetch([])
            module.set_modules_to_backward_prefetch([])
    step(engine, config, 0)
    paths = [layer.path for layer in model.moe_layers()]
    for path in paths:
        if hasattr(path, "sent"):
            path.sent.clear()
    node = config.parallel.node_size
    recorder = Recorder(4 if node == "auto" else int(node))
    before = dist.Work.wait, engine.backward, len(model._forward_hooks), dict(vars(engine))
    with recording(recorder, engine):
        step(engine, config, 1)
    count = len(recorder.events)
    after = dist.Work.wait, engine.backward, len(model._forward_hooks), dict(vars(engine))
    assert before == after, "nothing of it is left"
    total(torch.ones(1))
    assert len(recorder.events) == count and recorder.unseen == {}
    exchange(recorder.events, recorder.groups, 0.0, torch.device("cpu"))
    sent = {
        (f"blocks.{i}", hop, phase): n
        for i, path in enumerate(paths)
        for (hop, phase), n in getattr(path, "sent", {}).items()
    }
    return rows(recorder.events, 2, dist.get_rank(), {}), sent, dict(recorder.sent)


def shards(shape: torch.Size, n: int, dim: int = 0) -> int:
    """Values that each of n ranks holds of a parameter that FSDP2 divides, padded."""
    return math.ceil(shape[dim] / n) * math.prod(shape) // shape[dim]


def groups_of_fsdp(config: Config, layout: Layout) -> dict[str, tuple[int, int, int]]:
    """Of each group of parameters: (values that a rank holds, ranks that divide them, copies)."""
    with torch.device("meta"):
        model = Transformer(config.model)
    shard, copies = layout.world // config.parallel.replicate, config.parallel.replicate
    expert_copies = math.gcd(copies, layout.world // layout.expert)
    expert_shard = layout.world // layout.expert // expert_copies
    found: Counter[str] = Counter()
    for name, p in model.named_parameters():
        if config.model.tie_embeddings and name == "head.weight":
            continue
        if ".experts." in name:
            local = torch.Size([p.shape[0] // layout.expert, *p.shape[1:]])
            dim = next((d for d, size in enumerate(local) if size % expert_shard == 0), 0)
            found[".".join(name.split(".")[:4])] += shards(local, expert_shard, dim)
        elif config.parallel.engine == "fsdp":
            found[".".join(name.split(".")[:2]) if name.startswith("blocks") else REST] += shards(p.shape, shard)
    return {
        name: (values, *((expert_shard, expert_copies) if "experts" in name else (shard, copies)))
        for name, values in found.items()
    }


def predicted(config: Config, layout: Layout, rank: int) -> Counter[tuple[str, str]]:
    """Bytes that FSDP2 and ZeRO make this rank send, by (layer, weights or gradients or optimizer)."""
    sent: Counter[tuple[str, str]] = Counter()
    for name, (values, n, copies) in groups_of_fsdp(config, layout).items():
        layer = name if name == REST else ".".join(name.split(".")[:2])
        kept = name == REST or (config.parallel.engine == "deepspeed" and config.parallel.zero_stage != 3)
        sent[layer, "weights"] += 4 * values * (n - 1) * (1 if kept else 2)
        sent[layer, "gradients"] += 4 * values * (n - 1)
        if copies > 1:
            each, more = divmod(values, copies)
            own = rank // (layout.world // copies) if "experts" not in name else _copy(rank, layout, n, copies)
            parts = [each + (i < more) for i in range(copies)]
            sent[layer, "gradients"] += 4 * sum(parts[p] + parts[own] for p in range(copies) if p != own)
    if config.parallel.engine == "deepspeed":
        with torch.device("meta"):
            sizes = [p.numel() for name, p in Transformer(config.model).named_parameters() if ".experts." not in name]
        n, stage, everything = layout.world, config.parallel.zero_stage, "blocks.0 to blocks.1 and the rest"
        if stage == 3:
            share = sum(math.ceil(s / n) for s in sizes)
            sent["in all", "weights"] += 4 * share * (n - 1)
            sent[everything, "gradients"] += 4 * share * (n - 1)
        else:
            each, more = divmod(sum(sizes), n)
            parts = [each + (i < more) for i in range(n)]
            sent[everything, "gradients"] += 4 * sum(parts[p] + parts[rank] for p in range(n) if p != rank)
    return Counter({k: v for k, v in sent.items() if v})


def _copy(rank: int, layout: Layout, n: int, copies: int) -> int:
    return rank // (layout.expert * n) % copies


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.world > 1], ids=str)
def test_bytes_are_those_of_the_shapes(layout: Layout) -> None:
    config = Cell(layout).config()
    answers = on_ranks(layout.world, traced, config)
    pairs: Counter[str] = Counter()
    for rank, (found, counted, added) in enumerate(answers):
        for hop in ("intra", "inter"):
            assert sum(row[f"sent_{hop}_bytes"] for row in found) == added.get(hop, 0), "the sum of layers is the total"
        exchanged = {
            (row["layer"], hop, row["purpose"]): row[f"sent_{hop}_bytes"]
            for row in found
            for hop in ("intra", "inter")
            if row["purpose"] in COUNTED and row[f"sent_{hop}_bytes"]
        }
        if "two_hop" not in str(layout.knobs):
            assert exchanged == {k: v for k, v in counted.items() if v}
        else:  # a row of the report joins the two legs' groups where hop and purpose agree
            assert sum(exchanged.values()) > 0
            sums: Counter[Any] = Counter()
            for row in found:
                for hop in ("intra", "inter"):
                    if row["purpose"] in COUNTED:
                        sums[row["layer"], hop, row["purpose"]] += row[f"sent_{hop}_bytes"]
            assert {k: v for k, v in sums.items() if v} == {k: v for k, v in counted.items() if v}
        weights: Counter[tuple[str, str]] = Counter()
        for row in found:
            if row["purpose"] in ("weights", "gradients"):
                dense_of_zero3 = (
                    config.parallel.zero_stage == 3 and row["purpose"] == "weights" and "ffn" not in row["module"]
                )
                layer = "in all" if dense_of_zero3 else row["layer"]
                weights[layer, row["purpose"]] += row["sent_intra_bytes"] + row["sent_inter_bytes"]
        assert Counter({k: v for k, v in weights.items() if v}) == predicted(config, layout, rank)
        for row in found:
            pairs["sent"] += row["sent_intra_bytes"] + row["sent_inter_bytes"]
            pairs["received"] += row["received_intra_bytes"] + row["received_inter_bytes"]
            assert row["wait_ms"] <= row["time_ms"] and row["phase"] in ("forward", "backward", "optimizer", BOTH)
    assert pairs["sent"] == pairs["received"] > 0


@pytest.mark.parametrize("remat", ["none", "full"])
def test_what_is_fetched_ahead_belongs_to_its_own_layer(remat: str) -> None:
    layout = next(x for x in LAYOUTS if x.name == "EP 2 x FSDP 2")
    config = Cell(layout, remat=remat).config()
    plain, ahead = (on_ranks(4, traced, config, prefetch)[0][0] for prefetch in (False, True))

    def order(found: list[dict[str, Any]]) -> bool:
        """Whether the second block's experts are fetched before the first one's tokens leave."""
        named = [(r["layer"], r["module"], r["purpose"]) for r in found]
        return named.index(("blocks.1", "ffn.experts", "weights")) < named.index(("blocks.0", "ffn", "dispatch"))

    def gathered(found: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        return [
            (r["layer"], r["module"], r["phase"], r["calls"], r["sent_intra_bytes"])
            for r in found
            if r["purpose"] == "weights"
        ]

    assert sorted(gathered(plain)) == sorted(gathered(ahead)), "the same bytes of the same layers"
    assert order(ahead) and not order(plain), "but earlier"
    assert {(r["layer"], r["module"]) for r in plain if r["purpose"] == "dispatch"} == {
        ("blocks.0", "ffn"),
        ("blocks.1", "ffn"),
    }


def late() -> tuple[float, int | None]:
    trace.observe()
    recorder = Recorder(4)
    dist.barrier()
    trace.record_with(recorder)
    if dist.get_rank() == 1:
        time.sleep(0.4)
    dist.all_reduce(torch.ones(3))
    work = dist.all_reduce(torch.ones(3), async_op=True)
    time.sleep(0.2)
    work.wait()
    trace.record_with(None)
    exchange(recorder.events, recorder.groups, collectives.clock_offset(), torch.device("cpu"))
    first, second = recorder.events
    assert second.time < 0.15 and second.exposed == 0.0, "done while this rank slept; nobody looked"
    return first.wait, first.behind


def test_the_late_rank_is_named() -> None:
    (waited, whom), (own, itself) = on_ranks(2, late)
    assert whom == itself == 1 and waited > 0.3 and own == 0


# ---------------------------------------------------------------- arithmetic, without ranks


def arguments(operation: str, rank: int, n: int) -> dict[str, Any]:
    """What rank of n would call, with 7 numbers of fp32, or uneven parts where there may be such."""
    own, whole = torch.zeros(7), [torch.zeros(3 + p) for p in range(n)]
    return {
        "all_gather_single": {"input": own, "output": torch.zeros(7 * n)},
        "all_gather": {"tensor": torch.zeros(3 + rank), "tensor_list": whole},
        "reduce_scatter_single": {"input": torch.zeros(7 * n), "output": own},
        "reduce_scatter": {"input_list": whole, "output": torch.zeros(3 + rank)},
        "all_reduce": {"tensor": own},
        "all_to_all_single": {"input": torch.zeros(n * (rank + 1), 2), "output": torch.zeros(n * (n + 1) // 2, 2),
                              "input_split_sizes": [rank + 1] * n, "output_split_sizes": list(range(1, n + 1))},
        "all_to_all": {"input_tensor_list": [torch.zeros(5 * rank + p) for p in range(n)],
                       "output_tensor_list": [torch.zeros(5 * p + rank) for p in range(n)]},
        "broadcast": {"tensor": own, "src": 5}, "reduce": {"tensor": own, "dst": 5},
        "scatter": {"tensor": own, "src": 5, "scatter_list": [own] * n if rank == 1 else None},
        "gather": {"tensor": own, "group_dst": 1, "gather_list": [own] * n if rank == 1 else None},
        "barrier": {},
    }[operation]  # fmt: skip


@pytest.mark.parametrize("operation", ["all_gather_single", "all_gather", "reduce_scatter_single", "reduce_scatter",
                                       "all_reduce", "all_to_all_single", "all_to_all", "broadcast", "reduce", "scatter",
                                       "gather", "barrier"])  # fmt: skip
def test_what_one_sends_the_other_receives(operation: str) -> None:
    ranks = [3, 5, 8]
    found = [traffic(operation, arguments(operation, w, 3), w, ranks) for w in range(3)]
    moved = [(out, back) for _, out, back in filter(None, found)]
    assert len(moved) == 3
    for a in range(3):
        for b in range(3):
            assert moved[a][0][b] == moved[b][1][a], (a, b)
    across = sum(moved[a][0][b] for a in range(3) for b in range(3) if a != b)
    expected = {"all_gather_single": 168, "reduce_scatter_single": 168, "all_reduce": 112, "broadcast": 56, "reduce": 56,
                "scatter": 56, "gather": 56, "barrier": 0, "all_gather": 96, "reduce_scatter": 96,
                "all_to_all_single": 96, "all_to_all": 4 * 36}  # fmt: skip
    assert across == expected[operation]
    assert traffic("all_gather_object", {}, 0, ranks) is None


def test_a_purpose_is_a_layer_a_module_and_an_act() -> None:
    assert attribute("blocks.3.ffn dispatch", "") == ("blocks.3", "ffn", "dispatch")
    assert attribute("blocks.12 weights", "blocks.11.attention") == ("blocks.12", "", "weights")
    assert attribute("the rest gradients", "") == (REST, "", "gradients")
    assert attribute("total in parallel/apply.py:95", "blocks.1.ffn") == (
        "blocks.1",
        "ffn",
        "total in parallel/apply.py:95",
    )
    assert attribute("norm in parallel/clip.py:40", "")[0] == collectives.LOOP
    assert attribute("blocks.0 to blocks.4 and the rest gradients", "")[0] == "blocks.0 to blocks.4 and the rest"
    assert (bus_factor("all_reduce", 4), bus_factor("all_gather_single", 4), bus_factor("broadcast", 4)) == (
        1.5,
        0.75,
        1,
    )
