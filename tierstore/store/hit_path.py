"""The shortest way to rows that are all in DRAM: one table, whole records, one kernel call.

A decode step asks for six records and has microseconds to spare, so this leaves out what the general way
does for every request: building it, checking it against the table, a deadline, a lock for the
counters. It takes only what it can answer whole; for anything else, a wrong dtype as well as a miss,
it returns None, and the general way finds out what to do or say.
"""

from __future__ import annotations

import numpy as np

from engram_client.arrays import address_of
from tierstore.kernels.hits import read_all_or_nothing
from tierstore.store.gate import Gate
from tierstore.store.table import ServedTable
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena

INT64, UINT8 = np.dtype(np.int64), np.dtype(np.uint8)


class HitPath:
    """Call it with n-gram keys int64 [..., orders]: rows uint8 [..., H, row_bytes], or None.

    With `out` the rows go there, if it is such an array; its content is undefined after a None.
    """

    def __init__(
        self, gate: Gate, table: ServedTable, arena: Arena, counters: Counters, keys_max: int
    ) -> None:
        scheme = table.spec.scheme
        assert scheme is not None, "only tables with a hash scheme are addressed by n-gram keys"
        self._gate = gate
        self._arena = arena
        self._totals = counters.hit_totals
        self._totals_at = int(self._totals.ctypes.data)
        self._owner = table.owner
        self._orders = scheme.orders
        self._record_bytes = table.spec.record_bytes
        self._row_shape = (scheme.orders * scheme.heads, table.spec.row_bytes)
        self._keys_max = keys_max

    def __call__(self, keys: np.ndarray, out: np.ndarray | None = None) -> np.ndarray | None:
        region = self._arena.settled_region()
        if (
            keys.dtype is not INT64
            or not keys.flags.c_contiguous
            or keys.shape[-1:] != (self._orders,)
            or not 0 < keys.size <= self._keys_max
            or region is None
            or self._gate.closed
        ):
            return None
        shape = keys.shape[:-1] + self._row_shape
        rows = np.empty(shape, np.uint8) if out is None else out
        if rows.dtype is not UINT8 or rows.shape != shape or not rows.flags.carray:
            return None
        whole = read_all_or_nothing(
            *region.places,
            keys.reshape(-1),
            self._owner,
            self._orders,
            self._record_bytes,
            address_of(rows),
            self._totals_at,
        )
        return rows if whole else None
