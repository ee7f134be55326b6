"""Numbers of few bits, and the scales that blocks of them share. The specification of every low-precision mode.

    x  ~  factor * scale[block] * code           code: of an element type; scale: of a scale type; factor: fp32, of the tensor

    element   e4m3, e5m2, e2m1   floating point (OCP; largest 448, 57344, 6), no infinities: what is larger saturates
              int8, int4         integers of +-127, +-7: symmetric, for with -128 or -8 a gradient has a bias
    scale     fp32               amax / largest
              pow2, e8m0         a power of two: kept in fp32, or as the byte of its exponent, 2^-127 to 2^127
              e4m3               amax / largest over the tensor's factor, rounded (NVFP4)
    rule      how a power of two follows from the largest magnitude of a block, amax (M: largest of the element, e its exponent):
      floor     2^(floor(log2 amax) - e)             OCP MX; clips what exceeds M
      ceil      2^(ceil(log2 amax) - e)
      rceil     2^ceil(log2(amax / M))               the least that never clips (NVIDIA's)
      even      floor, of amax rounded to the mantissa of the element
      shrink    floor, of values times 3/4, which then never clips; 4/3 is in the factor (Tseng et al., arXiv 2502.20586)
      quest     2^floor(log2(2.92247856 / 6 * std)): the clip with the least error for a Gaussian; what it clips is told by
                `trusted` (Quartet, arXiv 2505.14669, after QuEST, arXiv 2502.05003)
      amax      of scales fp32 and e4m3, as above
      four_six  of e4m3: of amax / 6 and amax / 4 what has the less squared error (arXiv 2512.02010)
    rounding  even         to the nearest, ties to even
              stochastic   up or down, so that the mean is right
              eden         MS-EDEN (Quartet II, arXiv 2601.22813) on rotated e2m1 with e4m3 scales: to the nearest; then scales
                           are multiplied by <x, x> / <x, q(x)> of each rotated run, rounded stochastically: the mean is right
                           over the rotation's signs

**Whatever is not finite stays visible.** An infinity or NaN makes the scale of its block NaN (and with a factor, the tensor), so
that guards see it: saturation would hide it. A block of zeros has codes 0; its scale is 1, or the least of its type. Infinities
cast without a scale saturate. Subnormal codes are used; a scale that underflows to 0 makes its block 0.

**Chance is a function of (key, row, column)**, with the global number of a row: the same draws on every layout, and in a kernel.

Packed for hardware: codes (N, K) as fp8 or int8, or two 4-bit ones a byte, the first in the low bits; scales (N / rows, K /
columns) of a block as fp32, e8m0 or e4m3, not transposed, as `tl.dot_scaled` wants them.

Letters: N rows, K columns, along which a product adds up; n x k blocks.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------- element types


@dataclass(frozen=True)
class Element:
    """largest: of its values. mantissa: bits behind the point, None for integers. least: exponent of the least normal number."""

    bits: int
    largest: float
    mantissa: int | None = None
    least: int = 0

    @property
    def exponent(self) -> int:
        return math.frexp(self.largest)[1] - 1


ELEMENTS = {
    "e4m3": Element(8, 448.0, 3, -6),
    "e5m2": Element(8, 57344.0, 2, -14),
    "e2m1": Element(4, 6.0, 1, 0),
    "int8": Element(8, 127.0),
    "int4": Element(4, 7.0),
}
SCALES = {
    "fp32": ("amax",),
    "pow2": ("floor", "ceil", "rceil", "even", "shrink", "quest"),
    "e4m3": ("amax", "four_six"),
}
SCALES["e8m0"] = SCALES["pow2"]
ROUNDINGS = ("even", "stochastic", "eden")
BLOCKS = ((1, 128), (128, 128), (1, 32), (1, 16), (16, 16), (32, 32))
CLIPS = ("floor", "even", "quest")  # rules under which a value may exceed the largest
E4M3_HEADROOM = 17 / 16  # an e4m3 scale rounds down by 1/17 at most
EDEN_SCALE = 0.93  # of Quartet II: clipping a little costs less than coarser codes
GAUSSIAN_CLIP = 2.92247856  # of E2M1, in standard deviations


def cast(x: Tensor, element: str, random: Tensor | None = None) -> Tensor:
    """fp32 `x` on the grid of the element: the nearest value, ties to even; with `random` in [0, 1), stochastically. Saturates,
    infinities too; NaN stays."""
    kind = ELEMENTS[element]
    x = x.clamp(-kind.largest, kind.largest)
    if kind.mantissa is None:
        return (x.round_() if random is None else _up_or_down(x, random)).add_(0.0)  # no -0
    # The bits of the exponent alone are the power of two below x; subnormals have the step of the least normal numbers.
    step = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    step = step.clamp_(min=2.0**kind.least).mul_(2.0**-kind.mantissa)
    x /= step
    return (x.round_() if random is None else _up_or_down(x, random)).mul_(step)


def _up_or_down(x: Tensor, random: Tensor) -> Tensor:
    # Not floor(x + random): the sum would be rounded.
    low = x.floor()
    return low.add_(random < x - low)


# ---------------------------------------------------------------- chance


def key_of(*parts: int | str) -> int:
    """A 64-bit key of names and numbers, each of which matters."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little", signed=True)


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014); `>>` copies the sign bit."""
    x = (x ^ (x >> 30 & 2**34 - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ (x >> 27 & 2**37 - 1)) * (0x94D049BB133111EB - 2**64)
    return x ^ (x >> 31 & 2**33 - 1)


def line_hash(key: int, ids: Tensor, odd: int) -> Tensor:
    """int32, of the key and the number of a row (odd: 0) or column (1)."""
    # The key is hashed first: else the draws of two keys could be the same numbers, shifted.
    seed, golden = _mix64(torch.tensor(key)).to(ids.device), 0x9E3779B97F4A7C15 - 2**64
    return (_mix64(seed + (ids * 2 + odd) * golden) & 0xFFFFFFFF).int()


def random_bits(key: int, rows_N: Tensor, columns_K: Tensor | int) -> Tensor:
    """int32 (N, K), a hash of the key, the number of a row, int64, and that of a column, int64 (an int: those from 0).

    The sum of a hash of each goes through `lowbias32` (Christopher Wellons, public domain): 32-bit arithmetic for each value.
    """
    if isinstance(columns_K, int):
        columns_K = torch.arange(columns_K, device=rows_N.device)
    row_N, column_K = line_hash(key, rows_N, 0), line_hash(key, columns_K, 1)
    x = row_N[:, None] + column_K
    x ^= x >> 16 & 0xFFFF
    x *= 0x7FEB352D
    x ^= x >> 15 & 0x1FFFF
    x *= 0x846CA68B - 2**32
    return x.bitwise_xor_(x >> 16 & 0xFFFF)


def uniform(key: int, rows_N: Tensor, columns_K: Tensor | int) -> Tensor:
    """fp32 (N, K) in [0, 1), multiples of 2^-24."""
    return (random_bits(key, rows_N, columns_K) >> 8 & 0xFFFFFF).float().mul_(2.0**-24)


def random_signs(key: int, count: int, device: torch.device) -> Tensor:
    """fp32 (count,), +1 or -1."""
    return torch.where(random_bits(key, torch.zeros(1, dtype=torch.int64, device=device), count)[0] < 0, -1.0, 1.0)


# ---------------------------------------------------------------- blocks


@dataclass(frozen=True)
class Format:
    """How a matrix becomes small; see the head of this file. block: rows and columns that share a scale."""

    element: str
    block: tuple[int, int]
    scale: str
    rule: str
    rounding: str = "even"

    @property
    def bits(self) -> float:
        """Of a value, its share of the scale included."""
        scale = 32 if self.scale in ("fp32", "pow2") else 8
        return ELEMENTS[self.element].bits + scale / (self.block[0] * self.block[1])


@dataclass(frozen=True)
class Quantized:
    """codes_NK: on the grid of the element, fp32. scales: fp32, one a block. factor: fp32 scalar, 1 where there is none.
    trusted_NK: bool, what was not clipped, of rule `quest`."""

    format: Format
    codes_NK: Tensor
    scales: Tensor
    factor: Tensor
    trusted_NK: Tensor | None = None

    def values(self) -> Tensor:
        """(N, K) or (E, N, K) fp32: codes times scales, without the factor, which a product's result is multiplied with
        instead. Exact, but for scales that are neither a power of two nor e4m3."""
        return self.codes_NK * spread(self.scales, self.format.block, self.codes_NK.shape)

    def dequantize(self) -> Tensor:
        return self.values() * self.factor.view(-1, *[1] * (self.codes_NK.ndim - 1))


def spread(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of each value."""
    for dim, size in zip((-2, -1), block, strict=True):
        if size > 1:
            scales = scales.repeat_interleave(size, dim)
    return scales[..., : shape[-2], : shape[-1]]


def blocks_of(x_NK: Tensor, block: tuple[int, int]) -> Tensor:
    """(N / n, n, K / k, k), padded with zeros."""
    (n, k), (rows, columns) = block, x_NK.shape
    if rows % n or columns % k:
        x_NK = F.pad(x_NK, (0, -columns % k, 0, -rows % n))
    return x_NK.reshape(-(-rows // n), n, -(-columns // k), k)


def block_amax(x_NK: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each block."""
    blocks = blocks_of(x_NK, block)
    if block[0] == 1:
        return blocks[:, 0].abs().amax(dim=2)
    return blocks.abs().amax(dim=(1, 3))


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent within the range of e8m0, whole exponents as int32; exact, also where fp32 is subnormal."""
    exponent = exponent.clamp(-127, 127)
    half = exponent >> 1
    return ((half + 127) << 23).view(torch.float32) * ((exponent - half + 127) << 23).view(torch.float32)


def power_scales(amax: Tensor, rule: str, kind: Element) -> Tensor:
    """A power of two for each block, by one of the rules of scale `pow2` (but quest)."""
    if rule == "rceil":
        amax = amax / kind.largest
    if rule == "even":
        drop = 23 - (kind.mantissa if kind.mantissa is not None else kind.bits - 2)
        bits = amax.view(torch.int32)  # half up, as in torchao: ties of amax are rare
        amax = (bits + (1 << (drop - 1)) & -(1 << drop)).view(torch.float32)
    mantissa, exponent = torch.frexp(amax)  # mantissa in [1/2, 1)
    up = (mantissa > 0.5).int() if rule in ("ceil", "rceil") else 0
    exponent = exponent - 1 + up - (0 if rule == "rceil" else kind.exponent)
    return power_of_two(exponent.masked_fill(amax == 0, -127))


def quantize(
    x_NK: Tensor, form: Format, key: int = 0, rows_N: Tensor | None = None, columns_K: Tensor | None = None, run: int = 0,
    amax: Tensor | None = None,
) -> Quantized:  # fmt: skip
    """`x_NK`, of any floating type, in the format. Chance is drawn by `key` and the global numbers of rows and columns (default:
    from 0). run: columns rotated together, for eden. amax: scalar, the largest magnitude that the factor is to be made for
    (default: that of x)."""
    x_NK, kind = x_NK.float(), ELEMENTS[form.element]
    rows_N = torch.arange(x_NK.shape[0], device=x_NK.device) if rows_N is None else rows_N
    columns_K = torch.arange(x_NK.shape[1], device=x_NK.device) if columns_K is None else columns_K
    if form.rule == "quest":
        return _quest(x_NK, form)
    block = block_amax(x_NK, form.block)
    one = torch.ones((), device=x_NK.device)
    finite = block.isfinite()
    if form.scale == "e4m3":
        return _two_levels(x_NK, form, block, key, rows_N, columns_K, run, amax)
    if form.scale == "fp32":
        scales, factor = _not_zero(block / kind.largest), one
    else:
        scales, factor = power_scales(block, form.rule, kind), one * (4 / 3 if form.rule == "shrink" else 1)
    scales = torch.where(finite, scales, torch.nan)
    scaled = x_NK / spread(scales, form.block, x_NK.shape)
    if form.rule == "shrink":
        scaled *= 0.75
    random = uniform(key, rows_N, columns_K) if form.rounding == "stochastic" else None
    return Quantized(form, cast(scaled, form.element, random), scales, factor)


def quantize_each(x_ENK: Tensor, form: Format, key: int = 0, rows_EN: Tensor | None = None, run: int = 0) -> Quantized:
    """Each of E matrices by itself, with a factor of its own: codes (E, N, K), scales (E, ...), factor (E,)."""
    e, n, _ = x_ENK.shape
    rows_EN = torch.arange(e * n, device=x_ENK.device).view(e, n) if rows_EN is None else rows_EN
    if form.scale != "e4m3" and n % form.block[0] == 0 and e:  # no block has rows of two, and nothing else joins them
        q = quantize(x_ENK.flatten(0, 1), form, key, rows_EN.flatten(), run=run)
        codes, scales = q.codes_NK.view(x_ENK.shape), q.scales.unflatten(0, (e, -1))
        trusted = None if q.trusted_NK is None else q.trusted_NK.view(x_ENK.shape)
        return Quantized(form, codes, scales, q.factor.expand(e), trusted)
    parts = [quantize(x, form, key, rows, run=run) for x, rows in zip(x_ENK, rows_EN, strict=True)]
    codes, scales, factor = (torch.stack([getattr(q, f) for q in parts]) for f in ("codes_NK", "scales", "factor"))
    told = [q.trusted_NK for q in parts if q.trusted_NK is not None]
    return Quantized(form, codes, scales, factor, torch.stack(told) if told else None)


def _not_zero(x: Tensor) -> Tensor:
    """1 for 0: of what is divided by."""
    return torch.where(x == 0, 1.0, x)


def _quest(x_NK: Tensor, form: Format) -> Quantized:
    # The padding of the last block is no value: its mean square is over those that are there.
    (n, k), kind = form.block, ELEMENTS[form.element]
    count = blocks_of(torch.ones_like(x_NK), (n, k)).sum(dim=(1, 3))
    x = blocks_of(x_NK, (n, k))
    mean, square = x.sum(dim=(1, 3)) / count, x.square().sum(dim=(1, 3)) / count
    std = (square - mean.square()).clamp(min=0).sqrt()
    _, exponent = torch.frexp(GAUSSIAN_CLIP / kind.largest * std + 1e-8)
    scales = torch.where(std.isfinite(), power_of_two(exponent - 1), torch.nan)
    scaled = x_NK / spread(scales, form.block, x_NK.shape)
    trusted = scaled.abs() < kind.largest
    return Quantized(form, cast(scaled, form.element), scales, torch.ones((), device=x_NK.device), trusted)


def _two_levels(
    x_NK: Tensor,
    form: Format,
    block: Tensor,
    key: int,
    rows_N: Tensor,
    columns_K: Tensor,
    run: int,
    amax: Tensor | None,
) -> Quantized:
    """e4m3 scales over the tensor's factor (NVFP4)."""
    kind, eden = ELEMENTS[form.element], form.rounding == "eden"
    # Room to multiply a scale by 6 / 4, or by eden's correction, within e4m3.
    largest_scale = 256.0 if eden or form.rule == "four_six" else 448.0
    room = {"even": 1.0, "stochastic": E4M3_HEADROOM, "eden": E4M3_HEADROOM * EDEN_SCALE}[form.rounding]
    amax = block.amax() if amax is None and block.numel() else amax if amax is not None else block.new_zeros(())
    factor = torch.where(amax.isfinite(), _not_zero(amax * room / (kind.largest * largest_scale)), torch.nan)
    x_NK = x_NK / factor
    scales = cast(block / factor * (room / kind.largest), "e4m3")
    scaled = x_NK / spread(_not_zero(scales), form.block, x_NK.shape)
    if form.rule == "four_six":
        fours = cast(block / factor / 4, "e4m3")
        codes = [
            cast(scaled, form.element),
            cast(x_NK / spread(_not_zero(fours), form.block, x_NK.shape), form.element),
        ]
        both = [Quantized(form, c, s, factor) for c, s in zip(codes, (scales, fours), strict=True)]
        error, error4 = (blocks_of((q.values() - x_NK).square(), form.block).sum(dim=(1, 3)) for q in both)
        less = error4 < error
        codes_NK = torch.where(spread(less, form.block, x_NK.shape), codes[1], codes[0])
        return Quantized(form, codes_NK, torch.where(less, fours, scales), factor)
    if not eden:
        random = uniform(key, rows_N, columns_K) if form.rounding == "stochastic" else None
        return Quantized(form, cast(scaled, form.element, random), scales, factor)
    assert form.block[0] == 1 and run and run % form.block[1] == 0, (form, run)
    codes_NK = cast(scaled, form.element)
    per = run // form.block[1]
    # The correction is of what is multiplied: values with their scales, which differ within a run.
    weight = spread(scales, form.block, x_NK.shape)
    over, under = (
        blocks_of((a * b).view_as(x_NK), (1, run)).sum(dim=(1, 3)) for a, b in ((x_NK, x_NK), (x_NK, codes_NK * weight))
    )
    correction = torch.where(under > 0, over / under, 1.0).repeat_interleave(per, 1)[:, : scales.shape[1]]
    random = uniform(key_of(key, "scales"), rows_N, columns_K[:: form.block[1]])
    return Quantized(form, codes_NK, cast(scales * correction, "e4m3", random), factor)


# ---------------------------------------------------------------- storage


@dataclass(frozen=True)
class Packed:
    """A quantized matrix as memory and hardware have it, with K columns. See the head of this file."""

    format: Format
    codes: Tensor
    scales: Tensor
    factor: Tensor
    columns: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.factor.nbytes

    def unpack(self) -> Quantized:
        kind, form = self.codes.dtype, self.format
        if kind is torch.uint8:
            codes = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).flatten(-2)[..., : self.columns]
            codes_NK = _nibbles(form.element, codes.device)[codes.long()]
        else:
            codes_NK = self.codes.float()
        return Quantized(form, codes_NK, self.scales.float(), self.factor)


def pack(quantized: Quantized) -> Packed:
    """Loses nothing (but `trusted`). A code that is NaN becomes 0 where the element has none; its scale is NaN."""
    form, x_NK = quantized.format, quantized.codes_NK
    types = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}
    scale = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}.get(form.scale, torch.float32)
    if form.element in types:
        codes = (x_NK.nan_to_num(0) if form.element == "int8" else x_NK).to(types[form.element])
    else:
        x_NK = F.pad(x_NK.nan_to_num(0), (0, x_NK.shape[-1] % 2))
        if form.element == "int4":
            nibbles = x_NK.to(torch.int8).view(torch.uint8) & 15
        else:
            table = torch.tensor([0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7], dtype=torch.uint8, device=x_NK.device)
            nibbles = table[(x_NK.abs() * 2).long()] | (x_NK.signbit().to(torch.uint8) << 3)
        codes = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    columns = quantized.codes_NK.shape[-1]
    return Packed(form, codes, _stored(quantized.scales, scale), quantized.factor, columns)


def _stored(scales: Tensor, kind: torch.dtype) -> Tensor:
    if kind is not torch.float8_e8m0fnu:
        return scales.to(kind)
    # Not torch's cast, which takes a scale of 0 or of another mantissa in ways of its own: the exponent's bits are the byte.
    byte = torch.where(scales.isnan(), 255, scales.view(torch.int32) >> 23)
    return byte.to(torch.uint8).view(kind)


def _nibbles(element: str, device: torch.device) -> Tensor:
    """The values of the 16 codes of 4 bits."""
    if element == "int4":
        return torch.tensor([*range(8), *range(-8, 0)], dtype=torch.float32, device=device)
    half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=device)
    return torch.cat((half, -half))
