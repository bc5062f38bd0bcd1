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
