"""Reading records out of an arena: one kernel call for a batch, many cache misses in flight.

A look-up of one record touches three places that depend on each other: the index line, the slot's
header, the rest of the record. Done one record at a time, each waits for memory. So entries go
through in blocks of 16 and three passes: ask for all index lines; match tags, all 16 of a set at
once, and ask for the head of every slot; compare keys and copy, asking for the rest of a record four
records ahead. Each pass works one block behind the one before it, so there is copying to do
while lines are on their way.

Records are asked for into the second cache. The first can wait for some twenty lines at a time; a
prefetch that finds them all taken holds up the copying behind it.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import (
    MOVE_BYTES,
    copy_bytes,
    equal_halves,
    fence_acquire,
    load_acquire,
    load_byte,
    load_relaxed,
    load_word,
    lowest_bit,
    move_bytes,
    prefetch_line,
    prefetch_line_to_second_cache,
    store_byte,
    zero_bytes,
)
from engram_client.arena.layout import (
    KEY_AT,
    LINE_BYTES,
    MAIN_READ,
    OWNER_AT,
    QUEUE_MASK,
    RECORD_AT,
    SEQUENCE_AT,
    SMALL_READ,
    STATES_AT,
    TAGS_AT,
    WANTED,
    WAYS,
)
from engram_client.jit import inline_kernel, kernel

BLOCK = 16
RING = 4 * BLOCK  # a power of two, and no less than the entries of three blocks
RING_MASK = RING - 1
OWNER, SET, TAG, PART = 0, 1, 2, 3  # of an entry on its way; part 0: no tag matches
RING_FIELDS = 4
TRIES = 8  # reads of a set that a writer keeps changing, before the record counts as a miss
CACHE_LINE_BYTES = 64
HEAD_BYTES = 320  # of a part, asked for by the second pass: a whole row
AHEAD = 4  # entries, for what lies behind the head

MASKED, MISSED = 0, 1  # places in the counts array


@inline_kernel
def mix(key, owner):
    """64 well-mixed bits of key and owner (the finalizer of splitmix64)."""
    h = np.uint64(key) ^ (np.uint64(owner) * np.uint64(0x9E3779B97F4A7C15))
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


@inline_kernel
def set_of(h, sets):
    """Set number in [0, sets) from the upper half of the hash, without a division."""
    return np.int64(((h >> np.uint64(32)) * np.uint64(sets)) >> np.uint64(32))


@inline_kernel
def tag_of(h):
    """Fingerprint in 1..65535 from the lower half of the hash; 0 means an empty way."""
    tag = np.int64(h & np.uint64(0xFFFF))
    return tag if tag != 0 else np.int64(1)


@inline_kernel
def find_way(line, set_slots, slot_bytes, tag, key, owner):
    """The way that holds exactly this record, or -1."""
    ways = equal_halves(line + TAGS_AT, tag)
    while ways != 0:
        way = lowest_bit(ways)
        slot = set_slots + way * slot_bytes
        if load_word(slot + KEY_AT) == key and load_word(slot + OWNER_AT) == owner:
            return way
        ways &= ways - 1
    return np.int64(-1)


@inline_kernel
def count_read(line, way, part_bytes):
    """One read more of this way; a record that was read often leaves its line clean.

    Who reads no bytes is a hint: it counts, and its reader is awaited. That reader, when it comes,
    is counted already.
    """
    state = load_byte(line + STATES_AT + way)
    queue = state & QUEUE_MASK
    more = state if queue in (SMALL_READ, MAIN_READ) else state + 1
    if part_bytes == 0:
        new = more | WANTED
    else:
        new = state - WANTED if state & WANTED else more
    if new != state:
        store_byte(line + STATES_AT + way, new)


@inline_kernel
def copy_part(target, source, part_bytes):
    """Copy in pieces of 32 bytes; the last one overlaps the one before it."""
    last = part_bytes - MOVE_BYTES
    if last < 0:
        copy_bytes(target, source, part_bytes)
        return
    for at in range(0, last, MOVE_BYTES):
        move_bytes(target + at, source + at)
    move_bytes(target + last, source + last)


@inline_kernel
def copy_if_present(line, set_slots, slot_bytes, tag, key, owner, part_at, part_bytes, target):
    """Copy a part of the record; its way, or -1: a miss."""
    for _ in range(TRIES):
        before = load_acquire(line + SEQUENCE_AT)
        if before & 1:
            continue
        way = find_way(line, set_slots, slot_bytes, tag, key, owner)
        if way >= 0:
            copy_part(target, set_slots + way * slot_bytes + RECORD_AT + part_at, part_bytes)
        fence_acquire()
        if load_relaxed(line + SEQUENCE_AT) == before:
            return way
    return np.int64(-1)


@inline_kernel
def ask_for(first, end):
    """Have the cache lines of addresses [first, end) come closer."""
    for address in range(first & -CACHE_LINE_BYTES, end, CACHE_LINE_BYTES):
        prefetch_line_to_second_cache(address)


@inline_kernel
def ask_for_sets(index, sets, keys, owner, orders, ring, first, end):
    """The first pass over entries [first, end): hash them, ask for their index lines."""
    for i in range(first, end):
        at = i & RING_MASK
        entry_owner = owner + i % orders
        h = mix(keys[i], entry_owner)
        ring[OWNER, at], ring[SET, at], ring[TAG, at] = entry_owner, set_of(h, sets), tag_of(h)
        prefetch_line(index + ring[SET, at] * LINE_BYTES)


@inline_kernel
def ask_for_heads(index, slots, slot_bytes, part_at, part_bytes, ring, first, end):
    """The second pass: where a tag matches, ask for the key and the head of the part.

    The first parts of a batch are asked for whole: nothing is copied yet, so memory is idle.
    """
    for i in range(first, end):
        at = i & RING_MASK
        ways = equal_halves(index + ring[SET, at] * LINE_BYTES + TAGS_AT, ring[TAG, at])
        ring[PART, at] = 0
        if ways != 0:
            slot = slots + (ring[SET, at] * WAYS + lowest_bit(ways)) * slot_bytes
            part = slot + RECORD_AT + part_at
            ring[PART, at] = part
            prefetch_line_to_second_cache(slot)
            ask_for(part, part + (part_bytes if i < AHEAD else min(part_bytes, HEAD_BYTES)))


@inline_kernel
def ask_for_rest(part_bytes, ring, i):
    """What lies behind the head of entry i, where there is such."""
    part = ring[PART, i & RING_MASK]
    if part != 0:
        ask_for(part + HEAD_BYTES, part + part_bytes)


@inline_kernel
def read_batch(
    index, slots, sets, slot_bytes, keys, owner, orders, part_at, part_bytes, out, misses, counts, counting
):
    """`read_records`; unless `counting`, nothing in the arena is written."""
    ring = np.empty((RING_FIELDS, RING), np.int64)
    n = keys.size
    missed = masked = 0
    for start in range(0, n + 2 * BLOCK, BLOCK):
        asked = min(n, start)
        ask_for_sets(index, sets, keys, owner, orders, ring, asked, min(n, start + BLOCK))
        ask_for_heads(index, slots, slot_bytes, part_at, part_bytes, ring, max(0, start - BLOCK), asked)
        for i in range(max(0, start - 2 * BLOCK), min(n, start - BLOCK)):
            if part_bytes > HEAD_BYTES and i + AHEAD < asked:
                ask_for_rest(part_bytes, ring, i + AHEAD)
            target = out + i * part_bytes
            if keys[i] == -1:
                zero_bytes(target, part_bytes)
                masked += 1
                continue
            at = i & RING_MASK
            which, tag, entry_owner = ring[SET, at], ring[TAG, at], ring[OWNER, at]
            line, set_slots = index + which * LINE_BYTES, slots + which * WAYS * slot_bytes
            way = copy_if_present(
                line, set_slots, slot_bytes, tag, keys[i], entry_owner, part_at, part_bytes, target
            )
            if way < 0:
                misses[missed] = i
                missed += 1
            elif counting:
                count_read(line, way, part_bytes)
    counts[MASKED] += masked
    counts[MISSED] += missed
    return missed


@kernel
def read_records(
    index, slots, sets, slot_bytes, keys, owner, orders, part_at, part_bytes, out, misses, counts
):
    """Copy a part of each record found; list the others.

    Addresses (int64): `index`, `slots` of the arena, `out` of n * part_bytes bytes. `keys` int64
    [n], entry i of order i % orders; `owner` is the owner of order 0. `part_bytes` 0 is what a
    hint asks for: nothing is copied, the records found are kept for who comes. Key -1 is answered with
    zeros. Writes the positions of missing entries to `misses` int64 [n] and adds to `counts`
    (MASKED, MISSED). Returns the number of misses.
    """
    return read_batch(
        index, slots, sets, slot_bytes, keys, owner, orders, part_at, part_bytes, out, misses, counts, True
    )


@kernel
def read_again(index, slots, sets, slot_bytes, keys, owner, orders, part_at, part_bytes, out, misses, missed):
    """Look for the entries `misses[:missed]` in another arena; keeps in `misses` what is not there.

    Else as `read_records`. Returns the number of misses left.
    """
    left = 0
    for m in range(missed):
        i = misses[m]
        entry_owner = owner + i % orders
        h = mix(keys[i], entry_owner)
        which = set_of(h, sets)
        line = index + which * LINE_BYTES
        set_slots = slots + which * WAYS * slot_bytes
        target = out + i * part_bytes
        way = copy_if_present(
            line, set_slots, slot_bytes, tag_of(h), keys[i], entry_owner, part_at, part_bytes, target
        )
        if way >= 0:
            count_read(line, way, part_bytes)
        else:
            misses[left] = i
            left += 1
    return left
