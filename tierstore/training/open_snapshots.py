"""Steps that clients of a daemon read: a few at a time, and none for longer than somebody reads it.

An open step keeps its part of the log on the disk and holds up folding past it. A client that is gone does
not say so: a step that nobody has asked anything of for a while is closed.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from engram_client.errors import BadRequest, Overloaded
from tierstore.updates import Snapshot


@dataclass
class _Open:
    snapshot: Snapshot
    used_s: float  # when it was last asked for something
    readers: int = 0
    closing: bool = False


class OpenSnapshots:
    """Thread safe. `clock` gives seconds."""

    def __init__(self, count_max: int, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._count_max, self._idle_s, self._clock = count_max, idle_s, clock
        self._open: dict[int, _Open] = {}
        self._lock = threading.Lock()
        self._opening = 0

    def open(self, make: Callable[[], Snapshot]) -> tuple[int, Snapshot]:
        """A step that `make` opens, and the number it is asked for by. Raises Overloaded."""
        self.expire()
        with self._lock:
            if len(self._open) + self._opening >= self._count_max:
                raise Overloaded(
                    f"{self._count_max} steps are being read already (training.snapshots_max); one that "
                    f"nobody asks for is closed after {self._idle_s:.0f} s: try again later"
                )
            self._opening += 1
        try:
            snapshot = make()
        finally:
            with self._lock:
                self._opening -= 1
        number = secrets.randbits(62)
        with self._lock:
            self._open[number] = _Open(snapshot, self._clock())
        return number, snapshot

    @contextmanager
    def reading(self, number: int) -> Iterator[Snapshot]:
        """The step of this number; it is not closed meanwhile. Raises BadRequest."""
        with self._lock:
            found = self._open.get(number)
            if found is None or found.closing:
                raise BadRequest(
                    "this step is not open any more: it was closed, or nobody asked for it for "
                    f"{self._idle_s:.0f} s (training.snapshot_idle_s); open it anew"
                )
            found.readers += 1
        try:
            yield found.snapshot
        finally:
            with self._lock:
                found.readers -= 1
                found.used_s = self._clock()
                last = self._taken(number) if found.closing else None
            if last:
                last.snapshot.close()

    def close(self, number: int) -> None:
        """Close it, once nobody reads it; one that is closed already is none."""
        with self._lock:
            if number in self._open:
                self._open[number].closing = True
            found = self._taken(number)
        if found:
            found.snapshot.close()

    def expire(self) -> int:
        """Close what nobody has asked for lately; how many are open still."""
        with self._lock:
            late = self._clock() - self._idle_s
            idle = [n for n, o in self._open.items() if not o.readers and o.used_s <= late]
            expired = [self._open.pop(number) for number in idle]
            left = len(self._open)
        for each in expired:
            each.snapshot.close()
        return left

    def close_all(self) -> None:
        with self._lock:
            numbers = list(self._open)
        for number in numbers:
            self.close(number)

    def _taken(self, number: int) -> _Open | None:
        """Out of the list, where it is in it and nobody reads it; the lock is held."""
        found = self._open.get(number)
        return self._open.pop(number) if found and not found.readers else None
