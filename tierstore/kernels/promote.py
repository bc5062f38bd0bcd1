"""Choosing records of the DRAM arena for a tier above it, and finding where that tier has put them.

A record is worth its place above once it was read often enough in DRAM: so many times in the main queue,
or as often as the small queue counts. When it is taken, its reads there are counted anew: so it is not
taken again for the same reads, should the tier above drop it, and DRAM lets go of it sooner, as those
who read it above do not read it here.

The tier above is known by its *shadow*, an arena whose records have no bytes.
"""

from __future__ import annotations

from engram_client.arena.atomics import copy_bytes, load_byte, load_half, load_word, store_byte
from engram_client.arena.layout import (
    KEY_AT,
    LINE_BYTES,
    MAIN,
    OWNER_AT,
    QUEUE_MASK,
    SMALL,
    SMALL_READ,
    STATES_AT,
    TAGS_AT,
    WAYS,
)
from engram_client.arena.read import find_way, mix, set_of, tag_of
from engram_client.jit import inline_kernel, kernel


@inline_kernel
def place_in(index, slots, sets, slot_bytes, key, owner):
    """The slot that holds a record, or -1; the caller keeps writers out."""
    h = mix(key, owner)
    which = set_of(h, sets)
    line, set_slots = index + which * LINE_BYTES, slots + which * WAYS * slot_bytes
    way = find_way(line, set_slots, slot_bytes, tag_of(h), key, owner)
    return which * WAYS + way if way >= 0 else -1


@kernel
def take_hot(arena, shadow, first, last, reads_min, target, entries_max):
    """Copy slots of sets [first, last) that are worth it and not in the shadow to `target`.

    `arena` and `shadow`: addresses of index and slots, sets, slot_bytes. The caller holds both locks.
    Returns the set to go on with and how many slots were copied, at most `entries_max`.
    """
    index, slots, _, slot_bytes = arena
    entries = 0
    for which in range(first, last):
        line = index + which * LINE_BYTES
        for way in range(WAYS):
            state = load_byte(line + STATES_AT + way)
            queue = state & QUEUE_MASK
            least = MAIN + reads_min if queue >= MAIN else min(SMALL + reads_min, SMALL_READ)
            if load_half(line + TAGS_AT + 2 * way) == 0 or queue < least:
                continue
            slot = slots + (which * WAYS + way) * slot_bytes
            key, owner = load_word(slot + KEY_AT), load_word(slot + OWNER_AT)
            if place_in(shadow[0], shadow[1], shadow[2], shadow[3], key, owner) >= 0:
                continue
            if entries == entries_max:
                return which, entries
            copy_bytes(target + entries * slot_bytes, slot, slot_bytes)
            store_byte(line + STATES_AT + way, state & ~QUEUE_MASK | (MAIN if queue >= MAIN else SMALL))
            entries += 1
    return last, entries


@kernel
def places_of(shadow, keys, owners, places):
    """Where each record lies now, or -1: int64 [n] all."""
    for i in range(keys.size):
        places[i] = place_in(shadow[0], shadow[1], shadow[2], shadow[3], keys[i], owners[i])
