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


class PageStream(PageRead, Protocol):
    """A read whose runs are taken in order, by a kernel, while later ones are still read.

    Only runs below a limit are begun; the kernel raises it as it takes runs, so slots can be used again.
    """

    @property
    def words(self) -> tuple[int, int, int]:
        """For the kernel: addresses of the job table and of the job (tierstore/kernels/jobs.py), and how
        many workers there are to be woken."""

    def advance(self, deadline: Deadline) -> float:
        """Help the next runs to land; how long in seconds the kernel may then sleep until they do.

        Raises DeadlineExceeded.
        """


class RunReader(Protocol):
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
        reads: list[PageRead],
    ) -> PageRead:
        """Begin to read: run i, `page_counts[i]` pages from page `first_pages[i]` on, lands at slot
        `slots[i]`.

        Arrays int64 [runs], at least one run; `buffer` is the address of a page-aligned buffer of
        4096-byte slots, which the caller keeps until the read has ended. `hint` says that nobody
        waits yet: reads that somebody waits for go first. The read is put into `reads` before it
        begins, so that it is known of even where a signal keeps this from returning.
        """

    def close(self) -> None:
        """Stop the reader's threads; reads that were started end first."""


class PageReader(RunReader, Protocol):
    """And streams of runs that need more memory than there is. Thread safe."""

    def stream(
        self,
        fd: int,
        first_pages: np.ndarray,
        page_counts: np.ndarray,
        slots: np.ndarray,
        buffer: int,
        *,
        hint: bool,
        reads: list[PageRead],
        limit: int,
        fates: np.ndarray,
    ) -> PageStream:
        """As `start`, for runs that need more slots than there are at a time.

        Runs below `limit` are begun at once. `fates` uint32 [runs], zeros: what became of each run. A run
        that fails does not fail the others.
        """


class PageReadFailed(Exception):
    """A page could not be read. Internal: the tier turns it into a StorageError with a path."""

    def __init__(self, page: int, errno: int) -> None:
        super().__init__(page, errno)
        self.page = page
        self.errno = errno
