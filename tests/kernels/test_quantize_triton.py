"""Casts along rows and columns in one pass: the codes and scales of `quantize`, bit by bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.kernels import quantize_tile, quantize_triton
from moesaic.kernels.grouped_gemm import schedule
from moesaic.kernels.hadamard import rotate
from moesaic.kernels.interpret import INTERPRET
from moesaic.kernels.quantize import Format, Packed, pack, quantize, quantize_each, random_signs
from moesaic.kernels.quantize_triton import TILE, quantize_squares, quantize_tiles
from moesaic.kernels.scaled_gemm import by_column
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
    Format("e2m1", (1, 16), "e4m3", "four_six"),
]
QUEST, QUEST_FP32 = Format("e2m1", (1, 32), "e8m0", "quest"), Format("e2m1", (1, 16), "pow2", "quest")
SIX, FOUR_SIX = FORMATS[-3], FORMATS[-1]
EDEN, AGAIN = Format("e2m1", (1, 16), "e4m3", "amax", "eden"), FORMATS[6]


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
    assert made.format == want.format and (made.trusted is None) == (want.trusted is None)
    assert want.trusted is None or (made.trusted is not None and torch.equal(made.trusted.cpu(), want.trusted))
    assert torch.equal(made.factor.cpu().nan_to_num(-1), want.factor.nan_to_num(-1))
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
        x.to(DEVICE), form, plan, columns=form.rule != "quest", keys=(3, 4), ids_N=ids.to(DEVICE), size=size,
        signs_n=None if signs is None else signs.to(DEVICE),
    )  # fmt: skip
    equal(rows, pack(quantize(rotate(x, size, signs) if size else x, form, 3, ids, run=size)))
    if form.rule == "quest":
        return
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
            want = pack(quantize(y, form, 4, None, numbers, size, amax))
            per = 2 if form.element == "e2m1" else 1
            codes, scales = columns.codes[:, first // per :], columns.scales[:, first // form.block[1] :]
            equal(Packed(form, codes, scales, columns.factor, 0), want)
        first += -(-len(part) // TILE) * TILE


@pytest.mark.parametrize("form", [*FORMATS, QUEST, QUEST_FP32], ids=str)
def test_equal(form: Format) -> None:
    torch.manual_seed(0)
    check(form, values(150, 150), [9, 0, 140, 1])


@pytest.mark.parametrize("form", [*FORMATS[:3], *FORMATS[-2:], EDEN, QUEST], ids=str)
def test_rotated(form: Format) -> None:
    """Of whole numbers, whose sums are exact; with blocks of zeros, and of what the tensor's factor leaves no scale."""
    torch.manual_seed(1)
    for size in (16, 64):
        x = torch.randint(-9, 10, (40, 130)).float()
        x[5] *= 2.0**-14
        x[6:20, :128] = 0.0
        check(form, x, [33, 0, 7], size)


@pytest.mark.parametrize("form", [EDEN, QUEST, AGAIN], ids=str)
@pytest.mark.parametrize("size", [32, 128])
def test_rotated_as_recipes_do(form: Format, size: int) -> None:
    """n^(-1/2) is no fraction of two: of two powers of it in a run, whose sum is rounded once."""
    torch.manual_seed(5)
    x, i = torch.zeros(150, 130), torch.arange(150)
    for step in (5, 11):
        x[i, i * step % size + torch.randint(0, 128 // size, (150,)) * size] = 2.0 ** torch.randint(-3, 4, (150,))
    check(form, x, [9, 0, 140, 1], size)


@pytest.mark.parametrize("form", [*FORMATS[::2], QUEST], ids=str)
def test_what_is_not_finite(form: Format) -> None:
    x = torch.ones(20, 140)
    x[3, 100], x[4, 5], x[5, 130] = torch.inf, torch.nan, -torch.inf
    check(form, x, [20])


def test_what_is_not_finite_rotated() -> None:
    for form in (EDEN, QUEST):
        x = torch.randint(-9, 10, (20, 140)).float()
        x[3, 100] = torch.nan
        check(form, x, [20], 16)


def test_gathered_and_refused() -> None:
    torch.manual_seed(2)
    x, source = torch.randn(9, 40), torch.randint(0, 9, (30,))
    plan = schedule(torch.tensor([30]).to(DEVICE), TILE)
    rows, columns = quantize_tiles(x.to(DEVICE), FORMATS[3], plan, source_N=source.to(DEVICE))
    equal(rows, pack(quantize(x[source], FORMATS[3])))
    assert columns is None
    with pytest.raises(ValueError, match="quest along rows alone"):
        quantize_tiles(x.to(DEVICE), QUEST, plan, columns=True)
    with pytest.raises(ValueError, match="one row a block"):
        quantize_tiles(x.to(DEVICE), SQUARES[0], plan)


SQUARES = [
    Format("e4m3", (128, 128), "pow2", "rceil"),
    Format("e4m3", (128, 128), "fp32", "amax"),
    Format("e2m1", (32, 32), "e8m0", "even"),
    Format("e4m3", (32, 32), "e8m0", "shrink"),
    Format("e2m1", (16, 16), "e8m0", "floor"),
    Format("e2m1", (16, 16), "e4m3", "amax"),
    Format("e2m1", (16, 16), "e4m3", "four_six"),
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


@pytest.mark.parametrize(
    ("first", "form", "size"),
    [
        (FOUR_SIX, AGAIN, 0),
        (AGAIN, SIX, 0),
        (FORMATS[0], FORMATS[1], 0),
        (FORMATS[3], AGAIN, 0),
        (FORMATS[3], AGAIN, 16),
        (QUEST, EDEN, 64),
    ],
    ids=str,
)
def test_casts_of_casts(first: Format, form: Format, size: int) -> None:
    """Codes, scales and factors of every kind, read through source_N, ragged, in odd columns. Rotated: of scales whose powers are
    near each other, so that sums are exact."""
    torch.manual_seed(6)
    x, source, counts = torch.randn(12, 141), torch.randint(0, 12, (40,)), [30, 0, 10]
    if not size:
        x = values(12, 141)
        x[:, 64:96] = torch.randn(12, 32) * 2.0**-125  # scales of e8m0 are the least, and no normal number
    if "e4m3" not in (first.scale, form.scale):
        x[source[2], 100] = torch.nan
    ids, signs = torch.randint(0, 10**6, (40,)), random_signs(5, size, torch.device("cpu")) if size else None
    once = pack(quantize(x, first, 1))
    given = Packed(first, *(v.to(DEVICE) for v in (once.codes, once.scales, once.factor)), 141)
    _, made = quantize_tiles(
        given, form, schedule(torch.tensor(counts).to(DEVICE), TILE), rows=False, columns=True, source_N=source.to(DEVICE),
        keys=(3, 4), ids_N=ids.to(DEVICE), size=size, signs_n=None if signs is None else signs.to(DEVICE),
    )  # fmt: skip
    assert made is not None
    parts = [p.T.contiguous() for p in once.unpack().dequantize()[source].split(counts)]
    parts = [rotate(p, size, signs) if size and p.numel() else p for p in parts]
    amax = torch.stack([p.abs().amax() for p in parts if p.numel()]).amax()
    per = 2 if form.element == "e2m1" else 1
    for y, numbers, place in ((parts[0], ids[:30], 0), (parts[2], ids[30:], 128)):
        numbers = torch.cat((numbers, -1 - torch.arange(y.shape[1] - len(numbers))))
        want = pack(quantize(y, form, 4, None, numbers, size, amax))
        equal(
            Packed(form, made.codes[:, place // per :], made.scales[:, place // form.block[1] :], made.factor, 0), want
        )


@pytest.mark.parametrize(("form", "size"), [(FOUR_SIX, 0), (QUEST, 64), (EDEN, 64), (AGAIN, 16)], ids=str)
def test_matrices(form: Format, size: int) -> None:
    """Experts' weights: a factor and numbers for each, of the cast of W, and of that of its transpose or its cast's."""
    torch.manual_seed(7)
    e, n, k, first = 3, 150, 141, 5
    w = torch.randint(-6, 7, (e, n, k)).float()
    w[1] /= 4
    signs = random_signs(5, size, torch.device("cpu")) if size else None
    plan = schedule(torch.full((e,), n).to(DEVICE), TILE)
    options: dict[str, Any] = {
        "keys": (3, 4), "size": size, "signs_n": None if signs is None else signs.to(DEVICE), "first": first,
    }  # fmt: skip
    turned = (lambda x: rotate(x, size, signs)) if size else (lambda x: x)
    rows, _ = quantize_tiles(w.flatten(0, 1).to(DEVICE), form, plan, **options)
    want = pack(quantize_each(turned(w), form, 3, torch.arange(first * n, (first + e) * n).view(e, n), size))
    assert rows is not None
    for j in range(e):
        equal(one(rows, slice(j * n, j * n + n), j), one(want, j, j))
    if form.rule == "quest":
        return
    once = pack(quantize_each(w, FOUR_SIX))
    once = Packed(FOUR_SIX, once.codes, torch.ones_like(once.scales.float()).to(once.scales.dtype),
                  2.0 ** torch.arange(e), k)  # fmt: skip
    flat = Packed(
        FOUR_SIX, once.codes.flatten(0, 1).to(DEVICE), once.scales.flatten(0, 1).to(DEVICE), once.factor.to(DEVICE), k
    )
    ids = torch.arange(first * k, (first + e) * k).view(e, k)
    for given, whole in ((w.flatten(0, 1).to(DEVICE), w), (flat, once.unpack().dequantize())):
        _, columns = quantize_tiles(given, form, plan, rows=False, columns=True, **options)
        assert columns is not None
        made = by_column(columns, e, n)
        want = pack(quantize_each(turned(whole.mT.contiguous()), form, 4, ids, size))
        for j in range(e):
            equal(one(made, j, j), one(want, j, j))


def one(packed: Packed, rows: int | slice, j: int) -> Packed:
    """Of matrices, number j."""
    trusted = None if packed.trusted is None else packed.trusted[rows]
    return Packed(packed.format, packed.codes[rows], packed.scales[rows], packed.factor[j], packed.columns, trusted)


MUTANTS = [
    ("on_grid", "(x + 12582912.0) - 12582912.0", "tl.floor(x + 0.5)"),  # ties up
    ("scales_of", "rest > 0x400000", "rest != 0"),  # subnormal
    ("_quantize_kernel", "first * BM +", "0 +"),
]


def of_name(kernel: str) -> Any:
    return getattr(quantize_tile, kernel) if hasattr(quantize_tile, kernel) else getattr(quantize_triton, kernel)


BROKEN = [
    ("fine_cast", "amax * 0.25", "amax * 0.2", lambda: test_equal(FOUR_SIX)),
    ("fine_cast", "< error", "<= error", lambda: test_equal(FOUR_SIX)),
    ("square_sums", "tl.trans(sums(tl.trans(total), x_MK.shape[0] // SIDE))", "tl.trans(0 * sums(tl.trans(total), 4))",
     lambda: test_squares(SQUARES[-1])),
    ("gaussian_clip", "mean * mean", "0", lambda: test_equal(QUEST)),
    ("gaussian_clip", "tl.minimum(tl.maximum(depth - column - tl.arange(0, B) * G, 1), G)", "G + tl.zeros([B], tl.int32)",
     lambda: test_equal(QUEST)),
    ("store_trusted", "< LARGEST) &", "<= LARGEST) &", lambda: test_equal(QUEST)),
    ("store_trusted", "K) < depth", "K) < depth + 1", lambda: test_equal(QUEST)),
    ("corrected", "tl.div_rn(over, under)", "tl.div_rn(under, over)", lambda: test_rotated(EDEN)),
    ("corrected", "spread(scale, 1, G) * x", "x", lambda: test_rotated(EDEN)),
    ("_quantize_kernel", "N + ms - end", "N", lambda: test_rotated(EDEN)),
    ("_values", "x *= tl.load(x_factor)", "pass", lambda: test_casts_of_casts(FOUR_SIX, AGAIN, 0)),
    ("_values", "tl.where(byte == 0, 1 << 22, byte << 23)", "(byte << 23)",
     lambda: test_casts_of_casts(FORMATS[3], AGAIN, 0)),
    ("_quantize_kernel", "x_factor += expert", "pass", lambda: test_matrices(AGAIN, 16)),
    ("_quantize_kernel", "largest += expert", "pass", lambda: test_matrices(FOUR_SIX, 0)),
    ("rotated", "first - second", "second - first", lambda: test_rotated_as_recipes_do(EDEN, 128)),
    ("_quantize_kernel", "row_hash_K += expert", "row_hash_K += 0 * expert", lambda: test_matrices(AGAIN, 16)),
    ("_values", "ks // GX", "0 * ks", lambda: test_casts_of_casts_and_of_weighted_rows(FORMATS[0])),
    ("_values", "weights_N + rows", "weights_N + places", lambda: test_casts_of_casts_and_of_weighted_rows(FORMATS[0])),
    ("_squares_kernel", "amax = tl.maximum(amax, _amax_of_squares(x, BN, SIDE, G))",
     "amax = _amax_of_squares(x, BN, SIDE, G)", lambda: test_squares(SQUARES[0])),
    ("_squares_kernel", "w += e * stride_e", "w += 0 * stride_e", lambda: test_squares(SQUARES[2])),
]  # fmt: skip


@pytest.mark.parametrize("mutant", BROKEN, ids=lambda mutant: mutant[2])
def test_notices_of_squares_and_casts_of_casts(mutant: tuple[str, str, str, Callable[[], None]]) -> None:
    kernel, old, new, test = mutant
    with mutated(of_name(kernel), old, new), pytest.raises(AssertionError):
        test()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[0])
def test_notices(mutant: tuple[str, str, str]) -> None:
    kernel, old, new = mutant
    with mutated(of_name(kernel), old, new), pytest.raises(AssertionError):
        test_equal(FORMATS[3])
