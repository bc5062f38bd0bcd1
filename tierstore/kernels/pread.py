"""Reading runs of pages with pread(2), without the GIL, one call for many runs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from engram_client.arena.atomics import load_word
from engram_client.jit import kernel

PAGE_BYTES = 4096
EINTR, EIO, ETIME = 4, 5, 62
CLOCK_MONOTONIC = 1

_libc_pread: Any = types.ExternalFunction(
    "pread64", types.int64(types.int32, types.int64, types.uint64, types.int64)
)
_clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_errno_location: Any = types.ExternalFunction("__errno_location", types.int64())


@kernel
def read_runs(fd, first_pages, page_counts, slots, start, stop, buffer, stop_at_ns, failed_page):
    """Read runs [start, stop): run i is page_counts[i] pages from page first_pages[i] on.

    Its first page lands at buffer + slots[i] * 4096 (`buffer` an address aligned as the file
    needs). Returns 0, or the errno of the first failure, with its page in failed_page[0]; a file
    that ends too early counts as EIO, a run that would start after `stop_at_ns` of the monotonic
    clock as ETIME.
    """
    clock = np.empty(2, np.int64)
    for i in range(start, stop):
        _clock_gettime(CLOCK_MONOTONIC, clock.ctypes.data)
        if clock[0] * 1_000_000_000 + clock[1] >= stop_at_ns:
            return ETIME
        done = 0
        wanted = page_counts[i] * PAGE_BYTES
        while done < wanted:
            got = _libc_pread(
                fd,
                buffer + slots[i] * PAGE_BYTES + done,
                wanted - done,
                first_pages[i] * PAGE_BYTES + done,
            )
            if got > 0:
                done += got
                continue
            error = load_word(_errno_location()) & 0xFFFFFFFF if got < 0 else EIO
            if error != EINTR:
                failed_page[0] = first_pages[i] + done // PAGE_BYTES
                return error
    return 0
