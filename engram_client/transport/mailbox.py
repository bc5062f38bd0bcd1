"""A client's end of its mailbox: slots and memory for requests, and the requests on their way."""

from __future__ import annotations

import os
import threading

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
        self._abandoned: list[Request] = []

    def entries_max(self, part_bytes: int) -> int:
        """Entries of one request, 0 where not even one fits."""
        return entries_within(self._geometry.data_bytes // SHARE, part_bytes)

    def post(
        self,
        words: tuple[int, int, int],
        entries: np.ndarray,
        orders: np.ndarray,
        part_bytes: int,
        deadline: Deadline,
    ) -> Request:
        """Ask for rows of single entries; `words` are the slot's table, address and heads.

        `entries` int64 [n], `orders` of each, uint8 [n]. Raises MailboxBusy.
        """
        memory = RequestMemory(entries.size, part_bytes)
        request = self._take(memory)
        data = self._bytes[self._geometry.data_at + request.at :]
        data[: 8 * entries.size].view(np.int64)[:] = entries
        data[memory.orders_at : memory.orders_at + entries.size] = orders
        left_s = deadline.remaining_s()
        table, address, heads = words
        timeout_ns = -1 if left_s is None else int(left_s * 1e9)
        request.words[:] = (
            request.number, table, address, entries.size, request.at, heads, timeout_ns, 0,
        )  # fmt: skip
        requests.post(self.address + PENDING_AT, request.slot)
        os.eventfd_write(self._doorbell, 1)
        return request

    def _take(self, memory: RequestMemory) -> Request:
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
        """Take back what was given up and is answered by now."""
        still = [request for request in self._abandoned if not request.answered()]
        for request in set(self._abandoned) - set(still):
            self._free(request)
        self._abandoned = still

    def _free(self, request: Request) -> None:
        first = request.at // GRANULE_BYTES
        self._taken[first : first + request.granules] = bytes(request.granules)
        self._free_slots.append(request.slot)

    def give_back(self, request: Request) -> None:
        """The request's memory is free once the daemon is done with it."""
        with self._lock:
            if request.answered():
                self._free(request)
            else:
                request.words[WITHDRAWN] = 1
                self._abandoned.append(request)

    def slot_at(self, slot: int) -> int:
        return self.address + SLOTS_AT + slot * SLOT_BYTES

    def slot_bytes(self, slot: int) -> np.ndarray:
        start = SLOTS_AT + slot * SLOT_BYTES
        return self._bytes[start : start + SLOT_BYTES]

    def data_at(self, offset: int) -> int:
        return self.address + self._geometry.data_at + offset

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
    """Rows asked for through a mailbox. Give it back in any case."""

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
        self.words = self._slot_bytes[: 8 * REQUEST_WORDS].view(np.int64)

    def answered(self) -> bool:
        return int(self._slot_bytes[DONE_AT : DONE_AT + 8].view(np.int64)[0]) == self.number

    def wait(self, deadline: Deadline) -> None:
        """Return once the rows are there. Raises what the daemon says, DeadlineExceeded, MailboxGone."""
        scratch = np.empty(2, np.int64)
        slot, gone = self._mailbox.slot_at(self.slot), self._mailbox.gone_at
        while True:
            left_s = deadline.remaining_s()
            slice_ns = int(min(SLICE_S, SLICE_S if left_s is None else left_s) * 1e9)
            found = requests.wait_done(slot, self.number, gone, slice_ns, scratch.ctypes.data)
            if found == requests.DONE:
                return self._check()
            if found == requests.GONE:
                raise MailboxGone("the daemon went away")
            if left_s == 0:
                raise deadline.exceeded("waiting for the daemon to read rows")

    def _check(self) -> None:
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
        self._mailbox.give_back(self)
