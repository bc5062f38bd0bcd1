"""Trained rows in the arena: found for an update, taken in, written back.

To readers it is an arena like any other (engram_client/arena). Beside it, for writers alone, lie a word of
16 *dirty* bits for each set: ways whose row is newer than what the log has. Such a row is never
dropped. It is copied out, handed to the log, and only then marked clean; what leaves is always clean.

So that newcomers find room, a set keeps at most `DIRTY_MAX` dirty ways from one update to the next: the
oldest beyond that are written back, and stay readable. Only the one writer whose turn it is makes ways dirty
or clean; the arena's lock, which readers who admit also take, holds for each call of these kernels and never
across I/O. Between copying a dirty row out and marking it clean nobody can change it or take its way.

A *stamp* tells when rows of one hash were last marked clean. Whoever reads a row from the log while it is
written back may get what was there before; he compares stamps when he is done, and reads again.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import (
    copy_bytes,
    load_byte,
    load_half,
    load_word,
    prefetch_line,
)
from engram_client.arena.layout import (
    GHOST_BYTES,
    KEY_AT,
    LINE_BYTES,
    MAIN,
    OWNER_AT,
    PLACE_SHIFT,
    QUEUE_MASK,
    RECORD_AT,
    SEQUENCE_AT,
    SMALL,
    STATES_AT,
    TAGS_AT,
    WAYS,
)
from engram_client.arena.read import ask_for, find_way, mix, set_of, tag_of
from engram_client.jit import inline_kernel, kernel
from tierstore.kernels.admit import empty_set, write_record
from tierstore.kernels.dueling import NEUTRAL
from tierstore.kernels.replacement import choose_way, recall, remember

DIRTY_MAX = 6  # of a set's 16 ways, between updates: what is read must outlive the step that updates it
ALL_DIRTY = (1 << WAYS) - 1
BLOCK = 16
ADMITTED, EVICTED, COUNTS = range(3)  # places in the counts array, and how many
ABSENT, TAKEN, STALE = range(3)  # what became of a row that was read from the log


@inline_kernel
def stamp_of(h, stamps):
    """Where the stamp of a hash lies; `stamps` has a power of two of them."""
    return np.int64(h >> np.uint64(16)) & (stamps.size - 1)


@kernel
def find_to_update(index, slots, sets, slot_bytes, keys, owner, dirty, rows, guards, updated_sets):
    """Find rows and mark them dirty: rows int64 [n] gets their addresses or 0, guards their sets' sequences.

    `updated_sets` int64 [n] gets the set of each. Returns how many are not there.
    """
    missing = 0
    for start in range(0, keys.size + BLOCK, BLOCK):
        for i in range(start, min(keys.size, start + BLOCK)):
            updated_sets[i] = set_of(mix(keys[i], owner), sets)
            prefetch_line(index + updated_sets[i] * LINE_BYTES)
        for i in range(max(0, start - BLOCK), min(keys.size, start)):
            which = updated_sets[i]
            line, set_slots = index + which * LINE_BYTES, slots + which * WAYS * slot_bytes
            way = find_way(line, set_slots, slot_bytes, tag_of(mix(keys[i], owner)), keys[i], owner)
            if way < 0:
                rows[i] = guards[i] = 0
                missing += 1
            else:
                rows[i], guards[i] = set_slots + way * slot_bytes + RECORD_AT, line + SEQUENCE_AT
                dirty[which] |= 1 << way
    return missing


@kernel
def sets_of_rows(sets, keys, owner, found):
    """The set of each row, to `found` int64 [n]."""
    for i in range(keys.size):
        found[i] = set_of(mix(keys[i], owner), sets)


@kernel
def find_absent(index, slots, sets, slot_bytes, keys, owner, absent):
    """List the positions of keys that are not there in `absent` int64 [n]; how many."""
    found = 0
    for start in range(0, keys.size + BLOCK, BLOCK):
        for i in range(start, min(keys.size, start + BLOCK)):
            prefetch_line(index + set_of(mix(keys[i], owner), sets) * LINE_BYTES)
        for i in range(max(0, start - BLOCK), min(keys.size, start)):
            h = mix(keys[i], owner)
            which = set_of(h, sets)
            line, set_slots = index + which * LINE_BYTES, slots + which * WAYS * slot_bytes
            if find_way(line, set_slots, slot_bytes, tag_of(h), keys[i], owner) < 0:
                absent[found] = i
                found += 1
    return found


@inline_kernel
def take_in(line, ghost_line, set_slots, slot_bytes, dirty_ways, tag, key, owner, source, row_bytes, counts):
    """Put a row that is not there in the place of a clean one; its way, or -1 where all are dirty."""
    if dirty_ways == ALL_DIRTY:
        return np.int64(-1)
    known = recall(line, ghost_line, tag)
    way = choose_way(line, NEUTRAL, dirty_ways)
    assert dirty_ways >> way & 1 == 0
    old_tag = load_half(line + TAGS_AT + 2 * way)
    if old_tag != 0:
        counts[EVICTED] += 1
        remember(line, ghost_line, old_tag)
    counts[ADMITTED] += 1
    slot = set_slots + way * slot_bytes
    write_record(line, slot, way, tag, key, owner, source, row_bytes, MAIN if known else SMALL)
    return np.int64(way)


@kernel
def admit_updated(
    index, slots, ghosts, sets, slot_bytes, row_bytes, keys, owner, source, dirty, waiting, counts
):
    """Take in rows as an update has left them, dirty; row i lies at source + i * row_bytes.

    Only those of `waiting` bool [n], which becomes False for each that found a place. A row that a reader
    has brought meanwhile is written over. Returns how many still wait: their sets hold dirty rows alone.
    """
    left = 0
    for i in range(keys.size):
        if not waiting[i]:
            continue
        h = mix(keys[i], owner)
        which, tag, row = set_of(h, sets), tag_of(h), source + i * row_bytes
        line, set_slots = index + which * LINE_BYTES, slots + which * WAYS * slot_bytes
        way = find_way(line, set_slots, slot_bytes, tag, keys[i], owner)
        if way >= 0:
            slot = set_slots + way * slot_bytes
            state = load_byte(line + STATES_AT + way)
            write_record(line, slot, way, tag, keys[i], owner, row, row_bytes, state & QUEUE_MASK)
        else:
            way = take_in(
                line, ghosts + which * GHOST_BYTES, set_slots, slot_bytes, dirty[which], tag, keys[i], owner,
                row, row_bytes, counts,
            )  # fmt: skip
        if way < 0:
            left += 1
        else:
            dirty[which] |= 1 << way
            waiting[i] = False
    return left


@kernel
def admit_read(
    index,
    slots,
    ghosts,
    sets,
    slot_bytes,
    row_bytes,
    keys,
    owner,
    source,
    dirty,
    stamps,
    since,
    fates,
    counts,
):
    """Take in rows that were read from the log after the moment `since`; row i at source + i * row_bytes.

    A row that has come into the arena meanwhile is newer and overwrites the one that was read. fates uint8
    [n]: TAKEN, ABSENT (good, but its set has no room) or STALE: it may be older than an update that had
    ended before `since`, and must be read again. Returns how many are STALE.
    """
    stale = 0
    for i in range(keys.size):
        h = mix(keys[i], owner)
        which, tag, row = set_of(h, sets), tag_of(h), source + i * row_bytes
        line, set_slots = index + which * LINE_BYTES, slots + which * WAYS * slot_bytes
        way = find_way(line, set_slots, slot_bytes, tag, keys[i], owner)
        if way >= 0:
            copy_bytes(row, set_slots + way * slot_bytes + RECORD_AT, row_bytes)
            fates[i] = TAKEN
        elif stamps[stamp_of(h, stamps)] > since:
            fates[i] = STALE
            stale += 1
        else:
            way = take_in(
                line, ghosts + which * GHOST_BYTES, set_slots, slot_bytes, dirty[which], tag, keys[i], owner,
                row, row_bytes, counts,
            )  # fmt: skip
            fates[i] = TAKEN if way >= 0 else ABSENT
    return stale


@inline_kernel
def first_to_write_back(line, ways):
    """Of these dirty ways the one that would be the first to leave: on trial before proven, then by age."""
    first, first_rank = -1, 0
    for way in range(WAYS):
        if ways >> way & 1:
            state = load_byte(line + STATES_AT + way)
            rank = (state >> PLACE_SHIFT) + (WAYS if state & QUEUE_MASK >= MAIN else 0)
            if first < 0 or rank < first_rank:
                first, first_rank = way, rank
    return first


@inline_kernel
def ways_in(bits):
    count = 0
    while bits:
        bits &= bits - 1
        count += 1
    return count


@kernel
def choose_dirty(index, dirty, among, start, keep, ways):
    """List dirty ways of sets `among` int64 [m], sorted, from number `start` on, so that `keep` stay in each.

    Writes set * WAYS + way to `ways` int64 while it has room, which it has for one set at least. Returns (the
    number to go on from, how many were listed). A set that occurs twice is listed once.
    """
    listed, last = 0, -1
    for number in range(start, among.size):
        which = among[number]
        left = np.int64(dirty[which])
        if left == 0 or which == last:
            continue
        last = which
        over = ways_in(left) - keep
        if listed + over > ways.size:
            return number, listed
        for _ in range(over):
            way = first_to_write_back(index + which * LINE_BYTES, left)
            left &= ~(1 << way)
            ways[listed] = which * WAYS + way
            listed += 1
    return among.size, listed


@kernel
def copy_ways(slots, slot_bytes, row_bytes, ways, keys, owners, rows):
    """Copy the rows in these ways to address `rows`, one after another; keys, owners int64 [n]."""
    for i in range(ways.size):
        if i + 8 < ways.size:
            ahead = slots + ways[i + 8] * slot_bytes
            ask_for(ahead, ahead + RECORD_AT + row_bytes)
        slot = slots + ways[i] * slot_bytes
        keys[i], owners[i] = load_word(slot + KEY_AT), load_word(slot + OWNER_AT)
        copy_bytes(rows + i * row_bytes, slot + RECORD_AT, row_bytes)


@kernel
def mark_clean(ways, keys, owners, dirty, stamps, now):
    """The log has these rows: their ways may leave, and who reads them meanwhile reads again."""
    for i in range(ways.size):
        which, way = ways[i] // WAYS, ways[i] % WAYS
        dirty[which] &= ~(1 << way)
        stamps[stamp_of(mix(keys[i], owners[i]), stamps)] = now


@kernel
def forget_all(index, sets, dirty):
    """Empty every set, dirty or not: the rows belong to a history that is given up."""
    for which in range(sets):
        empty_set(index + which * LINE_BYTES)
        dirty[which] = 0
