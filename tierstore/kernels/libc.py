"""System calls of the service's kernels; a failed one returns minus errno."""

from __future__ import annotations

from typing import Any

from numba import types

from engram_client.arena.system_call import last_errno, system_call
from engram_client.jit import inline_kernel

__all__ = ["EAGAIN", "EINTR", "EIO", "ETIMEDOUT", "pread", "pwrite", "system_call"]

EINTR, EIO, EAGAIN, ETIMEDOUT = 4, 5, 11, 110

_pread: Any = types.ExternalFunction(
    "pread64", types.int64(types.int32, types.int64, types.uint64, types.int64)
)
_pwrite: Any = types.ExternalFunction(
    "pwrite64", types.int64(types.int32, types.int64, types.uint64, types.int64)
)


@inline_kernel
def pread(fd, address, count, offset):
    """pread(2); minus errno where it failed."""
    result = _pread(fd, address, count, offset)
    return result if result != -1 else -last_errno()


@inline_kernel
def pwrite(fd, address, count, offset):
    """pwrite(2); minus errno where it failed."""
    result = _pwrite(fd, address, count, offset)
    return result if result != -1 else -last_errno()
