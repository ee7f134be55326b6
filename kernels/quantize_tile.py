"""The cast of one tile, in registers, along its rows: what kernels that cast are made of.

moesaic.kernels.quantize is the specification, and the bits are its: divisions and roots are rounded to the nearest, sums within a
block are made in its order. Launches that make such sums (rules quest and four_six, rounding eden) must say
enable_fp_fusion=False, so that none is fused with a product.

Letters: M rows, K columns, n the size of a rotation; blocks of SIDE x G, B of them in a row.
"""

import triton.language as tl

from moesaic.kernels.interpret import jit
from moesaic.kernels.quantize import GAUSSIAN_CLIP

INFINITE = tl.constexpr(0x7F800000)  # the bits of fp32's infinity; NaN's are larger
CLIP = tl.constexpr(GAUSSIAN_CLIP)


@jit
def on_grid(x, bits, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, STOCHASTIC: tl.constexpr):
    """`quantize.cast`: fp32 x on the grid of an element; `bits`: a random int32 for each. NaN stays."""
    nan = x != x
    x = tl.minimum(tl.maximum(tl.where(nan, 0.0, x), -LARGEST), LARGEST)
    power = (x.to(tl.int32, bitcast=True) & INFINITE).to(tl.float32, bitcast=True)
    power = tl.maximum(power, 2.0**LEAST)
    x *= ((254 << 23) - power.to(tl.int32, bitcast=True)).to(
        tl.float32, bitcast=True
    ) * 2.0**MANTISSA  # exact, as 1 / power is
    negative = x.to(tl.int32, bitcast=True) < 0
    if STOCHASTIC:
        low = tl.floor(x)
        x = low + ((bits >> 8 & 0xFFFFFF).to(tl.float32) * 2.0**-24 < x - low).to(tl.float32)
        negative = x < 0
    else:
        x = (x + 12582912.0) - 12582912.0  # 1.5 * 2^23, where fp32 has whole numbers: to the nearest, ties to even
    value = (tl.abs(x) * power * 2.0**-MANTISSA).to(tl.int32, bitcast=True) | (negative.to(tl.int32) << 31)
    return tl.where(nan, float("nan"), value.to(tl.float32, bitcast=True))


@jit
def codes_of(
    x, MANTISSA: tl.constexpr, LEAST: tl.constexpr, NAN: tl.constexpr, SIGNED_ZERO: tl.constexpr, PACK: tl.constexpr
):  # fmt: skip
    """uint8: the codes of fp32 x on the grid; PACK neighbours a byte."""
    nan, negative = x != x, x.to(tl.int32, bitcast=True) < 0
    value = tl.where(nan, 0.0, tl.abs(x))
    # Of a normal number fp32's exponent and first bits, less the difference in bias; of a subnormal one the multiple of the step.
    normal = (value.to(tl.int32, bitcast=True) >> (23 - MANTISSA)) - (126 + LEAST << MANTISSA)
    subnormal = (value * 2.0 ** (MANTISSA - LEAST)).to(tl.int32)
    sign = negative.to(tl.int32) * (64 if NAN else 4) * 2
    code = tl.where(value >= 2.0**LEAST, normal, subnormal)
    code |= sign if SIGNED_ZERO else tl.where(code == 0, 0, sign)
    code = tl.where(nan, NAN, code).to(tl.uint8)
    if PACK == 2:
        first, second = tl.split(code.reshape(x.shape[0], x.shape[1] // 2, 2))
        code = first | (second << 4)
    return code


# ---------------------------------------------------------------- scales


@jit
def sums(x_MK, COUNT: tl.constexpr):
    """COUNT sums of each row: of neighbours, then of neighbouring sums, as `quantize.block_sums`."""
    for _ in tl.static_range(7):
        if x_MK.shape[1] > COUNT:
            first, second = tl.split(x_MK.reshape(x_MK.shape[0], x_MK.shape[1] // 2, 2))
            x_MK = first + second
    return x_MK


@jit
def square_sums(x_MK, SIDE: tl.constexpr, G: tl.constexpr):
    """The sum of squares of each block of SIDE x G."""
    total = sums(x_MK * x_MK, x_MK.shape[1] // G)
    if SIDE > 1:
        total = tl.trans(sums(tl.trans(total), x_MK.shape[0] // SIDE))
    return total


@jit
def spread(scale, SIDE: tl.constexpr, G: tl.constexpr):
    """The scale of its block, SIDE x G, for each value."""
    R: tl.constexpr = scale.shape[0]
    B: tl.constexpr = scale.shape[1]
    if SIDE == 1:
        each = tl.broadcast_to(scale[:, :, None], (R, B, G))
    else:
        each = tl.broadcast_to(scale[:, None, :, None], (R, SIDE, B, G))
    return each.reshape(R * SIDE, B * G)


@jit
def scales_of(
    amax, RULE: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, LARGEST: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    """(fp32: of rule amax the scales, else their inverses; the scales as they are stored) of blocks of which amax has
    the bits of the largest magnitude; of rule quest, of what is to be rounded down to a power of two."""
    finite = amax < INFINITE
    value = amax.to(tl.float32, bitcast=True)
    if RULE == "amax":
        scale = tl.where(amax == 0, 1.0, tl.div_rn(value, LARGEST))
        scale = tl.where(scale == 0, 1.0, scale)
        by, byte = scale, amax
    else:
        bits = amax
        if RULE == "rceil":
            bits = tl.div_rn(value, LARGEST).to(tl.int32, bitcast=True)
        elif RULE == "even":
            bits += 1 << (22 - MANTISSA)
        byte = bits >> 23
        if RULE == "rceil" or RULE == "ceil":
            rest = bits & 0x7FFFFF
            byte += tl.where(byte == 0, rest > 0x400000, rest != 0).to(tl.int32)
        if RULE != "rceil" and RULE != "quest":
            byte -= EXPONENT
        byte = tl.minimum(tl.maximum(byte, 0), 254)
        scale = tl.where(byte == 0, 1 << 22, byte << 23).to(tl.float32, bitcast=True)
        by = tl.where(byte == 254, 1 << 22, (254 - byte) << 23).to(tl.float32, bitcast=True)
    stored = tl.where(finite, byte, 255).to(tl.uint8) if BYTES else tl.where(finite, scale, float("nan"))
    return tl.where(finite, by, float("nan")), stored


@jit
def gaussian_clip(x_MK, column, depth, G: tl.constexpr, LARGEST: tl.constexpr):
    """The bits of quest's clip over the largest element, of each G of a row from `column`; there are `depth` columns."""
    B: tl.constexpr = x_MK.shape[1] // G
    count = tl.minimum(tl.maximum(depth - column - tl.arange(0, B) * G, 1), G).to(tl.float32)[None, :]
    mean, square = tl.div_rn(sums(x_MK, B), count), tl.div_rn(square_sums(x_MK, 1, G), count)
    variance = square - mean * mean
    std = tl.sqrt_rn(tl.where(variance < 0, 0.0, variance))  # NaN stays
    return (std * (CLIP / LARGEST) + 1e-8).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def fine(x):
    """Rounded to e4m3, saturated, as fp32."""
    return tl.where(x != x, x, tl.minimum(x, 448.0)).to(tl.float8e4nv).to(tl.float32)


@jit
def over_scale(x, scale, SIDE: tl.constexpr, G: tl.constexpr):
    """x over the scale of its block; a scale of 0 divides as 1."""
    return tl.div_rn(x, spread(tl.where(scale == 0, 1.0, scale), SIDE, G))


@jit
def fine_cast(
    x, amax, bits, one, SIDE: tl.constexpr, G: tl.constexpr, RULE: tl.constexpr, STOCHASTIC: tl.constexpr,
    MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """(x on the grid, scales on that of e4m3, x) over a factor (NVFP4): a scale is amax times SHARE; of four_six, a fourth of
    amax where that errs less."""
    x, amax = tl.div_rn(x, one), tl.div_rn(amax.to(tl.float32, bitcast=True), one)
    scale = fine(amax * SHARE)
    value = on_grid(over_scale(x, scale, SIDE, G), bits, MANTISSA, LEAST, LARGEST, STOCHASTIC)
    if RULE == "four_six":
        four = fine(amax * 0.25)
        other = on_grid(over_scale(x, four, SIDE, G), bits, MANTISSA, LEAST, LARGEST, STOCHASTIC)
        error = square_sums(value * spread(scale, SIDE, G) - x, SIDE, G)
        less = square_sums(other * spread(four, SIDE, G) - x, SIDE, G) < error
        scale = tl.where(less, four, scale)
        value = tl.where(spread(less.to(tl.int32), SIDE, G) != 0, other, value)
    return value, scale, x


@jit
def coarse_cast(
    x, amax, bits, SIDE: tl.constexpr, G: tl.constexpr, RULE: tl.constexpr, BYTES: tl.constexpr, STOCHASTIC: tl.constexpr,
    EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """(x on the grid, scales as they are stored, x over its scale)."""
    by, stored = scales_of(amax, RULE, EXPONENT, MANTISSA, LARGEST, BYTES)
    by = spread(by, SIDE, G)
    x = tl.div_rn(x, by) if RULE == "amax" else x * by
    if RULE == "shrink":
        x *= 0.75
    return on_grid(x, bits, MANTISSA, LEAST, LARGEST, STOCHASTIC), stored, x


@jit
def as_bytes(scale):
    """Of scales on the grid of e4m3."""
    return scale.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@jit
def corrected(scale, value, x, bits, SIZE: tl.constexpr, G: tl.constexpr):
    """Scales times eden's correction of their run of SIZE, <x, x> / <x, its cast>, rounded stochastically to e4m3."""
    R: tl.constexpr = x.shape[1] // SIZE
    under, over = sums(value * spread(scale, 1, G) * x, R), square_sums(x, 1, SIZE)
    correction = tl.where(under > 0, tl.div_rn(over, under), 1.0)
    return on_grid(scale * spread(correction, 1, SIZE // G), bits, 3, -6, 448.0, True)


@jit
def random_bits(row_hash_M, column_hash_K):
    """int32 (M, K) of the hashes of rows and columns."""
    mixed = (row_hash_M[:, None] + column_hash_K[None, :]).to(tl.uint32, bitcast=True)
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
    return (mixed ^ (mixed >> 16)).to(tl.int32, bitcast=True)


# ---------------------------------------------------------------- a tile


@jit
def rotated(x_MK, rotation_nn, BM: tl.constexpr, BK: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Runs of SIZE columns times the matrix."""
    R: tl.constexpr = BM * BK // SIZE if SIZE else 0
    if SIZE == 128:  # (A, A; B, -B), times A and B: of the whole, three products of TF32 take too much shared memory
        n = tl.arange(0, 64)
        upper = rotation_nn + n[:, None] * SIZE + n[None, :]
        first, second = tl.split(x_MK.reshape(R, 2, 64).permute(0, 2, 1))
        first = tl.dot(first, tl.load(upper), input_precision=PRECISION)
        second = tl.dot(second, tl.load(upper + 64 * SIZE), input_precision=PRECISION)
        x_MK = tl.join(first + second, first - second).permute(0, 2, 1).reshape(BM, BK)
    elif SIZE:
        n = tl.arange(0, SIZE)
        matrix = tl.load(rotation_nn + n[:, None] * SIZE + n[None, :])
        x_MK = tl.dot(x_MK.reshape(R, SIZE), matrix, input_precision=PRECISION).reshape(BM, BK)
    return x_MK


@jit
def store_trusted(trusted, x_MK, places_M, real_M, column, depth, LARGEST: tl.constexpr):
    """A bit for each of `depth` columns: whether x, over its scale, is below the largest element."""
    K: tl.constexpr = x_MK.shape[1]
    kept = (tl.abs(x_MK) < LARGEST) & (column + tl.arange(0, K) < depth)[None, :]
    byte = tl.sum(kept.to(tl.int32).reshape(x_MK.shape[0], K // 8, 8) << tl.arange(0, 8)[None, None, :], axis=2)
    bs, width = column // 8 + tl.arange(0, K // 8), tl.cdiv(depth, 8)
    real = real_M[:, None] & (bs < width)[None, :]
    tl.store(trusted + places_M[:, None] * width + bs[None, :], byte.to(tl.uint8), mask=real)


@jit
def cast_rows(
    x_MK, row_hash_M, column_hash_K, rotation_nn, codes, scales, places_M, real_M, column, C, B, BM: tl.constexpr,
    BK: tl.constexpr, G: tl.constexpr, RULE: tl.constexpr, BYTES: tl.constexpr, ROUNDING: tl.constexpr,
    SIZE: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, LEAST: tl.constexpr, LARGEST: tl.constexpr,
    NAN: tl.constexpr, PACK: tl.constexpr, PRECISION: tl.constexpr, SIGNED_ZERO: tl.constexpr = True, SHARE: tl.constexpr = 0.0,
    factor=None, trusted=None, depth=0,
):  # fmt: skip
    """Casts a tile along its rows, and writes it at rows places_M, from `column`; C bytes and B scales a row. column_hash_K: of
    each column; of rounding eden, of each block. factor: of scales e4m3, points to the tensor's. trusted: of rule quest, what was
    not clipped; `depth` columns are there."""
    x_MK = rotated(x_MK, rotation_nn, BM, BK, SIZE, PRECISION)
    if RULE == "quest":
        amax = gaussian_clip(x_MK, column, depth, G, LARGEST)
    else:
        magnitude = x_MK.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        amax = tl.max(magnitude.reshape(BM, BK // G, G), axis=2)
    bits = 0
    if ROUNDING != "even":
        bits = random_bits(row_hash_M, column_hash_K)
    STOCHASTIC: tl.constexpr = ROUNDING == "stochastic"
    if factor is not None:
        value, scale, x_MK = fine_cast(
            x_MK, amax, bits, tl.load(factor), 1, G, RULE, STOCHASTIC, MANTISSA, LEAST, LARGEST, SHARE
        )
        if ROUNDING == "eden":
            scale = corrected(scale, value, x_MK, bits, SIZE, G)
        stored = as_bytes(scale)
    else:
        value, stored, x_MK = coarse_cast(
            x_MK, amax, bits, 1, G, RULE, BYTES, STOCHASTIC, EXPONENT, MANTISSA, LEAST, LARGEST
        )
    cs = column // PACK + tl.arange(0, BK // PACK)
    code = codes_of(value, MANTISSA, LEAST, NAN, SIGNED_ZERO, PACK)
    tl.store(codes + places_M[:, None] * C + cs[None, :], code, mask=real_M[:, None] & (cs < C)[None, :])
    bs = column // G + tl.arange(0, BK // G)
    tl.store(scales + places_M[:, None] * B + bs[None, :], stored, mask=real_M[:, None] & (bs < B)[None, :])
    if trusted is not None:
        store_trusted(trusted, x_MK, places_M, real_M, column, depth, LARGEST)
