"""Reading records out of an arena: one kernel call for a batch, many cache misses in flight.

A look-up of one record touches three places that depend on each other: the index line, the slot's
header, the rest of the record. Done one record at a time, each waits for memory. So entries go
through in blocks of 16 and three passes: ask for all index lines, match tags and ask for the head of
every slot, then compare keys and copy, asking for the rest of a record four records ahead. By the
time a pass needs a line it is on its way, and never more lines are than the processor can track.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import (
    copy_bytes,
    fence_acquire,
    load_acquire,
    load_byte,
    load_half,
    load_relaxed,
    load_word,
    prefetch_line,
    store_byte,
    zero_bytes,
)
from engram_client.arena.layout import (
    KEY_AT,
    LINE_BYTES,
    OWNER_AT,
    RECORD_AT,
    SEQUENCE_AT,
    TAGS_AT,
    VISITED_AT,
    WAYS,
)
from engram_client.jit import inline_kernel, kernel

BLOCK = 16
TRIES = 8  # reads of a set that a writer keeps changing, before the record counts as a miss
CACHE_LINE_BYTES = 64
HEAD_BYTES = 320  # of a slot, asked for by the second pass: a whole row of 264 bytes
AHEAD = 4  # records, for what lies behind the head

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
    for way in range(WAYS):
        if load_half(line + TAGS_AT + 2 * way) == tag:
            slot = set_slots + way * slot_bytes
            if load_word(slot + KEY_AT) == key and load_word(slot + OWNER_AT) == owner:
                return way
    return -1


@inline_kernel
def first_tag(line, tag):
    """The first way with this tag, or -1: only a guess of what to prefetch."""
    for way in range(WAYS):
        if load_half(line + TAGS_AT + 2 * way) == tag:
            return way
    return -1


@inline_kernel
def copy_if_present(line, set_slots, slot_bytes, tag, key, owner, part_at, part_bytes, target):
    """Copy a part of the record and return True, or return False: a miss."""
    for _ in range(TRIES):
        before = load_acquire(line + SEQUENCE_AT)
        if before & 1:
            continue
        way = find_way(line, set_slots, slot_bytes, tag, key, owner)
        if way >= 0:
            copy_bytes(target, set_slots + way * slot_bytes + RECORD_AT + part_at, part_bytes)
        fence_acquire()
        if load_relaxed(line + SEQUENCE_AT) == before:
            if way >= 0 and load_byte(line + VISITED_AT + way) == 0:
                store_byte(line + VISITED_AT + way, 1)
            return way >= 0
    return False


@inline_kernel
def prefetch_range(address, first, last):
    """Ask for the cache lines of bytes [first, last) behind an address."""
    for at in range(first, last, CACHE_LINE_BYTES):
        prefetch_line(address + at)


@kernel
def read_records(
    index, slots, sets, slot_bytes, keys, owner, orders, part_at, part_bytes, out, misses, counts
):
    """Copy a part of each record found; list the others.

    Addresses (int64): `index`, `slots` of the arena, `out` of n * part_bytes bytes. `keys` int64
    [n], entry i of order i % orders; `owner` is the owner of order 0. Key -1 is answered with
    zeros. Writes the positions of missing entries to `misses` int64 [n] and adds to `counts`
    (MASKED, MISSED). Returns the number of misses.
    """
    lines = np.empty(BLOCK, np.int64)
    places = np.empty(BLOCK, np.int64)
    tags = np.empty(BLOCK, np.int64)
    likely = np.empty(BLOCK, np.int64)  # the slot with the right tag, or 0
    part_end = part_at + part_bytes + RECORD_AT
    missed = masked = 0
    for start in range(0, keys.size, BLOCK):
        count = min(BLOCK, keys.size - start)
        for j in range(count):
            h = mix(keys[start + j], owner + (start + j) % orders)
            which = set_of(h, sets)
            lines[j] = index + which * LINE_BYTES
            places[j] = slots + which * WAYS * slot_bytes
            tags[j] = tag_of(h)
            prefetch_line(lines[j])
        for j in range(count):
            way = first_tag(lines[j], tags[j])
            likely[j] = places[j] + way * slot_bytes if way >= 0 else 0
            if way >= 0:
                prefetch_line(likely[j])
                prefetch_range(likely[j] + part_at, CACHE_LINE_BYTES, min(HEAD_BYTES, part_end - part_at))
        for j in range(count):
            i = start + j
            if j + AHEAD < count and likely[j + AHEAD]:
                prefetch_range(likely[j + AHEAD] + part_at, HEAD_BYTES, part_end - part_at)
            target = out + i * part_bytes
            if keys[i] == -1:
                zero_bytes(target, part_bytes)
                masked += 1
            elif not copy_if_present(
                lines[j],
                places[j],
                slot_bytes,
                tags[j],
                keys[i],
                owner + i % orders,
                part_at,
                part_bytes,
                target,
            ):
                misses[missed] = i
                missed += 1
    counts[MASKED] += masked
    counts[MISSED] += missed
    return missed


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
        if not copy_if_present(
            line, set_slots, slot_bytes, tag_of(h), keys[i], entry_owner, part_at, part_bytes, target
        ):
            misses[left] = i
            left += 1
    return left
