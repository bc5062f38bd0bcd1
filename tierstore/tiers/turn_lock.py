"""A lock that is taken in turn.

Who lets go of a plain lock and takes it again at once mostly gets it again, as those who wait must wake up
first: work done in many short holds keeps everybody else out until all of it is done. Here whoever is next
keeps the door to the lock shut behind himself until he has it.
"""

from __future__ import annotations

import threading
from types import TracebackType


class TurnLock:
    """Use as a context manager; not reentrant."""

    def __init__(self) -> None:
        self._door = threading.Lock()
        self._held = threading.Lock()

    def __enter__(self) -> None:
        with self._door:
            self._held.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.release()

    @property
    def somebody_waits(self) -> bool:
        """Whether somebody is next, for tests."""
        return self._door.locked()
