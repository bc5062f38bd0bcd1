"""Where the newest version of each row lies in the log. Bounded by the log's own bound.

A map that gets too small, or holds rows that are in the pages by now, is moved to another one in slices:
with each `put` some places, and the rest by whoever has time. So nobody who looks a row up waits for a
million others. Meanwhile the new map is asked first and the old one then; what is put goes to the new one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np

from tierstore.format.direct import aligned_bytes
from tierstore.kernels import row_index as kernels

FIRST_PLACES = 1024
LOAD_MAX = 0.7
ROOM = 1.4  # a map of 2^b places moves to one of 2^(b+1), and has moved when that is 0.7 full
SLICE_PLACES = 8 << 10  # moved at once, by whoever holds a lock others wait for: less than a millisecond

YIELD_S = 1e-4  # a lock that is taken again at once is not had by anybody else

Map = tuple[np.ndarray, np.ndarray]  # keys and values


def empty_map(places: int) -> Map:
    """On small pages: a huge one has to be found and cleared while somebody waits."""
    keys, values = (aligned_bytes(8 * places).view(np.int64) for _ in range(2))
    return keys, values


class RowIndex:
    """Of one table. Not thread safe: whoever uses it holds the log's lock."""

    def __init__(self) -> None:
        self._map = empty_map(FIRST_PLACES)
        self._count = 0  # rows in it
        self._old: Map | None = None  # what is moved from
        self._old_count = 0  # rows in it that were not looked at
        self._moved = 0  # places that were
        self._least = 0  # what lies before is not in the log any more

    @property
    def rows(self) -> int:
        """How many rows there are; while they are moved some may count that are in the pages already."""
        return self._count + self._old_count

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in (*self._map, *(self._old or ())))

    def find(self, rows: np.ndarray) -> np.ndarray:
        """Positions int64 [n] of `rows` int64 [n]; -1 for rows that are not in the log."""
        positions = np.full(rows.size, -1)
        if self._old:
            kernels.find(*self._old, self._least, rows, positions)
        kernels.find(*self._map, self._least, rows, positions)  # the later ones
        return positions

    def put(self, rows: np.ndarray, first: int, stride: int) -> None:
        """rows[i] lies at `first` + i * stride from now on."""
        while self._count + rows.size > LOAD_MAX * self._map[0].size:
            self.move_all()  # does nothing as a rule: what follows ends before the new map is full
            self._begin_moving(empty_map(self._places_for(self._count + rows.size)))
        self._count += kernels.put(*self._map, rows, first, stride)
        self.move(SLICE_PLACES + 4 * rows.size)

    def map_for(self, left: int) -> Map:
        """A map for `forget_before`, where about `left` rows stay; to be made without the lock.

        Its memory is there, not only promised: that takes its time.
        """
        made = empty_map(self._places_for(min(left, self.rows)))
        for array in made:
            array[:] = 0
        return made

    def forget_before(self, position: int, made: Map) -> None:
        """Drop what lies before `position`: it is in the pages now. `made` is of `map_for`.

        They are gone at once, their memory is once `move` has ended.
        """
        self._least = position
        self.move_all()
        self._begin_moving(made)

    def move(self, places: int) -> bool:
        """Move what lies in so many places of the old map; False where there is nothing left to move."""
        if not self._old:
            return False
        self._make_room(min(places, self._old_count))
        start = self._moved
        self._moved = min(start + places, self._old[0].size)
        were, moved = kernels.move(*self._old, start, self._moved, self._least, *self._map)
        self._old_count -= were
        self._count += moved
        if self._moved == self._old[0].size:
            self._old = None
        return True

    def move_all(self) -> None:
        while self.move(SLICE_PLACES):
            pass

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """All rows, ascending, and their positions: int64 [n] each."""
        self.move_all()
        rows, positions = np.empty(self._count, np.int64), np.empty(self._count, np.int64)
        kernels.take_all(*self._map, rows, positions)
        order = np.argsort(rows)
        return rows[order], positions[order]

    def _places_for(self, expected: int) -> int:
        """With room for these and for what comes before all have moved."""
        places = max(FIRST_PLACES, self._map[0].size // 8)  # it will grow again
        while ROOM * expected > LOAD_MAX * places:
            places *= 2
        return places

    def _make_room(self, more: int) -> None:
        """For rows that are moved here, where more came meanwhile than were counted on: seldom, at once."""
        if self._count + more > LOAD_MAX * self._map[0].size:
            larger = empty_map(self._places_for(self._count + self._old_count))
            _, self._count = kernels.move(*self._map, 0, self._map[0].size, self._least, *larger)
            self._map = larger

    def _begin_moving(self, to: Map) -> None:
        self._old, self._old_count, self._moved = self._map, self._count, 0
        self._map, self._count = to, 0


def move_in_slices(indices: Sequence[RowIndex], lock: threading.Condition) -> None:
    """End the moving of all; others are let at them in between. The lock is not held."""
    for index in indices:
        while True:
            with lock:
                if not index.move(SLICE_PLACES):
                    break
            time.sleep(YIELD_S)
