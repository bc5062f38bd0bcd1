"""Applying one update: rows in DRAM in place, others read, updated and taken in.

What gets crowded with dirty rows is written back behind the update, or in front of the next one where nobody
had the time: so a trainer waits for the log only where the log cannot keep up.

Whoever calls has the turn. Reading and writing back may fail, on a full disk or at a deadline, in the middle
of an update. What was applied cannot be undone without its bytes, so the rest is kept: the same update, given
again, goes on where it stopped. Until then nothing else is updated or committed; a rollback gives it up.

An update is first applied to all rows that are in DRAM. The rest is read and applied in a buffer, part by
part; a row that finds no place in DRAM, because its set holds dirty rows alone, waits in the buffer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import TierstoreError
from tierstore.kernels.trained_arena import ADMITTED, EVICTED
from tierstore.tiers.trained import DirtyRows, TrainedArena
from tierstore.training.counters import TrainingCounters
from tierstore.training.table import TrainedTable
from tierstore.training.turn import Turn
from tierstore.updates import RowStorage

NO_IDS = np.zeros(0, np.int64)
BEHIND_S = 1.0  # that writing back behind an update may hold up the next one, where the log is full
PIECE_ROWS_MAX = 4096  # index lines of so many rows stay in the nearest caches between two passes


@dataclass
class Held:
    """Rows that were applied in a buffer, on their way into DRAM."""

    ids: np.ndarray = field(default_factory=lambda: NO_IDS)
    rows: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.uint8))  # uint8 [n, row_bytes]
    waiting: np.ndarray = field(default_factory=lambda: np.zeros(0, np.bool_))  # bool [n]

    @property
    def waits(self) -> bool:
        return bool(self.waiting.any())


@dataclass
class Update:
    """Distinct rows and their gradients, float32 [n, dim], and how far they have been applied."""

    table: TrainedTable
    step: int
    pushes: tuple[int, ...]  # whoever comes with the same ones has the same update
    ids: np.ndarray
    gradients: np.ndarray
    scalars: np.ndarray
    looked: int = 0  # so many rows were updated where they are in DRAM
    absent: np.ndarray = field(default_factory=lambda: NO_IDS)  # places of those that were not, int64
    applied: int = 0  # rows
    held: Held = field(default_factory=Held)

    @property
    def begun(self) -> bool:
        """Whether any row has been changed."""
        return self.applied > 0

    def is_repeated_by(self, other: Update) -> bool:
        return (self.table, self.step, self.pushes) == (other.table, other.step, other.pushes)


class Updater:
    """Applies updates and writes dirty rows back, within `staging_bytes` of memory."""

    def __init__(self, storage: RowStorage, staging_bytes: int, counters: TrainingCounters) -> None:
        self._storage, self._counters = storage, counters
        self._staging_bytes = staging_bytes

    def warm_up(self, table: TrainedTable) -> None:
        """Call every kernel of an update with nothing."""
        table.arena.warm_up(table.owner)
        self._storage.read(table.number, NO_IDS, np.empty((0, table.arena.row_bytes), np.uint8))

    def rows_max(self, arena: TrainedArena) -> int:
        """Rows at a time: staging holds those that are read, and those that are written back."""
        return max(1, self._staging_bytes // 2 // arena.row_bytes)

    def apply(self, update: Update, deadline: Deadline) -> None:
        """Raises StorageError, DataCorrupt, DeadlineExceeded; then calling again goes on."""
        table = update.table
        self.write_back(table.arena, deadline)
        if update.looked < update.ids.size:
            self._apply_in_place(update)
        most = self.rows_max(table.arena)
        while update.absent.size or update.held.waits:
            if update.held.waits:
                self.write_back(table.arena, deadline)
                self._place(table, update.held)
            else:
                self._apply_in_buffer(update, update.absent[:most], deadline)

    def _apply_in_place(self, update: Update) -> None:
        table, absent = update.table, [update.absent]
        optimize = table.recipe.kind.kernel
        for first in range(update.looked, update.ids.size, PIECE_ROWS_MAX):
            part = slice(first, first + PIECE_ROWS_MAX)
            gradients = update.gradients[part]

            def in_place(rows: np.ndarray, guards: np.ndarray, gradients: np.ndarray = gradients) -> None:
                optimize(rows, guards, gradients, table.places, update.scalars)

            present = table.arena.update(update.ids[part], table.owner, in_place)
            update.looked += present.size
            if not present.all():
                absent.append(first + np.flatnonzero(~present))
        update.absent = np.concatenate(absent)
        update.applied = update.ids.size - update.absent.size

    def _apply_in_buffer(self, update: Update, places: np.ndarray, deadline: Deadline) -> None:
        table, ids = update.table, update.ids[places]
        held = np.empty((ids.size, table.arena.row_bytes), np.uint8)
        self._storage.read(table.number, ids, held, deadline)
        rows, unguarded = held.ctypes.data + np.arange(ids.size) * held.shape[1], np.zeros(ids.size, np.int64)
        gradients = update.gradients[places]
        table.recipe.kind.kernel(rows, unguarded, gradients, table.places, update.scalars)
        update.held = Held(ids, held, np.ones(ids.size, np.bool_))
        update.absent, update.applied = update.absent[ids.size :], update.applied + ids.size
        self._place(table, update.held)
        self._counters.add(update_misses=ids.size)

    def _place(self, table: TrainedTable, held: Held) -> None:
        counts = table.arena.admit_updated(held.ids, table.owner, held.rows, held.waiting)
        self._counters.add(rows_admitted=counts[ADMITTED], rows_evicted=counts[EVICTED])

    def write_back(self, arena: TrainedArena, deadline: Deadline, *, behind: bool = False) -> None:
        """Make room in crowded sets; `behind`: nobody waits for it.

        Waits for room in the queue. Raises StorageError, DeadlineExceeded; what is then not written back is
        dirty.
        """
        most = self.rows_max(arena)
        while arena.crowded_sets:
            copied = arena.copy_crowded(most)
            self._spill(copied, deadline, behind=behind)
            arena.mark_clean(copied)

    def write_behind(self, turn: Turn, arenas: Iterable[TrainedArena], is_sure: Callable[[], bool]) -> None:
        """`write_back` in turn, unless somebody has it; where this fails the next update says so.

        Nothing of a store that is not `is_sure` of its rows.
        """
        with turn.taken_if_free() as taken, suppress(TierstoreError):
            for arena in arenas if taken and is_sure() else ():
                self.write_back(arena, Deadline.after(BEHIND_S), behind=True)

    def write_all_back(self, arena: TrainedArena, deadline: Deadline) -> None:
        """Leave no row dirty. As `write_back`."""
        self.write_back(arena, deadline)
        start, most = 0, self.rows_max(arena)
        while (copied := arena.copy_dirty(most, start)).ways.size:
            self._spill(copied, deadline)
            arena.mark_clean(copied)
            start = copied.next_set

    def _spill(self, copied: DirtyRows, deadline: Deadline, *, behind: bool = False) -> None:
        before = time.monotonic_ns()
        owners = np.unique(copied.owners)
        for owner in owners.tolist():
            number = TrainedTable.number_of(owner)
            if owners.size == 1:
                self._storage.spill(number, copied.keys, copied.rows, deadline)
            else:
                mine = copied.owners == owner
                self._storage.spill(number, copied.keys[mine], copied.rows[mine], deadline)
        waited_us = 0 if behind else (time.monotonic_ns() - before) // 1000
        self._counters.add(rows_written_back=copied.ways.size, waits_us=waited_us)
