"""Rows of the fused path without products: what it does where a recipe's products are not inside its kernels.

    for slot s of a token and expert x, sorted by expert, of every source rank:
      carry       row of x's owner = X[token of s], with the slot's weight and the token's number     one launch
                  y = the owner's experts of its rows, weighted, by moesaic.moe.low                   any operations
      give_back   slots of the source[s] = y;  Y[t] = sum over the slots of token t, in slot order    one launch

Each is the other's gradient: dY is carried, dX given back, with the gradient of each slot's weight. Programs take tasks from one
queue and wait by flags, as those of moesaic.kernels.fused_ep do, with the same regions; docs/fused.md has the protocol. Between
the launches a rank's rows lie in its heap, in places of tiles; `arrived` takes them out.

Letters: T tokens, D model width, E experts in all, e on a rank, W ranks, S slots, N rows that came to this rank, P phases.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from moesaic.kernels.fused_ep import ANY, N_PHASES, Setting, columns, compile_setting, fused_options
from moesaic.kernels.fused_low import code_type, coded_bytes, send_x
from moesaic.kernels.fused_protocol import (
    DOWN,
    NONE,
    NUMBERS,
    ORIGIN,
    ROWS,
    SLOT_GRADS,
    UP,
    WEIGHT,
    address,
    begins,
    count_bytes,
    finish,
    once,
    record,
    tables_size,
    wait_rows,
)
from moesaic.kernels.fused_tasks import (
    begin,
    begin_dispatch,
    combine,
    end_dispatch,
    row_return,
    rows_of,
    take,
)
from moesaic.kernels.interpret import jit
from moesaic.kernels.permute import Rows


@functools.partial(jit, any_value=ANY)
def _carry_kernel(
    x_TD, numbers_T, source_S, expert_S, bag, starts, weights_S, counts_E, table, tables, sent_WP, me, call, TILES, spins,
    programs, first, K: tl.constexpr, D: tl.constexpr, W: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BW: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, ONCE: tl.constexpr, TRACE: tl.constexpr, AMD: tl.constexpr, CODE: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
):  # fmt: skip
    """counts_E: None where `tables` are those of an earlier launch with the same slots."""
    TYPE: tl.constexpr = x_TD.dtype.element_ty
    X_BYTES: tl.constexpr = D * (TYPE.primitive_bitwidth // 8) if CODE is None else D + (D + 127) // 128
    run, control, task, alive, sending, tiles = begin(
        counts_E, table, tables, sent_WP, me, call, TILES, spins, first, W, E, BE, BW, BM, TRACE, AMD, N_PHASES
    )
    arriving = 1 + sending
    end_of_queue = arriving + tiles
    while (task < end_of_queue) & (alive != 0):
        if task < arriving:
            owner, tile, rows, real, slot, token, holder, carried = begin_dispatch(
                task, source_S, expert_S, bag, starts, K, tables, run, W, E, BE, BM, ONCE, TRACE
            )
            send_x(x_TD, token, address(table, ROWS, owner, W, TYPE), rows, carried, D, BM, BK, CODE)
            if weights_S is not None:
                weight = tl.load(weights_S + slot, mask=real, other=0.0)
                tl.store(address(table, WEIGHT, owner, W, tl.float32) + rows, weight, mask=real)
            if numbers_T is not None:
                number = tl.load(numbers_T + token, mask=real, other=0)
                tl.store(address(table, NUMBERS, owner, W, tl.int64) + rows, number, mask=real)
            end_dispatch(
                owner, tile, rows, real, slot, holder, carried, X_BYTES, SLOT_BYTES, sent_WP, run, W, TRACE, N_PHASES
            )
        else:
            tile = task - arriving
            record(0, -1, task, -1, UP, once(), run, W, TRACE)
            fine, _, _, _ = wait_rows(tile, tables, run, W, E, BE, BW, BM, ONCE, TRACE)
            alive = fine.to(tl.int32)
            if fine:
                record(1, tile, 0, -1, UP, once(), run, W, TRACE)
        task = take(control)
    record(0, -1, task, -1, NONE, once(), run, W, TRACE)
    finish(run, programs, W, TRACE)


@jit
def rows_before(j, tables, W: tl.constexpr, E: tl.constexpr, BE: tl.constexpr):
    """Of this rank's expert j: what to add to a row's place to have its number among those that came."""
    i = tl.arange(0, BE)
    begin = begins(tables, E) + i * (W + 1)
    rows = tl.load(begin + W, mask=i < j, other=0) - tl.load(begin, mask=i < j, other=0)
    return tl.sum(rows, axis=0) - tl.load(begins(tables, E) + j * (W + 1))


@functools.partial(jit, any_value=ANY)
def _give_back_kernel(
    y_ND, dweights_N, expert_S, bag, starts, to_TD, dweights_S, table, tables, sent_WP, T, me, call, TILES, spins, programs,
    first, K: tl.constexpr, D: tl.constexpr, W: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, TRACE: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = y_ND.dtype.element_ty
    SIZE: tl.constexpr = TYPE.primitive_bitwidth // 8
    NT: tl.constexpr = (D + BN - 1) // BN
    run, control, task, alive, _, tiles = begin(
        None, table, tables, sent_WP, me, call, TILES, spins, first, W, E, BE, BW, BM, TRACE, AMD, N_PHASES
    )
    combining = 1 + tiles * NT
    end_of_queue = combining + tl.cdiv(T, BT) * NT
    while (task < end_of_queue) & (alive != 0):
        if task < combining:
            tile, column = (task - 1) // NT, (task - 1) % NT
            record(0, -1, task, -1, DOWN, once(), run, W, TRACE)
            j, rank, rows_of_rank, end, rows = rows_of(tile, tables, W, E, BE, BW, BM)
            record(1, tile, column, -1, DOWN, once(), run, W, TRACE)
            number = rows + rows_before(j, tables, W, E, BE)
            real = tile * BM + tl.arange(0, BM) < end
            ns = column * BN + tl.arange(0, BN)
            mask = real[:, None] if D % BN == 0 else real[:, None] & (ns < D)[None, :]
            values = tl.load(y_ND + number[:, None] * D + ns[None, :], mask=mask, other=0.0)
            if dweights_N is not None:  # noqa: SIM102 - the compiler decides this one, the kernel the next
                if column == 0:
                    origin = tl.load(address(table, ORIGIN, me, W, tl.int64) + rows, cache_modifier=".cg")
                    to = address(table, SLOT_GRADS, origin >> 32, W, tl.float32) + (origin & 4294967295)
                    tl.store(to, tl.load(dweights_N + number, mask=real, other=0.0), mask=real)
                    count_bytes(sent_WP, rank, 3, rows_of_rank * 4, (rows_of_rank > 0) & (rank != me), N_PHASES)
            row_return(
                values, tile, column, end, rank, rows_of_rank, sent_WP, SIZE, TILES, run, NT, D, W, BM, BN, TRACE, N_PHASES, TYPE,
            )  # fmt: skip
        else:
            alive = combine(
                task, task - combining, to_TD, None, dweights_S, expert_S, bag, starts, K, T, tables, TILES, run, D, NT, W, E, BW,
                BM, BN, BT, TRACE,
            )  # fmt: skip
        task = take(control)
    record(0, -1, task, -1, NONE, once(), run, W, TRACE)
    finish(run, programs, W, TRACE)


# ---------------------------------------------------------------- launchers


def per_token(rows: Rows) -> int:
    return rows.bag.shape[1] if rows.starts is None else 0


def options_of(setting: Setting, x: Tensor, *unused: str) -> dict[str, Any]:
    """Of the fused kernels, without those of products."""
    options = fused_options(setting, x)
    return {name: value for name, value in options.items() if name not in ("PRECISION", "WAVE", *unused)}


def carry(
    x_TD: Tensor, rows: Rows, setting: Setting, sent_WP: Tensor, call: int, weights_S: Tensor | None = None,
    numbers_T: Tensor | None = None, tables: Tensor | None = None, coded: bool = False, first: int = 0, grid: int | None = None,
) -> Tensor:  # fmt: skip
    """X to the ranks of its experts, `rows` being sorted by all E experts; returns the tables of what goes where, or `tables`,
    those of an earlier launch with the same rows. Every rank of the group calls it; `arrived` has the rows then.

    x_TD of the heap's type; coded: its rows travel as fp8 codes with scales. weights_S, fp32, and numbers_T, int64, travel with
    the slots. The others as for moesaic.kernels.fused_ep.forward.
    """
    heap, d = setting.heap, x_TD.shape[1]
    (capacity, width), dtype = heap.regions["rows"]
    assert x_TD.is_contiguous() and (x_TD.dtype, d) == (dtype, width), (x_TD.dtype, x_TD.shape)
    assert setting.experts == rows.counts_E.numel(), (setting.experts, rows.counts_E.shape)
    options = options_of(setting, x_TD, "BN")
    counts = None
    if tables is None:
        counts = rows.counts_E
        tables = torch.empty(tables_size(heap.ranks, setting.experts), dtype=torch.int32, device=x_TD.device)
    slot_bytes = 12 + 4 * (weights_S is not None) + 8 * (numbers_T is not None)
    _carry_kernel[(grid or setting.programs,)](
        x_TD, numbers_T, rows.source_R, rows.expert_R, rows.bag, rows.starts, weights_S, counts, heap.table, tables, sent_WP,
        heap.rank, call, capacity // options["BM"], setting.spins, setting.programs, first, K=per_token(rows), D=d,
        CODE=code_type(x_TD.device) if coded else None, SLOT_BYTES=slot_bytes, **options,
    )  # fmt: skip
    return tables


def give_back(
    y_ND: Tensor, rows: Rows, tokens: int, setting: Setting, tables: Tensor, sent_WP: Tensor, call: int,
    dweights_N: Tensor | None = None, first: int = 0, grid: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(the sum of each token's rows, (T, D); with dweights_N, fp32, those of its slots) of what `carry` brought last, which no
    other launch on the heap may follow before this one. Every rank of the group calls it."""
    heap, d = setting.heap, y_ND.shape[1]
    (capacity, width), dtype = heap.regions["rows"]
    assert y_ND.is_contiguous() and (y_ND.dtype, d) == (dtype, width), (y_ND.dtype, y_ND.shape)
    options = options_of(setting, y_ND, "BK", "ONCE")
    m, nt = options["BM"], columns(d, options["BN"])
    assert nt <= heap.regions["back"][0][2], heap.regions
    to_TD = y_ND.new_empty(tokens, d)
    dweights_S = None if dweights_N is None else dweights_N.new_zeros(rows.source_R.numel())  # unused slots have none
    _give_back_kernel[(grid or setting.programs,)](
        y_ND, dweights_N, rows.expert_R, rows.bag, rows.starts, to_TD, dweights_S, heap.table, tables, sent_WP, tokens, heap.rank,
        call, capacity // m, setting.spins, setting.programs, first, K=per_token(rows), D=d, BT=m, **options,
    )  # fmt: skip
    return to_TD, dweights_S


class Arrived(NamedTuple):
    """rows: of the N rows that came, sorted by this rank's experts, each an input by itself. holder_N: where the values of each
    are in the heap, of a token once for all its experts here. place_N: where its weight and number are."""

    rows: Rows
    holder_N: Tensor
    place_N: Tensor

    def of(self, setting: Setting, region: str) -> Tensor:
        return setting.heap.view(region).index_select(0, self.place_N)


def values_of(setting: Setting, holder_N: Tensor, coded: bool = False) -> Tensor:
    """(N, D), of rows that came; coded: uint8 (N, `coded_bytes`), codes and scales."""
    region, width = setting.heap.view("rows"), setting.heap.regions["rows"][0][1]
    if coded:
        region = region.view(torch.uint8)[:, : coded_bytes(width)]
    return region.index_select(0, holder_N)


def arrived(setting: Setting, tables: Tensor, look: Callable[[], None] = lambda: None) -> Arrived:
    """Which rows `carry` brought. The host waits for their number; then look() may raise, before anything is believed."""
    heap, e = setting.heap, setting.experts // setting.heap.ranks
    begin_eW = tables[3 + 4 * setting.experts :].view(e, heap.ranks + 1)
    begin_e, counts_e = begin_eW[:, 0].long(), (begin_eW[:, -1] - begin_eW[:, 0]).long()
    n = int(counts_e.sum())
    look()
    expert_N = torch.arange(e, device=tables.device).repeat_interleave(counts_e, output_size=n)
    number_N = torch.arange(n, device=tables.device)
    place_N = number_N + (begin_e - counts_e.cumsum(0) + counts_e)[expert_N]
    holder_N = heap.view("alias").index_select(0, place_N).long()
    return Arrived(Rows(number_N, number_N, expert_N, number_N[:, None], None, counts_e), holder_N, place_N)


# ---------------------------------------------------------------- ahead of time


def compile_cases(target: str) -> Any:
    """What moesaic.kernels.targets compiles, of a layer of 64 experts on 8 ranks."""

    def case(dtype: torch.dtype, once: bool, coded: bool, back: bool, ragged: bool = False) -> None:
        setting, given = compile_setting(target, 2048, 1024, dtype, once, "rows" if coded else "high", ragged=ragged)
        x, rows, sent, weights = (given[name] for name in ("x", "rows", "sent", "weights"))
        numbers = torch.empty(x.shape[0], dtype=torch.int64, device="meta")
        came = given["h"].new_empty(weights.numel(), x.shape[1])
        if back:
            carry(x, rows, setting, sent, 1, tables=given["tables"])
            give_back(came, rows, x.shape[0], setting, given["tables"], sent, 1, weights)
        else:
            carry(x, rows, setting, sent, 0, weights, numbers, coded=coded)
            give_back(came, rows, x.shape[0], setting, given["tables"], sent, 0)

    cases = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        cases[f"D 2048, {name}"] = functools.partial(case, dtype, True, False, False)
        cases[f"D 2048, {name}, gradients"] = functools.partial(case, dtype, True, False, True)
    cases["D 2048, bf16, fp8 rows"] = functools.partial(case, torch.bfloat16, True, True, False)
    cases["D 2048, bf16, every row"] = functools.partial(case, torch.bfloat16, False, False, False)
    cases["D 2048, bf16, any slots a token"] = functools.partial(case, torch.bfloat16, True, False, False, True)
    return cases
