"""A client's side of the mailbox: posting requests, waiting for them, copying their rows.

engram_client/arena/mailbox.py draws the memory. Nothing here holds the GIL.
"""

from __future__ import annotations

from engram_client.arena.atomics import copy_bytes, fetch_or, load_acquire, load_word, store_release
from engram_client.arena.futex import EVERYBODY, SHARED, futex_wait, futex_wake
from engram_client.arena.mailbox import DONE_AT, SLOT_BYTES, SLOTS, SLOTS_AT
from engram_client.jit import kernel

WAITING, DONE, GONE = 0, 1, 2


@kernel
def post(pending, slot):
    """Hand a filled slot over; what was written before is seen by who takes it."""
    fetch_or(pending, 1 << slot)


@kernel
def wait_done(slot, number, gone, timeout_ns, timespec):
    """Sleep until request `number` of the slot at address `slot` is answered, so long at most.

    `gone` is the address of a word that becomes 1 when the daemon goes away, `timespec` of 16 bytes of
    scratch. Returns DONE, GONE, or WAITING, which may come early.
    """
    done = load_acquire(slot + DONE_AT)
    if done < number and load_acquire(gone) == 0:
        futex_wait(slot + DONE_AT, done, timeout_ns, timespec, SHARED)
        done = load_acquire(slot + DONE_AT)
    if done >= number:
        return DONE
    return GONE if load_acquire(gone) != 0 else WAITING


@kernel
def end_all_waits(mailbox, gone):
    """The daemon is gone: let everybody know who waits for it."""
    store_release(gone, 1)
    for slot in range(SLOTS):
        futex_wake(mailbox + SLOTS_AT + slot * SLOT_BYTES + DONE_AT, EVERYBODY, SHARED)


@kernel
def spread_parts(source, positions, count, part_bytes, out):
    """Part i of `count` at address `source` goes to entry positions[i] (int64, by address) of `out`."""
    for i in range(count):
        copy_bytes(out + load_word(positions + 8 * i) * part_bytes, source + i * part_bytes, part_bytes)
