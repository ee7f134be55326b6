"""Rows of the fused path without products, on one rank: what is carried, and sums of what is given back.

With TRITON_INTERPRET=0 on a GPU (make test-gpu). Several ranks: test_fused_schedules.py, tests/parallel/test_fused_low.py.
"""

from typing import Any

import pytest
import torch

from moesaic.kernels import fused_ep, fused_rows
from moesaic.kernels.fused_protocol import regions
from moesaic.kernels.permute import sort_slots
from moesaic.kernels.symmetric import make_heap
from moesaic.kernels.tiles import fused_tile
from moesaic.parallel.codec import Fp8


@pytest.mark.parametrize(
    ("dtype", "tokens", "experts", "d", "once", "coded"),
    [
        (torch.float32, 37, 5, 20, True, False),
        (torch.bfloat16, 130, 3, 72, False, False),
        (torch.bfloat16, 9, 4, 160, True, True),
        (torch.float32, 0, 2, 16, True, False),
    ],
)
def test_rows_out_and_back(
    dtype: torch.dtype, tokens: int, experts: int, d: int, once: bool, coded: bool, device: str
) -> None:
    g, k = torch.Generator().manual_seed(tokens), 2
    ids = torch.rand(tokens, experts, generator=g).topk(k).indices.flatten().to(device)
    token_S = torch.arange(tokens, device=device).repeat_interleave(k)
    rows = sort_slots(token_S, ids, torch.bincount(ids, minlength=experts), tokens, k)
    x = torch.randn(tokens, d, generator=g).to(device, dtype)
    weights, numbers = torch.rand(tokens * k, generator=g).to(device), torch.arange(tokens, device=device) + 2**40

    tile = fused_tile(x.device)
    shapes = regions(
        1, experts, d, dtype, tokens * k, fused_ep.room(1, experts, tokens * k, tile.m), tile.m, fused_ep.most_columns(d, tile),
        1, False, numbers=True,
    )  # fmt: skip

    def alone(size: int, exchange: Any) -> Any:
        memory = torch.zeros(size, dtype=torch.uint8, device=device)
        return memory, [memory], [memory.data_ptr()]

    heap = make_heap(0, shapes, lambda value: [value], alone)
    sent = torch.zeros(1, len(fused_ep.PHASES), dtype=torch.int64, device=device)
    spins = 2_000 if x.is_cpu else 10_000_000
    setting = fused_ep.Setting(heap, experts, tile, once, spins, fused_ep.grid_programs(x.device, 0))
    tables = fused_rows.carry(x, rows, setting, sent, 0, weights, numbers, coded=coded)
    came = fused_rows.arrived(setting, tables)
    assert torch.equal(came.rows.expert_R, rows.expert_R) and torch.equal(came.rows.counts_E, rows.counts_E)
    values = fused_rows.values_of(setting, came.holder_N, coded)
    if coded:
        codec = Fp8()
        values = codec.decode([values[:, :d], values[:, d:]], dtype)
        x = codec.decode(codec.encode(x), dtype)
    assert torch.equal(values, x[rows.source_R])
    assert torch.equal(came.of(setting, "weight"), weights)
    assert torch.equal(came.of(setting, "numbers"), numbers[rows.source_R])

    y, dweights = torch.randn(tokens * k, d, generator=g).to(device, dtype), weights + 1
    total, back = fused_rows.give_back(y, rows, tokens, setting, tables, sent, 0, dweights)
    assert back is not None and torch.equal(back, dweights)
    first, second = rows.bag.unbind(1)  # two of them: their sum is rounded once
    assert torch.equal(total, (y[first].float() + y[second].float()).to(dtype))
    alike, none = fused_rows.give_back(y, rows, tokens, setting, tables, sent, 0)
    assert none is None and torch.equal(alike, total)
    assert not heap.view("failed").any() and not sent.any()  # nothing goes to another rank
