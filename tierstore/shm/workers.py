"""Threads that serve what clients did not find in the arena.

They sleep in epoll until a client rings. Rows go straight to where the client wants them. What a request
says is copied, then checked: a client can have its own request refused and its own memory filled, nothing
else. No client holds more than half of the threads, so one with much to read does not keep another waiting
for all of it; and users take turns, so many clients of one do not either.
"""

from __future__ import annotations

import logging
import os
import select
import threading
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
from engram_client.errors import (
    BadRequest,
    BatchTooLarge,
    Cancelled,
    GenerationMismatch,
    TierstoreError,
    Unavailable,
)
from engram_client.transport.base import LookupRequest
from tierstore.shm.guests import Guest, Guests
from tierstore.store import Store
from tierstore.store.table import ServedTable

log = logging.getLogger(__name__)
RING = select.EPOLLIN | select.EPOLLET  # one thread wakes for one ring


class Workers:
    """Serve requests of `guests` until closed."""

    def __init__(self, store: Store, guests: Guests, count: int) -> None:
        self._store = store
        self._guests = guests
        self._retired: dict[int, str] = {}  # numbers of generations that are served no more, and their tables
        self._tables: dict[int, ServedTable] = {}
        self.follow_tables()
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

    def follow_tables(self) -> None:
        """Serve the store's tables of now."""
        now = {table.number: table for table in self._store.all_tables()}
        gone = {n: table.spec.name for n, table in self._tables.items() if n not in now}
        self._retired = {**self._retired, **gone}
        self._tables = now

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
        try:
            self._look_up(guest, words)
        except BadRequest:
            self._store.counters.add(shm_refused=1)
            raise

    def _look_up(self, guest: Guest, words: list[int]) -> None:
        """Check and serve. What a request says is copied before it is checked."""
        table, by = self._tables.get(words[TABLE]), words[ADDRESS] & ~WHOLE
        if table is None and (name := self._retired.get(words[TABLE])):
            raise GenerationMismatch(
                f"table {name!r}: the request is for a generation that is served no more; the table was "
                "packed again, fetch it anew with client.table(name)"
            )
        if table is None or by not in (BY_KEY, BY_ROW):
            raise BadRequest(f"no table has number {words[TABLE]}, or address {words[ADDRESS]} is unknown")
        address: Literal["ngram", "row"] = "ngram" if by == BY_KEY else "row"
        heads = (words[HEADS] >> 32, words[HEADS] & 0xFFFFFFFF) if words[HEADS] else None
        access = table.access_entries(address, np.empty(0, np.int64), heads)
        memory = self._checked_memory(guest, words, access.part[1])
        ids = guest.data(words[AT], 8 * memory.entries).view(np.int64).copy()
        rows = guest.data(words[AT] + memory.rows_at, memory.entries * memory.part_bytes)
        timeout_s = words[TIMEOUT_NS] / 1e9 if words[TIMEOUT_NS] >= 0 else None
        if words[ADDRESS] & WHOLE:
            if ids.size % access.orders:
                raise BadRequest(f"{ids.size} entries are no n-grams of {access.orders} orders")
            ids = ids.reshape(-1, access.orders) if by == BY_KEY else ids
            request = LookupRequest(table.spec.name, table.spec.generation, address, ids, heads)
            self._store.lookup(request, rows, timeout_s)
        else:
            orders = guest.data(words[AT] + memory.orders_at, memory.entries).astype(np.int64)
            access = table.access_entries(address, orders, heads)
            self._store.lookup_entries(access, ids, rows, Deadline.after(timeout_s))

    def _checked_memory(self, guest: Guest, words: list[int], part_bytes: int) -> RequestMemory:
        """Raises BadRequest where it is not all within the client's data."""
        entries, at = words[ENTRIES], words[AT]
        if not 1 <= entries <= self._store.config.limits.request_ids_max:
            raise BatchTooLarge(f"{entries} entries in one request (limits.request_ids_max)")
        memory = RequestMemory(entries, part_bytes)
        if at < 0 or at % PART_ALIGNMENT_BYTES or at + memory.total_bytes > guest.geometry.data_bytes:
            raise BadRequest(f"the request's memory, {memory.total_bytes} bytes at {at}, is not its client's")
        return memory

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests; whether those in work ended within so many seconds."""
        self._draining = True
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, timeout_s)

    def close(self) -> None:
        """Have the threads leave; one that hangs in a read is left behind."""
        self._closing = True
        os.eventfd_write(self._call, 1)
