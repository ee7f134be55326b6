"""Rows in fewer bytes: what an encoding loses, and that it travels."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.kernels import logfmt
from moesaic.kernels.quantize import Format, quantize
from moesaic.moe.config import ModelConfig, RouterConfig
from moesaic.moe.precision import PrecisionConfig
from moesaic.parallel.apply import parallelize
from moesaic.parallel.codec import BF16, Fp8, LogFMT, codecs
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.mesh import make_meshes
from tests.parallel.ranks import run_ranks


def gaussian(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def qsnr(y: Tensor, x: Tensor) -> float:
    return -10 * math.log10(((y - x).double().square().sum() / x.double().square().sum()).item())


@pytest.mark.parametrize(
    ("codec", "decibels", "bytes_a_row"),
    [(Fp8(), 31.5, 260 + 3), (LogFMT(8, 260), 37.0, 3 * 128 + 24), (LogFMT(10, 260), 49.2, 3 * 160 + 24), (BF16(), 55.6, 520)],
    ids=["fp8", "logfmt8", "logfmt10", "bf16"],
)  # fmt: skip
def test_what_an_encoding_loses(codec: Fp8 | LogFMT | BF16, decibels: float, bytes_a_row: int) -> None:
    x = gaussian(500, 260)  # two tiles and a bit
    payload = codec.encode(x)
    assert sum(part.nbytes for part in payload) == 500 * bytes_a_row
    assert qsnr(codec.decode(payload, x.dtype), x) == pytest.approx(decibels, abs=0.5)
    assert codec.decode(codec.encode(x[:0]), x.dtype).shape == (0, 260)
    # Each row alone, as rows are picked from an encoding.
    some = [part[[7, 3]] for part in payload]
    assert torch.equal(codec.decode(some, x.dtype), codec.decode(payload, x.dtype)[[7, 3]])
    bad = x.clone()
    bad[3, 5] = torch.inf
    bad[4, 200] = torch.nan
    y = codec.decode(codec.encode(bad), x.dtype)
    assert not y[3, 5].isfinite() and not y[4, 200].isfinite() and y[5:].isfinite().all()


@pytest.mark.parametrize("bits", [8, 10])
def test_logfmt_by_hand(bits: int) -> None:
    """Values on the grid come back; zeros stay; between two neighbours the nearer in linear space is taken; all is monotone."""
    grid = torch.zeros(1, 128)
    n = 2 ** (bits - 1) - 2
    grid[0, :127] = torch.linspace(-3, 2, 127).exp() * torch.tensor([1.0, -1]).repeat(64)[:127]
    if bits == 8:  # as many numbers as codes
        torch.testing.assert_close(logfmt.decode(logfmt.encode(grid, 8), 8, 128), grid, rtol=1e-5, atol=0)
    x = torch.cat((torch.zeros(1, 1), torch.rand(1, 127, generator=torch.Generator().manual_seed(1)) * 5 + 1e-3), dim=1)
    y = logfmt.decode(logfmt.encode(x, bits), bits, 128)
    assert y[0, 0] == 0
    low, high = x[0, 1:].min().log(), x.max().log()
    values = torch.cat((torch.zeros(1), (low + (high - low) / n * torch.arange(n + 1)).exp()))
    nearest = (x.T - values).abs().min(dim=1).values
    assert ((x - y).abs()[0] <= nearest * 1.001 + 1e-5).all()
    wide = torch.tensor([[1e30, 1.0, 1e-30] + [0.0] * 125])
    back = logfmt.decode(logfmt.encode(wide, bits), bits, 128)[0]
    assert (back[0] == pytest.approx(1e30, rel=1e-4) and 0 < back[1] < 1e21) or back[1] == 0
    assert back[2:].eq(0).all()  # below 2^-32 of the largest


def test_fp8_is_the_cast_of_fp8_block() -> None:
    x = gaussian(50, 300)
    sent = Fp8().decode(Fp8().encode(x), x.dtype)
    form = Format("e4m3", (1, 128), "pow2", "rceil")
    assert torch.equal(sent, quantize(x, form).dequantize())
    assert torch.equal(quantize(sent, form).dequantize(), sent)


CONFIG = ModelConfig(
    d_model=128, n_heads=2, n_layers=1, n_experts=4, d_expert=32, router=RouterConfig(top_k=2), init_std=0.1
)


def losses() -> dict[tuple[str, str], tuple[float, int, int]]:
    """The loss, and bytes of dispatch and combine."""
    found = {}
    meshes, parallel = make_meshes("cpu", 2, 1), ParallelConfig(expert="2")
    tokens = torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(dist.get_rank()))
    for dispatch, combine in (
        ("high", "high"),
        ("fp8", "high"),
        ("high", "bf16"),
        ("fp8", "logfmt8"),
        ("high", "logfmt10"),
    ):
        precision = PrecisionConfig(dispatch=dispatch, combine=combine)
        model = parallelize(
            CONFIG, parallel, meshes, seed=0, device=torch.device("cpu"), compute=torch.float32, precision=precision
        )
        out = model(tokens[:, :-1], tokens[:, 1:])
        out.loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        sent = model.moe_layers()[0].path.sent
        found[dispatch, combine] = (out.loss.item(), sent["intra", "dispatch"], sent["intra", "combine"])
    return found


def test_knobs_send_fewer_bytes(tmp_path: Path) -> None:
    for found in run_ranks(losses, 2, tmp_path):
        exact, out, back = found["high", "high"]
        assert out % (128 * 4) == 0 and out > 0
        rows_out, rows_back = out // 512, back // 512
        for (dispatch, combine), (loss, sent, returned) in found.items():
            assert sent == rows_out * (129 if dispatch == "fp8" else 512)
            assert returned == rows_back * {"high": 512, "bf16": 256, "logfmt8": 136, "logfmt10": 168}[combine]
            assert loss == pytest.approx(exact, rel=1e-3) and (loss == exact) == (dispatch == combine)


def test_no_codec_is_none() -> None:
    assert codecs("high", "high", 64) == (None, None)
