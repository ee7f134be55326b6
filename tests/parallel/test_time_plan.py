"""The simulated time of a step: worked examples, and what must hold whatever the constants are."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.kernels.products import by_onednn
from moesaic.launch import cli
from moesaic.moe.model import Transformer, initialize
from moesaic.moe.work import Product
from moesaic.parallel import hardware
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.hardware import Link
from moesaic.parallel.layout import Collective, collectives, layout_of
from moesaic.parallel.memory_plan import memory_of
from moesaic.parallel.plan_search import divisors, largest_batch, reasons, search, with_batch
from moesaic.parallel.time_plan import (
    MEMORY,
    PRODUCT,
    SENDING,
    Pipeline,
    collective_seconds,
    launches,
    product_seconds,
    seconds_by_kind,
    time_of,
)

H100 = hardware.load("h100_sxm")


def layout(*overrides, world=64, micro=2, batches=4):
    config = cli.compose(["recipe=7b_moe", *overrides])
    return config.model, layout_of(config.model, config.parallel, world, 8, micro, batches, 4096, "bf16")


def collective(operation, ranks, stride, size):
    return Collective(0, "forward", "", operation, ranks, stride, size)


def test_collectives_of_fsdp_and_sums_have_links_of_their_own():
    """4 ranks, 4 MB: 3 of 4 go over 1 GB/s after two calls of 500 us, twice for a sum, over 2 GB/s after 30 us each."""
    cpu = dataclasses.replace(hardware.load("cpu"), gathers=Link(1, 500), sums=Link(2, 30))
    took = {name: collective_seconds(collective(name, 4, 1, 4e6), cpu)
            for name in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")}  # fmt: skip
    assert took["all_gather"] == took["reduce_scatter"] == pytest.approx(2 * 500e-6 + 3e6 / 1e9)
    assert took["all_reduce"] == pytest.approx(2 * (2 * 30e-6 + 3e6 / 2e9))
    assert took["all_to_all"] == collective_seconds(collective("all_to_all", 4, 1, 4e6), hardware.load("cpu"))


def test_nothing_hides_sums_over_copies_on_a_cpu():
    config = cli.compose(["recipe=tiny_moe", "parallel.expert=1", "parallel.replicate=2"])
    cpu = dataclasses.replace(hardware.load("cpu"), sums=Link(1, 0))
    copies = layout_of(config.model, config.parallel, 2, 2, 4, 1, 256, "fp32")
    sent = sum(c.sent for c in collectives(config.model, copies) if c.operation == "all_reduce")
    parts = time_of(config.model, copies, cpu, "fp32").parts
    assert parts["step", "optimizer", "exposed sums over copies"] == pytest.approx(sent / 1e9) and sent > 0


class Operations(TorchDispatchMode):
    """Counts those that are no views."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += not function.is_view and function.__name__ not in ("_unsafe_view.default", "detach.default")
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not by_onednn(), reason="elsewhere the heads of all sequences are one product")
@pytest.mark.parametrize(("sequences", "length"), [(1, 256), (4, 256), (4, 64)])
def test_operations_of_a_block_on_a_cpu(sequences, length):
    """Counted of the real model: two layers more."""
    counted = {"forward": 0, "backward": 0}
    for layers, sign in ((3, 1), (1, -1)):
        config = cli.compose(["recipe=tiny_moe", f"model.n_layers={layers}"])
        model, tokens = Transformer(config.model), torch.zeros(sequences, length, dtype=torch.int64)
        initialize(model, "", config.model, 0, torch.device("cpu"))
        with Operations() as forward:
            out = model(tokens, tokens)
        with Operations() as backward:
            (out.loss + out.aux).backward()
        counted["forward"] += sign * forward.n / 2
        counted["backward"] += sign * backward.n / 2
    local = layout_of(config.model, ParallelConfig(expert_path="local"), 1, 1, sequences, 1, length, "fp32")
    planned = {phase: launches(config.model, local, phase, cpu=True) for phase in counted}
    assert planned == pytest.approx(counted, rel=0.1)


def test_volume_of_deepseek_v3():
    """arXiv 2505.09343: 32 tokens of about 7,000 values go to 9 experts in FP8 and come back in BF16, over 50 GB/s:
    120.96 us; over 900 GB/s 6.72 us."""
    size = (1 + 2) * 32 * 9 * 7000
    assert Link(50, 0).seconds(size) == pytest.approx(120.96e-6)
    assert Link(900, 0).seconds(size) == pytest.approx(6.72e-6)
    # The same two exchanges by the planner, among 9 hosts of one device each, to each of which the token goes.
    alone = dataclasses.replace(H100, node=1, domain=1, hops={"intra": Link(450, 0), "inter": Link(50, 0)})
    there, back = (collective("all_to_all", 9, 1, 9 * 32 * 7000 * width) for width in (1, 2))
    sent = collective_seconds(there, alone) + collective_seconds(back, alone)
    assert sent == pytest.approx(120.96e-6 * 8 / 9)  # the ninth is at home


@pytest.mark.parametrize(
    ("operation", "ranks", "stride", "seconds"),
    [
        # 8 MB among 8 neighbours: 7/8 of it at 360 GB/s, and 3 latencies.
        ("all_gather", 8, 1, 7e6 / 360e9 + 3 * 3.33e-6),
        ("all_reduce", 8, 1, 2 * (7e6 / 360e9 + 3 * 3.33e-6)),
        # 8 ranks, each in a node of its own: 7/8 at 40 GB/s.
        ("reduce_scatter", 8, 8, 7e6 / 40e9 + 3 * 3.7e-6),
        # 16 neighbours in two nodes: half of it enters each node through 8 links; inside, 15/16 pass each rank.
        ("all_gather", 16, 1, 7.5e6 / 360e9 + 3 * 3.33e-6 + 3.7e-6),
        # Rows for the 8 ranks of the other node leave by the own link.
        ("all_to_all", 16, 1, 4e6 / 40e9 + 3 * 3.33e-6 + 3.7e-6),
    ],
)
def test_collectives_by_hand(operation, ranks, stride, seconds):
    assert collective_seconds(collective(operation, ranks, stride, 8_000_000), H100) == pytest.approx(seconds)


def test_a_product_is_padded_to_tiles_and_waves():
    rate = H100.rate("bf16") * PRODUCT["bf16"]
    tile = 2 * 128 * 128 * 8192
    assert product_seconds(Product("", 128, 128 * 132, 8192), H100, "bf16", 2) == pytest.approx(
        max(132 * tile / rate, 2 * (128 * 8192 + 132 * 128 * 8192 + 128 * 128 * 132) / (H100.bandwidth * MEMORY))
    )
    big = Product("", 128 * 132, 128 * 132, 8192)
    assert product_seconds(big, H100, "bf16", 2) == pytest.approx(132 * 132 * tile / rate)
    one_more = dataclasses.replace(big, m=128 * 132 + 1)
    assert product_seconds(one_more, H100, "bf16", 2) == pytest.approx(133 * 132 * tile / rate)


def test_rounding_saves_half_a_tile_of_each_expert():
    rows = Product("", 128 * 64 * 8, 2048, 2048, groups=64, kind="grouped")
    ragged, rounded = (product_seconds(rows, H100, "bf16", 2, ragged) for ragged in (True, False))
    assert ragged / rounded == pytest.approx(8.5 / 8, rel=0.02)


def test_what_makes_a_step_longer():
    model, base = layout("parallel.expert=8")
    step = time_of(model, base, H100, "bf16").step
    for change in ({"imbalance": 1.5}, {"remat": "full"}, {"micro_batches": 8}, {"expert": 64}, {"reshard": "always"}):
        assert time_of(model, dataclasses.replace(base, **change), H100, "bf16").step > step, change
    assert time_of(model, base, hardware.load("b200"), "bf16").step < step
    with pytest.raises(ValueError, match="precision=fp4: hardware=h100_sxm has"):
        time_of(model, base, H100, "fp4")


def test_efficiency_is_that_of_computing_alone():
    """Links have one of their own. What a layer's longer work hides of the gathering of weights is not paid again."""
    model, base = layout("parallel.expert=16")
    whole, half = (time_of(model, base, H100, "bf16", efficiency=e) for e in (1.0, 0.5))
    for key, seconds in half.parts.items():
        if not key[2].startswith("exposed") and key[2] != "issuing":
            assert seconds == pytest.approx(2 * whole.parts[key]), key
    key = "MoE layer", "forward", "exposed exchange of rows"
    assert half.parts[key] == pytest.approx(whole.parts[key], rel=0.05) and half.parts[key] <= whole.parts[key]
    assert half.step < 1.99 * whole.step
    assert 0 < half.share("exposed") < whole.share("exposed") < 1


def test_what_travels_while_it_is_hidden_takes_a_part_of_the_device():
    """Without experts' exchanges, with layers long enough to hide all weights: a collective costs SENDING of its time."""
    model, base = layout("parallel.expert=1", micro=8)
    timing = time_of(model, base, H100, "bf16")
    gathered = seconds_by_kind(model, base, H100)[0][False, "forward"][0]
    exposed = timing.parts["MoE layer", "forward", "exposed weights and gradients"] / model.n_layers
    assert exposed == pytest.approx(SENDING * gathered)


def test_the_parts_are_the_step():
    model, base = layout("parallel.expert=16", "parallel.replicate=8")
    timing = time_of(model, base, H100, "bf16", efficiency=0.7)
    assert sum(timing.step_parts().values()) == pytest.approx(timing.step)
    assert timing.tokens_per_s == pytest.approx(4 * 2 * 4096 / timing.step)


def test_bubble_of_a_pipeline():
    """1F1B over 4 stages: 3 micro-batches of a stage's time are lost, over 2 parts a stage half of that (arXiv 2104.04473)."""
    model, base = layout("parallel.expert=8", batches=16)
    whole = time_of(model, base, H100, "bf16")
    four, parts = (time_of(model, base, H100, "bf16", pipeline=Pipeline(4, v)) for v in (1, 2))
    assert four.micro_batch == pytest.approx((whole.micro_batch) / 4, rel=0.05)
    assert four.bubble == pytest.approx(3 * four.micro_batch)
    assert parts.bubble == pytest.approx(four.bubble / 2)


def test_search_ranks_what_fits():
    model, base = layout("model.n_layers=8", world=16)
    small = dataclasses.replace(H100, memory_gib=20)
    found = search(model, base, small, ["bf16", "fp32"], 256, 1.0)
    fitting = [c for c in found if c.timing]
    assert fitting and len(fitting) < len(found)
    assert all(c.memory.total <= small.memory for c in fitting)
    steps = [c.timing.step for c in fitting]
    assert steps == sorted(steps)
    assert len({c.layout for c in found}) == len(found) and {c.precision for c in found} == {"bf16", "fp32"}
    assert all((c.layout.compute == "fp32") == (c.precision == "fp32") for c in found)
    assert fitting[0].precision == "bf16" and "precision=bf16 parallel.expert=" in fitting[0].overrides()
    told = reasons(found)
    assert any(line.startswith("parallel.expert=") for line in told) and all(
        "slower" in line or "fits" in line for line in told
    )
    micro = largest_batch(model, base, small)
    at = [memory_of(model, dataclasses.replace(base, micro_batch=m)).total <= small.memory for m in (micro, micro + 1)]
    assert at == [True, False]
    assert largest_batch(model, base, dataclasses.replace(H100, memory_gib=0.1)) == 0


def test_batches_of_a_search_cover_the_global_batch():
    _, base = layout()
    for micro in divisors(24):
        one = with_batch(base, micro, 64 * 24)
        assert one.micro_batch * one.micro_batches * one.world == 64 * 24
    assert with_batch(base, 5, 64 * 24).micro_batches == math.ceil(24 / 5)
