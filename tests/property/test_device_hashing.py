"""Hashing in torch operations equals the compiled kernels, bit for bit, and reads no value back."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_client.errors import BadRequest
from engram_client.hashing import NgramHashMapping
from tests.property.test_hashing_oracle import batches
from tests.unit.client.test_hashing import qwen, small, v41

Batch = tuple[NgramHashMapping, list[int], np.ndarray, np.ndarray]
REFUSED = -2


@given(batches(), st.sampled_from([torch.int64, torch.int32]))
def test_keys_and_rows_are_the_kernels(batch: Batch, dtype: torch.dtype) -> None:
    mapping, _, tokens, dead = batch
    twin, given_tokens = mapping.on_device("cpu"), torch.from_numpy(tokens).to(dtype)
    for layer in mapping.layer_ids:
        for mask, given_mask in ((dead, torch.from_numpy(dead)), (None, None)):
            keys = twin.ngram_keys(given_tokens, layer, given_mask)
            rows = twin.row_ids(given_tokens, layer, given_mask)
            np.testing.assert_array_equal(keys.numpy(), mapping.ngram_keys(tokens, layer, mask))
            np.testing.assert_array_equal(rows.numpy(), mapping.row_ids(tokens, layer, mask))
            assert keys.dtype == rows.dtype == torch.int64


@given(batches(), st.lists(st.integers(0, 14), max_size=8), st.booleans())
def test_chunks_hash_like_the_whole(batch: Batch, cuts: list[int], by_lengths: bool) -> None:
    """A chunk is stepped over whole, or as the first part of a longer one."""
    mapping, _, tokens, dead = batch
    twin, length = mapping.on_device("cpu"), tokens.shape[1]
    given_tokens, given_dead = torch.from_numpy(tokens), torch.from_numpy(dead)
    state, kept = twin.lookback(len(tokens)), mapping.lookback(len(tokens))
    address = state.ids.data_ptr()
    for start, stop in pairwise(sorted([0, length, *(min(cut, length) for cut in cuts)])):
        chunk, mask = given_tokens[:, start:stop], given_dead[:, start:stop]
        for layer in mapping.layer_ids:
            whole = mapping.ngram_keys(tokens, layer, dead)
            keys = twin.ngram_keys(chunk, layer, mask, lookback=state)
            np.testing.assert_array_equal(keys.numpy(), whole[:, start:stop])
        if by_lengths:
            counts = torch.full((len(tokens),), stop - start)
            state.advance(given_tokens[:, start:], given_dead[:, start:], lengths=counts)
        else:
            state.advance(chunk, mask)
        kept.advance(tokens[:, start:stop], dead[:, start:stop])
        np.testing.assert_array_equal(state.ids.numpy(), kept.ids)
    assert state.ids.data_ptr() == address


@given(batches(), st.data())
def test_drafts_and_reordered_batches(batch: Batch, data: st.DataObject) -> None:
    mapping, _, tokens, dead = batch
    sequences, length = tokens.shape
    lengths = data.draw(arrays.arrays(np.int64, sequences, elements=st.integers(0, length)))
    order = data.draw(arrays.arrays(np.int64, sequences, elements=st.integers(0, sequences - 1)))
    fresh = data.draw(arrays.arrays(np.bool_, sequences))
    state, kept = mapping.on_device("cpu").lookback(sequences), mapping.lookback(sequences)
    state.advance(torch.from_numpy(tokens), torch.from_numpy(dead), torch.from_numpy(lengths))
    kept.advance(tokens, dead, lengths)
    state.select(torch.from_numpy(order))
    kept.select(order)
    np.testing.assert_array_equal(state.ids.numpy(), kept.ids)
    state.reset(torch.from_numpy(fresh))
    kept.reset(np.flatnonzero(fresh))
    np.testing.assert_array_equal(state.ids.numpy(), kept.ids)


def reads_from(mapping: NgramHashMapping, layer: int, position: int, ids: np.ndarray, at: int) -> list[bool]:
    """Per order, whether the n-gram at `position` reads the id at `at`: found by changing that id."""
    limit = mapping.raw_vocab_size
    original = mapping.ngram_keys(ids, layer)[position]
    changed = np.zeros(original.shape, dtype=np.bool_)
    for other in range(limit):
        twin = ids.copy()
        twin[at] = other
        changed |= mapping.ngram_keys(twin, layer)[position] != original
    return changed.tolist()


@pytest.mark.parametrize("wrong", [-1, -2, 6, 2**40, -(2**63), 2**63 - 1])
def test_an_id_outside_the_vocabulary_refuses_the_n_grams_that_read_it(wrong: int) -> None:
    mapping, ids, at = small(), np.array([0, 3, 4, 5, 2, 0, 1]), 2
    foreign = ids.copy()
    foreign[at] = wrong
    for layer in mapping.layer_ids:
        expected = mapping.ngram_keys(ids, layer)
        keys = mapping.on_device("cpu").ngram_keys(torch.from_numpy(foreign), layer).numpy()
        rows = mapping.on_device("cpu").row_ids(torch.from_numpy(foreign), layer).numpy().reshape(7, 2, 2)
        for position in range(len(ids)):
            for order, reads in enumerate(reads_from(mapping, layer, position, ids, at)):
                assert keys[position, order] == (REFUSED if reads else expected[position, order])
                assert (rows[position, order] == REFUSED).all() == reads


def test_refused_ids_are_looked_back_on_as_such() -> None:
    mapping, twin = small(), small().on_device("cpu")
    state = twin.lookback(2)
    state.advance(torch.tensor([[3, -1], [3, 4]]))
    keys = twin.ngram_keys(torch.tensor([[1], [1]]), 3, lookback=state)
    assert keys[0].tolist() == [[REFUSED] * 2]
    assert keys[1].tolist() == mapping.ngram_keys([3, 4, 1], 3)[2:].tolist()


def test_lengths_and_indices_that_name_nothing_refuse_what_follows() -> None:
    twin, tokens = small().on_device("cpu"), torch.tensor([[3, 4], [3, 4], [3, 4]])
    state = twin.lookback(3)
    state.advance(tokens, lengths=torch.tensor([2, 3, -1]))
    assert state.ids.tolist() == [[3, 4], [REFUSED] * 2, [REFUSED] * 2]
    state.select(torch.tensor([-1, 0, 3]))
    assert state.ids.tolist() == [[REFUSED] * 2, [3, 4], [REFUSED] * 2]


def test_a_lookback_made_in_inference_mode_serves_outside_of_it() -> None:
    twin, tokens = small().on_device("cpu"), torch.tensor([[3, 4], [0, 5]])
    with torch.inference_mode():
        state = twin.lookback(2)
        state.advance(tokens)
    state.advance(tokens)
    with torch.inference_mode():
        state.reset(torch.tensor([True, False]))
    assert state.ids.tolist() == [[-1, -1], [0, 5]]


def test_ids_at_dead_positions_are_not_read() -> None:
    twin, dead = small().on_device("cpu"), torch.tensor([False, True, False])
    keys = twin.ngram_keys(torch.tensor([3, -7, 4]), 3, dead)
    assert keys.tolist() == small().ngram_keys([3, 5, 4], 3, dead.numpy()).tolist()


def test_real_geometries() -> None:
    """The published models, whose products come near 2^63."""
    random = np.random.default_rng(7)
    for mapping in (v41(), qwen()):
        tokens = random.integers(0, mapping.raw_vocab_size, (3, 200))
        dead = random.random(tokens.shape) < 0.05
        twin = mapping.on_device("cpu")
        for layer in mapping.layer_ids:
            rows = twin.row_ids(torch.from_numpy(tokens), layer, torch.from_numpy(dead))
            np.testing.assert_array_equal(rows.numpy(), mapping.row_ids(tokens, layer, dead))


def test_no_value_is_read_back() -> None:
    """Tensors on the meta device hold no values: whoever asks for one, or for a shape by one, fails."""
    for mapping in (small(), qwen()):
        twin, layer = mapping.on_device("meta"), mapping.layer_ids[0]
        tokens = torch.empty((4, 9), dtype=torch.int64, device="meta")
        dead, counts = (
            torch.empty_like(tokens, dtype=torch.bool),
            torch.empty(4, dtype=torch.int64, device="meta"),
        )
        state, orders = twin.lookback(4), mapping.scheme(layer).orders
        keys = twin.ngram_keys(tokens, layer, dead, lookback=state)
        rows = twin.row_ids(tokens, layer, lookback=state)
        state.advance(tokens, dead, lengths=counts)
        state.select(counts)
        state.reset(dead[:, 0])
        assert keys.shape == (4, 9, orders)
        assert rows.shape == (4, 9, orders * mapping.scheme(layer).heads)


@pytest.mark.parametrize("shape", [(0,), (0, 0), (0, 5), (5, 0), (4,)])
def test_shapes(shape: tuple[int, ...]) -> None:
    tokens = torch.zeros(shape, dtype=torch.int64)
    assert small().on_device("cpu").ngram_keys(tokens, 3).shape == (*shape, 2)
    assert small().on_device("cpu").row_ids(tokens, 3).shape == (*shape, 4)


class TestRefusals:
    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            ([0, 1], "must be a torch tensor on cpu, got list"),
            (torch.zeros(3), r"must be int64 or int32 of shape \[3\] on cpu, got float32"),
            (torch.zeros(3, dtype=torch.uint8), "got uint8"),
            (torch.zeros((), dtype=torch.int64), r"\[B,T\] or \[T\]"),
            (torch.zeros((1, 1, 1), dtype=torch.int64), r"\[B,T\] or \[T\]"),
            (torch.zeros(3, dtype=torch.int64, device="meta"), "on meta"),
        ],
    )
    def test_tokens(self, tokens: Any, message: str) -> None:
        with pytest.raises(BadRequest, match=message):
            small().on_device("cpu").ngram_keys(tokens, 3)

    def test_others(self) -> None:
        twin, tokens = small().on_device("cpu"), torch.zeros((2, 3), dtype=torch.int64)
        with pytest.raises(BadRequest, match="dead must be bool"):
            twin.ngram_keys(tokens, 3, torch.zeros(3, dtype=torch.bool))
        with pytest.raises(BadRequest, match=r"no hash scheme for layer 4; there are \[3, 7\]"):
            twin.ngram_keys(tokens, 4)
        with pytest.raises(BadRequest, match="hold 2 sequences, the lookback follows 3"):
            twin.ngram_keys(tokens, 3, lookback=twin.lookback(3))
        with pytest.raises(BadRequest, match="mapping's own lookback"):
            twin.ngram_keys(tokens, 3, lookback=qwen().on_device("cpu").lookback(2))
        with pytest.raises(BadRequest, match="batch of >= 0"):
            twin.lookback(-1)
        state = twin.lookback(2)
        with pytest.raises(BadRequest, match="hold 1 sequences, the lookback follows 2"):
            state.advance(tokens[0])
        with pytest.raises(BadRequest, match=r"lengths must be int64 or int32 of shape \[2\]"):
            state.advance(tokens, lengths=torch.zeros(3, dtype=torch.int64))
        with pytest.raises(BadRequest, match="indices must be"):
            state.select(torch.zeros(1, dtype=torch.int64))
        with pytest.raises(BadRequest, match="fresh must be bool"):
            state.reset(torch.zeros(2, dtype=torch.int64))
