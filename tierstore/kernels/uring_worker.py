"""A worker that keeps an io_uring full of claimed runs.

It fills the submission ring itself, enters the kernel once to submit and to wait, and reaps what has
completed. Reads that end short or are interrupted go back into the ring for their rest.

    ring     int64 [10]: fd, addresses of submission head, tail, array, entries, of completion
             head, tail, entries; masks of both rings (see tierstore/devices/ring.py)
    ops      int64 [depth, 3]: place and run of the job, bytes done; the index is the user data
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import (
    load_acquire,
    load_acquire_int,
    load_int,
    load_word,
    store_byte,
    store_int,
    store_release_int,
    store_word,
    zero_bytes,
)
from engram_client.jit import inline_kernel, kernel
from tierstore.kernels.claim import IDLE_NS, PAGE_BYTES
from tierstore.kernels.futex import sleep_while
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
from tierstore.kernels.libc import EAGAIN, EINTR, EIO, system_call

RING_FD, SQ_HEAD, SQ_TAIL, SQ_ARRAY, SQES, CQ_HEAD, CQ_TAIL, CQES, SQ_MASK, CQ_MASK = range(10)
RING_WORDS = 10
IO_URING_ENTER, GET_EVENTS = 426, 1
OP_READ = 22
SQE_BYTES, CQE_BYTES = 64, 16
EBUSY = 16


SENT_AT_ONCE = 4  # reads in one call; with as many as have just ended, the disk would idle until all are sent


@inline_kernel
def run_bytes(job, run):
    return load_word(load_word(job + PAGE_COUNTS) + 8 * run) * PAGE_BYTES


@inline_kernel
def push_read(ring, op, job, run, done):
    """Put the rest of a run into the submission ring."""
    first = load_word(load_word(job + FIRST_PAGES) + 8 * run)
    target = load_word(job + BUFFER) + load_word(load_word(job + SLOTS) + 8 * run) * PAGE_BYTES
    tail = load_int(ring[SQ_TAIL])
    place = tail & ring[SQ_MASK]
    entry = ring[SQES] + place * SQE_BYTES
    zero_bytes(entry, SQE_BYTES)
    store_byte(entry, OP_READ)
    store_int(entry + 4, load_word(job + FD))
    store_word(entry + 8, first * PAGE_BYTES + done)
    store_word(entry + 16, target + done)
    store_int(entry + 24, run_bytes(job, run) - done)
    store_word(entry + 32, op)
    store_int(ring[SQ_ARRAY] + 4 * place, place)
    store_release_int(ring[SQ_TAIL], (tail + 1) & 0xFFFFFFFF)


@inline_kernel
def complete(table, ring, ops, op, result):
    """Account for one completion; True where the op is free again, False where it was pushed anew."""
    place, run = ops[op, 0], ops[op, 1]
    job = job_at(table, place)
    if result > 0:
        ops[op, 2] += result
    if result in (-EINTR, -EAGAIN) or (result > 0 and ops[op, 2] < run_bytes(job, run)):
        push_read(ring, op, job, run, ops[op, 2])
        return False
    fate = LANDED
    if result <= 0:
        fate = FAILED
        first = load_word(load_word(job + FIRST_PAGES) + 8 * run)
        note_failure(job, -result if result < 0 else EIO, first + ops[op, 2] // PAGE_BYTES)
    end_run(job, run, fate)
    return True


@inline_kernel
def give_up(table, ops, free, free_count, errno):
    """Fail every read that is under way, so that nobody waits for it."""
    for op in range(len(ops)):
        if not (free[:free_count] == op).any():
            job = job_at(table, ops[op, 0])
            note_failure(job, errno, load_word(load_word(job + FIRST_PAGES) + 8 * ops[op, 1]))
            end_run(job, ops[op, 1], FAILED)


@kernel
def drive_ring_until_stopped(table, places, ring, depth):
    """Serve the job table until it stops. Returns 0, or the errno for which the ring was given up."""
    ops = np.zeros((depth, 3), np.int64)
    free = np.arange(depth)
    free_count, unsent, start = depth, 0, 0
    scratch = np.zeros(2, np.int64)
    while True:
        epoch = load_acquire(table + EPOCH)
        while free_count > 0 and unsent < SENT_AT_ONCE:
            place, run = claim_run(table, places, start)
            if place < 0:
                break
            free_count -= 1
            op = free[free_count]
            ops[op, 0], ops[op, 1], ops[op, 2] = place, run, 0
            push_read(ring, op, job_at(table, place), run, 0)
            unsent += 1
            start = place + 1
        busy = depth - free_count
        if busy == 0:
            if load_acquire(table + STOPPING):
                return 0
            sleep_while(table + EPOCH, epoch, IDLE_NS, scratch.ctypes.data)
            continue
        wait_for = 0 if free_count > 0 and unsent >= SENT_AT_ONCE else 1  # there may be more to send
        sent = system_call(IO_URING_ENTER, ring[RING_FD], unsent, wait_for, GET_EVENTS, 0, 0)
        if sent >= 0:
            unsent -= sent
        elif sent not in (-EINTR, -EAGAIN, -EBUSY):
            give_up(table, ops, free, free_count, -sent)
            return -sent
        head, tail = load_int(ring[CQ_HEAD]), load_acquire_int(ring[CQ_TAIL])
        while head != tail:
            entry = ring[CQES] + (head & ring[CQ_MASK]) * CQE_BYTES
            op, result = load_word(entry), load_int(entry + 8)
            if result >= 1 << 31:
                result -= 1 << 32
            head = (head + 1) & 0xFFFFFFFF
            if complete(table, ring, ops, op, result):
                free[free_count] = op
                free_count += 1
            else:
                unsent += 1
        store_release_int(ring[CQ_HEAD], head)
