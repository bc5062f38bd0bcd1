"""Decode-time state: the few tokens an n-gram looks back on, for a batch of sequences.

A sequence that is fed in chunks hashes like one fed at once if each chunk sees the
`max_ngram_size - 1` tokens before it. Those are all that is kept: raw token ids, newest last,
with -1 where a position is dead or before the start. Raw ids are the same for every layer, so
one state serves all layers; what ends a segment (an EOS, a dead position) is read from the ids
anew by each hashing. Hashing never changes the state; `advance` does, once per step.

    keys = {layer: mapping.ngram_keys(step, layer, lookback=state) for layer in mapping.layer_ids}
    state.advance(step)

Speculative decoding hashes drafts without advancing and then advances by what was accepted
(`lengths`), which may differ between sequences; or takes a `copy` and goes back to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engram_client.errors import BadRequest, IdOutOfRange
from engram_client.hashing import inputs, kernels
from engram_client.hashing.inputs import Int64Array

_WHOLE = np.zeros(0, dtype=np.int64)  # as the kernel takes "all tokens of every sequence"


class Lookback:
    """The last `span` raw token ids of each of `batch` sequences. Not thread-safe.

    Made by `NgramHashMapping.lookback`; fresh sequences have nothing before their first token.
    """

    def __init__(self, batch: int, span: int, vocab_size: int) -> None:
        if batch < 0:
            raise BadRequest(f"a lookback needs a batch of >= 0 sequences, got {batch}")
        self._ids = np.full((batch, span), -1, dtype=np.int64)
        self._vocab_size = vocab_size

    @property
    def batch(self) -> int:
        """How many sequences it follows."""
        return len(self._ids)

    @property
    def ids(self) -> Int64Array:
        """Raw token ids, int64 [batch, span], newest last, -1 for none; a copy."""
        return self._ids.copy()

    def advance(self, token_ids: Any, dead: Any = None, lengths: Any = None) -> None:
        """Step over `token_ids` [batch,T] (or [T] for a batch of one), `dead` bool of that shape.

        `lengths` int [batch] steps over only the first so many tokens of each sequence, such as
        the accepted part of a draft. Raises BadRequest or IdOutOfRange and changes nothing.
        """
        tokens = inputs.as_tokens(token_ids)
        mask = inputs.NO_DEAD if dead is None else inputs.as_batch(inputs.as_dead(dead, tokens.shape))
        batched = inputs.as_batch(tokens)
        self._check_batch(len(batched))
        counts = _WHOLE if lengths is None else self._counts(lengths, batched.shape[1])
        refused = kernels.step_over(batched, mask, counts, self._vocab_size, self._ids)
        if refused >= 0:
            raise IdOutOfRange(
                f"token_ids{inputs.position(refused, tokens.shape)} is {tokens.flat[refused]}; "
                f"the vocabulary is 0..{self._vocab_size - 1}"
            )

    def copy(self) -> Lookback:
        """An independent state with the same tokens."""
        twin = Lookback(0, self._ids.shape[1], self._vocab_size)
        twin._ids = self._ids.copy()
        return twin

    def restore(self, snapshot: Lookback) -> None:
        """Go back to an earlier `copy`, whose batch may differ."""
        if snapshot._ids.shape[1] != self._ids.shape[1] or snapshot._vocab_size != self._vocab_size:
            raise BadRequest("the snapshot was taken from the lookback of another hash mapping")
        self._ids = snapshot._ids.copy()

    def select(self, indices: Any) -> None:
        """Keep, drop, repeat or reorder sequences: new sequence i is the old `indices[i]`."""
        self._ids = self._ids[self._indices(indices)]

    def reset(self, indices: Any) -> None:
        """Let these sequences start afresh, as when a batch slot gets a new request."""
        self._ids[self._indices(indices)] = -1

    def window_for(self, batch: int, span: int, vocab_size: int) -> Int64Array:
        """The state as the kernels read it, checked to fit a mapping and its batch."""
        if self._ids.shape[1] < span or self._vocab_size != vocab_size:
            raise BadRequest(
                f"the lookback holds {self._ids.shape[1]} tokens of a vocabulary of {self._vocab_size}, "
                f"the hash mapping needs {span} of {vocab_size}; make it with the mapping's own lookback()"
            )
        self._check_batch(batch)
        return self._ids

    def _check_batch(self, batch: int) -> None:
        if batch != self.batch:
            raise BadRequest(f"token_ids hold {batch} sequences, the lookback follows {self.batch}")

    def _counts(self, lengths: Any, length: int) -> Int64Array:
        counts = inputs.as_int64(lengths, "lengths", inputs.TOKEN_DTYPES)
        if counts.shape != (self.batch,) or ((counts < 0) | (counts > length)).any():
            raise BadRequest(
                f"lengths must be [{self.batch}] numbers of 0..{length}, "
                f"got shape {list(counts.shape)}: {counts}"
            )
        return counts

    def _indices(self, indices: Any) -> Int64Array:
        chosen = inputs.as_int64(indices, "indices", inputs.TOKEN_DTYPES)
        if chosen.ndim != 1 or ((chosen < 0) | (chosen >= self.batch)).any():
            raise BadRequest(f"indices must be a list of 0..{self.batch - 1}, got {chosen}")
        return chosen
