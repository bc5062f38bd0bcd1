"""The NVMe tier: rows read from a packed table, every page checked before a byte of it is used.

A batch is one stream of reads through a ring of pages: each page is checked and its rows are copied as it
lands, and its slot takes the next read at once, so the disk's queue does not run empty before the
batch is done.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import DataCorrupt, StorageError
from tierstore.devices.base import PageReader, PageReadFailed, PageStream
from tierstore.devices.files import OpenFile
from tierstore.format.geometry import PAGE_BYTES
from tierstore.format.rowfile import RowFile
from tierstore.kernels.jobs import LANDED
from tierstore.kernels.stream import (
    DOZES_MAX,
    PAGE,
    READ_FAILED,
    RUN,
    TAKEN_ALL,
    WRONG_PAGE,
    lay_out_ring,
    take_landed,
)
from tierstore.tiers.counters import Counters
from tierstore.tiers.plan import Pieces, ReadPlan, plan_pieces, plan_reads
from tierstore.tiers.staging import Staging
from tierstore.tiers.windows import Sweep, read_windows

WHOLE_ROWS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Reading:
    """One request at work: what is read for whom, and where its pages land."""

    table: RowFile
    file: OpenFile
    plan: ReadPlan
    staging: Staging
    out: int
    hint: bool
    deadline: Deadline


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

        What is `beside` is read at the same time.

        Raises StorageError or DataCorrupt naming file, page and rows, or DeadlineExceeded; then
        what lies at `out` is undefined.
        """
        plan = plan_reads(
            table.geometry,
            row_ids,
            targets,
            gap_pages_max=self._gap_pages_max,
            run_pages_max=min(self._run_pages_max, len(staging.ring)),
        )
        reading = Reading(table, file, plan, staging, out, hint, deadline)
        rows = RowStream(self._reader, self._counters, reading) if row_ids.size else None
        try:
            for sweep in beside:
                read_windows(sweep, staging)
            if rows:
                rows.take_all()
        finally:
            if rows:
                rows.close()
        self._counters.add(nvme_rows=row_ids.size, nvme_pages=plan.pages.size)

    def warm_up(self) -> None:
        """Call the kernels with nothing."""
        none, nobody = np.zeros(0, np.int64), np.zeros((0, PAGE_BYTES // 8), np.uint64)
        deque(plan_pieces(Pieces(none, none, None, none), 0, 1).windows(1))
        lay_out_ring(none, 1, none, none)
        take_landed(
            (0, 0, 0), (none,) * 4, np.zeros(0, np.uint32), (none,) * 5, 0, nobody, 0, (np.uint64(0),) * 2,
            np.zeros(3, np.int64), 0,
        )  # fmt: skip


class RowStream:
    """One request's pages on their way; its reads begin when it is made."""

    def __init__(self, reader: PageReader, counters: Counters, reading: Reading) -> None:
        self._reader, self._counters, self._reading = reader, counters, reading
        plan, ring = reading.plan, reading.staging.ring
        slots, starts = np.empty_like(plan.run_first_pages), np.empty_like(plan.run_first_pages)
        limit = lay_out_ring(plan.run_page_counts, len(ring), slots, starts)
        self._runs = (plan.run_first_pages, plan.run_page_counts, slots, starts)
        self._fates = np.zeros(slots.size, np.uint32)
        self._at = np.zeros(3, np.int64)
        self._read_again = -1  # the number of a page
        runs = (plan.run_first_pages, plan.run_page_counts, slots)
        self._count(plan.run_page_counts)
        self._stream: PageStream = reader.stream(
            reading.file.fd, *runs, ring.ctypes.data, hint=reading.hint, reads=reading.staging.reads,
            limit=limit, fates=self._fates,
        )  # fmt: skip

    def take_all(self) -> None:
        """Return once every row is where it is wanted."""
        reading, pieces = self._reading, self._reading.plan.pieces
        lengths = WHOLE_ROWS if pieces.lengths is None else pieces.lengths
        wanted = (reading.plan.pages, reading.plan.piece_page, pieces.page_offsets, lengths, pieces.targets)
        row_bytes, uuid = reading.table.geometry.row_bytes, reading.table.uuid_words
        while True:
            doze_ns = int(self._stream.advance(reading.deadline) * 1e9) // DOZES_MAX
            state = take_landed(
                self._stream.words, self._runs, self._fates, wanted, row_bytes, reading.staging.ring,
                reading.out, uuid, self._at, doze_ns,
            )  # fmt: skip
            if state == READ_FAILED:
                self._read_run_again()
            elif state == WRONG_PAGE:
                self._read_page_again()
            elif state == TAKEN_ALL:
                break
        with suppress(PageReadFailed):  # what failed has been read again
            self._stream.wait(reading.deadline)  # a moment: a worker has yet to say that it was the last

    def close(self) -> None:
        """Begin no further read; the staging buffer waits for those under way."""
        self._stream.withdraw()

    def _read_run_again(self) -> None:
        """The wanted pages once more, each by itself: one that nobody wants must not fail the others."""
        self._counters.add(nvme_read_errors=1)
        run, pages = self._at[RUN], self._reading.plan.pages
        first, count = self._runs[0][run], self._runs[1][run]
        wanted = slice(*np.searchsorted(pages, (first, first + count)))
        self._read_singly(run, pages[wanted])
        self._fates[run] = LANDED

    def _read_page_again(self) -> None:
        """A page that fails its checksum is read once more, then it is an error."""
        number = int(self._at[PAGE])
        page = self._reading.plan.pages[number : number + 1]
        if self._read_again == number:
            raise corrupt_page(self._reading.table, int(page[0]))
        self._counters.add(nvme_checksum_failures=1)
        self._read_again = number
        self._read_singly(self._at[RUN], page)

    def _read_singly(self, run: int, pages: np.ndarray) -> None:
        """Read pages of a run into their slots."""
        reading, ones = self._reading, np.ones_like(pages)
        slots = self._runs[2][run] + pages - self._runs[0][run]
        self._count(ones)
        read = self._reader.start(
            reading.file.fd, pages, ones, slots, reading.staging.ring.ctypes.data, hint=reading.hint,
            reads=reading.staging.reads,
        )  # fmt: skip
        try:
            read.wait(reading.deadline)
        except PageReadFailed as failure:
            self._counters.add(nvme_read_errors=1)
            raise unreadable_page(reading.table, failure) from failure

    def _count(self, page_counts: np.ndarray) -> None:
        self._counters.add(nvme_reads=page_counts.size, nvme_bytes=int(page_counts.sum()) * PAGE_BYTES)


def _rows_text(table: RowFile, page: int) -> str:
    rows = table.geometry.rows_of_page(page)
    return f"page {page} of {table.path} (table {table.spec.name!r}, rows {rows.start} to {rows.stop - 1})"


def unreadable_page(table: RowFile, failure: PageReadFailed) -> StorageError:
    """The error for a page that could not be read."""
    reason = errno.errorcode.get(failure.errno, str(failure.errno))
    return StorageError(
        f"{_rows_text(table, failure.page)} could not be read: {reason}, {os.strerror(failure.errno)}; "
        "other rows are still served; check the disk, then run `tierstore verify`"
    )


def corrupt_page(table: RowFile, page: int) -> DataCorrupt:
    """The error for a page that failed its checksum twice."""
    return DataCorrupt(
        f"{_rows_text(table, page)} failed its checksum twice: what is on disk is not what was packed; "
        "other rows are still served; run `tierstore verify`, then pack the table again"
    )
