"""The all-to-all expert path: rows travel to the rank that holds their expert and back.

    1. sort the slots by expert: rows of one destination lie together, for ranks hold consecutive experts
    2. exchange counts, (W, e) of them: how many rows each rank sends to each of its peers' experts
    3. exchange rows and their router weights, uneven all-to-all
    4. the rank's experts compute; their operation gathers by index, so that (source, expert) order need not become
       (expert, source) order by a copy
    5. the reverse all-to-all brings weighted outputs home, where a token's rows are summed in slot order

Backward is the same journey: the gradient of dispatch is combine, and the reverse. Same inputs, same bits.

Letters: T tokens of this rank, D model width, K experts per token, E experts in all, e on this rank, W ranks of the group,
R rows sent, N rows received.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.kernels.permute import Rows, sort_slots, sum_bags
from moesaic.moe.experts import Experts
from moesaic.moe.router import Routing


class _AllToAll(torch.autograd.Function):
    """Rows of dimension 0 to and from every rank of `group`, `send` and `receive` rows each; backward exchanges the two."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Uneven all-to-all over dimension 0: `send[w]` rows go to rank w of the group, `receive[w]` come from it, in rank order."""
    result = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), receive, send, group=group)
    return result


class _Gather(torch.autograd.Function):
    """x_TD[source_R]; the gradient of a token is the sum of its rows' in slot order, not a scatter-add in any order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(rows.bag, rows.starts)
        return x_TD.index_select(0, rows.source_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return sum_bags(grad_RD, *ctx.saved_tensors), None


class _Combine(torch.autograd.Function):
    """y_TD[t] = sum of y_RD over the rows of token t, in slot order; the adjoint of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(rows.source_R)
        return sum_bags(y_RD, rows.bag, rows.starts)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        (source_R,) = ctx.saved_tensors
        return grad_TD.index_select(0, source_R), None


def received_rows(received_We: Tensor, n_rows: int) -> Rows:
    """Rows as they arrive (by source rank, then local expert), `n_rows` in all -> the same rows sorted by local expert, then
    source rank. The host knows their number already; to ask for it again would be a wait for the device.

    Two sources, two experts, received_We = [[2, 1], [0, 3]]: what arrives is a a b | b b b (experts of each row), in order
    0 1 2 3 4 5. Sorted by expert: rows 0 1, then 2 3 4 5.
    """
    n_experts = received_We.shape[1]
    expert_of_block = torch.arange(n_experts, device=received_We.device).repeat(received_We.shape[0])
    expert_N = expert_of_block.repeat_interleave(received_We.flatten(), output_size=n_rows)
    row_N = torch.arange(expert_N.numel(), device=expert_N.device)
    return sort_slots(row_N, expert_N, received_We.sum(dim=0), expert_N.numel(), per_input=1)


class AllToAllPath:
    """Experts divided over the ranks of `group`, rank w holding experts w * e to (w + 1) * e.

    Every rank of the group must call it equally often, with a batch of any size, even an empty one. The host waits once a call,
    for the counts: NCCL and gloo take the sizes of an uneven exchange from the host.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
        sent_We = routing.counts_E.view(self.ranks, -1)
        received_We = torch.empty_like(sent_We)
        dist.all_to_all_single(received_We, sent_We.contiguous(), group=self.group)
        send, receive = torch.stack([sent_We.sum(dim=1), received_We.sum(dim=1)]).tolist()

        rows = sort_slots(routing.token_S, routing.expert_S, routing.counts_E, routing.tokens, routing.per_token)
        if rows.slot_R.numel() > sum(send):  # padding of unused slots does not travel
            used = sum(send)
            rows = dataclasses.replace(
                rows, source_R=rows.source_R[:used], slot_R=rows.slot_R[:used], bag=rows.bag[:used]
            )
        x_ND = _AllToAll.apply(_Gather.apply(x_TD, rows), send, receive, self.group)
        weights_R1 = routing.weights_S.index_select(0, rows.slot_R)[:, None]
        weights_N1 = _AllToAll.apply(weights_R1, send, receive, self.group)

        arrived = received_rows(received_We, sum(receive))
        y_ND = experts(x_ND, weights_N1[:, 0].index_select(0, arrived.slot_R), arrived)

        y_RD = _AllToAll.apply(y_ND, receive, send, self.group)
        return _Combine.apply(y_RD, rows)
