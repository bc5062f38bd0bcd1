"""The job ring: reads into staging memory on one side, one thread that never enters Python on the other.

A captured graph reads rows from fixed addresses, and a word beside them tells whose rows they are. So
somebody has to copy rows there, and stamp the word, the moment they are there, while Python is busy
elsewhere: a thread that lives in `copy_until_stopped`. Handed one job each read, it copies what the
arena holds, asks the daemon for the rest, sleeps until that has answered, copies it and stamps.

    header    word 0  epoch     counts jobs that were opened or withdrawn; the thread sleeps on it
              word 1  stopping
              word 2  one       what is written to a doorbell
              word 3  next      place after that of the youngest job
    job       word 0  state     generation << 4 | one of the states below; who waits for the job sleeps here
              word 1  target    address of the entries' rows in staging memory
              word 2  word      address of the completion word
              word 3  step      with which it is stamped
              word 4  part_bytes of each entry
              word 5  slot      address of the request's slot in the mailbox
              word 6  number    of the request on its way
              word 7  gone      address of a word that is 1 once the daemon went away
              word 8  data      address of the request's memory
              word 9  positions address of int64 [count]: to which entry of `target` each row goes
              word 10 count     entries asked for by that request; those of the look-up while it is OPEN
              word 11 asked     1 once a request was sent
              word 12 first     place in `positions` of the first of them
              word 13 total     entries to ask for in all
       of an open job only
              word 14 view      address of a view (engram_client/arena/shared_read.py)
              word 15 keys      address of int64 [entries of the look-up]
              word 16 orders
              word 17 room      the most entries of one request
              word 18 pending   address of the mailbox's pending word
              word 19 bit       number of the request's slot
              word 20 doorbell  eventfd of the daemon

    OPEN ------> BUSY -----> LANDED, GONE      the arena had everything; the daemon takes no requests
                  |
    WAITING <-----+                            the daemon was asked
       +-------> BUSY -----> LANDED, FAILED, GONE
    OPEN, WAITING ------> WITHDRAWN -> ENDED   by who started it; by the thread, which saw it

What one request has no room for is asked for by the next, in the same slot and memory, which is why the
client's end sets numbers aside for as many as there may be.

Every change is a compare-and-swap of the state but the thread's own out of BUSY. The thread writes staging
memory in BUSY alone, and stamps before it leaves BUSY. So once a job was withdrawn, or has left BUSY for
good, its staging memory is free for another step, though the daemon may still be reading: it writes into the
mailbox, never into staging memory. What the job's words point to stays until the thread is done with it:
LANDED, FAILED, GONE and ENDED are its last access. A place is then used again under the next generation, so
what somebody does with an old job in mind changes nothing.

A completion word is -1, written before anything else of a step, until all its rows are there. A reader that
finds its step's number there finds its rows; one that reads while the slot may be given away looks at the
word again afterwards (an acquire fence between), as with a sequence lock.

Sleeping is one futex_waitv(2) on the epoch, and the done word and the gone word of each request on the way.
Where the system has no such call (before Linux 5.16, or a seccomp profile) the thread looks every `POLL_NS`
while requests are on the way.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from engram_client.arena.atomics import (
    compare_and_swap,
    fence_release,
    fetch_add,
    fetch_or,
    load_acquire,
    load_word,
    store_byte,
    store_release,
    store_word,
    word_pointer,
)
from engram_client.arena.futex import (
    EVERYBODY,
    NANOSECONDS,
    PRIVATE,
    SHARED,
    WAITER_WORDS,
    WAITERS_MAX,
    WORD_OF_32_BITS,
    futex_wait,
    futex_wait_for_any,
    futex_wake,
)
from engram_client.arena.mailbox import DONE_AT, ENTRIES, PART_ALIGNMENT_BYTES, TEXT_BYTES_AT
from engram_client.arena.mailbox import NUMBER as NUMBER_OF_REQUEST
from engram_client.arena.mailbox import WITHDRAWN as WITHDRAWN_REQUEST
from engram_client.arena.requests import spread_parts
from engram_client.arena.shared_read import VIEW_WORDS, count_lookup, read_view
from engram_client.arena.system_call import WRITE, system_call
from engram_client.jit import inline_kernel, kernel

NOT_THERE = -1  # in a completion word
HEADER_WORDS, JOB_WORDS = 8, 24
EPOCH, STOPPING, ONE, NEXT = range(0, 32, 8)
STATE, TARGET, WORD, STEP, PART_BYTES, SLOT, NUMBER, GONE_AT, DATA, POSITIONS = range(0, 80, 8)
COUNT, ASKED, FIRST, TOTAL, VIEW, KEYS, ORDERS, ROOM, PENDING, BIT, DOORBELL = range(80, 168, 8)
FREE, OPEN, BUSY, WAITING, WITHDRAWN, LANDED, FAILED, GONE, ENDED = range(9)
REUSED = -1  # instead of a state: the job is over and its place another's
GENERATION_SHIFT, STATE_MASK = 4, 15

PLACES = (WAITERS_MAX - 1) // 2
POLL_NS, IDLE_NS = 100_000, 60 * NANOSECONDS


@kernel
def unstamp(word):
    """Nothing is there; whatever is written after this is seen after it."""
    store_word(word, NOT_THERE)
    fence_release()


@kernel
def stamp(word, step):
    """All is there; who sees this sees what was written before."""
    store_release(word, step)


@inline_kernel
def job_at(table, place):
    return table + 8 * (HEADER_WORDS + place * JOB_WORDS)


@inline_kernel
def words_at(address, count):
    """int64 [count] in memory that somebody else keeps."""
    return carray(word_pointer(address), (count,))


@inline_kernel
def wake_thread(table):
    fetch_add(table + EPOCH, 1)
    futex_wake(table + EPOCH, 1, PRIVATE)


@kernel
def open_job(table, place, generation, state, words):
    """Fill a free place with int64 words from TARGET on, and wake the thread. `state` is OPEN or WAITING."""
    job = job_at(table, place)
    for i in range(words.size):
        store_word(job + TARGET + 8 * i, words[i])
    store_word(table + NEXT, place + 1)
    store_release(job + STATE, generation << GENERATION_SHIFT | state)
    wake_thread(table)


@inline_kernel
def state_of(job, generation):
    word = load_acquire(job + STATE)
    return word & STATE_MASK if word >> GENERATION_SHIFT == generation else REUSED


@kernel
def withdraw(table, place, generation):
    """Have nothing more written for this job, if possible; its state then. In BUSY it was not."""
    job = job_at(table, place)
    while True:
        state = state_of(job, generation)
        if state != OPEN and state != WAITING:
            return state
        word = generation << GENERATION_SHIFT | state
        if compare_and_swap(job + STATE, word, word - state + WITHDRAWN):
            wake_thread(table)
            return WITHDRAWN


@kernel
def wait_ended(table, place, generation, timeout_ns, timespec):
    """Sleep while the job is under way, so long at most; its state then. May return early."""
    job = job_at(table, place)
    state = state_of(job, generation)
    if OPEN <= state <= WAITING and timeout_ns > 0:
        word = generation << GENERATION_SHIFT | state
        futex_wait(job + STATE, word, timeout_ns, timespec, PRIVATE)
        state = state_of(job, generation)
    return state


@kernel
def stop(table):
    """Have the thread leave."""
    store_release(table + STOPPING, 1)
    wake_thread(table)


@inline_kernel
def leave_busy(job, state):
    """The thread's last access, unless `state` is WAITING."""
    word = load_word(job + STATE)
    store_release(job + STATE, word - (word & STATE_MASK) + state)
    if state != WAITING:
        futex_wake(job + STATE, EVERYBODY, PRIVATE)


@inline_kernel
def stamp_job(job):
    store_release(load_word(job + WORD), load_word(job + STEP))


@inline_kernel
def let_request_go(job):
    """Nobody waits for its answer: tell the daemon, or answer here what it was never asked."""
    slot = load_word(job + SLOT)
    if load_word(job + ASKED) != 0:
        store_word(slot + 8 * WITHDRAWN_REQUEST, 1)
    else:
        store_release(slot + DONE_AT, load_word(job + NUMBER))


@inline_kernel
def aligned_part(size_bytes):
    return (size_bytes + PART_ALIGNMENT_BYTES - 1) // PART_ALIGNMENT_BYTES * PART_ALIGNMENT_BYTES


@inline_kernel
def send(table, job):
    """Ask the daemon for as many of the entries left as one request has room for."""
    first, data, slot = load_word(job + FIRST), load_word(job + DATA), load_word(job + SLOT)
    count = min(load_word(job + TOTAL) - first, load_word(job + ROOM))
    keys, misses = load_word(job + KEYS), load_word(job + POSITIONS) + 8 * first
    orders, orders_at = load_word(job + ORDERS), data + aligned_part(8 * count)
    for i in range(count):
        entry = load_word(misses + 8 * i)
        store_word(data + 8 * i, load_word(keys + 8 * entry))
        store_byte(orders_at + i, entry % orders)
    store_word(job + COUNT, count)
    store_word(job + ASKED, 1)
    store_word(slot + 8 * ENTRIES, count)
    store_word(slot + 8 * NUMBER_OF_REQUEST, load_word(job + NUMBER))
    fetch_or(load_word(job + PENDING), 1 << load_word(job + BIT))
    system_call(WRITE, load_word(job + DOORBELL), table + ONE, 8, 0, 0, 0)
    leave_busy(job, WAITING)


@inline_kernel
def read_hits(table, job):
    """Of an open job: copy what the arena holds and ask for the rest."""
    count = load_word(job + COUNT)
    view = words_at(load_word(job + VIEW), VIEW_WORDS)
    keys, misses = words_at(load_word(job + KEYS), count), words_at(load_word(job + POSITIONS), count)
    counts = np.zeros(1, np.int64)
    missed = read_view(view, keys, load_word(job + ORDERS), load_word(job + TARGET), misses, counts, True)
    if missed > 0:
        count_lookup(view, count, counts[0], count - counts[0] - missed)
        store_word(job + TOTAL, missed)
        send(table, job)
        return
    let_request_go(job)
    if missed == 0:
        stamp_job(job)
    leave_busy(job, LANDED if missed == 0 else GONE)


@inline_kernel
def take_answer(table, job):
    """The daemon has answered: copy its rows, unless it says what went wrong."""
    if load_word(load_word(job + SLOT) + TEXT_BYTES_AT) != 0:
        leave_busy(job, FAILED)
        return
    count, first, part_bytes = load_word(job + COUNT), load_word(job + FIRST), load_word(job + PART_BYTES)
    rows = load_word(job + DATA) + aligned_part(8 * count) + aligned_part(count)
    positions = load_word(job + POSITIONS) + 8 * first
    spread_parts(rows, positions, count, part_bytes, load_word(job + TARGET))
    if first + count < load_word(job + TOTAL):
        store_word(job + FIRST, first + count)
        store_word(job + NUMBER, load_word(job + NUMBER) + 1)
        send(table, job)
    else:
        stamp_job(job)
        leave_busy(job, LANDED)


@inline_kernel
def advance(table, job):
    """Do what there is to do for a job; whether there was anything."""
    word = load_acquire(job + STATE)
    state = word & STATE_MASK
    if state == WITHDRAWN:
        let_request_go(job)
        leave_busy(job, ENDED)
        return True
    if state == OPEN:
        if compare_and_swap(job + STATE, word, word - OPEN + BUSY):
            read_hits(table, job)
        return True
    if state != WAITING:
        return False
    answered = load_acquire(load_word(job + SLOT) + DONE_AT) >= load_word(job + NUMBER)
    if not answered and load_acquire(load_word(job + GONE_AT)) == 0:
        return False
    if compare_and_swap(job + STATE, word, word - WAITING + BUSY):
        if answered:
            take_answer(table, job)
        else:
            leave_busy(job, GONE)
    return True


@inline_kernel
def note_waiter(waiters, count, address, value, flags):
    waiters[count, 0], waiters[count, 1], waiters[count, 2] = value & 0xFFFFFFFF, address, flags
    return count + 1


@inline_kernel
def sleep_until_news(table, places, epoch, waiters, timespec, many):
    """Sleep until a job is opened, withdrawn, answered or abandoned; whether futex_waitv is to be had."""
    count = note_waiter(waiters, 0, table + EPOCH, epoch, WORD_OF_32_BITS | PRIVATE)
    for place in range(places):
        job = job_at(table, place)
        if load_acquire(job + STATE) & STATE_MASK == WAITING:
            done_at = load_word(job + SLOT) + DONE_AT
            done = load_acquire(done_at)
            if done >= load_word(job + NUMBER):
                return many
            count = note_waiter(waiters, count, done_at, done, WORD_OF_32_BITS | SHARED)
            count = note_waiter(waiters, count, load_word(job + GONE_AT), 0, WORD_OF_32_BITS | PRIVATE)
    if many and count > 1:
        return futex_wait_for_any(waiters, count)
    timeout_ns = POLL_NS if count > 1 else IDLE_NS
    futex_wait(table + EPOCH, epoch, timeout_ns, timespec.ctypes.data, PRIVATE)
    return many


@inline_kernel
def abandon_all(table, places):
    """The thread leaves: nobody copies any more."""
    for place in range(places):
        job = job_at(table, place)
        while True:
            word = load_acquire(job + STATE)
            state = word & STATE_MASK
            if state == WITHDRAWN:
                let_request_go(job)
                leave_busy(job, ENDED)
            elif state in (OPEN, WAITING):
                if compare_and_swap(job + STATE, word, word - state + BUSY):
                    let_request_go(job)
                    leave_busy(job, GONE)
            else:
                break


@kernel
def copy_until_stopped(table, places, many):
    """Serve the job ring until it stops. `many` says whether to try futex_waitv."""
    waiters, timespec = np.zeros((WAITERS_MAX, WAITER_WORDS), np.int64), np.zeros(2, np.int64)
    store_word(table + ONE, 1)
    while load_acquire(table + STOPPING) == 0:
        epoch = load_acquire(table + EPOCH)
        busy, oldest = False, load_word(table + NEXT)
        for i in range(places):
            busy = advance(table, job_at(table, (oldest + i) % places)) or busy
        if not busy:
            many = sleep_until_news(table, places, epoch, waiters, timespec, many)
    abandon_all(table, places)


def warm_kernels() -> None:
    """Load or compile all of these, so that the first job does not."""
    table, word = np.zeros(HEADER_WORDS + JOB_WORDS, np.int64), np.zeros(1, np.int64)
    at = int(table.ctypes.data)
    unstamp(int(word.ctypes.data))
    stamp(int(word.ctypes.data), 0)
    open_job(at, 0, 1, LANDED, np.zeros(1, np.int64))
    withdraw(at, 0, 1)
    wait_ended(at, 0, 1, 0, 0)
    stop(at)
    copy_until_stopped(at, 1, True)
