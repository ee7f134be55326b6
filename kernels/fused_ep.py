"""Dispatch, experts and combine of a layer whose experts live on several ranks: one persistent kernel, one launch.

    for slot s of a token and expert x, sorted by expert, of every source rank:
      dispatch    row of x's owner = X[token of s]                     stored into the owner's memory
      up          h = W_up[x] row;  a = act(h)                         h is kept for backward
      down        slots of the source[s] = W_down[x] a                 stored into the source's memory
      combine     y[t] = sum over the slots of token t, in slot order, of weight[s] * slots[s]

Programs take tasks from one queue, in that order, and wait for each other by flags: docs/fused.md has the protocol. What both
kernels do alike is in fused_tasks.py, biases are in fused_bias.py. Products and epilogues are those of grouped_gemm.py and
experts.py, which read operands by `load_rows` and `multiply`. Rows that arrive during the launch are read through pointers
alone, weights also by TMA. No gradient path here: moesaic.parallel.fused.

Bytes that go to other ranks are counted by (rank, phase), `PHASES`: what the profiler reads.

Letters: T tokens, D model width, F expert width, G width of h, E experts in all, e on a rank, W ranks, S slots, R rows there is
room for on a rank, P phases.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.experts import store_activated
from moesaic.kernels.fused_bias import with_bias
from moesaic.kernels.fused_low import (
    BLOCK,
    Low,
    cast_by_weight,
    code_type,
    compiled,
    keep_x,
    kept_bytes,
    meta_low,
    new_kept,
    scales_low,
    send_x,
    up_product,
)
from moesaic.kernels.fused_protocol import (
    NONE,
    ROWS,
    UP,
    address,
    finish,
    once,
    record,
    regions,
    tables_size,
    wait_rows,
)
from moesaic.kernels.fused_tasks import (
    begin,
    begin_dispatch,
    begin_down,
    combine,
    end_dispatch,
    raise_ready,
    row_return,
    rows_by_expert,
    rows_of,
    take,
    wave_task,
)
from moesaic.kernels.grouped_gemm import all_registers, describe, launch_options
from moesaic.kernels.interpret import jit
from moesaic.kernels.permute import Rows
from moesaic.kernels.scaled_gemm import e4m3
from moesaic.kernels.symmetric import Heap, starts
from moesaic.kernels.tiles import Tile, fused_tile, processors, target_name

# Of the byte counters: per-expert counts; row values; origin, alias and weight of rows; returned rows (backward: and dS); flags.
PHASES = ("counts", "dispatch", "slots", "combine", "flags")
N_PHASES = tl.constexpr(len(PHASES))


# ---------------------------------------------------------------- the kernel


# A code of its own for a rank or layer of number 0, 1 or 16 would have others wait in their kernels while it is compiled.
ANY = ("T", "me", "call", "TILES", "spins", "programs", "first")


@functools.partial(jit, any_value=ANY)
def _fused_forward_kernel(
    x_TD, w_up, w_down, up_scales, down_scales, a_scales_RB, source_S, expert_S, bag, starts, weights_S, counts_E, h_RG, a_RF,
    kept_RD, y_TD, table, tables, sent_WP, b_up, b_down, shared_up, shared_down, T, me, call, TILES, spins, programs, first,
    K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    E: tl.constexpr, BE: tl.constexpr, BW: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BT: tl.constexpr, WAVE: tl.constexpr, KIND: tl.constexpr, PAIR: tl.constexpr, ONCE: tl.constexpr,
    UP_DESCRIBED: tl.constexpr, DOWN_DESCRIBED: tl.constexpr, EVEN_D: tl.constexpr, EVEN_F: tl.constexpr,
    PRECISION: tl.constexpr, TRACE: tl.constexpr, AMD: tl.constexpr, CODE: tl.constexpr, KEPT: tl.constexpr,
    SHARED: tl.constexpr, SHARED_UP_DESCRIBED: tl.constexpr, SHARED_DOWN_DESCRIBED: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = x_TD.dtype.element_ty
    SIZE: tl.constexpr = TYPE.primitive_bitwidth // 8
    X_BYTES: tl.constexpr = D * SIZE if CODE is None else D + (D + 127) // 128
    BU: tl.constexpr = BN // 2 if PAIR else BN
    FT: tl.constexpr = (F + BU - 1) // BU
    NT: tl.constexpr = (D + BN - 1) // BN
    run, control, task, alive, sending, tiles = begin(
        counts_E, table, tables, sent_WP, me, call, TILES, spins, first, W, E, BE, BW, BM, TRACE, AMD, N_PHASES
    )
    up_down = 1 + sending
    combining = up_down + tiles * (FT + NT)
    end_of_queue = combining + tl.cdiv(T, BT) * NT
    while (task < end_of_queue) & (alive != 0):
        if task < up_down:
            owner, tile, rows, real, slot, token, holder, carried = begin_dispatch(
                task, source_S, expert_S, bag, starts, K, tables, run, W, E, BE, BM, ONCE, TRACE
            )
            send_x(x_TD, token, address(table, ROWS, owner, W, TYPE), rows, carried, D, BM, BK, CODE)
            end_dispatch(owner, tile, rows, real, slot, holder, carried, X_BYTES, 12, sent_WP, run, W, TRACE, N_PHASES)
        elif task < combining:
            is_up, tile, column = wave_task(task - up_down, tiles, FT, NT, WAVE)
            if is_up:
                record(0, -1, task, -1, UP, once(), run, W, TRACE)
                fine, j, holder, end = wait_rows(tile, tables, run, W, E, BE, BW, BM, ONCE, TRACE)
                alive = fine.to(tl.int32)
                if fine:
                    record(1, tile, column, -1, UP, once(), run, W, TRACE)
                    rows_RD = address(table, ROWS, me, W, TYPE)
                    f = column * BU
                    gate_MN, up_MN = up_product(
                        rows_RD, holder, w_up, shared_up, up_scales, j, f, F + f, G, D, F, SHARED, BM, BU, BK, PAIR,
                        UP_DESCRIBED, SHARED_UP_DESCRIBED, EVEN_D, PRECISION, CODE,
                    )  # fmt: skip
                    rows = (tile * BM + tl.arange(0, BM)).to(tl.int64)
                    fs = f + tl.arange(0, BU)
                    if b_up is not None:
                        gate_MN = with_bias(gate_MN, b_up, j, fs, 0, F, G)
                        if PAIR:
                            up_MN = with_bias(up_MN, b_up, j, fs, F, F, G)
                    exists = (rows < end)[:, None] if F % BU == 0 else (rows < end)[:, None] & (fs < F)[None, :]
                    if kept_RD is not None:  # noqa: SIM102 - the compiler decides this one, the kernel the next
                        if column == 0:
                            keep_x(rows_RD, holder, kept_RD, rows, rows < end, D, KEPT, BM, BK, CODE)
                    store_activated(gate_MN, up_MN, h_RG, a_RF, rows, exists, fs, F, G, KIND, PAIR)
                    raise_ready(tile, column, FT, run, W, TRACE)
            else:
                fine = begin_down(task, tile, column, FT, run, W, BW, BF, TRACE)
                alive = fine.to(tl.int32)
                if fine:
                    j, rank, rows_of_rank, end, rows = rows_of(tile, tables, W, E, BE, BW, BM)
                    a_M1 = a_RF + rows[:, None] * F
                    if down_scales is None:
                        y_MN, _ = rows_by_expert(
                            a_M1, w_down, shared_down, j, column * BN, column * BN, D, F, D * F, F, SHARED, BM, BN, BK, False,
                            False, DOWN_DESCRIBED, SHARED_DOWN_DESCRIBED, EVEN_F, PRECISION,
                        )  # fmt: skip
                    else:
                        keep_M1 = (tile * BM + tl.arange(0, BM) < end)[:, None] & (column == 0)
                        y_MN = cast_by_weight(
                            a_M1, a_scales_RB + rows[:, None] * ((F + 127) // 128), keep_M1, w_down, down_scales, j, column * BN,
                            D, F, BM, BN, DOWN_DESCRIBED, CODE,
                        )  # fmt: skip
                    if b_down is not None:
                        y_MN = with_bias(y_MN, b_down, j, column * BN + tl.arange(0, BN), 0, D, D)
                    row_return(
                        y_MN, tile, column, end, rank, rows_of_rank, sent_WP, SIZE, TILES, run, NT, D, W, BM, BN, TRACE,
                        N_PHASES, TYPE,
                    )  # fmt: skip
        else:
            alive = combine(
                task, task - combining, y_TD, weights_S, None, expert_S, bag, starts, K, T, tables, TILES, run, D, NT, W, E, BW,
                BM, BN, BT, TRACE,
            )  # fmt: skip
        task = take(control)
    record(0, -1, task, -1, NONE, once(), run, W, TRACE)
    finish(run, programs, W, TRACE)


# ---------------------------------------------------------------- launcher

Pair = tuple[Tensor, Tensor]  # w_up and w_down of some experts


@dataclass(frozen=True)
class Setting:
    """What launches of a path share. tile: of the products; m rows a row tile. once: a row crosses once to a rank, however many
    of its experts it visits there. spins: polls of a wait before it gives up. programs: of the grid, at most. wave: row tiles
    whose down tasks follow their up tasks."""

    heap: Heap
    experts: int
    tile: Tile
    once: bool = True
    spins: int = 1_000_000
    programs: int = 1
    wave: int = 32
    trace: int = 0


def room(ranks: int, experts: int, rows: int, m: int) -> int:
    """Row tiles that `rows` rows on a rank may take: the last tile of each expert may be cut short."""
    return rows // m + experts // ranks


def grid_programs(device: torch.device, spared: int) -> int:
    """Programs of the persistent grid: one for each multiprocessor, which their registers fill, but `spared`, which collectives
    of other streams need. Raises ValueError where none is left."""
    if device.type == "cpu":
        return 1  # the interpreter runs them one after another
    have = processors(device)
    if spared >= have:
        raise ValueError(f"parallel.comm_sms={spared}: must be below the multiprocessors of the device, {have}")
    return have - spared


def fused_options(setting: Setting, x: Tensor, *weights: Tensor) -> dict[str, Any]:
    heap, (_, shared) = setting.heap, launch_options(setting.tile, x, *weights)
    options = {name: shared[name] for name in ("BM", "BN", "BK", "PRECISION", "num_warps", "num_stages")}
    assert options["BM"] == setting.tile.m
    target = target_name(x.device)
    amd = target.startswith("gfx")
    if amd:  # two waves a SIMD: for a third, the compiler would put registers into memory
        options["waves_per_eu"] = 2
    options |= all_registers(target)
    return options | {
        "W": heap.ranks, "E": setting.experts, "BE": triton.next_power_of_2(setting.experts),
        "BW": triton.next_power_of_2(heap.ranks), "WAVE": setting.wave, "ONCE": setting.once, "TRACE": setting.trace,
        "AMD": amd,
    }  # fmt: skip


def n_shared(shared: Pair | None) -> int:
    return 0 if shared is None else shared[0].shape[0]


def describe_experts(
    weights: Pair, shared: Pair | None, up_block: tuple[int, int], down_block: tuple[int, int]
) -> tuple[tuple[Any, Any], tuple[Any, Any], dict[str, Any]]:
    """(the weights as kernels take them, those of shared experts, what kernels are told of them)."""
    # With descriptors, shared experts have a loop of their own in each product, for which registers don't suffice in fp32.
    plain = shared is not None and weights[0].element_size() == 4
    blocks = (up_block, down_block)
    found: list[list[tuple[Any, bool]]] = [
        [
            (None, False) if w is None else (w, False) if plain else describe(w, *block)
            for w, block in zip(pair, blocks, strict=True)
        ]
        for pair in (weights, shared or (None, None))
    ]
    (up, down), (shared_up, shared_down) = found
    told = {
        "UP_DESCRIBED": up[1], "DOWN_DESCRIBED": down[1], "SHARED": n_shared(shared), "SHARED_UP_DESCRIBED": shared_up[1],
        "SHARED_DOWN_DESCRIBED": shared_down[1],
    }  # fmt: skip
    return (up[0], down[0]), (shared_up[0], shared_down[0]), told


def columns(width: int, n: int, pair: bool = False) -> int:
    """Column tiles of a result, n wide, or half of it for each of a pair."""
    return triton.cdiv(width, n // 2 if pair else n)


def most_columns(width: int, tile: Tile, pair: bool = False) -> int:
    """The most there can be: `launch_options` narrows tiles of rows that don't begin at multiples of 16 bytes."""
    return columns(width, min(tile.n, 64), pair)


def forward(
    x_TD: Tensor, weights_S: Tensor, w_up_eGD: Tensor, w_down_eDF: Tensor, rows: Rows, activation: str, setting: Setting,
    sent_WP: Tensor, keep: bool = False, call: int = 0, first: int = 0, grid: int | None = None, coded: bool = False,
    low: Low | None = None, b_up: Tensor | None = None, b_down: Tensor | None = None, shared: Pair | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(y_TD, h_RG, tables, the rows that came, if `keep`). Every rank of the group calls it, with its tokens and its experts;
    rows are sorted by all E experts.

    x_TD and weights of one type, bf16, fp16 or fp32, as the heap's; weights_S fp32, int64 sent_WP, to which bytes are added.
    `call` numbers what the ranks call, which must be the same on all of them: twice the layer's number, and 1 for backward.
    `first` and `grid`, for tests: run `grid` of the setting's programs, from that number on. Whether it went well, the heap's
    `failed` says.

    coded: rows of x travel as fp8 codes with scales, and those that came are uint8 (R, `kept_bytes`). low: and products are of
    fp8; weights are codes then, of the type `scaled_gemm.e4m3`.

    shared: the matrices of this rank's first experts, those of w_up and w_down being the others; not with coded rows. Biases are
    of all of them.
    """
    heap, pair, (n_experts, g, d), f = setting.heap, activation != "relu2", w_up_eGD.shape, w_down_eDF.shape[2]
    n_experts += n_shared(shared)
    (capacity, width), dtype = heap.regions["rows"]
    weight_type = dtype if low is None else e4m3(x_TD.device)
    assert x_TD.dtype == dtype and weight_type == w_up_eGD.dtype == w_down_eDF.dtype, (x_TD.dtype, w_up_eGD.dtype)
    assert width == d and (coded or low is None) and not (coded and shared), (width, d, coded)
    assert x_TD.is_contiguous() and w_up_eGD.is_contiguous() and w_down_eDF.is_contiguous()
    assert n_experts * heap.ranks == setting.experts == rows.counts_E.numel(), (n_experts, setting.experts)
    options = fused_options(setting, x_TD, w_up_eGD, w_down_eDF, *(shared or ()))
    bn, bk, m = options["BN"], options["BK"], options["BM"]
    depth = bk if low is None else BLOCK
    up_block, down_block = (bn // 2 if pair else bn, depth), (bn, depth)
    weights, shared_weights, described = describe_experts((w_up_eGD, w_down_eDF), shared, up_block, down_block)
    assert columns(d, bn) <= heap.regions["back"][0][2] and columns(f, bn, pair) <= heap.regions["ready"][0][1], (
        heap.regions
    )
    h_RG, a_RF = x_TD.new_empty(capacity, g), x_TD.new_empty(capacity, f)
    y_TD, kept_RD = torch.empty_like(x_TD), new_kept(x_TD, capacity, coded) if keep else None
    tables = torch.empty(tables_size(heap.ranks, setting.experts), dtype=torch.int32, device=x_TD.device)
    k = rows.bag.shape[1] if rows.starts is None else 0
    _fused_forward_kernel[(grid or setting.programs,)](
        x_TD, *weights, *scales_low(low), rows.source_R, rows.expert_R, rows.bag, rows.starts, weights_S, rows.counts_E,
        h_RG, a_RF, kept_RD, y_TD, heap.table, tables, sent_WP, b_up, b_down, *shared_weights,
        x_TD.shape[0], heap.rank, call, capacity // m, setting.spins, setting.programs, first,
        K=k, D=d, F=f, G=g, BF=triton.next_power_of_2(columns(f, bn, pair)), BT=m, KIND=activation, PAIR=pair,
        EVEN_D=d % bk == 0, EVEN_F=f % bk == 0,
        CODE=code_type(x_TD.device) if coded else None, KEPT=kept_bytes(d), **described, **options,
    )  # fmt: skip
    return y_TD, h_RG, tables, kept_RD


# ---------------------------------------------------------------- ahead of time


def compile_setting(
    target: str, d: int, f: int, dtype: torch.dtype, once: bool, mode: str, n: int = 0, ragged: bool = False
) -> tuple[Setting, dict[str, Any]]:
    """A setting of 8 ranks and 64 experts, and what a rank of them has, on the meta device. mode: high, or what is of fp8: rows,
    or products too; or one of the former beside products of other layers, which decide the tile. n: shared experts. ragged:
    where tokens have any number of slots."""
    from moesaic.kernels.targets import meta

    ranks, tokens, k, tile = 8, 4096, 8, fused_tile(target, "products" in mode)
    e, n_experts = 8, (8 + n) * ranks
    tiles = room(ranks, n_experts, 2 * tokens * k, tile.m)
    shapes = regions(
        ranks, n_experts, d, dtype, tokens * k, tiles, tile.m, most_columns(d, tile), most_columns(f, tile, True), True
    )
    table = meta(len(shapes), ranks, dtype=torch.int64)
    heap = Heap(0, ranks, shapes, meta(starts(shapes)[1], dtype=torch.uint8), [], table)
    index, rows_R = meta(tokens * k, dtype=torch.int64), tiles * tile.m
    bag, begins = (index, meta(tokens + 1, dtype=torch.int64)) if ragged else (meta(tokens, k, dtype=torch.int64), None)
    rows = Rows(index, index, index, bag, begins, meta(n_experts, dtype=torch.int64))
    coded, x = not mode.startswith("high"), meta(tokens, d, dtype=dtype)
    low = meta_low(e, d, f, rows_R) if mode == "products" else None
    weight = dtype if low is None else e4m3(x.device)
    return Setting(heap, n_experts, tile, once, programs=100), {
        "x": x, "weights": meta(tokens * k, dtype=torch.float32), "rows": rows,
        "up": meta(e, 2 * f, d, dtype=weight), "down": meta(e, d, f, dtype=weight), "sent": meta(ranks, len(PHASES),
        dtype=torch.int64), "h": meta(rows_R, 2 * f, dtype=dtype), "kept": new_kept(x, rows_R, coded),
        "tables": meta(tables_size(ranks, n_experts), dtype=torch.int32), "coded": coded, "low": low,
        "biases": {"b_up": meta(e, 2 * f, dtype=dtype), "b_down": meta(e, d, dtype=dtype)},
        "shared": (meta(n, 2 * f, d, dtype=dtype), meta(n, d, f, dtype=dtype)) if n else None,
    }  # fmt: skip


def fused_cases(
    target: str, launch: Callable[[Setting, dict[str, Any], bool, bool], object]
) -> dict[str, Callable[[], None]]:
    """Cases of a kernel of the fused path: launch(setting, what `compile_setting` gives, once, with biases)."""

    def case(
        d: int, f: int, dtype: torch.dtype, once: bool, mode: str, biased: bool = False, n: int = 0, ragged: bool = False
    ) -> None:  # fmt: skip
        launch(*compile_setting(target, d, f, dtype, once, mode, n, ragged), once, biased)

    tables = compiled(target)
    cases: dict[str, Callable[[], None]] = {name: functools.partial(case, *sizes) for name, sizes in tables.items()}
    name, sizes = next(iter(tables.items()))
    cases[f"{name}, biases"] = functools.partial(case, *sizes, True)
    for name, sizes in tables.items():
        if sizes[-1] == "high":
            cases[f"{name}, 2 shared experts"] = functools.partial(case, *sizes, n=2)
        if "beside" not in sizes[-1]:
            cases[f"{name}, any slots a token"] = functools.partial(case, *sizes, ragged=True)
    return cases


def compile_cases(target: str) -> Any:
    """What moesaic.kernels.targets compiles, of a layer of 64 experts on 8 ranks."""

    def launch(setting: Setting, g: dict[str, Any], once: bool, biased: bool) -> None:
        rest = dict(
            keep=not once, coded=g["coded"], low=g["low"], shared=g["shared"], **(g["biases"] if biased else {})
        )
        forward(g["x"], g["weights"], g["up"], g["down"], g["rows"], "swiglu", setting, g["sent"], **rest)

    return fused_cases(target, launch)
