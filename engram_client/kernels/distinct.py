"""Finding the distinct lines among n-gram keys: an open-addressing hash table, one pass.

Linear probing in a table of at least twice as many places as lines, so probes are short. A line's place
follows from its longest n-gram's key, which two different lines hardly ever share; all keys are compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engram_client.jit import kernel

Array = Any  # what numba compiles has types of its own; the docstrings give dtypes and shapes
Count = Any  # an int64

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the upper bits of the product are mixed


@kernel
def distinct_lines(keys: Array, table: Array, shift: int, lines: Array, inverse: Array) -> Count:
    """Number the distinct lines of keys int64 [n, orders] in order of first appearance.

    `table` int64 has 2^(64 - shift) >= 2n places, all -1. Writes `lines` int64 [n, orders], the distinct
    lines one after another, and `inverse` int64 [n], the distinct line of each. Returns how many there are.
    """
    last, mask, found = keys.shape[1] - 1, table.size - 1, 0
    for i in range(keys.shape[0]):
        place = np.int64((np.uint64(keys[i, last]) * MULTIPLIER) >> np.uint64(shift))
        while True:
            line = table[place]
            if line < 0:
                table[place] = found
                lines[found] = keys[i]
                inverse[i] = found
                found += 1
                break
            same = True
            for o in range(keys.shape[1]):
                same &= lines[line, o] == keys[i, o]
            if same:
                inverse[i] = line
                break
            place = (place + 1) & mask
    return found
