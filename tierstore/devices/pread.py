"""Page reads by threads that call pread(2), each inside one kernel for as long as the store is open.

This is what runs where io_uring is not allowed, which is most containers. A thread is woken by a
futex and claims one run after another from the job table, so small requests do not pay for a thread
pool and large ones do not hold up small ones.
"""

from __future__ import annotations

from tierstore.devices.job_table import PLACES, JobReader, rehearse
from tierstore.kernels.pread_worker import read_until_stopped


class PreadReader(JobReader):
    """See `PageReader`."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        rehearse(lambda table: read_until_stopped(table, PLACES, 0))
        spread = max(1, PLACES // threads)
        self._table.start_workers(
            threads, "pread", lambda i: read_until_stopped(self._table.address, PLACES, i * spread)
        )
