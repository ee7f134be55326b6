"""Rows on the wire in fewer bytes: what `precision.dispatch` and `precision.combine` name.

    way out   fp8       E4M3 with a power of two for each 128 columns, as a byte: 1 + 1/128 bytes a value. It is fp8_block's cast
                        of an input, so that casting again there changes nothing
    way back  bf16      2 bytes a value
              logfmt8, logfmt10    moesaic.kernels.logfmt: 1 or 1.25 bytes, and 8 for each 128 columns

Gradients travel as they are, as if nothing had been encoded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.kernels import logfmt
from moesaic.kernels.quantize import Format, Packed, pack, quantize

FP8 = Format("e4m3", (1, 128), "e8m0", "rceil")


class Fp8:
    def encode(self, x_TD: Tensor) -> Sequence[Tensor]:
        packed = pack(quantize(x_TD, FP8))
        return [packed.codes.view(torch.uint8), packed.scales.view(torch.uint8)]  # types that every backend carries

    def decode(self, payload: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        codes, scales = payload[0].view(torch.float8_e4m3fn), payload[1].view(torch.float8_e8m0fnu)
        one = torch.ones((), device=codes.device)
        return Packed(FP8, codes, scales, one, codes.shape[1]).unpack().values().to(dtype)


class BF16:
    def encode(self, x_TD: Tensor) -> Sequence[Tensor]:
        return [x_TD.bfloat16()]

    def decode(self, payload: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return payload[0].to(dtype)


class LogFMT:
    """Of rows of `width` columns."""

    def __init__(self, bits: int, width: int) -> None:
        self.bits, self.width = bits, width

    def encode(self, x_TD: Tensor) -> Sequence[Tensor]:
        return logfmt.encode(x_TD, self.bits)

    def decode(self, payload: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return logfmt.decode(list(payload), self.bits, self.width).to(dtype)


def codecs(dispatch: str, combine: str, width: int) -> tuple[Fp8 | None, BF16 | LogFMT | None]:
    """Of `precision.dispatch` and `precision.combine`, for rows of `width` columns; none for `high`."""
    bits = {"logfmt8": 8, "logfmt10": 10}.get(combine)
    back = BF16() if combine == "bf16" else LogFMT(bits, width) if bits else None
    return Fp8() if dispatch == "fp8" else None, back
