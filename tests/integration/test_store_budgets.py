"""Budgets: nothing, too little, more than the machine has, and far less than the tables."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest

from engram_client import connect, errors
from engram_client.arena.layout import ArenaGeometry
from tests.support.stores import (
    ALL_TABLES,
    LARGE,
    RECORD_TABLES,
    V41,
    V41_14,
    V41_ROWS,
    Device,
    PackedStore,
    opened,
    random_keys,
    random_rows,
    small_config,
)
from tierstore.config import Config, Dram, Limits, Nvme, memory_limit
from tierstore.store import open_store
from tierstore.tiers.shares import share_budget
from tierstore.tiers.staging import BUFFERS_MAX


def test_without_dram_everything_is_read_every_time(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    with opened(folder, small_config(0)) as made, connect(f"local:{folder}") as client:
        for name in ALL_TABLES:
            oracle, ids = packed.oracles[name], random_rows(packed.oracles[name], 40, masked=0.2)
            read = []
            for _ in range(2):
                before = made.device.pages
                assert np.array_equal(client.table(name).lookup(ids), oracle.lookup(ids))
                read.append(made.device.pages - before)
            assert read[0] == read[1] > 0
        keys = random_keys(packed.oracles[V41], 30, masked=0.2)
        assert np.array_equal(client.table(V41).lookup_ngrams(keys), packed.oracles[V41].lookup_ngrams(keys))
        assert client.table(V41).warm_ngrams(keys)
        stats = client.stats()
        assert (stats["dram_bytes"], stats["dram_hits"], stats["records_admitted"]) == (0, 0, 0)


def test_a_budget_too_small_for_one_set_says_how_much_is_needed(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    sizes = {o.row_bytes * (8 if n in RECORD_TABLES else 1) for n, o in packed.oracles.items()}
    least = sum(ArenaGeometry(1, size).total_bytes for size in sizes)
    for budget in (1, least - 1):
        what = rf"\$\.dram\.budget_bytes: expected at least {least} bytes .* got {budget}; raise"
        with pytest.raises(errors.ConfigError, match=what):
            open_store(folder, small_config(budget))
    with opened(folder, small_config(least)) as made:  # the failures let go of the directory
        assert made.store.stats()["dram_bytes"] == least


def test_the_budget_is_shared_by_size_and_never_exceeded() -> None:
    tables = {2112: 50 << 30, 264: 1 << 20, 24: 100}
    for budget in (100_000, 1 << 20, 10 << 30):
        shares = share_budget(budget, tables)
        assert sum(shares.values()) <= budget
        assert all(shares[size] >= ArenaGeometry(1, size).total_bytes for size in tables)
        assert sum(ArenaGeometry.within(share, size).total_bytes for size, share in shares.items()) <= budget
    assert shares[2112] > 0.99 * (10 << 30)


@pytest.mark.parametrize("staging_bytes", [128 << 10, 90_000])
def test_staging_too_small_for_the_largest_row(
    packed: PackedStore, tmp_path: Path, staging_bytes: int
) -> None:
    folder = packed.copy_to(tmp_path)
    nvme = Nvme(staging_bytes=staging_bytes // 2, run_pages_max=8)
    what = r"\$\.nvme\.staging_bytes: .* largest has 10000; give at least (\d+)"
    with pytest.raises(errors.ConfigError, match=what) as caught:
        open_store(folder, small_config(nvme=nvme))
    needed = int(str(caught.value).split("give at least ")[1])
    with opened(folder, small_config(nvme=Nvme(staging_bytes=needed, run_pages_max=8))) as made:
        with connect(f"local:{folder}") as client:
            for name in (LARGE, V41):
                ids = random_rows(packed.oracles[name], 61)
                assert np.array_equal(client.table(name).lookup(ids), packed.oracles[name].lookup(ids))
        assert made.store.config.nvme.staging_bytes == needed


def test_budgets_beyond_what_the_process_may_use(packed: PackedStore, tmp_path: Path) -> None:
    folder, limit = packed.copy_to(tmp_path), memory_limit()
    config = Config(dram=Dram(budget_bytes=limit.bytes), nvme=Nvme(staging_bytes=64 << 20))
    what = rf"dram\.budget_bytes.*at most {limit.bytes} bytes together.*got {limit.bytes + (64 << 20)}"
    with pytest.raises(errors.ConfigError, match=what):
        open_store(folder, config)


def test_an_embedded_store_obeys_the_environment(
    packed: PackedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed.copy_to(tmp_path)
    monkeypatch.setenv("TIERSTORE_DRAM_BUDGET_BYTES", "3MiB")
    with connect(f"local:{folder}") as client:
        assert client.stats()["dram_budget_bytes"] == 3 << 20
        assert 2 << 20 < client.stats()["dram_bytes"] <= 3 << 20
    monkeypatch.setenv("TIERSTORE_DRAM_BUDGET_BYTES", "999PiB")
    with pytest.raises(errors.ConfigError, match=r"budget_bytes"):
        connect(f"local:{folder}")
    monkeypatch.setenv("TIERSTORE_DRAM_BUDGET_BYTES", "-5")
    with pytest.raises(errors.ConfigError, match="budget_bytes"):
        connect(f"local:{folder}")


def test_an_arena_far_smaller_than_the_traffic(packed: PackedStore, tmp_path: Path) -> None:
    """Evicting all the time: rows stay right, the arena stays what it is."""
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    with opened(folder, small_config(300_000)) as made, connect(f"local:{folder}") as client:
        table = client.table(V41)
        for seed in range(30):
            keys = random_keys(oracle, 60, seed=seed % 7, masked=0.05)
            assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        stats = client.stats()
        assert stats["records_evicted"] > 10 * stats["dram_capacity_records"] / len(ALL_TABLES)
        assert stats["dram_bytes"] <= 300_000
        assert stats["dram_hits"] + stats["dram_misses"] + stats["masked"] == stats["keys"]
        assert made.store.stats()["failed_lookups"] == 0


def test_a_batch_far_larger_than_staging(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    config = small_config(1 << 20, nvme=Nvme(read_threads=4, staging_bytes=256 << 10))
    with opened(folder, config), connect(f"local:{folder}") as client:
        for name in (V41, V41_ROWS):
            oracle = packed.oracles[name]
            keys = random_keys(oracle, 300, masked=0.1)
            assert np.array_equal(client.table(name).lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        every = np.random.default_rng(0).permutation(packed.oracles[LARGE].rows.shape[0])
        assert np.array_equal(client.table(LARGE).lookup(every), packed.oracles[LARGE].rows[every])


def test_records_of_one_table_are_never_another_tables(opened_store: Device, packed: PackedStore) -> None:
    """Same keys, same record size, two tables and three orders: every record has its owner."""
    same = np.repeat(random_keys(packed.oracles[V41], 30)[:, :1], 3, axis=1)
    with connect(f"local:{opened_store.directory}") as client:
        for _ in range(2):
            for name in (V41, V41_14):
                oracle, table = packed.oracles[name], client.table(name)
                assert np.array_equal(table.lookup_ngrams(same), oracle.lookup_ngrams(same))
        assert client.stats()["dram_hits"] == same.size * 2  # the second time round


def test_staging_stays_inside_its_budget(opened_store: Device) -> None:
    pool = opened_store.store._filler._staging
    assert len(pool._free) == BUFFERS_MAX
    taken = sum(s.records.nbytes + s.ring.nbytes + sum(half.nbytes for half in s.halves) for s in pool._free)
    assert taken <= opened_store.store.config.nvme.staging_bytes


def test_a_limit_holds_for_hints_too(packed: PackedStore, tmp_path: Path) -> None:
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    config = small_config(limits=Limits(request_ids_max=299))
    with opened(folder, config), connect(f"local:{folder}") as client:
        assert client.table(V41).warm_ngrams(random_keys(oracle, 99))
        with pytest.raises(errors.BatchTooLarge, match=r"300 ids.*299 \(limits\.request_ids_max\)"):
            client.table(V41).warm_ngrams(random_keys(oracle, 100))


def test_the_budget_changes_while_serving_and_what_fits_stays(packed: PackedStore, tmp_path: Path) -> None:
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    with opened(folder, small_config(64 << 20)) as made, connect(f"local:{folder}") as client:
        keys = random_keys(oracle, 2000)
        client.table(V41).lookup_ngrams(keys)
        for budget in (512 << 20, 128 << 20):
            assert client.set_dram_budget(budget) == budget
            stats = client.stats()
            assert stats["dram_budget_bytes"] == budget
            assert stats["dram_bytes"] <= budget
            before = made.device.pages
            assert np.array_equal(client.table(V41).lookup_ngrams(keys), oracle.lookup_ngrams(keys))
            assert made.device.pages - before < 0.02 * keys.size * 8, "records were dropped that fit"


def test_look_ups_stay_right_while_the_budget_changes(packed: PackedStore, tmp_path: Path) -> None:
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    with opened(folder, small_config(8 << 20)) as made, connect(f"local:{folder}") as client:
        table, failures = client.table(V41), []
        table.lookup_ngrams(random_keys(oracle, 200))

        def change() -> None:
            try:
                for budget in (64 << 20, 4 << 20, 256 << 20, 2 << 20) * 3:
                    client.set_dram_budget(budget)
            except BaseException as error:
                failures.append(error)

        changer = threading.Thread(target=change)
        changer.start()
        for seed in itertools.count():
            keys = random_keys(oracle, 200, seed)
            assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
            if not changer.is_alive():
                break
        assert not failures
        assert made.store.stats()["records_moved"] > 0


def test_a_live_budget_that_cannot_be_is_refused_and_changes_nothing(
    packed: PackedStore, tmp_path: Path
) -> None:
    folder = packed.copy_to(tmp_path)
    with opened(folder, small_config(8 << 20)), connect(f"local:{folder}") as client:
        for budget, what in ((0, "only at a start"), (1, "at least"), (1 << 50, "memory"), (-1, "0")):
            with pytest.raises(errors.ConfigError, match=what):
                client.set_dram_budget(budget)
        assert client.stats()["dram_budget_bytes"] == 8 << 20
