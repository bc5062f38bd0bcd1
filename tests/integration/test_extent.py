"""The record extent inside a store: one read for a record that was seen before."""

from __future__ import annotations

import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engram_client import connect, errors
from tests.support.extents import OTHERS, SOME, config, look_up
from tests.support.stores import (
    ALL_TABLES,
    PLE,
    V41,
    PackedStore,
    opened,
    random_keys,
    random_rows,
)
from tierstore.testing.device import Faults


def test_what_dram_drops_comes_back_in_one_read(packed: PackedStore, tmp_path: Path) -> None:
    with opened(packed.copy_to(tmp_path), config()) as made:
        for name in (V41, PLE):
            first = look_up(made, packed, name, SOME)
            assert first["extent_hits"] == 0
            assert first["extent_written"] > 0.9 * first["dram_misses"]
            look_up(made, packed, name, OTHERS)
            again = look_up(made, packed, name, SOME)
            assert again["extent_hits"] > 0.97 * again["dram_misses"]
            assert again["extent_hits"] + again["records_read"] == again["dram_misses"]
            assert again["extent_reads"] <= again["extent_hits"] + again["extent_false"]
            assert again["extent_pages"] <= 1.5 * again["extent_hits"]
            assert again["extent_damaged"] == again["extent_read_errors"] == 0
            assert again["extent_false"] <= 2


def test_what_dram_has_just_dropped_needs_no_read(packed: PackedStore, tmp_path: Path) -> None:
    with opened(packed.copy_to(tmp_path), config(64 << 20, write_buffer_bytes=64 << 20)) as made:
        few = range(3)  # more than DRAM holds, less than fills a buffer
        look_up(made, packed, V41, few, flush=False)
        again = look_up(made, packed, V41, few, flush=False)
        assert again["extent_hits"] == again["extent_unwritten"] > 0.8 * again["dram_misses"]
        assert again["extent_reads"] == again["extent_pages"] == 0


@pytest.mark.parametrize("name", ALL_TABLES)
def test_tables_that_gain_nothing_have_no_extent(packed: PackedStore, tmp_path: Path, name: str) -> None:
    folder = packed.copy_to(tmp_path)
    with opened(folder, config()) as made, connect(f"local:{folder}") as client:
        ids = random_rows(packed.oracles[name], 200)
        for _ in range(3):
            assert np.array_equal(client.table(name).lookup(ids), packed.oracles[name].lookup(ids))
        made.store._extents.flush()
        assert client.stats()["extent_misses"] == client.stats()["extent_written"] == 0
        assert sorted(p.name for p in (folder / "extent").glob("*.extent")) == ["1280.extent", "2112.extent"]


def test_without_dram_the_extent_is_the_cache(packed: PackedStore, tmp_path: Path) -> None:
    with opened(packed.copy_to(tmp_path), config(dram_bytes=0)) as made:
        look_up(made, packed, V41, SOME)
        again = look_up(made, packed, V41, SOME)
        assert again["extent_hits"] > 0.97 * again["dram_misses"]


def test_hints_bring_records_from_the_extent(packed: PackedStore, tmp_path: Path) -> None:
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    with opened(folder, config()) as made, connect(f"local:{folder}") as client:
        look_up(made, packed, V41, SOME)
        look_up(made, packed, V41, OTHERS)
        keys = random_keys(oracle, 8, seed=0)
        before = client.stats()
        assert client.table(V41).warm_ngrams(keys)
        while client.stats()["hints_done"] == before["hints_done"]:
            os.sched_yield()
        assert client.stats()["extent_hits"] > before["extent_hits"]
        assert np.array_equal(client.table(V41).lookup_ngrams(keys), oracle.lookup_ngrams(keys))


@pytest.mark.parametrize("faults", [None, Faults(error_rate=0.005, flip_rate=0.02)], ids=["sound", "faulty"])
def test_random_traffic_equals_the_oracle(packed: PackedStore, tmp_path: Path, faults: Faults | None) -> None:
    """Several threads, a DRAM of some dozen records and extents that are overwritten all the time."""
    folder = packed.copy_to(tmp_path)
    small = config(extent_bytes=1 << 20, dram_bytes=256 << 10, write_buffer_bytes=256 << 10)

    def run(caller: int) -> int:
        random, right = np.random.default_rng(caller), 0
        with connect(f"local:{folder}") as client:
            for _ in range(50):
                name = (V41, PLE)[int(random.integers(2))]
                oracle, seed = packed.oracles[name], int(random.zipf(1.3)) % 40
                keys = random_keys(oracle, int(random.integers(1, 30)), seed, masked=0.1)
                try:
                    found = client.table(name).lookup_ngrams(keys)
                except errors.StorageError:
                    if faults is None:
                        raise
                    continue
                assert np.array_equal(found, oracle.lookup_ngrams(keys))
                right += 1
        return right

    with opened(folder, small, faults) as made, ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(run, range(4))) > 120
        stats = made.store.stats()
        assert stats["extent_hits"] > 100
        assert stats["extent_unwritten"] > 0
        assert stats["extent_written"] > stats["extent_bytes"] // 4096
        if faults:
            assert stats["extent_damaged"] > 0


def test_a_restart_finds_the_extent_warm(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    with opened(folder, config()) as made:
        look_up(made, packed, V41, SOME)
        look_up(made, packed, V41, OTHERS)
    with opened(folder, config()) as made:
        again = look_up(made, packed, V41, SOME)
        assert again["extent_hits"] > 0.97 * again["dram_misses"]


def test_a_full_disk_is_said_and_serving_goes_on(
    packed: PackedStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = packed.copy_to(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, limits[1]))
    try:
        with opened(folder, config(64 << 20)) as made:
            assert caplog.text.count("cannot be had") == 1
            assert look_up(made, packed, V41, range(2))["records_read"] > 0
            assert made.store.stats()["extent_bytes"] == 0
        assert not list((folder / "extent").iterdir()), "what was begun is removed"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_extents_that_no_table_needs_are_removed(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    (folder / "extent").mkdir()
    for name in ("999.extent", "999.index", "999.index.partial", "notes.txt"):
        (folder / "extent" / name).write_text("x")
    with opened(folder, config()):
        pass
    names = {path.name for path in (folder / "extent").iterdir()}
    assert not any(name.startswith("999") for name in names)
    assert "notes.txt" in names
    assert sum(p.stat().st_size for p in (folder / "extent").iterdir()) <= 16 << 20
