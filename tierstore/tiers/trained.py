"""Trained rows in DRAM: an arena that readers know, and which of its rows are newer than the log.

`tierstore.kernels.trained_arena` tells how a row gets dirty, clean and out. Every method takes the arena's
lock for one call of a kernel and waits for nothing else. Methods that make rows dirty or clean are for one
caller at a time; reading and `admit_read` are for anybody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engram_client.arena.layout import LINE_BYTES, WAYS, ArenaGeometry
from engram_client.arena.read import read_records
from tierstore.kernels import trained_arena as kernels
from tierstore.kernels.trained_move import list_rows
from tierstore.tiers.dram import MOVED_BYTES, Collapsing
from tierstore.tiers.region import Region
from tierstore.tiers.turn_lock import TurnLock

STAMPS_MIN, STAMPS_MAX = 1 << 10, 1 << 18
STAMP_BYTES = 8
SET_BYTES = 4 + 8  # beside the arena: dirty bits, and its number in the list of crowded ones

Apply = Callable[[np.ndarray, np.ndarray], None]  # rows and their guards, as optimizer kernels take them


@dataclass(frozen=True)
class DirtyRows:
    """Copies of dirty rows, and where they are."""

    ways: np.ndarray  # int64 [n]: set * WAYS + way
    keys: np.ndarray  # int64 [n]: row ids
    owners: np.ndarray  # int64 [n]
    rows: np.ndarray  # uint8 [n, row_bytes]
    next_set: int  # where `copy_dirty` goes on
    crowded_left: int  # of the list of crowded sets, once these are clean


@dataclass(frozen=True)
class Replaced:
    """Memory with clean rows that an arena had until the moment `since`."""

    region: Region
    since: int


class TrainedArena:
    """Rows of one size, of any table. `budget_bytes` bounds all its memory but one set."""

    def __init__(self, budget_bytes: int, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self._moment = 0
        self._writing = TurnLock()
        self._collapsing = Collapsing()
        self._lay_out(budget_bytes)

    def _lay_out(self, budget_bytes: int) -> None:
        """Memory of this size, with nothing in it."""
        row_bytes = self.row_bytes
        rows_about = budget_bytes // (row_bytes + 16)
        stamps = min(STAMPS_MAX, max(STAMPS_MIN, 1 << (rows_about // 8).bit_length()))
        kept_bytes = STAMP_BYTES * stamps + SET_BYTES * (rows_about // WAYS + 1)
        self._region = Region(ArenaGeometry.within(max(0, budget_bytes - kept_bytes), row_bytes))
        self._dirty = np.zeros(self._region.geometry.sets, np.uint32)
        self._crowded = np.zeros(1 + self._region.geometry.sets, np.int64)
        self._stamps = np.full(stamps, self._moment)  # any row may have been marked clean just now
        self._rows = 0

    @staticmethod
    def least_bytes(row_bytes: int) -> int:
        """The smallest budget."""
        return ArenaGeometry(1, row_bytes).total_bytes + STAMP_BYTES * STAMPS_MIN + 2 * SET_BYTES + 8

    @property
    def region(self) -> Region:
        return self._region

    @property
    def capacity_rows(self) -> int:
        return self._region.geometry.capacity_records

    def moment(self) -> int:
        """To be taken before looking for a row, for `admit_read`."""
        return self._moment

    def warm_up(self, owner: int) -> None:
        """Load or compile every kernel, by calling it with nothing."""
        ids, rows = np.zeros(0, np.int64), np.zeros((0, self.row_bytes), np.uint8)
        self.read(ids, owner, (0, 0), 0)
        self.update(ids, owner, lambda rows, guards: None)
        self.admit_updated(ids, owner, rows, np.zeros(0, np.bool_))
        self.admit_read(ids, owner, rows, 0)
        self.mark_clean(self.copy_crowded(0))
        self.mark_clean(self.copy_dirty(0))
        list_rows(self._region.index, 0, 0, ids)

    def dirty_rows(self) -> int:
        """How many rows the log does not have yet."""
        with self._writing:
            ways = (self._dirty & kernels.ALL_DIRTY).astype(np.uint16)
        return int(np.unpackbits(ways.view(np.uint8)).sum())

    def read(self, ids: np.ndarray, owner: int, part: tuple[int, int], out: int) -> tuple[np.ndarray, int]:
        """Copy a part of each row found to address `out`, zeros for -1: positions of the others, masked."""
        misses, counts = np.empty(ids.size, np.int64), np.zeros(2, np.int64)
        region = self._region  # kept while it is read, though it be replaced meanwhile
        missed = read_records(*region.places, ids, owner, 1, *part, out, misses, counts)
        # Once more without a byte, which is a hint: rows that are read now are wanted until they are updated.
        read_records(*region.places, ids, owner, 1, 0, 0, 0, np.empty(ids.size, np.int64), counts.copy())
        return misses[:missed], int(counts[0])

    def update(self, ids: np.ndarray, owner: int, apply: Apply) -> np.ndarray:
        """Apply to the rows that are here: bool [n], which were."""
        rows, guards = np.empty(ids.size, np.int64), np.empty(ids.size, np.int64)
        with self._writing:
            kernels.find_to_update(*self._region.places, ids, owner, self._dirty, self._crowded, rows, guards)
            apply(rows, guards)
        return rows != 0

    def admit_updated(self, ids: np.ndarray, owner: int, rows: np.ndarray, waiting: np.ndarray) -> np.ndarray:
        """Take in rows uint8 [n, row_bytes] as an update left them: those of `waiting` bool [n].

        It becomes False for those that found a place; the others' sets hold dirty rows alone.
        Counts of `trained_arena` are returned.
        """
        counts = np.zeros(kernels.COUNTS, np.int64)
        with self._writing:
            kernels.admit_updated(
                *self._region.writer_places, self.row_bytes, ids, owner, rows.ctypes.data, self._dirty,
                self._crowded, waiting, counts,
            )  # fmt: skip
        self._note(counts)
        return counts

    def admit_read(
        self, ids: np.ndarray, owner: int, rows: np.ndarray, since: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take in rows that were read from the log after `moment()` was `since`; fates uint8 [n], counts.

        Rows that are here already overwrite `rows`, as they are newer.
        """
        counts, fates = np.zeros(kernels.COUNTS, np.int64), np.empty(ids.size, np.uint8)
        with self._writing:
            kernels.admit_read(
                *self._region.writer_places, self.row_bytes, ids, owner, rows.ctypes.data, self._dirty,
                self._stamps, since, fates, counts,
            )  # fmt: skip
        self._note(counts)
        return fates, counts

    def _note(self, counts: np.ndarray) -> None:
        """An arena that is half full is worth gathering in huge pages."""
        self._rows += int(counts[kernels.ADMITTED] - counts[kernels.EVICTED])
        if 2 * self._rows > self.capacity_rows:
            self._collapsing.start(self._region)

    @property
    def crowded_sets(self) -> int:
        """In how many sets more rows are dirty than shall stay so; whose turn it is may rely on it."""
        return int(self._crowded[0])

    def copy_crowded(self, rows_max: int) -> DirtyRows:
        """Copies of up to `rows_max` dirty rows (or one set's) that shall leave crowded sets; none: that was
        all."""
        ways = np.empty(max(WAYS, rows_max), np.int64)
        with self._writing:
            left, listed = kernels.choose_crowded(self._region.index, self._dirty, self._crowded, ways)
            return self._copied(ways[:listed], 0, left)

    def copy_dirty(self, rows_max: int, start: int = 0) -> DirtyRows:
        """Copies of up to `rows_max` of all dirty rows (or one set's) of sets from `start` on; none: that was
        all."""
        ways = np.empty(max(WAYS, rows_max), np.int64)
        with self._writing:
            next_set, listed = kernels.choose_dirty(self._dirty, start, ways)
            return self._copied(ways[:listed], next_set, int(self._crowded[0]))

    def _copied(self, ways: np.ndarray, next_set: int, left: int) -> DirtyRows:
        keys, owners = np.empty(ways.size, np.int64), np.empty(ways.size, np.int64)
        rows = np.empty((ways.size, self.row_bytes), np.uint8)
        places = (self._region.slots, self._region.geometry.slot_bytes, self.row_bytes)
        kernels.copy_ways(*places, ways, keys, owners, rows.ctypes.data)
        return DirtyRows(ways, keys, owners, rows, int(next_set), int(left))

    def mark_clean(self, copied: DirtyRows) -> None:
        """The log has these rows now."""
        with self._writing:
            self._moment += 1
            kernels.mark_clean(
                copied.ways, copied.keys, copied.owners, self._dirty, self._crowded, copied.crowded_left,
                self._stamps, self._moment,
            )  # fmt: skip

    def replace(self, budget_bytes: int) -> Replaced:
        """Go on with empty memory of this size; what the old has is for `move_from`.

        No row may be dirty, and none may become so meanwhile. Look-ups go on.
        """
        self._collapsing.stop()
        with self._writing:
            assert not self._dirty.any()
            old = self._region
            self._lay_out(budget_bytes)
            return Replaced(old, self._moment)

    def move_from(self, replaced: Replaced) -> int:
        """Take in the rows that were there, as far as they fit; how many. Updates and look-ups go on.

        A row counts as one that was read from the log when the memory was replaced: what was updated since
        is newer, and stays. The old memory is given back as it empties.
        """
        old, moved = replaced.region, 0
        set_bytes = WAYS * old.geometry.slot_bytes
        step, places = max(1, MOVED_BYTES // set_bytes), (old.slots, old.geometry.slot_bytes, self.row_bytes)
        for first in range(0, old.geometry.sets, step):
            last = min(first + step, old.geometry.sets)
            ways = np.empty((last - first) * WAYS, np.int64)
            ways = ways[: list_rows(old.index, first, last, ways)]
            keys, owners = np.empty(ways.size, np.int64), np.empty(ways.size, np.int64)
            rows = np.empty((ways.size, self.row_bytes), np.uint8)
            kernels.copy_ways(*places, ways, keys, owners, rows.ctypes.data)
            for owner in np.unique(owners).tolist():
                mine = owners == owner
                _, counts = self.admit_read(keys[mine], owner, rows[mine], replaced.since)
                moved += int(counts[kernels.ADMITTED])
            empty, none = np.zeros(last - first, np.uint32), np.zeros(1, np.int64)
            kernels.forget_all(
                old.index + first * LINE_BYTES, last - first, empty, none
            )  # who still reads it
            old.free_slots_of(first, last - first)
        old.free()
        return moved

    def settle(self) -> None:
        """Wait until work in the background is done; for benchmarks."""
        self._collapsing.wait()

    def close(self) -> None:
        """Stop work in the background."""
        self._collapsing.stop()

    def forget_all(self) -> None:
        """Empty it, dirty rows included."""
        with self._writing:
            self._moment += 1
            self._stamps[:] = self._moment
            kernels.forget_all(self._region.index, self._region.geometry.sets, self._dirty, self._crowded)
