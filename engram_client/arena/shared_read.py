"""Reading records out of an arena that belongs to another process and is mapped read-only.

The passes are those of `engram_client.arena.read`, and so are hash, tags and the sequence check; only what
the reader leaves behind differs. It cannot count a read in the set's states. Where its read would change
the state, it writes a *touch* (engram_client/arena/mailbox.py) into its own ring, once for the
whole call; a record that was read often enough costs nothing.

All that does not change from call to call lies in a *view*, an array of words private to the client,
one for each table, range of heads and layout of the arenas. While arenas are being resized it names two
regions: what the first does not hold is looked for in the second.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import (
    copy_bytes,
    fence_acquire,
    fetch_add,
    load_acquire,
    load_byte,
    load_relaxed,
    load_word,
    prefetch_line,
    store_release,
    zero_bytes,
)
from engram_client.arena.layout import (
    LINE_BYTES,
    MAIN_READ,
    QUEUE_MASK,
    RECORD_AT,
    SEQUENCE_AT,
    SMALL_READ,
    STATES_AT,
    WANTED,
    WAYS,
)
from engram_client.arena.mailbox import (
    COUNTERS_AT,
    TOUCH,
    TOUCH_HEAD_AT,
    TOUCH_SET_SHIFT,
    TOUCH_WAY_SHIFT,
    TOUCHES_AT,
)
from engram_client.arena.read import (
    AHEAD,
    BLOCK,
    CACHE_LINE_BYTES,
    HEAD_BYTES,
    TRIES,
    find_way,
    first_tag,
    mix,
    prefetch_range,
    set_of,
    tag_of,
)
from engram_client.jit import inline_kernel, kernel

VIEW_WORDS = 24
# Words of a view, in bytes. A region: index, slots, sets, bytes of a slot, number as a touch has it.
CONTROL, SERVING, OWNER, ORDERS, PART_AT, PART_BYTES, MAILBOX, TOUCH_MASK = range(0, 64, 8)
NEW_REGION, OLD_REGION = 64, 128
INDEX, SLOTS, SETS, SLOT_BYTES, TOUCH_REGION = range(0, 40, 8)

NOT_SERVING = -1  # instead of a number of misses


@inline_kernel
def unchanged(line, before):
    """Whether no writer came into the set since `before` was its sequence; after the copy."""
    fence_acquire()
    return load_relaxed(line + SEQUENCE_AT) == before


@inline_kernel
def copy_shared(line, set_slots, slot_bytes, tag, key, owner, part_at, part_bytes, target):
    """Copy a part of the record; the way it was in, or -1: a miss."""
    for _ in range(TRIES):
        before = load_acquire(line + SEQUENCE_AT)
        if before & 1:
            continue
        way = find_way(line, set_slots, slot_bytes, tag, key, owner)
        if way >= 0:
            copy_bytes(target, set_slots + way * slot_bytes + RECORD_AT + part_at, part_bytes)
        if unchanged(line, before):
            return way
    return -1


@inline_kernel
def is_news(line, way):
    """Whether counting one read more would change the state of this way."""
    state = load_byte(line + STATES_AT + way)
    queue = state & QUEUE_MASK
    return state & WANTED != 0 or (queue != SMALL_READ and queue != MAIN_READ)


@inline_kernel
def touch_word(region, which, way, tag):
    return TOUCH | region | which << TOUCH_SET_SHIFT | way << TOUCH_WAY_SHIFT | tag


@inline_kernel
def write_touches(view, touches, count):
    """Into the ring, over the oldest; several threads may do so at once."""
    mailbox, mask = load_word(view + MAILBOX), load_word(view + TOUCH_MASK)
    first = fetch_add(mailbox + TOUCH_HEAD_AT, count)
    for i in range(count):
        store_release(mailbox + TOUCHES_AT + 8 * ((first + i) & mask), touches[i])


@inline_kernel
def read_one(region, key, owner, part_at, part_bytes, target):
    """Look for one record in a region; its touch, 0 where there is none to make, -1 for a miss."""
    h = mix(key, owner)
    which = set_of(h, load_word(region + SETS))
    tag = tag_of(h)
    line = load_word(region + INDEX) + which * LINE_BYTES
    slot_bytes = load_word(region + SLOT_BYTES)
    set_slots = load_word(region + SLOTS) + which * WAYS * slot_bytes
    way = copy_shared(line, set_slots, slot_bytes, tag, key, owner, part_at, part_bytes, target)
    if way < 0:
        return -1
    return touch_word(load_word(region + TOUCH_REGION), which, way, tag) if is_news(line, way) else 0


@inline_kernel
def ask_for_lines(view, keys, start, count, lines, places, tags, sets_of):
    """First pass over a block: where each record would be; asks for the index lines."""
    region, owner, orders = view + NEW_REGION, load_word(view + OWNER), load_word(view + ORDERS)
    index, slots, sets = load_word(region + INDEX), load_word(region + SLOTS), load_word(region + SETS)
    slot_bytes = load_word(region + SLOT_BYTES)
    for j in range(count):
        h = mix(load_word(keys + 8 * (start + j)), owner + (start + j) % orders)
        sets_of[j] = set_of(h, sets)
        lines[j] = index + sets_of[j] * LINE_BYTES
        places[j] = slots + sets_of[j] * WAYS * slot_bytes
        tags[j] = tag_of(h)
        prefetch_line(lines[j])


@inline_kernel
def ask_for_slots(view, count, lines, places, tags, likely):
    """Second pass: guess each record's slot from its tag; asks for the slots' heads."""
    slot_bytes, part_at = load_word(view + NEW_REGION + SLOT_BYTES), load_word(view + PART_AT)
    part_end = part_at + load_word(view + PART_BYTES) + RECORD_AT
    for j in range(count):
        way = first_tag(lines[j], tags[j])
        likely[j] = places[j] + way * slot_bytes if way >= 0 else 0
        if way >= 0:
            prefetch_line(likely[j])
            prefetch_range(likely[j] + part_at, CACHE_LINE_BYTES, min(HEAD_BYTES, part_end - part_at))


@inline_kernel
def read_block(view, keys, start, count, out, lines, places, tags, sets_of, likely, missed, touches, tally):
    """All three passes over up to `BLOCK` entries; notes misses and touches."""
    ask_for_lines(view, keys, start, count, lines, places, tags, sets_of)
    ask_for_slots(view, count, lines, places, tags, likely)
    owner, orders = load_word(view + OWNER), load_word(view + ORDERS)
    part_at, part_bytes = load_word(view + PART_AT), load_word(view + PART_BYTES)
    slot_bytes, number = (
        load_word(view + NEW_REGION + SLOT_BYTES),
        load_word(view + NEW_REGION + TOUCH_REGION),
    )
    old = load_word(view + OLD_REGION + INDEX)
    for j in range(count):
        i = start + j
        if j + AHEAD < count and likely[j + AHEAD]:
            prefetch_range(
                likely[j + AHEAD] + part_at, HEAD_BYTES, part_at + part_bytes + RECORD_AT - part_at
            )
        key, entry_owner, target = load_word(keys + 8 * i), owner + i % orders, out + i * part_bytes
        if key == -1:
            zero_bytes(target, part_bytes)
            tally[1] += 1
            continue
        way = copy_shared(
            lines[j], places[j], slot_bytes, tags[j], key, entry_owner, part_at, part_bytes, target
        )
        touch = -1
        if way >= 0:
            touch = touch_word(number, sets_of[j], way, tags[j]) if is_news(lines[j], way) else 0
        elif old != 0:
            touch = read_one(view + OLD_REGION, key, entry_owner, part_at, part_bytes, target)
        if touch > 0:
            touches[tally[2]] = touch
            tally[2] += 1
        elif touch < 0:
            missed[tally[0]] = i
            tally[0] += 1


@inline_kernel
def list_wanted(view, keys, count, out, missed, tally):
    """Where nothing is cached: every entry is missing but those of no row."""
    part_bytes = load_word(view + PART_BYTES)
    for i in range(count):
        if load_word(keys + 8 * i) == -1:
            zero_bytes(out + i * part_bytes, part_bytes)
            tally[1] += 1
        else:
            missed[tally[0]] = i
            tally[0] += 1


@kernel
def count_lookup(view, keys, masked, hits):
    """Add one look-up to the client's counters."""
    counters = load_word(view + MAILBOX) + COUNTERS_AT
    fetch_add(counters, 1)
    fetch_add(counters + 8, keys)
    fetch_add(counters + 16, masked)
    fetch_add(counters + 24, hits)


@kernel
def read_shared(view, keys, count, out, misses):
    """Copy a part of each record found, zeros for key -1; the number of entries not found.

    Addresses: `view`, `keys` int64 [count] (entry i of order i % orders), `out` of count * part bytes,
    `misses` int64 [count + 1] or 0. The positions of missing entries go to `misses`, and behind them the
    number of masked ones. With `misses` 0 the call ends early once something is missing, and then leaves
    nothing behind. Returns NOT_SERVING where the daemon has told its clients to stop. Counts the look-up
    where nothing is missing.
    """
    if load_acquire(load_word(view + CONTROL)) != load_word(view + SERVING):
        return NOT_SERVING
    block = np.empty((5, BLOCK), np.int64)
    touches, missed = np.empty(count, np.int64), np.empty(count, np.int64)
    tally = np.zeros(3, np.int64)  # missed, masked, touched
    if load_word(view + NEW_REGION + INDEX) == 0:
        list_wanted(view, keys, count, out, missed, tally)
    else:
        for start in range(0, count, BLOCK):
            read_block(
                view, keys, start, min(BLOCK, count - start), out,
                block[0], block[1], block[2], block[3], block[4], missed, touches, tally,
            )  # fmt: skip
            if misses == 0 and tally[0] != 0:
                break
    if tally[0] == 0:
        count_lookup(view, count, tally[1], count - tally[1])
    elif misses == 0:
        return tally[0]
    if tally[2] != 0:
        write_touches(view, touches, tally[2])
    for m in range(tally[0]):
        store_release(misses + 8 * m, missed[m])
    if misses != 0:
        store_release(misses + 8 * tally[0], tally[1])
    return tally[0]
