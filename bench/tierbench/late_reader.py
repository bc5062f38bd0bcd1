"""A disk that answers late: every read takes at least so long, without costing processor time meanwhile."""

from __future__ import annotations

import time

import numpy as np

from engram_client.deadline import Deadline
from tierstore.devices.base import PageRead, PageReader


class LateReader:
    """See `PageReader`: in front of another one; reads end no sooner than `latency_s` after they began."""

    def __init__(self, inner: PageReader, latency_s: float) -> None:
        self._inner = inner
        self._latency_s = latency_s

    def start(
        self,
        fd: int,
        first_pages: np.ndarray,
        page_counts: np.ndarray,
        slots: np.ndarray,
        buffer: int,
        *,
        hint: bool,
    ) -> LateRead:
        read = self._inner.start(fd, first_pages, page_counts, slots, buffer, hint=hint)
        return LateRead(read, time.monotonic() + self._latency_s)

    def close(self) -> None:
        self._inner.close()


class LateRead:
    """See `PageRead`."""

    def __init__(self, inner: PageRead, due_s: float) -> None:
        self._inner = inner
        self._due_s = due_s

    def wait(self, deadline: Deadline) -> None:
        left_s = deadline.remaining_s()
        late_s = max(0.0, self._due_s - time.monotonic())
        time.sleep(late_s if left_s is None else min(late_s, left_s))
        deadline.check("waiting for a disk that answers late")
        self._inner.wait(deadline)

    def withdraw(self) -> None:
        self._inner.withdraw()

    def ended(self) -> bool:
        return self._inner.ended()
