"""The memory of one arena: a memfd, index first, slots behind it, in huge pages where they can be had.

A memfd can be handed to other processes, which anonymous memory cannot. It is born readable and writable
for everybody, so it is made the owner's alone. Shared memory gets no huge pages by itself on most
systems; `collapse` asks for them afterwards, piece by piece, from a thread in the background: it
costs about two seconds a GiB and makes look-ups 1.2 to 1.5 times as fast.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading

import numpy as np

from engram_client.arena.layout import WAYS, ArenaGeometry

log = logging.getLogger(__name__)

MADV_COLLAPSE = 25  # Linux 6.1; Python 3.11 has no name for it
HUGE_PAGE_BYTES = 2 << 20
COLLAPSE_BYTES = 16 << 20  # a call; short enough to stop soon when the region is dropped
_said_no_huge_pages = threading.Event()


class Region:
    """Zeroed memory for an arena of this geometry. Read by address, so keep the object meanwhile."""

    def __init__(self, geometry: ArenaGeometry) -> None:
        self.geometry = geometry
        size = -(-geometry.total_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        fd = os.memfd_create("tierstore-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, size)
            self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
        finally:
            os.close(fd)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self.index = int(self._bytes.ctypes.data)
        self.slots = self.index + geometry.index_bytes
        self.places = (self.index, self.slots, geometry.sets, geometry.slot_bytes)

    def collapse(self, stop: threading.Event) -> None:
        """Gather the memory in huge pages, until done, refused, or told to stop."""
        for start in range(0, len(self._map), COLLAPSE_BYTES):
            if stop.is_set():
                return
            try:
                self._map.madvise(MADV_COLLAPSE, start, min(COLLAPSE_BYTES, len(self._map) - start))
            except OSError as error:
                _say_no_huge_pages(error)
                return

    def free_slots_of(self, first_set: int, sets: int) -> None:
        """Give the memory of these sets' slots back; the sets must have been emptied."""
        set_bytes = WAYS * self.geometry.slot_bytes
        start = self.geometry.index_bytes + first_set * set_bytes
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, (start + sets * set_bytes) // page * page
        if last > first:
            self._map.madvise(mmap.MADV_REMOVE, first, last - first)

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
