"""Tokenizers: text to token ids and back.

Two kinds. `bytes`: ids 0..255 are the bytes of UTF-8, 256 is the document separator `<|doc|>`. Any Hugging Face
`tokenizer.json`: the separator is its end-of-text token. Special tokens are never made from text, only by us: a document
that happens to contain `<|endoftext|>` gets the ordinary tokens of those characters, so the separator always means a
document's end.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import ArrayLike

from moesaic.moe.config import require

BYTES = "bytes"
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]", "<|end_of_document|>",
              "<|endofdocument|>", "<|doc|>", "<｜end▁of▁sentence｜>")  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    """Text <-> token ids.

    spec        what names it on the command line: bytes, or the absolute path of a tokenizer.json
    vocab_size  ids are below it
    separator   id that follows each document
    digest      hash of its content; token shards record it
    backend     the Hugging Face tokenizer (None: bytes)
    """

    spec: str
    vocab_size: int
    separator: int
    digest: str
    backend: tokenizers.Tokenizer | None = None

    @property
    def dtype(self) -> np.dtype:
        """The smaller of the two types of shards that holds every id; little-endian, as a file's type must be fixed."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, without any separator, as `dtype`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores where the backend can."""
        if self.backend is None:
            raw = (text.encode("utf-8", "replace") for text in texts)
            return [np.frombuffer(one, np.uint8).astype(self.dtype) for one in raw]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, self.dtype) for one in encodings]

    def decode(self, ids: ArrayLike) -> str:
        """Text of a sequence of ids. Never fails: the separator becomes a line end, bytes that are no UTF-8 become U+FFFD,
        and so do, with `bytes`, ids that the tokenizer does not have (a model's vocabulary may be larger); else nothing.
        """
        flat = np.asarray(ids, np.int64).ravel()
        documents = np.split(flat, np.flatnonzero(flat == self.separator))  # all but the first open with the separator
        return "\n".join(self._decode(document[document != self.separator]) for document in documents)

    def _decode(self, ids: np.ndarray) -> str:
        if self.backend is None:
            # 255 occurs in no UTF-8 text, so it decodes to U+FFFD.
            return np.where(ids < 256, ids, 255).astype(np.uint8).tobytes().decode("utf-8", "replace")
        return self.backend.decode(ids.tolist(), skip_special_tokens=True)


def load_tokenizer(spec: str, knob: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer that `knob` names: `bytes`, a tokenizer.json, or a folder that holds one.

    Raises `ValueError` when there is no such file, it is no tokenizer, or it has no token that ends a text.
    """
    if spec == BYTES:
        return Tokenizer(BYTES, 257, 256, hashlib.sha256(b"bytes 0..255, separator 256").hexdigest())
    path = Path(spec).expanduser().absolute()
    path = path / "tokenizer.json" if path.is_dir() else path
    require(path.is_file(), f"{knob}={spec}: no such file; must be {BYTES} or the path of a tokenizer.json")
    try:
        content = path.read_bytes()
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise ValueError(f"{knob}={spec}: not a Hugging Face tokenizer.json ({_line(error)})") from error
    special = {token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special}
    name = next((name for name in SEPARATORS if name in special), None)
    if name is None:
        raise ValueError(f"{knob}={spec}: no special token that ends a document, such as {', '.join(SEPARATORS[:4])} "
                         f"(its special tokens: {', '.join(special) or 'none'})")  # fmt: skip
    # Many published files carry the truncation and padding of their last use, which would silently cut documents.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # this library's name for "treat special tokens in a text as plain text"
    # Ids may have gaps, so the number of tokens is not enough.
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return Tokenizer(str(path), vocab_size, special[name], hashlib.sha256(content).hexdigest(), backend)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Learn a byte-level BPE (GPT-2's kind: any text has tokens, and comes back the same) of `vocab_size` tokens, the separator
    among them, or fewer where the text has no more pairs; write it to `path`, whole or not at all."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[SEPARATORS[0]], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    partial = path.with_suffix(".new")
    backend.save(str(partial))
    partial.rename(path)


def check_vocab(model_vocab: int, tokenizer: Tokenizer) -> None:
    """Raise `ValueError` unless a model with `model_vocab` embeddings can take every id of `tokenizer`."""
    require(model_vocab >= tokenizer.vocab_size,
            f"model.vocab_size={model_vocab}: must be at least {tokenizer.vocab_size}, "
            f"the tokens of data.tokenizer={tokenizer.spec}")  # fmt: skip


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
