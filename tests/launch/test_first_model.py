"""docs/first_model.md: every command of the page, as it stands there."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.launches import ROOT, records

pytest.importorskip("lm_eval")

TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
doc_to_text: "{{question}}"
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_the_page(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = "router expert dispatch combine token shard batch gate layer norm".split()
    (tmp_path / "corpus").mkdir()
    for name in "ab":
        texts = [" ".join(f"the {rng.choice(words)} of {rng.choice(words)}" for _ in range(20)) for _ in range(200)]
        (tmp_path / "corpus" / f"{name}.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.yaml").write_text(TASK)
    questions = [{"question": f"the {word} of", "choices": ["token the", "q#z)xv"], "answer": 0} for word in words]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "hf"), "WANDB_MODE": "disabled",
    }  # fmt: skip
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "first_model.md").read_text(), re.S)
    assert len(blocks) == 5
    printed = []
    for block in blocks:
        done = subprocess.run(
            ["bash", "-e", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append(done.stdout)
    assert "data/corpus: whole, 400 documents" in printed[0]
    found = records(tmp_path / "runs" / "first")
    losses = [record["loss"] for record in found if "loss" in record]
    assert losses[-1] < 0.7 * losses[0]
    assert [record["step"] for record in found if "val_loss" in record] == [30, 60]
    assert json.loads((tmp_path / "results.json").read_text())["words"]["acc,none"] > 0.9
    assert printed[3].startswith("the router") and printed[4].startswith("the router")
    assert {"config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "first-hf").iterdir()}
