"""What the models read: the standard library's sources, through a tokenizer trained on the learning part.

A vocabulary of a hundred thousand tokens would spend nearly all of a small model's time in its last layer.
So a byte-level BPE of a few thousand tokens is trained here, by the tokenizers library, on the training
part alone; its tokenizer.json is folded into a compressed vocabulary like any other model's.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_client import CompressedTokenizer
from engram_client.errors import BadRequest
from tierbench.corpus import load_trace, save_trace, stdlib_text, tokenize_corpus

PAD = "<pad>"
PAD_ID = 0
VALIDATION_SHARE = 20  # one document in so many


@dataclass(frozen=True)
class Text:
    """Token ids int64 of what is learned from and of what is held out, each document after the other."""

    training: np.ndarray
    validation: np.ndarray
    tokenizer: CompressedTokenizer


def make_text(folder: Path, vocab_size: int, validation_tokens: int) -> Text:
    """The text, made under `folder` where it is not there. Raises BadRequest where there is too little."""
    training, held_out = split_documents(stdlib_text())
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"learn-{vocab_size}-{zlib.crc32(''.join(training + held_out).encode()):08x}"
    tokenizer = folder / f"{stem}.tokenizer.json"
    if not tokenizer.exists():
        _train_tokenizer(tokenizer, training, vocab_size)
    parts = []
    for name, documents in (("training", training), ("validation", held_out)):
        trace = folder / f"{stem}.{name}.npz"
        if not trace.exists():
            save_trace(trace, *tokenize_corpus(tokenizer, documents))
        parts.append(load_trace(trace)[0].astype(np.int64))
    if len(parts[1]) < validation_tokens:
        raise BadRequest(
            f"{len(parts[1])} tokens are held out; --validation-tokens {validation_tokens} is more"
        )
    return Text(parts[0], parts[1][:validation_tokens], CompressedTokenizer(tokenizer))


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training, held out); which is which depends on a document's text alone, so no copy is in both."""
    held_out = [d for d in documents if zlib.crc32(d.encode()) % VALIDATION_SHARE == 0]
    return [d for d in documents if zlib.crc32(d.encode()) % VALIDATION_SHARE], held_out


def _train_tokenizer(path: Path, documents: list[str], vocab_size: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    partial = path.with_suffix(".partial")
    tokenizer.save(str(partial))
    partial.rename(path)
