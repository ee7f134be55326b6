"""From slots, pairs of a token and an expert, to rows sorted by expert, and back to sums per token.

    sorted    = the used slots by expert, each expert's in slot order
    rows      = x[token of each]                                   gather
    y[n]      = sum over the rows of input row n, in slot order    `sum_bags`

`moesaic.kernels.permute_triton` does it in two launches.

Letters: N input rows, D model width, E experts, S slots, R routed rows, K slots per input row, M tile rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """How each expert's rows are cut into tiles of M rows: the last of each may be cut short.

    starts_E     int64 (E + 1,), the first row of each expert, then the number of all used rows
    ends_E       int64 (E,), tiles of the experts up to this one, itself included
    expert       int32 (ceil(R / M) + E,), the expert of each tile; E past the last. Tile i of expert e is rows starts_E[e] +
                 (i - ends_E[e - 1]) M and on
    """

    starts_E: Tensor
    ends_E: Tensor
    expert: Tensor


@dataclass(frozen=True)
class Rows:
    """R rows sorted by expert, and the way there and back.

    source_R   int64, row r is a copy of input row source_R[r]
    slot_R     int64, the slot that row r is
    expert_R   int64, the expert of row r
    bag        int64, the rows of input row 0 in slot order, then those of input row 1, …: (N, K) where all have K, else (R,)
    starts     None where bag is (N, K), else int64 (N + 1,): input row n has bag[starts[n] : starts[n + 1]]
    counts_E   int64, rows of each expert; rows past their sum are padding, in no bag
    """

    source_R: Tensor
    slot_R: Tensor
    expert_R: Tensor
    bag: Tensor
    starts: Tensor | None
    counts_E: Tensor


def sort_slots(token_S: Tensor, expert_S: Tensor, counts_E: Tensor, inputs: int, per_input: int) -> Rows:
    """Rows of the slots (token_S[s], expert_S[s]), int64; expert E marks an unused slot. counts_E: used slots per expert.

    `per_input` = K > 0 says that slots are those of input row 0, then of row 1, …, K each, all used. Else, unused slots are
    cut off on a CPU, where sizes are known without waiting, and stay as padding on CUDA.
    """
    slot_R = expert_S.argsort(stable=True)
    if per_input:
        bag = _inverse(slot_R).view(-1, per_input)
        return Rows(slot_R // per_input, slot_R, expert_S[slot_R], bag, None, counts_E)
    bag, starts = bags_by_token(_inverse(slot_R), token_S, expert_S == counts_E.numel(), inputs)
    if on_host(slot_R):
        used = int(counts_E.sum())
        slot_R, bag = slot_R[:used], bag[:used]
    return Rows(token_S[slot_R].clamp(max=max(inputs - 1, 0)), slot_R, expert_S[slot_R], bag, starts, counts_E)


def bags_by_token(row_S: Tensor, token_S: Tensor, unused_S: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """(bag, starts) of `Rows`, where inputs have any number of rows; row_S: the row of each slot."""
    token_S = token_S.masked_fill(unused_S, inputs)
    bag = row_S[token_S.argsort(stable=True)]
    per_token = torch.zeros(inputs + 2, dtype=torch.int64, device=token_S.device)
    return bag, per_token.scatter_add_(0, token_S + 1, torch.ones_like(token_S)).cumsum(0)[:-1]


def cut_tiles(counts_E: Tensor, rows: int, tile: int) -> Tiles:
    """The specification of `Tiles`."""
    n_experts, ends_E = counts_E.numel(), (-(-counts_E // tile)).cumsum(0)
    place = torch.arange(-(-rows // tile) + n_experts, device=counts_E.device)
    expert = torch.searchsorted(ends_E, place, right=True).int()
    return Tiles(torch.cat((counts_E.new_zeros(1), counts_E.cumsum(0))), ends_E, expert)


def on_host(tensor: Tensor) -> bool:
    """Whether reading a value costs no wait for a device."""
    return tensor.device.type == "cpu"


def _inverse(permutation: Tensor) -> Tensor:
    places = torch.arange(permutation.numel(), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, places)


def sum_bags(y_RD: Tensor, bag: Tensor, starts: Tensor | None) -> Tensor:
    """y_ND[n] = sum of y_RD over the rows of bag n, in slot order: the same bits every time, unlike a scatter-add on CUDA.

    `starts` are given as N + 1 bags, of which the last, thrown away, takes the padding: with `include_last_offset`, torch's
    CUDA kernel runs the last real bag on to the end of `bag`, whatever the last offset says.
    """
    if bag.numel() == 0:
        return y_RD.new_zeros(bag.shape[0] if starts is None else starts.numel() - 1, y_RD.shape[1])
    if starts is None:
        return F.embedding_bag(bag, y_RD, mode="sum")
    y_ND = F.embedding_bag(bag, y_RD, starts, mode="sum")[:-1]
    # The same memory, but no view in autograd's eyes: FSDP2 warns of modules that return one.
    return torch.ops.aten._unsafe_view(y_ND, y_ND.shape)
