"""Finding the distinct records in a batch: an open-addressing hash table, one pass.

Linear probing in a table of at least twice as many places as entries, so probes are short.
"""

from __future__ import annotations

import numpy as np

from engram_client.arena.read import mix
from engram_client.jit import kernel


@kernel
def find_distinct(keys, owners, table, first, inverse):
    """Number the distinct (key, owner) pairs in order of first appearance.

    `keys`, `owners` int64 [n]; `table` int64, a power of two >= 2n places, all -1. Writes
    `first` int64 [n]: the entry where distinct record d first stands, and `inverse` int64 [n]:
    the distinct record of each entry. Returns how many there are.
    """
    mask = table.size - 1
    found = 0
    for i in range(keys.size):
        place = np.int64(mix(keys[i], owners[i]) & np.uint64(mask))
        while True:
            d = table[place]
            if d < 0:
                table[place] = found
                first[found] = i
                inverse[i] = found
                found += 1
                break
            if keys[first[d]] == keys[i] and owners[first[d]] == owners[i]:
                inverse[i] = d
                break
            place = (place + 1) & mask
    return found
