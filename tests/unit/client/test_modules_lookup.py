"""Hashing, table and module tied together, against the same model with its table resident."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engram_client.dequantize import dequantize
from engram_client.hashing import NgramHashMapping
from engram_client.modules import DeepseekV41Engram, Engram, EngramLayer, EngramLookup, ResidentLookup
from engram_client.spec import Field, RowLayout

LAYER, STREAMS, D, HEAD_DIM = 3, 2, 5, 4


@pytest.fixture(scope="module")
def mapping() -> NgramHashMapping:
    return NgramHashMapping.engram(
        np.arange(60),
        layer_ids=[LAYER],
        vocab_size_per_ngram=[50, 80],
        n_head_per_ngram=2,
        max_ngram_size=3,
        pad_id=0,
        seed=5,
    )


class RecordedTable:
    """A table in memory that answers as a client's does, and remembers what it was asked."""

    layout = RowLayout((Field("weight", "float32", HEAD_DIM),))

    def __init__(self, weights: np.ndarray, head_sizes: np.ndarray) -> None:
        self.rows = np.ascontiguousarray(weights, dtype=np.float32).view(np.uint8)
        self.head_sizes = head_sizes  # [orders, heads]
        self.asked: list[np.ndarray] = []
        self.waited: list[float | None] = []

    def prefetch(self, row_ids: np.ndarray) -> Handle:
        self.asked.append(row_ids)
        rows = np.where(row_ids[..., None] < 0, 0, self.rows[row_ids])
        return Handle(self, rows.astype(np.uint8))

    def prefetch_ngrams(self, keys: np.ndarray) -> Handle:
        starts = np.concatenate([[0], np.cumsum(self.head_sizes)[:-1]]).reshape(self.head_sizes.shape)
        row_ids = np.where(keys[..., None] < 0, -1, keys[..., None] % self.head_sizes + starts)
        handle = self.prefetch(row_ids.reshape(*keys.shape[:-1], -1))
        self.asked[-1] = keys
        return handle

    def dequantize(self, rows: Any) -> Tensor:
        return dequantize(self.layout, rows)


class Handle:
    def __init__(self, table: RecordedTable, rows: np.ndarray) -> None:
        self.table, self.rows = table, rows

    def wait(self, timeout: float | None = None) -> np.ndarray:
        self.table.waited.append(timeout)
        return self.rows


@pytest.fixture
def engram(mapping: NgramHashMapping) -> Engram:
    torch.manual_seed(6)
    sizes = [int(size) for size in mapping.head_sizes[LAYER].flat]
    module = Engram(
        hidden_size=D, hc_mult=STREAMS, embedding_dim=4 * HEAD_DIM, max_ngram_size=3, head_sizes=sizes
    )
    torch.nn.init.normal_(module.short_conv.conv.weight)
    return module


@pytest.fixture
def table(mapping: NgramHashMapping, engram: Engram) -> RecordedTable:
    weights = engram.multi_head_embedding.embedding.weight.detach().numpy()
    return RecordedTable(weights, mapping.head_sizes[LAYER])


@pytest.mark.parametrize("by", ["ngrams", "rows"])
def test_a_served_table_gives_what_the_resident_one_gives(mapping, engram, table, by: Any) -> None:
    ids = np.random.default_rng(7).integers(0, 60, (2, 9))
    hidden = torch.randn(2, 9, STREAMS, D)
    resident = EngramLayer(engram, ResidentLookup(mapping, engram.multi_head_embedding, LAYER))
    expected = resident(hidden, resident.start(ids))
    served = EngramLayer(engram, EngramLookup(mapping, table, LAYER, by=by))
    pending = served.start(ids)
    assert len(table.asked) == 1
    assert table.waited == []  # started, and nobody has waited yet
    torch.testing.assert_close(served(hidden, pending, timeout=2.5), expected)
    assert table.waited == [2.5]
    torch.testing.assert_close(served(hidden, served.start(torch.from_numpy(ids))), expected)


def test_one_token_at_a_time_gives_the_whole(mapping, engram, table) -> None:
    layer = EngramLayer(engram, EngramLookup(mapping, table, LAYER))
    ids = np.random.default_rng(8).integers(0, 60, (2, 15))
    hidden = torch.randn(2, 15, STREAMS, D)
    lookback, state, steps = mapping.lookback(2), engram.new_state(2), []
    for t in range(15):
        token = ids[:, t : t + 1]
        pending = layer.start(token, lookback=lookback)
        lookback.advance(token)
        steps.append(layer(hidden[:, t : t + 1], pending, state=state))
    torch.testing.assert_close(torch.cat(steps, 1), layer(hidden, layer.start(ids)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by", ["ngrams", "rows"])
def test_dead_positions_ask_for_no_rows_and_pass_unchanged(mapping, table, by: Any) -> None:
    torch.manual_seed(9)
    module = DeepseekV41Engram(hidden_size=D, hc_mult=STREAMS, embedding_dim=4 * HEAD_DIM)
    layer = EngramLayer(module, EngramLookup(mapping, table, LAYER, by=by))
    ids = np.random.default_rng(9).integers(0, 60, (2, 8))
    dead = np.zeros((2, 8), dtype=bool)
    dead[0, 2:5] = True
    hidden = torch.randn(2, 8, STREAMS, D)
    output = layer(hidden, layer.start(ids, dead))
    assert (table.asked[0][dead] == -1).all() and (table.asked[0][~dead] >= 0).all()
    marked = torch.from_numpy(dead)
    assert torch.equal(output[marked], hidden[marked])
    assert not torch.isclose(output[~marked], hidden[~marked]).all(dim=-1).any()


def test_gradients_reach_a_resident_table(mapping, engram) -> None:
    layer = EngramLayer(engram, ResidentLookup(mapping, engram.multi_head_embedding, LAYER))
    ids = np.array([[4, 5, 6]])
    layer(torch.randn(1, 3, STREAMS, D), layer.start(ids)).sum().backward()
    touched = engram.multi_head_embedding.embedding.weight.grad.abs().sum(dim=1).nonzero().flatten()
    assert set(touched.tolist()) == set(mapping.row_ids(ids, LAYER).flatten().tolist())


def test_modules_without_dead_positions_say_so(mapping, engram, table) -> None:
    layer = EngramLayer(engram, EngramLookup(mapping, table, LAYER))
    pending = layer.start(np.array([[1, 2]]), np.array([[False, True]]))
    with pytest.raises(TypeError, match="dead"):
        layer(torch.randn(1, 2, STREAMS, D), pending)
