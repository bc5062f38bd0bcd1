"""A token stream as look-ups, a stretch at a time, so that memory does not grow with the trace.

Keys come from the product's hashing. It wants sequences, and here tokens of many documents lie side by side;
so each token is hashed as the last of a window of its own, as long as the longest n-gram, in which what
lies before its document is dead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tierbench.hitrate.mix import TokenStream
from tierbench.hitrate.model import Model
from tierbench.policy.lookups import weave

STRETCH_TOKENS = 1 << 15


@dataclass(frozen=True)
class Lookups:
    """Consecutive look-ups, as `tierbench.policy.lookups.weave` describes them.

    keys, owners: int64 [n]; ends, first_tokens: int64 [look-ups]
    first_token: where in the stream the first of them begins; first_lookup: how many came before
    """

    keys: np.ndarray
    owners: np.ndarray
    ends: np.ndarray
    first_tokens: np.ndarray
    first_token: int
    first_lookup: int


def lookups_of(model: Model, stream: TokenStream, stretch_tokens: int = STRETCH_TOKENS) -> Iterator[Lookups]:
    """All look-ups of a stream, so many tokens at a time, and never less than a batch."""
    first_batch = first_token = 0
    layers = len(model.tables)
    while first_batch < stream.batch_ends.size:
        last_batch = int(np.searchsorted(stream.batch_ends, first_token + stretch_tokens, "right"))
        last_batch = max(last_batch, first_batch + 1)
        ends = stream.batch_ends[first_batch:last_batch]
        layer_keys = _layer_keys(model, stream, first_token, int(ends[-1]))
        keys, owners = np.empty(layer_keys.size, np.int64), np.empty(layer_keys.size, np.int64)
        lookup_ends = np.empty(ends.size * layers, np.int64)
        first_tokens = np.empty_like(lookup_ends)
        weave(layer_keys, ends - first_token, model.kind_owners, keys, owners, lookup_ends, first_tokens)
        yield Lookups(keys, owners, lookup_ends, first_tokens, first_token, first_batch * layers)
        first_batch, first_token = last_batch, int(ends[-1])


def _layer_keys(model: Model, stream: TokenStream, first: int, last: int) -> np.ndarray:
    """int64 [layers, tokens, columns]."""
    positions = stream.positions[first:last]
    starts = stream.document_starts
    begins = starts[np.searchsorted(starts, positions, "right") - 1]
    size = model.mapping.max_ngram_size
    window = positions[:, None] + np.arange(1 - size, 1)
    dead = window < begins[:, None]
    tokens = stream.ids[np.maximum(window, 0)]
    keys = [model.mapping.ngram_keys(tokens, table.scheme.layer_id, dead)[:, -1] for table in model.tables]
    return np.stack([model.entry_keys(table, k) for table, k in zip(model.tables, keys, strict=True)])
