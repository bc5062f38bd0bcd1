"""Row id -> position in the update log: open addressing, 16 bytes a place, probed one after another.

`keys` int64 [2^b] hold row + 1, 0 where a place is free, so new memory that nobody has touched is an empty
map; `values` int64 [2^b]. Nothing is removed singly: what lies before `least` counts as not there, and is
left behind when the map is moved to another one, some places at a time.
"""

from __future__ import annotations

import numpy as np

from engram_client.jit import inline_kernel, kernel

FREE = 0
U64 = np.uint64


@inline_kernel
def _home(key, mask):
    mixed = (U64(key) ^ (U64(key) >> U64(32))) * U64(0x9E3779B97F4A7C15)
    return np.int64((mixed >> U64(20)) ^ (mixed >> U64(44))) & mask


@inline_kernel
def _place(keys, key):
    """Where `key` lies, or the free place where it would."""
    mask = keys.size - 1
    place = _home(key, mask)
    while keys[place] != key and keys[place] != FREE:
        place = (place + 1) & mask
    return place


@kernel
def find(keys, values, least, rows, positions):
    """Write the position of each of `rows` int64 [n] that is here to `positions`; leave the others' alone."""
    for i in range(rows.size):
        place = _place(keys, rows[i] + 1)
        if keys[place] != FREE and values[place] >= least:
            positions[i] = values[place]


@kernel
def put(keys, values, rows, first, stride):
    """rows[i] now lies at `first` + i * stride; how many rows are new. There must be free places."""
    new = 0
    for i in range(rows.size):
        place = _place(keys, rows[i] + 1)
        new += keys[place] == FREE
        keys[place] = rows[i] + 1
        values[place] = first + i * stride
    return new


@kernel
def move(keys, values, start, stop, least, new_keys, new_values):
    """Put what lies in places [start, stop), at `least` or behind, into another map that does not have it.

    Returns how many there were, and how many rows the other map has more.
    """
    were = moved = 0
    for place in range(start, stop):
        if keys[place] != FREE:
            were += 1
            if values[place] >= least:
                target = _place(new_keys, keys[place])
                if new_keys[target] == FREE:  # else it was put there since, and lies later in the log
                    new_keys[target], new_values[target] = keys[place], values[place]
                    moved += 1
    return were, moved


@kernel
def take_all(keys, values, rows, positions):
    """Write every row and its position, in no order, to int64 [n]."""
    taken = 0
    for place in range(keys.size):
        if keys[place] != FREE:
            rows[taken], positions[taken] = keys[place] - 1, values[place]
            taken += 1
    return taken
