"""A training store that begins with the rows of another one's step.

Pages are written once, in order, as if a fold had left them; no log is needed, however many rows there are.
Only pages with a row that differs from its initial value are written: the rest stays a hole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from tierstore.format.geometry import PAGE_BYTES
from tierstore.kernels.trained_pages import put_rows, seal_pages_of_epoch
from tierstore.updates.disk import REAL_DISK, Disk
from tierstore.updates.identity import FIRST_FOLD, create_store
from tierstore.updates.pages import TablePages
from tierstore.updates.reading import PieceReader
from tierstore.updates.spec import TrainedSpec

BATCH_BYTES = 4 << 20  # of pages that are put together
READ_DEPTH = 16  # reads at a time of what tables began with
LOOK_ROWS = 1 << 18  # among which rows that were touched are looked for


class Rows(Protocol):
    """The part of a `Snapshot` that is asked for here."""

    def touched(self, table: int, first: int, last: int) -> np.ndarray: ...

    def read(self, table: int, ids: np.ndarray, out: np.ndarray) -> None: ...


def create_filled(
    folder: Path,
    tables: Sequence[TrainedSpec],
    rows: Rows,
    on_rows: Callable[[int, int], None],
    *,
    disk: Disk = REAL_DISK,
) -> None:
    """Make a store of `tables` in `folder` that holds `rows`; it has no step yet.

    `on_rows(table, row)` is told how far it is. Raises BadRequest, OSError, and what reading raises.
    """

    def fill(pages: list[TablePages]) -> None:
        reader = PieceReader(disk.open_reader(READ_DEPTH), BATCH_BYTES)
        try:
            for number, table in enumerate(pages):
                _Filling(number, table, rows, reader).run(on_rows)
        finally:
            reader.close()

    create_store(disk, folder, tables, fill)


class _Filling:
    """One table's pages."""

    def __init__(self, number: int, pages: TablePages, rows: Rows, reader: PieceReader) -> None:
        self._number, self._pages, self._rows, self._reader = number, pages, rows, reader

    def run(self, on_rows: Callable[[int, int], None]) -> None:
        g, spec = self._pages.geometry, self._pages.spec
        unit_rows = g.rows_per_page or 1
        batch_rows = max(1, BATCH_BYTES // (g.pages_per_row * PAGE_BYTES)) * unit_rows
        look_rows = max(batch_rows, LOOK_ROWS // batch_rows * batch_rows)
        for start in range(0, spec.rows, look_rows):
            end = min(spec.rows, start + look_rows)
            touched = self._rows.touched(self._number, start, end)
            for first in range(start, end, batch_rows) if touched.size else ():
                low, high = np.searchsorted(touched, (first, first + batch_rows))
                self._write(touched[low:high])
                on_rows(self._number, min(end, first + batch_rows))
            on_rows(self._number, end)

    def _write(self, ids: np.ndarray) -> None:
        """The pages of those rows among `ids` int64 [n], ascending, that are not as they were initially."""
        g = self._pages.geometry
        rows = np.zeros((ids.size, g.row_bytes), np.uint8)
        self._rows.read(self._number, ids, rows)
        differs = (rows != self._pages.begun_with(self._reader, ids)).any(axis=1)
        ids, rows = ids[differs], rows[differs]
        if ids.size == 0:
            return
        units = np.unique(self._pages.units(ids))
        images = np.zeros((units.size * g.pages_per_row, PAGE_BYTES // 8), np.uint64)
        place = (units, g.rows_per_page, g.pages_per_row, g.room_bytes, images)
        others, fresh = self._pages.initial_rows(self._reader, units, ids)
        put_rows(fresh, others, *place)
        put_rows(rows, ids, *place)
        numbers = self._pages.pages_of(units)
        seal_pages_of_epoch(images, numbers, FIRST_FOLD, *self._pages.words)
        self._pages.rewrite(numbers, images, FIRST_FOLD)
