"""Random traffic against the checkpoint: whatever is cached, evicted or read again, rows are the rows.

One store with a DRAM budget far below its tables serves all of it, so that records come and go all
the time, over a disk that now and then errs or lies. An answer is the checkpoint's, or it is an error;
and an error comes only where the disk has erred.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram_client import Client, connect, errors
from tests.support.oracle import Oracle
from tests.support.stores import (
    ALL_TABLES,
    SCHEME_TABLES,
    V41,
    Device,
    PackedStore,
    eventually,
    opened,
    small_config,
)
from tierstore.config import Nvme, Prefetch
from tierstore.testing.device import Faults

THREADS, ROUNDS = 8, 25
TINY = 350_000  # bytes of DRAM for 10 MB of tables
CONFIG = small_config(TINY, nvme=Nvme(read_threads=4, staging_bytes=512 << 10), prefetch=Prefetch(workers=2))


@pytest.fixture(scope="module")
def store(packed: PackedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with opened(packed.copy_to(tmp_path_factory.mktemp("oracle")), CONFIG) as made:
        yield made


@pytest.fixture(scope="module")
def client(store: Device) -> Iterator[Client]:
    with connect(f"local:{store.directory}") as client:
        yield client


ENTRIES = st.lists(st.integers(-1, 12) | st.integers(0, 2**63 - 1), max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(SCHEME_TABLES), entries=ENTRIES, start=st.integers(0, 7), data=st.data())
def test_any_keys(
    client: Client, packed: PackedStore, name: str, entries: list[int], start: int, data: st.DataObject
) -> None:
    """Few distinct keys and the whole range, with and without a range of heads."""
    oracle, table = packed.oracles[name], client.table(name)
    usable = entries[: len(entries) // oracle.orders * oracle.orders]
    keys = np.array(usable, np.int64).reshape(-1, oracle.orders)
    heads = slice(start, data.draw(st.integers(start + 1, 8)))
    assert np.array_equal(table.lookup_ngrams(keys, heads=heads), oracle.lookup_ngrams(keys, heads))
    assert np.array_equal(table.lookup_heads(oracle.row_ids(keys)), oracle.lookup_ngrams(keys))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(ALL_TABLES), entries=ENTRIES)
def test_any_rows(client: Client, packed: PackedStore, name: str, entries: list[int]) -> None:
    oracle, table = packed.oracles[name], client.table(name)
    ids = np.array([e if e < 0 else e % oracle.rows.shape[0] for e in entries], np.int64)
    assert np.array_equal(table.lookup(ids), oracle.lookup(ids))


class Traffic:
    """What one thread asks for, by one seed: a few tables, hot and cold keys, every way to ask."""

    def __init__(self, client: Client, packed: PackedStore, seed: int) -> None:
        self.tables = {name: client.table(name) for name in ALL_TABLES}
        self.oracles = packed.oracles
        self.random = np.random.default_rng(seed)
        self.errors = 0

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            name = str(self.random.choice(ALL_TABLES))
            asks = [self.by_row] + [self.by_key, self.by_heads, self.prefetched] * (name in SCHEME_TABLES)
            try:
                asks[self.random.integers(len(asks))](self.tables[name], self.oracles[name])
            except errors.StorageError:
                self.errors += 1

    def keys(self, oracle: Oracle) -> np.ndarray:
        """Zipf over a few hundred keys, so that some stay and most go; -1 among them."""
        ranks = np.minimum(self.random.zipf(1.2, (self.random.integers(1, 40), oracle.orders)), 600)
        keys = (ranks.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(1)).astype(np.int64)
        keys[self.random.random(keys.shape) < 0.05] = -1
        return keys

    def by_row(self, table: Any, oracle: Oracle) -> None:
        ids = self.random.integers(-1, oracle.rows.shape[0], self.random.integers(1, 60))
        assert np.array_equal(table.lookup(ids), oracle.lookup(ids))

    def by_key(self, table: Any, oracle: Oracle) -> None:
        keys, start = self.keys(oracle), int(self.random.integers(0, 8))
        heads = slice(start, int(self.random.integers(start + 1, 9)))
        assert np.array_equal(table.lookup_ngrams(keys, heads=heads), oracle.lookup_ngrams(keys, heads))

    def by_heads(self, table: Any, oracle: Oracle) -> None:
        ids = oracle.row_ids(self.keys(oracle))
        out = np.full((*ids.shape, oracle.row_bytes), 7, np.uint8)
        table.lookup_into(ids, out)
        assert np.array_equal(table.lookup_heads(ids), out)
        assert np.array_equal(out, oracle.lookup(ids))

    def prefetched(self, table: Any, oracle: Oracle) -> None:
        now, later = self.keys(oracle), self.keys(oracle)
        table.warm_ngrams(later)
        handle = table.prefetch_ngrams(now)
        assert np.array_equal(table.lookup_ngrams(later), oracle.lookup_ngrams(later))
        assert np.array_equal(handle.wait(60), oracle.lookup_ngrams(now))


def run_at_once(traffics: list[Traffic]) -> None:
    failures: list[BaseException] = []

    def run(traffic: Traffic) -> None:
        try:
            traffic.run(ROUNDS)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(traffic,)) for traffic in traffics]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_eight_threads_at_once(store: Device, client: Client, packed: PackedStore) -> None:
    traffics = [Traffic(client, packed, seed) for seed in range(THREADS)]
    run_at_once(traffics)
    stats = client.stats()
    assert sum(t.errors for t in traffics) == stats["failed_lookups"] == 0
    assert stats["records_evicted"] > 1000
    assert stats["dram_bytes"] <= TINY
    assert stats["dram_hits"] + stats["dram_misses"] + stats["masked"] == stats["keys"]


def test_eight_threads_over_a_bad_disk(packed: PackedStore, tmp_path: Any) -> None:
    faults = Faults(latency_s=(0.0, 0.0005), error_rate=0.001, flip_rate=0.001, short_rate=0.0005)
    folder = packed.copy_to(tmp_path)
    with opened(folder, CONFIG, faults) as made, connect(f"local:{folder}") as client:
        made.device.fail([made.store.table(V41).row_file.geometry.first_page + 3])
        traffics = [Traffic(client, packed, 100 + seed) for seed in range(THREADS)]
        run_at_once(traffics)
        stats = client.stats()
        assert stats["nvme_read_errors"] > 0
        assert stats["nvme_checksum_failures"] > 0
        assert sum(t.errors for t in traffics) <= stats["failed_lookups"]
        assert eventually(lambda: client.stats()["hints_done"] == stats["hints_accepted"])
        assert made.store._filler._staging.drain(20)
        assert not made.store._filler._in_flight._readers
