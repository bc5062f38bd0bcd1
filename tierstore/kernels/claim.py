"""Claiming runs of the job table one at a time, for workers that read each whole before the next.

A worker in a kernel calls these from there. One that reads with something other than a system call sleeps and
claims in here, leaves to read, and comes back to say how it went; that costs an entry into Python a run, so
it pays for long runs only.
"""

from __future__ import annotations

from engram_client.arena.atomics import load_acquire, load_word
from engram_client.jit import kernel
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

PAGE_BYTES = 4096
IDLE_NS = 60 * NANOSECONDS
PLACE, RUN, DESCRIPTOR, FIRST_PAGE, PAGES, ADDRESS, TIMESPEC = range(7)
CLAIM_WORDS = TIMESPEC + 2


@kernel
def wait_for_run(table, places, start, claim):
    """Sleep until there is a run, and write it into `claim` int64 [CLAIM_WORDS]; False once stopped."""
    while True:
        epoch = load_acquire(table + EPOCH)
        place, run = claim_run(table, places, start)
        if place >= 0:
            job = job_at(table, place)
            claim[PLACE], claim[RUN], claim[DESCRIPTOR] = place, run, load_word(job + FD)
            claim[FIRST_PAGE] = load_word(load_word(job + FIRST_PAGES) + 8 * run)
            claim[PAGES] = load_word(load_word(job + PAGE_COUNTS) + 8 * run)
            slot = load_word(load_word(job + SLOTS) + 8 * run)
            claim[ADDRESS] = load_word(job + BUFFER) + slot * PAGE_BYTES
            return True
        if load_acquire(table + STOPPING):
            return False
        sleep_while(table + EPOCH, epoch, IDLE_NS, claim[TIMESPEC:].ctypes.data)


@kernel
def end_claim(table, claim, errno, page):
    """The claimed run has landed, or with `errno` it has failed at `page`."""
    job = job_at(table, claim[PLACE])
    if errno:
        note_failure(job, errno, page)
    end_run(job, claim[RUN], FAILED if errno else LANDED)
