"""Hashing against a slow oracle in Python's own big integers, written from the published rules.

The oracle is told multipliers, head sizes and the compressed map; how these are derived is
judged by the conformance vectors. It looks at each position by itself and keeps no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_client.errors import ForeignIds
from engram_client.hashing import NgramHashMapping, recover_keys, row_ids_from_keys
from engram_client.spec import HashScheme

Ids = Sequence[int]


def oracle_sources(
    position: int, ids: Ids, dead: Sequence[bool], count: int, eos: int | None
) -> list[int | None]:
    """The ids an n-gram at `position` is hashed from, newest first; None where a filler stands in."""
    start = 0
    for earlier in range(position):
        if dead[earlier] or (eos is not None and ids[earlier] == eos):
            start = earlier + 1
    if dead[position]:
        start = position + 1
    return [ids[position - back] if position - back >= start else None for back in range(count)]


def oracle_keys(scheme: HashScheme, fold: Ids, ids: Ids, dead: Sequence[bool]) -> list[list[int]]:
    """N-gram keys [T][orders] of one sequence."""
    eos = scheme.eos_token_id if scheme.kind == "ple" else None
    filler = scheme.eos_token_id if scheme.kind == "ple" else fold[scheme.pad_id]
    result = []
    for position in range(len(ids)):
        sources = oracle_sources(position, ids, dead, len(scheme.multipliers), eos)
        hashed = [filler if raw is None else fold[raw] for raw in sources]
        keys, mixed = [], 0
        for back, (token, multiplier) in enumerate(zip(hashed, scheme.multipliers, strict=True)):
            mixed ^= token * multiplier
            if back:
                keys.append(mixed)
        result.append(keys)
    return result


def oracle_rows(scheme: HashScheme, keys: Sequence[Sequence[int]]) -> list[list[int]]:
    """Row ids [T][H]: heads lie one after another."""
    result = []
    for row in keys:
        offset, ids = 0, []
        for key, sizes in zip(row, scheme.head_sizes, strict=True):
            for size in sizes:
                ids.append(offset + key % size)
                offset += size
        result.append(ids)
    return result


@st.composite
def engram_mappings(draw: st.DrawFn) -> tuple[NgramHashMapping, list[int]]:
    """An Engram mapping of two layers, and its fold as a list."""
    raw = draw(st.integers(2, 30))
    used = draw(st.sampled_from([1, 3, raw, 100_000, 2**40]))  # the largest compressed id decides the bound
    fold = draw(st.lists(st.integers(0, min(used, raw) - 1), min_size=raw, max_size=raw))
    fold[0] = used - 1
    max_ngram = draw(st.integers(2, 5))
    mapping = NgramHashMapping.engram(
        np.array(fold),
        layer_ids=draw(st.sampled_from([[0, 1], [1, 15], [7, 2]])),
        vocab_size_per_ngram=draw(
            st.lists(st.integers(1, 10**6), min_size=max_ngram - 1, max_size=max_ngram - 1)
        ),
        n_head_per_ngram=draw(st.integers(1, 4)),
        max_ngram_size=max_ngram,
        pad_id=draw(st.integers(0, raw - 1)),
        seed=draw(st.integers(0, 2**32)),
    )
    return mapping, fold


@st.composite
def ple_mappings(draw: st.DrawFn) -> tuple[NgramHashMapping, list[int]]:
    """A PLE mapping; small vocabularies make EOS frequent."""
    vocab = draw(st.sampled_from([2, 3, 10, 40]))
    mapping = NgramHashMapping.ple(
        vocab_size=vocab,
        eos_token_id=draw(st.integers(0, vocab - 1)),
        ngram_size=draw(st.integers(2, 5)),
        heads_per_ngram=draw(st.integers(1, 4)),
        ngram_vocab_base=draw(st.integers(2, 10**6)),
        seed=draw(st.integers(0, 2**32)),
        layer_index=draw(st.integers(0, 3)),
    )
    return mapping, list(range(vocab))


@st.composite
def batches(draw: st.DrawFn) -> tuple[NgramHashMapping, list[int], np.ndarray, np.ndarray]:
    """A mapping, its fold, token ids [B,T] and dead positions [B,T]."""
    mapping, fold = draw(st.one_of(engram_mappings(), ple_mappings()))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 14)))
    tokens = draw(arrays.arrays(np.int64, shape, elements=st.integers(0, len(fold) - 1)))
    dead = draw(arrays.arrays(np.bool_, shape, elements=st.sampled_from([False, False, False, True])))
    return mapping, fold, tokens, dead


@given(batches())
def test_keys_and_rows_are_the_oracles(
    batch: tuple[NgramHashMapping, list[int], np.ndarray, np.ndarray],
) -> None:
    mapping, fold, tokens, dead = batch
    alive = np.zeros_like(dead)
    for layer in mapping.layer_ids:
        scheme = mapping.scheme(layer)
        for mask, given_mask in ((dead, dead), (alive, None)):
            keys = mapping.ngram_keys(tokens, layer, given_mask)
            rows = mapping.row_ids(tokens, layer, given_mask)
            for b in range(len(tokens)):
                expected = oracle_keys(scheme, fold, tokens[b].tolist(), mask[b].tolist())
                assert keys[b].tolist() == expected
                assert rows[b].tolist() == oracle_rows(scheme, expected)


@given(batches(), st.lists(st.integers(0, 14), max_size=8))
def test_any_chunking_hashes_like_the_whole(
    batch: tuple[NgramHashMapping, list[int], np.ndarray, np.ndarray], cuts: list[int]
) -> None:
    mapping, _, tokens, dead = batch
    whole = {layer: mapping.ngram_keys(tokens, layer, dead) for layer in mapping.layer_ids}
    state = mapping.lookback(len(tokens))
    length = tokens.shape[1]
    bounds = sorted([0, length, *(min(cut, length) for cut in cuts)])  # equal bounds: an empty chunk
    for start, stop in pairwise(bounds):
        chunk, mask = tokens[:, start:stop], dead[:, start:stop]
        for layer in mapping.layer_ids:
            keys = mapping.ngram_keys(chunk, layer, mask, lookback=state)
            np.testing.assert_array_equal(keys, whole[layer][:, start:stop])
        state.advance(chunk, mask)


@given(batches(), st.data())
def test_drafts_and_reordered_batches(
    batch: tuple[NgramHashMapping, list[int], np.ndarray, np.ndarray], data: st.DataObject
) -> None:
    """Accept part of a draft per sequence, then reorder; each goes on as if it had been alone."""
    mapping, _, tokens, dead = batch
    sequences, length = tokens.shape
    lengths = data.draw(arrays.arrays(np.int64, sequences, elements=st.integers(0, length)))
    order = data.draw(st.lists(st.integers(0, sequences - 1), max_size=4))
    layer = mapping.layer_ids[0]
    state = mapping.lookback(sequences)
    state.advance(tokens, dead, lengths=lengths)
    state.select(np.array(order, dtype=np.int64))
    after = mapping.ngram_keys(tokens[order], layer, dead[order], lookback=state)
    for place, b in enumerate(order):
        joined = np.concatenate([tokens[b, : lengths[b]], tokens[b]])
        mask = np.concatenate([dead[b, : lengths[b]], dead[b]])
        alone = mapping.ngram_keys(joined, layer, mask)
        np.testing.assert_array_equal(after[place], alone[lengths[b] :])


RECOVERABLE = NgramHashMapping.ple(
    vocab_size=1000,
    eos_token_id=0,
    ngram_size=3,
    heads_per_ngram=8,
    ngram_vocab_base=250_000,
    seed=1,
    layer_index=0,
).scheme(0)
EDGES = st.sampled_from([-1, 0, 1, 250_007, 2**62, 2**63 - 1])
KEYS = arrays.arrays(
    np.int64,
    st.tuples(st.integers(1, 6), st.just(2)),
    elements=st.one_of(EDGES, st.integers(0, 2**63 - 1)),
)


@given(KEYS)
def test_rows_lead_back_to_their_keys(keys: np.ndarray) -> None:
    rows = row_ids_from_keys(RECOVERABLE, keys)
    for n, o in np.ndindex(*keys.shape):
        for h, row in enumerate(rows[n].reshape(2, 8)[o].tolist()):
            size, offset = RECOVERABLE.head_sizes[o][h], RECOVERABLE.head_offsets[o][h]
            assert row == (-1 if keys[n, o] == -1 else offset + int(keys[n, o]) % size)
    np.testing.assert_array_equal(recover_keys(RECOVERABLE, rows), keys)


@given(KEYS, st.data())
def test_one_changed_row_is_always_noticed(keys: np.ndarray, data: st.DataObject) -> None:
    """The other seven heads of 250 thousand rows leave one key; no other row fits it."""
    rows = row_ids_from_keys(RECOVERABLE, keys)
    n = data.draw(st.integers(0, len(keys) - 1))
    o, h = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 7))
    offset = RECOVERABLE.head_offsets[o][h]
    other = offset + data.draw(st.integers(0, RECOVERABLE.head_sizes[o][h] - 1))
    if other == rows[n, o * 8 + h]:
        return
    rows[n, o * 8 + h] = other
    with pytest.raises(ForeignIds, match=rf"row_ids\[{n}\] are not one n-gram's: order {o + 2}"):
        recover_keys(RECOVERABLE, rows)
