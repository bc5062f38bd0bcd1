"""The clients that are attached, and whose request is taken up next."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import numpy as np

from engram_client.arena.mailbox import (
    COUNTERS_AT,
    REQUEST_WORDS,
    SLOT_BYTES,
    SLOTS_AT,
    TEXT_AT,
    TEXT_BYTES_MAX,
    TOUCHES_AT,
    MailboxGeometry,
)
from tierstore.kernels import mailbox as kernels
from tierstore.tiers.sealed import SealedMemory


class Guest:
    """One attached client: its connection, its mailbox and what we know of it."""

    def __init__(self, connection: socket.socket, user: int, geometry: MailboxGeometry) -> None:
        """Raises OSError where there is no memory for a mailbox."""
        self.connection = connection
        self.user = user
        self.geometry = geometry
        self.memory = SealedMemory("tierstore-mailbox", geometry.total_bytes)
        self.mailbox = self.memory.mapping.address
        self._bytes = np.asarray(self.memory.mapping)
        self.doorbell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.in_work = np.zeros(1, np.int64)  # bit s: slot s
        self.touches_seen = 0
        self.counted = np.zeros(4, np.int64)

    def request_words(self, slot: int) -> list[int]:
        """A copy: the client may change its own at any time."""
        start = SLOTS_AT + slot * SLOT_BYTES
        return [int(word) for word in self._bytes[start : start + 8 * REQUEST_WORDS].view(np.int64).copy()]

    def data(self, at: int, size_bytes: int) -> np.ndarray:
        """Bytes of request memory, uint8; they must be within the data."""
        assert 0 <= at <= at + size_bytes <= self.geometry.data_bytes
        start = self.geometry.data_at + at
        return self._bytes[start : start + size_bytes]

    def said_counters(self) -> np.ndarray:
        """What the client says it answered by itself, int64 [4], a copy."""
        return self._bytes[COUNTERS_AT : COUNTERS_AT + 32].view(np.int64).copy()

    def answer(self, slot: int, number: int, text: bytes) -> None:
        """Stamp a request as done; `text` says what went wrong, empty where nothing did."""
        start = SLOTS_AT + slot * SLOT_BYTES
        text = text[:TEXT_BYTES_MAX]
        self._bytes[start + TEXT_AT : start + TEXT_AT + len(text)] = np.frombuffer(text, np.uint8)
        kernels.put_down(self.in_work.ctypes.data, slot)
        kernels.answer(self.mailbox + start, number, len(text))

    def hang_up(self) -> None:
        """Whoever waits on the connection learns that it has ended."""
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it was gone

    def __del__(self) -> None:
        if hasattr(self, "doorbell"):
            os.close(self.doorbell)


class Guests:
    """Thread safe. Requests are taken up from one user after the other, and of each from one client after the
    other: who has many clients has no more turns than who has one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._schedule: list[Guest] = []
        self._turn = 0  # in the schedule
        self._taken = np.zeros(2, np.int64)
        self._set([])

    def _set(self, guests: list[Guest]) -> None:
        """Whose turn it is stays as it was: others may come and go as often as they like."""
        upcoming = self._schedule[self._turn :] + self._schedule[: self._turn]
        self._guests = guests
        self._schedule = in_turns(guests)
        self._turn = next((self._schedule.index(guest) for guest in upcoming if guest in guests), 0)
        self._mailboxes = np.array([guest.mailbox for guest in self._schedule], np.int64)
        self._in_work = np.array([guest.in_work.ctypes.data for guest in self._schedule], np.int64)

    def __iter__(self) -> Iterator[Guest]:
        return iter(self._guests)  # a list that is replaced, never changed

    def __len__(self) -> int:
        return len(self._guests)

    def of_user(self, user: int) -> int:
        """How many clients this user has attached."""
        return sum(guest.user == user for guest in self._guests)

    def add(self, guest: Guest) -> None:
        with self._lock:
            self._set([*self._guests, guest])

    def remove(self, guest: Guest) -> None:
        with self._lock:
            self._set([other for other in self._guests if other is not guest])

    def take_up(self, each_max: int) -> tuple[Guest, int, bool] | None:
        """A request to be served, its client and slot, and whether there may be more; None without any."""
        with self._lock:
            found = kernels.take_up(self._mailboxes, self._in_work, self._turn, each_max, self._taken)
            if not found:
                return None
            place, slot = self._taken.tolist()
            self._turn = (place + 1) % len(self._schedule)
            return self._schedule[place], slot, found > 1


def in_turns(guests: list[Guest]) -> list[Guest]:
    """Users alternate, each with its next client; who has fewer clients than others comes again with them."""
    of_users: dict[int, list[Guest]] = {}
    for guest in guests:
        of_users.setdefault(guest.user, []).append(guest)
    rounds = max(map(len, of_users.values()), default=0)
    return [clients[i % len(clients)] for i in range(rounds) for clients in of_users.values()]


def warm_kernels() -> None:
    """Load or compile what serving a guest calls, so that the first one does not wait for it."""
    memory, regions, counts = (np.zeros(shape, np.int64) for shape in (TOUCHES_AT // 8 + 1, (256, 2), 3))
    mailbox, word = int(memory.ctypes.data), np.zeros(1, np.int64)
    places = np.array([mailbox], np.int64)
    kernels.take_up(places, np.array([word.ctypes.data], np.int64), 0, 1, np.zeros(2, np.int64))
    kernels.put_down(word.ctypes.data, 0)
    kernels.answer(mailbox + SLOTS_AT, 1, 0)
    kernels.count_touches(mailbox, 1, 0, regions, counts)
