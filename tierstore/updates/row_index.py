"""Where the newest version of each row lies in the log. Bounded by the log's own bound."""

from __future__ import annotations

import numpy as np

from tierstore.kernels import row_index as kernels

FIRST_PLACES = 1024
LOAD_MAX = 0.7


class RowIndex:
    """Of one table. Not thread safe: whoever uses it holds the log's lock."""

    def __init__(self) -> None:
        self.rows = 0
        self._make(FIRST_PLACES)

    def _make(self, places: int) -> None:
        self._keys = np.full(places, kernels.FREE, np.int64)
        self._values = np.zeros(places, np.int64)

    @property
    def bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def find(self, rows: np.ndarray) -> np.ndarray:
        """Positions int64 [n] of `rows` int64 [n]; -1 for rows that are not in the log."""
        positions = np.empty(rows.size, np.int64)
        kernels.find(self._keys, self._values, rows, positions)
        return positions

    def put(self, rows: np.ndarray, first: int, stride: int) -> None:
        """rows[i] lies at `first` + i * stride from now on."""
        if self.rows + rows.size > LOAD_MAX * self._keys.size:
            self._rebuild(0, self.rows + rows.size)
        self.rows += kernels.put(self._keys, self._values, rows, first, stride)

    def forget_before(self, position: int) -> None:
        """Drop what lies before `position`: it is in the pages now."""
        self._rebuild(position, kernels.count_from(self._keys, self._values, position))

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """All rows, ascending, and their positions: int64 [n] each."""
        rows, positions = np.empty(self.rows, np.int64), np.empty(self.rows, np.int64)
        kernels.take_all(self._keys, self._values, rows, positions)
        order = np.argsort(rows)
        return rows[order], positions[order]

    def _rebuild(self, least: int, expected: int) -> None:
        keys, values = self._keys, self._values
        places = max(FIRST_PLACES, keys.size // 8)  # it will grow again: new memory is what costs
        while expected > LOAD_MAX * places:
            places *= 2
        self._make(places)
        self.rows = kernels.move_from(keys, values, least, self._keys, self._values)
