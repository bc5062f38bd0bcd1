"""What stands beside our hits without setting the bar: numpy and EngramDB, on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tierbench.alternate import Step
from tierbench.yardsticks.engramdb_fetch import BATCHES_MAX, EngramDbRows, installed_version
from tierbench.yardsticks.take import take_step

ENGRAMDB = "EngramDB Store.fetch"


class Beside:
    """Contenders by number of threads. EngramDB is left out where it is not installed."""

    def __init__(self, table: np.ndarray, batches: np.ndarray, folder: Path, engramdb_bytes: int) -> None:
        """`table` uint8 [N, row_bytes], `batches` int64 [n, rows]; EngramDB gets the table's first bytes."""
        self._table = table
        self._batches = batches
        self._part = table[: max(1, engramdb_bytes // table.shape[1])]
        self._engramdb = EngramDbRows(folder, self._part) if installed_version() else None

    def contenders(self, threads: int, rows_per_record: int) -> dict[str, list[Step]]:
        """Steps to be run at the same time, by name.

        Records are rows that lie together, which those of a hash table do not: it is the best that numpy and
        EngramDB can be offered.
        """
        found = {"numpy.take": self._takes(1, threads)}
        if rows_per_record > 1:
            found["numpy.take of whole records"] = self._takes(rows_per_record, threads)
        if self._engramdb is not None:
            found |= self._fetches(self._engramdb, rows_per_record, threads)
        return found

    def _takes(self, rows_per_record: int, threads: int) -> list[Step]:
        table, batches = as_records(self._table, self._batches, rows_per_record)
        half = len(batches) // 2
        return [take_step(table, batches, rows_per_record, half * t) for t in range(threads)]

    def _fetches(self, engramdb: EngramDbRows, rows_per_record: int, threads: int) -> dict[str, list[Step]]:
        table, batches = as_records(self._part, self._batches, rows_per_record)
        half = BATCHES_MAX // 2
        callers = [engramdb.step(table, batches, rows_per_record, 1, half * t) for t in range(threads)]
        if threads == 1:
            return {ENGRAMDB: callers}
        within = [engramdb.step(table, batches, rows_per_record, threads)]
        return {f"{ENGRAMDB}, threads={threads}": within, f"{ENGRAMDB}, {threads} callers": callers}

    def told(self) -> dict[str, Any]:
        """What the record says of EngramDB."""
        if self._engramdb is None:
            return {"version": None, "note": "not installed: pip install engramdb-python"}
        return {
            "version": installed_version(),
            "rows": len(self._part),
            "note": "the first rows of the resident table, in a file that the page cache holds; a record is "
            "one row of its size; returns new bytes, takes no buffer of the caller's",
        }

    def close(self) -> None:
        if self._engramdb is not None:
            self._engramdb.remove()


def as_records(table: np.ndarray, batches: np.ndarray, rows_per_record: int) -> tuple[np.ndarray, np.ndarray]:
    """A view of the table [records, record_bytes], and for each batch as many bytes' worth of record ids."""
    records = len(table) // rows_per_record
    view = table[: records * rows_per_record].reshape(records, -1)
    return view, np.ascontiguousarray(batches[:, : batches.shape[1] // rows_per_record] % records)
