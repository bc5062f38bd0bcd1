"""The NVMe tier: rows read from a packed table, every page checked before a byte of it is used."""

from __future__ import annotations

import errno
import os

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import DataCorrupt, StorageError
from tierstore.devices.base import PageReader, PageReadFailed
from tierstore.devices.files import OpenFile
from tierstore.format.rowfile import RowFile
from tierstore.kernels.rows import scatter_pieces, scatter_rows
from tierstore.kernels.verify_slots import first_bad_slot
from tierstore.tiers.counters import Counters
from tierstore.tiers.plan import ReadPlan, Window, plan_reads
from tierstore.tiers.staging import Staging


class NvmeTier:
    """Reads rows of open row files through one page reader."""

    def __init__(
        self, reader: PageReader, counters: Counters, *, gap_pages_max: int, run_pages_max: int
    ) -> None:
        self._reader = reader
        self._counters = counters
        self._gap_pages_max = gap_pages_max
        self._run_pages_max = run_pages_max

    def read_rows(
        self,
        table: RowFile,
        file: OpenFile,
        row_ids: np.ndarray,
        targets: np.ndarray,
        out: int,
        staging: Staging,
        deadline: Deadline,
    ) -> None:
        """Row `row_ids[i]` goes to address `out` + `targets[i]`; int64 [n] both, ids in range.

        Raises StorageError or DataCorrupt naming file, page and rows, or DeadlineExceeded; then
        what lies at `out` is undefined.
        """
        plan = plan_reads(
            table.geometry,
            row_ids,
            targets,
            gap_pages_max=self._gap_pages_max,
            run_pages_max=min(self._run_pages_max, staging.capacity_pages),
        )
        for window in plan.windows(staging.capacity_pages):
            self._read_window(table, file, window, staging, deadline)
            self._check_window(table, file, window, staging, deadline)
            _copy_rows(table, plan, window, staging, out)
        self._counters.add(nvme_rows=row_ids.size, nvme_pages=plan.pages.size)

    def _read_window(
        self, table: RowFile, file: OpenFile, window: Window, staging: Staging, deadline: Deadline
    ) -> None:
        runs = (window.run_first_pages, window.run_page_counts, window.run_slots)
        try:
            self._reader.read(file.fd, *runs, staging.pages.ctypes.data, deadline)
        except PageReadFailed:
            self._counters.add(nvme_read_errors=1)
            self._read_singly(table, file, window.pages, window.page_slots, staging, deadline)
        else:
            self._counters.add(nvme_reads=window.run_slots.size, nvme_bytes=window.pages_read * 4096)

    def _read_singly(
        self,
        table: RowFile,
        file: OpenFile,
        pages: np.ndarray,
        slots: np.ndarray,
        staging: Staging,
        deadline: Deadline,
    ) -> None:
        """The wanted pages once more, each by itself: one that nobody wants must not fail the others."""
        try:
            self._reader.read(file.fd, pages, np.ones_like(pages), slots, staging.pages.ctypes.data, deadline)
        except PageReadFailed as failure:
            self._counters.add(nvme_read_errors=1)
            raise _read_error(table, failure) from failure
        self._counters.add(nvme_reads=pages.size, nvme_bytes=pages.size * 4096)

    def _check_window(
        self, table: RowFile, file: OpenFile, window: Window, staging: Staging, deadline: Deadline
    ) -> None:
        """A page that fails its checksum is read once more, then it is an error."""
        checked = (staging.pages, window.page_slots, window.pages)
        bad = first_bad_slot(*checked, 0, *table.uuid_words)
        while bad >= 0:
            self._counters.add(nvme_checksum_failures=1)
            page, slot = window.pages[bad : bad + 1], window.page_slots[bad : bad + 1]
            self._read_singly(table, file, page, slot, staging, deadline)
            again = first_bad_slot(*checked, bad, *table.uuid_words)
            if again == bad:
                raise _corrupt(table, int(window.pages[bad]))
            bad = again


def _copy_rows(table: RowFile, plan: ReadPlan, window: Window, staging: Staging, out: int) -> None:
    buffer, pieces, part = staging.pages.ctypes.data, plan.pieces, window.pieces
    if pieces.lengths is None:
        offsets, row_bytes = pieces.page_offsets[part], table.geometry.row_bytes
        scatter_rows(buffer, window.piece_slots, offsets, row_bytes, pieces.targets[part], out)
    else:
        scatter_pieces(buffer, window.piece_slots, pieces.lengths[part], pieces.targets[part], out)


def _rows_text(table: RowFile, page: int) -> str:
    rows = table.geometry.rows_of_page(page)
    return f"page {page} of {table.path} (table {table.spec.name!r}, rows {rows.start} to {rows.stop - 1})"


def _read_error(table: RowFile, failure: PageReadFailed) -> StorageError:
    reason = errno.errorcode.get(failure.errno, str(failure.errno))
    return StorageError(
        f"{_rows_text(table, failure.page)} could not be read: {reason}, {os.strerror(failure.errno)}; "
        "other rows are still served; check the disk, then run `tierstore verify`"
    )


def _corrupt(table: RowFile, page: int) -> DataCorrupt:
    return DataCorrupt(
        f"{_rows_text(table, page)} failed its checksum twice: what is on disk is not what was packed; "
        "other rows are still served; run `tierstore verify`, then pack the table again"
    )
