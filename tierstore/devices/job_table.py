"""Handing read requests to worker threads that live inside a kernel.

Python fills a place of the job table (tierstore/kernels/jobs.py) and sleeps until the job has ended;
no other Python thread takes part, so the GIL is not fought over for each read. A job whose waiter has
given up is withdrawn: its unclaimed runs are dropped, those under way still write into its buffer, and
only once they have ended does the place become free and the buffer the caller's again.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import Unavailable
from tierstore.devices.base import PageRead, PageReadFailed
from tierstore.kernels import jobs

PLACES = 64  # more than there are staging buffers to read into
SLICE_S = 0.1  # of a wait, so that signals are noticed


class JobTable:
    """The table, its worker threads, and its free places."""

    def __init__(self) -> None:
        self._words = np.zeros(jobs.HEADER_WORDS + PLACES * jobs.JOB_WORDS, np.int64)
        self.address = int(self._words.ctypes.data)
        self._words[jobs.HEADER_WORDS + jobs.ENDED // 8 :: jobs.JOB_WORDS] = 1  # of every place
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for place in range(PLACES):
            self._free.put(place)
        self._threads: list[threading.Thread] = []

    def start_workers(self, count: int, name: str, work: Callable[[int], None]) -> None:
        """Run `work(i)` in `count` threads; it returns when the table is stopped."""
        for i in range(count):
            thread = threading.Thread(target=work, args=(i,), name=f"tierstore-{name}-{i}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def open(
        self,
        fd: int,
        first_pages: np.ndarray,
        page_counts: np.ndarray,
        slots: np.ndarray,
        buffer: int,
        *,
        hint: bool,
        reads: list[PageRead],
        limit: int | None = None,
        fates: np.ndarray | None = None,
    ) -> Job:
        """Begin to read runs; the arrays, int64, belong to the job until it has ended.

        It is in `reads` by then, which keeps it and its arrays. `limit` and `fates` make it a stream.
        """
        if not any(thread.is_alive() for thread in self._threads):
            raise Unavailable("the page reader is closed")
        runs = (first_pages, page_counts, slots)
        job = Job(self, self._free.get(), fd, runs, buffer, hint, limit, fates)
        reads.append(job)
        job.begin()
        return job

    def words_of(self, place: int) -> np.ndarray:
        start = jobs.HEADER_WORDS + place * jobs.JOB_WORDS
        return self._words[start : start + jobs.JOB_WORDS]

    def address_of(self, place: int) -> int:
        return self.address + 8 * (jobs.HEADER_WORDS + place * jobs.JOB_WORDS)

    @property
    def workers(self) -> int:
        return len(self._threads)

    def give_back(self, place: int) -> None:
        self._free.put(place)

    def close(self, timeout_s: float | None = None) -> None:
        """Let the workers finish what was asked for and leave; one that hangs is waited for so long."""
        jobs.stop_workers(self.address)
        for thread in self._threads:
            thread.join(timeout_s)


class Job:
    """One read request under way. See `PageRead` and `PageStream`.

    One that was made and never begun, because a signal came in between, has ended: so has its place.
    """

    def __init__(
        self,
        table: JobTable,
        place: int,
        fd: int,
        runs: tuple[np.ndarray, np.ndarray, np.ndarray],
        buffer: int,
        hint: bool,
        limit: int | None,
        fates: np.ndarray | None,
    ) -> None:
        self._table = table
        self._fates = fates
        self._place: int | None = place
        self._runs = tuple(np.ascontiguousarray(a) for a in runs)  # alive until the job has ended
        addresses = [a.ctypes.data for a in self._runs]
        count = self._runs[0].size
        stream = (count if limit is None else limit, 0 if fates is None else fates.ctypes.data)
        self._order = (place, int(hint), fd, count, *addresses, buffer, *stream, table.workers)
        self.words = (table.address, table.address_of(place), table.workers)

    def begin(self) -> None:
        """Let its runs be claimed."""
        jobs.open_job(self._table.address, *self._order)

    def ended(self) -> bool:
        """Whether no read of this job is under way any more."""
        if self._place is not None and jobs.has_ended(self._table.address, self._place):
            self._failure = self._table.words_of(self._place)[[jobs.PAGE // 8, jobs.ERRNO // 8]].tolist()
            self._table.give_back(self._place)
            self._place = None
        return self._place is None

    def wait(self, deadline: Deadline) -> None:
        """Return once every page has landed. Raises PageReadFailed or DeadlineExceeded."""
        scratch = np.zeros(2, np.int64)
        while not self.ended():
            left_s = deadline.remaining_s()
            if left_s == 0:
                self.withdraw()
                raise deadline.exceeded("reading pages")
            slice_ns = int(min(SLICE_S, SLICE_S if left_s is None else left_s) * 1e9)
            jobs.wait_ended(self._table.address, self._place, slice_ns, scratch.ctypes.data)
        page, errno = self._failure
        if errno:
            raise PageReadFailed(page, errno)

    def advance(self, deadline: Deadline) -> float:
        """See `PageStream`; the workers need no help."""
        left_s = deadline.remaining_s()
        if left_s == 0:
            raise deadline.exceeded("reading pages")
        return SLICE_S if left_s is None else min(SLICE_S, left_s)

    def withdraw(self) -> None:
        """Drop what has not begun; `ended` tells when the rest is over."""
        if self._place is not None:
            jobs.withdraw(self._table.address, self._place)


def rehearse(work: Callable[[int], object]) -> None:
    """Load or compile what reading calls, with a table that nothing is read by.

    `work` is what a worker does, given the address of a table; this one has stopped.
    """
    table, scratch = JobTable(), np.zeros(2, np.int64)
    jobs.open_job(table.address, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    jobs.withdraw(table.address, 0)
    jobs.wait_ended(table.address, 0, 0, scratch.ctypes.data)
    jobs.has_ended(table.address, 0)
    table.close()
    work(table.address)


class JobReader:
    """What every page reader over a job table does; see `PageReader`. Its workers are the subclass's."""

    def __init__(self) -> None:
        self._table = JobTable()

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
    ) -> Job:
        return self._table.open(fd, first_pages, page_counts, slots, buffer, hint=hint, reads=reads)

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
    ) -> Job:
        return self._table.open(
            fd, first_pages, page_counts, slots, buffer, hint=hint, reads=reads, limit=limit, fates=fates
        )

    def close(self) -> None:
        self._table.close()
