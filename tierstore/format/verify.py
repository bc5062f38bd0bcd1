"""Reading every page of a row file again: which pages are damaged, and is it the generation it says.

Leaves are read past the page cache, so it is the disk that is judged, by two threads with one leaf
of memory each. A page that is whole but in the wrong place, or of another file, counts as damaged.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from tierstore.format.direct import aligned_bytes, open_direct, read_up_to
from tierstore.format.geometry import PAGE_BYTES
from tierstore.format.rowfile import RowFile
from tierstore.format.tree import generation_of, leaf_count, leaf_digest
from tierstore.kernels.checksum import bad_pages

THREADS = 2
MAX_NAMED_PAGES = 10_000  # damaged pages that a report names one by one


@dataclass(frozen=True)
class DamagedPage:
    """A data page whose checksum is wrong, and the rows with bytes in it: [first_row, last_row]."""

    page: int
    first_row: int
    last_row: int


@dataclass(frozen=True)
class VerifyReport:
    """What reading one row file found."""

    row_file: RowFile
    generation: str  # as computed; the header's is row_file.spec.generation
    damaged_pages: int
    damaged: tuple[DamagedPage, ...]  # the first MAX_NAMED_PAGES of them
    missing_rows: tuple[int, int] | None  # [first, last] beyond the file's end
    missing_bytes: int
    trailing_bytes: int

    @property
    def whole(self) -> bool:
        """Whether the file is byte for byte what was packed."""
        flawless = not (self.damaged_pages or self.missing_bytes or self.trailing_bytes)
        return flawless and self.generation == self.row_file.spec.generation


def verify(path: Path, on_bytes: Callable[[int, int], None]) -> VerifyReport:
    """Check every byte of the row file at `path`.

    `on_bytes(done, total)` is told how far it is. Raises FormatError where the header or the
    description cannot be read, StorageError where the disk refuses.
    """
    row_file = RowFile.open(path, check_size=False)
    geometry, size_bytes = row_file.geometry, path.stat().st_size
    damaged: list[DamagedPage] = []
    damaged_pages = 0
    leaves = []
    for digest, bad in _checked_leaves(row_file):
        leaves.append(digest)
        damaged_pages += len(bad)
        for page in bad[: MAX_NAMED_PAGES - len(damaged)]:
            rows = geometry.rows_of_page(int(page))
            damaged.append(DamagedPage(int(page), rows.start, rows.stop - 1))
        on_bytes(min(size_bytes, len(leaves) * row_file.header.leaf_pages * PAGE_BYTES), size_bytes)
    missing_bytes = max(0, geometry.file_bytes - size_bytes)
    return VerifyReport(
        row_file,
        generation_of(row_file.header, row_file.description, leaves).hex(),
        damaged_pages,
        tuple(damaged),
        _missing_rows(row_file, size_bytes) if missing_bytes else None,
        missing_bytes,
        max(0, size_bytes - geometry.file_bytes),
    )


def _checked_leaves(row_file: RowFile) -> Iterator[tuple[bytes, np.ndarray]]:
    """Digest and damaged page numbers of each leaf, in order."""
    leaf_bytes = row_file.header.leaf_pages * PAGE_BYTES
    buffers: SimpleQueue[np.ndarray] = SimpleQueue()
    for _ in range(THREADS):
        buffers.put(aligned_bytes(leaf_bytes))
    with _opened(row_file.path) as fd, ThreadPoolExecutor(THREADS, "verify") as pool:
        running: deque[Future[tuple[bytes, np.ndarray]]] = deque()
        for leaf in range(min(leaf_count(row_file.header), _leaves_begun(row_file, fd))):
            running.append(pool.submit(_check_leaf, row_file, fd, leaf, buffers))
            if len(running) > 2 * THREADS:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _leaves_begun(row_file: RowFile, fd: int) -> int:
    """How many leaves the file holds any byte of, whatever its header promises."""
    data_bytes = os.fstat(fd).st_size - row_file.geometry.first_page * PAGE_BYTES
    return max(0, -(-data_bytes // (row_file.header.leaf_pages * PAGE_BYTES)))


def _check_leaf(
    row_file: RowFile, fd: int, leaf: int, buffers: SimpleQueue[np.ndarray]
) -> tuple[bytes, np.ndarray]:
    geometry, leaf_pages = row_file.geometry, row_file.header.leaf_pages
    count = min(leaf_pages, geometry.data_pages - leaf * leaf_pages)
    number = geometry.first_page + leaf * leaf_pages
    buffer = buffers.get()
    try:
        data = buffer[: count * PAGE_BYTES]
        read_bytes = read_up_to(fd, row_file.path, data, number * PAGE_BYTES)
        data[read_bytes:] = 0
        pages = data.view(np.uint64).reshape(count, PAGE_BYTES // 8)
        whole = read_bytes // PAGE_BYTES  # what lies beyond the file's end is missing, not damaged
        found = np.empty(max(1, whole), dtype=np.int64)
        bad = bad_pages(pages, number, *row_file.uuid_words, 0, whole, found)
        return leaf_digest(pages), found[:bad] + number
    finally:
        buffers.put(buffer)


def _missing_rows(row_file: RowFile, size_bytes: int) -> tuple[int, int]:
    page = max(row_file.geometry.first_page, size_bytes // PAGE_BYTES)
    return row_file.geometry.rows_of_page(page).start, row_file.geometry.rows - 1


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = open_direct(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)
