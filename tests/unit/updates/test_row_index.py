"""The index over the log against a dictionary, while it grows, forgets and moves in slices."""

from __future__ import annotations

import numpy as np
import pytest

from tierstore.updates.row_index import RowIndex


@pytest.mark.parametrize("seed", range(4))
def test_what_is_found_is_what_was_put_last_and_not_forgotten(seed: int) -> None:
    random = np.random.default_rng(seed)
    index, model = RowIndex(), dict[int, int]()
    everything = np.arange(30_000)
    position, least = 1, 0
    for _ in range(120):
        action = random.integers(8)
        if action < 5:
            rows = random.choice(30_000, int(random.integers(1, 1500)), replace=False)
            index.put(rows, position, 8)
            model.update(zip(rows.tolist(), range(position, position + 8 * rows.size, 8), strict=True))
            position += 8 * rows.size
        elif action == 5:
            least = int(random.integers(least, position + 1))
            model = {row: at for row, at in model.items() if at >= least}
            index.forget_before(least, index.map_for(len(model)))
        else:
            index.move(int(random.integers(3000)))
        expected = np.full(30_000, -1)
        expected[list(model)] = list(model.values())
        assert (index.find(everything) == expected).all()
        assert index.rows >= len(model)
    rows, positions = index.entries()
    assert rows.tolist() == sorted(model) and positions.tolist() == [model[row] for row in rows.tolist()]
    assert index.rows == len(model)


def test_memory_of_what_is_forgotten_is_given_back() -> None:
    index = RowIndex()
    for start in range(0, 200_000, 1000):
        index.put(np.arange(start, start + 1000), start * 8, 8)
    grown = index.bytes
    for _ in range(4):
        index.forget_before(1_592_000, index.map_for(1000))
        index.move_all()
    assert index.rows == 1000 and index.bytes < grown / 100


@pytest.mark.parametrize("more", [2_000, 20_000])
def test_more_rows_than_were_counted_on_find_room(more: int) -> None:
    index = RowIndex()
    index.put(np.arange(100), 0, 8)
    made = index.map_for(0)  # without the lock: all is to be forgotten
    index.put(np.arange(1000, 1000 + more), 8_000, 8)  # and meanwhile somebody commits
    index.forget_before(8_000, made)
    index.move_all()
    assert (index.find(np.arange(1000, 1000 + more)) == 8_000 + 8 * np.arange(more)).all()
    assert (index.find(np.arange(100)) == -1).all() and index.rows == more


def test_rows_that_come_while_a_large_map_is_left_find_room() -> None:
    index, rows = RowIndex(), 150_000
    index.put(np.arange(rows), 0, 8)
    index.move_all()
    index.forget_before(8 * (rows - 16_000), index.map_for(16_000))
    for start in range(rows, rows + 120_000, 400):
        index.put(np.arange(start, start + 400), 8 * start, 8)
    index.move_all()
    kept = np.arange(rows - 16_000, rows + 120_000)
    assert (index.find(kept) == 8 * kept).all() and index.rows == kept.size
