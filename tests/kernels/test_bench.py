"""The GPU benchmark, with everything but the GPU: it says that there is none, times what is right, and refuses what is not."""

import json

import pytest
import torch

from moesaic.kernels import bench, roofline
from moesaic.kernels.inspection import TARGETS

SHAPE = {"N": 24, "D": 16, "V": 70, "B": 64}
LAYER = {"T": 24, "D": 16, "F": 8, "G": 16, "E": 4, "K": 2, "R": 48}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == bench.main(["--only-check-gpu"]) == 2
    out = capsys.readouterr()
    assert out.out == "" and len(out.err.splitlines()) == 2 and out.err.startswith("error: no GPU")


def test_a_gpu_without_tiles(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A100")
    assert bench.main([]) == 2
    assert capsys.readouterr().err.startswith("error: A100: kernels have tiles for sm_90a")


@pytest.fixture
def pretended_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own path, on the device that there is, at a tiny shape; a call takes a millisecond."""
    monkeypatch.setattr(bench, "no_gpu", lambda: None)
    monkeypatch.setattr(bench, "DEVICE", device)
    monkeypatch.setattr(bench, "target_name", lambda device: "sm_90a")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "pretended")
    monkeypatch.setattr(bench, "milliseconds", lambda run: 1.0 if run() else 0.0)
    cases = {"head": lambda device: bench.head(device, SHAPE), "experts": lambda device: bench.experts(device, LAYER)}
    monkeypatch.setattr(bench, "CASES", cases)


def test_times_what_is_right(pretended_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    line, *layer = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(layer) == 4 and layer[0]["case"].startswith("experts, forward and backward, T=24 D=16")
    assert (line["ours"], line["peer"], line["ratio"]) == (1.0, 1.0, 1.0) and "N=24" in line["case"]
    parts = [
        roofline.seconds(roofline.WORK[part], SHAPE, "sm_90a") for part in roofline.WORK if part.startswith("head")
    ]
    assert line["least"] == pytest.approx(sum(parts) * 1e3)


def test_refuses_what_is_wrong(
    pretended_gpu: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(bench.head(torch.device(bench.DEVICE), SHAPE))
    for change in (1.05, torch.nan):
        broken = case._replace(ours=lambda: {k: v * change if k == "dw" else v for k, v in case.peer().items()})
        monkeypatch.setattr(bench, "CASES", {"head": lambda device: iter([broken])})
        assert bench.main([]) == 1
        out = capsys.readouterr()
        assert out.out == "" and "RED" in out.err and "dw is off by" in out.err and "not timed" in out.err


def test_least_times() -> None:
    """By hand: 2 * 8192 * 2048 * 50304 FLOPs at 989.4 TFLOP/s, and an elementwise kernel at 3.35 TB/s."""
    work = roofline.WORK["head_dw"]
    assert roofline.seconds(work, roofline.HEAD, "sm_90a") == pytest.approx(2 * 8192 * 2048 * 50304 / 989.4e12)
    layer = roofline.LAYER
    moved = 2 * layer["R"] * 1536 + 12 * layer["R"] + 2 * 24576 * 1536
    assert roofline.seconds(roofline.WORK["combine"], layer, "sm_90a") == pytest.approx(moved / 3.35e12)
    assert layer["R"] == layer["T"] * layer["K"] and layer["G"] == 2 * layer["F"]
    assert roofline.table().count("\n") == len(roofline.WORK) + 2 and all(
        t.part in roofline.table() for t in TARGETS.values()
    )
