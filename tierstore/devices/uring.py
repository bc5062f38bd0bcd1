"""Page reads through one io_uring, driven by one thread inside one kernel.

One thread keeps hundreds of reads in flight at a fraction of a core; what it costs is that io_uring must
be allowed: `UringReader` raises OSError where it is not. Should the ring break while serving, its
reads fail, that is said once, and the thread goes on with pread.
"""

from __future__ import annotations

import logging
import os
import queue

import numpy as np

from tierstore.devices.job_table import PLACES, JobReader, rehearse
from tierstore.devices.ring import Ring
from tierstore.kernels.pread_worker import read_until_stopped
from tierstore.kernels.uring_worker import RING_WORDS, drive_ring_until_stopped

log = logging.getLogger(__name__)


class UringReader(JobReader):
    """See `PageReader`. Raises OSError (EPERM, ENOSYS) where io_uring cannot be had."""

    def __init__(self, queue_depth: int) -> None:
        self._depth = queue_depth
        super().__init__()
        outcome: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()
        self._table.start_workers(1, "uring", lambda _: self._drive(outcome))
        if error := outcome.get():
            raise error
        no_ring = np.zeros(RING_WORDS, np.int64)
        rehearse(lambda table: drive_ring_until_stopped(table, PLACES, no_ring, queue_depth))

    def _drive(self, outcome: queue.SimpleQueue[OSError | None]) -> None:
        """The ring belongs to the thread that makes it, so it is made here."""
        try:
            ring = Ring(self._depth)
        except OSError as error:
            outcome.put(error)
            return
        outcome.put(None)
        try:
            failure = drive_ring_until_stopped(self._table.address, PLACES, ring.words, self._depth)
        finally:
            ring.close()
        if failure:
            log.error(
                "io_uring stopped working (%s): page reads go on through one pread thread, which is much "
                "slower; restart the daemon",
                os.strerror(failure),
            )
            read_until_stopped(self._table.address, PLACES, 0)
