"""The simulated schedule of the fused layer: worked by hand, and never faster than it can be."""

import random
from collections import Counter

import numpy as np
import pytest

from benchmarks.fused_schedule import (
    Layer,
    Machine,
    Task,
    crossed,
    fused,
    lower_bound,
    makespan,
    route,
    run_phases,
    simulate,
    unfused,
    with_shared,
)

SLOW = Machine(workers=1, flops=1.0, copy=np.inf, link=10.0, latency=0.5)


def test_worked_by_hand() -> None:
    """Rank 0 computes 2 s, sends 30 bytes in 3 s, seen 0.5 s later, at 5.5. Rank 1 computes 1 s, waits until then, works 4 s."""
    queues = [[Task("a", 2.0, (), [(1, 30)], [("x", 1)])], [Task("b", 1.0), Task("c", 4.0, [("x", 1)])]]
    spans = {span.task.kind: span for span in simulate(queues, SLOW)}
    assert (spans["a"].begin, spans["a"].end) == (0.0, 5.5)
    assert (spans["c"].taken, spans["c"].begin, spans["c"].end) == (1.0, 5.5, 9.5)


def test_two_senders_share_a_way_in() -> None:
    """20 bytes each to rank 2 at once: the second is in at 4 s. Two tasks of one rank share its way out in the same way."""
    assert makespan(simulate([[Task("a", 0.0, (), [(2, 20)])], [Task("b", 0.0, (), [(2, 20)])], []], SLOW)) == 4.5
    two = Machine(workers=2, flops=1.0, copy=np.inf, link=10.0, latency=0.5)
    ends = [span.end for span in simulate([[Task("a", 0.0, (), [(to, 20)]) for to in (1, 2)], [], []], two)]
    assert ends == [2.5, 4.5]


def test_a_cycle_is_told() -> None:
    queues = [[Task("a", 0.0, [("y", 1)], (), [("x", 1)])], [Task("b", 0.0, [("x", 1)], (), [("y", 1)])]]
    with pytest.raises(ValueError, match="2 tasks wait forever"):
        simulate(queues, SLOW)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_work_is_conserved_and_bounds_hold(seed: int, backward: bool) -> None:
    r = random.Random(seed)
    ranks = r.choice([2, 3, 4])
    layer = Layer(64, 32, 4 * ranks, 2, m=8, n=16, wave=r.choice([1, 3, 32]), once=r.random() < 0.5, keep=seed % 4 == 1)
    chosen = route(layer, ranks, r.choice([1, 17, 40]), r.choice([0.0, 1.0, np.inf]), seed)
    machine = Machine(r.choice([1, 2, 7]), 1e9, 1e8, r.choice([1e6, 1e9]), r.choice([0.0, 1e-5]))
    queues = fused(layer, chosen, machine, backward)
    spans = simulate(queues, machine)
    assert Counter(id(s.task) for s in spans) == Counter(id(task) for queue in queues for task in queue)
    assert makespan(spans) >= lower_bound(queues, machine) * (1 - 1e-9)
    ended: dict[object, list[tuple[float, int]]] = {}
    for span in spans:
        assert span.taken <= span.begin and span.end >= span.begin + span.task.seconds
        for counter, amount in span.task.signals:
            ended.setdefault(counter, []).append((span.end, amount))
    for span in spans:  # nothing begins before what it needs was signalled, and no way is shorter
        for counter, amount in span.task.needs:
            assert sum(a for end, a in ended[counter] if end <= span.begin) >= amount
    for rank in range(ranks):
        for worker in range(machine.workers):
            mine = sorted((s.taken, s.end) for s in spans if (s.rank, s.worker) == (rank, worker))
            assert all(end <= taken for (_, end), (taken, _) in zip(mine, mine[1:], strict=False))
    # Both sides multiply the same tiles.
    peer = run_phases(unfused(layer, chosen, machine, backward), machine)
    for kind in ("up", "down", "weight"):
        assert sum(s.task.kind == kind for s in peer) == sum(s.task.kind == kind for s in spans)
        assert any(s.task.kind == kind for s in spans) == (kind != "weight" or backward)


def test_bytes_of_backward() -> None:
    """dO and X go out, or dO alone where rows were kept; dX comes back as Y did."""
    machine = Machine(2, 1e9, 1e8, 1e6, 0.0)
    chosen = route(Layer(64, 32, 8, 2), 4, 20, 0.0)
    away = sum(int((chosen[w] // 2 != w).sum()) for w in range(4)) * 64 * 2  # bytes of rows that leave their rank
    for keep, copies in ((False, 2), (True, 1)):
        layer = Layer(64, 32, 8, 2, once=False, keep=keep)
        assert crossed(fused(layer, chosen, machine, True)) == pytest.approx((copies + 1) * away)


def test_a_shared_expert_stays_on_its_rank() -> None:
    layer = Layer(64, 32, 8, 2, m=8, n=16)
    chosen = route(layer, 4, 20, 1.0)
    more, slots = with_shared(layer, chosen, 3)
    assert (more.n_experts, more.top_k, slots.shape) == (8 + 4 * 3, 5, (4, 20, 5))
    own = slots // 5 == np.arange(4)[:, None, None]
    assert ((slots % 5 < 3).sum(axis=2) == 3).all() and (own | (slots % 5 >= 3)).all()
    routed = slots[slots % 5 >= 3].reshape(4, 20, 2)
    assert (routed // 5 * 2 + routed % 5 - 3 == chosen).all()  # both in order of experts
    machine = Machine(2, 1e9, 1e8, 1e6, 0.0)
    counts = 4 * 3 * 4.0 * 12  # of 12 more experts, from each of 4 ranks to 3 others
    for backward in (False, True):
        beside, inside = fused(layer, chosen, machine, backward), fused(more, slots, machine, backward)
        assert crossed(inside) == pytest.approx(crossed(beside) + (0 if backward else counts))
        tiles = [sum(task.kind == "up" for queue in queues for task in queue) for queues in (beside, inside)]
        assert tiles[1] - tiles[0] == 4 * 3 * 3 * (
            2 if backward else 4
        )  # 20 tokens are 3 tiles of rows, F is 2 or 4 of columns
