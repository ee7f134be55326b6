"""LogFMT: numbers as logarithms of few bits, for rows on the wire (DeepSeek, "Insights into DeepSeek-V3", arXiv 2505.09343).

    of each tile of 128 columns:   high = max log|x|,  low = max(min log|x|, high - ln 2^32)  over what is not 0
                                   step = (high - low) / (2^(n-1) - 2)
    code: a sign, and 0 for 0, else 1 + i for exp(low + i step), i = 0 to 2^(n-1) - 2; the nearest in linear space

8 bits are a byte a value; 10 bits are a byte and, for four values at a time, one more with the two low bits of each. What is not
finite makes its tile NaN, so that nothing hides it.

Letters: N rows, K columns, t tiles of a row.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
BITS = (8, 10)


def encode(x_NK: Tensor, bits: int) -> list[Tensor]:
    """[codes uint8 (N, 128 t) or (N, 160 t), fp32 (N, 2 t): low and step of each tile]."""
    assert bits in BITS, bits
    x = F.pad(x_NK.float(), (0, -x_NK.shape[1] % TILE)).unflatten(1, (-1, TILE))
    log = x.abs().log()  # -inf of 0
    high = log.amax(dim=2, keepdim=True)
    low = torch.where(x == 0, torch.inf, log).amin(dim=2, keepdim=True).maximum(high - 32 * math.log(2))
    step = (high - low) / (2 ** (bits - 1) - 2)
    step, low = (torch.where(x.eq(0).all(dim=2, keepdim=True), 0.0, t) for t in (step, low))
    # The nearest in linear space: the boundary between two neighbours is the log of their mean.
    place = (log - low) / torch.where(step == 0, 1.0, step)
    down = place.floor().clamp(0, 2 ** (bits - 1) - 2)
    middle = down + (torch.log1p(torch.expm1(step) / 2) / torch.where(step == 0, 1.0, step))
    code = (down + (place > middle)).clamp(0, 2 ** (bits - 1) - 2) + 1
    # Below the half of the least, 0 is nearer.
    code = torch.where((x == 0) | (log < low - math.log(2)), 0, code).nan_to_num(0).int()
    code = (code | (x.signbit().int() << (bits - 1))).flatten(1)
    if bits == 8:
        payload = code.to(torch.uint8)
    else:
        lows = (code & 3).unflatten(1, (-1, 4))
        shared = lows[..., 0] | lows[..., 1] << 2 | lows[..., 2] << 4 | lows[..., 3] << 6
        payload = torch.cat((code >> 2, shared), dim=1).to(torch.uint8)
    return [payload, torch.cat((low, step), dim=2).flatten(1)]


def decode(payload: list[Tensor], bits: int, columns: int) -> Tensor:
    """fp32 (N, columns)."""
    codes, table = payload
    low, step = table.unflatten(1, (-1, 2, 1)).unbind(dim=2)
    width = low.shape[1] * TILE
    code = codes[:, :width].int()
    if bits == 10:
        shifts = torch.arange(0, 8, 2, device=codes.device)
        code = code << 2 | (codes[:, width:, None].int() >> shifts & 3).flatten(1)
    code = code.unflatten(1, (-1, TILE))
    place = (code & 2 ** (bits - 1) - 1) - 1
    value = torch.where(place < 0, low * 0.0, (low + step * place).exp())  # NaN of a tile's bounds stays
    return torch.where(code >> (bits - 1) == 1, -value, value).flatten(1)[:, :columns]
