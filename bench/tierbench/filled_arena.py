"""The service's own arena, filled with made-up records, and batches of keys that are all in it.

Keys are drawn from all 63 bits, as the hashing of a real table gives them: at 16 million rows a
head two n-grams share a row rarely, so nothing but the number of records matters to the arena.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from engram_client.errors import DataCorrupt
from tierbench.alternate import Step
from tierbench.resident import huge_page_bytes
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena

OWNER = 1 << 8
POOL = 4096  # different contents; record i holds content key % POOL
CHUNK = 1 << 16
HUGE_PAGE_SHARE = 0.98  # of an arena, on a system that gives them
GATHERINGS_MAX = 3


@dataclass
class FilledArena:
    """An arena of which a share of the slots is taken. Keys come in groups of `orders`."""

    arena: Arena
    record_bytes: int
    orders: int
    groups: np.ndarray  # int64 [n, orders]: groups of which every record is there, shuffled
    fill: float  # taken slots / slots
    pool: np.ndarray  # uint8 [POOL, record_bytes]

    def batches(self, groups_each: int, batches_max: int) -> np.ndarray:
        """int64 [batches, groups_each * orders]"""
        count = max(1, min(batches_max, len(self.groups) // groups_each))
        chosen = np.resize(self.groups, (count * groups_each, self.orders))
        return chosen.reshape(count, groups_each * self.orders)

    def step(self, batches: np.ndarray, rows_per_record: int, first: int = 0) -> Step:
        """A step that reads one batch into a buffer of its own. Its misses are an error."""
        out = np.empty((batches.shape[1], self.record_bytes), np.uint8)
        part, address, rows = (0, self.record_bytes), out.ctypes.data, batches.shape[1] * rows_per_record

        def step(call: int, _alive: np.ndarray = out) -> int:
            batch = batches[(first + call) % len(batches)]
            misses, _ = self.arena.read(batch, OWNER, self.orders, part, address)
            if misses.size:
                raise DataCorrupt(f"{misses.size} records that were in the arena are not found any more")
            return rows

        return step

    def check(self, batch: np.ndarray) -> None:
        """Raises DataCorrupt unless a batch comes back byte for byte."""
        out = np.empty((batch.size, self.record_bytes), np.uint8)
        misses, _ = self.arena.read(batch, OWNER, self.orders, (0, self.record_bytes), out.ctypes.data)
        if misses.size or not np.array_equal(out, self.pool[batch % POOL]):
            raise DataCorrupt("the arena did not return what was put in")


def filled_arena(budget_bytes: int, record_bytes: int, orders: int, share: float, seed: int) -> FilledArena:
    """An arena of `budget_bytes` to which `share` of its capacity was admitted."""
    random = np.random.default_rng(seed)
    arena = Arena(budget_bytes, record_bytes, counters := Counters())
    groups = max(1, int(arena.geometry.capacity_records * share) // orders)
    keys = random.integers(0, 2**63 - 1, (groups, orders), np.int64)
    pool = random.integers(0, 256, (POOL, record_bytes), np.uint8)
    owners = np.tile(OWNER + np.arange(orders), CHUNK)
    for start in range(0, groups, CHUNK):
        part = keys[start : start + CHUNK].reshape(-1)
        arena.admit(part, owners[: part.size], pool.ctypes.data, part % POOL, wanted_soon=False)
    arena.settle()
    gather_in_huge_pages(arena)
    totals = counters.snapshot()
    fill = (totals["records_admitted"] - totals["records_evicted"]) / arena.geometry.capacity_records
    whole = np.ones(keys.size, bool)
    firsts = np.empty(keys.size, np.uint8)
    missing, _ = arena.read(keys.reshape(-1), OWNER, orders, (0, 1), firsts.ctypes.data)
    whole[missing] = False
    present = keys[whole.reshape(keys.shape).all(axis=1)]
    return FilledArena(arena, record_bytes, orders, random.permutation(present), fill, pool)


def gather_in_huge_pages(arena: Arena) -> None:
    """Ask again for what was refused while memory lay in pieces, as the resident table has huge pages too."""
    region = arena.settled_region()
    for _ in range(GATHERINGS_MAX):
        if region is None or huge_page_bytes().shared >= HUGE_PAGE_SHARE * arena.geometry.total_bytes:
            return
        region.collapse(threading.Event())
