"""Work that is done behind whoever gave cause for it, by one thread, once he is gone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Behind:
    """Calls `work` after each `wake`; several that come while it runs are one."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._work = work
        self._changed = threading.Condition()
        self._woken = self._working = self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until nothing is left to do."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._woken or self._working) or self._stopping)

    def stop(self) -> None:
        """What was not begun is not done."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._working = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._woken or self._stopping)
                if self._stopping:
                    return
                self._woken, self._working = False, True
            try:
                self._work()
            except Exception:  # the thread must live on; whoever needs the work does it himself, and is told
                log.exception("%s", self._thread.name)
