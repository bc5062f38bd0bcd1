"""The one interface every page reader has."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from engram_client.deadline import Deadline


class PageReader(Protocol):
    """Reads runs of pages of an open file into a staging buffer. Thread safe."""

    def read(
        self,
        fd: int,
        first_pages: np.ndarray,
        page_counts: np.ndarray,
        slots: np.ndarray,
        buffer: int,
        deadline: Deadline,
    ) -> None:
        """Run i, `page_counts[i]` pages from page `first_pages[i]` on, lands at slot `slots[i]`.

        Arrays int64 [runs]; `buffer` is the address of a page-aligned buffer of 4096-byte slots.
        Returns when every page has landed. Raises PageReadFailed or DeadlineExceeded; then no
        read is under way and the buffer's content is undefined.
        """

    def close(self) -> None:
        """Stop the reader's threads; reads under way end first."""


class PageReadFailed(Exception):
    """A page could not be read. Internal: the tier turns it into a StorageError with a path."""

    def __init__(self, page: int, errno: int) -> None:
        super().__init__(page, errno)
        self.page = page
        self.errno = errno
