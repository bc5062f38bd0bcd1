"""Trained rows in the arena: found for an update, taken in, written back.

To readers it is an arena like any other (engram_client/arena). Beside it, for writers alone, lie a word of
16 *dirty* bits for each set: ways whose row is newer than what the log has. Such a row is never
dropped. It is copied out, handed to the log, and only then marked clean; what leaves is always clean.

So that newcomers find room, a set that has no empty way left shall keep at most `DIRTY_MAX` dirty ones. Where
an update makes more of them dirty, the set is *crowded* and put on a list; its oldest dirty rows are written
back once the update is over, and stay readable. Only the one writer whose turn it is makes ways dirty or
clean; the arena's lock, which readers who admit also take, holds for each call of these kernels and never
across I/O. Between copying a dirty row out and marking it clean nobody can change it or take its way.

Who reads rows in training mostly brings gradients for them a step later, when other rows have been read
already. So a row that was read is *wanted* until it is updated: other clean rows leave before it, and of
wanted rows the oldest.

A *stamp* tells when rows of one hash were last marked clean. Whoever reads a row from the log while it is
written back may get what was there before; he compares stamps when he is done, and reads again.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import (
    copy_bytes,
    equal_halves,
    load_byte,
    load_half,
    load_word,
    lowest_bit,
    prefetch_line,
    store_byte,
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
    WANTED,
    WAYS,
)
from engram_client.arena.read import ask_for, find_way, mix, set_of, tag_of
from engram_client.jit import inline_kernel, kernel
from tierstore.kernels.admit import empty_set, write_record
from tierstore.kernels.dueling import NEUTRAL
from tierstore.kernels.replacement import choose_way, recall, remember

DIRTY_MAX = 4  # of a full set's 16 ways: what is read must outlive the step that updates it
ALL_DIRTY = (1 << WAYS) - 1
LISTED = 1 << WAYS  # a bit of a set's word beside its dirty ones: it is on the list of crowded sets
BLOCK = 16
ADMITTED, EVICTED, COUNTS = range(3)  # places in the counts array, and how many
ABSENT, TAKEN, STALE = range(3)  # what became of a row that was read from the log


@inline_kernel
def stamp_of(h, stamps):
    """Where the stamp of a hash lies; `stamps` has a power of two of them."""
    return np.int64(h >> np.uint64(16)) & (stamps.size - 1)


@inline_kernel
def count_ways(bits):
    """How many of 16 bits are set."""
    pairs = bits - (bits >> 1 & 0x5555)
    fours = (pairs & 0x3333) + (pairs >> 2 & 0x3333)
    bytes_ = fours + (fours >> 4) & 0x0F0F
    return bytes_ + (bytes_ >> 8) & 0x1F


@inline_kernel
def make_dirty(line, which, way, dirty, crowded):
    """Mark a way; a set that is full and has too many dirty ways now goes on the list `crowded`.

    `crowded` int64 [1 + sets]: how many sets are listed, then their numbers.
    """
    bits = np.int64(dirty[which]) | 1 << way
    full = equal_halves(line + TAGS_AT, 0) == 0
    if full and bits & LISTED == 0 and count_ways(bits & ALL_DIRTY) > DIRTY_MAX:
        bits |= LISTED
        crowded[0] += 1
        crowded[crowded[0]] = which
    dirty[which] = bits


@kernel
def find_to_update(index, slots, sets, slot_bytes, keys, owner, dirty, crowded, rows, guards):
    """Find rows and mark them dirty: rows int64 [n] gets their addresses or 0, guards their sets' sequences.

    Returns how many are not there. Until a row is looked at, `rows` and `guards` hold its tag and its set.
    """
    missing = 0
    for start in range(0, keys.size + 2 * BLOCK, BLOCK):
        asked = min(keys.size, start)
        for i in range(asked, min(keys.size, start + BLOCK)):
            h = mix(keys[i], owner)
            rows[i], guards[i] = tag_of(h), set_of(h, sets)
            prefetch_line(index + guards[i] * LINE_BYTES)
        for i in range(max(0, start - BLOCK), asked):
            ways = equal_halves(index + guards[i] * LINE_BYTES + TAGS_AT, rows[i])
            if ways != 0:
                prefetch_line(slots + (guards[i] * WAYS + lowest_bit(ways)) * slot_bytes)
        for i in range(max(0, start - 2 * BLOCK), min(keys.size, start - BLOCK)):
            which = guards[i]
            line, set_slots = index + which * LINE_BYTES, slots + which * WAYS * slot_bytes
            way = find_way(line, set_slots, slot_bytes, rows[i], keys[i], owner)
            if way < 0:
                rows[i] = guards[i] = 0
                missing += 1
            else:
                rows[i], guards[i] = set_slots + way * slot_bytes + RECORD_AT, line + SEQUENCE_AT
                state = load_byte(line + STATES_AT + way)
                if state & WANTED:
                    store_byte(line + STATES_AT + way, state & ~WANTED)
                make_dirty(line, which, way, dirty, crowded)
    return missing


@inline_kernel
def choose_clean(line, dirty_ways):
    """A clean way for a newcomer, of which there is one: a wanted row's where all clean rows are wanted.

    Readers mark rows as wanted without a lock. So where the last that was not is marked meanwhile, the choice
    may fall on a dirty one, and the oldest clean row goes instead.
    """
    oldest, oldest_place, others = np.int64(-1), WAYS, False
    for way in range(WAYS):
        if dirty_ways >> way & 1 == 0:
            state = load_byte(line + STATES_AT + way)
            if state & WANTED == 0 or load_half(line + TAGS_AT + 2 * way) == 0:
                others = True
            if oldest < 0 or state >> PLACE_SHIFT < oldest_place:
                oldest, oldest_place = np.int64(way), state >> PLACE_SHIFT
    if others:
        way = choose_way(line, NEUTRAL, dirty_ways)
        if dirty_ways >> way & 1 == 0:
            return np.int64(way)
    return oldest


@inline_kernel
def take_in(
    line, ghost_line, set_slots, slot_bytes, dirty_ways, tag, key, owner, source, row_bytes, wanted, counts
):
    """Put a row that is not there in the place of a clean one; its way, or -1 where all are dirty."""
    dirty_ways &= ALL_DIRTY
    if dirty_ways == ALL_DIRTY:
        return np.int64(-1)
    known = recall(line, ghost_line, tag)
    way = choose_clean(line, dirty_ways)
    assert dirty_ways >> way & 1 == 0
    old_tag = load_half(line + TAGS_AT + 2 * way)
    if old_tag != 0:
        counts[EVICTED] += 1
        remember(line, ghost_line, old_tag)
    counts[ADMITTED] += 1
    slot = set_slots + way * slot_bytes
    write_record(line, slot, way, tag, key, owner, source, row_bytes, (MAIN if known else SMALL) | wanted)
    return np.int64(way)


@kernel
def admit_updated(
    index, slots, ghosts, sets, slot_bytes, row_bytes, keys, owner, source, dirty, crowded, waiting, counts
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
                line, ghosts + which * GHOST_BYTES, set_slots, slot_bytes, np.int64(dirty[which]), tag,
                keys[i], owner, row, row_bytes, 0, counts,
            )  # fmt: skip
        if way < 0:
            left += 1
        else:
            make_dirty(line, which, way, dirty, crowded)
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
                line, ghosts + which * GHOST_BYTES, set_slots, slot_bytes, np.int64(dirty[which]), tag,
                keys[i], owner, row, row_bytes, WANTED, counts,
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
def list_ways(line, which, bits, count, ways, listed):
    """Write the first `count` of these dirty ways to leave, as set * WAYS + way, to ways[listed:]."""
    for number in range(count):
        way = first_to_write_back(line, bits)
        bits &= ~(1 << way)
        ways[listed + number] = which * WAYS + way


@kernel
def choose_crowded(index, dirty, crowded, ways):
    """List what has to leave crowded sets, from the last on, in `ways` int64, with room for one set at least.

    Returns (how many sets stay on the list once these ways are clean, how many ways were listed).
    """
    left, listed = crowded[0], 0
    while left > 0:
        which = crowded[left]
        bits = np.int64(dirty[which]) & ALL_DIRTY
        over = max(0, count_ways(bits) - DIRTY_MAX)
        if listed + over > ways.size:
            break
        list_ways(index + which * LINE_BYTES, which, bits, over, ways, listed)
        listed += over
        left -= 1
    return left, listed


@kernel
def choose_dirty(dirty, start, ways):
    """List every dirty way of sets from number `start` on in `ways` int64, with room for one set at least.

    Returns (the set to go on from, how many ways were listed).
    """
    listed = 0
    for which in range(start, dirty.size):
        bits = np.int64(dirty[which]) & ALL_DIRTY
        if listed + count_ways(bits) > ways.size:
            return which, listed
        for way in range(WAYS if bits else 0):
            if bits >> way & 1:
                ways[listed] = which * WAYS + way
                listed += 1
    return dirty.size, listed


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
def mark_clean(ways, keys, owners, dirty, crowded, left, stamps, now):
    """The log has these rows: their ways may leave, and who reads them meanwhile reads again.

    Of the list of crowded sets the first `left` stay.
    """
    for number in range(left, crowded[0]):
        dirty[crowded[1 + number]] &= ALL_DIRTY
    crowded[0] = left
    for i in range(ways.size):
        which, way = ways[i] // WAYS, ways[i] % WAYS
        dirty[which] &= ~(1 << way)
        stamps[stamp_of(mix(keys[i], owners[i]), stamps)] = now


@kernel
def forget_all(index, sets, dirty, crowded):
    """Empty every set, dirty or not: the rows belong to a history that is given up."""
    crowded[0] = 0
    for which in range(sets):
        empty_set(index + which * LINE_BYTES)
        dirty[which] = 0
