"""The kernels of routing (top-K, sorting, rounding, combining) against their specifications, and broken ones to be noticed."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.kernels import combine as combining
from moesaic.kernels import permute_triton, rounding_triton, topk_triton
from moesaic.kernels.combine import combine
from moesaic.kernels.permute import Rows
from moesaic.kernels.permute_triton import sort_slots
from moesaic.kernels.rounding import RULES
from moesaic.kernels.testing import Operation, check, check_case, launches, mutated
from moesaic.kernels.topk_triton import topk
from tests.kernels.operations import COMBINE, ROUNDING, ROUTING, SORT, TOPK, rounding_operation
from tests.kernels.shapes import routed

BY_NAME = {operation.name: operation for operation in ROUTING}
few = settings(deadline=None, max_examples=12, derandomize=True)


@pytest.mark.parametrize("operation", ROUTING, ids=BY_NAME)
def test_equals_the_specification(operation: Operation) -> None:
    check(operation)


@given(routed(tokens=60, experts=40), st.sampled_from(TOPK[:3:2]), st.integers(0, 10_000))
@few
def test_topk_of_any_shape(shape: dict[str, int], operation: Operation, seed: int) -> None:
    check_case(operation, shape, torch.float32, 1.0, seed, "cpu", f"{shape} {seed}")


@given(routed(tokens=60, experts=140, M=40), st.sampled_from(SORT), st.integers(0, 10_000))
@few
def test_sorting_of_any_shape(shape: dict[str, int], operation: Operation, seed: int) -> None:
    check_case(operation, shape, torch.float32, 1.0, seed, "cpu", f"{shape} {seed}")


@given(routed(tokens=60, experts=5, M=20), st.sampled_from(ROUNDING), st.integers(0, 10_000))
@few
def test_rounding_of_any_shape(shape: dict[str, int], operation: Operation, seed: int) -> None:
    check_case(operation, shape, torch.float32, 1.0, seed, "cpu", f"{shape} {seed}")


def quick(name: str, *shapes: int) -> Operation:
    operation = BY_NAME[name]
    return dataclasses.replace(operation, shapes=tuple(operation.shapes[i] for i in shapes))


count, place = permute_triton._count_kernel, permute_triton._place_kernel
select, order, rises = rounding_triton._select_kernel, rounding_triton._order_kernel, rounding_triton._rises
choose, choose_backward = topk_triton._topk_kernel, topk_triton._topk_backward_kernel
add, spread = combining._combine_kernel, combining._spread_kernel
BROKEN = {
    "top-K: ties to the higher id": (topk_triton._keys, "0x7FFFFFFF - ids", "ids", quick("topk_softmax", 3)),
    "top-K: order of bits below zero": (topk_triton._keys, "bits ^ 0x7FFFFFFF", "bits", quick("topk_softmax", 3)),
    "top-K: what is chosen stays": (choose, "keys = tl.where(chosen, least, keys)", "keys = keys", quick("topk_softmax", 3)),
    "top-K: padding is chosen": (choose, "tl.where(real, _keys(wanted, e[None, :]), least)", "_keys(wanted, e[None, :])",
                                 quick("topk_sigmoid", 2)),
    "top-K: weight of the biased score": (choose, "wanted += tl.load", "scores += tl.load", quick("topk_sigmoid", 3)),
    "top-K: no bias": (choose, "if BIASED", "if BIASED and False", quick("topk_sigmoid", 3)),
    "top-K: no division": (choose, "if RENORMALIZE", "if False", quick("topk_softmax_divided", 2)),
    "top-K: no factor": (choose, "weights * scale", "weights", quick("topk_sigmoid", 3)),
    "top-K: a group too many": (choose, "range(KEPT)", "range(KEPT + 1)", quick("topk_groups", 0)),
    "top-K: a group by its best alone": (choose, "if P > 1", "if False", quick("topk_groups", 0, 2)),
    "top-K: the given ids are not read": (choose, "if GIVEN:\n            chosen", "if False:\n            chosen",
                                         quick("topk_given", 2)),
    "top-K: skipped tail": (choose, "(t < T)[:, None] & (k_K", "(t < T - 1)[:, None] & (k_K", quick("topk_softmax", 3)),
    "top-K: largest logit not taken off": (topk_triton._scores, "logits - largest[:, None]", "logits", quick("topk_softmax", 3)),
    "top-K backward: no mean": (choose_backward, "dscores - tl.sum(dscores * scores, axis=1)[:, None]", "dscores",
                                quick("topk_softmax", 3)),
    "top-K backward: shares forgotten": (choose_backward, "dscores += dshares", "dscores += 0", quick("topk_softmax", 3)),
    "top-K backward: not divided": (choose_backward, "if RENORMALIZE", "if False", quick("topk_softmax_divided", 2)),
    "sort: a slot missed": (count, "(c + 1) * chunk", "(c + 1) * chunk - 1", quick("sort_slots", 3)),
    "sort: chunks before not added": (place, "range(c)", "range(0)", quick("sort_slots", 5)),
    "sort: start of the block alone": (place, "rows_before + tl.cumsum(total", "tl.cumsum(total", quick("sort_slots", 4)),
    "sort: within a chunk not stable": (place, "tl.cumsum(hot, axis=0) - hot", "tl.sum(hot, axis=0) - tl.cumsum(hot, axis=0)",
                                        quick("sort_slots", 3)),
    "sort: chunk not moved on": (place, "        start += tl.sum(hot, axis=0)\n", "", quick("sort_slots_chunks", 0)),
    "sort: tiles cut, not rounded up": (place, "(total + M - 1) // M, axis", "total // M, axis", quick("sort_slots", 3)),
    "sort: tile of the expert before": (place, "end[None, :] <= tile", "end[None, :] < tile", quick("sort_slots", 3)),
    "sort: skipped tiles": (place, "mask=tile < tl.minimum", "mask=tile < -1 + tl.minimum", quick("sort_slots", 3)),
    "round: later tokens first": (select, "number < left", "number >= equal - left", quick("round_up", 1)),
    "round: earlier tokens out": (select, "number >= equal - left", "number < left", quick("round_down", 1)),
    "round: boundary left out": (select, "| wins", "| (wins & (t < 0))", quick("round_up", 3)),
    "round: place not moved on": (select, "place_of += ", "place_of + ", quick("round_up", 3)),
    "round: unordered": (order, "tl.where(added, place, a)", "a", quick("round_up", 1, 3)),
    "round: the other way": (order, "tl.where(up & (a < n), 1, 0)", "tl.where(up & (a < n), 0, 1)", quick("round_up", 1)),
    "round: ties up": (rises, "M - over < over", "M - over <= over", quick("round_nearest", 1, 2)),
    "round: lost not made up": (rises, "axis=0) + lost", "axis=0)", quick("round_balance", 1)),
    "round: another seed": (rises, "(e + 1)", "(e + 2)", quick("round_stochastic", 1)),
    "round: sums exchanged": (rises, "above / tl", "below / tl", quick("round_score", 1, 2, 3)),
    "combine: wrong offset": (add, "rows_RD + r[:, None] * D", "rows_RD + n[:, None] * D", quick("combine", 1)),
    "combine: row missed": (add, "range(tl.max(count, axis=0))", "range(tl.max(count, axis=0) - 1)", quick("combine", 1)),
    "combine: weights forgotten": (add, "if WEIGHTED", "if False", quick("combine_weighted", 1)),
    "combine: sum in bf16": (add, "total += row", "total = (total + row).to(tl.bfloat16).to(tl.float32)", quick("combine", 2)),
    "combine: skipped columns": (add, "& (d < D)[None, :]\n    tl.store", "& (d < D - 1)[None, :]\n    tl.store",
                                 quick("combine", 1)),
    "combine backward: weights forgotten": (spread, "w[:, None] * dy", "dy", quick("combine_weighted", 1)),
    "combine backward: last columns alone": (spread, "dw += ", "dw = ", quick("combine_weighted", 3)),
    "combine backward: dw of the first row": (spread, "dw_R + r, dw", "dw_R + n, dw", quick("combine_ragged_weighted", 1)),
}  # fmt: skip


@pytest.mark.parametrize(("kernel", "old", "new", "operation"), BROKEN.values(), ids=BROKEN)
def test_broken_kernels_are_noticed(kernel: Any, old: str, new: str, operation: Operation) -> None:
    with mutated(kernel, old, new), pytest.raises(AssertionError, match=operation.name):
        check(operation)


def test_one_launch_each_way_and_two_to_sort() -> None:
    logits_TE = torch.randn(5, 6, requires_grad=True)
    with launches() as names:
        experts_TK, weights_TK, shares_TE = topk(logits_TE, None, 2, sigmoid=False, renormalize=True)
        (weights_TK.sum() + shares_TE.square().sum()).backward()
    assert names == ["_topk_kernel", "_topk_backward_kernel"]
    token_S = torch.arange(5).repeat_interleave(2)
    with launches() as names:
        rows, _ = sort_slots(token_S, experts_TK.flatten(), 6, 5, 2, 16)
    assert names == ["_count_kernel", "_place_kernel"]
    y_RD = torch.randn(10, 3, requires_grad=True)
    with launches() as names:
        combine(y_RD, rows.bag, rows.starts, weights_TK.detach().flatten()).sum().backward()
    assert names == ["_combine_kernel", "_spread_kernel"]
    for rule in RULES:
        operation = rounding_operation(rule)
        given_ = operation.inputs(operation.shapes[1], torch.float32, 1.0, torch.Generator().manual_seed(0))
        with launches() as names:
            operation.run(**given_)
        assert names == ["_select_kernel", "_order_kernel"]


def test_one_expert_per_token_divided_by_itself_has_no_gradient() -> None:
    logits_TE = torch.randn(9, 4, requires_grad=True)
    _, weights_TK, _ = topk(logits_TE, None, 1, sigmoid=False, renormalize=True, scale=2.0)
    weights_TK.sum().backward()
    assert weights_TK.eq(2).all() and logits_TE.grad is not None and logits_TE.grad.eq(0).all()


def test_most_experts_and_most_choices() -> None:
    logits_TE = torch.randn(2, 4096)
    got, weights_TK, _ = topk(logits_TE, None, 32, sigmoid=False, renormalize=False)
    assert got.equal(logits_TE.topk(32).indices)
    torch.testing.assert_close(weights_TK, logits_TE.softmax(dim=1).topk(32).values)
    with pytest.raises(ValueError, match="n_experts=4097, k=3: the kernel chooses up to 32 of up to 4096"):
        topk(torch.zeros(1, 4097), None, 3, sigmoid=False, renormalize=False)


def test_no_tokens() -> None:
    logits_TE = torch.zeros(0, 3, requires_grad=True)
    experts_TK, weights_TK, shares_TE = topk(logits_TE, None, 2, sigmoid=False, renormalize=True)
    (weights_TK.sum() + shares_TE.sum()).backward()
    none = torch.zeros(0, dtype=torch.int64)
    rows, tiles = sort_slots(none, none, 3, 0, 2, 16)
    assert experts_TK.shape == (0, 2) and rows.bag.shape == (0, 2)
    assert rows.counts_E.tolist() == [0, 0, 0] and tiles.expert.tolist() == [3, 3, 3]
    assert combine(torch.zeros(0, 4), rows.bag, None).shape == (0, 4)
    for rule in RULES:
        rounded = rounding_triton.round_routing(
            torch.zeros(0, 3), torch.zeros(0, 2, dtype=torch.int64), tile=8, rule=rule, seed=1
        )
        assert rounded.counts_E.tolist() == [0, 0, 0] and int(rounded.dropped) == 0


@pytest.mark.parametrize(("device", "gradients"), [("cpu", True), ("cuda", False)])
def test_known_without_running_and_without_waiting(device: str, gradients: bool) -> None:
    """Under FakeTensorMode there are no values: what the operations return is known from shapes. Without a GPU, autograd
    and some operations of torch fail on tensors that pass for ones on it."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits_TE = torch.randn(64, 12, device=device, requires_grad=gradients)
        experts_TK, weights_TK, shares_TE = topk(logits_TE, None, 3, sigmoid=False, renormalize=True)
        token_S = torch.arange(64, device=device).repeat_interleave(3)
        for per_input in (3, 0) if gradients else (3,):
            rows, tiles = sort_slots(token_S, experts_TK.flatten(), 12, 64, per_input, 16)
            assert isinstance(rows, Rows) and rows.source_R.shape == (192,) and tiles.expert.shape == (24,)
            y_RD = torch.randn(192, 8, device=device, dtype=torch.bfloat16, requires_grad=gradients)
            y_ND = combine(y_RD, rows.bag, rows.starts, weights_TK.flatten())
            assert y_ND.shape == (64, 8) and y_ND.dtype == torch.bfloat16
        if gradients:
            (y_ND.float().sum() + shares_TE.sum()).backward()
            assert logits_TE.grad is not None and logits_TE.grad.shape == (64, 12)
            rounded = rounding_triton.round_routing(
                shares_TE, experts_TK, tile=16, rule="balance", seed=torch.tensor(1)
            )
            assert rounded.member_TE.shape == (64, 12) and rounded.added_token_EA.shape == (12, 15)


@pytest.mark.parametrize("operation", [TOPK[0], COMBINE[1]], ids=lambda operation: operation.name)
def test_compiled_as_one_operation(operation: Operation) -> None:
    compiled = torch.compile(operation.run, backend="aot_eager", fullgraph=True)
    check(dataclasses.replace(operation, run=compiled, shapes=operation.shapes[1:2]))
