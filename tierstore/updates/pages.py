"""The pages of a trained table: DIR/training/pages/NAME.rows, a row file whose pages hold epochs.

Every page has an *expected* epoch: the number of the last completed fold that wrote it, 0 before the first.
Expected epochs are kept in memory, 4 bytes a page, and in a side file (epochs.py). A page that was never
written is not read: its rows are the initial ones, and the file has a hole there.

A fold rewrites pages in place, a batch at a time, and nobody waits for it: while a batch is being written its
pages are read from memory. Whoever began to read one before that may find it torn, which its checksum tells,
and reads it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import DataCorrupt, FormatError
from engram_client.spec import TableSpec
from tierstore.format.direct import aligned_bytes
from tierstore.format.geometry import PAGE_BYTES, Geometry
from tierstore.format.header import (
    Header,
    decode_header,
    description_of,
    description_pages,
    sealed_pages,
    uuid_words,
)
from tierstore.kernels.trained_pages import first_wrong_page
from tierstore.kernels.update_log import copy_pieces
from tierstore.tiers.plan import Pieces, Window, row_pieces
from tierstore.updates.disk import Disk
from tierstore.updates.initial import InitialRows
from tierstore.updates.reading import PieceReader, Runs
from tierstore.updates.spec import TrainedSpec

NO_GENERATION = bytes(16)
NO_IDS, NO_PAGES = np.zeros(0, np.int64), np.zeros((0, PAGE_BYTES // 8), np.uint64)
RUN_PAGES_MAX = 16  # of one read: others find their way between


class PageWrong(Exception):
    """A page is damaged or stale, or is just being rewritten. Internal."""

    def __init__(self, page: int) -> None:
        super().__init__(page)
        self.page = page


@dataclass(frozen=True, eq=False)
class Batch:
    """Pages that are being written in place, and what they will be."""

    pages: np.ndarray  # int64 [n], ascending
    images: np.ndarray  # uint64 [n, 512]

    def holds(self, pages: np.ndarray) -> np.ndarray:
        """Which of `pages` int64 [m] are among them, bool [m]."""
        if self.pages.size == 0:
            return np.zeros(pages.size, np.bool_)
        at = np.minimum(np.searchsorted(self.pages, pages), self.pages.size - 1)
        found: np.ndarray = self.pages[at] == pages
        return found

    def copy(self, pieces: Pieces, out: np.ndarray) -> None:
        """Pieces of pages that are among them to their bytes of `out`, uint8."""
        assert pieces.lengths is not None
        slots = np.searchsorted(self.pages, pieces.pages)
        copy_pieces(
            int(self.images.ctypes.data), slots, pieces.page_offsets, pieces.lengths, pieces.targets,
            int(out.ctypes.data),
        )  # fmt: skip


def geometry_of(spec: TrainedSpec) -> tuple[Geometry, bytes]:
    """Where rows lie, and the description in front of them."""
    table = TableSpec(
        spec.name, NO_GENERATION.hex(), spec.uuid, spec.rows, spec.layout, "row", spec.scheme, spec.layer,
        spec.model,
    )  # fmt: skip
    description = description_of(table)
    first_page = 1 + description_pages(len(description))
    return Geometry(spec.row_bytes, spec.rows, first_page, epochs=True), description


class TablePages:
    """The page file of one table, open. Thread safe for readers beside one fold."""

    def __init__(self, disk: Disk, folder: Path, spec: TrainedSpec) -> None:
        self.path = folder / "pages" / f"{spec.name}.rows"
        self.spec, self._disk = spec, disk
        self.geometry, self._description = geometry_of(spec)
        self.words = uuid_words(bytes.fromhex(spec.uuid))
        self.epochs = np.zeros(self.geometry.data_pages, np.uint32)  # expected
        self._initial = InitialRows(spec)
        self._in_writing = Batch(NO_IDS, NO_PAGES)
        self.fd = self._direct = -1

    def create(self) -> None:
        """Write header and description; the rest is a hole."""
        g, uuid = self.geometry, bytes.fromhex(self.spec.uuid)
        first = Header(g, uuid, NO_GENERATION, len(self._description)).page()
        pages = first + sealed_pages(self._description, 1, uuid)
        fd = self._disk.open(self.path, create=True)
        try:
            self._disk.truncate(fd, 0)
            self._disk.write(fd, np.frombuffer(pages, np.uint8), 0)
            self._disk.truncate(fd, g.file_bytes)
            self._disk.sync(fd)
        finally:
            self._disk.close(fd)
        self._disk.sync_folder(self.path.parent)

    def open(self) -> None:
        """Raises FormatError where the file, or what the table began with, is not this table's."""
        self._initial.open(self._disk)
        self.fd, self._direct = self._disk.open(self.path), self._disk.open_direct(self.path)
        page = np.zeros(PAGE_BYTES, np.uint8)
        self._disk.read(self.fd, page, 0)
        header = decode_header(self.path, page.tobytes(), trained=True)
        found = (header.uuid.hex(), header.geometry, self._disk.size(self.fd))
        expected = (self.spec.uuid, self.geometry, self.geometry.file_bytes)
        if found != expected:
            raise FormatError(
                f"{self.path} is not the file of table {self.spec.name!r} (uuid, geometry, bytes): expected "
                f"{expected}, got {found}; restore the training folder from a copy"
            )

    def close(self) -> None:
        self._initial.close()
        for fd in (self.fd, self._direct):
            if fd >= 0:
                self._disk.close(fd)

    def read(
        self, reader: PieceReader, ids: np.ndarray, targets: np.ndarray, out: np.ndarray, deadline: Deadline
    ) -> None:
        """Row ids[i] goes to out[targets[i]]; out uint8 [m, row_bytes].

        Raises DataCorrupt naming page and rows, StorageError, DeadlineExceeded.
        """
        written = self.epochs[self._index_of(self.units(ids))] > 0
        fresh = ~written
        self._initial.fill(ids[fresh], targets[fresh], out, reader, deadline)
        ids, targets = ids[written], targets[written]
        if ids.size == 0:
            return
        pieces = row_pieces(self.geometry, ids, targets * self.spec.row_bytes)
        if pieces.lengths is None:
            lengths = np.full(ids.size, self.spec.row_bytes)
            pieces = Pieces(pieces.pages, pieces.page_offsets, lengths, pieces.targets)
        self._read_checked(reader, pieces, out, deadline)

    def images_of(self, reader: PieceReader, units: np.ndarray) -> np.ndarray:
        """The pages of `units`, ascending, as they are: uint64 [n, 512], zeros where never written.

        For the one that folds: nobody else writes them.
        """
        numbers = self.pages_of(units)
        memory = aligned_bytes(numbers.size * PAGE_BYTES, huge=True)
        images = memory.view(np.uint64).reshape(-1, PAGE_BYTES // 8)
        expected = self.epochs[numbers - self.geometry.first_page]
        written = np.flatnonzero(expected)
        if written.size:
            runs = np.array(_adjacent(numbers[written], RUN_PAGES_MAX))
            slots = written[runs[:, 0]]
            landing = Runs(numbers[slots], runs[:, 1] - runs[:, 0], slots, int(memory.ctypes.data))
            reader.read_pages(self._direct, self.path, landing, memory)
            wrong = first_wrong_page(images, written, numbers[written], expected[written], *self.words)
            if wrong >= 0:
                raise self._damaged(int(numbers[written[wrong]]))
        return images

    def initial_rows(
        self, reader: PieceReader, units: np.ndarray, but: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64, ascending, and rows uint8 [n, row_bytes] of those of `units` that were never written.

        Not of ids `but`, nor where rows are zeros initially, as pages are.
        """
        fresh, n = units[self.epochs[self._index_of(units)] == 0], self.geometry.rows_per_page
        if fresh.size == 0 or self._initial.are_zeros:
            return NO_IDS, np.zeros((0, self.spec.row_bytes), np.uint8)
        ids = (fresh[:, None] * n + np.arange(n)).ravel() if n else fresh
        ids = np.setdiff1d(ids[ids < self.spec.rows], but, assume_unique=True)
        return ids, self.begun_with(reader, ids)

    def begun_with(self, reader: PieceReader, ids: np.ndarray) -> np.ndarray:
        """Rows uint8 [n, row_bytes] as they were before they were ever written, whether they were or not."""
        rows = np.zeros((ids.size, self.spec.row_bytes), np.uint8)
        self._initial.fill(ids, np.arange(ids.size), rows, reader, Deadline.after(None))
        return rows

    def written(self, first: int, last: int) -> np.ndarray:
        """Those of rows [first, last) whose pages were ever written, int64 [n], ascending."""
        ends = np.array([first, max(first, last - 1)])
        low, high = self._index_of(self.units(ends)).tolist()
        if not self.epochs[low : high + 1].any():
            return np.zeros(0, np.int64)
        ids = np.arange(first, last)
        return ids[self.epochs[self._index_of(self.units(ids))] > 0]

    def units(self, ids: np.ndarray) -> np.ndarray:
        """A unit is what rows share pages with nobody outside: a page of rows, or a row's pages."""
        n = self.geometry.rows_per_page
        return ids // n if n else ids

    def pages_of(self, units: np.ndarray) -> np.ndarray:
        """Page numbers in the file, int64 [units * pages_per_row]."""
        k, first = self.geometry.pages_per_row, self.geometry.first_page
        return (units[:, None] * k + first + np.arange(k)).ravel()

    def rewrite(self, page_numbers: np.ndarray, images: np.ndarray, epoch: int | None) -> None:
        """Write pages in place and sync them; images uint64 [n, 512], sealed, that lie in the journal.

        They are expected to have this epoch from then on; None leaves what is expected as it is. Whoever
        reads them meanwhile is given `images`, so these must not change any more. Raises OSError; they are
        read from memory then until they are written again.
        """
        self._in_writing = Batch(page_numbers, images)
        self._disk.write_pages(self.fd, images, page_numbers)
        self._disk.sync(self.fd)
        self._disk.forget(self.fd)
        if epoch is not None:
            self.epochs[page_numbers - self.geometry.first_page] = epoch
        self._in_writing = Batch(NO_IDS, NO_PAGES)  # another one than before, which is what counts

    def _index_of(self, units: np.ndarray) -> np.ndarray:
        """Into `epochs`, of a unit's first page: all pages of a unit are written together."""
        return units * self.geometry.pages_per_row

    def _read_checked(self, reader: PieceReader, pieces: Pieces, out: np.ndarray, deadline: Deadline) -> None:
        wanted = np.unique(pieces.pages)
        expected = self.epochs[wanted - self.geometry.first_page]  # before anything is read

        def check(window: Window, slots: np.ndarray) -> None:
            epochs = expected[np.searchsorted(wanted, window.pages)]
            wrong = first_wrong_page(slots, window.page_slots, window.pages, epochs, *self.words)
            if wrong >= 0:
                raise PageWrong(int(window.pages[wrong]))

        failed = 0
        while True:
            batch = self._in_writing
            inside = batch.holds(pieces.pages)
            try:
                if inside.any():
                    batch.copy(pieces.those(inside), out)
                    reader.read(self._direct, self.path, pieces.those(~inside), out, deadline, check)
                else:
                    reader.read(self._direct, self.path, pieces, out, deadline, check)
                return
            except PageWrong as wrong:
                failed = failed + 1 if self._in_writing is batch else 0
                if failed == 2:
                    raise self._damaged(wrong.page) from None

    def _damaged(self, page: int) -> DataCorrupt:
        rows = self.geometry.rows_of_page(page)
        return DataCorrupt(
            f"page {page} of {self.path} (table {self.spec.name!r}, rows {rows.start} to {rows.stop - 1}) is "
            "damaged or older than the last fold that wrote it; other rows can still be read: restore the "
            "training folder from a copy, or start again from an exported snapshot"
        )


def _adjacent(pages: np.ndarray, most: int) -> list[tuple[int, int]]:
    """[start, stop) of each run of up to `most` adjacent numbers in ascending `pages`."""
    cuts = np.flatnonzero(np.diff(pages) != 1) + 1
    bounds = [0, *cuts.tolist(), pages.size]
    return [
        (start, min(start + most, end))
        for begin, end in pairwise(bounds)
        for start in range(begin, end, most)
    ]
