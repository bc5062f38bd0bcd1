"""Rows out of the log: from the queue while they wait there, else from segments, each with its checksum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engram_client.deadline import Deadline
from tierstore.kernels.log_entries import take_entries
from tierstore.kernels.runs import sort_pages
from tierstore.kernels.update_log import copy_waiting
from tierstore.updates.blocks import stride_of
from tierstore.updates.log import Queued, UpdateLog
from tierstore.updates.reading import LandedEntries, PieceReader
from tierstore.updates.segments import Segment


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
        order = np.empty_like(stored)
        sort_pages(positions[stored], order)
        stored = stored[order]
        bases = np.array([s.base for s in view.segments])
        bounds = np.searchsorted(positions[stored], [*bases[1:].tolist(), view.written])
        start = 0
        for segment, stop in zip(view.segments, bounds.tolist(), strict=True):
            if stop > start:
                self._read_stored(view, segment, ids, positions, stored[start:stop], out, deadline)
            start = stop

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
        """Rows `targets` of `out`, whose positions ascend, all of one segment."""
        ids, positions = ids[targets], positions[targets]
        starts = positions + segment.offset(0)

        def take(landed: LandedEntries) -> None:
            part, runs = slice(landed.start, landed.stop), landed.runs
            bad = take_entries(
                runs.buffer, starts[part], landed.run_of[part], landed.first_run, runs.first_pages,
                runs.slots, self._stride, self._row_bytes, ids[part], positions[part], view.starts,
                view.salts, *self._words, targets[part], int(out.ctypes.data),
            )  # fmt: skip
            if bad >= 0:
                bad += landed.start
                raise self._log.segments.damaged(segment, int(positions[bad]), f"row {int(ids[bad])}")

        self._reader.read_entries(segment.direct, segment.path, starts, self._stride, take, deadline)
