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
    fetch_add,
    load_acquire,
    load_byte,
    store_release,
    zero_bytes,
)
from engram_client.arena.layout import (
    LINE_BYTES,
    MAIN_READ,
    QUEUE_MASK,
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
    HEAD_BYTES,
    OWNER,
    RING,
    RING_FIELDS,
    RING_MASK,
    SET,
    TAG,
    ask_for_heads,
    ask_for_rest,
    ask_for_sets,
    copy_if_present,
    mix,
    set_of,
    tag_of,
)
from engram_client.jit import inline_kernel, kernel

# Words of a view. A region: index, slots, sets, bytes of a slot, number as a touch has it; index 0 for none.
CONTROL, SERVING, TABLE_OWNER, PART_AT, PART_BYTES, MAILBOX, TOUCH_MASK = range(7)
NEW_REGION, OLD_REGION, REGION_WORDS = 7, 12, 5
VIEW_WORDS = 17
INDEX, SLOTS, SETS, SLOT_BYTES, TOUCH_REGION = range(5)

MISSED, MASKED, TOUCHED = 0, 1, 2  # places in a tally
NOT_SERVING = -1  # instead of a number of misses


@inline_kernel
def is_news(line, way):
    """Whether counting one read more would change the state of this way."""
    state = load_byte(line + STATES_AT + way)
    queue = state & QUEUE_MASK
    return state & WANTED != 0 or (queue != SMALL_READ and queue != MAIN_READ)


@inline_kernel
def note_touch(region, line, which, way, tag, touches, tally):
    if is_news(line, way):
        touch = TOUCH | region[TOUCH_REGION] | which << TOUCH_SET_SHIFT | way << TOUCH_WAY_SHIFT | tag
        touches[tally[TOUCHED]] = touch
        tally[TOUCHED] += 1


@inline_kernel
def write_touches(mailbox, mask, touches, count):
    """Into the ring, over the oldest; several threads may do so at once."""
    first = fetch_add(mailbox + TOUCH_HEAD_AT, count)
    for i in range(count):
        store_release(mailbox + TOUCHES_AT + 8 * ((first + i) & mask), touches[i])


@inline_kernel
def read_old(region, key, owner, part_at, part_bytes, target, touches, tally):
    """Look for one record in the region that records are moving from; whether it was there."""
    h = mix(key, owner)
    which, tag = set_of(h, region[SETS]), tag_of(h)
    line = region[INDEX] + which * LINE_BYTES
    set_slots = region[SLOTS] + which * WAYS * region[SLOT_BYTES]
    way = copy_if_present(line, set_slots, region[SLOT_BYTES], tag, key, owner, part_at, part_bytes, target)
    if way >= 0:
        note_touch(region, line, which, way, tag, touches, tally)
    return way >= 0


@inline_kernel
def read_entry(view, key, ring, at, target, touches, tally):
    """The third pass for one entry; whether its record was found."""
    region, part_at, part_bytes = view[NEW_REGION:OLD_REGION], view[PART_AT], view[PART_BYTES]
    which, tag, owner, slot_bytes = ring[SET, at], ring[TAG, at], ring[OWNER, at], region[SLOT_BYTES]
    line, set_slots = region[INDEX] + which * LINE_BYTES, region[SLOTS] + which * WAYS * slot_bytes
    way = copy_if_present(line, set_slots, slot_bytes, tag, key, owner, part_at, part_bytes, target)
    if way >= 0:
        note_touch(region, line, which, way, tag, touches, tally)
        return True
    old = view[OLD_REGION:VIEW_WORDS]
    return old[INDEX] != 0 and read_old(old, key, owner, part_at, part_bytes, target, touches, tally)


@inline_kernel
def read_all(view, keys, orders, out, misses, touches, tally, to_the_end):
    """All passes over all entries; unless `to_the_end`, only until something is missing."""
    ring = np.empty((RING_FIELDS, RING), np.int64)
    region, part_at, part_bytes = view[NEW_REGION:OLD_REGION], view[PART_AT], view[PART_BYTES]
    index, slots, slot_bytes = region[INDEX], region[SLOTS], region[SLOT_BYTES]
    n = keys.size
    for start in range(0, n + 2 * BLOCK, BLOCK):
        asked = min(n, start)
        end = min(n, start + BLOCK)
        ask_for_sets(index, region[SETS], keys, view[TABLE_OWNER], orders, ring, asked, end)
        ask_for_heads(index, slots, slot_bytes, part_at, part_bytes, ring, max(0, start - BLOCK), asked)
        for i in range(max(0, start - 2 * BLOCK), min(n, start - BLOCK)):
            if part_bytes > HEAD_BYTES and i + AHEAD < asked:
                ask_for_rest(part_bytes, ring, i + AHEAD)
            target = out + i * part_bytes
            if keys[i] == -1:
                zero_bytes(target, part_bytes)
                tally[MASKED] += 1
            elif not read_entry(view, keys[i], ring, i & RING_MASK, target, touches, tally):
                misses[tally[MISSED]] = i
                tally[MISSED] += 1
        if tally[MISSED] != 0 and not to_the_end:
            return


@inline_kernel
def list_wanted(part_bytes, keys, out, misses, tally):
    """Where nothing is cached: every entry is missing but those of no row."""
    for i in range(keys.size):
        if keys[i] == -1:
            zero_bytes(out + i * part_bytes, part_bytes)
            tally[MASKED] += 1
        else:
            misses[tally[MISSED]] = i
            tally[MISSED] += 1


@kernel
def count_lookup(view, keys, masked, hits):
    """Add one look-up to the client's counters."""
    counters = view[MAILBOX] + COUNTERS_AT
    fetch_add(counters, 1)
    fetch_add(counters + 8, keys)
    fetch_add(counters + 16, masked)
    fetch_add(counters + 24, hits)


@inline_kernel
def read_view(view, keys, orders, out, misses, counts, to_the_end):
    """As `read_shared`, of keys in a row, to an address; `misses` has room for all of them."""
    if load_acquire(view[CONTROL]) != view[SERVING]:
        return NOT_SERVING
    touches, tally = np.empty(keys.size, np.int64), np.zeros(3, np.int64)
    if view[NEW_REGION + INDEX] == 0:
        list_wanted(view[PART_BYTES], keys, out, misses, tally)
    else:
        read_all(view, keys, orders, out, misses, touches, tally, to_the_end)
    missed = tally[MISSED]
    if missed != 0 and not to_the_end:
        return missed
    if missed == 0:
        count_lookup(view, keys.size, tally[MASKED], keys.size - tally[MASKED])
    if tally[TOUCHED] != 0:
        write_touches(view[MAILBOX], view[TOUCH_MASK], touches, tally[TOUCHED])
    counts[0] = tally[MASKED]
    return missed


@kernel
def read_shared(view, keys, rows, misses, counts):
    """Copy a part of each record found, zeros for key -1; the number of entries not found.

    `view` int64 [VIEW_WORDS]; `keys` int64 [n, orders]; `rows` uint8 [n, H, row_bytes], where each entry
    has `view[PART_BYTES]`. Writes the positions of missing entries to `misses`, int64 [n * orders], and how
    many were masked to counts[0]. With `misses` empty the call ends early once something is missing,
    and then leaves nothing behind. Returns NOT_SERVING where the daemon has told its clients to stop.
    Counts the look-up where nothing is missing.
    """
    to_the_end = misses.size != 0
    if not to_the_end:
        misses = np.empty(keys.size, np.int64)
    out = np.int64(rows.ctypes.data)
    return read_view(view, keys.reshape(keys.size), keys.shape[1], out, misses, counts, to_the_end)
