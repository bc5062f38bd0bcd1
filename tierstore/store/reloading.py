"""Taking up what was packed while a store serves, and letting go of generations whose time is up."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress

from engram_client.errors import Unavailable
from tierstore.store.gate import Gate
from tierstore.store.leave import Leave
from tierstore.store.table import ServedTable
from tierstore.store.tables import Tables

log = logging.getLogger(__name__)


class Reloading:
    """Changes `tables`, one caller at a time, and calls `changed` behind each change.

    A replaced generation stays for `period_s` seconds.
    """

    def __init__(self, tables: Tables, gate: Gate, period_s: float, changed: Callable[[], None]) -> None:
        self._tables = tables
        self._gate = gate
        self._changed = changed
        self._leave = Leave(period_s, self._drop)
        self._lock = threading.Lock()

    def take_up(self, *, replace: bool, make_room: Callable[[ServedTable], None]) -> list[str]:
        """See `Store.reload`."""
        with self._lock, self._gate:
            taken, dropped = self._tables.take_up(replace=replace, make_room=make_room)
            for table in self._tables.earlier():
                if table.spec.name in taken and not self._leave.later(table):
                    self._tables.drop_earlier(table)
                    dropped.append(table)
            if taken:
                self._tell(dropped)
        return taken

    def _drop(self, table: ServedTable) -> None:
        """Its time is up."""
        with suppress(Unavailable), self._lock, self._gate:
            if self._tables.drop_earlier(table):
                spec = table.spec
                log.info("table %r: generation %s is served no more", spec.name, spec.generation)
                self._tell([table])

    def _tell(self, dropped: list[ServedTable]) -> None:
        self._changed()
        for table in dropped:
            table.retire()

    def close(self) -> None:
        """Nothing is let go of by time any more."""
        self._leave.close()
