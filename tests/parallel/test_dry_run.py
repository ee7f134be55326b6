"""The plan's bytes against the real model's, run without memory in a process group of any size: collectives to the byte, memory
within 5%."""

import dataclasses
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from moesaic.launch import cli
from moesaic.moe.config import RouterConfig
from moesaic.moe.model import Transformer
from moesaic.parallel.codec import codecs
from moesaic.parallel.dry_run import Ledger, dry_run
from moesaic.parallel.layout import collectives, layout_of, load_of, row_bytes, visited
from moesaic.parallel.memory_plan import memory_of

MLA = [
    "recipe=olmoe_7b", "model.attention=mla", "model.qk_norm=none", "model.mla.q_lora_rank=384", "model.n_dense_layers=1",
    "model.d_dense=3072", "model.router.kind=sigmoid_bias", "model.router.groups=8", "model.router.groups_kept=4",
    "model.d_shared=512",
]  # fmt: skip
FUSED = ["parallel.expert_path=fused"]
QUEUE = ["parallel.fused_shared=true", "parallel.max_recv_tokens_factor=2"]
TWO_HOP = ["parallel.expert_path=two_hop"]
DENSE = ["recipe=olmoe_7b", "model.d_dense=32768", "train.seq_len=512"]
# World, ranks of a node, sequences of a micro-batch, overrides.
CASES = [
    (1024, 8, 2, ["recipe=7b_moe", "model.n_layers=2"]),
    (1024, 4, 1, ["recipe=qwen3_235b", "model.n_layers=2", "parallel.expert=32", "parallel.replicate=4",
                   "parallel.remat=selective"]),
    (128, 8, 1, ["recipe=qwen3_235b", "model.n_layers=6", "parallel.expert=32", "parallel.remat=full"]),
    (64, 8, 1, ["recipe=7b_moe", "model.n_layers=3", "parallel.expert=32", *TWO_HOP, "parallel.replicate=2"]),
    (24, 4, 3, ["recipe=7b_moe", "model.n_layers=3", "parallel.expert=1", "parallel.replicate=3", "parallel.reshard=never"]),
    (64, 8, 2, ["recipe=olmoe_7b", "model.n_layers=3", "parallel.remat=selective", "parallel.expert=16"]),
    (64, 8, 2, ["recipe=olmoe_7b", "model.n_layers=4", "parallel.remat=full", "parallel.reshard=always", "train.seq_len=1000"]),
    (64, 8, 1, [*MLA, "model.n_layers=4", "parallel.expert=8"]),
    (64, 8, 2, [*MLA, "model.n_layers=3", "parallel.remat=full", "parallel.expert=32", *TWO_HOP]),
    (16, 8, 1, ["recipe=7b_moe", "model.n_layers=3", "parallel.expert=8", *FUSED]),
    (16, 8, 1, ["recipe=olmoe_7b", "model.n_layers=3", "parallel.expert=4", *FUSED, "parallel.fused_keep=true",
                "parallel.max_recv_tokens_factor=1.5", "parallel.remat=full"]),
    (16, 8, 1, ["recipe=7b_moe", "model.n_layers=3", "parallel.expert=8", *FUSED, *QUEUE, "parallel.remat=selective"]),
    (16, 8, 1, ["recipe=7b_moe", "model.n_layers=2", "parallel.expert=8", *FUSED, *QUEUE, "parallel.fused_keep=true"]),
    (32, 8, 1, ["recipe=7b_moe", "model.n_layers=2", "parallel.expert=32", *FUSED, "parallel.max_recv_tokens_factor=2"]),
    (32, 8, 1, ["recipe=7b_moe", "model.n_layers=2", "parallel.expert=16", *FUSED, "parallel.max_recv_tokens_factor=2",
                "parallel.remat=full"]),
    (32, 8, 1, ["recipe=7b_moe", "model.n_layers=2", "precision.dispatch=fp8", "precision.combine=bf16", "parallel.remat=full"]),
    # Dense layers larger than what a rank has of a MoE one: most in their attention's backward, or at its end.
    (64, 8, 1, ["recipe=deepseek_v3", "model.n_layers=6", "parallel.remat=full", "parallel.expert=64"]),
    (64, 8, 1, ["recipe=deepseek_v3", "model.n_layers=4", "parallel.expert=8"]),
    (32, 8, 1, [*DENSE, "model.n_layers=8", "model.n_dense_layers=6", "parallel.expert=8"]),
    (32, 8, 1, [*DENSE, "model.n_layers=5", "model.n_dense_layers=1", "parallel.expert=8", "parallel.replicate=4",
                "parallel.remat=selective"]),
    # All experts on a rank: most at the sum of their gradients; cut within each, these are copied first.
    (32, 8, 1, ["recipe=qwen3_235b", "model.n_layers=3", "parallel.expert=1"]),
    (16, 4, 4, [*DENSE, "model.n_layers=4", "model.n_dense_layers=2", "model.d_dense=8192", "parallel.expert=8",
                "parallel.remat=full", "parallel.reshard=always"]),
    # Most in the embedding's gradient, at the root's sum in copies, and on one rank alone.
    (16, 8, 1, [*DENSE, "model.n_layers=4", "model.n_dense_layers=1", "model.d_dense=2048", "parallel.expert=16",
                "parallel.remat=full", "model.tie_embeddings=true"]),
    (8, 8, 1, [*DENSE, "model.n_layers=3", "model.n_dense_layers=3", "model.d_dense=512", "parallel.expert=8",
               "parallel.replicate=4", "parallel.remat=full"]),
    (1, 1, 1, [*DENSE, "model.n_layers=4", "model.n_dense_layers=2", "parallel.expert=1", "parallel.remat=full"]),
    # Narrow experts, made again: the joined output is most.
    (64, 2, 2, ["recipe=qwen3_235b", "model.n_layers=3", "model.d_expert=128", "model.vocab_size=1024", "parallel.expert=32",
                *TWO_HOP, "parallel.remat=full"]),
]  # fmt: skip


@pytest.mark.parametrize(("world", "node", "micro", "overrides"), CASES)
def test_plan_and_dry_run_agree(world, node, micro, overrides):
    config = cli.compose(overrides)
    layout = layout_of(config.model, config.parallel, world, node, micro, 1, config.train.seq_len, "bf16")
    layout = dataclasses.replace(layout, dispatch=config.precision.dispatch, combine=config.precision.combine)
    counted, memory = dry_run(config.model, layout, config.parallel), memory_of(config.model, layout)
    planned = Counter(
        (c.phase, c.operation, c.ranks, c.size) for c in collectives(config.model, layout) if c.operation != "fused"
    )
    planned["optimizer", "all_reduce", world, 4] += 1  # the gradient's norm
    assert counted.issued == planned
    assert (memory.weights, memory.moments) == (counted.weights, counted.moments)
    assert counted.gradients == memory.weights and counted.heap == memory.heap
    assert memory.kept == pytest.approx(counted.kept, rel=0.02)
    assert memory.tensors == pytest.approx(counted.peak, rel=0.03)
    assert not dist.is_initialized()


def test_the_first_dry_run_of_a_process_counts_as_the_next():
    """torch learns a DTensor's shapes once a process, from a fake tensor of the whole: all experts, which no rank has."""
    program = """if True:
        from moesaic.launch import cli
        from moesaic.parallel.dry_run import dry_run
        from moesaic.parallel.layout import layout_of
        config = cli.compose(["recipe=olmoe_7b", "model.n_layers=1", "model.vocab_size=1024", "parallel.expert=64"])
        layout = layout_of(config.model, config.parallel, 64, 8, 1, 1, 256, "bf16")
        print(*(dry_run(config.model, layout, config.parallel).peak for _ in range(2)))"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = run.stdout.split()
    assert first == second


def test_the_ledger_sees_what_lives():
    with Ledger() as ledger:
        a = torch.ones(1000)
        b = a * 2
        del b
        c = a.view(10, 100)[2:]
        c += 1
        assert ledger.now == 4000
        del a, c
        assert ledger.now == 0
    assert ledger.peak == 8000


@pytest.mark.parametrize("kind", ["fp8", "bf16", "logfmt8", "logfmt10"])
@pytest.mark.parametrize("width", [128, 192, 1536])
def test_bytes_of_a_row(kind, width):
    out, back = codecs(kind if kind == "fp8" else "high", "high" if kind == "fp8" else kind, width)
    payload = (out or back).encode(torch.randn(3, width))
    assert [part.nbytes for part in payload] == [3 * size for size in row_bytes(kind, width, 4)]


@pytest.mark.parametrize(
    ("router", "part"),
    [
        (RouterConfig(top_k=2), 2),
        (RouterConfig(top_k=5), 4),
        (RouterConfig(kind="sigmoid_bias", top_k=3, groups=4, groups_kept=2), 2),
        (RouterConfig(kind="sigmoid_bias", top_k=3, groups=4, groups_kept=2), 4),
        (RouterConfig(kind="sigmoid_bias", top_k=3, groups=4, groups_kept=3), 8),
    ],
)
def test_visits_are_those_of_drawn_tokens(router, part):
    """16 experts; 40,000 tokens that keep groups at random, then experts in them."""
    generator = torch.Generator().manual_seed(part)
    tokens, experts, group = 40_000, 16, 16 // router.groups
    kept = torch.rand(tokens, router.groups, generator=generator).argsort(dim=1) < router.groups_kept
    scores = torch.rand(tokens, experts, generator=generator) + kept.repeat_interleave(group, dim=1)
    chosen = scores.topk(router.top_k, dim=1).indices
    share = (chosen < part).any(dim=1).double().mean().item()
    deviation = math.sqrt(share * (1 - share) / tokens)
    assert visited(router, experts, part) == pytest.approx(share, abs=4 * deviation)


def test_nodes_of_a_token_of_deepseek_v3():
    """5.295 of 8 nodes with any experts (benchmarks/wire_bytes.py measures it); of 4 kept groups, each a node, uniform choice
    inside gives 4 (1 - C(96, 8) / C(128, 8))."""
    free, kept = RouterConfig(top_k=8), RouterConfig(kind="sigmoid_bias", top_k=8, groups=8, groups_kept=4)
    assert 8 * visited(free, 256, 32) == pytest.approx(5.295, abs=0.01)
    assert 8 * visited(kept, 256, 32) == pytest.approx(4 * (1 - math.comb(96, 8) / math.comb(128, 8)))


def test_imbalance_adds_rows_to_the_fullest_rank():
    config = cli.compose(["recipe=7b_moe"])
    layout = layout_of(config.model, config.parallel, 64, 8, 1, 1, 4096, "bf16")
    even, full = (load_of(config.model, dataclasses.replace(layout, imbalance=i)) for i in (1.0, 1.5))
    assert full.computed == 1.5 * even.computed
    assert full.received == 1.5 * even.received
    assert (
        memory_of(config.model, dataclasses.replace(layout, imbalance=1.5)).total
        > memory_of(config.model, layout).total
    )


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["parallel.expert=48", "model.n_experts=96"], "parallel.expert=48: must divide the number of ranks, 64"),
        (["parallel.replicate=7"], "parallel.replicate=7: must divide the number of ranks, 64"),
        (["parallel.expert=64", "parallel.node_size=24"], "parallel.node_size=24: must divide the expert degree, 64"),
    ],
)
def test_a_layout_that_cannot_be(overrides, line):
    config = cli.compose(["recipe=7b_moe", *overrides])
    with pytest.raises(ValueError, match=line):
        layout_of(config.model, config.parallel, 64, 8, 1, 1, 4096, "bf16")


def test_a_dry_run_needs_slots_that_divide():
    config = cli.compose(["recipe=7b_moe"])
    layout = layout_of(config.model, config.parallel, 128, 8, 1, 1, 1000, "bf16")
    with pytest.raises(ValueError, match=r"train.seq_len=1000: .* 8000, to be a multiple of parallel.expert=128"):
        dry_run(config.model, layout, config.parallel)


def test_a_dry_run_needs_bf16():
    config = cli.compose(["recipe=7b_moe"])
    layout = layout_of(config.model, config.parallel, 8, 8, 1, 1, 4096, "fp32")
    with pytest.raises(ValueError, match="precision.compute=fp32: a dry run needs bf16"):
        dry_run(config.model, layout, config.parallel)


@pytest.mark.parametrize("stage", range(4))
def test_bytes_of_zero(stage):
    """Of the dense parameters over 8 ranks in fp32: their gradients' sum, at stage 3 halved to a reduce-scatter, and the weights'
    gathering. tests/parallel/test_collectives.py counts the same of DeepSpeed itself."""
    config = cli.compose(["recipe=7b_moe", "parallel.engine=deepspeed", f"parallel.zero_stage={stage}"])
    layout = layout_of(config.model, config.parallel, 8, 8, 1, 1, 4096, "bf16")
    dense = [p.numel() for n, p in _meta(config.model).named_parameters() if ".experts." not in n]
    sent = Counter()
    for c in collectives(config.model, layout):
        if c.operation != "all_to_all" and not c.purpose.endswith("experts"):
            sent[c.operation, c.phase, c.last] += c.sent
    padded = sum(8 * math.ceil(n / 8) for n in dense) if stage == 3 else sum(dense)
    gathered, summed = 4 * padded * 7 / 8, 2 * 4 * padded * 7 / 8
    assert (
        sent
        == {
            0: {("all_reduce", "backward", True): summed},
            1: {("all_reduce", "backward", True): summed, ("all_gather", "optimizer", True): gathered},
            2: {("all_reduce", "backward", False): summed, ("all_gather", "optimizer", True): gathered},
            3: {("all_gather", "forward", False): gathered, ("reduce_scatter", "backward", False): gathered},
        }[stage]
    )
    again = [c for c in collectives(config.model, layout) if c.phase == "backward" and c.gathered]
    assert not again, "experts are divided over all ranks, and dense weights are few enough to stay"
    with pytest.raises(ValueError, match="parallel.engine=deepspeed: a dry run needs fsdp"):
        dry_run(config.model, layout, config.parallel)


def _meta(model):
    with torch.device("meta"):
        return Transformer(model)


def test_bytes_that_fused_kernels_store():
    """docs/fused.md's table, without flags: kept rows halve what backward dispatches."""
    knobs = ["recipe=7b_moe", *FUSED, "parallel.expert=8"]
    sent = {}
    for keep in ("false", "true"):
        config = cli.compose([*knobs, f"parallel.fused_keep={keep}"])
        layout = layout_of(config.model, config.parallel, 8, 8, 1, 1, 4096, "bf16")
        stored = [c for c in collectives(config.model, layout, [0]) if c.operation == "fused"]
        assert not [c for c in stored if c.ranks != 8]
        sent[keep] = {(c.phase, c.purpose): c.size // 8 for c in stored}
    load, row = load_of(config.model, layout), 2 * config.model.d_model
    assert sent["false"] == {
        ("forward", "counts"): 4 * config.model.n_experts, ("forward", "dispatch"): load.rows * row,
        ("forward", "slots"): 12 * load.slots, ("forward", "combine"): load.slots * row,
        ("backward", "dispatch"): 2 * load.rows * row, ("backward", "slots"): 16 * load.slots,
        ("backward", "combine"): load.slots * (row + 4),
    }  # fmt: skip
    assert sent["true"]["backward", "dispatch"] == load.rows * row

    # As tests/parallel/test_fused_low.py counts them: products apart from the kernels, of a recipe with chance.
    apart = dataclasses.replace(layout, apart=True, numbers=True, remat="full", keep=False)
    stored = {(c.phase, c.purpose): 0 for c in collectives(config.model, apart, [0]) if c.operation == "fused"}
    for c in collectives(config.model, apart, [0]):
        if c.operation == "fused":
            stored[c.phase, c.purpose] += c.size // 8
    assert stored == {
        ("forward", "counts"): 4 * config.model.n_experts, ("forward", "dispatch"): load.rows * row,
        ("forward", "slots"): 24 * load.slots, ("forward", "combine"): load.slots * row,
        ("backward", "counts"): 4 * config.model.n_experts, ("backward", "dispatch"): 2 * load.rows * row,
        ("backward", "slots"): 36 * load.slots, ("backward", "combine"): load.slots * (row + 4),
    }  # fmt: skip
