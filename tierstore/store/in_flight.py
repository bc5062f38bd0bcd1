"""One read for everybody who wants a record: who reads it, and how the others wait.

A look-up claims the records it misses under a *ticket*. Records that are already claimed are
left to their reader; the look-up waits for that ticket and then looks into DRAM again. If the record
is not there (the read failed, or it was evicted at once) the look-up reads it itself, so nobody
inherits another request's error.

The table is bounded. When it is full, records are read without being entered: a second read of
the same record costs time, never correctness.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from engram_client.deadline import Deadline
from tierstore.kernels import in_flight as table

CAPACITY_RECORDS = 1 << 16
HINT_PATIENCE_S = 0.02
WAITING = "waiting for another request to read the same rows"


@dataclass(frozen=True)
class Reader:
    """Somebody who reads records that others want."""

    done: threading.Event
    hint: bool  # nobody waits for it yet, and it may take long


@dataclass(frozen=True)
class Claim:
    """What one look-up may read (`mine`, bool [n]) and whom it must wait for."""

    mine: np.ndarray
    others: tuple[Reader, ...]


class InFlight:
    """Thread safe; the lock is held for one kernel call at a time."""

    def __init__(self, capacity_records: int = CAPACITY_RECORDS) -> None:
        places = 2 * capacity_records
        self._keys = np.full(places, table.EMPTY, np.int64)
        self._owners = np.zeros(places, np.int64)
        self._tickets = np.zeros(places, np.int64)
        self._room = capacity_records
        self._readers: dict[int, Reader] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    @contextmanager
    def claim(self, keys: np.ndarray, owners: np.ndarray, *, hint: bool = False) -> Iterator[Claim]:
        """Claim distinct records, int64 [n]; on leaving they are released and waiters wake."""
        found = np.empty(keys.size, np.int64)
        entries = (self._keys, self._owners, self._tickets)
        ticket, reader = next(self._numbers), Reader(threading.Event(), hint)
        self._readers[ticket] = reader
        try:  # from here on: a signal must leave no entry behind, or whoever wants it would wait
            with self._lock:
                self._room -= table.claim(*entries, keys, owners, ticket, self._room, found)
                mine = found == ticket
                others = tuple(self._readers[t] for t in set(found[~mine].tolist()))
            yield Claim(mine, others)
        finally:
            with self._lock:
                self._room += table.release(*entries, keys, owners, ticket)
                del self._readers[ticket]
            reader.done.set()


def wait_for(readers: tuple[Reader, ...], deadline: Deadline, *, hint: bool) -> bool:
    """Wait until all readers are done; False where a hint's reading takes too long for a demand.

    A hint may be reading for seconds what somebody needs now. After `HINT_PATIENCE_S` it is cheaper to read a
    few records twice. Raises DeadlineExceeded.
    """
    patience = Deadline.after(None if hint else HINT_PATIENCE_S)
    for reader in readers:
        if reader.hint and not hint and not reader.done.wait(_sooner(patience, deadline)):
            deadline.check(WAITING)
            return False
        if not reader.done.wait(deadline.remaining_s()):
            raise deadline.exceeded(WAITING)
    return True


def _sooner(patience: Deadline, deadline: Deadline) -> float | None:
    left = [s for s in (patience.remaining_s(), deadline.remaining_s()) if s is not None]
    return min(left, default=None)
