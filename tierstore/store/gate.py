"""Closing only once nobody is inside."""

from __future__ import annotations

import os
import threading
from types import TracebackType

from engram_client.errors import Unavailable


class Gate:
    """`with gate:` around work that needs open files; `close` waits until all work is done."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._inside = 0
        self._closed = False
        self._changed = threading.Condition()
        self._pid = os.getpid()

    @property
    def closed(self) -> bool:
        return self._closed

    def check(self) -> None:
        """Raises Unavailable once closed, and in a forked child, where threads and locks are dead."""
        if self._pid != os.getpid():
            raise Unavailable(
                f"{self._what} was opened by process {self._pid}, of which this process is a fork; "
                "connect to a daemon, or fork before connecting"
            )
        if self._closed:
            raise Unavailable(f"{self._what} is closed")

    def __enter__(self) -> None:
        self.check()
        with self._changed:
            self.check()
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def abandon(self) -> None:
        """In a forked child, where nobody is inside and nobody can wait: closed from now on."""
        self._closed = True

    def close(self) -> bool:
        """Let nobody in any more and wait for those inside; False where it was closed already."""
        with self._changed:
            if self._closed:
                return False
            self._closed = True
            self._changed.wait_for(lambda: self._inside == 0)
            return True
