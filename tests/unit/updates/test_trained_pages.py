"""Pages in place: whoever reads while a batch is being written is given it, whatever the disk holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engram_client.deadline import Deadline
from engram_client.errors import DataCorrupt
from tests.support.trained import tables
from tierstore.kernels.trained_pages import put_rows, seal_pages_of_epoch
from tierstore.testing.crashing_disk import CrashingDisk
from tierstore.updates.pages import TablePages
from tierstore.updates.reading import PieceReader

NEVER = Deadline.after(None)
BYTES = 256 << 10


class OpenPages:
    """Every row of a table that fills many pages, written by fold after fold."""

    def __init__(self) -> None:
        self.disk, self.spec = CrashingDisk(), tables()[1]
        self.disk.make_folder(Path("t/pages"))
        self.pages = TablePages(self.disk, Path("t"), self.spec)
        self.pages.create()
        self.pages.open()
        self.reader = PieceReader(self.disk.open_reader(1), BYTES)
        self.ids = np.arange(self.spec.rows)

    def write(self, fold: int) -> np.ndarray:
        """The rows that are there from now on."""
        rows = np.random.default_rng(fold).integers(0, 256, (self.ids.size, self.spec.row_bytes), np.uint8)
        g, units = self.pages.geometry, np.unique(self.pages.units(self.ids))
        images = self.pages.images_of(self.reader, units)
        put_rows(rows, self.ids, units, g.rows_per_page, g.pages_per_row, g.room_bytes, images)
        numbers = self.pages.pages_of(units)
        seal_pages_of_epoch(images, numbers, fold, *self.pages.words)
        self.pages.rewrite(numbers, images, fold)
        return rows

    def read(self) -> np.ndarray:
        out = np.zeros((self.ids.size, self.spec.row_bytes), np.uint8)
        self.pages.read(self.reader, self.ids, self.ids, out, NEVER)
        return out

    def tear(self) -> None:
        """What any page holds while it is written."""
        file, first = self.disk._open[self.pages.fd][0], self.pages.geometry.first_page
        file.write(np.full(self.pages.geometry.data_pages * 4096, 0xEE, np.uint8), first * 4096)


def test_a_batch_that_is_being_written_is_read_from_memory() -> None:
    opened, seen = OpenPages(), list[np.ndarray]()
    opened.write(1)

    def read(operation: str, path: Path) -> int | None:
        if operation == "write" and path.suffix == ".rows":
            opened.tear()
            seen.append(opened.read())
        return None

    opened.disk.refuse = read
    rows = opened.write(2)
    assert len(seen) == 1 and (seen[0] == rows).all()
    assert (opened.read() == rows).all()


def test_a_batch_that_could_not_be_written_is_read_from_memory_until_it_is() -> None:
    opened = OpenPages()
    opened.write(1)
    opened.disk.refuse = lambda operation, path: 28 if operation == "sync" else None
    with pytest.raises(OSError, match="No space left"):
        opened.write(2)
    opened.disk.refuse = lambda operation, path: None
    opened.tear()
    expected = np.random.default_rng(2).integers(0, 256, (opened.ids.size, opened.spec.row_bytes), np.uint8)
    assert (opened.read() == expected).all()


def test_a_page_that_is_torn_and_in_no_batch_is_damage() -> None:
    opened = OpenPages()
    opened.write(1)
    opened.tear()
    with pytest.raises(DataCorrupt, match=r"page \d+ of t/pages/narrow.rows .* is damaged or older"):
        opened.read()
    with pytest.raises(DataCorrupt, match=r"is damaged or older"):
        opened.write(2)
