"""The memory of one arena: a memfd with index, slots and ghosts, in huge pages where they can be had.

A memfd can be handed to other processes, which anonymous memory cannot; they get it for reading
(tierstore/tiers/sealed.py). Shared memory gets no huge pages by itself on most
systems; `collapse` asks for them afterwards, piece by piece, from a thread in the background: it
costs about two seconds a GiB and makes look-ups 1.2 to 1.5 times as fast.
"""

from __future__ import annotations

import errno
import itertools
import logging
import mmap
import threading

import numpy as np

from engram_client.arena.layout import WAYS, ArenaGeometry
from engram_client.arena.mapping import HUGE_PAGE_BYTES
from tierstore.tiers.sealed import SealedMemory

log = logging.getLogger(__name__)

MADV_COLLAPSE = 25  # Linux 6.1; Python 3.11 has no name for it
COLLAPSE_BYTES = 16 << 20  # a call; short enough to stop soon when the region is dropped
COLLAPSE_TRIES, COLLAPSE_PAUSE_S = 10, 0.02  # of a piece that is being written
_said_no_huge_pages = threading.Event()
_numbers = itertools.count(1)


class Region:
    """Zeroed memory for an arena of this geometry. Read by address, so keep the object meanwhile."""

    def __init__(self, geometry: ArenaGeometry) -> None:
        self.geometry = geometry
        size = -(-geometry.total_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        self.number = next(_numbers)  # of this region in this process
        self.memory = SealedMemory("tierstore-arena", size)
        self._map = self.memory.mapping
        self._bytes = np.asarray(self._map)
        self.index = self._map.address
        self.slots = self.index + geometry.index_bytes
        self.ghosts = self.index + geometry.ghosts_at
        self.places = (self.index, self.slots, geometry.sets, geometry.slot_bytes)
        self.writer_places = (self.index, self.slots, self.ghosts, geometry.sets, geometry.slot_bytes)

    def collapse(self, stop: threading.Event) -> None:
        """Gather the memory in huge pages, until done or told to stop.

        A piece is refused where nothing was written yet (EINVAL; what is written in it is gathered all the
        same) and while it is being written (EAGAIN), so one refusal says nothing of the others.
        """
        pieces = range(0, self._map.size_bytes, COLLAPSE_BYTES)
        refusals = [error for start in pieces if (error := self._collapse_piece(start, stop))]
        if len(refusals) == len(pieces) and not stop.is_set():
            _say_no_huge_pages(refusals[0])

    def _collapse_piece(self, start: int, stop: threading.Event) -> OSError | None:
        refusal = None
        for _ in range(COLLAPSE_TRIES):
            if stop.is_set():
                break
            try:
                self._map.madvise(MADV_COLLAPSE, start, min(COLLAPSE_BYTES, self._map.size_bytes - start))
                return None
            except OSError as error:
                refusal = error
                if error.errno != errno.EAGAIN:
                    break
            stop.wait(COLLAPSE_PAUSE_S)
        return refusal

    def free_slots_of(self, first_set: int, sets: int) -> None:
        """Give the memory of these sets' slots back; the sets must have been emptied."""
        set_bytes = WAYS * self.geometry.slot_bytes
        start = self.geometry.index_bytes + first_set * set_bytes
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, (start + sets * set_bytes) // page * page
        if last > first:
            self._map.madvise(mmap.MADV_REMOVE, first, last - first)

    def free(self) -> None:
        """Give all memory back, also while others have it mapped; every set must have been emptied.

        Who still reads it finds empty sets.
        """
        self._map.madvise(mmap.MADV_REMOVE, 0, self._map.size_bytes)

    def index_lines(self, sets: np.ndarray) -> np.ndarray:
        """A copy of these sets' index lines, uint8 [n, 64]; the caller keeps writers out."""
        return self._bytes[: self.geometry.index_bytes].reshape(-1, 64)[sets]

    def index_line(self, which: int) -> np.ndarray:
        """The 64 bytes of one set's index line, for tests and inspection."""
        return self._bytes[: self.geometry.index_bytes].reshape(-1, 64)[which]


def _say_no_huge_pages(error: OSError) -> None:
    if not _said_no_huge_pages.is_set():
        _said_no_huge_pages.set()
        log.warning(
            "the arena stays in small pages (%s): look-ups in a large arena take 1.2 to 1.5 times as long",
            error.strerror,
        )
