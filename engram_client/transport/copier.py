"""A client's end of the job ring (engram_client/arena/copying.py): its thread, its places, its jobs.

A job may be given up by the garbage collector in the middle of anything, so that takes no lock. The lock is
for opening jobs and for taking back what ended ones have used, and nobody waits for anything while he has it.
"""

from __future__ import annotations

import os
import threading

import numpy as np

from engram_client.arena import copying
from engram_client.arrays import address_of
from engram_client.deadline import Deadline
from engram_client.errors import TierstoreError
from engram_client.transport.attachment import View
from engram_client.transport.landing import Landing
from engram_client.transport.mailbox import SLICE_S, Request


class Copier:
    """The thread begins with `start` and ends with `close`. Thread safe; a forked child begins anew."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._words = np.zeros(copying.HEADER_WORDS + copying.PLACES * copying.JOB_WORDS, np.int64)
        self.address = address_of(self._words)
        self._jobs: dict[int, CopyJob] = {}  # by place
        self._opened = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        self._changing = threading.RLock()  # the collector may come in between

    def start(self) -> None:
        """Have a thread of this process at work, unless closed."""
        if self._pid != os.getpid():
            self._begin()
        with self._changing:
            if self._thread is None and not self._closed:
                copying.warm_kernels()
                thread = threading.Thread(
                    target=_work, args=(self._words, self.address), name="engram-copier", daemon=True
                )
                thread.start()
                self._thread = thread

    def follow(self, view: View, request: Request, positions: np.ndarray, landing: Landing) -> CopyJob | None:
        """Have the rows of a request that is on its way copied and stamped.

        Row i goes to entry positions[i], int64, of the landing. None where there is no place; then the
        request is the caller's to give back, else the job's.
        """
        slot, data = request.addresses
        words = (
            slot, request.number, view.mailbox.gone_at, data, address_of(positions), positions.size,
            1, 0, positions.size,
        )  # fmt: skip
        return self._open(copying.WAITING, words, view, request, (positions,), landing)

    def read(self, view: View, ids: np.ndarray, landing: Landing, deadline: Deadline) -> CopyJob | None:
        """Have ids, int64 [n], read from the arena, and the daemon asked for the rest; None as `follow`.

        `ids` must not change meanwhile. Raises MailboxBusy.
        """
        room = min(ids.size, view.entries_max)
        request = view.mailbox.take(room, view.part_bytes, -(-ids.size // room))
        slot, data = request.addresses
        mailbox, misses = view.mailbox, np.empty(ids.size, np.int64)
        words = (
            slot, request.number, mailbox.gone_at, data, address_of(misses), ids.size,
            0, 0, 0, address_of(view.words), address_of(ids), view.orders, room,
            mailbox.pending_at, request.slot, mailbox.doorbell,
        )  # fmt: skip
        request.prepare(view.request, deadline)
        job = self._open(copying.OPEN, words, view, request, (ids, misses), landing)
        if job is None:
            request.unsend()
            request.give_back()
        return job

    def _open(
        self,
        state: int,
        words: tuple[int, ...],
        view: View,
        request: Request,
        arrays: tuple[np.ndarray, ...],
        landing: Landing,
    ) -> CopyJob | None:
        with self._changing:
            self._take_back()
            place = self._opened % copying.PLACES
            if self._closed or self._thread is None or place in self._jobs:
                return None
            self._opened += 1
            job = CopyJob(self, place, self._opened, request, (self._words, view, landing, arrays))
            self._jobs[place] = job
            target = (landing.address, landing.word, landing.step, view.part_bytes)
            copying.open_job(self.address, place, self._opened, state, np.array(target + words, np.int64))
            return job

    def number_of(self, place: int) -> int:
        """Of the last request of a job."""
        at = copying.HEADER_WORDS + place * copying.JOB_WORDS + copying.NUMBER // 8
        return int(self._words[at])

    def _take_back(self) -> None:
        """What jobs have used that the thread is done with."""
        for place, job in list(self._jobs.items()):
            if job.note_end():
                self._jobs.pop(place, None)

    def take_back(self, *, wait: bool) -> None:
        """Free what ended jobs have used; unless `wait`, only where nobody else is at it."""
        if self._changing.acquire(blocking=wait):
            try:
                self._take_back()
            finally:
                self._changing.release()

    @property
    def is_own(self) -> bool:
        """Whether it was begun in this process."""
        return self._pid == os.getpid()

    def close(self) -> None:
        """End the thread; what it has not copied is abandoned. Idempotent."""
        if not self.is_own:
            return
        with self._changing:
            self._closed = True
            thread = self._thread
        if thread is not None:
            copying.stop(self.address)
            thread.join()
        self.take_back(wait=True)


def _work(words: np.ndarray, address: int) -> None:
    """`words` are kept for as long as the thread runs."""
    copying.copy_until_stopped(address, copying.PLACES, True)


class CopyJob:
    """One read on its way into staging memory. Any thread may use it."""

    def __init__(
        self, copier: Copier, place: int, generation: int, request: Request, kept: tuple[object, ...]
    ) -> None:
        self._copier = copier
        self._place = (copier.address, place, generation)
        self._request = request
        self._kept: tuple[object, ...] | None = kept  # what the thread reads and writes
        self._outcome: int | None = None
        self._failure: TierstoreError | None = None

    def note_end(self) -> bool:
        """Whether the thread is done with this job; called under the copier's lock."""
        state = copying.wait_ended(*self._place, 0, 0)
        if state == copying.REUSED or copying.OPEN <= state <= copying.WITHDRAWN:
            return False  # the first where the collector came in before it was opened
        if state == copying.FAILED:
            try:
                self._request.check()
            except TierstoreError as error:
                self._failure = error
        self._outcome = state
        self._request.number = self._copier.number_of(self._place[1])
        self._request.give_back()
        self._kept = None
        return True

    def state(self) -> int:
        """One of those of engram_client/arena/copying.py."""
        return self.wait_so_long(Deadline.after(0))

    def wait_so_long(self, deadline: Deadline) -> int:
        """The state once the job has ended, or in time."""
        scratch = np.empty(2, np.int64)
        while self._outcome is None:
            left_s = deadline.remaining_s()
            slice_ns = int(min(SLICE_S, SLICE_S if left_s is None else left_s) * 1e9)
            state: int = copying.wait_ended(*self._place, slice_ns, scratch.ctypes.data)
            if state == copying.REUSED:
                break
            if state > copying.WAITING or left_s == 0:
                return state
        assert self._outcome is not None, "a place is used again once its job's outcome is known"
        return self._outcome

    def failure(self) -> TierstoreError:
        """What the daemon said, of a failed job."""
        self._copier.take_back(wait=True)
        return self._failure or TierstoreError("the daemon failed without saying why")

    def withdraw(self) -> bool:
        """Have nothing more copied; False while something is, right now. From anywhere at any time."""
        settled = True
        if self._outcome is None:
            settled = copying.withdraw(*self._place) != copying.BUSY
        self._copier.take_back(wait=False)
        return settled
