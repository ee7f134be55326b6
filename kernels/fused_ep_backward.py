"""Backward of moesaic.kernels.fused_ep: one persistent kernel, one launch, the same queue and flags.

    dispatch    row of x's owner = dO[token of s], and X[token of s] again, unless forward kept the rows that came
    up          da = W_down[x]^T row;  a again from h;  a' = weight a;  dh = act'(h) weight da;  parts of dS = <da, a>
    down        slots of the source[s] = W_up[x]^T dh;  dS[s], the sum of its parts, to the source too
    weight      dW_down[x] = sum over its rows of dO a'^T;  dW_up[x] = sum of dh X^T       in the order of rows
    combine     dX[t] = sum over the slots of token t, in slot order, of slots[s]

Where rows go was decided in forward, whose tables are kept. Letters as there.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.experts import dact_quarters
from moesaic.kernels.fused_bias import bias_scores, bias_sums
from moesaic.kernels.fused_ep import (
    ANY,
    N_PHASES,
    Pair,
    Setting,
    describe_experts,
    fused_cases,
    fused_options,
    n_shared,
)
from moesaic.kernels.fused_low import (
    BLOCK,
    Low,
    cast_by_weight,
    cast_weight_tile,
    code_type,
    decoded_weight_tile,
    kept_bytes,
    scales_low,
    send_rows,
    send_x,
    transposed,
)
from moesaic.kernels.fused_protocol import (
    AGAIN,
    ALIAS,
    NONE,
    ORIGIN,
    ROWS,
    SLOT_GRADS,
    UP,
    WEIGHT,
    WEIGHTS,
    address,
    begins,
    count_bytes,
    finish,
    once,
    record,
    tile_ends,
    wait_ready,
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
from moesaic.kernels.interpret import jit
from moesaic.kernels.permute import Rows


@jit
def _rows_of(holder_R, start, r, count, BK: tl.constexpr, ONCE: tl.constexpr):
    """(BK rows of an expert from its r-th on, which exist, the places that hold their values)."""
    row = r + tl.arange(0, BK)
    real = row < count
    row = start + tl.where(real, row, 0)
    holder = tl.load(holder_R + row, cache_modifier=".cg") if ONCE else row
    return row.to(tl.int64), real, holder.to(tl.int64)


@jit
def weight_tile(
    left, right, out, holder_R, start, count, p, q, P: tl.constexpr, Q: tl.constexpr,
    LEFT_HELD: tl.constexpr, RIGHT_HELD: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ONCE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BP x BN of an expert's sum over rows of left^T right, of P and Q columns; of which one is read through `holder_R`."""
    ps, qs = p * BP + tl.arange(0, BP), q * BN + tl.arange(0, BN)
    acc = tl.zeros([BP, BN], tl.float32)
    for r in range(0, count, BK):
        row, real, holder = _rows_of(holder_R, start, r, count, BK, ONCE)
        l_row, r_row = holder if LEFT_HELD else row, holder if RIGHT_HELD else row
        l_mask = real[:, None] if P % BP == 0 else real[:, None] & (ps < P)[None, :]
        r_mask = real[:, None] if Q % BN == 0 else real[:, None] & (qs < Q)[None, :]
        l_KP = tl.load(left + l_row[:, None] * P + ps[None, :], mask=l_mask, other=0.0)
        r_KN = tl.load(right + r_row[:, None] * Q + qs[None, :], mask=r_mask, other=0.0)
        acc = tl.dot(l_KP.T, r_KN, acc, input_precision=PRECISION)
    to = out + ps.to(tl.int64)[:, None] * Q + qs[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(ps < P)[:, None] & (qs < Q)[None, :])


@jit
def return_grads(parts_RP, more_M, tile, end, FT, run, W: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr):
    """dS of a tile's rows, the sum of its parts and of `more_M`, to their sources."""
    table, me, _, _, _, _ = run
    place = tile * BM + tl.arange(0, BM)
    f = tl.arange(0, BF)
    real = place < end
    mask = real[:, None] & (f < FT)[None, :]
    parts = tl.load(
        parts_RP + place.to(tl.int64)[:, None] * FT + f[None, :], mask=mask, other=0.0, cache_modifier=".cg"
    )
    origin = tl.load(address(table, ORIGIN, me, W, tl.int64) + tl.minimum(place, end - 1), cache_modifier=".cg")
    to = address(table, SLOT_GRADS, origin >> 32, W, tl.float32) + (origin & 4294967295)
    tl.store(to, tl.sum(parts, axis=1) + more_M, mask=real)


@functools.partial(jit, any_value=ANY)
def _fused_backward_kernel(
    dy_TD, x_TD, w_up, w_down, up_scales, down_scales, a_scales_RB, h_RG, kept_RD, source_S, expert_S, bag, starts, weights_S,
    counts_E, dh_RG, a_RF, parts_RP, dx_TD, dweights_S, dw_up, dw_down, table, tables, sent_WP,
    b_down, db_up, db_down, shared_up, shared_down, T, me, call, TILES, spins, programs, first,
    K: tl.constexpr, D: tl.constexpr, F: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    E: tl.constexpr, BE: tl.constexpr, BW: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr, WAVE: tl.constexpr,
    KIND: tl.constexpr, PAIR: tl.constexpr, ONCE: tl.constexpr, UP_DESCRIBED: tl.constexpr, DOWN_DESCRIBED: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_G: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, TRACE: tl.constexpr,
    AMD: tl.constexpr, CODE: tl.constexpr, KEPT: tl.constexpr, SHARED: tl.constexpr, SHARED_UP_DESCRIBED: tl.constexpr,
    SHARED_DOWN_DESCRIBED: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = x_TD.dtype.element_ty
    SIZE: tl.constexpr = TYPE.primitive_bitwidth // 8
    LOW: tl.constexpr = up_scales is not None
    X_BYTES: tl.constexpr = 0 if kept_RD is not None else D * SIZE if CODE is None else D + (D + 127) // 128
    e: tl.constexpr = E // W
    FT: tl.constexpr = (F + BN - 1) // BN
    NT: tl.constexpr = (D + BN - 1) // BN
    run, control, task, alive, sending, tiles = begin(
        None, table, tables, sent_WP, me, call, TILES, spins, first, W, E, BE, BW, BM, TRACE, AMD, N_PHASES
    )
    FQ: tl.constexpr = (F + BQ - 1) // BQ  # tiles of dW_down and dW_up, BP x BQ
    DQ: tl.constexpr = (D + BQ - 1) // BQ
    down_tiles: tl.constexpr = (D + BP - 1) // BP * FQ
    of_expert: tl.constexpr = down_tiles + (G + BP - 1) // BP * DQ
    up_down = 1 + sending
    weighing = up_down + tiles * (FT + NT)
    combining = weighing + e * of_expert
    end_of_queue = combining + tl.cdiv(T, BT) * NT
    while (task < end_of_queue) & (alive != 0):
        if task < up_down:
            owner, tile, rows, real, slot, token, holder, carried = begin_dispatch(
                task, source_S, expert_S, bag, starts, K, tables, run, W, E, BE, BM, ONCE, TRACE
            )
            send_rows(dy_TD, token, address(table, ROWS, owner, W, TYPE), rows, carried, D, BM, BK)
            if kept_RD is None:
                send_x(x_TD, token, address(table, AGAIN, owner, W, TYPE), rows, carried, D, BM, BK, CODE)
            weight = tl.load(weights_S + slot, mask=real, other=0.0)
            tl.store(address(table, WEIGHT, owner, W, tl.float32) + rows, weight, mask=real)
            end_dispatch(
                owner, tile, rows, real, slot, holder, carried, D * SIZE + X_BYTES, 16, sent_WP, run, W, TRACE, N_PHASES
            )
        elif task < weighing:
            is_up, tile, column = wave_task(task - up_down, tiles, FT, NT, WAVE)
            if is_up:
                record(0, -1, task, -1, UP, once(), run, W, TRACE)
                fine, j, holder, end = wait_rows(tile, tables, run, W, E, BE, BW, BM, ONCE, TRACE)
                alive = fine.to(tl.int32)
                if fine:
                    record(1, tile, column, -1, UP, once(), run, W, TRACE)
                    dy_M1 = address(table, ROWS, me, W, TYPE) + holder.to(tl.int64)[:, None] * D
                    f, row = column * BN, (tile * BM).to(tl.int64)
                    if LOW:
                        da_MN = cast_by_weight(
                            dy_M1, None, None, w_down, down_scales, j, f, F, D, BM, BN, DOWN_DESCRIBED, CODE
                        )
                    else:
                        da_MN, _ = rows_by_expert(
                            dy_M1, w_down, shared_down, j, f, f, F, D, D * F, F, SHARED, BM, BN, BK, False, True, DOWN_DESCRIBED,
                            SHARED_DOWN_DESCRIBED, EVEN_D, PRECISION,
                        )  # fmt: skip
                    rows = tl.minimum(tile * BM + tl.arange(0, BM), end - 1)
                    w_M1 = tl.load(address(table, WEIGHT, me, W, tl.float32) + rows, cache_modifier=".cg")[:, None]
                    part_M = dact_quarters(
                        da_MN, w_M1, h_RG + row * G, dh_RG + row * G, a_RF + row * F, end - tile * BM, f, F, G, KIND, PAIR, BM,
                        BN, WHOLE, "a" if LOW else "a'",
                    )  # fmt: skip
                    rows = tile * BM + tl.arange(0, BM)
                    tl.store(parts_RP + rows.to(tl.int64) * FT + column, part_M, mask=rows < end)
                    raise_ready(tile, column, FT, run, W, TRACE)
            else:
                fine = begin_down(task, tile, column, FT, run, W, BW, BF, TRACE)
                alive = fine.to(tl.int32)
                if fine:
                    j, rank, rows_of_rank, end, rows = rows_of(tile, tables, W, E, BE, BW, BM)
                    dh_M1 = dh_RG + rows[:, None] * G
                    if LOW:
                        dx_MN = cast_by_weight(
                            dh_M1, None, None, w_up, up_scales, j, column * BN, D, G, BM, BN, UP_DESCRIBED, CODE
                        )
                    else:
                        dx_MN, _ = rows_by_expert(
                            dh_M1, w_up, shared_up, j, column * BN, column * BN, D, G, G * D, D, SHARED, BM, BN, BK, False, True,
                            UP_DESCRIBED, SHARED_UP_DESCRIBED, EVEN_G, PRECISION,
                        )  # fmt: skip
                    if column == 0:
                        more = 0.0
                        if b_down is not None:
                            dy_RD, held = address(table, ROWS, me, W, TYPE), address(table, ALIAS, me, W, tl.int32)
                            more = bias_scores(dy_RD, held, b_down, j, tile, end, D, BM, BK, ONCE)
                        return_grads(parts_RP, more, tile, end, FT, run, W, BM, BF)
                        count_bytes(sent_WP, rank, 3, rows_of_rank * 4, (rows_of_rank > 0) & (rank != me), N_PHASES)
                    row_return(
                        dx_MN, tile, column, end, rank, rows_of_rank, sent_WP, SIZE, TILES, run, NT, D, W, BM, BN, TRACE,
                        N_PHASES, TYPE, not AMD,
                    )  # fmt: skip
        elif task < combining:
            record(0, -1, task, -1, WEIGHTS, once(), run, W, TRACE)
            j, local = (task - weighing) // of_expert, (task - weighing) % of_expert
            upto = tl.load(tile_ends(tables, E) + j)
            start = tl.load(begins(tables, E) + j * (W + 1))
            count = tl.load(begins(tables, E) + j * (W + 1) + W) - start
            for tile in range(start // BM, upto):
                if alive != 0:
                    alive = wait_ready(tile, FT, run, W, BW, BF, TRACE).to(tl.int32)
            if alive != 0:
                record(1, j, local, -1, WEIGHTS, once(), run, W, TRACE)
                held = address(table, ALIAS, me, W, tl.int32)
                if local < down_tiles:
                    p, q = local // FQ, local % FQ
                    dy_RD, dw = address(table, ROWS, me, W, TYPE), dw_down + j.to(tl.int64) * D * F
                    if LOW:
                        cast_weight_tile(
                            dy_RD, address(table, WEIGHT, me, W, tl.float32), a_RF, a_scales_RB, dw, held, start, count,
                            p, q, D, F, ONCE, False, 0, BP, BQ, CODE,
                        )  # fmt: skip
                    else:
                        weight_tile(
                            dy_RD, a_RF, dw, held, start, count, p, q, D, F, True, False, BP, BQ, BR, ONCE, PRECISION
                        )
                    if db_down is not None:  # noqa: SIM102 - the compiler decides this one, the kernel the next
                        if q == 0:
                            weight_R = address(table, WEIGHT, me, W, tl.float32)
                            bias_sums(dy_RD, weight_R, db_down, held, j, start, count, p, D, BP, BK, ONCE)
                else:
                    p, q = (local - down_tiles) // DQ, (local - down_tiles) % DQ
                    x_RD = address(table, AGAIN, me, W, TYPE) if kept_RD is None else kept_RD
                    dv = dw_up + j.to(tl.int64) * G * D
                    if CODE is None:
                        weight_tile(
                            dh_RG, x_RD, dv, held, start, count, p, q, G, D, False, kept_RD is None, BP, BQ, BR, ONCE, PRECISION
                        )  # fmt: skip
                    else:
                        stride: tl.constexpr = D * SIZE if kept_RD is None else KEPT
                        again: tl.constexpr = ONCE and kept_RD is None
                        x_RB = x_RD.to(tl.pointer_type(tl.uint8))
                        if LOW:
                            cast_weight_tile(
                                dh_RG, None, x_RB, None, dv, held, start, count, p, q, G, D, False, again, stride, BP, BQ, CODE
                            )  # fmt: skip
                        else:
                            decoded_weight_tile(
                                dh_RG, x_RB, dv, held, start, count, p, q, G, D, again, stride, BP, BQ, BR, PRECISION, CODE
                            )  # fmt: skip
                    if db_up is not None:  # noqa: SIM102 - as above
                        if q == 0:
                            bias_sums(dh_RG, None, db_up, held, j, start, count, p, G, BP, BK, False)
        else:
            alive = combine(
                task, task - combining, dx_TD, None, dweights_S, expert_S, bag, starts, K, T, tables, TILES, run, D, NT, W, E, BW,
                BM, BN, BT, TRACE, not AMD,
            )  # fmt: skip
        task = take(control)
    record(0, -1, task, -1, NONE, once(), run, W, TRACE)
    finish(run, programs, W, TRACE)


def backward(
    dy_TD: Tensor, x_TD: Tensor, h_RG: Tensor, kept_RD: Tensor | None, tables: Tensor, weights_S: Tensor, w_up_eGD: Tensor,
    w_down_eDF: Tensor, rows: Rows, activation: str, setting: Setting, sent_WP: Tensor, call: int = 0, first: int = 0,
    grid: int | None = None, coded: bool = False, low: Low | None = None,
    b_down: Tensor | None = None, shared: Pair | None = None,
) -> list[Tensor]:  # fmt: skip
    """[dx_TD, dweights_S, dw_up_eGD, dw_down_eDF], and with biases [db_up_eG, db_down_eD], of what `forward` took and returned;
    gradients of weights are of all experts, those in `shared` first. Every rank of the group calls it."""
    heap, g, (_, d, f) = setting.heap, w_up_eGD.shape[1], w_down_eDF.shape
    options = fused_options(setting, dy_TD, w_up_eGD, w_down_eDF, *(shared or ()))
    bn, bk, m = options["BN"], options["BK"], options["BM"]
    n_experts = w_up_eGD.shape[0] + n_shared(shared)
    dw_up, dw_down = x_TD.new_empty(n_experts, g, d), x_TD.new_empty(n_experts, d, f)
    bp, bq, block = max(m, bn), bn if x_TD.is_cpu else min(bn, 64), (bk, bn)
    if low is not None:
        w_up_eGD, w_down_eDF, low = transposed(w_up_eGD, w_down_eDF, low)
        bp, block = bq, (bn, BLOCK)
    weights, shared_weights, described = describe_experts((w_up_eGD, w_down_eDF), shared, block, block)
    ft = triton.cdiv(f, bn)
    assert triton.cdiv(d, bn) <= heap.regions["back"][0][2] and ft <= heap.regions["ready"][0][1], heap.regions
    dh_RG, a_RF = torch.empty_like(h_RG), h_RG.new_empty(h_RG.shape[0], f)
    parts_RP = weights_S.new_empty(h_RG.shape[0], ft)
    biases = [] if b_down is None else [b_down.new_empty(b_down.shape[0], g), torch.empty_like(b_down)]
    dx_TD, dweights_S = torch.empty_like(x_TD), torch.zeros_like(weights_S)  # unused slots have no gradient
    k = rows.bag.shape[1] if rows.starts is None else 0
    _fused_backward_kernel[(grid or setting.programs,)](
        dy_TD, x_TD, *weights, *scales_low(low), h_RG, kept_RD, rows.source_R, rows.expert_R, rows.bag, rows.starts,
        weights_S, rows.counts_E, dh_RG, a_RF, parts_RP, dx_TD, dweights_S, dw_up, dw_down, heap.table, tables, sent_WP,
        b_down, *(biases or (None, None)), *shared_weights,
        x_TD.shape[0], heap.rank, call, heap.regions["rows"][0][0] // m, setting.spins, setting.programs, first,
        K=k, D=d, F=f, G=g, BF=triton.next_power_of_2(ft), BT=m, BP=bp, BQ=bq, BR=max(bk, 16), KIND=activation,
        PAIR=activation != "relu2", EVEN_D=d % bk == 0,
        EVEN_G=g % bk == 0, WHOLE=f % bn == 0, CODE=code_type(x_TD.device) if coded else None, KEPT=kept_bytes(d),
        **described, **options,
    )  # fmt: skip
    return [dx_TD, dweights_S, dw_up, dw_down, *biases]


def compile_cases(target: str) -> Any:
    """What moesaic.kernels.targets compiles, of a layer of 64 experts on 8 ranks."""

    def launch(setting: Setting, g: dict[str, Any], once: bool, biased: bool) -> None:
        kept = None if once else g["kept"]
        weights = g["weights"], g["up"], g["down"]
        rest = dict(
            coded=g["coded"], low=g["low"], b_down=g["biases"]["b_down"] if biased else None, shared=g["shared"]
        )
        backward(g["x"], g["x"], g["h"], kept, g["tables"], *weights, g["rows"], "swiglu", setting, g["sent"], **rest)

    return fused_cases(target, launch)
