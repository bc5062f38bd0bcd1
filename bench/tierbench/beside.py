"""What stands beside our hits without setting the bar: numpy, LMDB and EngramDB, on the same rows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tierbench.alternate import Step
from tierbench.yardsticks.engramdb_fetch import BATCHES_MAX, EngramDbRows, installed_version
from tierbench.yardsticks.lmdb_get import LmdbRows
from tierbench.yardsticks.memmap import mapped_rows
from tierbench.yardsticks.take import take_step

ENGRAMDB = "EngramDB Store.fetch"
LMDB_PART_ROWS = 1 << 14


class Beside:
    """Contenders by number of threads. EngramDB is left out where it is not installed.

    All but `numpy.take` read files that the page cache holds, of the first rows of the table.
    """

    def __init__(
        self, table: np.ndarray, batches: np.ndarray, folder: Path, file_bytes: int, lmdb_rows: int
    ) -> None:
        """`table` uint8 [N, row_bytes], `batches` int64 [n, rows]; files get the table's first rows."""
        self._table = table
        self._batches = batches
        self._folder = folder
        self._part = table[: max(1, file_bytes // table.shape[1])]
        self._mapped = mapped_rows(folder / "mapped", self._part)
        self._engramdb = EngramDbRows(folder / "engramdb", self._part) if installed_version() else None
        self._lmdb_part = table[:lmdb_rows]
        self._lmdb: dict[int, LmdbRows] = {}  # by rows in a record

    def contenders(self, threads: int, rows_per_record: int) -> dict[str, list[Step]]:
        """Steps to be run at the same time, by name.

        Records are rows that lie together, which those of a hash table do not: it is the best that numpy and
        EngramDB can be offered.
        """
        found = {"numpy.take": self._takes(self._table, 1, threads)}
        if rows_per_record > 1:
            found["numpy.take of whole records"] = self._takes(self._table, rows_per_record, threads)
        found["numpy.take from a memmap"] = self._takes(self._mapped, rows_per_record, threads)
        found["LMDB get"] = self._gets(rows_per_record, threads)
        if self._engramdb is not None:
            found |= self._fetches(self._engramdb, rows_per_record, threads)
        return found

    def _gets(self, rows_per_record: int, threads: int) -> list[Step]:
        table, batches = as_records(self._lmdb_part, self._batches, rows_per_record)
        if rows_per_record not in self._lmdb:
            parts = (table[i : i + LMDB_PART_ROWS] for i in range(0, len(table), LMDB_PART_ROWS))
            self._lmdb[rows_per_record] = LmdbRows(self._folder / f"lmdb-{rows_per_record}", parts)
        env, half = self._lmdb[rows_per_record], BATCHES_MAX // 2
        return [env.step(table, batches, rows_per_record, half * t) for t in range(threads)]

    def _takes(self, table: np.ndarray, rows_per_record: int, threads: int) -> list[Step]:
        table, batches = as_records(table, self._batches, rows_per_record)
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
        for env in self._lmdb.values():
            env.remove()
        del self._mapped
        shutil.rmtree(self._folder, ignore_errors=True)


def as_records(table: np.ndarray, batches: np.ndarray, rows_per_record: int) -> tuple[np.ndarray, np.ndarray]:
    """A view of the table [records, record_bytes], and for each batch as many bytes' worth of record ids."""
    records = len(table) // rows_per_record
    view = table[: records * rows_per_record].reshape(records, -1)
    return view, np.ascontiguousarray(batches[:, : batches.shape[1] // rows_per_record] % records)
