"""Look-ups of rows in training: DRAM without a lock, the rest from the log, never older than what was updated
before.

A row that is not found may be on its way out, or its set may be changing under the reader's eyes: so what was
read from the log counts only once DRAM, asked again under its lock, knows nothing newer, and no row of its
hash was written back since the look-up began. Else it is looked up again.
"""

from __future__ import annotations

import threading

import numpy as np

from engram_client.deadline import Deadline
from engram_client.kernels.gradients import distinct_ids
from tierstore.kernels.trained_arena import ADMITTED, EVICTED, STALE
from tierstore.training.counters import TrainingCounters
from tierstore.training.table import TrainedTable
from tierstore.updates import RowStorage

READERS_MAX = 4  # that read from the log at once; they share the staging memory
SLICE_S = 3600.0


class Reading:
    """Fills buffers with weights, within `staging_bytes` of memory of its own."""

    def __init__(self, storage: RowStorage, staging_bytes: int, counters: TrainingCounters) -> None:
        self._storage, self._counters = storage, counters
        self._piece_bytes = staging_bytes // READERS_MAX
        self._readers = threading.BoundedSemaphore(READERS_MAX)

    def fill(self, table: TrainedTable, ids: np.ndarray, out: np.ndarray, deadline: Deadline) -> None:
        """The weights of row ids int64 [n], zeros for -1, to `out` uint8 [n, weight bytes]."""
        arena = table.arena
        since = arena.moment()  # before looking: what is written back from here on is seen
        left, masked = arena.read(ids, table.owner, table.part, out.ctypes.data)
        self._counters.add(read_hits=ids.size - left.size - masked, read_misses=left.size)
        while left.size:
            stale = self._fill_from_log(table, ids, left, out, since, deadline)
            if not stale.size:
                return
            self._counters.add(reads_again=stale.size)
            since = arena.moment()
            rows = np.empty((stale.size, table.part[1]), np.uint8)
            missing, _ = arena.read(ids[stale], table.owner, table.part, rows.ctypes.data)
            found = np.ones(stale.size, np.bool_)
            found[missing] = False
            out[stale[found]] = rows[found]
            left = stale[missing]

    def _fill_from_log(
        self,
        table: TrainedTable,
        ids: np.ndarray,
        left: np.ndarray,
        out: np.ndarray,
        since: int,
        deadline: Deadline,
    ) -> np.ndarray:
        """Entries `left` of the look-up; those that must be looked up again."""
        distinct, inverse = distinct_ids(ids[left])
        rows_max = max(1, self._piece_bytes // table.arena.row_bytes)
        again = np.zeros(distinct.size, np.bool_)
        at, size = table.part
        order = np.argsort(inverse, kind="stable")
        bounds = np.searchsorted(inverse[order], np.arange(0, distinct.size + rows_max, rows_max))
        for number, first in enumerate(range(0, distinct.size, rows_max)):
            part = slice(first, first + rows_max)
            rows, fates = self._read(table, distinct[part], since, deadline)
            again[part] = fates == STALE
            entries = order[bounds[number] : bounds[number + 1]]
            out[left[entries]] = rows[inverse[entries] - first, at : at + size]
        return left[again[inverse]]

    def _read(
        self, table: TrainedTable, ids: np.ndarray, since: int, deadline: Deadline
    ) -> tuple[np.ndarray, np.ndarray]:
        left_s = deadline.remaining_s()
        if not self._readers.acquire(timeout=SLICE_S if left_s is None else left_s):
            raise deadline.exceeded("waiting for room to read rows of the log")
        try:
            rows = np.empty((ids.size, table.arena.row_bytes), np.uint8)
            self._storage.read(table.number, ids, rows, deadline)
            fates, counts = table.arena.admit_read(ids, table.owner, rows, since)
        finally:
            self._readers.release()
        self._counters.add(rows_admitted=counts[ADMITTED], rows_evicted=counts[EVICTED])
        return rows, fates
