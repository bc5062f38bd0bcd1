"""The memory of one arena: a memfd, index first, slots behind it, in huge pages where they can be had.

A memfd can be handed to other processes, which anonymous memory cannot. It is born readable and writable
for everybody, so it is made the owner's alone. Shared memory gets no huge pages by itself on most
systems; `collapse` asks for them afterwards, piece by piece, from a thread in the background: it
costs about two seconds a GiB and makes look-ups 1.2 to 1.5 times as fast.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import weakref

import numpy as np

from engram_client.arena.layout import LINE_BYTES, WAYS, ArenaGeometry

log = logging.getLogger(__name__)

PROT_NONE, MAP_FIXED = 0, 0x10
RESERVE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
MAP_FAILED = 2**64 - 1
MADV_COLLAPSE = 25  # Linux 6.1; Python 3.11 has no name for it
HUGE_PAGE_BYTES = 2 << 20
REFUSALS_MAX = 64  # pieces that may stay small before the rest is not tried
_said_no_huge_pages = threading.Event()

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_uint64
_libc.mmap.argtypes = [ctypes.c_uint64, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_uint64, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int]


class Region:
    """Zeroed memory for an arena of this geometry. Read by address, so keep the object meanwhile."""

    def __init__(self, geometry: ArenaGeometry) -> None:
        self.geometry = geometry
        self._size = -(-geometry.total_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        fd = os.memfd_create("tierstore-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, self._size)
            self.index = map_aligned(fd, self._size, HUGE_PAGE_BYTES)
        finally:
            os.close(fd)
        weakref.finalize(self, _libc.munmap, self.index, self._size)
        self.slots = self.index + geometry.index_bytes
        self.places = (self.index, self.slots, geometry.sets, geometry.slot_bytes)

    def collapse(self, stop: threading.Event) -> None:
        """Gather the memory in huge pages, until done, refused, or told to stop.

        A piece that was never touched is refused, and so is one where free memory is too scattered:
        the next is tried all the same.
        """
        left_small = 0
        for start in range(0, self._size, HUGE_PAGE_BYTES):
            if stop.is_set():
                return
            if _libc.madvise(self.index + start, HUGE_PAGE_BYTES, MADV_COLLAPSE):
                left_small += 1
                if left_small > REFUSALS_MAX:
                    _say_no_huge_pages(ctypes.get_errno())
                    return

    def free_slots_of(self, first_set: int, sets: int) -> None:
        """Give the memory of these sets' slots back; the sets must have been emptied."""
        set_bytes = WAYS * self.geometry.slot_bytes
        start = self.geometry.index_bytes + first_set * set_bytes
        page = mmap.PAGESIZE
        first, last = -(-start // page) * page, (start + sets * set_bytes) // page * page
        if last > first:
            _libc.madvise(self.index + first, last - first, mmap.MADV_REMOVE)

    def index_line(self, which: int) -> np.ndarray:
        """The 64 bytes of one set's index line, for tests and inspection."""
        line = (ctypes.c_ubyte * LINE_BYTES).from_address(self.index + which * LINE_BYTES)
        return np.ctypeslib.as_array(line)


def map_aligned(fd: int, size: int, alignment: int) -> int:
    """Map a file for reading and writing at an aligned address; huge pages need that. Raises OSError."""
    reserved = _map(0, size + alignment, PROT_NONE, RESERVE, -1)
    address = -(-reserved // alignment) * alignment
    _map(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED, fd)
    if address > reserved:
        _libc.munmap(reserved, address - reserved)
    _libc.munmap(address + size, reserved + alignment - address)
    return address


def _map(address: int, size: int, protection: int, flags: int, fd: int) -> int:
    mapped: int = _libc.mmap(address, size, protection, flags, fd, 0)
    if mapped == MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"mapping {size} bytes failed: {os.strerror(number)}")
    return mapped


def _say_no_huge_pages(number: int) -> None:
    if not _said_no_huge_pages.is_set():
        _said_no_huge_pages.set()
        log.warning(
            "the arena stays in small pages (%s): look-ups in a large arena take 1.2 to 1.5 times as long",
            os.strerror(number),
        )
