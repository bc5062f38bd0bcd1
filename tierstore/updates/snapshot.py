"""A kept step, read while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import Unavailable
from tierstore.updates.checks import check_rows
from tierstore.updates.log_rows import LogRows, LogView
from tierstore.updates.pages import TablePages
from tierstore.updates.reading import PieceReader
from tierstore.updates.row_index import RowIndex
from tierstore.updates.scan import Committed
from tierstore.updates.spec import TrainedSpec


class Snapshot:
    """All rows as of `step`. No fold goes past it, and its part of the log stays on disk, until it is closed.

    Thread safe, but for `close`, which must come when nobody reads any more.
    """

    def __init__(
        self,
        committed: Committed,
        state: bytes,
        tables: Sequence[TrainedSpec],
        indices: list[RowIndex],
        view: LogView,
        log_rows: list[LogRows],
        pages: list[TablePages],
        reader: PieceReader,
        check_open: Callable[[], None],
        release: Callable[[], None],
    ) -> None:
        self.step, self.state, self.tables = committed.step, state, list(tables)
        self._indices, self._view, self._log_rows, self._pages = indices, view, log_rows, pages
        self._reader, self._check_open, self._release = reader, check_open, release
        self._logged: dict[int, np.ndarray] = {}  # rows that are in the log, ascending
        self._closed = False

    def read(self, table: int, ids: np.ndarray, out: np.ndarray, deadline: Deadline | None = None) -> None:
        """Rows `ids` int64 [n] into `out` uint8 [n, row_bytes]; see `RowStorage.read`."""
        check_rows(self.tables, table, ids, out)
        if self._closed:
            raise Unavailable(f"the snapshot of step {self.step} is closed")
        self._check_open()  # the store's files are closed with it
        until = deadline or Deadline.after(None)
        positions = self._indices[table].find(ids)
        self._log_rows[table].read(self._view, ids, positions, out, until)
        missing = np.flatnonzero(positions < 0)
        self._pages[table].read(self._reader, ids[missing], missing, out, until)

    def touched(self, table: int, first: int, last: int) -> np.ndarray:
        """Those of rows [first, last) that may differ from the initial ones: int64 [n], ascending.

        Rows of the log, and all rows of pages that were ever written.
        """
        if table not in self._logged:
            self._logged[table] = self._indices[table].entries()[0]
        low, high = np.searchsorted(self._logged[table], (first, last))
        return np.union1d(self._logged[table][low:high], self._pages[table].written(first, last))

    def written_rows(self, table: int) -> int:
        """How many rows of a table lie in the log; the others are read from pages, or were never written."""
        return self._indices[table].rows

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._release()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
