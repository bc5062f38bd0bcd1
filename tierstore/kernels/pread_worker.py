"""A worker that reads claimed runs with pread(2), one at a time."""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import load_acquire, load_word
from engram_client.jit import inline_kernel, kernel
from tierstore.kernels.futex import NANOSECONDS, sleep_while
from tierstore.kernels.jobs import (
    BUFFER,
    EPOCH,
    FAILED,
    FD,
    FIRST_PAGES,
    LANDED,
    PAGE_COUNTS,
    SLOTS,
    STOPPING,
    claim_run,
    end_run,
    job_at,
    note_failure,
)
from tierstore.kernels.libc import EINTR, EIO, pread

PAGE_BYTES = 4096
IDLE_NS = 60 * NANOSECONDS


@inline_kernel
def read_run(job, run):
    """Read one run whole; its fate. A file that ends too early counts as EIO."""
    fd = load_word(job + FD)
    first = load_word(load_word(job + FIRST_PAGES) + 8 * run)
    wanted = load_word(load_word(job + PAGE_COUNTS) + 8 * run) * PAGE_BYTES
    target = load_word(job + BUFFER) + load_word(load_word(job + SLOTS) + 8 * run) * PAGE_BYTES
    done = 0
    while done < wanted:
        got = pread(fd, target + done, wanted - done, first * PAGE_BYTES + done)
        if got > 0:
            done += got
        elif got != -EINTR:
            note_failure(job, -got if got < 0 else EIO, first + done // PAGE_BYTES)
            return FAILED
    return LANDED


@kernel
def read_until_stopped(table, places, start):
    """Serve the job table until it stops; `start` spreads the workers over it."""
    scratch = np.zeros(2, np.int64)
    while True:
        epoch = load_acquire(table + EPOCH)
        place, run = claim_run(table, places, start)
        if place >= 0:
            job = job_at(table, place)
            end_run(job, run, read_run(job, run))
            start = place + 1
        elif load_acquire(table + STOPPING):
            return
        else:
            timespec = scratch.ctypes.data  # taken here: numba frees an array after its last mention
            sleep_while(table + EPOCH, epoch, IDLE_NS, timespec)
