"""The shortest way to rows that are all in DRAM: one table, whole records, one kernel call.

A decode step asks for six records and has microseconds to spare, so this leaves out what the general way
does for every request: building it, checking it against the table, a deadline, a lock for the
counters. It takes only what it can answer whole; for anything else, a wrong dtype as well as a miss,
it returns None, and the general way finds out what to do or say.
"""

from __future__ import annotations

import numpy as np

from tierstore.kernels.hits import read_all_or_nothing
from tierstore.store.gate import Gate
from tierstore.store.table import ServedTable
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena
from tierstore.tiers.region import Region

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
        self._owner = table.owner
        self._orders = scheme.orders
        self._record_bytes = table.spec.record_bytes
        self._heads = scheme.orders * scheme.heads
        self._row_bytes = table.spec.row_bytes
        self._entries_max = keys_max // scheme.orders
        self._aimed: tuple[tuple[int, ...], np.ndarray] = ((), np.empty(0, np.int64))

    def __call__(self, keys: np.ndarray, out: np.ndarray | None = None) -> np.ndarray | None:
        if keys.ndim != 2:
            return self._reshaped(keys, out)
        entries, orders = keys.shape
        if (
            orders != self._orders
            or not 0 < entries <= self._entries_max
            or keys.dtype is not INT64
            or self._gate.closed
        ):
            return None
        shape = (entries, self._heads, self._row_bytes)
        if out is None:
            rows = np.empty(shape, np.uint8)
        elif out.shape == shape and out.dtype is UINT8 and out.flags.carray:
            rows = out
        else:
            return None
        if not keys.flags.carray:  # the kernel is compiled for one kind of array
            keys = keys.copy()
        region = self._arena.settled_region()  # kept here while it is read by address
        if region is None:
            return None
        aim, places = self._aimed
        if aim is not region.places:
            places = self._aim_at(region)
        return rows if read_all_or_nothing(places, keys, rows) else None

    def _aim_at(self, region: Region) -> np.ndarray:
        """The kernel's places in this region. Only they are kept: a region that was left shall be freed."""
        totals = int(self._totals.ctypes.data)
        places = np.array([*region.places, self._owner, self._record_bytes, totals], np.int64)
        self._aimed = (region.places, places)
        return places

    def _reshaped(self, keys: np.ndarray, out: np.ndarray | None) -> np.ndarray | None:
        """The same for keys of any other shape."""
        shape = (*keys.shape[:-1], self._heads, self._row_bytes)
        if keys.shape[-1:] != (self._orders,):
            return None
        if out is None:
            rows = self(keys.reshape(-1, self._orders))
            return None if rows is None else rows.reshape(shape)
        if out.shape != shape or not out.flags.carray:  # reshaping would copy it
            return None
        rows = self(keys.reshape(-1, self._orders), out.reshape(-1, self._heads, self._row_bytes))
        return None if rows is None else out
