"""The tile table: complete, and such that one number of rows rounds for every product of a target."""

import pytest
import torch

from moesaic.kernels.tiles import TILES, Tile, gemm_tile, rounding_tile, target_name


@pytest.mark.parametrize("target", ["cpu", "sm_90a", "sm_100a", "gfx942", "gfx950"])
def test_rows_rounded_to_the_tile_pad_nothing(target: str) -> None:
    rows = rounding_tile(target)
    for columns in (1, 64, 127, 128, 4096):
        assert gemm_tile(target, "varlen_m", columns).m == rows
        assert rows % gemm_tile(target, "varlen_k", columns).k == 0
    assert gemm_tile(target, "varlen_m", 64).n <= 64


def test_all_targets_have_the_same_shape_classes() -> None:
    assert len({tuple(classes) for classes in TILES.values()}) == 1


def test_an_override_comes_first() -> None:
    mine = Tile(32, 256, 16)
    assert gemm_tile("sm_90a", "varlen_m", 4096, override=mine) == mine
    assert rounding_tile("sm_90a", override=7) == 7
    assert rounding_tile("no such target", override=7) == 7


def test_devices_are_named_by_their_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert target_name(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, name in (((9, 0), "sm_90a"), ((10, 0), "sm_100a"), ((10, 3), "sm_100a")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert target_name(torch.device("cuda", 0)) == name
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(
        ValueError, match=r"model\.router\.rounding_tile=null: no tile is known for sm_80, only for cpu, sm_90a"
    ):
        rounding_tile(torch.device("cuda", 0))

    class Properties:
        gcnArchName = "gfx950:sramecc+:xnack-"

    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert target_name(torch.device("cuda", 0)) == "gfx950"


def test_mistakes_are_told_in_one_line() -> None:
    with pytest.raises(ValueError, match="no tile is known for meta"):
        rounding_tile(torch.device("meta"))
    with pytest.raises(ValueError, match="model.router.rounding_tile=0: must be at least 1"):
        rounding_tile("cpu", override=0)
    for sizes in ((8, 64, 64), (128, 96, 64), (128, 64, 0)):
        with pytest.raises(ValueError, match="powers of two"):
            Tile(*sizes)
