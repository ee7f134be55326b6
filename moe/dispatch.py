"""The expert path: how tokens reach their experts and come back. Here, on one device; others in moesaic.parallel.

Letters: T tokens, D model width, S slots.
"""

from typing import Any, Protocol

from torch import Tensor

from moesaic.kernels.permute import Rows, sort_slots
from moesaic.kernels.tiles import rounding_tile
from moesaic.moe.experts import Experts, backend_for
from moesaic.moe.router import Routing


class ExpertPath(Protocol):
    """The way of tokens through the experts: dispatch, compute, combine. One call, so that one kernel can replace all of it.

    x_TD and a routing of its T tokens -> y_TD, the sum over a token's used slots of weight * expert(x), in an order that is the
    same every time; `LocalPath` adds in the order of experts on a CPU, of slots elsewhere. In training, `admit` comes first: the
    routing without what the ranks can't take. `shared`: the layer's shared expert, where the path adds its output too.
    """

    shared: Any

    def admit(self, routing: Routing) -> Routing: ...

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor: ...


def sorted_rows(routing: Routing, experts: Experts, x_TD: Tensor) -> Rows:
    """The routing's slots by expert, sorted by the backend that runs the experts."""
    if backend_for(experts.backend, x_TD) != "triton":
        return sort_slots(routing.token_S, routing.expert_S, routing.counts_E, routing.tokens, routing.per_token)
    from moesaic.kernels import permute_triton  # only here: where there is no GPU, it starts Triton's interpreter

    sizes = (routing.counts_E.numel(), routing.tokens, routing.per_token, rounding_tile(x_TD.device))
    rows, _ = permute_triton.sort_slots(routing.token_S, routing.expert_S, *sizes)
    return rows


def slots_by_expert(routing: Routing, experts: Experts, x_TD: Tensor) -> Tensor:
    """The routing's slots by expert, int64 (S,), unused ones last: `sorted_rows` where nothing else of it is of use."""
    if backend_for(experts.backend, x_TD) != "triton":
        return routing.expert_S.argsort(stable=True)
    from moesaic.kernels import permute_triton

    sizes = (routing.counts_E.numel(), routing.expert_S.numel(), 1, rounding_tile(x_TD.device))  # as if 1 slot a token
    rows, _ = permute_triton.sort_slots(routing.token_S, routing.expert_S, *sizes)
    return rows.slot_R


class LocalPath:
    """All experts on this device: nothing travels."""

    shared: Any = None

    def admit(self, routing: Routing) -> Routing:
        return routing

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        rows = sorted_rows(routing, experts, x_TD)
        ids_T = experts.numbers(x_TD.shape[0], x_TD.device)
        return experts(x_TD, routing.weights_S.index_select(0, rows.slot_R), rows, ids_T)
