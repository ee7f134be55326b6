"""model.experts_backend=triton: the demonstration's model against the specification, and a run of it on two ranks."""

import json
from pathlib import Path

import pytest
import torch

from moesaic.kernels import autotune
from moesaic.kernels.testing import launches
from moesaic.launch import cli, train
from moesaic.moe.model import build
from tests.launch.launches import Place, finished, here, losses


def step(backend: str) -> tuple[float, dict[str, torch.Tensor], list[str]]:
    """Loss and gradients of recipe=tiny_moe, with half its layers and experts, on 2 x 20 tokens; and what was launched."""
    small = ["model.n_layers=2", "model.n_experts=4"]
    config = cli.compose(["recipe=tiny_moe", *small, f"model.experts_backend={backend}"])
    model = build(config.model, seed=0, device=torch.device("cpu"))
    tokens = torch.randint(0, 257, (2, 21), generator=torch.Generator().manual_seed(0))
    with launches() as kernels:
        out = model(tokens[:, :-1], tokens[:, 1:])
        (out.loss + out.aux).backward()
    return out.loss.item(), {name: p.grad for name, p in model.named_parameters()}, kernels


def test_the_demonstration_equals_the_specification() -> None:
    loss, grads, kernels = step("triton")
    want_loss, want_grads, none = step("reference")
    # A layer: the experts' eight and two schedules, top-K and its gradient, two for sorting. The head: one and three.
    assert none == [] and len(kernels) == 2 * (3 + 5 + 2 + 2 + 2) + 1 + 3
    assert loss == pytest.approx(want_loss, rel=1e-6)
    assert grads.keys() == want_grads.keys()
    for name, want in want_grads.items():
        assert (grads[name] - want).abs().max() < 1e-5 * want.abs().max(), name


def test_a_run_on_two_ranks(place: Place, tmp_path: Path) -> None:
    """Experts on both ranks; the losses are those of one process and the torch backend. The balance loss depends on the ranks."""
    small = "train.steps=2 train.eval_every=0 train.seq_len=16 train.global_batch=2 model.n_layers=1".split()
    knobs = ["recipe=tiny_moe", *small, "model.router.balance_coef=0"]
    sizes = {"m": 32, "n": 32, "k": 16}
    tiles = {"target": "cpu", "tiles": {"varlen_m": sizes, "varlen_m_narrow": sizes}}
    (tmp_path / "mine.json").write_text(json.dumps(tiles))
    with_tiles = ["model.experts_backend=triton", f"train.tiles={tmp_path}/mine.json"]
    finished(tmp_path, place.knobs(tmp_path / "triton", *knobs, *with_tiles))
    assert json.loads((tmp_path / "triton" / "tiles.json").read_text()) == tiles
    here(*place.knobs(tmp_path / "torch", *knobs, "model.experts_backend=torch"))
    got, want = losses(tmp_path / "triton"), losses(tmp_path / "torch")
    assert len(got) == len(want) == 2
    for one, other in zip(got, want, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_tiles_of_a_run(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a record, read once: a resumed run reads its own. Mistakes name the knob."""
    device, own = torch.device("cpu"), tmp_path / "tiles.json"

    def chosen(value: object, path: Path | None = own) -> object:
        return train.choose_tiles(cli.compose(place.knobs("none", f"train.tiles={value}")), path, device, 1, print)

    autotune.write({"target": "cpu", "tiles": {}}, tmp_path / "other.json")
    assert chosen("table") is None and chosen(tmp_path / "other.json") == {"target": "cpu", "tiles": {}}
    mine = {"target": "cpu", "tiles": {"varlen_k": {"m": 16, "n": 16, "k": 16}}}
    autotune.write(mine, own)
    assert chosen("autotune") == chosen(tmp_path / "other.json") == mine and chosen("table") is None
    assert chosen(tmp_path / "other.json", None) == {"target": "cpu", "tiles": {}}, (
        "a new run's knob, whatever lies in its folder"
    )
    with pytest.raises(ValueError, match="^train.tiles=/no/such.json: can't be read as a record"):
        chosen("/no/such.json", tmp_path / "none")
    if not torch.cuda.is_available():
        monkeypatch.setattr(train.dist, "get_world_size", lambda: 2)
        with pytest.raises(ValueError, match="^train.tiles=autotune: no GPU"):
            chosen("autotune", tmp_path / "none")


def test_a_gpu_of_unknown_tile_is_one_line(place: Place) -> None:
    config = cli.compose(place.knobs("none", "model.experts_backend=triton"))
    with pytest.raises(ValueError, match="^model.experts_backend=triton: no tiles are known for meta"):
        train.check_tiles(config, torch.device("meta"))
    train.check_tiles(config, torch.device("cpu"))
