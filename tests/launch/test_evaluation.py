"""launch/evaluation.py: lm-evaluation-harness on a checkpoint of ours, with a task that lies in a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from moesaic.launch import evaluation, generate
from moesaic.launch.tokens import load_tokenizer
from moesaic.moe.model import build
from tests.launch.launches import Place, here

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""


@pytest.fixture(scope="module")
def run_dir(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    here(*place.knobs(folder / "run", "train.steps=30", "train.eval_every=0", "optim.lr=0.01", "train.seq_len=48"))
    return folder / "run"


def plain_score(model: Any, context: bytes, answer: bytes) -> tuple[float, bool]:
    """Token by token, each from its own forward pass, of the last 48 tokens."""
    total, greedy = 0.0, True
    for i in range(len(answer)):
        seen = [256, *context, *answer[:i]][-48:]
        with torch.no_grad():
            p = model.eval()(torch.tensor([seen])).logits[0, -1].double().log_softmax(-1)
        total, greedy = total + p[answer[i]].item(), greedy and int(p.argmax()) == answer[i]
    return total, greedy


def test_scores_are_those_of_a_plain_loop(run_dir: Path) -> None:
    config, tokenizer, model, device = generate.load_run(generate.newest_checkpoint(str(run_dir)))
    asked = evaluation.Model(model, tokenizer, 48, 3, device)
    pairs = [
        ("router", " expert dis"),
        ("", "token"),
        ("batch of", " shard"),
        ("a", "n"),
        ("expert " * 4 + "dis", "patch"),
    ]
    requests = [type("Request", (), {"args": pair})() for pair in pairs]
    for (context, answer), (score, greedy) in zip(pairs, asked.loglikelihood(requests), strict=True):
        wanted, best = plain_score(model, context.encode(), answer.encode())
        assert score == pytest.approx(wanted, rel=1e-4) and greedy == best
    text = "combine the token " * 6  # longer than the context: each token once, with all the windows allow
    rolling = asked.loglikelihood_rolling([type("Request", (), {"args": (text,)})()])[0]
    first, _ = plain_score(model, b"", text[:48].encode())
    assert rolling < first and rolling == pytest.approx(len(text) / 48 * first, rel=0.4)
    until = {"until": ["e"], "max_gen_toks": 15}
    prompts = [("router exp", until), ("batch", until)]
    made = asked.generate_until([type("Request", (), {"args": one})() for one in prompts])
    for (prompt, _), text in zip(prompts, made, strict=True):
        ids = torch.tensor([256, *prompt.encode()])
        ((*new,),) = generate.sample_tokens(model, [ids], 15, 48, temperature=0, top_k=0, seed=0)
        assert text == tokenizer.decode(new).split("e")[0].split("\n")[0]


def test_a_task_of_ones_own(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    documents = [{"question": f"router {a} the", "choices": [" expert", " zzzzqq"], "answer": 0} for a in "abcdef"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.yaml").write_text(
        TASK.format(name="words", data=tmp_path / "test.jsonl")
        + 'output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\ntarget_delimiter: ""\n'
        + "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    out = tmp_path / "results.json"
    evaluation.main(
        evaluation.Options(run_dir=str(run_dir), tasks="words", tasks_dir=str(tmp_path / "tasks"), out=str(out))
    )
    assert json.loads(out.read_text())["words"]["acc,none"] == 1.0
    assert "words: acc 1.0000" in capsys.readouterr().out
    for options, line in ({"tasks": "nothing_of_this_name"}, "unknown to lm_eval"), ({"tasks": ""}, "must name tasks"):
        with pytest.raises(ValueError, match=line):
            evaluation.main(evaluation.Options(run_dir=str(run_dir), **options))


def test_the_model_has_no_batch_effects() -> None:
    """Padding on the right changes nothing for a text, and more than the context can't be scored."""
    from moesaic.launch import cli

    knobs = "model.d_model=32 model.n_layers=2 model.n_heads=2 model.n_experts=4 model.d_expert=32".split()
    model = build(cli.compose(knobs).model, 0, torch.device("cpu"))
    requests = [(None, [1, 2, 3], [4]), (None, [5], [6, 7, 8, 9, 10]), (None, [256, 3], [4, 4])]
    scores = [
        evaluation.Model(model, load_tokenizer("bytes"), 16, batch, torch.device("cpu"))._loglikelihood_tokens(requests)
        for batch in (1, 3)
    ]
    assert [s for s, _ in scores[0]] == pytest.approx([s for s, _ in scores[1]], rel=1e-5)
    with pytest.raises(ValueError, match="a continuation has 5 tokens"):
        evaluation.Model(model, load_tokenizer("bytes"), 4, 1, torch.device("cpu"))._loglikelihood_tokens(requests)
