"""The pages of a trained table: DIR/training/pages/NAME.rows, a row file whose pages hold epochs.

Every page has an *expected* epoch: the number of the last completed fold that wrote it, 0 before the first.
Expected epochs are kept in memory, 4 bytes a page, and in a side file (epochs.py). A page that was never
written is not read: its rows are the initial ones, and the file has a hole there.

A fold rewrites pages in place. Whoever reads one meanwhile may find it torn, which its checksum tells, and
reads it again once the batch is written.
"""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import DataCorrupt, FormatError
from engram_client.spec import TableSpec
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
from tierstore.tiers.plan import Pieces, Window, row_pieces
from tierstore.updates.disk import Disk
from tierstore.updates.initial import InitialRows
from tierstore.updates.reading import PieceReader
from tierstore.updates.spec import TrainedSpec

NO_GENERATION = bytes(16)
WAIT_SLICE_S = 0.05


class PageWrong(Exception):
    """A page is damaged or stale, or is just being rewritten. Internal."""

    def __init__(self, page: int) -> None:
        super().__init__(page)
        self.page = page


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
        self._rewriting = threading.Condition()
        self._rewrites = 0  # odd while pages are being rewritten
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

    def read_units(self, reader: PieceReader, units: np.ndarray, images: np.ndarray) -> None:
        """The pages of `units` as they are into images uint64 [n, 512]; those never written are made up."""
        k = self.geometry.pages_per_row
        written = self.epochs[self._index_of(units)] > 0
        pages = self.pages_of(units).reshape(-1, k)
        at = np.arange(pages.size).reshape(-1, k) * PAGE_BYTES
        images[:] = 0
        whole = pages[written].ravel()
        if whole.size:
            lengths = np.full(whole.size, PAGE_BYTES)
            pieces = Pieces(whole, np.zeros(whole.size, np.int64), lengths, at[written].ravel())
            self._read_checked(reader, pieces, images.view(np.uint8), Deadline.after(None))

    def initial_rows(self, reader: PieceReader, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 and rows uint8 [n, row_bytes] of those of `units` that were never written."""
        fresh = units[self.epochs[self._index_of(units)] == 0]
        n = self.geometry.rows_per_page
        ids = (fresh[:, None] * n + np.arange(n)).ravel() if n else fresh
        ids = ids[ids < self.spec.rows]
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

        They are expected to have this epoch from then on; None leaves what is expected as it is.
        """
        self._mark_rewriting()
        try:
            for start, stop in _adjacent(page_numbers):
                data = images[start:stop].reshape(-1).view(np.uint8)
                self._disk.write(self.fd, data, int(page_numbers[start]) * PAGE_BYTES)
        finally:
            self._mark_rewriting()
        self._disk.sync(self.fd)
        if epoch is not None:
            self.epochs[page_numbers - self.geometry.first_page] = epoch

    def _mark_rewriting(self) -> None:
        with self._rewriting:
            self._rewrites += 1
            self._rewriting.notify_all()

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
            before = self._settled(deadline)
            try:
                reader.read(self._direct, self.path, pieces, out, deadline, check)
                return
            except PageWrong as wrong:
                failed = failed + 1 if self._rewrites == before else 0
                if failed == 2:
                    raise self._damaged(wrong.page) from None

    def _settled(self, deadline: Deadline) -> int:
        """Wait while pages are being rewritten; their number of times."""
        with self._rewriting:
            while self._rewrites % 2:
                left_s = deadline.remaining_s()
                if left_s == 0:
                    raise deadline.exceeded("waiting for pages that are being folded")
                self._rewriting.wait(WAIT_SLICE_S if left_s is None else min(WAIT_SLICE_S, left_s))
            return self._rewrites

    def _damaged(self, page: int) -> DataCorrupt:
        rows = self.geometry.rows_of_page(page)
        return DataCorrupt(
            f"page {page} of {self.path} (table {self.spec.name!r}, rows {rows.start} to {rows.stop - 1}) is "
            "damaged or older than the last fold that wrote it; other rows can still be read: restore the "
            "training folder from a copy, or start again from an exported snapshot"
        )


def _adjacent(pages: np.ndarray) -> list[tuple[int, int]]:
    """[start, stop) of each run of adjacent numbers in ascending `pages`."""
    cuts = np.flatnonzero(np.diff(pages) != 1) + 1
    bounds = [0, *cuts.tolist(), pages.size]
    return list(pairwise(bounds))
