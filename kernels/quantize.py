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
      quest     2^floor(log2(2.92247856 / 6 * std)): the clip with the least error for a Gaussian, or down to half of it, for a
                power of two; what it clips is told by `trusted` (Quartet, arXiv 2505.14669, after QuEST, arXiv 2502.05003)
      amax      of scales fp32 and e4m3, as above
      four_six  of e4m3: of amax / 6 and amax / 4 what has the less squared error (arXiv 2512.02010)
    rounding  even         to the nearest, ties to even
              stochastic   up or down, so that the mean is right
              eden         MS-EDEN (Quartet II, arXiv 2601.22813) on rotated e2m1 with e4m3 scales: to the nearest; then scales
                           are multiplied by <x, x> / <x, q(x)> of each rotated run, rounded stochastically: the mean is right
                           over the rotation's signs

**Whatever is not finite stays visible.** An infinity or NaN makes the scale of its block NaN (and with a factor, the tensor), so
that guards see it: saturation would hide it. A block of zeros has codes 0; its scale is 1, or the least of its type. Infinities
cast without a scale saturate. Subnormal codes are used; a scale that underflows to 0 makes its block 0. Subnormal e4m3 scales, of
blocks below 3.5e-5 of the tensor's largest value, have coarse steps: stochastic rounding then clips, and its mean is too small.
Near the ends of fp32 (squares of quest from 1e19 on, a power of two above 2^127) a block becomes NaN or infinite.
Not here: ties other than to even, a floor under amax (1e-4 in DeepSeek's), an overflow that becomes NaN, which others have.

**Chance is a function of (key, row, column)**, with the global number of a row: the same draws on every layout, and in a kernel.

**Sums within blocks** (quest, four_six, eden) are of neighbours, then of neighbouring sums, in fp32: what they decide is decided
alike on every device, and in a kernel.

Packed for hardware: codes (N, K) as fp8 or int8, or two 4-bit ones a byte, the first in the low bits; scales (N / rows, K /
columns) of a block as fp32, e8m0 or e4m3, not transposed, as `tl.dot_scaled` wants them; what was not clipped, eight bits a byte.

Letters: N rows, K columns, along which a product adds up; n x k blocks.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

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
BYTES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}  # codes that fill one
CLIPS = ("floor", "even", "quest")  # rules under which a value may exceed the largest
E4M3_HEADROOM = 17 / 16  # an e4m3 scale rounds down by 1/17 at most
EDEN_SCALE = 0.93  # of Quartet II: clipping a little costs less than coarser codes
TOGETHER = 2**22  # values of matrices with factors that are cast at once; more take memory, one at a time takes as long
GAUSSIAN_CLIP = 2.92247856  # of E2M1, in standard deviations


def cast(x: Tensor, element: str, random: Tensor | None = None) -> Tensor:
    """fp32 `x` on the grid of the element: the nearest value, ties to even; with `random` in [0, 1), stochastically. Saturates,
    infinities too; NaN stays."""
    return _cast_(x.clone(), ELEMENTS[element], random)


def _cast_(x: Tensor, kind: Element, random: Tensor | None) -> Tensor:
    """`cast`, in x's own memory; `random` is used up."""
    x.clamp_(-kind.largest, kind.largest)
    if kind.mantissa is None:
        return (x.round_() if random is None else _up_or_down_(x, random)).add_(0.0)  # no -0
    # The bits of the exponent alone are the power of two below x; subnormals have the step of the least normal numbers.
    step = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    step.clamp_(min=2.0**kind.least).mul_(2.0**-kind.mantissa)
    x /= step
    return (x.round_() if random is None else _up_or_down_(x, random)).mul_(step)


def _up_or_down_(x: Tensor, random: Tensor) -> Tensor:
    # Not floor(x + random): the sum would be rounded. 1 or 0 in fp32: torch adds and selects by bool several times slower.
    low = x.floor()
    up = random.lt_(x.sub_(low))
    return torch.add(low, up, out=x)


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
    # The key is hashed first: else the draws of two keys could be the same numbers, shifted. On the host, whatever device is the
    # default: a number of its own is an argument of a kernel, where a copy of it to the device would have the host wait.
    seed, golden = _mix64(torch.tensor(key, device="cpu")), 0x9E3779B97F4A7C15 - 2**64
    return (_mix64(seed + (ids * 2 + odd) * golden) & 0xFFFFFFFF).int()


def random_bits(key: int, rows_N: Tensor, columns_K: Tensor | int) -> Tensor:
    """int32 (N, K), a hash of the key, the number of a row, int64, and that of a column, int64 (an int: those from 0).

    The sum of a hash of each goes through `lowbias32` (Christopher Wellons, public domain): 32-bit arithmetic for each value.
    """
    if isinstance(columns_K, int):
        columns_K = torch.arange(columns_K, device=rows_N.device)
    return _mix32(line_hash(key, rows_N, 0)[:, None] + line_hash(key, columns_K, 1))


def _mix32(x: Tensor) -> Tensor:
    """`lowbias32`, in x's own memory."""
    scratch = x >> 16
    x ^= scratch.bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= torch.bitwise_right_shift(x, 15, out=scratch).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    return x.bitwise_xor_(torch.bitwise_right_shift(x, 16, out=scratch).bitwise_and_(0xFFFF))


def uniform(key: int, rows_N: Tensor, columns_K: Tensor | int) -> Tensor:
    """fp32 (N, K) in [0, 1), multiples of 2^-24."""
    return _fraction(random_bits(key, rows_N, columns_K))


def _fraction(bits: Tensor) -> Tensor:
    bits >>= 8
    return bits.bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)


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
        return per_block(torch.mul, self.codes_NK, self.scales, self.format.block)

    def dequantize(self) -> Tensor:
        return self.values() * self.factor.view(-1, *[1] * (self.codes_NK.ndim - 1))


def per_block(
    operation: Callable[..., Tensor], x: Tensor, scales: Tensor, block: tuple[int, int], out: Tensor | None = None
) -> Tensor:  # fmt: skip
    """operation(x, the scale of its block) of each value of x, (N, K) or (E, N, K)."""
    (n, k), (rows, columns) = block, x.shape[-2:]
    if n == 1 and columns % k == 0:
        blocks = None if out is None else out.unflatten(-1, (-1, k))
        return operation(x.unflatten(-1, (-1, k)), scales.unsqueeze(-1), out=blocks).flatten(-2)
    scales = scales.repeat_interleave(k, -1)[..., :columns]
    if n > 1 and rows % n == 0:
        blocks = None if out is None else out.unflatten(-2, (-1, n))
        return operation(x.unflatten(-2, (-1, n)), scales.unsqueeze(-2), out=blocks).flatten(-3, -2)
    return operation(x, scales.repeat_interleave(n, -2)[..., :rows, :] if n > 1 else scales, out=out)


def blocks_of(x_NK: Tensor, block: tuple[int, int]) -> Tensor:
    """(N / n, n, K / k, k), padded with zeros."""
    (n, k), (rows, columns) = block, x_NK.shape
    if rows % n or columns % k:
        x_NK = F.pad(x_NK, (0, -columns % k, 0, -rows % n))
    return x_NK.reshape(-(-rows // n), n, -(-columns // k), k)


def block_amax(magnitudes_NK: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each block; NaN where one is in it."""
    # Bits of magnitudes are ordered as these are, NaN above all; torch's loop over 16 values of fp32 is slow.
    x = blocks_of(magnitudes_NK.view(torch.int32) if block[1] == 16 else magnitudes_NK, block)
    return (x[:, 0] if block[0] == 1 else x.amax(dim=1)).amax(dim=2).view(torch.float32)


def block_sums(x_NK: Tensor, block: tuple[int, int]) -> Tensor:
    """The sum of each block, in the order that the head of this file says: along rows, then down columns."""
    sums = _pairwise(blocks_of(x_NK, block))
    return sums[:, 0] if block[0] == 1 else _pairwise(sums.transpose(1, 2))


def _pairwise(x: Tensor) -> Tensor:
    """The sum over the last dimension, a power of two."""
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def divided(x: Tensor, by: float) -> Tensor:
    """x / by. By a number, torch multiplies with its inverse on CUDA, and may lose a bit."""
    return x / torch.full((), by, device=x.device)


def power_scales(amax: Tensor, rule: str, kind: Element) -> Tensor:
    """A power of two for each block, by one of the rules of scale `pow2` (but quest): at least 2^-127."""
    if rule == "rceil":
        amax = F.threshold(divided(amax, kind.largest), 2.0**-127, 0.0)
    bits, exponent = amax.view(torch.int32), 0 if rule == "rceil" else kind.exponent
    if rule in ("ceil", "rceil"):
        bits = bits + 0x7FFFFF
    if rule == "even":  # half up, as in torchao: ties of amax are rare
        bits = bits + (1 << 22 - (kind.mantissa if kind.mantissa is not None else kind.bits - 2))
    return ((bits & 0x7F800000) - (exponent << 23)).clamp_(min=0x400000).view(torch.float32)


def quantize(
    x_NK: Tensor, form: Format, key: int = 0, rows_N: Tensor | None = None, columns_K: Tensor | None = None, run: int = 0,
    amax: Tensor | None = None,
) -> Quantized:  # fmt: skip
    """`x_NK`, of any floating type, in the format. Chance is drawn by `key` and the global numbers of rows and columns (default:
    from 0). run: columns rotated together, for eden. amax: scalar, the largest magnitude that the factor is to be made for
    (default: that of x)."""
    q = _quantize(x_NK, form, key, rows_N, columns_K, run, None if amax is None else amax.view(1))
    return replace(q, factor=q.factor[0])


def quantize_each(x_ENK: Tensor, form: Format, key: int = 0, rows_EN: Tensor | None = None, run: int = 0) -> Quantized:
    """Each of E matrices by itself, with a factor of its own: codes (E, N, K), scales (E, ...), factor (E,)."""
    e, n, _ = x_ENK.shape
    rows_EN = torch.arange(e * n, device=x_ENK.device).view(e, n) if rows_EN is None else rows_EN
    together = form.scale != "e4m3" or x_ENK.numel() <= TOGETHER
    if n % form.block[0] == 0 and e and together:  # no block has rows of two
        q = _quantize(x_ENK.flatten(0, 1), form, key, rows_EN.flatten(), None, run, parts=e)
        trusted = None if q.trusted_NK is None else q.trusted_NK.view(x_ENK.shape)
        return Quantized(form, q.codes_NK.view(x_ENK.shape), q.scales.unflatten(0, (e, -1)), q.factor, trusted)
    parts = [quantize(x, form, key, rows, run=run) for x, rows in zip(x_ENK, rows_EN, strict=True)]
    codes, scales, factor = (torch.stack([getattr(q, f) for q in parts]) for f in ("codes_NK", "scales", "factor"))
    told = [q.trusted_NK for q in parts if q.trusted_NK is not None]
    return Quantized(form, codes, scales, factor, torch.stack(told) if told else None)


def _quantize(
    x_NK: Tensor, form: Format, key: int, rows_N: Tensor | None, columns_K: Tensor | None, run: int, amax: Tensor | None = None,
    parts: int = 1,
) -> Quantized:  # fmt: skip
    """Of `parts` matrices below each other: factor (parts,)."""
    x_NK, kind = x_NK.float(), ELEMENTS[form.element]
    rows_N = torch.arange(x_NK.shape[0], device=x_NK.device) if rows_N is None else rows_N
    columns_K = torch.arange(x_NK.shape[1], device=x_NK.device) if columns_K is None else columns_K
    if form.rule == "quest":
        return _quest(x_NK, form, parts)
    scratch_NK = x_NK.abs()
    block = block_amax(scratch_NK, form.block)
    if form.scale == "e4m3":
        if amax is None:
            amax = block.view(parts, -1).amax(dim=1) if block.numel() else block.new_zeros(parts)
        return _two_levels(x_NK, form, block, key, rows_N, columns_K, run, amax, scratch_NK)
    scales = _not_zero(divided(block, kind.largest)) if form.scale == "fp32" else power_scales(block, form.rule, kind)
    scales = torch.where(block < torch.inf, scales, torch.nan)
    scaled = per_block(torch.div, x_NK, scales, form.block, out=scratch_NK)
    if form.rule == "shrink":
        scaled *= 0.75
    random = uniform(key, rows_N, columns_K) if form.rounding == "stochastic" else None
    factor = torch.full((parts,), 4 / 3 if form.rule == "shrink" else 1.0, device=x_NK.device)
    return Quantized(form, _cast_(scaled, kind, random), scales, factor)


def _not_zero(x: Tensor) -> Tensor:
    """1 for 0: of what is divided by."""
    return torch.where(x == 0, 1.0, x)


def _quest(x_NK: Tensor, form: Format, parts: int) -> Quantized:
    # The padding of the last block is no value: its mean square is over those that are there.
    (n, k), (rows, columns), kind = form.block, x_NK.shape, ELEMENTS[form.element]
    there = [
        F.pad(x_NK.new_ones(size), (0, -size % block)).view(-1, block).sum(dim=1)
        for size, block in ((rows, n), (columns, k))
    ]
    count = there[0][:, None] * there[1]
    mean, square = block_sums(x_NK, (n, k)) / count, block_sums(x_NK.square(), (n, k)) / count
    std = (square - mean.square()).clamp(min=0).sqrt()
    bits = (GAUSSIAN_CLIP / kind.largest * std + 1e-8).view(torch.int32)
    scales = torch.where(std < torch.inf, (bits & 0x7F800000).view(torch.float32), torch.nan)
    scaled = per_block(torch.div, x_NK, scales, form.block)
    trusted = scaled.abs() < kind.largest
    return Quantized(form, _cast_(scaled, kind, None), scales, torch.ones(parts, device=x_NK.device), trusted)


def room_of(form: Format) -> float:
    """What an e4m3 scale leaves above a block's largest value: a scale rounds down, eden clips."""
    return {"even": 1.0, "stochastic": E4M3_HEADROOM, "eden": E4M3_HEADROOM * EDEN_SCALE}[form.rounding]


def factor_of(amax: Tensor, form: Format) -> Tensor:
    """Of scales e4m3, for a largest magnitude."""
    # Room to multiply a scale by 6 / 4, or by eden's correction, within e4m3.
    largest_scale = 256.0 if form.rounding == "eden" or form.rule == "four_six" else 448.0
    factor = _not_zero(divided(amax * room_of(form), ELEMENTS[form.element].largest * largest_scale))
    return torch.where(amax.isfinite(), factor, torch.nan)


def _two_levels(
    x_NK: Tensor,
    form: Format,
    block: Tensor,
    key: int,
    rows_N: Tensor,
    columns_K: Tensor,
    run: int,
    amax: Tensor,
    scratch_NK: Tensor,
) -> Quantized:
    """e4m3 scales over the tensor's factor (NVFP4), of the parts of which `amax` is."""
    kind, eden = ELEMENTS[form.element], form.rounding == "eden"
    factor = factor_of(amax, form)

    def divided(x: Tensor, out: Tensor) -> Tensor:  # by the factor of its part
        x, out = (t.unflatten(0, (len(amax), -1)) for t in (x, out))
        return torch.div(x, factor[:, None, None], out=out).flatten(0, 1)

    x_NK, block = divided(x_NK, scratch_NK), divided(block, block)
    scales = cast(block * (room_of(form) / kind.largest), "e4m3")
    if form.rule == "four_six":
        codes_NK, scales = _four_six(x_NK, form, scales, cast(block / 4, "e4m3"))
        return Quantized(form, codes_NK, scales, factor)
    scaled = per_block(torch.div, x_NK, _not_zero(scales), form.block, out=None if eden else x_NK)
    if not eden:
        random = uniform(key, rows_N, columns_K) if form.rounding == "stochastic" else None
        return Quantized(form, _cast_(scaled, kind, random), scales, factor)
    assert form.block[0] == 1 and run and run % form.block[1] == 0, (form, run)
    codes_NK = _cast_(scaled, kind, None)
    # The correction is of what is multiplied: values with their scales, which differ within a run.
    under = block_sums(per_block(torch.mul, codes_NK, scales, form.block).mul_(x_NK), (1, run))
    over = block_sums(x_NK.square_(), (1, run))
    correction = torch.where(under > 0, over / under, 1.0).repeat_interleave(run // form.block[1], 1)
    random = uniform(key_of(key, "scales"), rows_N, columns_K[:: form.block[1]])
    scales = scales.mul_(correction[:, : scales.shape[1]])
    return Quantized(form, codes_NK, _cast_(scales, ELEMENTS["e4m3"], random), factor)


def _four_six(x_NK: Tensor, form: Format, sixes: Tensor, fours: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales): of two scales of each block the one with the less squared error."""
    both, errors = [], []
    for scales in (sixes, fours):
        codes = _cast_(per_block(torch.div, x_NK, _not_zero(scales), form.block), ELEMENTS[form.element], None)
        error = per_block(torch.mul, codes, scales, form.block).sub_(x_NK).square_()
        both.append(codes.view(torch.int32))
        errors.append(block_sums(error, form.block))
    less = errors[1] < errors[0]
    # Of codes the bits are chosen, with a mask of ones where `less`: torch's `where` is several times slower.
    change = per_block(torch.bitwise_and, both[1].bitwise_xor_(both[0]), -less.int(), form.block, out=both[1])
    return change.bitwise_xor_(both[0]).view(torch.float32), torch.where(less, fours, sixes)


# ---------------------------------------------------------------- storage


@dataclass(frozen=True)
class Packed:
    """A quantized matrix as memory and hardware have it, with K columns. trusted: what was not clipped, of rule `quest`, as
    `pack_bits` has it. See the head of this file."""

    format: Format
    codes: Tensor
    scales: Tensor
    factor: Tensor
    columns: int
    trusted: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.codes, self.scales, self.factor, self.trusted) if x is not None)

    def unpack(self) -> Quantized:
        if self.format.element in BYTES:
            values = self.codes.float()
        else:
            table = _values_of_bytes(self.format.element, self.codes.device)
            values = table.index_select(0, self.codes.view(torch.uint8).flatten().int()).view(torch.float32)
        per_byte = 8 // ELEMENTS[self.format.element].bits
        codes_NK = values.view(*self.codes.shape[:-1], self.codes.shape[-1] * per_byte)[
            ..., : self.columns
        ].contiguous()
        trusted_NK = None if self.trusted is None else unpack_bits(self.trusted, self.columns)
        return Quantized(self.format, codes_NK, self.scales.float(), self.factor, trusted_NK)


def pack(quantized: Quantized) -> Packed:
    """Loses nothing. A code that is NaN becomes 0 where the element has none; its scale is NaN."""
    form, x_NK = quantized.format, quantized.codes_NK
    scale = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}.get(form.scale, torch.float32)
    if form.element in BYTES:
        codes = (x_NK.nan_to_num(0) if form.element == "int8" else x_NK).to(BYTES[form.element])
    else:
        x_NK = F.pad(x_NK, (0, 1)) if x_NK.shape[-1] % 2 else x_NK
        byte = x_NK.to(torch.float8_e4m3fn).view(torch.uint8)
        nibbles = _nibbles_of_bytes(form.element, byte.device).index_select(0, byte.flatten().int()).view(x_NK.shape)
        pairs = nibbles.view(torch.int16)
        codes = (pairs | pairs >> 4).to(torch.uint8)
    trusted = None if quantized.trusted_NK is None else pack_bits(quantized.trusted_NK)
    columns = quantized.codes_NK.shape[-1]
    return Packed(form, codes, _stored(quantized.scales, scale), quantized.factor, columns, trusted)


def pack_bits(flags: Tensor) -> Tensor:
    """bool (..., K) as uint8 (..., K / 8), the first in the lowest bit, 0 behind the last."""
    eights = F.pad(flags, (0, -flags.shape[-1] % 8)).contiguous().view(torch.int64)
    return (eights * 0x0102040810204080 >> 56).to(torch.uint8)  # bit 8i of eight bytes becomes bit 56 + i


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """bool (..., columns)."""
    byte, bit = (torch.arange(n, dtype=torch.uint8, device=packed.device) for n in (256, 8))
    eights = (byte[:, None] >> bit & 1).view(torch.int64)[:, 0].index_select(0, packed.flatten().int())
    return eights.view(torch.bool).view(*packed.shape[:-1], 8 * packed.shape[-1])[..., :columns]


def _stored(scales: Tensor, kind: torch.dtype) -> Tensor:
    if kind is not torch.float8_e8m0fnu:
        return scales.to(kind)
    # Not torch's cast, which takes a scale of 0 or of another mantissa in ways of its own: the exponent's bits are the byte.
    byte = torch.where(scales.isnan(), 255, scales.view(torch.int32) >> 23)
    return byte.to(torch.uint8).view(kind)


def _values_of_nibbles(element: str) -> Tensor:
    """The values of the 16 codes of 4 bits."""
    if element == "int4":
        return torch.tensor([*range(8), *range(-8, 0)], dtype=torch.float32)
    half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return torch.cat((half, -half))


def _values_of_bytes(element: str, device: torch.device) -> Tensor:
    """(256,): the value of each code; of 4 bits, the two values that a byte holds, as one of 8 bytes: a single look-up."""
    byte = torch.arange(256, dtype=torch.uint8)
    if element in BYTES:
        return byte.view(BYTES[element]).float().to(device)
    values = _values_of_nibbles(element)
    return values[torch.stack((byte & 15, byte >> 4), dim=1).int()].view(torch.int64)[:, 0].to(device)


def _nibbles_of_bytes(element: str, device: torch.device) -> Tensor:
    """uint8 (256,): the code of 4 bits of a value that is given as e4m3; what is none, NaN among them, is 0."""
    table = torch.zeros(256, dtype=torch.uint8)
    table[_values_of_nibbles(element).to(torch.float8_e4m3fn).view(torch.uint8).int()] = torch.arange(
        16, dtype=torch.uint8
    )
    return table.to(device)
