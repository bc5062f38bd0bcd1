"""Rows out of the log: from the queue while they wait there, else from segments, each with its checksum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engram_client.deadline import Deadline
from tierstore.kernels.update_log import copy_rows, copy_waiting, first_bad_row
from tierstore.updates.blocks import stride_of
from tierstore.updates.log import Queued, UpdateLog
from tierstore.updates.reading import PieceReader, spans
from tierstore.updates.segments import Segment

CHUNK_BYTES = 8 << 20  # of entries that are put together at a time


@dataclass(frozen=True)
class LogView:
    """What of the log a reader needs, as of one moment. Its segments stay open until it is released."""

    segments: list[Segment]
    starts: np.ndarray  # of blocks, ascending: int64 [n]
    salts: np.ndarray  # theirs: uint64 [n]
    waiting: list[Queued]
    written: int


def view_of(log: UpdateLog, table: int, positions: np.ndarray) -> LogView:
    """A view for these positions of one table, -1 among them; `log.changed` is held. Unpin its segments."""
    found = positions[positions >= 0]
    low, high = (int(found.min()), int(found.max()) + 1) if found.size else (0, 0)
    waiting = log.waiting(table) if high > log.written else []
    return LogView(log.segments.pin(low, high), *log.blocks.salts(), waiting, log.written)


class LogRows:
    """Reads rows of one table by their positions in the log."""

    def __init__(
        self, log: UpdateLog, reader: PieceReader, row_bytes: int, words: tuple[np.uint64, np.uint64]
    ) -> None:
        self._log, self._reader, self._row_bytes, self._words = log, reader, row_bytes, words
        self._stride = stride_of(row_bytes)

    def read(
        self, view: LogView, ids: np.ndarray, positions: np.ndarray, out: np.ndarray, deadline: Deadline
    ) -> None:
        """Row ids[i] from positions[i] goes to out[i]; -1: not in the log, out[i] is left as it is.

        Raises StorageError or DataCorrupt naming segment, byte and row, or DeadlineExceeded.
        """
        if view.waiting:
            self._read_waiting(view.waiting, positions, out)
        stored = np.flatnonzero((positions >= 0) & (positions < view.written))
        if stored.size == 0:
            return
        stored = stored[np.argsort(positions[stored])]
        bases = np.array([s.base for s in view.segments])
        of = np.searchsorted(bases, positions[stored], side="right") - 1
        step = max(1, CHUNK_BYTES // self._stride)
        for number in np.unique(of):
            mine = stored[of == number]
            for start in range(0, mine.size, step):
                chunk = mine[start : start + step]
                self._read_stored(
                    view, view.segments[number], ids[chunk], positions[chunk], chunk, out, deadline
                )

    def _read_waiting(self, waiting: list[Queued], positions: np.ndarray, out: np.ndarray) -> None:
        arrays = [q.rows for q in waiting if q.rows is not None]
        starts = np.array([q.first_entry for q in waiting])
        ends = np.array([q.first_entry + q.count * self._stride for q in waiting])
        addresses = np.array([rows.ctypes.data for rows in arrays])
        copy_waiting(positions, starts, ends, addresses, self._stride, self._row_bytes, int(out.ctypes.data))

    def _read_stored(
        self,
        view: LogView,
        segment: Segment,
        ids: np.ndarray,
        positions: np.ndarray,
        targets: np.ndarray,
        out: np.ndarray,
        deadline: Deadline,
    ) -> None:
        entries = np.empty(ids.size * self._stride, np.uint8)
        where = positions + segment.offset(0)
        pieces = spans(where, self._stride, np.arange(ids.size) * self._stride)
        self._reader.read(segment.direct, segment.path, pieces, entries, deadline)
        starts, salts = view.starts, view.salts
        bad = first_bad_row(
            entries, self._row_bytes, self._stride, ids, positions, starts, salts, *self._words
        )
        if bad >= 0:
            raise self._log.segments.damaged(segment, int(positions[bad]), f"row {int(ids[bad])}")
        copy_rows(int(entries.ctypes.data), self._stride, np.arange(ids.size), targets, self._row_bytes,
                  int(out.ctypes.data))  # fmt: skip
