"""Updates, commits and rollbacks take turns; look-ups never wait for one.

Whoever waits does so up to his deadline, and how long is counted. The turn is held while rows are read or
written back, because the next update could do nothing meanwhile but the same; no look-up and no other lock
waits for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from engram_client.deadline import Deadline
from tierstore.training.counters import TrainingCounters

LONGEST_WAIT_S = threading.TIMEOUT_MAX


class Turn:
    """Not reentrant."""

    def __init__(self, counters: TrainingCounters, others: str = "an update or commit") -> None:
        self._lock = threading.Lock()
        self._others = others  # whom one waits for
        self._counters = counters

    @contextmanager
    def taken(self, deadline: Deadline, doing: str) -> Iterator[None]:
        """Raises DeadlineExceeded."""
        if not self._lock.acquire(blocking=False):
            left_s = deadline.remaining_s()
            before = time.monotonic_ns()
            got = self._lock.acquire(timeout=LONGEST_WAIT_S if left_s is None else left_s)
            self._counters.add(waits_us=(time.monotonic_ns() - before) // 1000)
            if not got:
                raise deadline.exceeded(f"{doing}: {self._others} before it is not done")
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def taken_if_free(self) -> Iterator[bool]:
        """Whether it was; for work that whoever comes first does."""
        taken = self._lock.acquire(blocking=False)
        try:
            yield taken
        finally:
            if taken:
                self._lock.release()
