"""Rows that are written back behind an update, which rows leave DRAM, and what a failure of that costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engram_client.errors import StorageError
from tests.support.training import DIM, SMALLEST, failing, make_store, push_of, trained_spec, weights
from tierstore.kernels.trained_arena import DIRTY_MAX
from tierstore.tiers.trained import TrainedArena
from tierstore.training.store import TrainingStore

OWNER, ROW_BYTES, WAYS = 256, 24, 16
ROWS = np.arange(20_000)


def full_store(tmp_path: Path, *, behind: bool) -> TrainingStore:
    """Every set is full, and no row dirty."""
    store = make_store(tmp_path, [trained_spec(rows=ROWS.size)], SMALLEST)
    if not behind:
        store._behind.stop()
    weights(store, ROWS)
    return store


def crowding(store: TrainingStore, step: int) -> np.ndarray:
    """Update as many rows as half of DRAM has room for; which."""
    ids = np.arange(store.arenas()[0].capacity_rows // 2)
    store.update(push_of(store, step, ids, np.ones((ids.size, DIM), np.float32)))
    return ids


def test_what_an_update_crowds_is_written_back_behind_it(tmp_path: Path) -> None:
    store = full_store(tmp_path, behind=True)
    before = weights(store, ROWS)
    ids = crowding(store, 0)
    store.settle()
    (arena,) = store.arenas()
    assert arena.crowded_sets == 0
    stats = store.stats()
    assert stats["training_rows_written_back"] > 0
    assert stats["training_dirty_rows"] <= DIRTY_MAX * arena.capacity_rows // WAYS
    before[ids] -= 1
    np.testing.assert_array_equal(weights(store, ROWS), before)
    store.close()


def test_the_next_update_says_what_kept_rows_from_being_written_back(tmp_path: Path) -> None:
    store = full_store(tmp_path, behind=False)
    before = weights(store, ROWS)
    ids = crowding(store, 0)
    failing(store).fail("spill", StorageError("the disk is full"))
    gradients = np.ones((1, DIM), np.float32)
    with pytest.raises(StorageError, match="disk is full"):
        store.update(push_of(store, 1, [7], gradients))
    before[ids] -= 1
    np.testing.assert_array_equal(weights(store, ROWS), before)
    store.update(push_of(store, 1, [9], gradients))  # nothing of the other one was begun, so it may stay away
    before[9] -= 1
    np.testing.assert_array_equal(weights(store, ROWS), before)
    store.close()


def test_a_failure_behind_an_update_is_made_good_by_the_next(tmp_path: Path) -> None:
    store = full_store(tmp_path, behind=True)
    before = weights(store, ROWS)
    storage = failing(store)
    for step in range(4):
        storage.fail("spill", StorageError("the disk is full"))
        try:
            ids = crowding(store, step)
        except StorageError:  # it came first
            ids = crowding(store, step)
        store.settle()
        before[ids] -= 1
    np.testing.assert_array_equal(weights(store, ROWS), before)
    store.commit(3).wait(30)
    store.close()


def in_dram(arena: TrainedArena, ids: np.ndarray) -> np.ndarray:
    missing, _ = arena.read(ids, OWNER, (0, 0), 0)
    return np.delete(ids, missing)


def one_set() -> TrainedArena:
    """Full of rows 0 to 15, that were read."""
    arena = TrainedArena(TrainedArena.least_bytes(ROW_BYTES), ROW_BYTES)
    assert arena.capacity_rows == WAYS
    ids = np.arange(WAYS)
    arena.admit_read(ids, OWNER, np.zeros((WAYS, ROW_BYTES), np.uint8), arena.moment())
    assert in_dram(arena, ids).size == WAYS
    return arena


def newcomers(arena: TrainedArena, first: int, count: int) -> None:
    rows = np.zeros((count, ROW_BYTES), np.uint8)
    arena.admit_read(np.arange(first, first + count), OWNER, rows, arena.moment())


def test_rows_that_wait_for_their_update_outlive_those_that_had_theirs() -> None:
    arena = one_set()
    updated = np.arange(0, WAYS, 2)
    assert arena.update(updated, OWNER, lambda rows, guards: None).all()
    assert arena.crowded_sets == 1
    copied = arena.copy_crowded(WAYS)
    assert copied.ways.size == updated.size - DIRTY_MAX
    arena.mark_clean(copied)
    assert arena.crowded_sets == 0
    newcomers(arena, 100, copied.ways.size)
    assert set(range(1, WAYS, 2)) <= set(in_dram(arena, np.arange(WAYS)).tolist())
    assert set(copied.keys.tolist()).isdisjoint(in_dram(arena, updated).tolist())


def test_rows_that_nobody_updates_leave_oldest_first_and_dirty_ones_stay() -> None:
    arena = one_set()
    dirty = np.array([3, 5])
    arena.update(dirty, OWNER, lambda rows, guards: None)
    newcomers(arena, 100, 6)
    left = set(range(WAYS)) - set(in_dram(arena, np.arange(WAYS)).tolist())
    assert left == {0, 1, 2, 4, 6, 7}
    newcomers(arena, 200, 40)
    assert set(dirty.tolist()) <= set(in_dram(arena, np.arange(WAYS)).tolist())
