"""Routed experts over rows sorted by expert: one operation that saves little for backward.

    for row r of expert j:        x = input[source[r]]
        h  = W_up[j] x + b_up[j]                            G values: gate, then up, for the gated kinds (G = 2F); else G = F
        a  = act(h)                                         F values
        y  = W_down[j] (w_r * a) + w_r * b_down[j]          w_r: the router's weight of this row
    output[n] = sum of y over the rows of input n           in a fixed order: of experts on a CPU, of slots elsewhere

Weighting the activation instead of the output is the same product, and lets backward do without y: with
da' = W_down[j]^T dy, the weight's gradient is <da', a> + <dy, b_down[j]> (SonicMoE, arXiv 2512.14080, equation 10). What is
kept is the input (N x D), h (R x G) and index vectors: with SwiGLU in bf16 2ND + 4RF bytes and metadata. a is computed again,
gathered rows are gathered again. No R x D tensor of y or of the gathered dx need exist: on a CPU the rows of a few experts at a
time are made and added up, elsewhere column chunks of all rows, of at most `chunk_mib`.

Letters: N input rows, R routed rows, D model width, F expert width, G width of h, E experts (held here).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.kernels.permute import Rows, sum_bags
from moesaic.kernels.products import mtm, rounded, rows_mm, slices
from moesaic.kernels.tiles import known_tile
from moesaic.moe.config import ModelConfig

aten = torch.ops.aten
GROUP_ROWS = 2048  # of the loops on a CPU

# ---------------------------------------------------------------- activations


def activate(kind: str, h_RG: Tensor, gate_RF: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a_RF of h_RG. The gated kinds: Shazeer, arXiv 2002.05202, GeGLU with the exact erf; relu2: So et al., arXiv 2109.08668.

    Fills `out` and, with the activated gate (relu2: the relu), `gate_RF`, where they are given; both (R, F).
    """
    g, up = (h_RG, None) if kind == "relu2" else h_RG.chunk(2, dim=1)
    if gate_RF is None:
        gate_RF = torch.empty_like(g)
    if kind == "swiglu":
        aten.silu.out(g, out=gate_RF)
    elif kind == "geglu":
        aten.gelu.out(g, out=gate_RF)
    else:
        torch.clamp(g, min=0, out=gate_RF)
    return torch.mul(gate_RF, gate_RF if up is None else up, out=torch.empty_like(gate_RF) if out is None else out)


def activate_backward(kind: str, da_RF: Tensor, h_RG: Tensor, gate_RF: Tensor, out: Tensor | None = None) -> Tensor:
    """dh_RG, from the gradient of `activate` and the gate it filled. `out` takes it, where given. Overwrites da_RF."""
    dh_RG = torch.empty_like(h_RG) if out is None else out
    if kind == "relu2":
        return torch.mul(da_RF.mul_(2), gate_RF, out=dh_RG)
    gate, up = h_RG.chunk(2, dim=1)
    dgate, dup = dh_RG.chunk(2, dim=1)
    torch.mul(da_RF, gate_RF, out=dup)
    if kind == "swiglu":
        aten.silu_backward.grad_input(da_RF.mul_(up), gate, grad_input=dgate)
    elif kind == "geglu":
        aten.gelu_backward.grad_input(da_RF.mul_(up), gate, grad_input=dgate)
    else:
        torch.mul(da_RF.mul_(up), gate > 0, out=dgate)
    return dh_RG


# ---------------------------------------------------------------- the specification


def activate_reference(kind: str, h_RG: Tensor) -> Tensor:
    """The same, differentiable."""
    if kind == "relu2":
        return h_RG.relu().square()
    gate, up = h_RG.chunk(2, dim=1)
    gates: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}
    return gates[kind](gate) * up


def experts_reference(
    x_ND: Tensor, weights_R: Tensor, w_up_EGD: Tensor, w_down_EDF: Tensor, b_up_EG: Tensor | None, b_down_ED: Tensor | None,
    rows: Rows, activation: str,
) -> Tensor:  # fmt: skip
    """In plain differentiable torch of any floating type; a loop over experts."""
    outputs, start = [], 0
    for j, count in enumerate(rows.counts_E.tolist()):
        part = slice(start, start + count)
        h = x_ND[rows.source_R[part]] @ w_up_EGD[j].T
        if b_up_EG is not None:
            h = h + b_up_EG[j]
        y = activate_reference(activation, h) @ w_down_EDF[j].T
        if b_down_ED is not None:
            y = y + b_down_ED[j]
        outputs.append(y * weights_R[part, None].to(x_ND.dtype))
        start += count
    y_RD = torch.cat(outputs)
    starts = rows.starts
    if starts is None:
        return y_RD[rows.bag].sum(dim=1)
    bags = [rows.bag[a:b] for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False)]
    return torch.stack([y_RD[bag].sum(dim=0) for bag in bags]) if bags else x_ND * 0


# ---------------------------------------------------------------- the torch backend


class _ExpertsOp(torch.autograd.Function):
    """On CPU a loop of matrix products over each expert's rows, which stay in cache; on CUDA `F.grouped_mm` with offsets on the
    device, so that the host never waits for a count."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weights_R: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, b_down: Tensor | None,
        rows: Rows, activation: str, chunk_mib: int,
    ) -> Tensor:  # fmt: skip
        weights_R = weights_R.to(x_ND.dtype)
        forward = _forward_loop if x_ND.device.type == "cpu" else _forward_grouped
        h_RG, y_ND = forward(x_ND, weights_R, w_up, w_down, b_up, b_down, rows, activation, chunk_mib)
        ctx.save_for_backward(
            x_ND, h_RG, weights_R, w_up, w_down, b_down,
            rows.source_R, rows.expert_R if b_down is not None else None, rows.bag, rows.starts, rows.counts_E,
        )  # fmt: skip
        ctx.activation, ctx.chunk_mib, ctx.has_bias = activation, chunk_mib, b_up is not None
        return y_ND

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, h_RG, weights_R, w_up, w_down, b_down, source_R, expert_R, bag, starts, counts_E = ctx.saved_tensors
        rows = Rows(source_R, source_R, expert_R, bag, starts, counts_E)
        backward = _backward_loop if x_ND.device.type == "cpu" else _backward_grouped
        grads = backward(
            dy_ND.contiguous(), x_ND, h_RG, weights_R, w_up, w_down, b_down, rows, ctx.activation, ctx.chunk_mib
        )
        dx_ND, dweights_R, dw_up, dw_down, db_up, db_down = grads
        if not ctx.has_bias:
            db_up = db_down = None
        return dx_ND, dweights_R.float(), dw_up, dw_down, db_up, db_down, None, None, None


Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _forward_loop(
    x_ND: Tensor, weights_R: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, b_down: Tensor | None,
    rows: Rows, activation: str, chunk_mib: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n_rows, counts = rows.source_R.numel(), rows.counts_E.tolist()
    h_RG = x_ND.new_empty(n_rows, w_up.shape[1])
    y_ND = _sums(x_ND)
    groups = _groups(counts)
    # Memory that every group uses again stays in cache, and costs no page faults.
    x_rD, g_rF, a_rF = _scratch(x_ND, _largest(groups), x_ND.shape[1], w_down.shape[2], w_down.shape[2])
    # Views of all experts at once: indexing each weight in turn takes Python as long as some of the products.
    ups, downs = w_up.mT.unbind(), w_down.mT.unbind()
    for experts, part, own in groups:
        each = slices(own)
        x, h = x_rD[: part.stop - part.start], h_RG[part]
        torch.index_select(x_ND, 0, rows.source_R[part], out=x)
        for up, one, h_j in zip(ups[experts], each, h.split(own), strict=True):
            rows_mm(x_rD, one, up, h_j)
        if b_up is not None:
            for b, h_j in zip(b_up[experts], h.split(own), strict=True):
                h_j += b
        activate(activation, h, g_rF[: x.shape[0]], a_rF[: x.shape[0]]).mul_(weights_R[part, None])
        y = x  # whose rows are not needed any more
        for down, one, y_j in zip(downs[experts], each, y.split(own), strict=True):
            rows_mm(a_rF, one, down, y_j)
        y_ND.index_add_(0, rows.source_R[part], y.to(y_ND.dtype))
    y_ND = y_ND.to(x_ND.dtype)
    return h_RG, y_ND if b_down is None else y_ND + _biases(b_down, weights_R, rows)


Group = tuple[slice, slice, list[int]]


def _groups(counts: list[int]) -> list[Group]:
    """Neighbouring experts, GROUP_ROWS rows or a little more in all: (experts, rows, rows of each).

    Gathering and activation are done for a group at once. For each of many small experts by itself, starting the operations
    takes as long as they do; for all rows at once, they would come from memory instead of the cache.
    """
    groups: list[Group] = []
    first = start = stop = 0
    for j, count in enumerate(counts):
        stop += count
        if stop - start >= GROUP_ROWS or j == len(counts) - 1:
            groups.append((slice(first, j + 1), slice(start, stop), counts[first : j + 1]))
            first, start = j + 1, stop
    return groups


def _largest(groups: list[Group]) -> int:
    return rounded(max(part.stop - part.start for _, part, _ in groups))


def _sums(like_ND: Tensor) -> Tensor:
    """Where rows are added up, at least in fp32."""
    return torch.zeros(like_ND.shape, dtype=torch.promote_types(like_ND.dtype, torch.float32), device=like_ND.device)


def _scratch(like: Tensor, rows: int, *widths: int) -> list[Tensor]:
    return [like.new_empty(rows, width) for width in widths]


def _biases(b_down_ED: Tensor, weights_R: Tensor, rows: Rows) -> Tensor:
    """Sum of weight * b_down over each input's rows, (N, D); as a product with the (N, E) weights, so that no (R, D) is made."""
    # Padding has expert E, which the last column takes and nobody reads.
    weights_RE = weights_R.new_zeros(weights_R.numel(), b_down_ED.shape[0] + 1)
    weights_RE.scatter_(1, rows.expert_R[:, None], weights_R[:, None])
    return sum_bags(weights_RE[:, :-1].contiguous(), rows.bag, rows.starts) @ b_down_ED


def _backward_loop(
    dy_ND: Tensor, x_ND: Tensor, h_RG: Tensor, weights_R: Tensor, w_up: Tensor, w_down: Tensor, b_down: Tensor | None,
    rows: Rows, activation: str, chunk_mib: int,
) -> Grads:  # fmt: skip
    counts = rows.counts_E.tolist()
    d, f, g = x_ND.shape[1], w_down.shape[2], h_RG.shape[1]
    dx_ND = _sums(x_ND)
    dweights_R = torch.empty_like(weights_R)
    dw_up, dw_down = torch.empty_like(w_up), torch.empty_like(w_down)
    db_up = w_up.new_zeros(w_up.shape[:2]) if b_down is not None else None
    db_down = torch.zeros_like(b_down) if b_down is not None else None
    groups = _groups(counts)
    x_rD, g_rF, a_rF, da_rF, dh_rG = _scratch(x_ND, _largest(groups), d, f, f, f, g)
    ups, downs, dups, ddowns = w_up.unbind(), w_down.unbind(), dw_up.unbind(), dw_down.unbind()
    for experts, part, own in groups:
        each = slices(own)
        n, w, h = part.stop - part.start, weights_R[part, None], h_RG[part]
        for rows_after in (x_rD[n:], a_rF[n:], dh_rG[n:]):  # `mtm` reads some
            rows_after[: n // 16 + 1] = 0
        dy = torch.index_select(dy_ND, 0, rows.source_R[part], out=x_rD[:n])
        a, da = activate(activation, h, g_rF[:n], a_rF[:n]), da_rF[:n]
        for down, one, da_j in zip(downs[experts], each, da.split(own), strict=True):
            rows_mm(x_rD, one, down, da_j)
        torch.linalg.vecdot(da, a, out=dweights_R[part])
        a.mul_(w)
        for ddown, one in zip(ddowns[experts], each, strict=True):
            # An expert without rows gets zeros, as the product over no rows gives: never None, never what was in memory.
            mtm(x_rD, a_rF, one, ddown)
        if b_down is not None and db_down is not None:
            biases, own_weights = zip(b_down[experts], db_down[experts], strict=True), weights_R[part].split(own)
            for (b, db), dy_j, w_j, dw_j in zip(
                biases, dy.split(own), own_weights, dweights_R[part].split(own), strict=True
            ):
                torch.mv(dy_j.T, w_j, out=db)
                dw_j += dy_j @ b
        dh = activate_backward(activation, da.mul_(w), h, g_rF[:n], dh_rG[:n])
        x = torch.index_select(x_ND, 0, rows.source_R[part], out=x_rD[:n])
        for dup, one in zip(dups[experts], each, strict=True):
            mtm(dh_rG, x_rD, one, dup)
        if db_up is not None:
            for db, dh_j in zip(db_up[experts], dh.split(own), strict=True):
                torch.sum(dh_j, dim=0, out=db)
        dx = x  # whose rows are not needed any more
        for up, one, dx_j in zip(ups[experts], each, dx.split(own), strict=True):
            rows_mm(dh_rG, one, up, dx_j)
        dx_ND.index_add_(0, rows.source_R[part], dx.to(dx_ND.dtype))
    return dx_ND.to(x_ND.dtype), dweights_R, dw_up, dw_down, db_up, db_down


def _column_chunks(width: int, bytes_per_column: int, chunk_mib: int) -> list[slice]:
    """Equal ranges of `width` columns, multiples of 16 but for the last, of at most `chunk_mib`, where 16 columns are no more."""
    most = max(16, (chunk_mib * 2**20 // max(bytes_per_column, 1)) // 16 * 16)
    step = math.ceil(width / math.ceil(width / most) / 16) * 16
    return [slice(a, min(a + step, width)) for a in range(0, width, step)]


def _forward_grouped(
    x_ND: Tensor, weights_R: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor | None, b_down: Tensor | None,
    rows: Rows, activation: str, chunk_mib: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ends_E = rows.counts_E.cumsum(0, dtype=torch.int32)
    h_RG = F.grouped_mm(x_ND[rows.source_R], w_up.mT, offs=ends_E)
    if b_up is not None:
        h_RG = h_RG + b_up[rows.expert_R.clamp(max=b_up.shape[0] - 1)]
    a_RF = activate(activation, h_RG) * weights_R[:, None]
    columns = _column_chunks(x_ND.shape[1], h_RG.shape[0] * h_RG.element_size(), chunk_mib)
    out = [sum_bags(F.grouped_mm(a_RF, w_down[:, c].mT, offs=ends_E), rows.bag, rows.starts) for c in columns]
    y_ND = out[0] if len(out) == 1 else torch.cat(out, dim=1)
    return h_RG, y_ND if b_down is None else y_ND + _biases(b_down, weights_R, rows)


def _backward_grouped(
    dy_ND: Tensor, x_ND: Tensor, h_RG: Tensor, weights_R: Tensor, w_up: Tensor, w_down: Tensor, b_down: Tensor | None,
    rows: Rows, activation: str, chunk_mib: int,
) -> Grads:  # fmt: skip
    ends_E = rows.counts_E.cumsum(0, dtype=torch.int32)
    # Rows past the last end are padding, and grouped_mm leaves their memory as it was.
    real_R1 = (torch.arange(h_RG.shape[0], device=h_RG.device) < ends_E[-1])[:, None]
    dy_RD = dy_ND[rows.source_R]
    da_RF = F.grouped_mm(dy_RD, w_down, offs=ends_E)
    gate_RF = torch.empty_like(da_RF)
    a_RF = activate(activation, h_RG, gate_RF)
    dweights_R = torch.where(real_R1, da_RF.float() * a_RF.float(), 0).sum(dim=1)
    dw_down = F.grouped_mm(dy_RD.mT, a_RF * weights_R[:, None], offs=ends_E)
    db_up = db_down = None
    dh_RG = activate_backward(activation, da_RF * weights_R[:, None], h_RG, gate_RF)
    if b_down is not None:
        bias_RD = b_down[rows.expert_R.clamp(max=b_down.shape[0] - 1)]
        dweights_R = dweights_R + torch.where(real_R1, dy_RD.float() * bias_RD.float(), 0).sum(dim=1)
        # Sums over an expert's rows as products: a scatter-add would add them in any order. 8 columns: 16 bytes, the alignment.
        ones_R8 = torch.ones_like(h_RG[:, :1]).expand(-1, 8).contiguous()
        db_up = F.grouped_mm(dh_RG.mT, ones_R8, offs=ends_E)[..., 0]
        db_down = F.grouped_mm(dy_RD.mT, ones_R8 * weights_R[:, None], offs=ends_E)[..., 0]
    del dy_RD, a_RF, da_RF, gate_RF
    dw_up = F.grouped_mm(dh_RG.mT, x_ND[rows.source_R], offs=ends_E)
    columns = _column_chunks(x_ND.shape[1], h_RG.shape[0] * h_RG.element_size(), chunk_mib)
    out = [sum_bags(F.grouped_mm(dh_RG, w_up[:, :, c], offs=ends_E), rows.bag, rows.starts) for c in columns]
    return out[0] if len(out) == 1 else torch.cat(out, dim=1), dweights_R, dw_up, dw_down, db_up, db_down


# ---------------------------------------------------------------- the module


def backend_for(knob: str, x: Tensor) -> str:
    """What `model.experts_backend` means for an input. auto: the kernels on a GPU whose tiles are known, of a type they take."""
    if knob != "auto":
        return knob
    return "triton" if x.is_cuda and x.dtype != torch.float64 and known_tile(x.device) else "torch"


class Experts(nn.Module):
    """The routed experts' weights, each (out, in) as of a linear layer: w_up_EGD (gate rows, then up rows), w_down_EDF, and
    biases b_up_EG, b_down_ED where `model.expert_bias` says so.

    forward(x_ND, weights_R, rows, ids_N) -> y_ND; ids_N: what `numbers` gave, of each input row. A sharded weight (a DTensor
    over the expert dimension) is used by its local part: `rows` then speaks of this rank's experts. `operation`, of a path that
    has its own, is called with the weights too.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation, self.backend, self.chunk_mib = config.activation, config.experts_backend, config.chunk_mib
        up = config.d_expert * (1 if config.activation == "relu2" else 2)
        self.w_up_EGD = nn.Parameter(torch.empty(config.n_experts, up, config.d_model))
        self.w_down_EDF = nn.Parameter(torch.empty(config.n_experts, config.d_model, config.d_expert))
        self.b_up_EG = nn.Parameter(torch.empty(config.n_experts, up)) if config.expert_bias else None
        self.b_down_ED = nn.Parameter(torch.empty(config.n_experts, config.d_model)) if config.expert_bias else None
        self.low: Any = None  # moesaic.moe.low.LowExperts, where a recipe of low precision says so

    def numbers(self, tokens: int, device: torch.device) -> Tensor | None:
        """int64 (T,), the numbers of the tokens of this forward pass, where the operation needs those of its rows."""
        return self.low.numbers(tokens, device) if self.low is not None else None

    def chunk(self, x_ND: Tensor, rows: Rows) -> int:
        """Columns of y that kernels make at a time."""
        step = _column_chunks(x_ND.shape[1], rows.source_R.numel() * x_ND.element_size(), self.chunk_mib)[0].stop
        return step if step < 128 or step == x_ND.shape[1] else step // 128 * 128  # whole tiles

    def forward(
        self, x_ND: Tensor, weights_R: Tensor, rows: Rows, ids_N: Tensor | None = None,
        operation: Callable[..., Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        parameters: Any = (self.w_up_EGD, self.w_down_EDF, self.b_up_EG, self.b_down_ED)
        w_up, w_down, b_up, b_down = (w.to_local() if hasattr(w, "to_local") else w for w in parameters)
        if operation:
            return operation(x_ND, weights_R, rows, w_up, w_down, b_up, b_down, self.activation)
        if self.low is not None and self.low.active:
            mesh = getattr(self.w_up_EGD, "device_mesh", None)
            first = 0 if mesh is None else mesh.get_local_rank("expert") * w_up.shape[0]
            return self.low(self, (w_up, w_down, b_up, b_down), x_ND, weights_R, rows, ids_N, first)
        backend = backend_for(self.backend, x_ND)
        if backend == "reference":
            return experts_reference(x_ND, weights_R, w_up, w_down, b_up, b_down, rows, self.activation)
        if backend == "triton":
            # Only here: where there is no GPU, it starts Triton's interpreter.
            from moesaic.kernels.experts import experts

            return experts(
                x_ND, weights_R, w_up, w_down, b_up, b_down, rows.source_R, rows.bag, rows.starts, rows.counts_E, self.activation,
                self.chunk(x_ND, rows),
            )  # fmt: skip
        return _ExpertsOp.apply(x_ND, weights_R, w_up, w_down, b_up, b_down, rows, self.activation, self.chunk_mib)
