"""Threads that serve what clients did not find in the arena.

They sleep in epoll until a client rings. Rows go straight to where the client wants them. What a request
says is copied, then checked: a client can have its own request refused and its own memory filled, nothing
else. No client holds more than half of the threads, so one with much to read does not keep another waiting
for all of it.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Mapping
from typing import Literal

import numpy as np

from engram_client.arena.mailbox import (
    ADDRESS,
    AT,
    BY_KEY,
    BY_ROW,
    ENTRIES,
    HEADS,
    NUMBER,
    PART_ALIGNMENT_BYTES,
    TABLE,
    TIMEOUT_NS,
    WHOLE,
    WITHDRAWN,
    RequestMemory,
)
from engram_client.deadline import Deadline
from engram_client.errors import BadRequest, BatchTooLarge, Cancelled, TierstoreError, Unavailable
from tierstore.shm.guests import Guest, Guests
from tierstore.store import Store
from tierstore.store.table import Access, ServedTable

log = logging.getLogger(__name__)
RING = select.EPOLLIN | select.EPOLLET  # one thread wakes for one ring


class Workers:
    """Serve requests of `guests` until closed."""

    def __init__(self, store: Store, guests: Guests, count: int) -> None:
        self._store = store
        self._guests = guests
        self._tables: Mapping[int, ServedTable] = {
            table.number: table for table in map(store.table, store.tables())
        }
        self._each_max = max(1, count // 2)
        self._epoll = select.epoll()
        self._call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._call, RING)
        self._draining = self._closing = False
        self._busy = 0
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"tierstore-shm-{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def listen_to(self, guest: Guest) -> None:
        self._epoll.register(guest.doorbell, RING)

    def forget(self, guest: Guest) -> None:
        """It may hold its doorbell for as long as it likes."""
        self._epoll.unregister(guest.doorbell)

    def _work(self) -> None:
        while not self._closing:
            taken = self._guests.take_up(self._each_max)
            if taken is None:
                self._epoll.poll(maxevents=1)
                continue
            guest, slot, more = taken
            if more:
                os.eventfd_write(self._call, 1)  # for another thread
            self._serve(guest, slot)
            del guest, taken  # one that left is let go of before the next sleep
        os.eventfd_write(self._call, 1)  # the next one leaves as well

    def _serve(self, guest: Guest, slot: int) -> None:
        with self._changed:
            self._busy += 1
        words = guest.request_words(slot)
        text = b""
        try:
            self._read(guest, words)
        except TierstoreError as error:
            text = f"{error.code}\n{error}".encode()
        except Exception as error:
            log.exception("a request through shared memory failed unexpectedly")
            told = f"internal error ({type(error).__name__}); the daemon's log has the details"
            text = f"{TierstoreError.code}\n{told}".encode()
        guest.answer(slot, words[NUMBER], text)
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()

    def _read(self, guest: Guest, words: list[int]) -> None:
        """Serve one request. Raises what its client is to be told."""
        self._store.counters.add(shm_requests=1)
        if self._draining:
            raise Unavailable("the daemon is shutting down and takes no new requests; try again soon")
        if words[WITHDRAWN]:
            raise Cancelled("nobody waits for this request any more")
        timeout_s = words[TIMEOUT_NS] / 1e9 if words[TIMEOUT_NS] >= 0 else None
        try:
            access, ids, rows = self._checked(guest, words)
            self._store.lookup_entries(access, ids, rows, Deadline.after(timeout_s))
        except BadRequest:
            self._store.counters.add(shm_refused=1)
            raise

    def _checked(self, guest: Guest, words: list[int]) -> tuple[Access, np.ndarray, np.ndarray]:
        """How the entries are found, the entries, and where their rows go. Raises BadRequest."""
        table, entries = self._tables.get(words[TABLE]), words[ENTRIES]
        by, whole = words[ADDRESS] & ~WHOLE, bool(words[ADDRESS] & WHOLE)
        if table is None or by not in (BY_KEY, BY_ROW):
            raise BadRequest(f"no table has number {words[TABLE]}, or address {words[ADDRESS]} is unknown")
        if not 1 <= entries <= self._store.config.limits.request_ids_max:
            raise BatchTooLarge(f"{entries} entries in one request (limits.request_ids_max)")
        address: Literal["ngram", "row"] = "ngram" if by == BY_KEY else "row"
        heads = (words[HEADS] >> 32, words[HEADS] & 0xFFFFFFFF) if words[HEADS] else None
        access = table.access_entries(address, None, heads)
        part_bytes = access.part[1]
        memory, at = RequestMemory(entries, part_bytes), words[AT]
        if at < 0 or at % PART_ALIGNMENT_BYTES or at + memory.total_bytes > guest.geometry.data_bytes:
            raise BadRequest(f"the request's memory, {memory.total_bytes} bytes at {at}, is not its client's")
        ids = guest.data(at, 8 * entries).view(np.int64).copy()
        if not whole:
            orders = guest.data(at + memory.orders_at, entries).astype(np.int64)
            access = table.access_entries(address, orders, heads)
        return access, ids, guest.data(at + memory.rows_at, entries * part_bytes)

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests; whether those in work ended within so many seconds."""
        self._draining = True
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, timeout_s)

    def close(self) -> None:
        """Have the threads leave; one that hangs in a read is left behind."""
        self._closing = True
        os.eventfd_write(self._call, 1)
