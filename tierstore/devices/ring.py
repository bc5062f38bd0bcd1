"""Setting up an io_uring: the one system call and the mappings that the worker's kernel needs."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

import numpy as np

from tierstore.kernels.uring_worker import (
    CQ_HEAD,
    CQ_MASK,
    CQ_TAIL,
    CQE_BYTES,
    CQES,
    RING_FD,
    RING_WORDS,
    SQ_ARRAY,
    SQ_HEAD,
    SQ_MASK,
    SQ_TAIL,
    SQE_BYTES,
    SQES,
)

IO_URING_SETUP = 425
SINGLE_ISSUER, DEFER_TASKRUN = 1 << 12, 1 << 13
AT_SQ_RING, AT_CQ_RING, AT_SQES = 0, 0x8000000, 0x10000000
PARAMS = struct.Struct("<10I 8IQ 8IQ")  # io_uring_params: head, sq_off, cq_off

_libc = ctypes.CDLL(None, use_errno=True)


class Ring:
    """One io_uring of `depth` entries. Create it in the thread that will drive it.

    Raises OSError: EPERM and ENOSYS where containers or kernels do not allow io_uring.
    """

    def __init__(self, depth: int) -> None:
        # The flags save interrupts and need Linux 6.1; without them everything else is the same.
        try:
            self.fd, offsets = _setup(depth, SINGLE_ISSUER | DEFER_TASKRUN)
        except OSError:
            self.fd, offsets = _setup(depth, 0)
        sq_entries, cq_entries = offsets[0], offsets[1]
        sq, cq = offsets[10:19], offsets[19:28]
        try:
            self._sq_ring = self._map(AT_SQ_RING, sq[6] + 4 * sq_entries)
            self._cq_ring = self._map(AT_CQ_RING, cq[5] + CQE_BYTES * cq_entries)
            self._sqes = self._map(AT_SQES, SQE_BYTES * sq_entries)
        except BaseException:
            os.close(self.fd)
            raise
        self.words = np.zeros(RING_WORDS, np.int64)
        self.words[[RING_FD, SQ_MASK, CQ_MASK]] = self.fd, sq_entries - 1, cq_entries - 1
        self.words[[SQ_HEAD, SQ_TAIL, SQ_ARRAY]] = _address(self._sq_ring) + np.array([sq[0], sq[1], sq[6]])
        self.words[[CQ_HEAD, CQ_TAIL, CQES]] = _address(self._cq_ring) + np.array([cq[0], cq[1], cq[5]])
        self.words[SQES] = _address(self._sqes)

    def _map(self, offset: int, size: int) -> np.ndarray:
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        return np.frombuffer(mmap.mmap(self.fd, size, flags=flags, offset=offset), np.uint8)

    def close(self) -> None:
        os.close(self.fd)


def _setup(depth: int, flags: int) -> tuple[int, tuple[int, ...]]:
    params = ctypes.create_string_buffer(PARAMS.pack(0, 0, flags, *[0] * 25), PARAMS.size)
    fd = _libc.syscall(IO_URING_SETUP, depth, params)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd, PARAMS.unpack(params.raw)


def _address(memory: np.ndarray) -> int:
    return int(memory.ctypes.data)
