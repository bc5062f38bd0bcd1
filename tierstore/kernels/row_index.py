"""Row id -> position in the update log: open addressing, 16 bytes a place, probed one after another.

`keys` int64 [2^b], -1 where a place is free, and `values` int64 [2^b]. Nothing is removed singly: what has
left the log is dropped when the map is written anew (`move_from`).
"""

from __future__ import annotations

import numpy as np

from engram_client.jit import inline_kernel, kernel

FREE = -1
U64 = np.uint64


@inline_kernel
def _home(row, mask):
    mixed = (U64(row) ^ (U64(row) >> U64(32))) * U64(0x9E3779B97F4A7C15)
    return np.int64((mixed >> U64(20)) ^ (mixed >> U64(44))) & mask


@inline_kernel
def _place(keys, row):
    """Where `row` lies, or the free place where it would."""
    mask = keys.size - 1
    place = _home(row, mask)
    while keys[place] != row and keys[place] != FREE:
        place = (place + 1) & mask
    return place


@kernel
def find(keys, values, rows, positions):
    """Write the position of each of `rows` int64 [n], or -1, to `positions`; how many are there."""
    found = 0
    for i in range(rows.size):
        place = _place(keys, rows[i])
        positions[i] = values[place] if keys[place] == rows[i] else -1
        found += keys[place] == rows[i]
    return found


@kernel
def put(keys, values, rows, first, stride):
    """rows[i] now lies at `first` + i * stride; how many rows are new. There must be free places."""
    new = 0
    for i in range(rows.size):
        place = _place(keys, rows[i])
        new += keys[place] == FREE
        keys[place] = rows[i]
        values[place] = first + i * stride
    return new


@kernel
def move_from(keys, values, least, new_keys, new_values):
    """Put what lies at `least` or behind into an empty map; how many those are."""
    moved = 0
    for place in range(keys.size):
        if keys[place] != FREE and values[place] >= least:
            target = _place(new_keys, keys[place])
            new_keys[target], new_values[target] = keys[place], values[place]
            moved += 1
    return moved


@kernel
def count_from(keys, values, least):
    """How many rows lie at `least` or behind."""
    count = 0
    for place in range(keys.size):
        count += keys[place] != FREE and values[place] >= least
    return count


@kernel
def take_all(keys, values, rows, positions):
    """Write every row and its position, in no order, to int64 [n]."""
    taken = 0
    for place in range(keys.size):
        if keys[place] != FREE:
            rows[taken], positions[taken] = keys[place], values[place]
            taken += 1
    return taken
