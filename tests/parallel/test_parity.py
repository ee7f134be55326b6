"""The parity matrix, its fast part: every layout computes what one process computes, bit for bit the same every time.

`make parity` runs all of it and writes docs/parity.md. tests.parallel.cells says what the cells are, tests.parallel.parity what
is compared.
"""

import itertools
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, assume, given, settings

from moesaic.launch.train import train_step
from moesaic.parallel.apply import total
from moesaic.parallel.cast import CastLinear
from tests.parallel.cells import (
    AXES,
    LAYOUTS,
    REFUSED,
    WORKLOADS,
    Cell,
    Layout,
    all_pairs,
    drawn_cells,
    full_table,
    impossible,
    pairwise_table,
    refused,
)
from tests.parallel.mutations import MUTATIONS
from tests.parallel.parity import CPU, Routes, Samples, Unfit, make_engine, pools, reference, run_cell, whole
from tests.parallel.pool import Pool, RanksFailed

pytestmark = pytest.mark.xdist_group("parity")  # one process of pytest, so that ranks start once
BY_NAME = {layout.name: layout for layout in LAYOUTS}


@pytest.fixture(scope="module")
def pool() -> Iterator[Callable[[int], Pool]]:
    with pools() as pool:
        yield pool


# ---------------------------------------------------------------- the matrix


def fast_cells() -> list[Cell]:
    """Every layout, every workload, and every value of the other axes once or more."""
    table = {(cell.layout.name, cell.workload): cell for cell in full_table()}
    cells = []
    for i, layout in enumerate(LAYOUTS):
        turns = [WORKLOADS[(i + k) % len(WORKLOADS)] for k in range(len(WORKLOADS))]
        cells.append(next(table[layout.name, w] for w in turns if (layout.name, w) in table))
    missing, pairs = {(name, value) for name, values in AXES.items() for value in values[1:]}, pairwise_table()
    while missing:
        new = max(pairs, key=lambda cell: sum((n, getattr(cell, n)) in missing for n in AXES))
        missing -= {(name, getattr(new, name)) for name in AXES}
        cells.append(new)
    return sorted(cells, key=lambda cell: cell.layout.world)


@pytest.mark.parametrize("cell", fast_cells(), ids=str)
def test_equal_to_one_process(cell: Cell, pool: Callable[[int], Pool]) -> None:
    outcome = run_cell(pool(cell.layout.world), cell)
    assert outcome.status == "green", outcome.reason


def check_drawn(cell: Cell, pool: Callable[[int], Pool]) -> None:
    try:
        outcome = run_cell(pool(cell.layout.world), cell)
    except Unfit:
        assume(False)
    assert outcome.status == "green", (outcome.cell, outcome.reason)


# A cell that fails is printed in full: looking for a smaller one would take minutes.
@settings(max_examples=5, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(cell=drawn_cells())
def test_configurations_nobody_listed(cell: Cell, pool: Callable[[int], Pool]) -> None:
    check_drawn(cell, pool)


@pytest.mark.parametrize("layout", REFUSED, ids=lambda layout: layout.name)
def test_a_refusal_is_not_green(layout: Layout, pool: Callable[[int], Pool]) -> None:
    outcome = run_cell(pool(layout.world), Cell(layout))
    assert outcome.status == "refused"
    assert re.fullmatch(r"parallel\.[a-z_]+=\S+: .+", outcome.reason)


# ---------------------------------------------------------------- another precision


def in_bf16(cell: Cell) -> dict[str, Any]:
    """A step with products in bf16, and the types of what is kept, of what computes and of the rotary tables."""
    config = cell.config()
    model, engine = make_engine(cell, config, torch.bfloat16)
    routes, seen = (
        Routes(model),
        {"products": set[torch.dtype](), "tables": set[torch.dtype](), "scores": set[torch.dtype]()},
    )
    block: Any = model.blocks[0]
    block.attention.register_forward_pre_hook(lambda _, inputs: seen["tables"].update(t.dtype for t in inputs[1:3]))
    block.attention.wqkv.register_forward_hook(lambda _, inputs, output: seen["products"].add(output.dtype))
    block.ffn.router.register_forward_hook(lambda m, *_: seen["scores"].update(p.dtype for p in m.parameters()))
    stream: Any = Samples(config.train.seq_len, config.model.vocab_size)
    with warnings.catch_warnings(record=True) as told:
        run: dict[str, Any] = {"loss": total(train_step(engine, stream, config.train, 0, CPU, None)[0])}
    assert not [w for w in told if "FSDP" in str(w.message)]  # no run begins with a page of warnings
    kept = [*engine.gradients().values(), *engine.weights().values()]
    run["gradients"] = whole(engine.gradients())
    run["norm"] = engine.step(config.optim.clip)
    kept += engine.moments().values()
    run |= {"moments": whole(engine.moments()), "weights": whole(engine.weights()), "routes": routes.passes}
    return run | {"seen": seen | {"kept": {t.dtype for t in kept}}}


BF16 = ("EP 2", *(f"ZeRO-{stage}, EP 2" for stage in range(4)))


def test_bf16_products_with_fp32_weights(pool: Callable[[int], Pool]) -> None:
    """What CUDA runs by default: products in bf16, all that is kept or summed in fp32; with DeepSpeed as with FSDP2."""
    cells = [
        Cell(BY_NAME[name], accumulation=2, remat=remat)
        for name, remat in zip(BF16, ("none", *4 * ["selective"]), strict=True)
    ]
    want = reference(cells[0].reference())
    fsdp, *others = [pool(2).run(in_bf16, cell) for cell in cells]
    for run in fsdp:
        assert abs(run["loss"] / want["losses"][0] - 1) < 0.01
        for name, value in want["gradients"].items():
            error = (run["gradients"][name] - value).norm() / value.norm()
            # One flipped top-K choice among 96 tokens moves a gradient this much; a wrong scale would be 1.
            assert 1e-6 < error < 0.2, (name, error)
    full, half = {torch.float32}, {torch.bfloat16}
    for run in [*fsdp, *(run for ranks in others for run in ranks)]:
        # Angles of far positions need fp32, and so do scores.
        assert run["seen"] == {"kept": full, "tables": full, "scores": full, "products": half}
        for name, value in run[
            "gradients"
        ].items():  # a sum of micro-batches and ranks that was rounded to bf16 would stay itself
            assert not torch.equal(value, value.bfloat16().float()), name
    for run, alike in ((run, alike) for ranks in others for run, alike in zip(ranks, fsdp, strict=True)):
        assert all(
            torch.equal(a, b)
            for x, y in zip(run["routes"], alike["routes"], strict=True)
            for a, b in zip(x, y, strict=True)
        )
        assert abs(run["loss"] / alike["loss"] - 1) < 1e-5
        assert abs(run["norm"] / alike["norm"] - 1) < 1e-5
        for kind, name in ((k, name) for k in ("gradients", "moments", "weights") for name in alike[k]):
            error = (run[kind][name] - alike[kind][name]).norm() / alike[kind][name].norm()
            assert error < 1e-5, (kind, name, error)  # a router in bf16 makes 5e-3


def test_a_cast_weight_is_not_kept() -> None:
    """ZeRO-3 divides weights until backward: copies of them in bf16 that autograd holds would take half of that back."""
    x, w = torch.randn(2, 3, 8).bfloat16().requires_grad_(), torch.randn(5, 8).requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = CastLinear.apply(x, w)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), w.data_ptr()}
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, w], dy)
    want = torch.autograd.grad(torch.nn.functional.linear(x, w.bfloat16()), [x, w], dy)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs)


# ---------------------------------------------------------------- the matrix notices


def mutated_cell(mutation: str) -> Cell:
    _, layout, axes = MUTATIONS[mutation]
    return Cell(BY_NAME[layout], **axes)  # type: ignore[arg-type]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_turns_it_red(mutation: str, pool: Callable[[int], Pool]) -> None:
    cell = mutated_cell(mutation)
    outcome = run_cell(pool(cell.layout.world), cell, mutation=mutation)
    assert outcome.status == "red"
    if mutation.startswith("combine_in_any_order"):  # which no tolerance sees
        assert outcome.reason == "the same seed twice: other bits"
        assert outcome.error < 1e-5
    else:
        assert "differs: " in outcome.reason


@pytest.mark.parametrize("cell", dict.fromkeys(map(mutated_cell, MUTATIONS)), ids=str)
def test_without_a_mistake_it_is_green(cell: Cell, pool: Callable[[int], Pool]) -> None:
    outcome = run_cell(pool(cell.layout.world), cell)
    assert outcome.status == "green", outcome.reason


def test_two_hops_give_the_bits_of_one(pool: Callable[[int], Pool]) -> None:
    """Where the ranks of a group are in two nodes, the way through a rank of the other node changes no bit of three steps."""
    two = BY_NAME["EP 4 in two hops, 2 experts a rank"]
    one = replace(two, knobs=tuple((dict(two.knobs) | {"expert_path": "all_to_all"}).items()))
    digests = {run_cell(pool(4), Cell(layout, model="top 4"), times=1).digest for layout in (one, two)}
    assert len(digests) == 1 and "" not in digests


# ---------------------------------------------------------------- the table of cells


def test_every_pair_is_covered() -> None:
    """Layouts meet all workloads, and every pair of two axes' values stands in some cell, or is said to be impossible."""
    cells = full_table() + pairwise_table()
    axes: dict[str, Any] = {"layout": LAYOUTS, "workload": WORKLOADS} | AXES
    for a, b in itertools.combinations(axes, 2):
        seen = {(getattr(cell, a), getattr(cell, b)) for cell in cells}
        for pair in itertools.product(axes[a], axes[b]):
            assert (pair in seen) != bool(impossible({a: pair[0], b: pair[1]})), (a, b, pair)
    assert not any(impossible(vars(cell)) for cell in cells)


def test_pairs_by_hand() -> None:
    """Two values each of three axes: four rows hold all twelve pairs, and one that is given leaves three to be made."""
    axes = {"x": (0, 1), "y": (0, 1), "z": (0, 1)}
    rows = list(all_pairs(axes, lambda row: False, [dict(x=0, y=0, z=0)]))
    assert rows == [dict(x=0, y=1, z=1), dict(x=1, y=0, z=1), dict(x=1, y=1, z=0)]
    without = list(all_pairs(axes, lambda row: row.get("x") == 1 and row.get("y") == 1, []))
    assert len(without) <= 5 and {(row["x"], row["y"]) for row in without} == {(0, 0), (0, 1), (1, 0)}


def test_what_is_left_out_is_refused() -> None:
    """A combination that the table leaves out for a knob's rule raises that rule's ValueError."""
    axes: dict[str, Any] = {"layout": LAYOUTS, "workload": WORKLOADS} | AXES
    found = 0
    for a, b in itertools.combinations(axes, 2):
        for pair in itertools.product(axes[a], axes[b]):
            values = {a: pair[0], b: pair[1]}
            if refused(values):
                found += 1
                with pytest.raises(ValueError, match=r"^(model|parallel)\.[a-z._]+=[^\n]*$"):
                    Cell(**({"layout": BY_NAME["FSDP 2"]} | values)).config()
    assert found > 10


# ---------------------------------------------------------------- the pool


def rank_and(word: str) -> str:
    return f"{dist.get_rank()} {word}"


def process_id() -> int:
    return os.getpid()


def raise_on_all() -> None:
    raise ValueError("model.x=1: must be 2")


def raise_on_one() -> None:
    """The others wait in a collective."""
    if dist.get_rank() == 1:
        raise KeyError("lost")
    dist.all_reduce(torch.ones(()))


def die() -> None:
    if dist.get_rank() == 1:
        print("last words", flush=True)
        os._exit(3)


def hang() -> None:
    time.sleep(1000)


def test_pool_survives() -> None:
    """An exception everywhere leaves the ranks as they are; what tears the group apart brings new ones."""
    with Pool(2, patience=2) as pool:
        assert pool.run(rank_and, "here") == ["0 here", "1 here"]
        first = pool.run(process_id)
        with pytest.raises(RanksFailed, match=r"model\.x=1: must be 2") as failure:
            pool.run(raise_on_all)
        assert failure.value.refusal() == "model.x=1: must be 2"
        assert pool.run(process_id) == first

        with pytest.raises(RanksFailed, match=r"KeyError: 'lost'") as failure:
            pool.run(raise_on_one)
        assert failure.value.refusal() is None and list(failure.value.lost) == [0]
        second = pool.run(process_id)
        assert not set(first) & set(second)

        with pytest.raises(RanksFailed, match="rank 1 died\nlast words"):
            pool.run(die)
        with pytest.raises(RanksFailed, match="rank 0 took too long"):
            pool.run(hang, timeout=1)
        third = pool.run(process_id)
        assert not set(second) & set(third)
    for process in first + second + third:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_ranks_end_with_the_process_that_started_them(tmp_path: Any) -> None:
    """Killed, it can't stop them; they are in the middle of a job that never ends."""
    program = (
        "import time\n"
        "from tests.parallel import test_parity\n"
        "from tests.parallel.pool import Pool\n"
        "pool = Pool(2)\n"
        "print(*pool.run(test_parity.process_id), flush=True)\n"
        "pool.send(test_parity.hang)\n"
        "time.sleep(1000)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    starter = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert starter.stdout
    ranks = [int(word) for word in starter.stdout.readline().split()]
    starter.kill()
    starter.communicate()
    assert len(ranks) == 2
    end = time.monotonic() + 20
    while any(map(alive, ranks)):
        assert time.monotonic() < end, "ranks live on"
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
