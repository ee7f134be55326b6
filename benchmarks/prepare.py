"""launch/prepare.py against `datasets.map` with the same tokenizer: tokens a second of CPU time, from JSONL to tokens on disk.

Both sides read the same file, tokenize with the same BPE in one process and one thread, and write their tokens; the
peer's cache is off.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import json
import random
import tempfile
import time
from pathlib import Path

import datasets
import tokenizers
from compare import alternate, report, warn_if_busy

from moesaic.launch.documents import Source
from moesaic.launch.prepare import prepare
from moesaic.launch.tokens import load_tokenizer, train_bpe

DOCUMENTS = 6000


def main() -> None:
    warn_if_busy()
    datasets.disable_progress_bars()
    rng = random.Random(0)
    words = [
        word for path in Path(os.__file__).parent.glob("*.py") for word in path.read_text(errors="replace").split(" ")
    ]
    texts = [" ".join(words[at : at + 300]) for at in (rng.randrange(len(words) - 300) for _ in range(DOCUMENTS))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        train_bpe(texts[:1000], 8000, folder / "tokenizer.json")
        tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        made: list[int] = []

        def ours() -> None:
            out = folder / f"ours{len(made)}"
            manifest = prepare([Source(folder / "a.jsonl")], out, tokenizer, log=lambda line: None)
            made.append(sum(shard["tokens"] for split in manifest["splits"].values() for shard in split))

        def peer() -> None:
            cache = folder / f"peer{random.random()}"
            found = datasets.load_dataset(
                "json", data_files=str(folder / "a.jsonl"), split="train", cache_dir=str(cache)
            )
            found = found.map(
                lambda batch: {"ids": [one.ids for one in backend.encode_batch_fast(batch["text"])]},
                batched=True, remove_columns=["text"], load_from_cache_file=False,
            )  # fmt: skip
            found.save_to_disk(str(cache / "out"))

        ours(), peer()
        seconds = alternate({"ours": ours, "peer": peer}, rounds=5, clock=time.process_time)
        rates = {side: made[0] / taken for side, taken in seconds.items()}
        report(
            "prepare",
            f"{DOCUMENTS} documents, BPE of 8000",
            rates["ours"],
            rates["peer"],
            "datasets.map",
            "tokens/s of CPU time",
            True,
        )


if __name__ == "__main__":
    main()
