"""The shortest way to rows that are all in DRAM: one table, whole records, one kernel call.

A decode step asks for six records and has microseconds to spare, so this leaves out what the general way
does for every request: building it, checking it against the table, a deadline, a lock for the
counters.
"""

from __future__ import annotations

import numpy as np

from engram_client.transport.short_way import ShortWay
from tierstore.kernels.hits import PLACES, TOTALS, read_all_or_nothing
from tierstore.store.gate import Gate
from tierstore.store.table import ServedTable
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena
from tierstore.tiers.region import Region


class HitPath(ShortWay):
    """The arena of this process; no short way while its records move."""

    def __init__(
        self, gate: Gate, table: ServedTable, arena: Arena, counters: Counters, keys_max: int
    ) -> None:
        spec, scheme = table.spec, table.spec.scheme
        assert scheme is not None, "only tables with a hash scheme are addressed by n-gram keys"
        heads = scheme.orders * scheme.heads
        super().__init__(scheme.orders, heads, spec.row_bytes, keys_max // scheme.orders)
        self._gate = gate
        self._table = table
        self._arena = arena
        self._totals = counters.hit_totals
        self._owner = table.owner
        self._record_bytes = spec.record_bytes
        self._aimed: tuple[tuple[int, ...], np.ndarray] = ((), np.empty(0, np.int64))

    def _fill(self, keys: np.ndarray, rows: np.ndarray) -> bool:
        if self._gate.closed or self._table.retired:
            return False
        if not keys.flags.carray:  # the kernel is compiled for one kind of array
            keys = keys.copy()
        region = self._arena.settled_region()  # kept here while it is read by address
        if region is None:
            return False
        aim, places = self._aimed
        if aim is not region.places:
            places = self._aim_at(region)
        return bool(read_all_or_nothing(places, keys, rows))

    def _aim_at(self, region: Region) -> np.ndarray:
        """The kernel's places in this region. Only they are kept: a region that was left shall be freed."""
        totals = int(self._totals.ctypes.data)
        places = np.array([*region.places, self._owner, self._record_bytes, totals], np.int64)
        self._aimed = (region.places, places)
        return places


def warm_up() -> None:
    """Call the kernel with nothing."""
    places, totals = np.zeros(PLACES, np.int64), np.zeros(3, np.int64)
    places[TOTALS] = totals.ctypes.data
    read_all_or_nothing(places, np.zeros((0, 1), np.int64), np.zeros((0, 1, 1), np.uint8))
