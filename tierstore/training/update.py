"""Applying one update: rows in DRAM in place, others read, updated and taken in; what gets too much is
written back.

Whoever calls has the turn. Reading and writing back may fail, on a full disk or at a deadline, in the middle
of an update. What was applied cannot be undone without its bytes, so the rest is kept: the same update, given
again, goes on where it stopped. Until then nothing else is updated or committed; a rollback gives it up.

A piece of an update goes through three states. `todo`: not applied. `waiting`: applied, in the buffer of the
piece, for want of a clean way in its set. Else: in the arena, dirty.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from engram_client.deadline import Deadline
from tierstore.kernels.trained_arena import ADMITTED, DIRTY_MAX, EVICTED
from tierstore.tiers.trained import DirtyRows, TrainedArena
from tierstore.training.counters import TrainingCounters
from tierstore.training.table import TrainedTable
from tierstore.updates import RowStorage

NO_IDS = np.zeros(0, np.int64)
PIECE_ROWS_MAX = 4096  # index lines of so many rows stay in the nearest caches between two passes


@dataclass
class Update:
    """Distinct rows and their gradients, float32 [n, dim], and how far they have been applied."""

    table: TrainedTable
    step: int
    pushes: tuple[int, ...]  # whoever comes with the same ones has the same update
    ids: np.ndarray
    gradients: np.ndarray
    scalars: np.ndarray
    done: int = 0  # rows of the pieces that are in the arena
    piece: Piece | None = None

    @property
    def begun(self) -> bool:
        """Whether any row has been changed."""
        piece = self.piece
        return self.done > 0 or (piece is not None and not piece.todo.all())

    def forget_sets(self) -> None:
        """The arena has others now, and nothing in them is dirty."""
        if self.piece is not None:
            self.piece.sets = []

    def is_repeated_by(self, other: Update) -> bool:
        return (self.table, self.step, self.pushes) == (other.table, other.step, other.pushes)


@dataclass
class Piece:
    """A part of an update that is worked on at once."""

    ids: np.ndarray
    gradients: np.ndarray
    todo: np.ndarray  # bool [n]
    sets: list[np.ndarray] = field(default_factory=list)  # int64, of rows that became dirty
    held_ids: np.ndarray = field(default_factory=lambda: NO_IDS)  # of rows in the buffer
    held_rows: np.ndarray | None = None  # uint8 [held, row_bytes]
    waiting: np.ndarray | None = None  # bool [held]

    @property
    def waits(self) -> bool:
        return self.waiting is not None and bool(self.waiting.any())


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
        """Rows of a piece: staging holds those that are read, and those that are written back."""
        return min(PIECE_ROWS_MAX, max(1, self._staging_bytes // 2 // arena.row_bytes))

    def apply(self, update: Update, deadline: Deadline) -> None:
        """Raises StorageError, DataCorrupt, DeadlineExceeded; then calling again goes on."""
        most = self.rows_max(update.table.arena)
        while update.done < update.ids.size or update.piece:
            if update.piece is None:
                part = slice(update.done, update.done + most)
                ids = update.ids[part]
                update.piece = Piece(ids, update.gradients[part], np.ones(ids.size, np.bool_))
            self._apply_piece(update, update.piece, deadline)
            update.done += update.piece.ids.size
            update.piece = None

    def _apply_piece(self, update: Update, piece: Piece, deadline: Deadline) -> None:
        arena = update.table.arena
        while piece.waits or piece.todo.any():
            if piece.waits:
                self.write_back(arena, arena.sets_of(piece.held_ids, update.table.owner), deadline)
                self._place(update.table, piece)
            else:
                self._apply_rows(update, piece, deadline)
        touched = np.unique(np.concatenate(piece.sets)) if piece.sets else NO_IDS
        self.write_back(arena, touched, deadline)

    def _apply_rows(self, update: Update, piece: Piece, deadline: Deadline) -> None:
        table, arena = update.table, update.table.arena
        everything = bool(piece.todo.all())
        todo = np.flatnonzero(piece.todo)
        ids = piece.ids if everything else piece.ids[todo]
        gradients = piece.gradients if everything else piece.gradients[todo]
        absent = arena.absent(ids, table.owner)
        held = np.empty((absent.size, arena.row_bytes), np.uint8)
        if absent.size:
            self._storage.read(table.number, ids[absent], held, deadline)
        optimize = table.recipe.kind.kernel

        def in_place(rows: np.ndarray, guards: np.ndarray) -> None:
            optimize(rows, guards, gradients, table.places, update.scalars)

        present, sets = arena.update(ids, table.owner, in_place)
        applied = ~present[absent]  # a reader may have brought some meanwhile: those were updated in place
        if absent.size:
            rows = np.where(applied, held.ctypes.data + np.arange(absent.size) * arena.row_bytes, 0)
            staged = gradients[absent]
            optimize(rows, np.zeros(absent.size, np.int64), staged, table.places, update.scalars)
            present[absent] = True  # dealt with; whoever left meanwhile is read in the next round
        piece.todo[todo] = ~present
        piece.sets.append(sets)
        piece.held_ids, piece.held_rows, piece.waiting = ids[absent], held, applied
        self._place(table, piece)
        self._counters.add(update_misses=absent.size)

    def _place(self, table: TrainedTable, piece: Piece) -> None:
        if piece.held_rows is not None and piece.waiting is not None:
            counts = table.arena.admit_updated(piece.held_ids, table.owner, piece.held_rows, piece.waiting)
            self._counters.add(rows_admitted=counts[ADMITTED], rows_evicted=counts[EVICTED])

    def write_back(
        self, arena: TrainedArena, sets: np.ndarray | None, deadline: Deadline, keep: int = DIRTY_MAX
    ) -> None:
        """Leave at most `keep` dirty rows in each of these sets (sorted; None: all).

        Waits for room in the queue. Raises StorageError, DeadlineExceeded; what is then not written back is
        dirty.
        """
        start, most = 0, self.rows_max(arena)
        while (copied := arena.copy_dirty(most, sets=sets, keep=keep, start=start)).ways.size:
            self._spill(copied, deadline)
            arena.mark_clean(copied)
            start = copied.next_start

    def _spill(self, copied: DirtyRows, deadline: Deadline) -> None:
        before = time.monotonic_ns()
        owners = np.unique(copied.owners)
        for owner in owners.tolist():
            number = TrainedTable.number_of(owner)
            if owners.size == 1:
                self._storage.spill(number, copied.keys, copied.rows, deadline)
            else:
                mine = copied.owners == owner
                self._storage.spill(number, copied.keys[mine], copied.rows[mine], deadline)
        waited_us = (time.monotonic_ns() - before) // 1000
        self._counters.add(rows_written_back=copied.ways.size, waits_us=waited_us)
