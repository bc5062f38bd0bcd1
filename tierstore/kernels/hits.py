"""Look-ups that are answered whole or not at all."""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import fetch_add
from engram_client.arena.read import MASKED, read_batch
from engram_client.jit import kernel

# What does not change from one look-up to the next, int64 [PLACES]; each argument of a kernel costs
# time at its call.
INDEX, SLOTS, SETS, SLOT_BYTES, OWNER, RECORD_BYTES, TOTALS = range(7)
PLACES = 7


@kernel
def read_all_or_nothing(places, keys, rows):
    """Whole records of `keys` int64 [n, orders] into `rows` uint8 [n, H, row_bytes]; True where none misses.

    `places` int64 [PLACES]. With True, look-ups, keys and masked keys were added to the three int64
    at address TOTALS. The caller has compared the shapes.
    """
    misses = np.empty(keys.size, np.int64)
    counts = np.zeros(2, np.int64)
    out = np.int64(rows.ctypes.data)
    missed = read_batch(
        places[INDEX], places[SLOTS], places[SETS], places[SLOT_BYTES], keys.reshape(keys.size),
        places[OWNER], keys.shape[1], 0, places[RECORD_BYTES], out, misses, counts, True,
    )  # fmt: skip
    if missed:
        return False
    fetch_add(places[TOTALS], 1)
    fetch_add(places[TOTALS] + 8, keys.size)
    fetch_add(places[TOTALS] + 16, counts[MASKED])
    return True
