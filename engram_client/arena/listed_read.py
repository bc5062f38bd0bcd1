"""What a device's kernel does in the shared arena (engram_client/gpu/bus_kernels.py), on the CPU: its twin.

The same memory, arguments and outcome, and the same promise in the face of a writer, by the kernels that this
process reads the arena with anyway. It serves where tensors are on a CPU.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import load_acquire, zero_bytes
from engram_client.arena.read import OWNER, RING_FIELDS, SET, TAG, mix, set_of, tag_of
from engram_client.arena.shared_read import (
    CONTROL,
    INDEX,
    MAILBOX,
    NEW_REGION,
    SERVING,
    SETS,
    TABLE_OWNER,
    TOUCH_MASK,
    read_entry,
    write_touches,
)
from engram_client.arena.shared_read import TOUCHED as TALLY_TOUCHED
from engram_client.jit import kernel

MISSED, MASKED, TOUCHED = 0, 1, 2  # places in the counters
COUNTERS = 4
LISTED_WORDS = 2  # of a missing entry: position and key


@kernel
def read_listed(view, keys, orders, keep_masked, out, missing, listed, touches, counters):
    """Copy a part of each record found; list the others.

    `view` int64 [VIEW_WORDS], zeros where there is no arena; `keys` int64 [n], entry i of order i % orders.
    `out` uint8 [n, PART_BYTES] gets
    zeros for what is missing, and for keys of -1 too unless `keep_masked`. Writes `missing` bool [n], to
    `listed` int64 [n, 2] position and key of each, to the ring `touches` int64 [a power of two], and adds to
    `counters` int64 [COUNTERS].
    """
    part_bytes = out.shape[1]
    there = view[NEW_REGION + INDEX] != 0 and load_acquire(view[CONTROL]) == view[SERVING]
    noted, tally, ring = np.empty(1, np.int64), np.zeros(3, np.int64), np.empty((RING_FIELDS, 1), np.int64)
    base = np.int64(out.ctypes.data)
    for i in range(keys.size):
        key, target = keys[i], base + i * part_bytes
        missing[i] = False
        if key == -1:
            counters[MASKED] += 1
            if not keep_masked:
                zero_bytes(target, part_bytes)
            continue
        owner = view[TABLE_OWNER] + i % orders
        h = mix(key, owner)
        ring[OWNER, 0], ring[SET, 0], ring[TAG, 0] = owner, set_of(h, view[NEW_REGION + SETS]), tag_of(h)
        tally[TALLY_TOUCHED] = 0
        if there and key >= 0 and read_entry(view, key, ring, 0, target, noted, tally):
            if tally[TALLY_TOUCHED]:
                touches[counters[TOUCHED] & (touches.size - 1)] = noted[0]
                counters[TOUCHED] += 1
            continue
        zero_bytes(target, part_bytes)
        missing[i] = True
        listed[counters[MISSED], 0], listed[counters[MISSED], 1] = i, key
        counters[MISSED] += 1
    return out.size


@kernel
def forward_touches(view, touches, first, last):
    """Tell the service of touches [first, last) of a ring int64 [a power of two], by way of the mailbox."""
    count = min(last - first, touches.size)
    told = np.empty(max(count, 1), np.int64)
    for i in range(count):
        told[i] = touches[(last - count + i) & (touches.size - 1)]
    write_touches(view[MAILBOX], view[TOUCH_MASK], told, count)
    return count
