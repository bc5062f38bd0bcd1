"""The double-write journal: pages are written here and synced before they are rewritten in place.

    DIR/training/journal, always the last batch of pages

    offset size
         0    8  magic "TSDOUBLE"
         8    4  version: 1
        12    4  table
        16   16  uuid of the store
        32    8  number of the fold
        40    8  pages
        48    8  XXH64 of the page numbers, seed 0
        56    8  XXH64 of the images, seed: the one before
        64    8  XXH64 of the 64 bytes before, seed 0
      4096       page numbers, int64, zeros up to a multiple of 4096
    then         images, 4096 bytes each

A crash that tears pages in place finds them whole here; one that tears the journal leaves the pages alone.
Only a batch of a fold that was not completed is replayed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tierstore.format.geometry import PAGE_BYTES
from tierstore.updates.blocks import checksum_of, padded
from tierstore.updates.disk import Disk
from tierstore.updates.pages import TablePages

MAGIC, VERSION = b"TSDOUBLE", 1
FIELDS = struct.Struct("<8sII16sqqQQ")


class Journal:
    """The file, open."""

    def __init__(self, disk: Disk, folder: Path, uuid: bytes, tables: Sequence[TablePages]) -> None:
        self._disk, self._path, self._uuid, self._tables = disk, folder / "journal", uuid, tables
        self._fd = -1

    def create(self) -> None:
        self._disk.close(self._disk.open(self._path, create=True))

    def open(self) -> None:
        self._fd = self._disk.open(self._path)

    def close(self) -> None:
        if self._fd >= 0:
            self._disk.close(self._fd)

    def write(self, table: int, fold: int, page_numbers: np.ndarray, images: np.ndarray) -> None:
        """Make a batch durable here: int64 [n] and uint64 [n, 512]. Raises OSError."""
        numbers = np.zeros(padded(page_numbers.nbytes) // 8, np.int64)
        numbers[: page_numbers.size] = page_numbers
        numbers_sum = checksum_of(page_numbers)
        images_sum = checksum_of(images, numbers_sum)
        packed = FIELDS.pack(
            MAGIC, VERSION, table, self._uuid, fold, page_numbers.size, numbers_sum, images_sum
        )
        header = (packed + checksum_of(packed).to_bytes(8, "little")).ljust(PAGE_BYTES, b"\0")
        first = np.concatenate([np.frombuffer(header, np.uint8), numbers.view(np.uint8)])
        self._disk.write(self._fd, first, 0)
        self._disk.write_pages(self._fd, images, first.size // PAGE_BYTES + np.arange(page_numbers.size))
        self._disk.sync(self._fd)

    def replay(self, after: int) -> int:
        """Write the pages of a whole batch of a fold later than `after` in place again; their number."""
        found = self._load(after)
        if found is None:
            return 0
        table, page_numbers, images = found
        self._tables[table].rewrite(page_numbers, images, None)
        return int(page_numbers.size)

    def _load(self, after: int) -> tuple[int, np.ndarray, np.ndarray] | None:
        size = self._disk.size(self._fd)
        if size < PAGE_BYTES:
            return None
        page = np.zeros(PAGE_BYTES, np.uint8)
        self._disk.read(self._fd, page, 0)
        raw = page.tobytes()
        if checksum_of(raw[: FIELDS.size]) != int.from_bytes(raw[FIELDS.size : FIELDS.size + 8], "little"):
            return None
        magic, version, table, uuid, of_fold, count, numbers_sum, images_sum = FIELDS.unpack_from(raw)
        ours = (magic, version, uuid) == (MAGIC, VERSION, self._uuid) and of_fold > after
        start = PAGE_BYTES + padded(8 * count)
        if not ours or table >= len(self._tables) or size < start + count * PAGE_BYTES:
            return None
        numbers, images = np.zeros(count, np.int64), np.zeros((count, PAGE_BYTES // 8), np.uint64)
        self._disk.read(self._fd, numbers.view(np.uint8), PAGE_BYTES)
        self._disk.read(self._fd, images.reshape(-1).view(np.uint8), start)
        if checksum_of(numbers) != numbers_sum:
            return None
        whole = checksum_of(images, numbers_sum) == images_sum
        return (table, numbers, images) if whole else None
