"""Writing records into an arena.

`replacement` chooses which record goes, in the stance that `dueling` gives the set. A newcomer has
no reads counted, so one that is never read again leaves soon. A record that a hint brought in is kept
for the reader that the hint announced.

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
    store_half,
    store_release,
    store_word,
    zero_bytes,
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
from engram_client.arena.read import find_way, mix, set_of, tag_of
from engram_client.jit import inline_kernel, kernel
from tierstore.kernels.dueling import note_eviction, stance_of
from tierstore.kernels.replacement import choose_way, make_newest, recall, remember

ADMITTED, EVICTED, RETURNED, COUNTS = range(4)  # places in the counts array, and how many


@inline_kernel
def empty_if_abandoned(line):
    """A set left odd was being written when its writer died: nothing in it can be trusted."""
    sequence = load_word(line + SEQUENCE_AT)
    if sequence & 1:
        zero_bytes(line + TAGS_AT, 2 * WAYS)
        store_release(line + SEQUENCE_AT, sequence + 1)


@inline_kernel
def write_record(line, slot, way, tag, key, owner, source, record_bytes, state):
    """Put one record into a way, invisible to readers until it is whole."""
    sequence = load_word(line + SEQUENCE_AT)
    store_word(line + SEQUENCE_AT, sequence + 1)
    fence_release()
    store_word(slot + KEY_AT, key)
    store_word(slot + OWNER_AT, owner)
    copy_bytes(slot + RECORD_AT, source, record_bytes)
    store_half(line + TAGS_AT + 2 * way, tag)
    make_newest(line, way, state)
    store_release(line + SEQUENCE_AT, sequence + 2)


@inline_kernel
def admit_record(
    index, slots, ghosts, sets, slot_bytes, duel, record_bytes, key, owner, source, state, counts, left
):
    """Write one record at address `source` into its set, unless it is there already.

    `state` is its queue, its reads and whether a reader is awaited; the set's memory may know better.
    Returns the set where another record had to leave, else -1; its slot is copied to address `left` first,
    unless that is 0. Adds to `counts`; RETURNED are records that the set's memory knew.
    """
    h = mix(key, owner)
    which = set_of(h, sets)
    tag = tag_of(h)
    line, ghost_line = index + which * LINE_BYTES, ghosts + which * GHOST_BYTES
    set_slots = slots + which * WAYS * slot_bytes
    empty_if_abandoned(line)
    if find_way(line, set_slots, slot_bytes, tag, key, owner) >= 0:
        return -1
    known = recall(line, ghost_line, tag)
    way = choose_way(line, stance_of(duel, which), 0)
    slot = set_slots + way * slot_bytes
    old_tag = load_half(line + TAGS_AT + 2 * way)
    evicts = old_tag != 0
    if evicts and left != 0:
        copy_bytes(left, slot, slot_bytes)
    counts[ADMITTED] += 1
    if evicts:
        counts[EVICTED] += 1
        remember(line, ghost_line, old_tag)
    if known:
        counts[RETURNED] += 1
        if state & QUEUE_MASK < MAIN:
            state = state & WANTED | MAIN
    write_record(line, slot, way, tag, key, owner, source, record_bytes, state)
    return which if evicts else -1


@kernel
def admit_records(
    index, slots, ghosts, sets, slot_bytes, duel, record_bytes,
    keys, owners, source, places, wanted_soon, counts,
):  # fmt: skip
    """Write records into the arena; one already there is left alone.

    Addresses (int64): `index`, `slots` and `ghosts` of the arena, and `source`, where record i starts
    at source + places[i] * record_bytes. `keys`, `owners`, `places` int64 [n]; `wanted_soon` 1 for
    records that a hint asked for, else 0. Adds to `counts` int64 [COUNTS] and to `duel`.
    """
    for i in range(keys.size):
        which = admit_record(
            index, slots, ghosts, sets, slot_bytes, duel, record_bytes, keys[i], owners[i],
            source + places[i] * record_bytes, SMALL | WANTED * wanted_soon, counts, 0,
        )  # fmt: skip
        if which >= 0:
            note_eviction(duel, which, sets)


@kernel
def exchange_records(
    index, slots, ghosts, sets, slot_bytes, duel, record_bytes,
    keys, owners, source, places, wanted_soon, counts,
):  # fmt: skip
    """As `admit_records`; a record that had to leave takes the place of the one it left for.

    Its key and owner go into `keys` and `owners`, its bytes to that record's place. Where nothing left,
    the key becomes -1.
    """
    left = np.empty(slot_bytes, np.uint8)
    for i in range(keys.size):
        at = np.int64(left.ctypes.data)  # here, so that `left` lives as long as the loop
        record = source + places[i] * record_bytes
        which = admit_record(
            index, slots, ghosts, sets, slot_bytes, duel, record_bytes, keys[i], owners[i],
            record, SMALL | WANTED * wanted_soon, counts, at,
        )  # fmt: skip
        if which >= 0:
            note_eviction(duel, which, sets)
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
    zero_bytes(line + STATES_AT, WAYS)
    store_release(line + SEQUENCE_AT, sequence + 2)


@kernel
def move_sets(
    old_index, old_slots, first, last, index, slots, ghosts, sets, slot_bytes, duel, record_bytes, counts
):
    """Move the records of sets [first, last) of one arena into another, and empty those sets.

    Addresses (int64) of both arenas; slots have the same size. Which set a record belongs to rises
    with its hash in both, so moving sets in order fills the other arena in order. Records keep their
    queue, their reads and their order of arrival; ghosts stay behind, and `duel` learns nothing. Adds
    to `counts`.
    """
    for which in range(first, last):
        line = old_index + which * LINE_BYTES
        set_slots = old_slots + which * WAYS * slot_bytes
        empty_if_abandoned(line)
        for step in range(WAYS * WAYS):  # the ways in order of arrival
            way = step % WAYS
            state = load_byte(line + STATES_AT + way)
            if state >> PLACE_SHIFT == step // WAYS and load_half(line + TAGS_AT + 2 * way) != 0:
                slot = set_slots + way * slot_bytes
                admit_record(
                    index, slots, ghosts, sets, slot_bytes, duel, record_bytes, load_word(slot + KEY_AT),
                    load_word(slot + OWNER_AT), slot + RECORD_AT, state & (QUEUE_MASK | WANTED), counts, 0,
                )  # fmt: skip
        empty_set(line)
