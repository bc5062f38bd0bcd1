"""Look-ups that are begun now and waited for later, without a thread of this process.

A small batch is read from the arena at once, in microseconds; what it lacks the daemon puts into the
mailbox's memory, and waiting copies that to the rest. A large batch is left to the daemon whole, so the
caller goes on at once; its rows stay where the daemon has put them, and their memory is free for others
when the last array over it is gone; or they are copied out, where others need the room (mailbox.py).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engram_client.arrays import address_of
from engram_client.deadline import Deadline
from engram_client.errors import Cancelled, TierstoreError
from engram_client.transport.attachment import View
from engram_client.transport.base import LookupRequest, PendingRows
from engram_client.transport.handoff import NoSharedMemory
from engram_client.transport.mailbox import MailboxBusy, Request

SMALL_ENTRIES = 256  # some 20 us of copying
Lookup = Callable[[LookupRequest, np.ndarray, float | None], None]


def start_reading(
    view: View, request: LookupRequest, timeout_s: float | None, otherwise: Lookup
) -> PendingRows | None:
    """Begin; None where the mailbox has no room or the daemon has told its clients to stop.

    `otherwise` looks the rows up should the daemon go away.
    """
    ids, deadline = request.ids.reshape(-1), Deadline.after(timeout_s)
    if ids.size > view.staged_max:
        return None
    begin = _begin_small if ids.size <= SMALL_ENTRIES else _begin_large
    try:
        return begin(view, request, deadline, otherwise)
    except MailboxBusy:
        return None


def _begin_small(
    view: View, request: LookupRequest, deadline: Deadline, otherwise: Lookup
) -> PendingRows | None:
    ids = request.ids.reshape(-1)
    rows = np.empty((ids.size, view.part_bytes), np.uint8)
    found = view.read(request.ids.reshape(-1, view.orders), rows)
    if found is None:
        return None
    misses, masked = found
    if not misses.size:
        return ReadyRows(rows)
    orders = (misses % view.orders).astype(np.uint8)
    staged = view.mailbox.post(view.request, ids[misses], orders, view.part_bytes, deadline)
    view.count(ids.size, masked, ids.size - masked - misses.size)
    return StagedRows(staged, rows, misses, Again(request, deadline, otherwise))


def _begin_large(view: View, request: LookupRequest, deadline: Deadline, otherwise: Lookup) -> PendingRows:
    staged = view.mailbox.take(request.ids.size, view.part_bytes)
    staged.send(view.whole_request, request.ids.reshape(-1), deadline)
    return StagedRows(staged, None, None, Again(request, deadline, otherwise))


@dataclass(frozen=True)
class Again:
    """The look-up as it was asked for, should the daemon go away meanwhile."""

    request: LookupRequest
    deadline: Deadline
    otherwise: Lookup

    def look_up(self, shape: tuple[int, ...]) -> np.ndarray:
        rows = np.empty(shape, np.uint8)
        self.otherwise(self.request, rows, self.deadline.remaining_s())
        return rows


class ReadyRows:
    """See `PendingRows`: nothing was missing."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def done(self) -> bool:
        return True

    def result(self, timeout_s: float | None) -> np.ndarray:
        return self._rows

    def cancel(self) -> bool:
        return True


class StagedRows:
    """See `PendingRows`. Several threads may wait, and one may cancel meanwhile."""

    def __init__(
        self, staged: Request, rows: np.ndarray | None, misses: np.ndarray | None, again: Again
    ) -> None:
        """The daemon fills entries `misses` of `rows`, or with neither all of its own memory."""
        self._staged = staged
        self._found, self._misses = rows, misses
        self._again = again
        self._rows: np.ndarray | None = None
        self._failure: TierstoreError | None = None
        self._taking = threading.Lock()
        self._pid = os.getpid()

    def done(self) -> bool:
        return self._rows is not None or self._staged.settled()

    def result(self, timeout_s: float | None) -> np.ndarray:
        if self._rows is not None:
            return self._rows
        if self._failure is not None:
            raise self._failure
        if self._pid != os.getpid():
            raise Cancelled("this prefetch is that of the process this one is a fork of")
        try:
            answered = self._answered(Deadline.after(timeout_s))
            with self._taking:
                if self._rows is None:
                    self._rows = self._taken() if answered else self._again.look_up(self._shape())
                return self._rows
        except TierstoreError as error:
            self._failure = error
            raise

    def _shape(self) -> tuple[int, ...]:
        return (self._staged.rows if self._found is None else self._found).shape

    def _answered(self, patience: Deadline) -> bool:
        """Wait for the daemon; False where it is gone. Raises TimeoutError, DeadlineExceeded."""
        sooner = min((patience, self._again.deadline), key=lambda deadline: deadline.at_ns())
        try:
            if self._staged.settled() or self._staged.wait_so_long(sooner):
                return True
        except NoSharedMemory:
            return False
        self._again.deadline.check("waiting for the daemon to read rows")
        raise TimeoutError

    def _taken(self) -> np.ndarray:
        """The rows, if nobody has given their memory back meanwhile. Raises what the daemon says."""
        kept = self._staged.keep()
        if kept is None:
            raise Cancelled("this prefetch was cancelled")
        self._staged.check()
        if self._found is None or self._misses is None:
            return np.asarray(kept) if self._staged.may_stay() else np.array(kept)
        self._staged.spread(self._misses, address_of(self._found))
        return self._found

    def cancel(self) -> bool:
        self._staged.give_back()
        return True
