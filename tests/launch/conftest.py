"""A corpus, and a run that others are compared with: made once a process."""

import random
from pathlib import Path

import pytest

from tests.launch.launches import Place, finished


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    words = "router expert dispatch combine token shard batch the a of and".split()
    corpus = random.Random(0)
    (folder / "corpus").mkdir()
    for path in [*(folder / "corpus" / f"{i}.txt" for i in range(10)), folder / "held_out.txt"]:
        path.write_text(" ".join(corpus.choice(words) for _ in range(400)))
    return Place(folder)


@pytest.fixture(scope="session")
def reference(place: Place) -> tuple[Path, str]:
    """The run directory of a run of 40 steps that nothing interrupts, and what it printed. Tests leave it as it is."""
    run_dir = place.folder / "reference"
    elsewhere = place.folder / "elsewhere"
    elsewhere.mkdir()
    knobs = place.knobs(run_dir, *"train.checkpoint_every=10 train.keep_checkpoints=2 train.eval_every=30".split())
    text = finished(elsewhere, [*knobs, "train.sample=25"])
    assert [path.suffix for path in elsewhere.iterdir()] == [".log"], "writes nothing where it is started"
    return run_dir, text
