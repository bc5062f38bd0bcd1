"""Where row r lies in a row file, and how many pages that takes. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

PAGE_BYTES = 4096
TRAILER_BYTES = 8  # the checksum at the end of every page
PAYLOAD_BYTES = PAGE_BYTES - TRAILER_BYTES
EPOCH_BYTES = 8  # in front of the checksum, in files of tables that are trained


@dataclass(frozen=True)
class Geometry:
    """Rows over pages: many rows in one page, or one row over several whole pages.

    A row that fits a page's 4088 payload bytes never straddles two pages: page `first_page + p`
    holds rows `p * rows_per_page` onwards, one after another from its first byte. A larger row
    owns `pages_per_row` pages and fills 4088 bytes of each before the next. With page epochs rows
    have 4080 bytes of a page.
    """

    row_bytes: int
    rows: int
    first_page: int  # page number in the file of the first data page
    epochs: bool = False  # whether every data page holds its epoch

    @property
    def room_bytes(self) -> int:
        """Bytes of a data page that rows can have."""
        return PAYLOAD_BYTES - EPOCH_BYTES * self.epochs

    @property
    def rows_per_page(self) -> int:
        """Rows in a full page; 0 where a row is larger than a page's payload."""
        return self.room_bytes // self.row_bytes

    @property
    def pages_per_row(self) -> int:
        """1, or how many whole pages a large row owns."""
        return -(-self.row_bytes // self.room_bytes)

    @property
    def data_pages(self) -> int:
        if self.rows_per_page:
            return -(-self.rows // self.rows_per_page)
        return self.rows * self.pages_per_row

    @property
    def file_pages(self) -> int:
        return self.first_page + self.data_pages

    @property
    def file_bytes(self) -> int:
        return self.file_pages * PAGE_BYTES

    @property
    def waste(self) -> float:
        """Share of the file that is not row bytes: 0.05 for five per cent."""
        return 1 - self.rows * self.row_bytes / self.file_bytes

    def page_of_row(self, row: int) -> int:
        """Page number in the file of the (first) page that holds `row`."""
        if self.rows_per_page:
            return self.first_page + row // self.rows_per_page
        return self.first_page + row * self.pages_per_row

    def offset_of_row(self, row: int) -> int:
        """Byte in the file where `row` starts."""
        inside = row % self.rows_per_page * self.row_bytes if self.rows_per_page else 0
        return self.page_of_row(row) * PAGE_BYTES + inside

    def rows_of_page(self, page: int) -> range:
        """The rows with bytes in data page number `page` of the file."""
        index = page - self.first_page
        if not self.rows_per_page:
            row = index // self.pages_per_row
            return range(row, row + 1)
        first = index * self.rows_per_page
        return range(first, min(first + self.rows_per_page, self.rows))
