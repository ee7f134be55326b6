"""Choosing tiles by timing, with a clock that is made up: what is chosen, what is passed over, what is kept and read again."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.kernels import autotune, bench, tiles
from moesaic.kernels.tiles import TILES, Tile

SHAPE = {"T": 24, "D": 16, "F": 8, "G": 16, "E": 4, "K": 2, "R": 48}
SIZES = {"m": 64, "n": 64, "k": 64}
CPU = torch.device("cpu")


@pytest.fixture
def table() -> Iterator[dict[str, Tile]]:
    saved = dict(TILES)
    yield TILES["cpu"]
    TILES.update(saved)
    tiles.known_tile.cache_clear()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, table: object) -> list[dict[str, Tile]]:
    """A device whose best tiles are known, and every tile that was timed on it. Products aren't carried out."""
    timed: list[dict[str, Tile]] = []

    def milliseconds(run: Callable[[], object]) -> float:
        timed.append(TILES["cpu"])
        narrow, depth = TILES["cpu"]["varlen_m_narrow"], TILES["cpu"]["varlen_k"]
        return 1 + 0.1 * (narrow.warps == 8) + 0.01 * (narrow.m != 64) + 0.2 * (depth.k != 32)

    monkeypatch.setattr(bench, "no_gpu", lambda: None)
    monkeypatch.setattr(bench, "milliseconds", milliseconds)
    monkeypatch.setattr(bench, "wrong", lambda case: None)
    return timed


def test_the_fastest_is_chosen_with_one_number_of_rows(clock: list[dict[str, Tile]]) -> None:
    before = TILES["cpu"]
    found, taken = autotune.search(CPU, SHAPE, lambda line: None)
    assert found["varlen_m_narrow"].warps == 4 and found["varlen_k"].k == 32
    assert {found[p].m for p in ("varlen_m", "varlen_m_narrow")} == {64}
    assert taken["chosen"] == pytest.approx(1.0) and taken["table"] > taken["chosen"]
    assert TILES["cpu"] is not clock[-1] and TILES["cpu"] == before  # as it was, until `use`
    rows = {tile["varlen_m"].m for tile in clock}
    assert rows == {before["varlen_m"].m, 64, 128}
    assert all(entry["varlen_m"].m % entry["varlen_k"].k == 0 for entry in clock)


def test_wrong_and_failing_tiles_are_passed_over(clock: list[dict[str, Tile]], monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    def wrong(case: bench.Case) -> str | None:
        entries = TILES["cpu"]
        if entries["varlen_k"].k == 32:
            return "dw is off"
        if entries["varlen_m"].m == 64:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return None

    monkeypatch.setattr(bench, "wrong", wrong)
    found, _ = autotune.search(CPU, SHAPE, lambda line: None)
    assert found["varlen_k"].k != 32 and found["varlen_m"].m == 128
    monkeypatch.setattr(bench, "wrong", lambda case: "y is off")
    with pytest.raises(ValueError, match="train.tiles=autotune: experts, forward and backward is wrong on this device"):
        autotune.search(CPU, SHAPE, lambda line: None)


def test_candidates_really_run(table: dict[str, Tile], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole search, every candidate carried out and compared, with the least of candidates."""
    monkeypatch.setattr(bench, "milliseconds", lambda run: float(bool(run())))
    monkeypatch.setattr(
        autotune, "candidates", lambda product, m: [Tile(m, 32, 16) if product != "varlen_k" else Tile(32, 32, 16)]
    )
    lines: list[str] = []
    found, taken = autotune.search(torch.device(device), SHAPE, lines.append)
    assert set(found) == set(autotune.PRODUCTS) and taken["chosen"] == 1.0 and len(lines) == 3


def test_every_candidate_is_a_tile_that_the_table_takes() -> None:
    for m in (64, 128):
        for product in autotune.PRODUCTS:
            assert autotune.candidates(product, m)
            for tile in autotune.candidates(product, m):
                with tiles.using(
                    "sm_90a", {p: Tile(m, 64, 64) for p in ("varlen_m", "varlen_m_narrow")} | {product: tile}
                ):
                    assert TILES["sm_90a"][product] == tile
                    assert tiles.rounding_tile("sm_90a") == tiles.known_tile("sm_90a") == m
    assert tiles.known_tile("sm_90a") == 128


def test_found_once_and_read_afterwards(clock: list[dict[str, Tile]], tmp_path: Path) -> None:
    lines: list[str] = []
    first = autotune.tuned(CPU, SHAPE, tmp_path, lines.append)
    count = len(clock)
    assert autotune.tuned(CPU, SHAPE, tmp_path, lines.append) == json.loads(json.dumps(first)) and len(clock) == count
    assert "as timed before" in lines[-1]
    other = SHAPE | {"F": 16}
    autotune.tuned(CPU, other, tmp_path, lines.append)
    assert (
        len(clock) > count and len(list(tmp_path.iterdir())) == 2
    )  # another shape is another file, and nothing else is left
    for path in tmp_path.iterdir():
        path.write_text("{")
    count = len(clock)
    assert autotune.tuned(CPU, SHAPE, tmp_path, lines.append)["tiles"] == first["tiles"]
    assert len(clock) > count and any("can't be read as a record of tiles" in line for line in lines)


def test_used_tiles_reach_launches_and_rounding(table: dict[str, Tile], tmp_path: Path) -> None:
    entry = {"m": 32, "n": 32, "k": 16, "warps": 4, "stages": 2}
    record = {"target": "cpu", "tiles": {"varlen_m": entry, "varlen_m_narrow": entry}}
    autotune.write(record, tmp_path / "deep" / "tiles.json")
    autotune.use(autotune.read(tmp_path / "deep" / "tiles.json"), CPU)
    assert tiles.gemm_tile(CPU, "varlen_m", 512) == tiles.gemm_tile(CPU, "varlen_m", 8) == Tile(**entry)
    assert tiles.rounding_tile(CPU) == tiles.known_tile(CPU) == 32


@pytest.mark.parametrize(("record", "line"), [
    ({"target": "sm_90a", "tiles": {}}, "mine: its tiles are for sm_90a, and this device is cpu"),
    ({"target": "cpu", "tiles": {"varlen": SIZES}}, "mine: varlen: must be one of varlen_m"),
    ({"target": "cpu", "tiles": {"varlen_m": SIZES}}, "mine: varlen_m_narrow m=16: must be that of varlen_m, 64"),
    ({"target": "cpu", "tiles": {"varlen_k": SIZES}}, "mine: varlen_k k=64: must divide the m of varlen_m, 16"),
    ({"target": "cpu", "tiles": {"varlen_k": {"m": 65, "n": 64, "k": 64}}}, "mine: tile=65x64x64: sizes must be powers of two"),
    ({"target": "cpu", "tiles": {"varlen_k": {"rows": 64}}}, "mine: .*rows"),
])  # fmt: skip
def test_mistakes_in_a_record(table: dict[str, Tile], record: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        autotune.use(record, CPU, "mine")
    assert TILES["cpu"] == table


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="train.tiles=autotune: no GPU"):
        autotune.tuned(CPU, SHAPE, tmp_path)
    for text in ("[]", '{"tiles": 1, "target": "cpu"}', '{"tiles": {}}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match="a.json: is no record of tiles"):
            autotune.read(tmp_path / "a.json")
    with pytest.raises(ValueError, match="none.json: can't be read"):
        autotune.read(tmp_path / "none.json")


def test_a_rank_sees_as_many_rows_of_fewer_experts() -> None:
    shape = autotune.layer_shape(4096, 2048, 768, 1536, experts=128, top_k=8, ranks=8)
    assert shape == {"T": 4096, "D": 2048, "F": 768, "G": 1536, "E": 16, "K": 8, "R": 32768}
    shape = autotune.layer_shape(4096, 2048, 768, 1536, experts=16, top_k=4, ranks=8)
    assert (shape["T"], shape["K"], shape["E"], shape["R"]) == (8192, 2, 2, 16384)
