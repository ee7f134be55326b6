"""The grouped products against loops over experts, in every type, on ragged and empty experts, and broken on purpose."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.kernels import grouped_gemm as module
from moesaic.kernels.grouped_gemm import describe, schedule, varlen_k, varlen_k_reference, varlen_m, varlen_m_reference
from moesaic.kernels.interpret import INTERPRET
from moesaic.kernels.testing import Operation, check, check_case, launches, mutated
from moesaic.kernels.tiles import Tile

DEVICE = "cpu" if INTERPRET else "cuda"
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
TILE = Tile(16, 16, 16)

# R rows from N inputs, depth K, N columns; `uneven`: nine rows of ten go to the last expert, and every third expert has none.
SHAPES = (
    dict(inputs=23, rows=70, experts=5, k=41, n=33, uneven=0),
    dict(inputs=1, rows=1, experts=1, k=17, n=9, uneven=0),
    dict(inputs=30, rows=81, experts=9, k=32, n=48, uneven=1),
    dict(inputs=12, rows=64, experts=1, k=16, n=16, uneven=0),
    dict(inputs=5, rows=0, experts=3, k=8, n=24, uneven=0),
)


def rows_per_expert(rows: int, experts: int, uneven: int, generator: torch.Generator) -> Tensor:
    chance = torch.rand(experts, generator=generator)
    if uneven:
        chance[::3] = 0
        chance[-1] = 9 * chance[:-1].sum()
    chosen = torch.multinomial(chance, rows, replacement=True, generator=generator) if rows else torch.zeros(0).long()
    return torch.bincount(chosen, minlength=experts)


def m_inputs(s: Mapping[str, int], dtype: torch.dtype, scale: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "x": (torch.randn(s["inputs"], s["k"], generator=generator) * scale).to(dtype),
        "w": torch.randn(s["experts"], s["n"], s["k"], generator=generator).to(dtype),
        "bias": (torch.randn(s["experts"], s["n"], generator=generator) * scale).to(dtype),
        "parts": torch.randn(s["rows"], 3, generator=generator),
        "source": torch.randint(0, s["inputs"], (s["rows"],), generator=generator),
        "counts": rows_per_expert(s["rows"], s["experts"], s["uneven"], generator),
    }


def on_device(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) for name, value in values.items()}


def run_m(x: Tensor, w: Tensor, bias: Tensor, parts: Tensor, source: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Rows read through the index and times W^T; and the result's rows, in order, times W."""
    plan = schedule(counts, TILE.m)
    y, sums = varlen_m(x, w, plan, TILE, source_R=source, bias_EN=bias, parts_RP=parts)
    z, _ = varlen_m(x[source][:, : w.shape[1]].contiguous(), w[:, : x.shape[1]], plan, TILE, transposed=True)
    return {"y": y, "sums": sums, "z": z}


def exact_m(x: Tensor, w: Tensor, bias: Tensor, parts: Tensor, source: Tensor, counts: Tensor) -> dict[str, Tensor]:
    y = varlen_m_reference(x, w, counts, source, bias, False)
    z = varlen_m_reference(x[source][:, : w.shape[1]], w[:, : x.shape[1]], counts, None, None, True)
    return {"y": y, "sums": parts.sum(dim=1), "z": z}


VARLEN_M = Operation("varlen_m", run_m, exact_m, m_inputs, SHAPES, TOLERANCE)


def k_inputs(s: Mapping[str, int], dtype: torch.dtype, scale: float, generator: torch.Generator) -> dict[str, Any]:
    return {
        "x": (torch.randn(s["inputs"], s["k"], generator=generator) * scale).to(dtype),
        "z": torch.randn(s["rows"], s["n"], generator=generator).to(dtype),
        "weights": torch.rand(s["rows"], generator=generator),
        "source": torch.randint(0, s["inputs"], (s["rows"],), generator=generator),
        "counts": rows_per_expert(s["rows"], s["experts"], s["uneven"], generator),
    }


def run_k(x: Tensor, z: Tensor, weights: Tensor, source: Tensor, counts: Tensor) -> dict[str, Tensor]:
    plan = schedule(counts, TILE.m)
    left, left_sums = varlen_k(x, z, plan, TILE, source, gather="left", sums=True, weights_R=weights)
    right, right_sums = varlen_k(z, x, plan, TILE, source, gather="right", sums=True)
    return {"left": left, "left_sums": left_sums, "right": right, "right_sums": right_sums}


def exact_k(x: Tensor, z: Tensor, weights: Tensor, source: Tensor, counts: Tensor) -> dict[str, Tensor]:
    left, left_sums = varlen_k_reference(x, z, counts, source, "left", weights)
    right, right_sums = varlen_k_reference(z, x, counts, source, "right", None)
    return {"left": left, "left_sums": left_sums, "right": right, "right_sums": right_sums}


VARLEN_K = Operation("varlen_k", run_k, exact_k, k_inputs, SHAPES, TOLERANCE)


@pytest.mark.parametrize("operation", [VARLEN_M, VARLEN_K], ids=lambda operation: operation.name)
def test_against_reference(operation: Operation) -> None:
    check(operation, DEVICE, every=DEVICE != "cpu")


@settings(max_examples=8)
@given(
    inputs=st.integers(1, 20), rows=st.integers(0, 90), experts=st.integers(1, 9), k=st.integers(1, 50), n=st.integers(1, 50),
    uneven=st.integers(0, 1), dtype=st.sampled_from(list(TOLERANCE)), depth=st.booleans(),
)  # fmt: skip
def test_any_shape(
    inputs: int, rows: int, experts: int, k: int, n: int, uneven: int, dtype: torch.dtype, depth: bool
) -> None:
    shape = dict(inputs=inputs, rows=rows, experts=experts, k=k, n=n, uneven=uneven if experts > 3 else 0)
    check_case(VARLEN_K if depth else VARLEN_M, shape, dtype, 1.0, 0, DEVICE, str(shape))


MUTANTS = [
    # kernel, what stands there, what is put in its place
    ("_varlen_m_kernel", "E - 1) * n_tiles", "E - 1) * n_tiles - 1"),  # the last tile is never computed
    ("_varlen_m_kernel", "acc_MN += tl.load(bias_EN", "_ = tl.load(bias_EN"),  # no bias
    ("_varlen_m_kernel", "tl.sum(parts, axis=1)", "tl.sum(parts, axis=1) * 0"),
    ("_varlen_m_kernel", "n_tile == 0", "n_tile == 5"),  # sums that nobody writes
    ("load_weight", "w.load([expert, row, column])", "w.load([expert * 0, row, column])"),
    ("load_weight", "w + expert.to(tl.int64) * stride_e", "w"),
    ("load_rows", "ks = k + tl.arange(0, BK)", "ks = tl.arange(0, BK)"),
    ("multiply", "precision=PRECISION)", "precision=PRECISION).to(tl.bfloat16).to(tl.float32)"),  # cast too early
    ("rows_by_weight", "range(0, K, BK)", "range(0, K - BK + 1, BK)"),  # not what is left of the depth
    ("row_pointers", "mask=real, other=0)", "mask=real, other=0) * 0"),
    ("find_tile", "start + m * BM", "start + m * BM + 1"),
    ("_schedule_kernel", "tl.where(earlier, n, 0)", "tl.where(earlier, n * 0, 0)"),
    ("_schedule_kernel", "tl.where(earlier, tl.cdiv(n, BM), 0)", "tl.where(earlier, n // BM, 0)"),
    ("_schedule_kernel", " | ((n == count[:, None]) & earlier)", ""),
    ("_varlen_k_kernel", "start = tl.load(starts_E + expert)", "start = tl.load(starts_E + expert) * 0"),
    ("_varlen_k_kernel", "E * p_tiles * q_tiles", "E * p_tiles * q_tiles - 1"),
    ("_varlen_k_kernel", "total_M += tl.sum", "total_M = tl.sum"),
    ("_varlen_k_kernel", "a_KM *= tl.load(weights_R", "_ = tl.load(weights_R"),
    ("_varlen_k_kernel", "tl.dot(a_KM.T, b_KN, acc_MN, ", "tl.dot(a_KM.T, b_KN, "),  # the last step alone
]


@pytest.mark.parametrize(("kernel", "old", "new"), MUTANTS)
def test_a_broken_kernel_fails(kernel: str, old: str, new: str) -> None:
    operations = [VARLEN_K if "_k_" in kernel else VARLEN_M] + [VARLEN_K] * (kernel == "_schedule_kernel")

    def run_all() -> None:
        for operation in operations:
            for shape in SHAPES[:3:2]:  # one with odd widths, one that descriptors take
                check_case(operation, shape, torch.float32, 1.0, 0, DEVICE, "mutant")

    with mutated(getattr(module, kernel), old, new), pytest.raises(AssertionError, match="mutant"):
        run_all()


def test_the_schedule() -> None:
    """By hand: tiles of 16 rows, of experts with 17, 0, 40 and 17 rows."""
    plan = schedule(torch.tensor([17, 0, 40, 17], device=DEVICE), 16)
    assert plan.starts_E.tolist() == [0, 17, 17, 57] and plan.tile_ends_E.tolist() == [2, 2, 5, 7]
    assert plan.order_E.tolist() == [2, 0, 3, 1]
    many = torch.randint(0, 100, (150,), device=DEVICE)  # more experts than a program of the schedule takes
    plan, tiles = schedule(many, 16), -(many // -16)
    assert plan.starts_E.equal(many.cumsum(0) - many) and plan.tile_ends_E.equal(tiles.cumsum(0).int())
    assert many[plan.order_E].equal(many.sort(descending=True).values)


def test_what_tma_can_load_is_described() -> None:
    w = torch.randn(3, 24, 16)
    assert describe(w, 16, 16)[1] and describe(w[:, 8:], 16, 16)[1] and describe(w.bfloat16(), 16, 16)[1]
    assert not describe(torch.randn(3, 24, 17), 16, 16)[1]  # rows of 68 bytes
    assert not describe(torch.randn(1 + 3 * 24 * 16)[1:].view(3, 24, 16), 16, 16)[1]  # begins at 4 bytes
    assert not describe(w[:, :, 1:], 16, 16)[1]


def test_programs_share_the_tiles_of_uneven_experts() -> None:
    """Every count of programs gives the same bits: which program computes a tile does not matter."""
    inputs = m_inputs(SHAPES[2], torch.float32, 1.0, torch.Generator().manual_seed(1))
    inputs, results = on_device(inputs), []
    for programs in (1, 2, 7, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "processors", lambda device: programs)
            results.append(run_m(**inputs))
    assert all(result[name].equal(results[0][name]) for result in results for name in result)


def test_eight_dies_share_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on AMD, where each of 8 dies takes neighbours of the list: each tile is still computed once."""
    inputs = m_inputs(SHAPES[0], torch.float32, 1.0, torch.Generator().manual_seed(1))
    inputs = on_device(inputs)
    want = run_m(**inputs)
    monkeypatch.setattr(module, "processors", lambda device: 16)
    monkeypatch.setattr(module, "target_name", lambda device: "gfx942")
    got = run_m(**inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_rows_past_the_last_expert_are_left() -> None:
    plan = schedule(torch.tensor([3, 2], device=DEVICE), TILE.m)
    source, parts = torch.tensor([0, 1, 0, 1, 1, 0, 0], device=DEVICE), torch.full((7, 2), torch.nan, device=DEVICE)
    x, w = torch.ones(2, 16, device=DEVICE), torch.ones(2, 8, 16, device=DEVICE)
    with launches() as names:
        y, sums = varlen_m(x, w, plan, TILE, source_R=source, parts_RP=parts)
    assert names == ["_varlen_m_kernel"]
    assert (y[:5] == 16).all() and y[5:].isnan().all()  # conftest fills fresh memory with NaN
    assert sums is not None and sums[:5].isnan().all() and (sums[5:] == 0).all()
