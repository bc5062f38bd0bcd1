"""The DRAM tier: arenas of records inside one byte budget.

Records of one size share one arena, whatever their table or order; the budget is split over the
sizes in proportion to the bytes of the tables behind them. Reading takes no lock
(engram_client/arena/layout.py says how); writing takes the arena's.
"""

from __future__ import annotations

import mmap
import threading

import numpy as np

from engram_client.arena.layout import ArenaGeometry
from engram_client.arena.read import MASKED, read_records
from engram_client.errors import ConfigError
from tierstore.kernels.admit import ADMITTED, EVICTED, admit_records
from tierstore.tiers.counters import Counters


class Arena:
    """A set-associative cache of records of one size. All methods are thread safe."""

    def __init__(self, budget_bytes: int, record_bytes: int, counters: Counters) -> None:
        self.geometry = ArenaGeometry.within(budget_bytes, record_bytes)
        self._counters = counters
        self._memory = np.frombuffer(_map_pages(self.geometry.total_bytes), np.uint8)
        self._index = self._memory.ctypes.data
        self._slots = self._index + self.geometry.index_bytes
        self._ghosts = self._index + self.geometry.ghosts_at
        self._places = (self._index, self._slots, self.geometry.sets, self.geometry.slot_bytes)
        self._writing = threading.Lock()

    def read(
        self,
        keys: np.ndarray,
        owner: int,
        orders: int,
        part: tuple[int, int],
        out: int,
    ) -> tuple[np.ndarray, int]:
        """Copy bytes [part[0], part[0] + part[1]) of each record found to address `out`.

        `keys` int64 [n], entry i of order i % orders. Returns the positions of the entries not
        found, int64, and how many entries were -1 (answered with zeros).
        """
        misses = np.empty(keys.size, np.int64)
        counts = np.zeros(2, np.int64)
        missed = read_records(*self._places, keys, owner, orders, *part, out, misses, counts)
        return misses[:missed], int(counts[MASKED])

    def admit(
        self, keys: np.ndarray, owners: np.ndarray, source: int, places: np.ndarray, *, wanted_soon: bool
    ) -> None:
        """Take in records; record i is `record_bytes` at address `source`, place `places[i]`."""
        g, counts = self.geometry, np.zeros(2, np.int64)
        with self._writing:
            admit_records(
                self._index, self._slots, self._ghosts, g.sets, g.slot_bytes, g.record_bytes,
                keys, owners, source, places, int(wanted_soon), counts,
            )  # fmt: skip
        self._counters.add(records_admitted=counts[ADMITTED], records_evicted=counts[EVICTED])


class DramTier:
    """One arena for each record size."""

    def __init__(self, budget_bytes: int, table_bytes: dict[int, int], counters: Counters) -> None:
        """`table_bytes`: for each record size in bytes, the bytes of all tables that have it.

        A budget of 0 caches nothing. Raises ConfigError where not every size gets one set.
        """
        shares = share_budget(budget_bytes, table_bytes) if budget_bytes else {}
        self._arenas = {r: Arena(share, r, counters) for r, share in shares.items()}

    def arena(self, record_bytes: int) -> Arena | None:
        """Where records of this size are kept; None where nothing is."""
        return self._arenas.get(record_bytes)

    @property
    def total_bytes(self) -> int:
        return sum(a.geometry.total_bytes for a in self._arenas.values())

    @property
    def capacity_records(self) -> int:
        return sum(a.geometry.capacity_records for a in self._arenas.values())


def share_budget(budget_bytes: int, table_bytes: dict[int, int]) -> dict[int, int]:
    """Bytes for each record size: one set, and of the rest a share by the bytes of its tables.

    Raises ConfigError where there is not enough for one set of each.
    """
    smallest = {r: ArenaGeometry(1, r).total_bytes for r in table_bytes}
    spare, total = budget_bytes - sum(smallest.values()), max(1, sum(table_bytes.values()))
    if spare < 0:
        sizes = ", ".join(map(str, sorted(table_bytes)))
        raise ConfigError(
            f"$.dram.budget_bytes: expected at least {sum(smallest.values())} bytes for records of "
            f"{sizes} bytes, got {budget_bytes}; raise the budget, or set it to 0 to cache nothing"
        )
    return {r: smallest[r] + spare * size // total for r, size in table_bytes.items()}


def _map_pages(size_bytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
