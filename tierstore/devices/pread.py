"""Page reads by a bounded pool of threads, each inside one `nogil` kernel that calls pread(2).

The runs of a request are dealt out in contiguous shares, so a thread is woken once for several
reads. A request too small to share is read by the thread that asked. The deadline is looked at
before each read; one that has begun cannot be taken back, so a disk that hangs hangs its reader.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

import numpy as np

from engram_client.deadline import Deadline
from tierstore.devices.base import PageReadFailed
from tierstore.kernels.pread import ETIME, read_runs

RUNS_PER_SHARE_MIN = 2  # waking a thread costs about as much as a read


class PreadReader:
    """See `PageReader`."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tierstore-pread")

    def read(
        self,
        fd: int,
        first_pages: np.ndarray,
        page_counts: np.ndarray,
        slots: np.ndarray,
        buffer: int,
        deadline: Deadline,
    ) -> None:
        stop_at_ns = deadline.at_ns()

        def read_share(start: int, stop: int) -> tuple[int, int]:
            failed_page = np.zeros(1, np.int64)
            share = (first_pages, page_counts, slots, start, stop)
            error = read_runs(fd, *share, buffer, stop_at_ns, failed_page)
            return int(error), int(failed_page[0])

        for error, page in self._share_out(read_share, first_pages.size):
            if error == ETIME:
                raise deadline.exceeded("reading pages")
            if error:
                raise PageReadFailed(page, error)

    def _share_out(self, read_share, runs: int) -> list[tuple[int, int]]:  # type: ignore[no-untyped-def]
        shares = min(self._threads, max(1, runs // RUNS_PER_SHARE_MIN))
        bounds = [runs * i // shares for i in range(shares + 1)]
        first, *rest = pairwise(bounds)
        futures = [self._pool.submit(read_share, *share) for share in rest]
        own = read_share(*first)
        wait(futures)  # all of them, also after an error: the buffer is in use until then
        return [own, *(f.result() for f in futures)]

    def close(self) -> None:
        self._pool.shutdown(wait=True)
