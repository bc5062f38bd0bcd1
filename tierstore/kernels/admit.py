"""Writing records into an arena, and choosing which one goes.

Replacement is CLOCK within a set: the hand passes over ways that were read since it last came by,
taking their mark, and stops at the first that was not. A record that a look-up brought in comes
unmarked, so one that is never read again leaves before one that is. A record that a hint brought
in is known to be wanted: it comes marked, or it would leave before it was ever used.

A writer makes the set's sequence odd, changes the set, and makes it even again; readers that
overlap throw their copy away. Writers of one arena must hold its lock.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import (
    copy_bytes,
    fence_release,
    load_byte,
    load_half,
    load_word,
    store_byte,
    store_half,
    store_release,
    store_word,
    zero_bytes,
)
from engram_client.arena.layout import (
    HAND_AT,
    KEY_AT,
    LINE_BYTES,
    OWNER_AT,
    RECORD_AT,
    SEQUENCE_AT,
    TAGS_AT,
    VISITED_AT,
    WAYS,
)
from engram_client.arena.read import find_way, mix, set_of, tag_of
from engram_client.jit import inline_kernel, kernel

ADMITTED, EVICTED = 0, 1  # places in the counts array


@inline_kernel
def choose_way(line):
    """An empty way, else the first unvisited one from the hand on; the hand moves past it."""
    for way in range(WAYS):
        if load_half(line + TAGS_AT + 2 * way) == 0:
            return way
    hand = load_byte(line + HAND_AT)
    for _ in range(2 * WAYS):
        way = hand % WAYS
        hand += 1
        if load_byte(line + VISITED_AT + way) == 0:
            break
        store_byte(line + VISITED_AT + way, 0)
    store_byte(line + HAND_AT, hand % WAYS)
    return way


@inline_kernel
def empty_if_abandoned(line):
    """A set left odd was being written when its writer died: nothing in it can be trusted."""
    sequence = load_word(line + SEQUENCE_AT)
    if sequence & 1:
        zero_bytes(line + TAGS_AT, 2 * WAYS)
        store_release(line + SEQUENCE_AT, sequence + 1)


@inline_kernel
def write_record(line, slot, way, tag, key, owner, source, record_bytes, mark):
    """Put one record into a way, invisible to readers until it is whole."""
    sequence = load_word(line + SEQUENCE_AT)
    store_word(line + SEQUENCE_AT, sequence + 1)
    fence_release()
    store_word(slot + KEY_AT, key)
    store_word(slot + OWNER_AT, owner)
    copy_bytes(slot + RECORD_AT, source, record_bytes)
    store_half(line + TAGS_AT + 2 * way, tag)
    store_byte(line + VISITED_AT + way, mark)
    store_release(line + SEQUENCE_AT, sequence + 2)


@inline_kernel
def admit_one(index, slots, sets, slot_bytes, record_bytes, key, owner, source, mark, counts, left):
    """Write one record into its set, unless it is there already; True where another had to leave.

    That one's slot is copied to address `left` first, unless it is 0.
    """
    h = mix(key, owner)
    which = set_of(h, sets)
    tag = tag_of(h)
    line = index + which * LINE_BYTES
    set_slots = slots + which * WAYS * slot_bytes
    empty_if_abandoned(line)
    if find_way(line, set_slots, slot_bytes, tag, key, owner) >= 0:
        return False
    way = choose_way(line)
    slot = set_slots + way * slot_bytes
    evicts = load_half(line + TAGS_AT + 2 * way) != 0
    if evicts and left != 0:
        copy_bytes(left, slot, slot_bytes)
    write_record(line, slot, way, tag, key, owner, source, record_bytes, mark)
    counts[ADMITTED] += 1
    counts[EVICTED] += 1 if evicts else 0
    return evicts


@kernel
def admit_records(index, slots, sets, slot_bytes, record_bytes, keys, owners, source, places, mark, counts):
    """Write records into the arena; one already there is left alone.

    Addresses (int64): `index`, `slots`, and `source`, where record i starts at
    source + places[i] * record_bytes. `keys`, `owners`, `places` int64 [n]; `mark` 1 for records
    that are wanted soon, else 0. Adds to `counts` (ADMITTED, EVICTED).
    """
    for i in range(keys.size):
        record = source + places[i] * record_bytes
        admit_one(
            index, slots, sets, slot_bytes, record_bytes, keys[i], owners[i], record, mark, counts, 0
        )  # fmt: skip


@kernel
def exchange_records(
    index, slots, sets, slot_bytes, record_bytes, keys, owners, source, places, mark, counts
):
    """As `admit_records`; a record that had to leave takes the place of the one it left for.

    Its key and owner go into `keys` and `owners`, its bytes to that record's place. Where nothing left,
    the key becomes -1.
    """
    left = np.empty(slot_bytes, np.uint8)
    for i in range(keys.size):
        at = np.int64(left.ctypes.data)  # here, so that `left` lives as long as the loop
        record = source + places[i] * record_bytes
        if admit_one(
            index, slots, sets, slot_bytes, record_bytes, keys[i], owners[i], record, mark, counts, at
        ):  # fmt: skip
            keys[i], owners[i] = load_word(at + KEY_AT), load_word(at + OWNER_AT)
            copy_bytes(record, at + RECORD_AT, record_bytes)
        else:
            keys[i] = -1


@inline_kernel
def empty_set(line):
    """Forget every record of a set; readers inside it notice."""
    sequence = load_word(line + SEQUENCE_AT) & ~1
    store_word(line + SEQUENCE_AT, sequence + 1)
    fence_release()
    zero_bytes(line + TAGS_AT, 2 * WAYS)
    zero_bytes(line + VISITED_AT, WAYS)
    store_release(line + SEQUENCE_AT, sequence + 2)


@kernel
def move_sets(old_index, old_slots, old_slot_bytes, first, last, index, slots, sets, record_bytes, counts):
    """Move the records of sets [first, last) of one arena into another, and empty those sets.

    Addresses (int64) of both arenas; slots have the same size. Which set a record belongs to rises with its
    hash in both, so moving sets in order fills the other arena in order. Adds to `counts`.
    """
    for which in range(first, last):
        line = old_index + which * LINE_BYTES
        set_slots = old_slots + which * WAYS * old_slot_bytes
        empty_if_abandoned(line)
        for way in range(WAYS):
            if load_half(line + TAGS_AT + 2 * way) != 0:
                slot = set_slots + way * old_slot_bytes
                key, owner = load_word(slot + KEY_AT), load_word(slot + OWNER_AT)
                mark = load_byte(line + VISITED_AT + way)
                record = slot + RECORD_AT
                admit_one(
                    index, slots, sets, old_slot_bytes, record_bytes, key, owner, record, mark, counts, 0
                )  # fmt: skip
        empty_set(line)
