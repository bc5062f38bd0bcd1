"""Taking pages while later ones are still read: checksums, rows, free slots, in one loop without the GIL.

Pages land in a ring of slots. Runs are laid into it one after another, each in one piece; where a run does
not fit before the ring's end, it begins at slot 0 again. `starts` counts slots without wrapping, those
skipped included. So run i may be read once `starts[i] + page_counts[i] <= starts[next] + capacity`, `next`
being the oldest run not yet taken, and the disk has as much to do as the ring has room for.

Runs end in any order and are taken in theirs. A page is checked and its rows are copied at once, while
it is in the processor's cache. Where something is wrong, the loop returns, and goes on from there when it is
called again.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import copy_bytes, load_acquire, load_acquire_int
from engram_client.jit import inline_kernel, kernel
from tierstore.kernels.checksum import PAYLOAD_WORDS, page_checksum
from tierstore.kernels.futex import sleep_while
from tierstore.kernels.jobs import DONE, FAILED, UNREAD, raise_limit

PAGE_BYTES = 4096
RUN, PAGE, PIECE = range(3)  # where the loop stands: the next of each
TAKEN_ALL, WAITING, READ_FAILED, WRONG_PAGE = range(4)
RAISE_EVERY = 32  # runs taken
DOZES_MAX = 4  # before the caller looks at its deadline


@kernel
def lay_out_ring(page_counts, capacity_pages, slots, starts):
    """Write `slots` and `starts` int64 [runs]; returns how many runs may be read at first."""
    at = limit = 0
    for run in range(page_counts.size):
        inside = at % capacity_pages
        if inside + page_counts[run] > capacity_pages:
            at += capacity_pages - inside
        slots[run] = at % capacity_pages
        starts[run] = at
        at += page_counts[run]
        if at <= capacity_pages:
            limit = run + 1
    return limit


@inline_kernel
def readable_runs(page_counts, starts, capacity_pages, taken, limit):
    """How many runs may be read once the first `taken` have been; at least `limit`."""
    if taken == page_counts.size:
        return taken
    end = starts[taken] + capacity_pages
    while limit < page_counts.size and starts[limit] + page_counts[limit] <= end:
        limit += 1
    return limit


@inline_kernel
def take_run(first, end, slot, pages, page_of, offsets, lengths, targets, row_bytes, ring, out, uuid, at):
    """Check and copy what is wanted of pages [first, end); False where page `at[PAGE]` is wrong."""
    page, piece = at[PAGE], at[PIECE]
    good = True
    while good and page < pages.size and pages[page] < end:
        place = slot + pages[page] - first
        words = ring[place]
        good = words[PAYLOAD_WORDS] == page_checksum(words, pages[page], uuid[0], uuid[1])
        if good:
            source = ring.ctypes.data + place * PAGE_BYTES
            while piece < page_of.size and page_of[piece] == page:
                count = lengths[piece] if lengths.size else row_bytes
                copy_bytes(out + targets[piece], source + offsets[piece], count)
                piece += 1
            page += 1
    at[PAGE], at[PIECE] = page, piece
    return good


@kernel
def take_landed(words, runs, fates, wanted, row_bytes, ring, out, uuid, at, doze_ns):
    """Take runs until all are, one needs help, or some have not landed after a few dozes; which of these.

    `words`: of the stream. `runs`: first_pages, page_counts, slots and starts int64 [runs]. `fates` uint32
    [runs]. `wanted`: pages int64 [m], and of each piece its page's number, its offset there, its length
    (int64 [0] where all have `row_bytes`) and its target, int64 [n]. `ring` uint64 [capacity, 512];
    `out` an address; `uuid` two uint64; `at` int64 [3] is where to begin, and where it ended; `doze_ns`
    is the longest sleep, 0 for none.
    """
    table, job, workers = words
    first_pages, page_counts, slots, starts = runs
    pages, page_of, offsets, lengths, targets = wanted
    timespec = np.empty(2, np.int64)
    taken, dozes, limit = 0, 0, at[RUN]
    while at[RUN] < first_pages.size:
        run = at[RUN]
        done = load_acquire(job + DONE)
        fate = load_acquire_int(fates.ctypes.data + 4 * run)
        if fate == UNREAD or taken % RAISE_EVERY == RAISE_EVERY - 1:
            limit = readable_runs(page_counts, starts, ring.shape[0], run, limit)
            raise_limit(table, job, limit, workers)
        if fate == UNREAD:
            if doze_ns == 0 or dozes == DOZES_MAX:
                return WAITING
            sleep_while(job + DONE, done, doze_ns, timespec.ctypes.data)
            dozes += 1
            continue
        if fate == FAILED:
            return READ_FAILED
        first = first_pages[run]
        if not take_run(
            first, first + page_counts[run], slots[run], pages, page_of, offsets, lengths, targets,
            row_bytes, ring, out, uuid, at,
        ):  # fmt: skip
            return WRONG_PAGE
        at[RUN] += 1
        taken += 1
    return TAKEN_ALL
