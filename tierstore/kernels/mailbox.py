"""The daemon's side of its clients' mailboxes: taking requests up, answering them, counting touches.

engram_client/arena/mailbox.py draws the memory. A client may write anything anywhere in it at any time,
so each word is loaded once, and no value from there is an address or a bound before it was checked.
"""

from __future__ import annotations

from engram_client.arena.atomics import (
    fetch_and,
    fetch_or,
    load_acquire,
    load_half,
    load_relaxed,
    store_release,
    store_word,
)
from engram_client.arena.futex import EVERYBODY, SHARED, futex_wake
from engram_client.arena.layout import LINE_BYTES, TAGS_AT
from engram_client.arena.mailbox import (
    DONE_AT,
    PENDING_AT,
    SLOTS,
    TEXT_BYTES_AT,
    TOUCH,
    TOUCH_HEAD_AT,
    TOUCH_REGION_SHIFT,
    TOUCH_REGIONS,
    TOUCH_SET_SHIFT,
    TOUCH_WAY_SHIFT,
    TOUCHES_AT,
)
from engram_client.arena.read import count_read
from engram_client.jit import inline_kernel, kernel

COUNTED, WRONG, LOST = 0, 1, 2  # places in the counts array
WHOLE_RECORD = 1  # any number of bytes but 0, which would be a hint


@inline_kernel
def count_bits(word):
    bits = 0
    for slot in range(SLOTS):
        bits += word >> slot & 1
    return bits


@kernel
def take_up(mailboxes, in_work, first, each_max, taken):
    """Take one request up, looking at the clients in turn from `first` on.

    Addresses, int64 [n]: `mailboxes`, and `in_work` of a word for each client whose bits are its slots
    in work; the caller excludes others. A client may be there several times. Nobody gets more than
    `each_max` at once. Writes client and slot to `taken` int64 [2]. Returns 0 without a request, 1 where it
    was the only one, more where there may be others.
    """
    found = 0
    for k in range(mailboxes.size):
        client = (first + k) % mailboxes.size
        busy = load_relaxed(in_work[client])
        waiting = load_acquire(mailboxes[client] + PENDING_AT) & ~busy
        room = each_max - count_bits(busy)
        if waiting == 0 or room <= 0:
            continue
        if found == 0:
            slot = 0
            while not waiting >> slot & 1:
                slot += 1
            taken[0], taken[1] = client, slot
        found += min(room, count_bits(waiting))
        if found > 1:
            break
    if found:
        bit = 1 << taken[1]
        fetch_or(in_work[taken[0]], bit)
        fetch_and(mailboxes[taken[0]] + PENDING_AT, ~bit)
    return found


@kernel
def put_down(in_work, slot):
    """A slot is in work no more."""
    fetch_and(in_work, ~(1 << slot))


@kernel
def answer(slot, number, text_bytes):
    """Everything a request wanted is in its memory, or `text_bytes` of what went wrong in its slot."""
    store_word(slot + TEXT_BYTES_AT, text_bytes)
    store_release(slot + DONE_AT, number)
    futex_wake(slot + DONE_AT, EVERYBODY, SHARED)


@inline_kernel
def count_touch(word, regions):
    """Count one read, if the touch names a record that is there."""
    region = word >> TOUCH_REGION_SHIFT & (TOUCH_REGIONS - 1)
    which, tag = word >> TOUCH_SET_SHIFT & 0xFFFFFFFF, word & 0xFFFF
    way = word >> TOUCH_WAY_SHIFT & 15
    if word >> 60 != TOUCH >> 60 or tag == 0 or which >= regions[region, 1]:
        return False
    line = regions[region, 0] + which * LINE_BYTES
    if load_half(line + TAGS_AT + 2 * way) != tag:
        return False
    count_read(line, way, WHOLE_RECORD)
    return True


@kernel
def count_touches(mailbox, touches, seen, regions, counts):
    """Count what a client touched since `seen`; returns how many it says it has written.

    `touches` is the size of its ring. `regions` int64 [256, 2]: index and number of sets of each region
    that may be named, 0 and 0 for others. Adds to `counts` int64 [3] (COUNTED, WRONG, LOST).
    """
    head = load_acquire(mailbox + TOUCH_HEAD_AT)
    first = seen
    if head - seen < 0 or head - seen > touches:
        first = head - touches
        counts[LOST] += max(1, min(first - seen, 1 << 32))
    for i in range(head - first):
        place = mailbox + TOUCHES_AT + 8 * ((first + i) & (touches - 1))
        word = load_relaxed(place)
        if word == 0:
            counts[LOST] += 1
            continue
        store_word(place, 0)
        counts[COUNTED if count_touch(word, regions) else WRONG] += 1
    return head
