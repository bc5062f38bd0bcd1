"""Packing one table: read ahead, interleave and seal, write behind, and note what is safe.

    reader thread     leaf i+2 of the rows' origin into a staging buffer
    caller's thread   leaf i from staging into pages, sealed           (kernel, without the GIL)
    writer threads    leaves i-1, i-2 past the page cache into the row file
    sync thread       after every few hundred MiB: fdatasync, then the journal names the leaves

Each stage has DEPTH buffers of one leaf (8 MiB as a rule), so memory does not depend on the table.
The file has no header until everything else is safe, and the journal decides what is: a packing
that was killed leaves no row file, and goes on after the last leaf the journal names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engram_client.errors import FormatError
from engram_client.spec import TableSpec
from tierstore.format.direct import (
    aligned_bytes,
    make_folder,
    open_direct,
    reserve,
    sync_folder,
    write_all,
    write_error,
)
from tierstore.format.geometry import PAGE_BYTES, PAYLOAD_BYTES, Geometry
from tierstore.format.header import LEAF_PAGES, Header, description_of, description_pages, sealed_pages
from tierstore.format.journal import Journal
from tierstore.format.reads import RowReader, staging_starts
from tierstore.format.source import TableRows
from tierstore.format.tree import NO_GENERATION, generation_of, leaf_count, leaf_digest
from tierstore.kernels.pack import pack_large_rows, pack_rows

DEPTH = 3  # buffers of each stage
SYNC_BYTES = 256 * 2**20  # written between two entries of the journal
MAX_ROW_BYTES = 2**20

OnRows = Callable[[int], None]


@dataclass(frozen=True)
class RowFileJob:
    """One row file to be written: whence, where to, and all of its header but the generation."""

    source: TableRows
    spec: TableSpec  # generation still unknown: 32 zeros
    header: Header
    path: Path  # the partial file
    journal_path: Path
    sync_bytes: int = SYNC_BYTES

    @classmethod
    def plan(
        cls, source: TableRows, spec: TableSpec, folder: Path, leaf_pages: int = LEAF_PAGES
    ) -> RowFileJob:
        """Lay out the row file of `source`, to be written inside `folder`. Raises FormatError."""
        if source.layout.row_bytes > MAX_ROW_BYTES:
            raise FormatError(
                f"table {spec.name!r}: rows of {source.layout.row_bytes} bytes; the limit is {MAX_ROW_BYTES}"
            )
        description = description_of(spec)
        first_page = 1 + description_pages(len(description))
        geometry = Geometry(source.layout.row_bytes, source.rows, first_page)
        whole_rows = max(1, leaf_pages // geometry.pages_per_row) * geometry.pages_per_row
        header = Header(geometry, bytes.fromhex(spec.uuid), NO_GENERATION, len(description), whole_rows)
        return cls(source, spec, header, folder / "rows.partial", folder / "journal")

    @property
    def leaf_rows(self) -> int:
        """Rows under a full leaf."""
        geometry = self.header.geometry
        if geometry.rows_per_page:
            return self.header.leaf_pages * geometry.rows_per_page
        return self.header.leaf_pages // geometry.pages_per_row

    def rows_in(self, leaves: int) -> int:
        """Rows under the first `leaves` leaves."""
        return min(self.source.rows, leaves * self.leaf_rows)

    def open_journal(self) -> Journal:
        identity = {
            "uuid": self.spec.uuid,
            "leaf_pages": self.header.leaf_pages,
            "rows": self.source.rows,
            "description": description_of(self.spec).decode(),
        }
        return Journal.open(self.journal_path, identity)


def write_rows(
    job: RowFileJob, rows: RowReader, journal: Journal, on_packed: OnRows, on_safe: OnRows
) -> None:
    """Write every data page the journal does not name yet; `rows` is closed at the end.

    `on_packed(rows)` is told from this thread how many rows are packed, `on_safe(rows)` from
    another one how many are forced to disk and named in the journal.
    """
    fd = open_direct(job.path, os.O_RDWR | os.O_CREAT)
    try:
        sync_folder(job.path.parent)  # a journal that names rows of a lost file would lose them
        _check_resumable(job, journal, fd)
        with ExitStack() as stack:
            stack.callback(rows.close)
            pipeline = _Pipeline(job, rows, journal, fd, on_safe, stack)
            pipeline.run(on_packed)
    finally:
        os.close(fd)


def finish(
    job: RowFileJob, journal: Journal, folder: Path, on_final: Callable[[Path], None] = lambda path: None
) -> Path:
    """Write description and header, then move the file to `folder`/GENERATION.rows, durably.

    `on_final` is told that name before the file has it.
    """
    description = description_of(job.spec)
    header = replace(job.header, generation=generation_of(job.header, description, journal.leaves))
    final = folder / f"{header.generation.hex()}.rows"
    if final.exists() and not job.path.exists():
        sync_folder(folder)  # a crash came between the move and its publication
        return final
    try:
        make_folder(folder)
        with job.path.open("r+b") as file:
            file.seek(PAGE_BYTES)
            file.write(sealed_pages(description, 1, header.uuid))
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            file.write(header.page())
            file.flush()
            os.fsync(file.fileno())
        on_final(final)
        job.path.rename(final)
    except OSError as error:
        raise write_error(job.path, error, len(description) + PAGE_BYTES) from error
    sync_folder(folder)
    return final


def _check_resumable(job: RowFileJob, journal: Journal, fd: int) -> None:
    geometry = job.header.geometry
    safe_pages = min(geometry.data_pages, len(journal.leaves) * job.header.leaf_pages)
    expected = (geometry.first_page + safe_pages) * PAGE_BYTES if safe_pages else 0
    size_bytes = os.fstat(fd).st_size
    if size_bytes < expected:
        raise FormatError(
            f"{job.path}: the journal names {expected} bytes as written, the file has {size_bytes}; "
            "use --restart to begin again"
        )


class _Pipeline:
    """The buffers and threads of one `write_rows`."""

    def __init__(
        self, job: RowFileJob, rows: RowReader, journal: Journal, fd: int, on_safe: OnRows, stack: ExitStack
    ) -> None:
        self.job, self.rows, self.journal, self.fd, self.on_safe = job, rows, journal, fd, on_safe
        layout, leaf_pages = job.source.layout, job.header.leaf_pages
        self.staging = [aligned_bytes(job.leaf_rows * layout.row_bytes) for _ in range(DEPTH)]
        self.pages = [aligned_bytes(leaf_pages * PAGE_BYTES) for _ in range(DEPTH)]
        self.starts = staging_starts(job.source, job.leaf_rows)
        self.sizes = np.array([field.bytes for field in layout.fields], dtype=np.int64)
        self.reader, self.writer, self.syncer = (
            self._threads(stack, count, role) for count, role in ((1, "read"), (2, "write"), (1, "sync"))
        )

    def run(self, on_packed: OnRows) -> None:
        first, leaves = len(self.journal.leaves), leaf_count(self.job.header)
        reads = {i: self.reader.submit(self._read, i) for i in range(first, min(leaves, first + DEPTH))}
        writes: dict[int, Future[None]] = {}
        unsafe: list[tuple[Future[None], bytes]] = []
        syncs: list[Future[None]] = []
        for i in range(first, leaves):
            reads.pop(i).result()
            if i - DEPTH in writes:
                writes.pop(i - DEPTH).result()
            pages, filled = self._pack(i)
            if i + DEPTH < leaves:
                reads[i + DEPTH] = self.reader.submit(self._read, i + DEPTH)
            if not unsafe:
                self._reserve(i)
            writes[i] = self.writer.submit(self._write, i, filled)
            unsafe.append((writes[i], leaf_digest(pages[:filled])))
            on_packed(self.job.rows_in(i + 1))
            if len(unsafe) * self.pages[0].size >= self.job.sync_bytes or i == leaves - 1:
                while syncs:
                    syncs.pop().result()
                syncs.append(self.syncer.submit(self._make_safe, unsafe))
                unsafe = []
        for sync in syncs:
            sync.result()

    def _read(self, leaf: int) -> None:
        # The kernel's own read-ahead is enough; POSIX_FADV_WILLNEED would crowd out the writes.
        first_row, last_row = self.job.rows_in(leaf), self.job.rows_in(leaf + 1)
        self.rows.read(first_row, last_row, self.job.leaf_rows, self.staging[leaf % DEPTH])

    def _pack(self, leaf: int) -> tuple[np.ndarray, int]:
        """Pages of one leaf, uint64 [n, 512], and how many of them are filled."""
        header, geometry = self.job.header, self.job.header.geometry
        pages = self.pages[leaf % DEPTH].view(np.uint64).reshape(-1, PAGE_BYTES // 8)
        rows = self.job.rows_in(leaf + 1) - self.job.rows_in(leaf)
        number = geometry.first_page + leaf * header.leaf_pages
        fits = geometry.row_bytes <= PAYLOAD_BYTES
        fill, per = (pack_rows, geometry.rows_per_page) if fits else (pack_large_rows, geometry.pages_per_row)
        filled = fill(
            self.staging[leaf % DEPTH], self.starts, self.sizes, rows, per, pages, number, *header.uuid_words
        )
        return pages, filled

    def _reserve(self, leaf: int) -> None:
        """Set aside the bytes that are written until the journal's next entry."""
        geometry, leaf_bytes = self.job.header.geometry, self.pages[0].size
        start = geometry.first_page * PAGE_BYTES + leaf * leaf_bytes
        count = -(-self.job.sync_bytes // leaf_bytes) * leaf_bytes
        reserve(self.fd, self.job.path, start, min(count, geometry.file_bytes - start))

    def _write(self, leaf: int, filled: int) -> None:
        number = self.job.header.geometry.first_page + leaf * self.job.header.leaf_pages
        data = self.pages[leaf % DEPTH][: filled * PAGE_BYTES]
        write_all(self.fd, self.job.path, data, number * PAGE_BYTES)

    def _make_safe(self, leaves: list[tuple[Future[None], bytes]]) -> None:
        for write, _ in leaves:
            write.result()
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise write_error(self.job.path, error, len(leaves) * self.pages[0].size) from error
        self.journal.append([digest for _, digest in leaves])
        self.on_safe(self.job.rows_in(len(self.journal.leaves)))

    @staticmethod
    def _threads(stack: ExitStack, count: int, role: str) -> ThreadPoolExecutor:
        pool = ThreadPoolExecutor(count, thread_name_prefix=f"pack-{role}")
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        return pool
