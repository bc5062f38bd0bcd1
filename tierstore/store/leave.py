"""Earlier generations of tables get time to be left by their clients."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tierstore.store.table import ServedTable


class Leave:
    """Calls `over(table)` when `period_s` have passed since `later(table)` was last called. Thread safe."""

    def __init__(self, period_s: float, over: Callable[[ServedTable], None]) -> None:
        self._period_s = period_s
        self._over = over
        self._timers: dict[int, threading.Timer] = {}  # by the table's number
        self._lock = threading.Lock()
        self._closed = False

    def later(self, table: ServedTable) -> bool:
        """Begin its time, anew where that had begun before; False where it gets none."""
        if self._period_s == 0:
            return False
        timer = threading.Timer(self._period_s, self._ends, (table,))
        timer.daemon = True
        with self._lock:
            if self._closed:
                return True
            before = self._timers.pop(table.number, None)
            self._timers[table.number] = timer
            timer.start()
        if before is not None:
            before.cancel()
        return True

    def _ends(self, table: ServedTable) -> None:
        with self._lock:
            if self._timers.get(table.number) is not threading.current_thread():
                return  # it was begun anew meanwhile
            del self._timers[table.number]
        self._over(table)

    def close(self) -> None:
        """Call nobody any more; who is being called is not waited for."""
        with self._lock:
            self._closed = True
            timers, self._timers = self._timers, {}
        for timer in timers.values():
            timer.cancel()
