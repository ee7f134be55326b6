"""The operations of routing, declared for the harness. test_routing_kernels.py checks them on a CPU, test_gpu.py on a GPU."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moesaic.kernels import permute, permute_triton, rounding, rounding_triton
from moesaic.kernels.combine import combine, combine_reference
from moesaic.kernels.permute import cut_tiles
from moesaic.kernels.permute_triton import sort_slots
from moesaic.kernels.rounding import RULES
from moesaic.kernels.testing import SCALES, Operation
from moesaic.kernels.topk import stable_topk, topk_reference
from moesaic.kernels.topk_triton import topk
from tests.kernels.shapes import ROUTED

Shape = Mapping[str, int]
FP32 = {torch.float32: 2e-6}
SHORT = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def some_logits(shape: Shape, scale: float, generator: torch.Generator) -> Tensor:
    """Logits of which some are equal. Where they are large, they are so in common: else every share would be 0 or 1."""
    logits_TE = (torch.randn(shape["T"], shape["E"], generator=generator) * 8).round() / 8 * min(scale, 1.0)
    return logits_TE + torch.randn(shape["T"], 1, generator=generator) * (scale if scale > 1 else 0.0)


def topk_operation(name: str, shapes: tuple[Shape, ...], **options: Any) -> Operation:
    def run(function: Callable[..., Any]) -> Callable[..., dict[str, Tensor]]:
        def named(logits_TE: Tensor, bias_E: Tensor | None, k: int, given_TK: Tensor | None) -> dict[str, Tensor]:
            out = function(logits_TE, bias_E, k, given_TK=given_TK, **options)
            return dict(zip(("experts_TK", "weights_TK", "shares_TE"), out, strict=True))

        return named

    def inputs(shape: Shape, dtype: torch.dtype, scale: float, generator: torch.Generator) -> dict[str, Any]:
        logits_TE = some_logits(shape, scale, generator)
        bias_E = torch.randn(shape["E"], generator=generator) if options["sigmoid"] else None
        given_TK = None
        if name == "topk_given":
            given_TK = stable_topk(torch.rand(shape["T"], shape["E"], generator=generator), shape["K"])
        return {"logits_TE": logits_TE, "bias_E": bias_E, "k": shape["K"], "given_TK": given_TK}

    # Of logits of minus a thousand, the sigmoid is 0, and their share 0 / 0.
    scales = (1.0, 1e-4, 8.0) if options["sigmoid"] else SCALES
    return Operation(name, run(topk), run(topk_reference), inputs, shapes, FP32, ("logits_TE",), scales)


MANY = tuple(
    shape for shape in ROUTED if shape["K"] > 1
)  # of one expert alone, divided weights are 1, their gradients nothing
GROUPED = ({"T": 5, "E": 12, "K": 4}, {"T": 1, "E": 4, "K": 1}, {"T": 18, "E": 24, "K": 6})
TOPK = (
    topk_operation("topk_softmax", ROUTED, sigmoid=False, renormalize=False),
    topk_operation("topk_softmax_divided", MANY, sigmoid=False, renormalize=True, scale=2.5),
    topk_operation("topk_sigmoid", ROUTED, sigmoid=True, renormalize=False, scale=2.5),
    topk_operation("topk_groups", GROUPED, sigmoid=True, renormalize=False, groups=4, kept=2),
    topk_operation("topk_single_groups", ({"T": 7, "E": 3, "K": 2},), sigmoid=True, renormalize=True, groups=3, kept=2),
    topk_operation("topk_given", MANY, sigmoid=True, renormalize=True),
)


def sort_inputs(ragged: bool) -> Callable[..., dict[str, Any]]:
    """The top-K choice: even, or all to one expert, or to the upper half; for `ragged`, in any order, and some slots unused."""

    def inputs(shape: Shape, dtype: torch.dtype, scale: float, generator: torch.Generator) -> dict[str, Any]:
        tokens, n_experts, k = shape["T"], shape["E"], shape["K"]
        scores_TE = torch.rand(tokens, n_experts, generator=generator)
        kind = int(torch.randint(3, (), generator=generator))
        scores_TE[:, n_experts // 2 :] += kind == 1
        scores_TE[:, n_experts // 3] += kind == 2
        expert_S = stable_topk(scores_TE, k).flatten()
        token_S = torch.arange(tokens).repeat_interleave(k)
        if ragged:
            expert_S = expert_S.masked_fill(torch.rand(expert_S.shape, generator=generator) < 0.3, n_experts)
            token_S = token_S[torch.randperm(token_S.numel(), generator=generator)]
        sizes = {"n_experts": n_experts, "inputs": tokens, "per_input": 0 if ragged else k, "tile": shape.get("M", 16)}
        return {"token_S": token_S, "expert_S": expert_S} | sizes

    return inputs


def sort_run(**arguments: Any) -> dict[str, Tensor]:
    rows, tiles = sort_slots(**arguments)
    found = {f.name: getattr(part, f.name) for part in (rows, tiles) for f in dataclasses.fields(part)}
    return {name: value for name, value in found.items() if value is not None}


def sort_reference(
    token_S: Tensor, expert_S: Tensor, n_experts: int, inputs: int, per_input: int, tile: int
) -> dict[str, Tensor]:
    counts_E = torch.bincount(expert_S, minlength=n_experts)[:n_experts]
    with mock.patch.object(permute, "on_host", return_value=False):  # as on a GPU, where padding stays
        rows = permute.sort_slots(token_S, expert_S, counts_E, inputs, per_input)
    tiles = cut_tiles(counts_E, expert_S.numel(), tile)
    found = {f.name: getattr(part, f.name) for part in (rows, tiles) for f in dataclasses.fields(part)}
    return {name: value for name, value in found.items() if value is not None}


SIZED = (*ROUTED[:-1], {"T": 100, "E": 3, "K": 2, "M": 8}, {"T": 40, "E": 300, "K": 3, "M": 16})


def sort_in_chunks(**arguments: Any) -> dict[str, Tensor]:
    """In two chunks of several blocks each, as thousands of slots are."""
    with mock.patch.object(permute_triton, "MOST_CHUNKS", 2):
        return sort_run(**arguments)


def sort_operation(name: str, run: Callable[..., Any], ragged: bool, shapes: tuple[Shape, ...]) -> Operation:
    return Operation(name, run, sort_reference, sort_inputs(ragged), shapes, FP32, scales=(1.0,))


SORT = (
    sort_operation("sort_slots", sort_run, False, SIZED),
    sort_operation("sort_slots_ragged", sort_run, True, SIZED),
    sort_operation(
        "sort_slots_chunks", sort_in_chunks, False, ({"T": 150, "E": 3, "K": 2}, {"T": 131, "E": 2, "K": 1})
    ),
)


def rounding_inputs(shape: Shape, dtype: torch.dtype, scale: float, generator: torch.Generator) -> dict[str, Any]:
    """Scores of which many are equal; some below 0, where the seed says so."""
    logits_TE = some_logits(shape, 1.0, generator)
    scores_TE = (
        logits_TE.softmax(dim=1) if int(torch.randint(2, (), generator=generator)) else logits_TE.sigmoid() - 0.25
    )
    seed = torch.randint(2**62, (), generator=generator)
    scores_TE[:, shape["E"] // 2] += 2.0 * int(torch.randint(2, (), generator=generator))
    experts_TK = stable_topk(scores_TE, shape["K"])
    return {"scores_TE": scores_TE.abs() * scale, "experts_TK": experts_TK, "tile": shape["M"], "seed": seed}


def rounding_operation(rule: str, scales: tuple[float, ...] = (1.0, 1e-4, 1e3)) -> Operation:
    def run(function: Callable[..., rounding.Rounding]) -> Callable[..., dict[str, Tensor]]:
        def named(scores_TE: Tensor, **others: Any) -> dict[str, Tensor]:
            result = function(scores_TE.float(), rule=rule, **others)
            return {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}

        return named

    shapes = (
        {"T": 1, "E": 1, "K": 1, "M": 4},
        {"T": 37, "E": 5, "K": 2, "M": 8},
        {"T": 9, "E": 3, "K": 3, "M": 5},
        {"T": 1100, "E": 2, "K": 1, "M": 128},
        {"T": 20, "E": 3, "K": 2, "M": 1},
    )
    return Operation(
        f"round_{rule}", run(rounding_triton.round_routing), run(rounding.round_routing), rounding_inputs, shapes, FP32,
        scales=scales,
    )  # fmt: skip


ROUNDING = tuple(rounding_operation(rule) for rule in RULES)


def combine_inputs(ragged: bool, weighted: bool) -> Callable[..., dict[str, Any]]:
    def inputs(shape: Shape, dtype: torch.dtype, scale: float, generator: torch.Generator) -> dict[str, Any]:
        n, k = shape["N"], shape["K"]
        rows = n * k + 3 * ragged  # with rows in no bag
        bag, starts = torch.randperm(rows, generator=generator)[: n * k].view(n, k), None
        if ragged:
            cuts = torch.randint(0, n * k + 1, (n - 1,), generator=generator).sort().values
            bag, starts = bag.flatten(), torch.cat((torch.tensor([0]), cuts, torch.tensor([n * k])))
        rows_RD = torch.randn(rows, shape["D"], generator=generator) * scale
        weights_R = torch.rand(rows, generator=generator) if weighted else None
        return {"rows_RD": rows_RD.to(dtype), "bag": bag, "starts": starts, "weights_R": weights_R}

    return inputs


WIDE = ({"N": 1, "K": 1, "D": 1}, {"N": 5, "K": 3, "D": 7}, {"N": 33, "K": 2, "D": 20}, {"N": 3, "K": 4, "D": 520})
COMBINE = tuple(
    Operation(
        f"combine{'_ragged' * ragged}{'_weighted' * weighted}", combine, combine_reference, combine_inputs(ragged, weighted),
        WIDE, SHORT, gradients=("rows_RD", "weights_R") if weighted else ("rows_RD",),
    )
    for ragged in (False, True)
    for weighted in (False, True)
)  # fmt: skip

ROUTING = (*TOPK, *SORT, *ROUNDING, *COMBINE)
