"""What the HBM tier does not hold, on CPU tensors: on a late stream, out of memory, by several threads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from engram_client import Client, connect
from engram_client.errors import BadRequest, DeadlineExceeded, IdOutOfRange, StorageError
from engram_client.gpu import streams
from engram_client.hashing import NgramHashMapping
from engram_client.hbm import HbmTier, arena
from engram_client.hbm import memory as hbm_memory
from engram_client.hbm.arena import HbmArena, arena_bytes
from engram_client.hbm.misses import FIRST_PAIRS
from engram_client.table import Table
from tests.support.late_stream import LateSideStream
from tests.support.stores import PLAIN, PLE, V41, WORDS, PackedStore, opened, random_keys, small_config

RECORD_BYTES = 8 * 264


@pytest.fixture(scope="module")
def client(packed: PackedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = packed.copy_to(tmp_path_factory.mktemp("hbm"))
    with opened(folder, small_config(4 << 20)), connect(f"local:{folder}") as client:
        yield client


def tier_of(client: Client, name: str = V41, budget_bytes: int = 1 << 20, **choices: Any) -> HbmTier:
    return HbmTier([client.table(name)], budget_bytes=budget_bytes, device="cpu", **choices)


def out_of_memory(*arguments: Any, **named: Any) -> Any:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate much\nand more")


class TestALateStream:
    """Every wait that the rows need is there: without one of them these find old bytes."""

    @pytest.fixture(autouse=True)
    def late(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(streams, "HostSideStream", LateSideStream)
        monkeypatch.setattr(arena.HbmArena, "in_order", property(lambda self: False))

    def test_rows_of_many_pieces(self, client: Client, packed: PackedStore) -> None:
        """64 KiB a buffer are ten lines: each look-up takes several, in a ring of four."""
        tier, oracle = tier_of(client, staging_bytes=1), packed.oracles[V41]
        hot, random = tier.table(V41), np.random.default_rng(4)
        known = random_keys(oracle, 150, seed=1)
        for _ in range(4):
            keys = known[random.integers(0, 150, 90)]
            keys[random.random(keys.shape) < 0.1] = -1
            assert np.array_equal(hot.lookup_ngrams(keys).numpy(), oracle.lookup_ngrams(keys))
        tier.settle()
        stats = tier.stats()
        assert stats["hbm_hits"] > 0 and stats["hbm_records"] > 200

    def test_what_was_brought_is_let_in_behind_it(self, client: Client, packed: PackedStore) -> None:
        tier, keys = tier_of(client), random_keys(packed.oracles[V41], 8)
        hot = tier.table(V41)
        hot.lookup_ngrams(keys)
        assert int((tier._memory.arena._index.keys >= 0).sum()) == 0  # the caller has his rows by now
        tier.settle()
        assert tier.stats()["hbm_records"] == 24

    def test_prefetched_pinned_and_filled(self, client: Client, packed: PackedStore) -> None:
        tier, oracle = tier_of(client, staging_bytes=1), packed.oracles[V41]
        hot, keys = tier.table(V41), random_keys(oracle, 60, masked=0.1)
        expected = oracle.lookup_ngrams(keys)
        assert np.array_equal(hot.prefetch_ngrams(keys).wait(timeout=20).numpy(), expected)
        hot.pin(random_keys(oracle, 30, seed=5))
        fresh = random_keys(oracle, 40, seed=6)
        out = torch.empty((40, 24, 264), dtype=torch.uint8)
        misses = hot.hits_into(torch.from_numpy(fresh), out)
        assert hot.fill(misses, out) == 120
        assert np.array_equal(out.numpy(), oracle.lookup_ngrams(fresh))
        tier.resize(300_000)
        assert tier.stats()["hbm_pinned"] == 90

    def test_values(self, client: Client, packed: PackedStore) -> None:
        for name in (V41, PLE):
            hot, table = tier_of(client, name, staging_bytes=1).table(name), client.table(name)
            keys = random_keys(packed.oracles[name], 50, masked=0.1)
            expected = table.dequantize(packed.oracles[name].lookup_ngrams(keys))
            for _ in range(2):  # missed, then held
                assert torch.equal(hot.lookup_values(keys), expected)

    def test_a_table_that_fails_half_way(
        self, client: Client, packed: PackedStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was given to the stream is waited for: nobody writes to the buffer afterwards."""
        tier, look_up, calls = tier_of(client, staging_bytes=1), Table.lookup_ngrams_into, []

        def failing(*arguments: Any, **named: Any) -> None:
            calls.append(1)
            if len(calls) > 2:
                raise StorageError("the disk is gone")
            look_up(*arguments, **named)

        monkeypatch.setattr(Table, "lookup_ngrams_into", failing)
        out = torch.empty((60, 24, 264), dtype=torch.uint8)
        with pytest.raises(StorageError, match="the disk is gone"):
            tier.table(V41).lookup_ngrams_into(random_keys(packed.oracles[V41], 60, seed=8), out)
        out.fill_(3)
        tier.settle()
        assert (out == 3).all()


def test_tokens_to_rows_in_one_call(client: Client) -> None:
    """With dead positions, a lookback and ids outside the vocabulary, beside hashing on the host."""
    table = client.table(V41)
    mapping = NgramHashMapping.from_scheme(table.spec.scheme, np.array([0, 1, 1, 2]))
    hashing, hot, layer = mapping.on_device("cpu"), tier_of(client).table(V41), table.spec.scheme.layer_id
    random = np.random.default_rng(2)
    state, kept = hashing.lookback(2), mapping.lookback(2)
    for length in (7, 1, 1):
        ids, dead = random.integers(0, len(WORDS), (2, length)), random.random((2, length)) < 0.3
        keys = mapping.ngram_keys(ids, layer, dead, lookback=kept)
        keys[dead] = -1
        given = torch.from_numpy(ids).int(), torch.from_numpy(dead)
        rows = hot.lookup_tokens(hashing, *given, lookback=state)
        assert np.array_equal(rows.numpy(), table.lookup_ngrams(keys))
        values = hot.lookup_tokens(hashing, *given, lookback=state, values=True)
        assert torch.equal(values, table.dequantize(table.lookup_ngrams(keys)))
        state.advance(*given)
        kept.advance(ids, dead)
    with pytest.raises(IdOutOfRange, match=r"n-gram key -2 at position \[2, 0\]"):
        hot.lookup_tokens(hashing, torch.tensor([1, 2, 77]))
    other = NgramHashMapping.engram(
        np.array([0, 1, 1, 2]), layer_ids=[layer], vocab_size_per_ngram=[50] * 3, n_head_per_ngram=2,
        max_ngram_size=4, pad_id=0, seed=99,
    )  # fmt: skip
    with pytest.raises(BadRequest, match="not that of table 'v41'"):
        hot.lookup_tokens(other.on_device("cpu"), torch.tensor([1]))
    with pytest.raises(BadRequest, match="addressed by rows"):
        tier_of(client, PLAIN).table(PLAIN).lookup_tokens(hashing, torch.tensor([1]))


def test_more_misses_than_come_with_their_count(client: Client, packed: PackedStore) -> None:
    lines = FIRST_PAIRS // 3 + 500
    keys = random_keys(packed.oracles[V41], 40)[np.arange(lines) % 40]
    rows = tier_of(client).table(V41).lookup_ngrams(keys)
    assert np.array_equal(rows[-41:].numpy(), packed.oracles[V41].lookup_ngrams(keys[-41:]))


def test_hits_at_an_address_of_the_callers(client: Client, packed: PackedStore) -> None:
    hot, keys = tier_of(client).table(V41), torch.from_numpy(random_keys(packed.oracles[V41], 3))
    out = torch.empty((3, 24, 264), dtype=torch.uint8)
    found = torch.empty(hot.found_size(keys), dtype=torch.int64)
    assert hot.hits_into(keys, out, found).found is found and int(found[0]) == 9
    with pytest.raises(BadRequest, match=r"found must be int64 \[21\]"):
        hot.hits_into(keys, out, found[:-1])
    with pytest.raises(BadRequest, match="contiguous"):
        hot.hits_into(keys.t().contiguous().t(), out)


class TestOutOfMemory:
    def test_a_look_up_that_finds_none(
        self,
        client: Client,
        packed: PackedStore,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The arena gives way, once and aloud; rows come from the table; a resize brings it back."""
        tier, oracle = tier_of(client), packed.oracles[V41]
        hot, keys = tier.table(V41), random_keys(oracle, 20, seed=3)
        hot.lookup_ngrams(keys)
        look_up, failures = HbmArena.lookup_into, [1]

        def failing(self: HbmArena, *arguments: Any) -> None:
            if self.slots > 16 and failures:
                failures.pop()
                out_of_memory()
            look_up(self, *arguments)

        monkeypatch.setattr(HbmArena, "lookup_into", failing)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert np.array_equal(hot.lookup_ngrams(keys).numpy(), oracle.lookup_ngrams(keys))
        (line,) = caplog.messages
        assert "gave its" in line and "Tried to allocate much" in line and "and more" not in line
        stats = tier.stats()
        assert (stats["hbm_slots"], stats["hbm_given_up"]) == (16, 1)
        tier.resize(1 << 20)
        for _ in range(2):
            assert np.array_equal(hot.lookup_ngrams(keys).numpy(), oracle.lookup_ngrams(keys))
        assert tier.stats()["hbm_records"] == 60

    def test_an_admission_that_finds_none(
        self, client: Client, packed: PackedStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tier, oracle = tier_of(client), packed.oracles[V41]
        hot, keys = tier.table(V41), random_keys(oracle, 10, seed=3)
        with monkeypatch.context() as patch:
            patch.setattr(HbmArena, "admit", out_of_memory)
            assert np.array_equal(hot.lookup_ngrams(keys).numpy(), oracle.lookup_ngrams(keys))
        stats = tier.stats()
        assert (stats["hbm_not_admitted"], stats["hbm_records"], stats["hbm_given_up"]) == (30, 0, 0)

    def test_a_budget_that_is_not_free(
        self, client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(hbm_memory, "free_bytes", lambda device: 1 << 20)
        with caplog.at_level(logging.WARNING):
            tier = tier_of(client, budget_bytes=1 << 40)
        assert tier.stats()["hbm_bytes"] <= (1 << 20) * 15 // 16
        assert "has no room for an HBM budget" in caplog.text

    def test_a_device_that_frees_less_than_it_says(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made, asked = HbmArena._made, []

        def short(self: HbmArena, sets: int) -> Any:
            asked.append(sets)
            return made(self, sets) if sets < 9 else out_of_memory()

        monkeypatch.setattr(HbmArena, "_made", short)
        assert 4 <= tier_of(client).stats()["hbm_slots"] // 16 < 9
        assert len(asked) > 4

    def test_a_resize_that_finds_none(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        tier = tier_of(client)
        monkeypatch.setattr(HbmArena, "_made", out_of_memory)
        with pytest.raises(BadRequest, match=r"no memory for an HBM budget of 2097152 bytes.*nothing was"):
            tier.resize(2 << 20)
        assert tier.stats()["hbm_budget_bytes"] == 1 << 20


def test_a_captured_graph_holds_the_memory(client: Client) -> None:
    tier = tier_of(client)
    tier._memory.arena.captured = True
    with pytest.raises(BadRequest, match="graphs_are_gone=True"):
        tier.resize(2 << 20)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):  # and is not given back under them
        tier._memory.attempt(out_of_memory)
    assert tier.stats()["hbm_given_up"] == 0
    tier.resize(2 << 20, graphs_are_gone=True)
    assert not tier._memory.arena.captured


def test_late_rows_are_an_error(client: Client, packed: PackedStore) -> None:
    with pytest.raises(DeadlineExceeded):
        tier_of(client).table(V41).lookup_ngrams(random_keys(packed.oracles[V41], 500, seed=77), timeout=0)


def test_several_threads(client: Client, packed: PackedStore) -> None:
    """Look-ups, pins and resizes side by side: always the right bytes."""
    tier, oracle = tier_of(client, budget_bytes=200_000), packed.oracles[V41]
    hot, known, wrong = tier.table(V41), random_keys(oracle, 60, seed=1), []
    expected = oracle.lookup_ngrams(known)

    def look(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(12):
            picks = random.integers(0, 60, 25)
            if not np.array_equal(hot.lookup_ngrams(known[picks]).numpy(), expected[picks]):
                wrong.append(seed)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for sets in (4, 9, 2):
        tier.resize(arena_bytes(RECORD_BYTES, sets))
        hot.pin(known[sets : sets + 2])
    for thread in threads:
        thread.join()
    assert not wrong
    assert tier.stats()["hbm_pinned"] > 0
