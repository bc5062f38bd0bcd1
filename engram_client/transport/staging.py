"""Reads into a staging ring that no thread of Python has a part in, where the daemon is on this machine.

The caller copies the hits of a small batch at once. What it lacks, and a large batch whole, goes to the
copier: a thread that never enters Python copies hits, waits for what the daemon reads, and stamps. Should the
daemon go away, the rows are looked up, and stamped, by whoever waits for them.
"""

from __future__ import annotations

import threading

import numpy as np

from engram_client.arena import copying
from engram_client.deadline import Deadline
from engram_client.errors import Cancelled, TierstoreError
from engram_client.transport.attachment import View
from engram_client.transport.base import Filling, LookupRequest
from engram_client.transport.copier import Copier, CopyJob
from engram_client.transport.landing import Landing
from engram_client.transport.mailbox import MailboxBusy
from engram_client.transport.staged import SMALL_ENTRIES, Again, Lookup

COPYING_S = 0.001


class Landed:
    """See `Filling`: the rows were there at once."""

    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float | None) -> None:
        pass

    def give_up(self) -> bool:
        return True


LANDED = Landed()


def start_filling(
    view: View,
    copier: Copier,
    request: LookupRequest,
    landing: Landing,
    timeout_s: float | None,
    otherwise: Lookup,
) -> Filling | None:
    """Begin; None where the mailbox or the copier has no room or the daemon takes no more requests.

    `otherwise` looks the rows up should the daemon go away.
    """
    if not view.entries_max:  # not even one entry has room
        return None
    again = Again(request, Deadline.after(timeout_s), otherwise)
    begin = _begin_small if request.ids.size <= SMALL_ENTRIES else _begin_large
    try:
        return begin(view, copier, landing, again)
    except MailboxBusy:
        return None


def _begin_small(view: View, copier: Copier, landing: Landing, again: Again) -> Filling | None:
    ids = again.request.ids.reshape(-1)
    found = view.read(ids.reshape(-1, view.orders), landing.rows)
    if found is None:
        return None
    misses, masked = found
    if not misses.size:
        copying.stamp(landing.word, landing.step)
        return LANDED
    if misses.size > view.entries_max:
        return None
    orders = (misses % view.orders).astype(np.uint8)
    request = view.mailbox.post(view.request, ids[misses], orders, view.part_bytes, again.deadline)
    job = copier.follow(view, request, misses, landing)
    if job is None:
        request.give_back()
        return None
    view.count(ids.size, masked, ids.size - masked - misses.size)
    return CopiedRows(job, landing, again)


def _begin_large(view: View, copier: Copier, landing: Landing, again: Again) -> Filling | None:
    job = copier.read(view, again.request.ids.reshape(-1), landing, again.deadline)
    return None if job is None else CopiedRows(job, landing, again)


class CopiedRows:
    """See `Filling`. Several threads may wait, and one may give up meanwhile."""

    def __init__(self, job: CopyJob, landing: Landing, again: Again) -> None:
        self._job = job
        self._landing = landing
        self._again = again
        self._failure: TierstoreError | None = None
        self._landed = False
        self._looking_up = threading.Lock()

    def done(self) -> bool:
        return self._job.state() > copying.WAITING

    def wait(self, timeout_s: float | None) -> None:
        if self._landed:
            return
        if self._failure is not None:
            raise self._failure
        try:
            self._wait(Deadline.after(timeout_s))
        except TierstoreError as error:
            self._failure = error
            raise
        self._landed = True

    def _wait(self, patience: Deadline) -> None:
        """Raises TimeoutError, and what went wrong."""
        deadline = self._again.deadline
        state = self._job.wait_so_long(min((patience, deadline), key=lambda d: d.at_ns()))
        if state <= copying.WAITING:
            if deadline.remaining_s() != 0:
                raise TimeoutError
            state = self._withdrawn()
        if state == copying.FAILED:
            raise self._job.failure()
        if state == copying.GONE:
            self._look_up_again()
        elif state != copying.LANDED:
            deadline.check("waiting for the daemon to read rows")
            raise Cancelled("this step was given up")

    def _withdrawn(self) -> int:
        """What is too late must not be stamped, unless that comes first; the state then."""
        while not self._job.withdraw():
            self._job.wait_so_long(Deadline.after(COPYING_S))
        return self._job.state()

    def _look_up_again(self) -> None:
        with self._looking_up:
            if not self._landed:
                entries = len(self._again.request.ids)
                rows = self._again.look_up((entries, self._landing.rows.size // entries))
                if not self._landing.land(rows):
                    raise Cancelled("this step was given up")
                self._landed = True

    def give_up(self) -> bool:
        self._landing.give_up()
        settled = self._job.withdraw()
        return settled and self._landing.settled
