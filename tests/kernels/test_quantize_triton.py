"""Casts along rows and columns in one pass: the codes and scales of `quantize`, bit by bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moesaic.kernels import quantize_triton as module
from moesaic.kernels.grouped_gemm import schedule
from moesaic.kernels.hadamard import rotate
from moesaic.kernels.interpret import INTERPRET
from moesaic.kernels.quantize import Format, Packed, pack, quantize, quantize_each, random_signs
from moesaic.kernels.quantize_triton import TILE, quantize_squares, quantize_tiles
from moesaic.kernels.testing import mutated

DEVICE = "cpu" if INTERPRET else "cuda"
FORMATS = [
    Format("e4m3", (1, 128), "fp32", "amax"),
    Format("e4m3", (1, 128), "pow2", "rceil", "stochastic"),
    Format("e4m3", (1, 32), "e8m0", "ceil"),
    Format("e4m3", (1, 32), "e8m0", "rceil"),
    Format("e2m1", (1, 32), "e8m0", "floor"),
    Format("e2m1", (1, 32), "e8m0", "even"),
    Format("e2m1", (1, 32), "e8m0", "shrink", "stochastic"),
    Format("e2m1", (1, 16), "pow2", "rceil"),
    Format("e2m1", (1, 16), "e4m3", "amax"),
    Format("e2m1", (1, 16), "e4m3", "amax", "stochastic"),
]


def values(rows: int, columns: int) -> Tensor:
    """Of all sizes, with zeros of both signs, what fp32 hardly represents, ties, blocks of zeros."""
    x = torch.randn(rows, columns) * 2.0 ** torch.randint(-20, 20, (rows, 1))
    x[::5] = torch.randint(-24, 25, (len(x[::5]), columns)) / 4
    x[1::7] *= 1e-37
    x[2::7, :64] = 0.0
    x[2::7, 64:70] = -0.0
    return x


def equal(made: Packed | None, want: Packed) -> None:
    assert made is not None
    n = want.codes.shape[-1]
    assert made.format == want.format and torch.equal(made.factor.cpu().nan_to_num(-1), want.factor.nan_to_num(-1))
    codes, scales = made.codes.cpu(), made.scales.cpu()
    if scales.dtype == torch.float8_e8m0fnu:
        scales, want_scales = scales.view(torch.uint8), want.scales.view(torch.uint8)
    else:
        scales, want_scales = scales.float(), want.scales.float()
    assert torch.equal(scales[:, : want_scales.shape[1]].nan_to_num(-1), want_scales.nan_to_num(-1))
    a, b = codes[:, :n], want.codes
    if a.dtype == torch.float8_e4m3fn:
        both = a.float().isnan() & b.float().isnan()
        a, b = a.view(torch.uint8).masked_fill(both, 0), b.view(torch.uint8).masked_fill(both, 0)
    assert torch.equal(a, b)


def check(form: Format, x: Tensor, counts: list[int], size: int = 0) -> None:
    ids, signs = torch.randint(0, 10**6, (len(x),)), random_signs(5, size, torch.device("cpu")) if size else None
    plan = schedule(torch.tensor(counts).to(DEVICE), TILE)
    rows, columns = quantize_tiles(
        x.to(DEVICE), form, plan, columns=True, keys=(3, 4), ids_N=ids.to(DEVICE), size=size,
        signs_n=None if signs is None else signs.to(DEVICE),
    )  # fmt: skip
    equal(rows, pack(quantize(rotate(x, size, signs) if size else x, form, 3, ids)))
    assert columns is not None
    first, amax = 0, x.abs().amax()  # of scales e4m3, all experts have one factor
    if size:
        amax = torch.stack(
            [rotate(p.T.contiguous(), size, signs).abs().amax() for p in x.split(counts) if len(p)]
        ).amax()
    for part, numbers in zip(x.split(counts), ids.split(counts), strict=True):
        if len(part):
            y = part.T.contiguous()
            if size:
                y = rotate(y, size, signs)
                numbers = torch.cat((numbers, -1 - torch.arange(y.shape[1] - len(numbers))))
            want = pack(quantize(y, form, 4, None, numbers, amax=amax))
            per = 2 if form.element == "e2m1" else 1
            codes, scales = columns.codes[:, first // per :], columns.scales[:, first // form.block[1] :]
            equal(Packed(form, codes, scales, columns.factor, 0), want)
        first += -(-len(part) // TILE) * TILE


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_equal(form: Format) -> None:
    torch.manual_seed(0)
    check(form, values(150, 150), [9, 0, 140, 1])


@pytest.mark.parametrize("form", [*FORMATS[:3], FORMATS[-1]], ids=str)
def test_rotated(form: Format) -> None:
    """Of whole numbers, whose sums are exact."""
    torch.manual_seed(1)
    for size in (16, 64):
        check(form, torch.randint(-9, 10, (40, 130)).float(), [33, 7], size)


@pytest.mark.parametrize("form", FORMATS[::2], ids=str)
def test_what_is_not_finite(form: Format) -> None:
    x = torch.ones(20, 140)
    x[3, 100], x[4, 5], x[5, 130] = torch.inf, torch.nan, -torch.inf
    check(form, x, [20])


def test_gathered_and_refused() -> None:
    torch.manual_seed(2)
    x, source = torch.randn(9, 40), torch.randint(0, 9, (30,))
    plan = schedule(torch.tensor([30]).to(DEVICE), TILE)
    rows, columns = quantize_tiles(x.to(DEVICE), FORMATS[3], plan, source_N=source.to(DEVICE))
    equal(rows, pack(quantize(x[source], FORMATS[3])))
    assert columns is None
    with pytest.raises(ValueError, match="any rule but quest"):
        quantize_tiles(x.to(DEVICE), Format("e2m1", (1, 32), "e8m0", "quest"), plan)


SQUARES = [
    Format("e4m3", (128, 128), "pow2", "rceil"),
    Format("e4m3", (128, 128), "fp32", "amax"),
    Format("e2m1", (32, 32), "e8m0", "even"),
    Format("e4m3", (32, 32), "e8m0", "shrink"),
    Format("e2m1", (16, 16), "e8m0", "floor"),
    Format("e2m1", (16, 16), "e4m3", "amax"),
]


@pytest.mark.parametrize("form", SQUARES, ids=str)
def test_squares(form: Format) -> None:
    """Of matrices that are no multiple of a block, each by itself."""
    torch.manual_seed(3)
    w = values(2 * 150, 141).view(2, 150, 141)
    w[1, 140, 130] = torch.nan
    want, made = pack(quantize_each(w, form)), quantize_squares(w.to(DEVICE), form)
    assert made.columns == 141
    for e in range(2):
        parts = [Packed(form, p.codes[e], p.scales[e], p.factor[e], 141) for p in (made, want)]
        equal(*parts)
    with pytest.raises(ValueError, match="square blocks"):
        quantize_squares(w.to(DEVICE), FORMATS[0])


@pytest.mark.parametrize("first", FORMATS[:2], ids=str)
def test_casts_of_casts_and_of_weighted_rows(first: Format) -> None:
    """As the emulation makes them: what was cast along rows, in fp32, cast again along columns; rows times their weight."""
    torch.manual_seed(4)
    x, source, weights = values(12, 300), torch.randint(0, 12, (40,)), torch.rand(40)
    x[3, 100] = torch.inf
    form, counts = Format("e4m3", (1, 128), "pow2", "rceil"), [30, 0, 10]
    once = pack(quantize(x, first, 1))
    plan = schedule(torch.tensor(counts).to(DEVICE), TILE)
    on_device = Packed(first, once.codes.to(DEVICE), once.scales.to(DEVICE), once.factor.to(DEVICE), 300)
    for given, scale, rows in ((on_device, None, once.unpack().dequantize()[source]),
                               (x.to(DEVICE), weights, x[source] * weights[:, None])):  # fmt: skip
        by_row, made = quantize_tiles(
            given, form, plan, columns=True, source_N=source.to(DEVICE),
            weights_N=None if scale is None else scale.to(DEVICE),
        )  # fmt: skip
        equal(by_row, pack(quantize(rows, form)))
        assert made is not None
        for part, place in ((rows[:30], 0), (rows[30:], 128)):
            here = Packed(form, made.codes[:, place:], made.scales[:, place // 128 :], made.factor, 0)
            equal(here, pack(quantize(part.T.contiguous(), form)))


MUTANTS = [
    ("codes_of", "(x + 12582912.0) - 12582912.0", "tl.floor(x + 0.5)"),  # ties up
    ("scales_of", "rest > 0x400000", "rest != 0"),  # subnormal
    ("_quantize_kernel", "first * BM +", "0 +"),
]


BROKEN = [
    ("_values", "ks // GX", "0 * ks", lambda: test_casts_of_casts_and_of_weighted_rows(FORMATS[0])),
    ("_values", "weights_N + rows", "weights_N + places", lambda: test_casts_of_casts_and_of_weighted_rows(FORMATS[0])),
    ("_squares_kernel", "amax = tl.maximum(amax, _amax_of_squares(x, BN, SIDE, G))",
     "amax = _amax_of_squares(x, BN, SIDE, G)", lambda: test_squares(SQUARES[0])),
    ("_squares_kernel", "w += e * stride_e", "w += 0 * stride_e", lambda: test_squares(SQUARES[2])),
]  # fmt: skip


@pytest.mark.parametrize("mutant", BROKEN, ids=lambda mutant: mutant[2])
def test_notices_of_squares_and_casts_of_casts(mutant: tuple[str, str, str, Callable[[], None]]) -> None:
    kernel, old, new, test = mutant
    with mutated(getattr(module, kernel), old, new), pytest.raises(AssertionError):
        test()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[0])
def test_notices(mutant: tuple[str, str, str]) -> None:
    kernel, old, new = mutant
    with mutated(getattr(module, kernel), old, new), pytest.raises(AssertionError):
        test_equal(FORMATS[3])
