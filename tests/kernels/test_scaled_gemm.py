"""Products of quantized rows and weights: against fp64 of what codes stand for, and bit by bit where sums are exact."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moesaic.kernels import scaled_gemm as module
from moesaic.kernels import tiles
from moesaic.kernels.grouped_gemm import schedule
from moesaic.kernels.interpret import INTERPRET
from moesaic.kernels.quantize import Format, Packed, pack, quantize, quantize_each
from moesaic.kernels.quantize_triton import quantize_tiles
from moesaic.kernels.scaled_gemm import (
    format_of,
    scaled_tile,
    scaled_varlen_m,
    scaled_varlen_m_reference,
    without_minus_zero,
)
from moesaic.kernels.testing import mutated

DEVICE = "cpu" if INTERPRET else "cuda"
FORMATS = {
    "fp8": (Format("e4m3", (1, 128), "fp32", "amax"), Format("e4m3", (128, 128), "fp32", "amax")),
    "fp8, powers of two": (Format("e4m3", (1, 128), "pow2", "rceil"), Format("e4m3", (128, 128), "pow2", "rceil")),
    "mxfp8": (Format("e4m3", (1, 32), "e8m0", "rceil"),) * 2,
    "mxfp4": (Format("e2m1", (1, 32), "e8m0", "floor"), Format("e2m1", (32, 32), "e8m0", "floor")),
    "nvfp4": (Format("e2m1", (1, 16), "e4m3", "amax"), Format("e2m1", (16, 16), "e4m3", "amax")),
    "nvfp4, 4 or 6": (Format("e2m1", (1, 16), "e4m3", "four_six"), Format("e2m1", (1, 16), "e4m3", "four_six")),
}
# inputs, rows of each expert, K, N
SHAPES = (
    (23, (9, 0, 33, 1), 160, 72),
    (5, (17,), 32, 16),
    (30, (0, 40, 3), 270, 131),
    (4, (0, 0), 128, 128),
)  # fmt: skip


def operands(
    name: str, inputs: int, k: int, n: int, experts: int, draw: Callable[..., Tensor]
) -> tuple[Packed, Packed, Tensor]:
    form, weight_form = FORMATS[name]
    x, w = pack(quantize(draw(inputs, k), form)), pack(quantize_each(draw(experts, n, k), weight_form))
    return x, w, torch.randint(0, inputs, (100,))


def on_device(packed: Packed) -> Packed:
    codes, scales, factor = (v.to(DEVICE) for v in (packed.codes, packed.scales, packed.factor))
    return Packed(packed.format, codes, scales, factor, packed.columns)


def product(x: Packed, w: Packed, counts: Tensor, source: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    tile = scaled_tile(torch.device(DEVICE), format_of(x))
    at = None if source is None else source.to(DEVICE)
    plan = schedule(counts.to(DEVICE), tile.m)
    return scaled_varlen_m(on_device(x), on_device(w), plan, tile, source_R=at, dtype=dtype).cpu()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(name: str, shape: tuple[int, tuple[int, ...], int, int]) -> None:
    torch.manual_seed(hash(shape) % 1000)
    inputs, rows, k, n = shape
    counts = torch.tensor(rows)
    # Rows and columns of different sizes: a scale that is not where it belongs changes much.
    x, w, source = operands(
        name, inputs, k, n, len(rows), lambda *s: torch.randn(s) * 2.0 ** torch.randint(-6, 6, (*s[:-1], 1))
    )
    source = source[: sum(rows)]
    y = product(x, w, counts, source)
    want = scaled_varlen_m_reference(x, w, counts, source)
    magnitude = scaled_varlen_m_reference(*(_magnitude(v) for v in (x, w)), counts, source)
    assert y.shape == want.shape and ((y - want).abs() <= 1e-6 * magnitude).all()


def _magnitude(packed: Packed) -> Packed:
    """Of the absolute values: what a sum's error is relative to."""
    q = packed.unpack()
    return pack(type(q)(q.format, q.codes_NK.abs(), q.scales, q.factor))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp8"])
def test_equal_where_sums_are_exact(name: str) -> None:
    """Small whole numbers times few powers of two: every sum of the products has at most 24 bits, in any order."""
    torch.manual_seed(0)
    counts = torch.tensor([20, 0, 7])
    x, w, _ = operands(
        name, 27, 270, 72, 3, lambda *s: torch.randint(-2, 3, s) * 2.0 ** torch.randint(0, 2, (*s[:-1], 1))
    )
    a, b = x.unpack(), w.unpack()
    sums = [r.double() @ v.double().T for r, v in zip(a.values().split(counts.tolist()), b.values(), strict=True)]
    want = torch.cat([s.float() * f for s, f in zip(sums, a.factor * b.factor, strict=True)])
    assert torch.equal(product(x, w, counts, None), want)
    assert torch.equal(product(x, w, counts, None, torch.bfloat16), want.bfloat16())


def test_what_is_not_finite_stays_visible() -> None:
    for name in ("fp8", "mxfp8", "mxfp4", "nvfp4"):
        x = torch.ones(17, 256)
        x[3, 200] = torch.inf
        x[5, 7] = torch.nan
        form, weight_form = FORMATS[name]
        y = product(
            pack(quantize(x, form)), pack(quantize_each(torch.ones(1, 64, 256), weight_form)), torch.tensor([17]), None
        )
        bad = torch.zeros(17, dtype=torch.bool).index_fill(0, torch.tensor([3, 5]), True)
        if form.scale == "e4m3":  # the factor of the tensor
            bad[:] = True
        assert torch.equal(y.isnan().any(dim=1), bad) and y[~bad].isfinite().all()


def test_e4m3_of_gfx942(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its e4m3 has the same bits for half the value; -0, which it takes for NaN, is 0."""
    torch.manual_seed(1)
    x, w, source = operands("fp8", 23, 160, 72, 2, lambda *s: torch.randn(s))
    tiny = torch.randn(23, 160) * 1e-9
    tiny[:, 0] = 1.0
    x = pack(quantize(tiny, x.format))
    assert (x.codes.view(torch.uint8) == 0x80).any() and without_minus_zero(x) is x
    counts = torch.tensor([20, 13])
    plain = product(x, w, counts, source[:33])
    monkeypatch.setattr(module, "e4m3", lambda device: torch.float8_e4m3fnuz)
    assert product(x, w, counts, source[:33]).isnan().any()
    x, w = without_minus_zero(x), without_minus_zero(w)
    assert torch.equal(product(x, w, counts, source[:33]), plain)


def test_refused() -> None:
    x, w, _ = operands("mxfp8", 4, 64, 16, 1, lambda *s: torch.randn(s))
    other, _, _ = operands("mxfp4", 4, 64, 16, 1, lambda *s: torch.randn(s))
    with pytest.raises(ValueError, match="must be one format"):
        product(other, w, torch.tensor([4]), None)
    integers = pack(quantize(torch.randn(4, 64), Format("int8", (1, 32), "e8m0", "rceil")))
    with pytest.raises(ValueError, match="element=int8, block=1x32, scale=e8m0: no matrix unit"):
        format_of(integers)
    square = pack(quantize(torch.randn(32, 64), Format("e4m3", (32, 32), "e8m0", "rceil")))
    with pytest.raises(ValueError, match="a scale for each row"):
        product(square, w, torch.tensor([32]), None)
    x, w, _ = operands("nvfp4", 4, 64, 16, 1, lambda *s: torch.randn(s))
    meta = [Packed(v.format, v.codes.to("meta"), v.scales.to("meta"), v.factor.to("meta"), 64) for v in (x, w)]
    with tiles.meta_is("gfx950"), pytest.raises(ValueError, match="nvfp4 doesn't run on gfx950, only on sm_100a"):
        scaled_varlen_m(*meta, schedule(torch.tensor([4]), 16), scaled_tile("gfx950", "nvfp4"))


WEIGHTS = {
    "fp8": Format("e4m3", (1, 128), "fp32", "amax"),
    "fp8, powers of two": Format("e4m3", (1, 128), "pow2", "rceil"),
    "mxfp8": Format("e4m3", (1, 32), "e8m0", "rceil"),
    "mxfp4": Format("e2m1", (1, 32), "e8m0", "floor"),
    "nvfp4": Format("e2m1", (1, 16), "e4m3", "amax"),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("shape", [(72, 40, (9, 0, 133, 1)), (131, 33, (0, 128))], ids=str)
def test_weight_gradients(name: str, shape: tuple[int, int, tuple[int, ...]]) -> None:
    """Of rows in whole tiles of positions for each expert, against fp64 of what codes stand for; no rows give zeros."""
    torch.manual_seed(5)
    (p, q, counts), form = shape, WEIGHTS[name]
    tiles_E = [-(-count // module.TILE) for count in counts]
    casts = []
    for width in (p, q):
        x = torch.zeros(width, (sum(tiles_E) + 1) * module.TILE)
        for e, count in enumerate(counts):
            first = sum(tiles_E[:e]) * module.TILE
            x[:, first : first + count] = torch.randn(width, count) * 2.0 ** torch.randint(-6, 6, (width, 1))
        casts.append(pack(quantize(x, form)))
    tile = scaled_tile(torch.device(DEVICE), format_of(casts[0]))
    plan = schedule(torch.tensor(counts).to(DEVICE), module.TILE)
    made = module.scaled_varlen_k(on_device(casts[0]), on_device(casts[1]), plan, tile).cpu()
    left, right = (c.unpack().dequantize().double() for c in casts)
    assert made.shape == (len(counts), p, q) and made.dtype is torch.float32
    for e, (one, count) in enumerate(zip(made, counts, strict=True)):
        part = slice(sum(tiles_E[:e]) * module.TILE, sum(tiles_E[: e + 1]) * module.TILE)
        want, magnitude = left[:, part] @ right[:, part].T, left[:, part].abs() @ right[:, part].abs().T
        assert ((one - want).abs() <= 1e-6 * magnitude).all() and bool(one.any()) == (count > 0)


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "mxfp4", "nvfp4"])
def test_weights_transposed_and_by_column(name: str) -> None:
    """Codes for the gradient of x: a square cast transposed; a cast along columns, deeper than x, biased."""
    torch.manual_seed(6)
    square = {"fp8": 128, "mxfp8": 32, "mxfp4": 32, "nvfp4": 16}[name]
    form = WEIGHTS[name]
    counts, e, n, k = torch.tensor([20, 0, 7]), 3, 45, 70
    dy, w, bias = pack(quantize(torch.randn(27, n), form)), torch.randn(e, n, k), torch.randn(e, k)
    q = quantize_each(w, Format(form.element, (square, square), form.scale, form.rule))
    made = product(dy, module.transposed(pack(q)), counts, None)
    values = [r @ v for r, v in zip(dy.unpack().dequantize().split(counts.tolist()), q.dequantize(), strict=True)]
    torch.testing.assert_close(made, torch.cat(values), rtol=1e-5, atol=1e-5)
    if name in ("mxfp8", "mxfp4"):
        plan = schedule(torch.full((e,), n).to(DEVICE), module.TILE)
        _, cast = quantize_tiles(w.to(DEVICE).flatten(0, 1), form, plan, rows=False, columns=True)
        tile = scaled_tile(torch.device(DEVICE), name)
        plan = schedule(counts.to(DEVICE), tile.m)
        made = scaled_varlen_m(on_device(dy), module.by_column(cast, e, n), plan, tile, bias_EN=bias.to(DEVICE),
                               dtype=torch.float32).cpu()  # fmt: skip
        q = quantize_each(w.mT.contiguous(), form)
        values = [r @ v.T + b for r, v, b in
                  zip(dy.unpack().dequantize().split(counts.tolist()), q.dequantize(), bias, strict=True)]  # fmt: skip
        torch.testing.assert_close(made, torch.cat(values), rtol=1e-5, atol=1e-5)


MUTANTS = [
    # function, what stands there, what is put in its place
    ("multiply_scaled", "ns // WN", "ns * 0"),  # one scale of W for all rows
    ("multiply_scaled", "expert.to(tl.int64) * scale_e", "expert.to(tl.int64) * 0"),
    ("_scaled_varlen_m_kernel", "acc_MN *= tl.load(factor_E + expert)", "acc_MN *= tl.load(factor_E)"),
    ("_scaled_varlen_m_kernel", "row_pointers(x_scales, source_R, row, end, stride_s, BM, source_R is not None)",
     "row_pointers(x_scales, source_R, row, end, stride_s, BM, False)"),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[2])
def test_notices(mutant: tuple[str, str, str]) -> None:
    kernel, old, new = mutant
    with mutated(getattr(module, kernel), old, new), pytest.raises(AssertionError):
        test_against_fp64("nvfp4", SHAPES[0])


@pytest.mark.parametrize("old", ["column * PACK // G", "first = tl.load(tile_ends_E + expert) - steps"])
def test_notices_of_weight_gradients(old: str) -> None:
    new = old.replace("column *", "0 *").replace("tl.load(tile_ends_E + expert) - steps", "expert")
    with mutated(module._scaled_varlen_k_kernel, old, new), pytest.raises(AssertionError):
        test_weight_gradients("mxfp8", (72, 40, (9, 0, 133, 1)))
