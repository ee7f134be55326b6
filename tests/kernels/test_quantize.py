"""Casts against ml_dtypes and gfloat bit for bit, scales by hand, and the statistics that low-precision training rests on."""

import math
from collections.abc import Callable

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from moesaic.kernels import quantize as quantize_module
from moesaic.kernels.hadamard import SIZES, hadamard, rotate, rotate_back
from moesaic.kernels.quantize import (
    BLOCKS,
    ELEMENTS,
    SCALES,
    Format,
    Packed,
    cast,
    key_of,
    pack,
    power_scales,
    quantize,
    quantize_each,
    random_bits,
    random_signs,
    uniform,
)

MX4, NV4 = Format("e2m1", (1, 32), "e8m0", "rceil"), Format("e2m1", (1, 16), "e4m3", "amax")
NV4_STOCHASTIC, NV4_EDEN = (Format("e2m1", (1, 16), "e4m3", "amax", r) for r in ("stochastic", "eden"))
TSENG = Format("e2m1", (1, 32), "e8m0", "shrink", "stochastic")
FLOATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m1": ml_dtypes.float4_e2m1fn}


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def relative(error: Tensor, x: Tensor) -> float:
    return (error.double().square().sum() / x.double().square().sum()).item()


def bits(error: Tensor, x: Tensor) -> float:
    """Effective bits of an approximation."""
    return -0.5 * math.log2(relative(error, x))


# ---------------------------------------------------------------- elements


@pytest.mark.parametrize("element", FLOATS)
def test_casts_are_those_of_ml_dtypes(element: str) -> None:
    kind = FLOATS[element]
    # All bf16 numbers, that is all ties of every element here, and fp32 numbers one bit beside them.
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x[x.abs() <= ELEMENTS[element].largest]
    x = torch.cat((x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(-torch.tensor(torch.inf))))
    x = x[x.abs() <= ELEMENTS[element].largest]
    expected = torch.from_numpy(x.numpy().astype(kind).astype(np.float32))
    assert torch.equal(cast(x, element).view(torch.int32), expected.view(torch.int32))  # signs of zeros too
    assert len(x) > 50_000


@pytest.mark.parametrize("element", ELEMENTS)
def test_what_is_no_number_and_what_is_too_large(element: str) -> None:
    largest = ELEMENTS[element].largest
    x = torch.tensor([torch.inf, -torch.inf, 3e38, -largest * 1.9, torch.nan])
    assert cast(x, element)[:4].tolist() == [largest, -largest, largest, -largest]
    assert cast(x, element)[4].isnan()
    grid = cast(gaussian(64, 64) * largest, element)
    assert torch.equal(cast(grid, element), grid)


def test_integers_are_symmetric_and_round_to_even() -> None:
    x = torch.tensor([-9.0, -7.6, -7.5, -0.5, 0.5, 1.5, 2.5, 7.4, 8.0])
    assert cast(x, "int4").tolist() == [-7, -7, -7, 0, 0, 2, 2, 7, 7]
    assert cast(torch.tensor([-128.0, 126.5, 127.5]), "int8").tolist() == [-127, 126, 127]


@pytest.mark.parametrize("element", ELEMENTS)
def test_stochastic_rounding_goes_to_a_neighbour_as_often_as_it_is_near(element: str) -> None:
    largest = ELEMENTS[element].largest
    x = (gaussian(200, 1, 1).abs() * largest / 3).clamp(max=largest) * torch.tensor([-1.0, 1]).repeat(100)[:, None]
    x[:6] = torch.tensor([0.0, 2.0**-20, -(2.0**-8), largest, -largest, 1.0])[:, None]
    draws = cast(x.expand(-1, 4096).clone(), element, uniform(key_of("draws"), torch.arange(200), 4096))
    low, high = draws.amin(dim=1), draws.amax(dim=1)
    on_grid = cast(x, element)[:, 0] == x[:, 0]
    assert torch.equal(low[on_grid], x[on_grid, 0]) and torch.equal(high[on_grid], x[on_grid, 0])
    assert torch.equal(
        cast(((low + high) / 2)[:, None], element)[:, 0].clamp(low, high), cast(((low + high) / 2), element)
    )
    share = ((x[:, 0] - low) / (high - low)).nan_to_num(0)
    mean = draws.double().mean(dim=1)
    error = (mean - x[:, 0]).abs() / (high - low + 1e-30)
    assert (
        error[~on_grid & (low < high)] < 5 * (share * (1 - share)).sqrt()[~on_grid & (low < high)] / 64 + 1e-3
    ).all()


# ---------------------------------------------------------------- blocks and scales


@pytest.mark.parametrize(
    ("element", "info"),
    [("e4m3", gfloat.formats.format_info_mxfp8_e4m3), ("e5m2", gfloat.formats.format_info_mxfp8_e5m2),
     ("e2m1", gfloat.formats.format_info_mxfp4_e2m1)],
)  # fmt: skip
def test_mx_blocks_are_those_of_gfloat(element: str, info: gfloat.BlockFormatInfo) -> None:
    x = gaussian(24, 32, 3) * torch.logspace(-36, 36, 24)[:, None]
    x[5] = 0.0
    x[6] = 1e-44  # subnormal in fp32: the least scale there is
    ours = quantize(x, Format(element, (1, 32), "e8m0", "floor")).dequantize()
    theirs = [gfloat.quantize_block(info, row.double().numpy(), gfloat.compute_scale_amax) for row in x]
    assert torch.equal(ours.double(), torch.from_numpy(np.stack(theirs)))


def test_scales_by_hand() -> None:
    amax = torch.tensor([1.0, 1.5, 1.75, 1.9, 6.0, 6.01, 7.5, 448.0, 449.0, 0.0, 2.0**-140, 3e38])
    e2m1, e4m3 = ELEMENTS["e2m1"], ELEMENTS["e4m3"]

    def powers(rule: str) -> list[float]:
        return power_scales(amax, rule, e2m1)[:7].log2().tolist()

    assert powers("floor") == [-2, -2, -2, -2, 0, 0, 0]
    assert powers("ceil") == [-2, -1, -1, -1, 1, 1, 1]
    assert powers("rceil") == [-2, -2, -1, -1, 0, 1, 1]
    assert powers("even") == [-2, -2, -1, -1, 0, 0, 1]  # 1.75 and 7.5 round up to a power of two
    assert power_scales(amax, "rceil", e4m3)[7:9].tolist() == [1, 2]
    for rule in ("floor", "rceil", "even"):  # the ends of e8m0; what no scale reaches saturates
        assert power_scales(amax, rule, e2m1)[9:11].tolist() == [2.0**-127] * 2
    assert power_scales(amax, "rceil", e2m1)[11] == 2.0**126


@pytest.mark.parametrize("element", ELEMENTS)
def test_scales_over_all_of_fp32(element: str) -> None:
    """Subnormal numbers and both ends of every binade among them, against numpy's frexp in fp64."""
    powers = torch.arange(255, dtype=torch.int32) << 23
    subnormal = 1 << torch.arange(23, dtype=torch.int32)
    bits = torch.cat(
        (*(p + i for p in (powers, subnormal) for i in (-1, 0, 1)), torch.arange(1, 0x7F800000, 49_999).int())
    )
    amax, kind = bits[(bits > 0) & (bits < 0x7F800000)].view(torch.float32), ELEMENTS[element]
    bits_behind = {"e4m3": 3, "e5m2": 2, "e2m1": 1, "int8": 6, "int4": 2}[element]
    for rule in ("floor", "ceil", "rceil", "even"):
        x = amax / kind.largest if rule == "rceil" else amax
        mantissa, exponent = np.frexp(x.double().numpy())
        up = mantissa > 0.5 if rule in ("ceil", "rceil") else np.zeros(len(mantissa))
        if rule == "even":  # whether the mantissa, rounded half up, is that of the next power of two
            up = np.floor(2 * mantissa * 2**bits_behind + 0.5) == 2 * 2**bits_behind
        exponent = exponent - 1 + up - (0 if rule == "rceil" else kind.exponent)
        expected = np.where(x.numpy() == 0, -127, np.clip(exponent, -127, 127))
        assert np.array_equal(np.log2(power_scales(amax, rule, kind).double().numpy()), expected), rule


@pytest.mark.parametrize("element", ELEMENTS)
def test_rules_that_never_clip(element: str) -> None:
    x = gaussian(512, 32, 5) * torch.logspace(-3, 3, 512)[:, None]
    for rule in ("ceil", "rceil", "shrink"):
        q = quantize(x, Format(element, (1, 32), "pow2", rule))
        most = (x * (0.75 if rule == "shrink" else 1) / q.scales).abs().amax(dim=1)
        assert (most <= ELEMENTS[element].largest).all(), rule
        assert (most >= ELEMENTS[element].largest / (2.001 if rule == "rceil" else 4)).all(), rule


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 1), (33, 47), (130, 260)])
def test_blocks_share_a_scale_and_nothing_else(block: tuple[int, int], shape: tuple[int, int]) -> None:
    x = gaussian(*shape, seed=7)
    for scale, rule in (("e8m0", "rceil"), ("fp32", "amax"), ("e4m3", "amax"), ("e4m3", "four_six")):
        form = Format("e2m1", block, scale, rule)
        q = quantize(x, form)
        assert q.scales.shape == (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
        assert q.codes_NK.shape == shape
        n, k = min(block[0], shape[0]), min(block[1], shape[1])
        alone = quantize(x[:n, :k], form, amax=x.abs().amax())
        assert torch.equal(alone.dequantize(), q.dequantize()[:n, :k])
        assert relative(q.dequantize() - x, x) < 0.05


def nvfp4_by_hand(x: np.ndarray, largest_scale: float, fours: bool) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """(codes, scales, factor) of rows in blocks of 16, by ml_dtypes: a factor that gives the largest value the largest scale."""
    factor = np.float32(np.abs(x).max()) / np.float32(6 * largest_scale)
    codes, scales = np.zeros_like(x), np.zeros((x.shape[0], x.shape[1] // 16), np.float32)
    for r, k in np.ndindex(*scales.shape):
        block = x[r, 16 * k : 16 * k + 16] / factor
        tries = []
        for most in (6, 4) if fours else (6,):
            scale = (
                (np.abs(block).max() * (np.float32(1) / np.float32(most)))
                .astype(ml_dtypes.float8_e4m3fn)
                .astype(np.float32)
            )
            code = np.clip(block / (scale or np.float32(1)), -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
            tries.append((((code * scale - block).astype(float) ** 2).sum(), -most, scale, code))
        _, _, scales[r, k], codes[r, 16 * k : 16 * k + 16] = min(tries, key=lambda one: one[:2])
    return codes, scales, factor


@pytest.mark.parametrize("rule", ["amax", "four_six"])
def test_nvfp4_is_that_of_ml_dtypes(rule: str) -> None:
    """Codes, scales and factor, over rows that spread the blocks over all of e4m3's scales, those that underflow among them."""
    x = (
        gaussian(96, 64, 31)
        * torch.logspace(-8, 8, 96, base=2)[:, None]
        * torch.logspace(-6, 6, 96, base=2).flip(0)[:, None] ** 2
    )
    x[::7] *= 2.0**-16
    q = quantize(x, Format("e2m1", (1, 16), "e4m3", rule))
    codes, scales, factor = nvfp4_by_hand(x.numpy(), 256 if rule == "four_six" else 448, rule == "four_six")
    assert q.factor.item() == factor
    alike = (q.scales.numpy() == scales).all(axis=1)
    assert alike.mean() == 1 if rule == "amax" else alike.mean() > 0.9  # two errors may differ in their last bit alone
    assert np.array_equal(q.codes_NK.numpy()[alike], codes[alike])
    assert 0 < (scales == 0).mean() < 0.5 and ((scales > 0) & (scales < 2.0**-6)).any() and scales.max() > 200


def test_factor_by_hand() -> None:
    x = torch.full((1, 16), 6.0)
    x[0, 0] = 6 * 448
    for form, factor, scale in (
        (NV4, 1.0, 448.0), (Format("e2m1", (1, 16), "e4m3", "four_six"), 448 / 256, 256.0),
        (NV4_STOCHASTIC, 17 / 16, 448.0), (Format("int4", (1, 16), "e4m3", "amax"), 6 / 7, 448.0),
    ):  # fmt: skip
        q = quantize(x, form)
        assert q.factor.item() == pytest.approx(factor, rel=1e-6) and q.scales.item() == scale, form
    assert quantize(x, NV4_EDEN, run=16).factor.item() == pytest.approx(17 / 16 * 0.93 * 448 / 256, rel=1e-6)


def test_zeros_infinities_and_nan() -> None:
    for scale, rules in SCALES.items():
        for rule in rules:
            form = Format("e2m1", (1, 16), scale, rule)
            x = gaussian(4, 32, 9)
            x[0] = 0
            assert quantize(x, form).dequantize()[0].tolist() == [0] * 32, form
            assert quantize(torch.zeros(2, 16), form).dequantize().eq(0).all(), form
            assert quantize(torch.zeros(0, 16), form).dequantize().shape == (0, 16)
            for bad in (torch.inf, -torch.inf, torch.nan):
                x[1, 3] = bad
                y = pack(quantize(x, form)).unpack().dequantize()
                assert y[1, :16].isnan().all(), (form, bad)
                assert y[2:].isfinite().all() or scale == "e4m3", form  # the factor is the tensor's
            assert quantize(torch.full((1, 16), 1e-45), form).dequantize().isfinite().all(), form


def test_four_six_is_never_worse_than_six() -> None:
    x = gaussian(64, 64, 11)
    one = Format("e2m1", (1, 16), "e4m3", "four_six")
    q = quantize(x, one)
    errors = (q.dequantize() - x).square().view(64, 4, 16).sum(dim=2)
    # Scales for 6 alone, over the same factor.
    sixes = cast(x.view(64, 4, 16).abs().amax(dim=2) / 6 / q.factor, "e4m3")
    six = cast(x.view(64, 4, 16) / (sixes * q.factor)[..., None], "e2m1") * (sixes * q.factor)[..., None]
    assert (errors <= (six - x.view(64, 4, 16)).square().sum(dim=2) * 1.0001).all()
    assert 0.1 < (q.scales != sixes).float().mean() < 0.9


def test_scales_of_quest() -> None:
    """Against the formula in fp64, over blocks of all sizes; clipped at 2.92 standard deviations or down to half as many."""
    x = gaussian(64, 64, 13) * torch.logspace(-3, 3, 64)[:, None]
    std = x.double().view(64, 2, 32).std(dim=2, correction=0)
    scales = quantize(x, Format("e2m1", (1, 32), "e8m0", "quest")).scales.double()
    assert np.array_equal(np.log2(scales.numpy()), np.floor(np.log2(2.92247856 / 6 * std.numpy() + 1e-8)))
    clip = 6 * scales / std
    assert 1.46 < clip.min() < 1.6 and 2.7 < clip.max() < 2.923


def test_quest_tells_what_it_clips() -> None:
    x = gaussian(64, 64, 13)
    q = quantize(x, Format("e2m1", (1, 32), "e8m0", "quest"))
    assert q.trusted_NK is not None and 0.5 < q.trusted_NK.float().mean() < 0.99
    assert (q.codes_NK[~q.trusted_NK].abs() == 6).all()
    assert torch.equal(q.trusted_NK, (x / q.scales.repeat_interleave(32, 1)).abs() < 6)


FORMS = [
    Format("e4m3", (1, 128), "fp32", "amax"), Format("e4m3", (128, 128), "pow2", "rceil"), TSENG, MX4, NV4,
    Format("e5m2", (1, 32), "e8m0", "floor"), Format("int8", (1, 32), "e8m0", "rceil"), Format("int4", (1, 16), "e4m3", "amax"),
    Format("e2m1", (16, 16), "e4m3", "amax"),
]  # fmt: skip


@pytest.mark.parametrize("form", [*FORMS, NV4_STOCHASTIC, NV4_EDEN, Format("e2m1", (1, 16), "e4m3", "four_six")])
def test_each_matrix_is_cast_by_itself(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows = (
        gaussian(3 * 128, 256, 33).view(3, 128, 256) * torch.tensor([1, 0.01, 30])[:, None, None],
        torch.arange(7, 391),
    )
    alone = [quantize(a, form, key_of(5), r, run=128) for a, r in zip(x, rows.split(128), strict=True)]
    for most in (2**22, 0):  # all at once, one at a time
        monkeypatch.setattr(quantize_module, "TOGETHER", most)
        together = quantize_each(x, form, key_of(5), rows.view(3, 128), run=128)
        for what in ("codes_NK", "scales", "factor"):
            assert torch.equal(getattr(together, what), torch.stack([getattr(q, what) for q in alone])), what
        assert torch.equal(together.dequantize(), torch.stack([q.dequantize() for q in alone]))


@pytest.mark.parametrize("form", FORMS)
def test_packing_loses_nothing(form: Format) -> None:
    x = gaussian(37, 75, 15)
    q = quantize(x, form)
    packed = pack(q)
    back = packed.unpack().dequantize()
    assert torch.equal(back.view(torch.int32), q.dequantize().view(torch.int32))  # signs of zeros too
    values = 37 * 75 if ELEMENTS[form.element].bits == 8 else 37 * 38
    scale_bytes = {"fp32": 4, "pow2": 4, "e8m0": 1, "e4m3": 1}[form.scale]
    assert packed.nbytes == values + q.scales.numel() * scale_bytes + 4
    assert isinstance(packed, Packed) and packed.scales.shape == q.scales.shape


def test_packed_bytes_by_hand() -> None:
    x = torch.tensor([[0.0, -0.5, 1.0, -1.5, 2.0, 3.0, -4.0, 6.0]])
    packed = pack(quantize(x, MX4))
    # sign, 2 bits of exponent, 1 of mantissa; the first value in the low bits
    assert packed.codes.tolist() == [[0x90, 0xB2, 0x54, 0x7E]]
    assert packed.scales.view(torch.uint8).item() == 127
    codes = np.array(packed.codes.numpy()).view(np.uint8)
    theirs = np.stack((codes & 15, codes >> 4), axis=2).reshape(-1).view(ml_dtypes.float4_e2m1fn)
    assert theirs.astype(np.float32).tolist() == x[0].tolist()
    whole = pack(quantize(torch.tensor([[-7.0, 3.0, 1.0, -1.0]]), Format("int4", (1, 16), "fp32", "amax")))
    assert whole.codes.tolist() == [[0x39, 0xF1]]
    scales = pack(quantize(gaussian(8, 32) * torch.logspace(-37, 37, 8)[:, None], MX4)).scales
    assert torch.equal(scales.float(), quantize(gaussian(8, 32) * torch.logspace(-37, 37, 8)[:, None], MX4).scales)
    assert Format("e2m1", (1, 16), "e4m3", "amax").bits == 4.5 and MX4.bits == 4.25


# ---------------------------------------------------------------- chance and rotation


def test_draws_depend_on_key_row_and_column_alone() -> None:
    rows = torch.tensor([5, 2**40 + 1, 7])
    draws = random_bits(key_of("a", 3), rows, 50)
    assert torch.equal(draws[[2, 0]], random_bits(key_of("a", 3), rows[[2, 0]], 50))
    assert torch.equal(draws[:, :20], random_bits(key_of("a", 3), rows, 20))
    assert len({key_of("a", 3), key_of("a", 4), key_of("a3"), key_of("b", 3), key_of(3, "a")}) == 5
    for other in (random_bits(key_of("a", 4), rows, 50), random_bits(key_of("a", 3), rows + 1, 50)):
        assert (draws == other).sum() == 0


def test_draws_are_uniform_and_independent() -> None:
    u = torch.stack([uniform(key, torch.arange(256), 256) for key in range(8)]).double() - 0.5
    n = u.numel()
    assert abs(u.mean()) < 4 / math.sqrt(12 * n)
    assert abs(u.var() * 12 - 1) < 0.01
    for a, b in (
        (u[1:], u[:-1]),
        (u[:, 1:], u[:, :-1]),
        (u[:, :, 1:], u[:, :, :-1]),
        (u, u.mT),
        (u[:, ::2], u[:, 1::2]),
    ):
        assert abs((a * b).mean() * 12) < 4 / math.sqrt(a.numel())
    counts = torch.histc(u.float() + 0.5, 256, 0, 1)
    assert ((counts - n / 256).square() / (n / 256)).sum() < 256 + 5 * math.sqrt(512)
    signs = random_signs(key_of("signs"), 4096, torch.device("cpu"))
    assert set(signs.tolist()) == {-1, 1} and abs(signs.mean()) < 4 / 64


@pytest.mark.parametrize("size", SIZES)
def test_rotation_leaves_products_alone(size: int) -> None:
    matrix = hadamard(size, torch.device("cpu"))
    assert torch.equal(matrix @ matrix.T, torch.eye(size) * size)
    x, w = gaussian(5, 3 * size - 7, 17), gaussian(9, 3 * size - 7, 19)  # the last run is padded
    signs = random_signs(size, size, torch.device("cpu"))
    torch.testing.assert_close(rotate(x, size, signs) @ rotate(w, size, signs).T, x @ w.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate_back(rotate(x, size, signs), size, signs, x.shape[1]), x, rtol=1e-5, atol=1e-5)
    outlier = torch.zeros(1, size)
    outlier[0, 3] = 1
    assert torch.allclose(rotate(outlier, size, signs).abs(), torch.tensor(size**-0.5))


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("form", "decibels"),
    [
        (Format("int8", (1, 32), "e8m0", "rceil"), 41.6), (Format("e4m3", (1, 32), "e8m0", "rceil"), 31.5),
        (Format("int4", (1, 32), "e8m0", "rceil"), 16.85), (MX4, 18.76),
        (Format("int4", (1, 16), "e4m3", "amax"), 21.28), (NV4, 20.44),
    ],
)  # fmt: skip
def test_signal_to_noise_on_gaussian_data(form: Format, decibels: float) -> None:
    """Published and measured values: arXiv 2510.25602, and a script of 2^20 values."""
    x = gaussian(1024, 512, 21)
    assert -10 * math.log10(relative(quantize(x, form).dequantize() - x, x)) == pytest.approx(decibels, abs=0.3)


@pytest.mark.parametrize(
    ("form", "mse"),
    [
        (NV4, 9.0e-3),
        (Format("e2m1", (1, 16), "e4m3", "four_six"), 7.6e-3),
        (NV4_STOCHASTIC, 2.36e-2),
        (NV4_EDEN, 9.8e-3),
    ],
)
def test_error_of_nvfp4_roundings(form: Format, mse: float) -> None:
    """Quartet II (arXiv 2601.22813); 7 % is 0.3 dB."""
    x = gaussian(1024, 512, 23)
    if form.rounding == "eden":
        x = rotate(x, 128, random_signs(1, 128, x.device))
    assert relative(quantize(x, form, key_of(2), run=128).dequantize() - x, x) == pytest.approx(mse, rel=0.07)


def gains(x: Tensor, draw: Callable[[int], Tensor], powers: int = 4) -> list[float]:
    """Effective bits of the mean of 1, 4, 16, ... draws."""
    total, found = torch.zeros_like(x, dtype=torch.float64), []
    for i in range(1, 4**powers + 1):
        total += draw(i)
        if i in [4**p for p in range(powers + 1)]:
            found.append(bits(total / i - x, x))
    return found


def eden(x: Tensor, draw: int) -> Tensor:
    signs = random_signs(key_of("signs", draw), 128, x.device)
    q = quantize(rotate(x, 128, signs), NV4_EDEN, key_of("scales", draw), run=128)
    return rotate_back(q.dequantize(), 128, signs, x.shape[1])


@pytest.mark.parametrize("draw", [
    lambda x, i: quantize(x, NV4_STOCHASTIC, key_of(i)).dequantize(),
    lambda x, i: quantize(x, TSENG, key_of(i)).dequantize(),
    eden,
], ids=["NVFP4 stochastic", "MXFP4 times 3/4 stochastic", "MS-EDEN"])  # fmt: skip
def test_no_bias(draw: Callable[[Tensor, int], Tensor]) -> None:
    """What has the right mean gains a bit whenever four times as many draws are averaged; a bias would stop that."""
    x = gaussian(256, 256, 25)
    found = gains(x, lambda i: draw(x, i))
    for a, b in zip(found, found[1:], strict=False):
        assert b - a == pytest.approx(1.0, abs=0.05), found


def test_signs_belong_before_the_rotation() -> None:
    """Rounding to the nearest, rotated by new signs in each draw: errors average out for a while. With the signs behind the
    rotation, which is what Quartet published, never."""
    x, form = gaussian(256, 256, 27), Format("e2m1", (1, 32), "e8m0", "shrink")

    def before(i: int) -> Tensor:
        signs = random_signs(key_of(i), 32, x.device)
        return rotate_back(quantize(rotate(x, 32, signs), form).dequantize(), 32, signs, 256)

    def behind(i: int) -> Tensor:
        signs = random_signs(key_of(i), 32, x.device).repeat(8)
        return rotate_back(quantize(rotate(x, 32) * signs, form).dequantize() * signs, 32, None, 256)

    right, wrong = gains(x, before), gains(x, behind)
    assert right[1] - right[0] >= 0.9 and right[2] - right[1] >= 0.9
    assert right[4] - right[3] < right[2] - right[1] - 0.1
    assert right[4] - wrong[4] > 3
    assert wrong[4] - wrong[0] < 0.05


def test_cast_of_a_cast() -> None:
    """E4M3 1 x 128, then 128 x 1: powers of two as scales lose nothing more, fp32 ones do (FP8-Flow-MoE, arXiv 2511.02302)."""
    x = gaussian(512, 512, 29)

    def twice(scale: str, rule: str) -> tuple[float, float, float]:
        form = Format("e4m3", (1, 128), scale, rule)
        once = quantize(x, form).dequantize()
        again = quantize(once.T, form).dequantize().T
        return (*(-10 * math.log10(relative(y - x, x)) for y in (once, again)), (again != once).float().mean().item())

    one, two, moved = twice("fp32", "amax")
    assert one == pytest.approx(31.82, abs=0.3) and two == pytest.approx(29.02, abs=0.3) and moved > 0.5
    one, two, moved = twice("pow2", "rceil")
    assert one == pytest.approx(31.53, abs=0.3) and two == pytest.approx(one, abs=0.02) and moved < 0.001


def test_integers_against_floats_with_and_without_rotation() -> None:
    """With heavy tails 4-bit floats are better at NVFP4's block of 16; after a rotation integers are (arXiv 2510.25602)."""
    student = torch.distributions.StudentT(3.0)
    torch.manual_seed(31)
    x = student.sample((512, 512))
    x_rotated = rotate(x, 16, random_signs(31, 16, x.device))

    def qsnr(x: Tensor, element: str) -> float:
        return -10 * math.log10(relative(quantize(x, Format(element, (1, 16), "e4m3", "amax")).dequantize() - x, x))

    assert qsnr(x, "e2m1") > qsnr(x, "int4") + 1
    assert qsnr(x_rotated, "int4") > qsnr(x_rotated, "e2m1") + 1
