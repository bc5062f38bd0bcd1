"""The short way to cached records gives what the long way gives, and steps aside for everything else."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from engram_client import connect, errors
from tests.support.stores import V41, V41_ROWS, PackedStore, opened, random_keys, small_config

BUDGET = 128 << 20


def read_only(array: np.ndarray) -> np.ndarray:
    copied = array.copy()
    copied.flags.writeable = False
    return copied


def test_hits_take_the_short_way_and_are_counted_alike(packed: PackedStore, tmp_path: Path) -> None:
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    with opened(folder, small_config(BUDGET)) as made, connect(f"local:{folder}") as client:
        table, keys = client.table(V41), random_keys(oracle, 40, masked=0.2)
        short = made.store.hit_path(V41, table.spec.generation)
        assert short is not None
        assert short(keys) is None, "nothing is cached yet"
        expected = table.lookup_ngrams(keys)
        before = client.stats()
        rows = short(keys)
        assert rows is not None
        assert np.array_equal(rows, expected)
        assert np.array_equal(rows, oracle.lookup_ngrams(keys))
        after = client.stats()
        masked = int((keys == -1).sum())
        grown = {name: after[name] - before[name] for name in ("lookups", "keys", "masked", "dram_hits")}
        assert grown == {"lookups": 1, "keys": keys.size, "masked": masked, "dram_hits": keys.size - masked}


def test_shapes(packed: PackedStore, tmp_path: Path) -> None:
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    with opened(folder, small_config(BUDGET)) as made, connect(f"local:{folder}") as client:
        table, keys = client.table(V41), random_keys(oracle, 24).reshape(2, 3, 4, -1)
        rows = table.lookup_ngrams(keys)
        short = made.store.hit_path(V41, table.spec.generation)
        assert short is not None
        for part in (keys, keys[0], keys[0, 0], keys[0, 0, 0], keys[:, ::2], read_only(keys[0, 0])):
            found = short(part)
            assert found is not None
            assert np.array_equal(found, oracle.lookup_ngrams(part))
        assert np.array_equal(table.lookup_ngrams(keys), rows)
        flat = keys.reshape(-1, keys.shape[-1])
        for other in (keys.astype(np.int32), flat.astype(np.int32), flat[:, :2], flat[:0]):
            assert short(other) is None
        for other in (keys[..., :2], keys[:0], keys[:, :0], np.array(3)):
            assert short(other) is None


def test_one_record_missing_leaves_it_to_the_long_way(packed: PackedStore, tmp_path: Path) -> None:
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    with opened(folder, small_config(BUDGET)), connect(f"local:{folder}") as client:
        table, keys = client.table(V41), random_keys(oracle, 40)
        table.lookup_ngrams(keys[:-1])
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))


def test_where_there_is_no_short_way(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path)
    with opened(folder, small_config(BUDGET)) as made, connect(f"local:{folder}") as client:
        assert made.store.hit_path(V41_ROWS, client.table(V41_ROWS).spec.generation) is None
        assert made.store.hit_path(V41, "0" * 32) is None
    with opened(folder, small_config(0)) as made, connect(f"local:{folder}") as client:
        assert made.store.hit_path(V41, client.table(V41).spec.generation) is None


def test_a_closed_client_and_a_bad_key_are_refused_as_ever(packed: PackedStore, tmp_path: Path) -> None:
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    with opened(folder, small_config(BUDGET)):
        client = connect(f"local:{folder}")
        table, keys = client.table(V41), random_keys(oracle, 4)
        table.lookup_ngrams(keys)
        bad = keys.copy()
        bad[0, 0] = -7
        with pytest.raises(errors.IdOutOfRange, match="-7"):
            table.lookup_ngrams(bad)
        client.close()  # the store stays open for others
        with pytest.raises(errors.Cancelled):
            table.lookup_ngrams(keys)


def test_into_the_callers_buffer(packed: PackedStore, tmp_path: Path) -> None:
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    with opened(folder, small_config(BUDGET)) as made, connect(f"local:{folder}") as client:
        table, keys = client.table(V41), random_keys(oracle, 10)
        expected = table.lookup_ngrams(keys)
        short = made.store.hit_path(V41, table.spec.generation)
        assert short is not None
        out = np.zeros_like(expected)
        assert short(keys, out) is out
        assert np.array_equal(out, expected)
        fixed = read_only(out)
        for other in (out[:5], out.astype(np.int8), np.zeros((20, *out.shape[1:]), np.uint8)[::2], fixed):
            assert short(keys, other) is None
            assert short(keys.reshape(5, 2, -1), other) is None
        shaped = np.zeros((5, 2, *out.shape[1:]), np.uint8)
        assert short(keys.reshape(5, 2, -1), shaped) is shaped
        assert np.array_equal(shaped.reshape(out.shape), expected)
        gaps = np.zeros((5, 4, *out.shape[1:]), np.uint8)[:, ::2]
        assert short(keys.reshape(5, 2, -1), gaps) is None
        out[:] = 0
        table.lookup_ngrams_into(keys, out)
        assert np.array_equal(out, oracle.lookup_ngrams(keys))
        with pytest.raises(errors.BadRequest):
            table.lookup_ngrams_into(keys, fixed)


def test_the_short_way_follows_the_arena_and_lets_go_of_the_old_one(
    packed: PackedStore, tmp_path: Path
) -> None:
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    with opened(folder, small_config(BUDGET)) as made, connect(f"local:{folder}") as client:
        table, keys = client.table(V41), random_keys(oracle, 30)
        short = made.store.hit_path(V41, table.spec.generation)
        assert short is not None
        expected = table.lookup_ngrams(keys)
        assert np.array_equal(short(keys), expected)
        left = weakref.ref(short._arena.settled_region())
        client.set_dram_budget(BUDGET // 2)
        gc.collect()
        assert left() is None
        assert np.array_equal(short(keys), expected)
