"""The NVMe tier: rows read from a packed table, every page checked before a byte of it is used."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import DataCorrupt, StorageError
from tierstore.devices.base import PageRead, PageReader, PageReadFailed
from tierstore.devices.files import OpenFile
from tierstore.format.geometry import PAGE_BYTES
from tierstore.format.rowfile import RowFile
from tierstore.kernels.rows import scatter_pieces, scatter_rows
from tierstore.kernels.verify_slots import first_bad_slot
from tierstore.tiers.counters import Counters
from tierstore.tiers.plan import ReadPlan, Window, plan_reads
from tierstore.tiers.staging import Staging
from tierstore.tiers.windows import Landing, Sweep, read_windows


@dataclass(frozen=True)
class Reading:
    """One request at work: what is read for whom, and where its pages land. See `Sweep`."""

    tier: NvmeTier
    table: RowFile
    file: OpenFile
    plan: ReadPlan
    staging: Staging
    out: int
    hint: bool
    deadline: Deadline

    def start(self, window: Window, pages: np.ndarray) -> Landing:
        return self.tier.start(self, window, pages)

    def finish(self, landing: Landing) -> None:
        self.tier.finish(self, landing)


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
        *,
        hint: bool,
        beside: Sequence[Sweep] = (),
    ) -> None:
        """Row `row_ids[i]` goes to address `out` + `targets[i]`; int64 [n] both, ids in range.

        What is `beside` is read in the same go.

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
        reading = Reading(self, table, file, plan, staging, out, hint, deadline)
        read_windows((*beside, reading), staging)
        self._counters.add(nvme_rows=row_ids.size, nvme_pages=plan.pages.size)

    def start(self, reading: Reading, window: Window, pages: np.ndarray) -> Landing:
        runs = (window.run_first_pages, window.run_page_counts, window.run_slots)
        return Landing(window, pages, self._read(reading, *runs, pages, after=reading.staging.last_read))

    def _read(
        self,
        reading: Reading,
        firsts: np.ndarray,
        counts: np.ndarray,
        slots: np.ndarray,
        pages: np.ndarray,
        after: PageRead | None = None,
    ) -> PageRead:
        """Start a read; the staging buffer must know of it as long as it is under way."""
        self._counters.add(nvme_reads=firsts.size, nvme_bytes=int(counts.sum()) * PAGE_BYTES)
        read = self._reader.start(
            reading.file.fd, firsts, counts, slots, pages.ctypes.data, hint=reading.hint, after=after
        )
        reading.staging.reads.append(read)
        return read

    def finish(self, reading: Reading, landing: Landing) -> None:
        """Wait for a window, check its pages, copy its rows."""
        window = landing.window
        try:
            landing.read.wait(reading.deadline)
        except PageReadFailed:
            self._counters.add(nvme_read_errors=1)
            self._read_singly(reading, window.pages, window.page_slots, landing.pages)
        self._check(reading, landing)
        _copy_rows(reading, landing)

    def _read_singly(self, reading: Reading, pages: np.ndarray, slots: np.ndarray, into: np.ndarray) -> None:
        """The wanted pages once more, each by itself: one that nobody wants must not fail the others."""
        try:
            self._read(reading, pages, np.ones_like(pages), slots, into).wait(reading.deadline)
        except PageReadFailed as failure:
            self._counters.add(nvme_read_errors=1)
            raise _read_error(reading.table, failure) from failure

    def _check(self, reading: Reading, landing: Landing) -> None:
        """A page that fails its checksum is read once more, then it is an error."""
        window, table = landing.window, reading.table
        checked = (landing.pages, window.page_slots, window.pages)
        bad = first_bad_slot(*checked, 0, *table.uuid_words)
        while bad >= 0:
            self._counters.add(nvme_checksum_failures=1)
            page, slot = window.pages[bad : bad + 1], window.page_slots[bad : bad + 1]
            self._read_singly(reading, page, slot, landing.pages)
            again = first_bad_slot(*checked, bad, *table.uuid_words)
            if again == bad:
                raise _corrupt(table, int(window.pages[bad]))
            bad = again


def _copy_rows(reading: Reading, landing: Landing) -> None:
    buffer, pieces, window = landing.pages.ctypes.data, reading.plan.pieces, landing.window
    part = window.pieces
    if pieces.lengths is None:
        offsets, row_bytes = pieces.page_offsets[part], reading.table.geometry.row_bytes
        scatter_rows(buffer, window.piece_slots, offsets, row_bytes, pieces.targets[part], reading.out)
    else:
        scatter_pieces(buffer, window.piece_slots, pieces.lengths[part], pieces.targets[part], reading.out)


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
