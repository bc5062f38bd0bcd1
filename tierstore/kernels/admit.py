"""Writing records into an arena.

`replacement` chooses which record goes. A newcomer has no reads counted, so one that is never read
again leaves soon. A record that a hint brought in is kept for the reader that the hint announced.

A writer makes the set's sequence odd, changes the set, and makes it even again; readers that
overlap throw their copy away. Writers of one arena must hold its lock.
"""

from __future__ import annotations

from engram_client.arena.atomics import (
    copy_bytes,
    fence_release,
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
    RECORD_AT,
    SEQUENCE_AT,
    SMALL,
    TAGS_AT,
    WANTED,
    WAYS,
)
from engram_client.arena.read import find_way, mix, set_of, tag_of
from engram_client.jit import inline_kernel, kernel
from tierstore.kernels.replacement import choose_way, make_newest, recall, remember

ADMITTED, EVICTED = 0, 1  # places in the counts array


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
    index, slots, ghosts, sets, slot_bytes, record_bytes, key, owner, source, wanted_soon, counts
):
    """Write one record at address `source` into the arena unless it is there."""
    h = mix(key, owner)
    which = set_of(h, sets)
    tag = tag_of(h)
    line, ghost_line = index + which * LINE_BYTES, ghosts + which * GHOST_BYTES
    set_slots = slots + which * WAYS * slot_bytes
    empty_if_abandoned(line)
    if find_way(line, set_slots, slot_bytes, tag, key, owner) >= 0:
        return
    known = recall(line, ghost_line, tag)
    way = choose_way(line)
    counts[ADMITTED] += 1
    old_tag = load_half(line + TAGS_AT + 2 * way)
    if old_tag != 0:
        counts[EVICTED] += 1
        remember(line, ghost_line, old_tag)
    state = (MAIN if known else SMALL) | (WANTED if wanted_soon else 0)
    slot = set_slots + way * slot_bytes
    write_record(line, slot, way, tag, key, owner, source, record_bytes, state)


@kernel
def admit_records(
    index, slots, ghosts, sets, slot_bytes, record_bytes, keys, owners, source, places, wanted_soon, counts
):
    """Write records into the arena; one already there is left alone.

    Addresses (int64): `index`, `slots` and `ghosts` of the arena, and `source`, where record i starts
    at source + places[i] * record_bytes. `keys`, `owners`, `places` int64 [n]; `wanted_soon` 1 for
    records that a hint asked for, else 0. Adds to `counts` (ADMITTED, EVICTED).
    """
    for i in range(keys.size):
        admit_record(
            index, slots, ghosts, sets, slot_bytes, record_bytes,
            keys[i], owners[i], source + places[i] * record_bytes, wanted_soon, counts,
        )  # fmt: skip
