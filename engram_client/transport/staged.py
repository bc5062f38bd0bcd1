"""Look-ups that are begun now and waited for later: their rows come together in a mailbox's memory.

A small batch is read from the arena at once, in microseconds, and only what is missing is left to the
daemon. A large one is left to the daemon whole, so the caller goes on at once. Neither needs a thread of
this process. The rows lie at one address from the beginning to the end, and are handed out as a copy:
the memory is free for the next look-up then.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np

from engram_client.arena.mailbox import WHOLE
from engram_client.deadline import Deadline
from engram_client.errors import Cancelled, TierstoreError
from engram_client.transport.attachment import View
from engram_client.transport.base import LookupRequest
from engram_client.transport.handoff import NoSharedMemory
from engram_client.transport.mailbox import MailboxBusy, Request

SMALL_ENTRIES = 256  # some 20 us of copying
Lookup = Callable[[LookupRequest, np.ndarray, float | None], None]


def start_reading(
    view: View, request: LookupRequest, timeout_s: float | None, otherwise: Lookup
) -> StagedRows | None:
    """Begin; None where the mailbox has no room or the daemon has told its clients to stop.

    `otherwise` looks the rows up should the daemon go away.
    """
    ids, deadline = request.ids.reshape(-1), Deadline.after(timeout_s)
    if ids.size > view.staged_max:
        return None
    try:
        staged = view.mailbox.take(ids.size, view.part_bytes)
    except MailboxBusy:
        return None
    rows = StagedRows(staged, request, deadline, otherwise)
    table, address, heads = view.request
    wanted = _left_to_the_daemon(view, request, staged)
    if wanted is None:
        rows.cancel()
        return None
    if wanted.size:
        staged.send((table, address | WHOLE, heads), wanted, deadline)
    return rows


def _left_to_the_daemon(view: View, request: LookupRequest, staged: Request) -> np.ndarray | None:
    """The ids with -1 for those that are done, none where all are; None where the daemon does not serve."""
    ids = request.ids.reshape(-1)
    if ids.size > SMALL_ENTRIES:
        masked = ids == -1
        count = int(np.count_nonzero(masked))
        if count:
            staged.rows[masked] = 0
        view.count(ids.size, count, 0)
        return ids
    found = view.read(request.ids.reshape(-1, view.orders), staged.rows)
    if found is None:
        return None
    misses, masked_count = found
    if not misses.size:
        return misses
    view.count(ids.size, masked_count, ids.size - masked_count - misses.size)
    wanted = np.full(ids.size, -1, np.int64)
    wanted[misses] = ids[misses]
    return wanted


class StagedRows:
    """See `PendingRows`. Several threads may wait, and one may cancel meanwhile."""

    def __init__(
        self, staged: Request, request: LookupRequest, deadline: Deadline, otherwise: Lookup
    ) -> None:
        self._staged = staged
        self._request = request
        self._deadline = deadline
        self._otherwise = otherwise
        self._rows: np.ndarray | None = None
        self._failure: TierstoreError | None = None
        self._cancelled = False
        self._taking = threading.Lock()
        self._pid = os.getpid()

    def done(self) -> bool:
        return self._rows is not None or self._cancelled or self._staged.settled()

    def result(self, timeout_s: float | None) -> np.ndarray:
        if self._rows is not None:
            return self._rows
        if self._failure is not None:
            raise self._failure
        if self._pid != os.getpid():
            raise Cancelled("this prefetch is that of the process this one is a fork of")
        try:
            gone = not self._answered(Deadline.after(timeout_s))
            with self._taking:
                return self._taken(gone)
        except TierstoreError as error:
            self._failure = error
            raise

    def _answered(self, patience: Deadline) -> bool:
        """Wait for the daemon; False where it is gone. Raises TimeoutError, DeadlineExceeded."""
        sooner = min((patience, self._deadline), key=lambda deadline: deadline.at_ns())
        try:
            if self._staged.settled() or self._staged.wait_so_long(sooner):
                return True
        except NoSharedMemory:
            return False
        self._deadline.check("waiting for the daemon to read rows")
        raise TimeoutError

    def _taken(self, gone: bool) -> np.ndarray:
        """The rows out of the memory they share with others as soon as it is given back."""
        if self._rows is None:
            if gone:
                rows = np.empty_like(self._staged.rows)
                self._otherwise(self._request, rows, self._deadline.remaining_s())
            else:
                self._staged.check()
                rows = self._staged.rows.copy()
            if self._cancelled:  # then what was copied may be another's
                raise Cancelled("this prefetch was cancelled")
            self._rows = rows
            self._staged.give_back()
        return self._rows

    def cancel(self) -> bool:
        self._cancelled = True
        self._staged.give_back()
        return True
