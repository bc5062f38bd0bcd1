"""Shared memory mapped on a huge-page boundary.

Pages of a memfd can only be gathered in huge pages where address and offset agree to 2 MiB. Python's
mmap takes no address, and where the kernel puts a mapping is a matter of luck; so room is reserved
first and the file is mapped over its aligned part.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

HUGE_PAGE_BYTES = 2 << 20
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class SharedMapping:
    """All of a file, from a multiple of 2 MiB on; unmapped with this object.

    numpy.asarray(mapping) is its bytes and keeps it alive.
    """

    def __init__(self, fd: int, size_bytes: int, *, writable: bool = True) -> None:
        """`size_bytes` is a multiple of the page size. Raises OSError."""
        assert size_bytes % mmap.PAGESIZE == 0
        self.size_bytes = size_bytes
        self.address = _map_aligned(fd, size_bytes, writable)
        weakref.finalize(self, _libc.munmap, self.address, size_bytes).atexit = False
        self.__array_interface__ = {
            "data": (self.address, not writable),
            "shape": (size_bytes,),
            "typestr": "|u1",
            "version": 3,
        }

    def madvise(self, advice: int, start: int, size_bytes: int) -> None:
        """madvise(2) for bytes from `start` on. Raises OSError."""
        assert 0 <= start <= start + size_bytes <= self.size_bytes
        if _libc.madvise(self.address + start, size_bytes, advice):
            raise _last_error()


def _map_aligned(fd: int, size_bytes: int, writable: bool) -> int:
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    reserved = _map(None, size_bytes + HUGE_PAGE_BYTES, _PROT_NONE, private, -1)
    start = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    try:
        _map(start, size_bytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd)
    except OSError:
        _libc.munmap(reserved, size_bytes + HUGE_PAGE_BYTES)
        raise
    before = start - reserved
    if before:
        _libc.munmap(reserved, before)
    if before < HUGE_PAGE_BYTES:
        _libc.munmap(start + size_bytes, HUGE_PAGE_BYTES - before)
    return start


def _map(address: int | None, size_bytes: int, protection: int, flags: int, fd: int) -> int:
    found: int | None = _libc.mmap(address, size_bytes, protection, flags, fd, 0)
    if found is None or found == _FAILED:
        raise _last_error()
    return found


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
