"""A page reader whose worker sleeps, so that a read stays under way for as long as a test wants."""

from __future__ import annotations

import threading

from tierstore.devices.job_table import PLACES, JobReader
from tierstore.kernels.pread_worker import read_until_stopped


class IdleReader(JobReader):
    """See `PageReader`. Its worker claims nothing until it is told to `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self._table.start_workers(1, "idle", self._work)

    @property
    def address(self) -> int:
        """Of its job table."""
        return self._table.address

    def _work(self, _: int) -> None:
        self.go.wait()
        read_until_stopped(self.address, PLACES, 0)

    def close(self) -> None:
        self.go.set()
        super().close()
