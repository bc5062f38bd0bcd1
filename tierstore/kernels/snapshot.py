"""Copying an arena's records out and in, whole sets at a time.

entry    int64 key, int64 owner | mark << 62, record, padding: as long as a slot of the arena

The mark is 1 for a record that was read again since it came; written back, it is in the main queue.
"""

from __future__ import annotations

from engram_client.arena.atomics import (
    copy_bytes,
    fence_acquire,
    load_acquire,
    load_byte,
    load_half,
    load_relaxed,
    load_word,
    store_word,
)
from engram_client.arena.layout import (
    KEY_AT,
    LINE_BYTES,
    MAIN,
    OWNER_AT,
    QUEUE_MASK,
    RECORD_AT,
    SEQUENCE_AT,
    SMALL,
    STATES_AT,
    TAGS_AT,
    WAYS,
)
from engram_client.arena.read import TRIES
from engram_client.jit import inline_kernel, kernel
from tierstore.kernels.admit import admit_record

MARK_SHIFT = 62
OWNER_MASK = (1 << MARK_SHIFT) - 1


@inline_kernel
def copy_set(line, set_slots, slot_bytes, target):
    """Copy a set's records to `target`; how many. A set that a writer keeps changing gives none."""
    for _ in range(TRIES):
        before = load_acquire(line + SEQUENCE_AT)
        count = 0
        for way in range(WAYS):
            if load_half(line + TAGS_AT + 2 * way) != 0:
                entry = target + count * slot_bytes
                copy_bytes(entry, set_slots + way * slot_bytes, slot_bytes)
                mark = 1 if load_byte(line + STATES_AT + way) & QUEUE_MASK != SMALL else 0
                store_word(entry + OWNER_AT, load_word(entry + OWNER_AT) | (mark << MARK_SHIFT))
                count += 1
        fence_acquire()
        if before & 1 == 0 and load_relaxed(line + SEQUENCE_AT) == before:
            return count
    return 0


@kernel
def copy_sets_out(index, slots, sets, slot_bytes, first, target, entries_max):
    """Copy sets from `first` on to address `target`, as long as a whole set still fits.

    Takes no lock: each set is copied as a reader would. Returns the set to go on with, and how many entries
    were copied.
    """
    entries = 0
    which = first
    while which < sets and entries + WAYS <= entries_max:
        line = index + which * LINE_BYTES
        entries += copy_set(
            line, slots + which * WAYS * slot_bytes, slot_bytes, target + entries * slot_bytes
        )
        which += 1
    return which, entries


@kernel
def admit_entries(
    index, slots, ghosts, sets, slot_bytes, duel, record_bytes, source, entries, owners, counts
):
    """Write entries back into an arena; the caller holds its lock.

    `owners` int64 [n, 2]: owners as they were written, ascending, and as they are now. Entries of
    other owners are left out. Adds to `counts` as `admit_records` does; `duel` learns nothing.
    """
    for i in range(entries):
        entry = source + i * slot_bytes
        word = load_word(entry + OWNER_AT)
        for j in range(len(owners)):
            if owners[j, 0] == word & OWNER_MASK:
                admit_record(
                    index, slots, ghosts, sets, slot_bytes, duel, record_bytes, load_word(entry + KEY_AT),
                    owners[j, 1], entry + RECORD_AT, MAIN if word >> MARK_SHIFT & 1 else SMALL, counts, 0,
                )  # fmt: skip
                break
