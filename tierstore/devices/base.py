"""The one interface every page reader has."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from engram_client.deadline import Deadline


class PageRead(Protocol):
    """Runs of pages on their way into a buffer."""

    def wait(self, deadline: Deadline) -> None:
        """Return once every page has landed.

        Raises PageReadFailed where one could not be read; then nothing is under way any more.
        Raises DeadlineExceeded; then no further run is begun, but those under way still write
        into the buffer until `ended`. The buffer's content is undefined in both cases.
        """

    def withdraw(self) -> None:
        """Begin no further run; `ended` tells when those under way are over."""

    def ended(self) -> bool:
        """Whether nothing is under way: the buffer is the caller's again."""


class PageReader(Protocol):
    """Reads runs of pages of open files. Thread safe."""

    def start(
        self,
        fd: int,
        first_pages: np.ndarray,
        page_counts: np.ndarray,
        slots: np.ndarray,
        buffer: int,
        *,
        hint: bool,
        after: PageRead | None = None,
    ) -> PageRead:
        """Begin to read: run i, `page_counts[i]` pages from page `first_pages[i]` on, lands at slot
        `slots[i]`.

        Arrays int64 [runs], at least one run; `buffer` is the address of a page-aligned buffer of
        4096-byte slots, which the caller keeps until the read has ended. `hint` says that nobody
        waits yet: reads that somebody waits for go first. No run is begun before all runs of `after`,
        a read of the same reader and kind, have been; nothing is said about which ends first.
        """

    def close(self) -> None:
        """Stop the reader's threads; reads that were started end first."""


class PageReadFailed(Exception):
    """A page could not be read. Internal: the tier turns it into a StorageError with a path."""

    def __init__(self, page: int, errno: int) -> None:
        super().__init__(page, errno)
        self.page = page
        self.errno = errno
