"""What clients did on their own, brought to the store: the reads they touch and the look-ups they count.

A thread empties the rings of touches every few milliseconds while there is something in them, and less
and less often while there is not. A ring that fills up in between loses its oldest touches.
"""

from __future__ import annotations

import threading

import numpy as np

from engram_client.arena.mailbox import HITS, KEYS, LOOKUPS, MASKED, TOUCH_REGIONS
from tierstore.kernels.mailbox import COUNTED, LOST, WRONG, count_touches
from tierstore.shm.guests import Guest, Guests
from tierstore.store import Store

PERIOD_S = (0.004, 0.1)  # while there is much to do, and after a while without
AT_ONCE_MAX = 1 << 40  # more than this no client counts between two looks


class Ledger:
    """Follows `guests` until closed."""

    def __init__(self, store: Store, guests: Guests) -> None:
        self._store = store
        self._guests = guests
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tierstore-touches", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        pause_s = PERIOD_S[0]
        while not self._closing.wait(pause_s):
            found = self.collect()
            pause_s = PERIOD_S[0] if found else min(2 * pause_s, PERIOD_S[1])

    def collect(self) -> int:
        """Take in all there is now; how many touches that was."""
        with self._lock:
            regions = [r for arena in self._store.arenas().values() for r in arena.regions()]
            places = np.zeros((TOUCH_REGIONS, 2), np.int64)
            for region in regions:  # held until the end: they are read by address
                places[region.number % TOUCH_REGIONS] = region.index, region.geometry.sets
            return sum(self._take_in(guest, places) for guest in self._guests)

    def settle(self, guest: Guest) -> None:
        """The last of a guest that has left."""
        with self._lock:
            self._add_counters(guest)

    def _take_in(self, guest: Guest, places: np.ndarray) -> int:
        self._add_counters(guest)
        counts = np.zeros(3, np.int64)
        guest.touches_seen = count_touches(
            guest.mailbox, guest.geometry.touches, guest.touches_seen, places, counts
        )
        lost = counts[LOST] + counts[WRONG]
        if counts.any():
            self._store.counters.add(shm_touches=counts[COUNTED], shm_touches_lost=lost)
        return int(counts[COUNTED])

    def _add_counters(self, guest: Guest) -> None:
        said = guest.said_counters()
        new = said - guest.counted
        guest.counted = said
        if new.any() and new.min() >= 0 and new.max() <= AT_ONCE_MAX:
            self._store.counters.add(
                lookups=new[LOOKUPS], keys=new[KEYS], masked=new[MASKED], dram_hits=new[HITS]
            )

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
