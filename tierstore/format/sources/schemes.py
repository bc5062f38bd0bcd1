"""Hash schemes derived from a checkpoint's configuration, and checked against its tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from engram_client.errors import BadRequest, FormatError, VocabularyMismatch
from engram_client.hashing.schemes import engram_schemes
from engram_client.spec import HashScheme
from engram_client.tokenizer import CompressedTokenizer

HEADS_MAX = 1024  # bounds the prime search a configuration can ask for
NGRAM_MAX = 64
TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """What is known of the compressed vocabulary: its size, and its digest where a tokenizer was there."""

    size: int
    digest: str | None
    raw_size: int | None = None  # tokens before folding


def load_vocabulary(tokenizer: Path | None, folder: Path, expected_size: int | None, key: str) -> Vocabulary:
    """From the tokenizer given, else the one in `folder`, else the expected size alone.

    Raises VocabularyMismatch where the tokenizer's compressed size is not `expected_size`, FormatError
    where neither a tokenizer nor the configuration's `key` says the size.
    """
    beside = folder / TOKENIZER_NAME
    path = tokenizer or (beside if beside.exists() else None)
    if path is None:
        if expected_size is None:
            raise FormatError(
                f"{folder}: the hash depends on the compressed vocabulary's size: give a tokenizer.json, "
                f"or put {key!r} into config.json"
            )
        return Vocabulary(expected_size, None)
    compressed = _folded(path)
    if expected_size is not None and compressed.size != expected_size:
        raise VocabularyMismatch(
            f"{path}: its tokens fold to {compressed.size} compressed ids, {key} in "
            f"{folder / 'config.json'} says {expected_size}; use the tokenizer the table was trained with"
        )
    return compressed


def _folded(path: Path) -> Vocabulary:
    """Folding 129,280 tokens takes seconds, so what equal files hold is worked out once a process."""
    try:
        content = hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        content = b""  # CompressedTokenizer says what is wrong
    if content not in _known:
        found = CompressedTokenizer(path)
        _known[content] = Vocabulary(found.vocab_size, found.digest, found.raw_vocab_size)
    return _known[content]


_known: dict[bytes, Vocabulary] = {}  # by the digest of a tokenizer.json


def derive_engram_schemes(
    where: Path,
    vocabulary: Vocabulary,
    *,
    layer_ids: list[int],
    vocab_size_per_ngram: list[int],
    n_head_per_ngram: int,
    max_ngram_size: int,
    pad_id: int,
    seed: int,
) -> dict[int, HashScheme]:
    """The scheme of each layer by its number. `where` is the file the numbers come from, for messages.

    Multipliers and head sizes follow from the vocabulary's size alone; its digest is recorded.
    """
    check_bounds(where, n_head_per_ngram, max_ngram_size)
    _check_pad(where, vocabulary, pad_id)
    try:
        schemes = engram_schemes(
            compressed_vocab_size=vocabulary.size,
            layer_ids=layer_ids,
            vocab_size_per_ngram=vocab_size_per_ngram,
            n_head_per_ngram=n_head_per_ngram,
            max_ngram_size=max_ngram_size,
            pad_id=pad_id,
            seed=seed,
            vocabulary_digest=vocabulary.digest,
        )
    except (BadRequest, FormatError) as error:
        raise FormatError(f"{where}: {error}") from error
    return {scheme.layer_id: scheme for scheme in schemes}


def check_bounds(where: Path, heads: int, max_ngram_size: int) -> None:
    """Raise FormatError where a configuration asks for more primes than any model has."""
    if heads > HEADS_MAX or max_ngram_size > NGRAM_MAX:
        raise FormatError(
            f"{where}: {heads} heads of n-grams up to {max_ngram_size}; "
            f"at most {HEADS_MAX} and {NGRAM_MAX} are supported"
        )


def _check_pad(where: Path, vocabulary: Vocabulary, pad_id: int) -> None:
    """A pad id that the tokenizer does not know would make a table nobody can hash for."""
    if vocabulary.raw_size is not None and pad_id >= vocabulary.raw_size:
        raise FormatError(
            f"{where}: the pad id is {pad_id}, but the tokenizer knows tokens 0..{vocabulary.raw_size - 1}"
        )


def scheme_of(schemes: dict[int, HashScheme], layer: int, where: Path) -> HashScheme:
    if layer not in schemes:
        raise FormatError(f"{where}: layer {layer} has a table, but the layer ids are {sorted(schemes)}")
    return schemes[layer]
