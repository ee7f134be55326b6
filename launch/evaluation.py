"""Tasks of lm-evaluation-harness on a run's own checkpoint: nothing is exported.

python launch/evaluation.py run_dir=runs/demo tasks=hellaswag,arc_easy [tasks_dir=my_tasks] [out=results.json] [limit=0]

Needs `pip install 'moesaic[eval]'`. `tasks_dir` holds YAML files of tasks of one's own; limit=0: all documents of a task.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    print("error: needs lm_eval: pip install 'moesaic[eval]'", file=sys.stderr)
    sys.exit(2)

from moesaic.launch import options
from moesaic.launch.generate import load_run, newest_checkpoint, sample_tokens
from moesaic.launch.tokens import Tokenizer
from moesaic.moe.config import require
from moesaic.moe.model import Transformer

NEW_TOKENS = 256  # of a generation whose task does not say


class Model(TemplateLM):
    """A model of ours as the harness asks it. As in training, every text begins behind a separator."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, context: int, batch: int, device: torch.device
    ) -> None:
        super().__init__()
        self.model, self.ours, self.context, self.batch, self._device = model.eval(), tokenizer, context, batch, device

    @property
    def eot_token_id(self) -> int:
        return self.ours.separator

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        return self.ours.encode(string).tolist()

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation): the log probability of the continuation, and whether each of its tokens is the
        most likely one. What exceeds the model's context is cut off on the left."""
        rows = []
        for _, before, after in requests:
            whole = [*([] if before[:1] == [self.eot_token_id] else [self.eot_token_id]), *before, *after]
            require(len(after) <= self.context, f"a continuation has {len(after)} tokens, train.seq_len={self.context}")
            rows.append((whole[-self.context - 1 :], len(after)))
        result: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        for first in range(0, len(order), self.batch):
            some = order[first : first + self.batch]
            longest = len(rows[some[0]][0]) - 1
            # Padded on the right, where no token of the text looks.
            padded = [rows[i][0][:-1] + [self.eot_token_id] * (longest - len(rows[i][0]) + 1) for i in some]
            logits_BSV = self.model(torch.tensor(padded, device=self._device)).logits
            for i, logits_SV in zip(some, logits_BSV, strict=True):
                ids, count = rows[i]
                end = len(ids) - 1
                score_NV = logits_SV[end - count : end].float().log_softmax(-1)
                target_N = torch.tensor(ids[len(ids) - count :], device=self._device)
                greedy = bool((score_NV.argmax(-1) == target_N).all())
                result[i] = (float(score_NV.gather(1, target_N[:, None]).sum()), greedy)
        return result

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log probability of whole texts, each token once, in windows as long as the model's context."""
        result = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = map(make_disjoint_window, get_rolling_token_windows(tokens, self.eot_token_id, self.context, 1))
            result.append(sum(score for score, _ in self._loglikelihood_tokens([(None, *pair) for pair in windows])))
        return result

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        result = []
        for first in range(0, len(requests), self.batch):
            asked = [request.args for request in requests[first : first + self.batch]]
            limits = [int(how.get("max_gen_toks", NEW_TOKENS)) for _, how in asked]
            stops = [
                [how["until"]] if isinstance(how.get("until"), str) else how.get("until") or [] for _, how in asked
            ]
            prompts = [
                torch.tensor([self.eot_token_id, *self.tok_encode(text)], device=self._device) for text, _ in asked
            ]

            def ends(row: int, new: list[int], stops: Any = stops, limits: Any = limits) -> bool:
                text = self.ours.decode(new)
                return len(new) >= limits[row] or self.eot_token_id in new or any(stop in text for stop in stops[row])

            temperature = float(asked[0][1].get("temperature", 0.0)) if asked[0][1].get("do_sample") else 0.0
            rows = sample_tokens(
                self.model, prompts, max(limits), self.context, temperature=temperature, top_k=0, seed=0, ends=ends
            )
            for new, limit, until in zip(rows, limits, stops, strict=True):
                ended = new[:limit]
                ended = ended[: ended.index(self.eot_token_id)] if self.eot_token_id in ended else ended
                text = self.ours.decode(ended)
                result.append(text[: min([text.find(stop) for stop in until if stop in text], default=len(text))])
        self.model.eval()
        return result


@dataclass
class Options:
    """run_dir: a run, or one checkpoint of it."""

    run_dir: str = ""
    tasks: str = ""
    tasks_dir: str = ""
    out: str = ""
    limit: int = 0
    fewshot: int = 0
    batch: int = 16


def main(choice: Options) -> None:
    require(choice.tasks != "", "tasks=: must name tasks, as in tasks=hellaswag,arc_easy")
    for name, least in (("limit", 0), ("fewshot", 0), ("batch", 1)):
        require(getattr(choice, name) >= least, f"{name}={getattr(choice, name)}: must be at least {least}")
    manager = TaskManager(include_path=choice.tasks_dir or None)
    names = choice.tasks.split(",")
    unknown = [name for name in names if not manager.match_tasks([name])]
    require(
        not unknown,
        f"tasks={choice.tasks}: {', '.join(unknown)}: unknown to lm_eval, and not in tasks_dir",
    )
    config, tokenizer, model, device = load_run(newest_checkpoint(choice.run_dir))
    asked = Model(model, tokenizer, config.train.seq_len, choice.batch, device)
    results = lm_eval.simple_evaluate(
        asked, tasks=names, num_fewshot=choice.fewshot or None, limit=choice.limit or None, task_manager=manager,
        bootstrap_iters=0,
    )["results"]  # fmt: skip
    for name, figures in results.items():
        told = [f"{key.split(',')[0]} {value:.4f}" for key, value in figures.items() if isinstance(value, float)]
        print(f"{name}: {', '.join(told)}", flush=True)
    if choice.out:
        Path(choice.out).write_text(json.dumps(results, indent=2, default=str) + "\n")


if __name__ == "__main__":
    options.run(main, Options, __doc__)
