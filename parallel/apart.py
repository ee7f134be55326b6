"""The fused expert path where a recipe's products are not inside its kernels: one launch brings rows to the ranks of their
experts, moesaic.moe.low computes what it does on every path, another launch takes the results back (moesaic.kernels.fused_rows).

    forward     x_ND = carry(x_TD, weights);   y_ND = experts;        y_TD = give_back(y_ND)
    backward    dy_ND = carry(dy_TD);          dx_ND of the experts;  dx_TD, dweights = give_back(dx_ND, dweights)

Each row that came is an input of its own, also where a token visits several experts of a rank, though its values crossed once.
They are cast as on every other path, by chance too, for a token's number travels with its row: the same bits. The host waits for
the number of rows, once a call, as on the all-to-all path.

Letters: T tokens of this rank, D model width, S slots, N rows that came.
"""

from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.permute import Rows
from moesaic.moe.experts import Experts
from moesaic.moe.precision import PrecisionConfig, of_fp8_block
from moesaic.moe.replay import once


def products_inside(precision: PrecisionConfig, target: str | torch.device) -> bool:
    """Whether experts of low precision are computed inside the kernels: by products of fp8_block, of rows of fp8, and not on AMD.
    Else they are apart from the kernels."""
    if not (precision.quantizes("experts") and of_fp8_block(precision) and precision.dispatch == "fp8"):
        return False
    from moesaic.kernels.fused_low import has_products  # only here: without a GPU it starts Triton's interpreter

    return has_products(target)


def all_apart(precision: PrecisionConfig, target: str | torch.device) -> bool:
    """Whether that holds for all experts, from the first step to the last: then X never travels again in backward."""
    high = precision.high_first + precision.high_last > 0 or precision.high_tail > 0
    return precision.quantizes("experts") and not high and not products_inside(precision, target)


def apart(path: Any, experts: Experts, x_TD: Tensor, weights_S: Tensor, rows: Rows, numbers_T: Tensor | None) -> Tensor:
    """What the experts of all ranks of a `moesaic.parallel.fused.FusedPath` make of x_TD, each token's rows added up. rows, of
    weights_S: sorted by expert. numbers_T: of the tokens, where chance depends on them."""
    trip = Trip(path, rows, x_TD.shape[0])
    x_ND, weights_N, numbers_N = _Carry.apply(x_TD.contiguous(), weights_S.float().contiguous(), trip, numbers_T)
    y_ND = experts(x_ND, weights_N, trip.came, numbers_N)
    trip.came = None
    return _GiveBack.apply(y_ND, trip)


class Trip:
    """Of one call: its slots out and back, in forward and in backward. tables, holder_N: what forward found, and backward takes
    from it, so that the host need not wait again. came: of the rows here, until the experts have them."""

    def __init__(self, path: Any, rows: Rows, tokens: int) -> None:
        self.path, self.rows, self.tokens, self.sent_WP = path, rows, tokens, path.counters
        self.tables: Tensor | None = None
        self.holder_N: Any = None
        self.came: Any = None

    def out(
        self, x_TD: Tensor, weights_S: Tensor, numbers_T: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Forward, rows to the ranks of their experts: (those that came, their weights, their tokens' numbers)."""
        from moesaic.kernels import fused_rows  # only here: without a GPU it starts Triton's interpreter

        path, setting, coded, d = self.path, self.path.space.setting, self.path.codec is not None, x_TD.shape[1]
        with path.launched("dispatch in forward"):
            self.tables = tables = fused_rows.carry(
                x_TD, self.rows, setting, self.sent_WP, path.call, weights_S, numbers_T, coded=coded
            )
        path.space.carried = path.call
        came = once("came", lambda: fused_rows.arrived(setting, tables, path.space.look))
        self.came, self.holder_N = came.rows, came.holder_N
        values = fused_rows.values_of(setting, came.holder_N, coded)
        if coded:
            values = path.codec.decode([values[:, :d], values[:, d:]], x_TD.dtype)
        return values, came.of(setting, "weight"), None if numbers_T is None else came.of(setting, "numbers")

    def out_again(self, dy_TD: Tensor) -> Tensor:
        """The same of dY, in backward."""
        from moesaic.kernels import fused_rows

        path, setting = self.path, self.path.space.setting
        with path.launched("dispatch in backward"):
            fused_rows.carry(dy_TD, self.rows, setting, self.sent_WP, path.call + 1, tables=self.tables)
        path.space.carried = path.call
        return fused_rows.values_of(setting, self.holder_N)

    def back(self, y_ND: Tensor, dweights_N: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Sums of each token's rows, and in backward the gradients of the slots' weights."""
        from moesaic.kernels import fused_rows

        path, backward = self.path, dweights_N is not None
        assert path.space.carried == path.call and self.tables is not None, (path.layer, path.space.carried)
        with path.launched("combine in backward" if backward else "combine in forward"):
            return fused_rows.give_back(
                y_ND,
                self.rows,
                self.tokens,
                path.space.setting,
                self.tables,
                self.sent_WP,
                path.call + backward,
                dweights_N,
            )


class _Carry(torch.autograd.Function):
    """(x_TD, weights_S) -> (x_ND, weights of the rows that came, the numbers of their tokens)."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_S: Tensor, trip: Trip, numbers_T: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        ctx.trip = trip
        return trip.out(x_TD, weights_S, numbers_T)

    @staticmethod
    def backward(ctx: Any, dx_ND: Tensor, dweights_N: Tensor, _: Any) -> tuple[Tensor, Tensor | None, None, None]:
        return *ctx.trip.back(dx_ND.contiguous(), dweights_N.contiguous()), None, None


class _GiveBack(torch.autograd.Function):
    """y_ND -> y_TD; the adjoint of `_Carry`."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return trip.back(y_ND.contiguous())[0]

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.out_again(dy_TD.contiguous()), None
