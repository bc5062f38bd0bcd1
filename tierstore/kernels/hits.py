"""Look-ups that are answered whole or not at all."""

from __future__ import annotations

import numpy as np

from engram_client.arena.atomics import fetch_add
from engram_client.arena.read import MASKED, read_records
from engram_client.jit import kernel


@kernel
def read_all_or_nothing(index, slots, sets, slot_bytes, keys, owner, orders, record_bytes, out, totals):
    """`read_records` of whole records; True where none is missing.

    Then look-ups, keys and masked keys are added to the three int64 at address `totals`.
    """
    misses = np.empty(keys.size, np.int64)
    counts = np.zeros(2, np.int64)
    if read_records(
        index, slots, sets, slot_bytes, keys, owner, orders, 0, record_bytes, out, misses, counts
    ):
        return False
    fetch_add(totals, 1)
    fetch_add(totals + 8, keys.size)
    fetch_add(totals + 16, counts[MASKED])
    return True
