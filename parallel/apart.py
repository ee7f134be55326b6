"""The fused expert path where a recipe's products are not inside its kernels: one launch brings rows to the ranks of their
experts, moesaic.moe.low computes what it does on every path, another launch takes the results back (moesaic.kernels.fused_rows).

    forward     x_ND = carry(x_TD, weights);   y_ND = experts;        y_TD = give_back(y_ND)
    backward    dy_ND = carry(dy_TD);          dx_ND of the experts;  dx_TD, dweights = give_back(dx_ND, dweights)

Each row that came is an input of its own, also where a token visits several experts of a rank, though its values crossed once.
They are cast as on every other path, by chance too, for a token's number travels with its row: the same bits. The host waits for
the number of rows, once forward and once backward.

Letters: T tokens of this rank, D model width, S slots, N rows that came.
"""

from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.permute import Rows
from moesaic.moe.experts import Experts
from moesaic.moe.precision import PrecisionConfig, of_fp8_block


def products_inside(precision: PrecisionConfig, target: str | torch.device) -> bool:
    """Whether experts of low precision are computed inside the kernels: by products of fp8_block, of rows of fp8, and not on AMD.
    Else they are apart from the kernels."""
    if not (precision.quantizes("experts") and of_fp8_block(precision) and precision.dispatch == "fp8"):
        return False
    from moesaic.kernels.fused_low import has_products  # only here: without a GPU it starts Triton's interpreter

    return has_products(target)


def apart(path: Any, experts: Experts, x_TD: Tensor, weights_S: Tensor, rows: Rows, numbers_T: Tensor | None) -> Tensor:
    """What the experts of all ranks of a `moesaic.parallel.fused.FusedPath` make of x_TD, each token's rows added up. rows, of
    weights_S: sorted by expert. numbers_T: of the tokens, where chance depends on them."""
    trip = Trip(path, rows, x_TD.shape[0], numbers_T)
    x_ND, weights_N = _Carry.apply(x_TD.contiguous(), weights_S.float().contiguous(), trip)
    y_ND = experts(x_ND, weights_N, trip.came, trip.numbers_N)
    return _GiveBack.apply(y_ND, trip)


class Trip:
    """Of one call: its slots out and back, in forward and in backward. came, numbers_N: of the rows here, as `carry` found."""

    def __init__(self, path: Any, rows: Rows, tokens: int, numbers_T: Tensor | None) -> None:
        self.path, self.rows, self.tokens, self.numbers_T, self.sent_WP = path, rows, tokens, numbers_T, path.counters
        self.tables: Tensor | None = None
        self.came: Any = None
        self.numbers_N: Tensor | None = None

    def carry(self, x_TD: Tensor, weights_S: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Rows to the ranks of their experts: (those that came, their weights). In backward, of dY, without weights."""
        from moesaic.kernels import fused_rows  # only here: without a GPU it starts Triton's interpreter

        path, setting, back = self.path, self.path.space.setting, self.tables is not None
        coded, numbers_T = path.codec is not None and not back, None if back else self.numbers_T
        with path.launched("dispatch in backward" if back else "dispatch in forward"):
            self.tables = fused_rows.carry(
                x_TD, self.rows, setting, self.sent_WP, path.call + back, weights_S, numbers_T, self.tables, coded
            )
        came = fused_rows.arrived(setting, self.tables)
        path.space.look()  # before what came is believed: the host has waited for the launch
        path.space.carried = path.call
        values = came.values(setting, coded)
        if coded:
            d = x_TD.shape[1]
            values = path.codec.decode([values[:, :d], values[:, d:]], x_TD.dtype)
        if back:
            return values, None
        self.came = came.rows
        self.numbers_N = None if numbers_T is None else came.of(setting, "numbers")
        return values, came.of(setting, "weight")

    def give_back(self, y_ND: Tensor, dweights_N: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Sums of each token's rows, and in backward the gradients of the slots' weights."""
        from moesaic.kernels import fused_rows

        path, back = self.path, dweights_N is not None
        assert path.space.carried == path.call and self.tables is not None, (path.layer, path.space.carried)
        with path.launched("combine in backward" if back else "combine in forward"):
            return fused_rows.give_back(
                y_ND,
                self.rows,
                self.tokens,
                path.space.setting,
                self.tables,
                self.sent_WP,
                path.call + back,
                dweights_N,
            )


class _Carry(torch.autograd.Function):
    """(x_TD, weights_S) -> (x_ND, weights of the rows that came)."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_S: Tensor, trip: Trip) -> tuple[Tensor, Tensor | None]:
        ctx.trip = trip
        return trip.carry(x_TD, weights_S)

    @staticmethod
    def backward(ctx: Any, dx_ND: Tensor, dweights_N: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return *ctx.trip.give_back(dx_ND.contiguous(), dweights_N.contiguous()), None


class _GiveBack(torch.autograd.Function):
    """y_ND -> y_TD; the adjoint of `_Carry`."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return trip.give_back(y_ND.contiguous())[0]

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.carry(dy_TD.contiguous())[0], None
