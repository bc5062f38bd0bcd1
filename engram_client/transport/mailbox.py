"""A client's end of its mailbox: slots and memory for requests, and the requests on their way.

Rows of a large prefetch may stay where the daemon has put them, for as long as an array over them lives. So
that such arrays never take what later requests need, this goes only while one more request of the largest
size finds room in one piece, and a share of the slots is free; else rows are copied out and their memory
is given back. What is kept is never copied later: an array does not move.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque

import numpy as np

from engram_client.arena import requests
from engram_client.arena.mailbox import (
    COUNTERS_AT,
    DONE_AT,
    PENDING_AT,
    REQUEST_WORDS,
    SLOT_BYTES,
    SLOTS,
    SLOTS_AT,
    TEXT_AT,
    TEXT_BYTES_AT,
    TEXT_BYTES_MAX,
    WITHDRAWN,
    MailboxGeometry,
    RequestMemory,
    entries_within,
)
from engram_client.arena.mapping import SharedMapping
from engram_client.deadline import Deadline
from engram_client.errors import BY_CODE, TierstoreError
from engram_client.transport.handoff import NoSharedMemory

log = logging.getLogger(__name__)
GRANULE_BYTES = 4096  # of request memory
SHARE = 4  # a request takes at most so great a part of the memory, so that several fit
SLICE_S = 0.1  # of a wait, so that signals are noticed


class MailboxBusy(NoSharedMemory):
    """No slot or no memory is free now; internal: the call goes by gRPC."""


class MailboxGone(NoSharedMemory):
    """The daemon went away while a request was waiting; internal."""


class Mailbox:
    """Made from descriptors of a welcome; both stay the caller's. Thread safe."""

    def __init__(self, memory: int, doorbell: int, geometry: MailboxGeometry) -> None:
        self._map = SharedMapping(memory, geometry.total_bytes)
        self._bytes = np.asarray(self._map)
        self._doorbell = os.dup(doorbell)
        self._geometry = geometry
        self.address = self._map.address
        self.touch_mask = geometry.touches - 1
        self._gone = np.zeros(1, np.int64)
        self._lock = threading.Lock()
        self._free_slots = list(range(SLOTS))
        self._numbers = [0] * SLOTS
        self._taken = bytearray(geometry.data_bytes // GRANULE_BYTES)
        self._largest = bytes(len(self._taken) // SHARE)  # as free memory looks
        self._returned: deque[Request] = deque()  # appended to without the lock
        self.copied_out = self.busy = 0  # results not kept in it, look-ups that found no room in it
        self._pid = os.getpid()

    def entries_max(self, part_bytes: int, share: int = SHARE) -> int:
        """Entries of one request that takes such a part of the memory, 0 where not even one fits."""
        return entries_within(self._geometry.data_bytes // share, part_bytes)

    def post(
        self,
        words: tuple[int, int, int],
        entries: np.ndarray,
        orders: np.ndarray,
        part_bytes: int,
        deadline: Deadline,
    ) -> Request:
        """Ask for rows of single entries, int64 [n], of these orders, uint8 [n].

        `words` are the slot's table, address and heads. Raises MailboxBusy.
        """
        request = self.take(entries.size, part_bytes)
        request.orders[:] = orders
        request.send(words, entries, deadline)
        return request

    def take(self, entries: int, part_bytes: int) -> Request:
        """A slot and memory for a request that is not sent yet. Raises MailboxBusy."""
        memory = RequestMemory(entries, part_bytes)
        granules = -(-memory.total_bytes // GRANULE_BYTES)
        with self._lock:
            self._reap()
            first = self._taken.find(bytes(granules))
            if first < 0 or not self._free_slots:
                raise MailboxBusy("its requests on the way take all slots or memory")
            slot = self._free_slots.pop()
            self._taken[first : first + granules] = b"\1" * granules
            self._numbers[slot] += 1
            return Request(self, slot, self._numbers[slot], first * GRANULE_BYTES, granules, memory)

    def _reap(self) -> None:
        """Take back what was given back, as far as the daemon is done with it."""
        for _ in range(len(self._returned)):
            request = self._returned.popleft()
            if not request.settled():
                self._returned.append(request)
                continue
            first = request.at // GRANULE_BYTES
            self._taken[first : first + request.granules] = bytes(request.granules)
            self._free_slots.append(request.slot)

    def may_keep(self) -> bool:
        """Whether rows may stay here; False, which is counted, where later requests need their memory."""
        with self._lock:
            self._reap()
            enough = len(self._free_slots) >= SLOTS // SHARE and self._taken.find(self._largest) >= 0
            self.copied_out += not enough
            return enough

    def note_busy(self) -> None:
        """A look-up goes by gRPC for want of room; said once."""
        with self._lock:
            self.busy += 1
            first = self.busy == 1
        if first:
            log.warning(
                "no room in the mailbox for a look-up (%d bytes, %d requests): it goes by gRPC, 0.2 ms and "
                "more; wait for prefetches that are open, or raise shm.response_bytes; further ones are "
                "counted (client_mailbox_busy)",
                self._geometry.data_bytes, SLOTS,
            )  # fmt: skip

    def give_back(self, request: Request) -> None:
        """Its memory is free once the daemon is done with it. May be called from anywhere at any time."""
        if self._pid == os.getpid():
            request.words[WITHDRAWN] = 1
            self._returned.append(request)

    def ring(self, slot: int) -> None:
        requests.post(self.address + PENDING_AT, slot)
        os.eventfd_write(self._doorbell, 1)

    def slot_at(self, slot: int) -> int:
        return self.address + SLOTS_AT + slot * SLOT_BYTES

    def slot_bytes(self, slot: int) -> np.ndarray:
        start = SLOTS_AT + slot * SLOT_BYTES
        return self._bytes[start : start + SLOT_BYTES]

    def data_at(self, offset: int) -> int:
        return self.address + self._geometry.data_at + offset

    def data(self, at: int, size_bytes: int) -> np.ndarray:
        """Bytes of request memory, uint8."""
        start = self._geometry.data_at + at
        return self._bytes[start : start + size_bytes]

    @property
    def gone_at(self) -> int:
        return int(self._gone.ctypes.data)

    @property
    def counters(self) -> np.ndarray:
        """Look-ups, keys, masked and hits that this client answered by itself, int64 [4]."""
        return self._bytes[COUNTERS_AT : COUNTERS_AT + 32].view(np.int64)

    def end(self) -> None:
        """The daemon is gone: whoever waits is told."""
        requests.end_all_waits(self.address, self.gone_at)

    def __del__(self) -> None:
        if hasattr(self, "_doorbell"):
            os.close(self._doorbell)


class Request:
    """Rows asked for through a mailbox. Give it back in any case; until then its memory stays its own."""

    def __init__(
        self, mailbox: Mailbox, slot: int, number: int, at: int, granules: int, memory: RequestMemory
    ) -> None:
        self._mailbox = mailbox
        self.slot = slot
        self.number = number
        self.at = at
        self.granules = granules
        self._memory = memory
        self._slot_bytes = mailbox.slot_bytes(slot)
        self._sent = False
        self._mine = [True]  # until somebody lets go of its memory or keeps it
        self.words = self._slot_bytes[: 8 * REQUEST_WORDS].view(np.int64)

    @property
    def orders(self) -> np.ndarray:
        """Of each entry, uint8 [n]."""
        return self._mailbox.data(self.at + self._memory.orders_at, self._memory.entries)

    @property
    def rows(self) -> np.ndarray:
        """Where the rows come to lie, uint8 [n, part bytes]."""
        entries, part_bytes = self._memory.entries, self._memory.part_bytes
        rows = self._mailbox.data(self.at + self._memory.rows_at, entries * part_bytes)
        return rows.reshape(entries, part_bytes)

    def send(self, words: tuple[int, int, int], entries: np.ndarray, deadline: Deadline) -> None:
        """Have the daemon fill the rows of `entries`, int64 [n]; those of -1 are left as they are."""
        self._mailbox.data(self.at, 8 * entries.size).view(np.int64)[:] = entries
        left_s = deadline.remaining_s()
        table, address, heads = words
        timeout_ns = -1 if left_s is None else int(left_s * 1e9)
        self.words[:] = (self.number, table, address, entries.size, self.at, heads, timeout_ns, 0)
        self._sent = True
        self._mailbox.ring(self.slot)

    def answered(self) -> bool:
        return int(self._slot_bytes[DONE_AT : DONE_AT + 8].view(np.int64)[0]) >= self.number

    def settled(self) -> bool:
        """Whether the daemon writes no more into its memory."""
        return not self._sent or self.answered()

    def wait(self, deadline: Deadline) -> None:
        """Return once the rows are there. Raises what the daemon says, DeadlineExceeded, MailboxGone."""
        if not self.wait_so_long(deadline):
            raise deadline.exceeded("waiting for the daemon to read rows")
        self.check()

    def wait_so_long(self, deadline: Deadline) -> bool:
        """Whether the daemon has answered in time, well or not. Raises MailboxGone."""
        scratch = np.empty(2, np.int64)
        slot, gone = self._mailbox.slot_at(self.slot), self._mailbox.gone_at
        while True:
            left_s = deadline.remaining_s()
            slice_ns = int(min(SLICE_S, SLICE_S if left_s is None else left_s) * 1e9)
            found = requests.wait_done(slot, self.number, gone, slice_ns, scratch.ctypes.data)
            if found == requests.DONE:
                return True
            if found == requests.GONE:
                raise MailboxGone("the daemon went away")
            if left_s == 0:
                return False

    def check(self) -> None:
        """Raises what the daemon says went wrong."""
        if not self._sent:
            return
        text_bytes = int(self._slot_bytes[TEXT_BYTES_AT : TEXT_BYTES_AT + 8].view(np.int64)[0])
        if text_bytes:
            text = self._slot_bytes[TEXT_AT : TEXT_AT + min(text_bytes, TEXT_BYTES_MAX)].tobytes()
            code, _, message = text.decode(errors="replace").partition("\n")
            raise BY_CODE.get(code, TierstoreError)(message)

    def spread(self, positions: np.ndarray, out: int) -> None:
        """Copy row parts to their places in a buffer at address `out`; `positions` int64 [n]."""
        rows = self._mailbox.data_at(self.at + self._memory.rows_at)
        requests.spread_parts(rows, positions.ctypes.data, positions.size, self._memory.part_bytes, out)

    def give_back(self) -> None:
        """Idempotent; may be called from anywhere at any time."""
        if self._let_go():
            self._mailbox.give_back(self)

    def may_stay(self) -> bool:
        """Whether its rows may be kept where they are; see `Mailbox.may_keep`."""
        return self._mailbox.may_keep()

    def keep(self) -> KeptRows | None:
        """The rows for as long as what this returns, or an array of it, is kept; None once given back."""
        return KeptRows(self, self._mailbox) if self._let_go() else None

    def _let_go(self) -> bool:
        """True once. One step, whoever comes in between."""
        try:
            return self._mine.pop()
        except IndexError:
            return False


class KeptRows:
    """Rows of an answered request, uint8 [n, part bytes]: numpy.asarray(kept) keeps it alive."""

    def __init__(self, request: Request, mailbox: Mailbox) -> None:
        self._request = request
        self._mailbox = mailbox
        self.__array_interface__ = request.rows.__array_interface__

    def __del__(self) -> None:
        self._mailbox.give_back(self._request)
