"""The job table: read requests on one side, threads that never enter Python on the other.

A *job* is the runs of one request. Worker threads claim one run at a time: of jobs that
somebody waits for first, of hints only when there is none, and in turn between the jobs of one kind,
so a large job does not hold up a small one. A *stream* is a job whose reader takes runs while later ones
are still read: only runs below its limit are claimed, and its reader raises that as slots become free.

    header    word 0  epoch    counts submissions; idle workers sleep on it
              word 1  stopping
    job       word 0  next     generation << 32 | next run to be claimed
              word 1  hint     1 for hints
              word 2  fd
              word 3  runs
              word 4  address of first_pages, int64 [runs]
              word 5  address of page_counts
              word 6  address of slots
              word 7  address of the buffer
              word 8  done     runs that have ended; the reader of a stream sleeps on it
              word 9  errno of the first failure, 0
              word 10 its page
              word 11 ended    1 once all runs have, and while the place is free; waiters sleep on it
              word 12 limit    how many runs may be claimed, from the first on
              word 13 address of fates, uint32 [runs]: UNREAD, LANDED or FAILED; 0 where nobody asks

A claim is one compare-and-swap of `next`. It succeeds only if the generation is the one the worker
read the job's other words under, so a place that was given to another job in between cannot be
mistaken for the old one: while a run is unclaimed the job cannot end, and while it has not ended
its place is not given away.
"""

from __future__ import annotations

from engram_client.arena.atomics import (
    compare_and_swap,
    fence_release,
    fetch_add,
    load_acquire,
    load_word,
    store_release,
    store_release_int,
    store_word,
)
from engram_client.jit import inline_kernel, kernel
from tierstore.kernels.futex import EVERYBODY, sleep_while, wake

HEADER_WORDS, JOB_WORDS = 16, 16
EPOCH, STOPPING = 0, 8
NEXT, HINT, FD, RUNS, FIRST_PAGES, PAGE_COUNTS, SLOTS, BUFFER, DONE, ERRNO, PAGE, ENDED, LIMIT, FATES = range(
    0, 112, 8
)
GENERATION_SHIFT, RUN_MASK = 32, 0xFFFFFFFF
RUNS_MAX = 2**31
UNREAD, LANDED, FAILED = range(3)
WAKE_EVERY = 128  # runs of a stream that have ended


@inline_kernel
def job_at(table, place):
    return table + 8 * (HEADER_WORDS + place * JOB_WORDS)


@inline_kernel
def claim_of_kind(table, places, start, hint):
    """Claim a run of a job of this kind; (place, run) or (-1, 0)."""
    for k in range(places):
        place = (start + k) % places
        job = job_at(table, place)
        while True:
            word = load_acquire(job + NEXT)
            run = word & RUN_MASK
            if run >= load_word(job + LIMIT) or load_word(job + HINT) != hint:
                break
            if compare_and_swap(job + NEXT, word, word + 1):
                return place, run
    return -1, 0


@inline_kernel
def claim_run(table, places, start):
    """Claim a run, a demanded one if there is any; (place, run) or (-1, 0)."""
    place, run = claim_of_kind(table, places, start, 0)
    if place < 0:
        place, run = claim_of_kind(table, places, start, 1)
    return place, run


@inline_kernel
def end_runs(job, count):
    """`count` claimed runs of a job have ended; the last one wakes whoever waits.

    A stream's reader is woken now and then, and when nothing is left to claim below its limit.
    """
    # Before the count: after it the place may be another job's. A wrong limit wakes somebody for nothing.
    runs, is_stream = load_word(job + RUNS), load_word(job + FATES) != 0
    done = fetch_add(job + DONE, count) + count
    if done == runs:
        if is_stream:
            wake(job + DONE, EVERYBODY)
        store_release(job + ENDED, 1)
        wake(job + ENDED, EVERYBODY)
    elif is_stream and (done % WAKE_EVERY == 0 or done >= load_acquire(job + LIMIT)):
        wake(job + DONE, EVERYBODY)


@inline_kernel
def end_run(job, run, fate):
    """A claimed run has ended."""
    fates = load_word(job + FATES)
    if fates:
        store_release_int(fates + 4 * run, fate)
    end_runs(job, 1)


@inline_kernel
def note_failure(job, errno, page):
    """Keep the first failure of a job."""
    if compare_and_swap(job + ERRNO, 0, errno):
        store_word(job + PAGE, page)


@kernel
def open_job(table, place, hint, fd, runs, first_pages, page_counts, slots, buffer, limit, fates, workers):
    """Fill a free place, let its runs be claimed, and wake up to `workers` idle workers."""
    job = job_at(table, place)
    generation = (load_word(job + NEXT) >> GENERATION_SHIFT) + 1
    store_release(job + NEXT, (generation << GENERATION_SHIFT) | RUNS_MAX)
    fence_release()  # who sees a word of this job must not claim a run of the one before it
    store_word(job + HINT, hint)
    store_word(job + FD, fd)
    store_word(job + RUNS, runs)
    store_word(job + FIRST_PAGES, first_pages)
    store_word(job + PAGE_COUNTS, page_counts)
    store_word(job + SLOTS, slots)
    store_word(job + BUFFER, buffer)
    store_word(job + DONE, 0)
    store_word(job + ERRNO, 0)
    store_word(job + ENDED, 0)
    store_word(job + LIMIT, limit)
    store_word(job + FATES, fates)
    store_release(job + NEXT, generation << GENERATION_SHIFT)
    fetch_add(table + EPOCH, 1)
    wake(table + EPOCH, min(limit, workers))


@inline_kernel
def raise_limit(table, job, limit, workers):
    """Let more runs of a stream be claimed; workers are woken if they may have run out of them."""
    before = load_word(job + LIMIT)
    if limit > before:
        store_release(job + LIMIT, limit)
        fetch_add(table + EPOCH, 1)
        if (load_acquire(job + NEXT) & RUN_MASK) + workers >= before:
            wake(table + EPOCH, min(limit - before, workers))


@kernel
def withdraw(table, place):
    """Let no further run of a job be claimed; it ends when those under way have."""
    job = job_at(table, place)
    while True:
        word = load_acquire(job + NEXT)
        unclaimed = load_word(job + RUNS) - (word & RUN_MASK)
        if unclaimed <= 0:
            return
        if compare_and_swap(job + NEXT, word, word + unclaimed):
            end_runs(job, unclaimed)
            return


@kernel
def has_ended(table, place):
    """Whether nothing of a job is under way; what its workers wrote before is seen then."""
    return load_acquire(job_at(table, place) + ENDED) == 1


@kernel
def wait_ended(table, place, timeout_ns, timespec):
    """Sleep until the job has ended or so long; True where it has. May return early."""
    job = job_at(table, place)
    if load_acquire(job + ENDED) == 0:
        sleep_while(job + ENDED, 0, timeout_ns, timespec)
    return load_acquire(job + ENDED) == 1


@kernel
def stop_workers(table):
    """Tell every worker to leave once no run is left to claim."""
    store_release(table + STOPPING, 1)
    fetch_add(table + EPOCH, 1)
    wake(table + EPOCH, EVERYBODY)
