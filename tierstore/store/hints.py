"""Prefetch hints: a bounded queue and a few workers that read into DRAM what is not there yet."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from engram_client.errors import TierstoreError
from engram_client.transport.base import LookupRequest

log = logging.getLogger(__name__)


class HintQueue:
    """Hints wait here; a full queue drops them, because a late hint is worth nothing."""

    def __init__(self, workers: int, queue_max: int, serve: Callable[[LookupRequest], None]) -> None:
        self._serve = serve
        self._queue_max = queue_max
        self._waiting: deque[LookupRequest] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"tierstore-hint-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def offer(self, request: LookupRequest) -> bool:
        """Queue a hint; False where it was dropped."""
        with self._changed:
            if self._closed or not self._threads or len(self._waiting) >= self._queue_max:
                return False
            self._waiting.append(request)
            self._changed.notify()
        return True

    def _work(self) -> None:
        while (request := self._next()) is not None:
            try:
                self._serve(request)
            except TierstoreError as error:
                log.warning("prefetch hint for table %r failed: %s", request.table, error)
            except Exception:
                log.exception("prefetch hint for table %r failed unexpectedly", request.table)

    def _next(self) -> LookupRequest | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return None if self._closed else self._waiting.popleft()

    def close(self) -> None:
        """Drop what waits, let what runs end."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
