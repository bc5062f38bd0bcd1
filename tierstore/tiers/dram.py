"""The DRAM tier: arenas of records inside one byte budget.

Records of one size share one arena, whatever their table or order; over the sizes the budget is
split by what a byte of each is worth (shares.py). Reading takes no lock
(engram_client/arena/layout.py says how); writing takes the arena's.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import numpy as np

from engram_client.arena.layout import WAYS, ArenaGeometry
from engram_client.arena.read import MASKED, read_again, read_records
from engram_client.errors import ConfigError
from tierstore.kernels.admit import (
    ADMITTED,
    COUNTS,
    EVICTED,
    RETURNED,
    admit_records,
    exchange_records,
    move_sets,
)
from tierstore.kernels.dueling import fit_duel, new_duel
from tierstore.kernels.promote import take_hot
from tierstore.kernels.snapshot import admit_entries, copy_sets_out
from tierstore.tiers.counters import Counters
from tierstore.tiers.region import Region
from tierstore.tiers.shares import Tally, next_shares, share_budget, weights_of
from tierstore.tiers.turn_lock import TurnLock

log = logging.getLogger(__name__)

MOVED_BYTES = 4 << 20  # under one hold of the lock while resizing: a millisecond or two


class Arena:
    """A set-associative cache of records of one size. All methods are thread safe.

    While it is being resized there are two regions: new records go into the new one, look-ups ask the
    new one and then, for what is missing, the old one, whose records move over set by set. A
    record that moves between the two questions is a miss, which costs a read.
    """

    def __init__(self, budget_bytes: int, record_bytes: int, counters: Counters) -> None:
        self._counters = counters
        self._region = Region(ArenaGeometry.within(budget_bytes, record_bytes))
        self._old: Region | None = None
        self._duel = new_duel(self._region.geometry.sets)
        self._writing = TurnLock()  # or a resize, which takes it again and again, would keep admissions out
        self._resizing = threading.Lock()
        self._collapsing = Collapsing()
        self._records = 0
        self.on_change: Callable[[], None] = lambda: None  # called when `regions` has changed
        self._admitted = self._returned = self._pages = 0  # since the last tally

    @property
    def geometry(self) -> ArenaGeometry:
        return self._region.geometry

    def settled_region(self) -> Region | None:
        """Where all records are, to be kept while it is read by address; None while they move."""
        region = self._region
        return region if self._old is None else None

    def regions(self) -> tuple[Region, ...]:
        """Where records are: in one region, or while they move in the new one and then the old one."""
        with self._writing:
            return (self._region, self._old) if self._old else (self._region,)

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
        old = self._old  # before the other, or records that are about to move would be missed
        region = self._region
        misses = np.empty(keys.size, np.int64)
        counts = np.zeros(2, np.int64)
        missed = read_records(*region.places, keys, owner, orders, *part, out, misses, counts)
        if old is not None and missed:
            missed = read_again(*old.places, keys, owner, orders, *part, out, misses, missed)
        return misses[:missed], int(counts[MASKED])

    def admit(
        self, keys: np.ndarray, owners: np.ndarray, source: int, places: np.ndarray, *, wanted_soon: bool
    ) -> None:
        """Take in records; record i is `record_bytes` at address `source`, place `places[i]`."""
        self._admit(admit_records, keys, owners, source, places, wanted_soon)

    def _admit(
        self,
        kernel: Callable[..., None],
        keys: np.ndarray,
        owners: np.ndarray,
        source: int,
        places: np.ndarray,
        wanted_soon: bool,
    ) -> None:
        counts = np.zeros(COUNTS, np.int64)
        with self._writing:
            region = self._region
            record_bytes = region.geometry.record_bytes
            where = (*region.writer_places, self._duel, record_bytes)
            kernel(*where, keys, owners, source, places, int(wanted_soon), counts)
            self._note(counts)
            self._admitted += int(counts[ADMITTED])
            self._returned += int(counts[RETURNED])
        self._counters.add(records_admitted=counts[ADMITTED], records_evicted=counts[EVICTED])

    def exchange(
        self, keys: np.ndarray, owners: np.ndarray, source: int, places: np.ndarray, *, wanted_soon: bool
    ) -> None:
        """As `admit`; a record that had to leave takes the place of the one it left for.

        Its key and owner overwrite that one's in `keys` and `owners`, its bytes that one's at `source`.
        The key becomes -1 where nothing left.
        """
        self._admit(exchange_records, keys, owners, source, places, wanted_soon)

    def take_hot(
        self, shadow: tuple[int, int, int, int], first: int, reads_min: int, out: np.ndarray
    ) -> tuple[int, int]:
        """Copy slots worth a tier above, of the sets from `first` on, into `out` uint8 [n, slot_bytes].

        See tierstore/kernels/promote.py, also for `shadow`. Returns the set to go on with and how many slots.
        Admissions wait for `MOVED_BYTES` of sets at most. While records move there are none.
        """
        with self._writing:
            region, last = self._region, self.geometry.sets
            step = max(1, MOVED_BYTES // (WAYS * region.geometry.slot_bytes))
            if self._old is not None or out.shape[1] != region.geometry.slot_bytes:
                return last, 0
            last = min(first + step, last)
            return take_hot(region.places, shadow, first, last, reads_min, out.ctypes.data, len(out))

    def note_pages(self, pages: int) -> None:
        """So many pages were read for records that are then admitted."""
        with self._writing:
            self._pages += pages

    def take_tally(self, budget_bytes: int) -> Tally:
        """What the arena did since the last time; `budget_bytes` is what it may take."""
        with self._writing:
            tally = Tally(budget_bytes, self._returned, self._admitted, self._pages)
            self._admitted = self._returned = self._pages = 0
        return tally

    def _note(self, counts: np.ndarray) -> None:
        """Count records; an arena that is half full is worth gathering in huge pages."""
        self._records += int(counts[ADMITTED] - counts[EVICTED])
        if self._old is None and 2 * self._records > self.geometry.capacity_records:
            self._collapsing.start(self._region)

    def resize(self, budget_bytes: int) -> None:
        """Grow or shrink to `budget_bytes` while look-ups go on; returns when the records have moved.

        Memory stays below the larger of both budgets, a few sets aside: the old region is given back as
        it empties. Admissions wait for `MOVED_BYTES` of copying at a time, look-ups for nothing.
        """
        with self._resizing:
            geometry = ArenaGeometry.within(budget_bytes, self.geometry.record_bytes)
            if geometry == self.geometry:
                return
            self._collapsing.stop()
            with self._writing:
                self._old, self._region = self._region, Region(geometry)
                self._records = 0
                fit_duel(self._duel, geometry.sets)
            self.on_change()
            self._move_records(self._old, self._region)
            old = self._old
            with self._writing:
                self._old = None
                self._note(np.zeros(COUNTS, np.int64))
            self.on_change()
            old.free()

    def _move_records(self, old: Region, new: Region) -> None:
        counts = np.zeros(COUNTS, np.int64)
        step = max(1, MOVED_BYTES // (WAYS * old.geometry.slot_bytes))
        for first in range(0, old.geometry.sets, step):
            last = min(first + step, old.geometry.sets)
            with self._writing:
                counts[:] = 0
                target = (*new.writer_places, self._duel, new.geometry.record_bytes)
                move_sets(old.index, old.slots, first, last, *target, counts)
                self._note(counts)
            self._counters.add(records_moved=counts[ADMITTED], records_evicted=counts[EVICTED])
            old.free_slots_of(first, last - first)

    def warm_up(self, *, exchanging: bool) -> None:
        """Call the kernels of look-ups with nothing; `exchanging` says how records will be admitted."""
        none = np.zeros(0, np.int64)
        self.read(none, 0, 1, (0, 0), 0)
        read_again(*self._region.places, none, 0, 1, 0, 0, 0, none, 0)
        (self.exchange if exchanging else self.admit)(none, none, 0, none, wanted_soon=False)

    def copy_out(self, target: int, entries_max: int) -> Iterator[int]:
        """Copy all records to address `target`, so many at a time; yields how many lie there now.

        Nothing is locked but resizing. tierstore/kernels/snapshot.py says what an entry is.
        """
        with self._resizing:
            region, which = self._region, 0
            while which < region.geometry.sets:
                which, entries = copy_sets_out(*region.places, which, target, entries_max)
                yield entries

    def copy_in(self, source: int, entries: int, owners: np.ndarray) -> None:
        """Admit entries that `copy_out` made; `owners` int64 [n, 2] renames owners, others are left out."""
        counts = np.zeros(COUNTS, np.int64)
        with self._writing:
            region = self._region
            where = (*region.writer_places, self._duel, region.geometry.record_bytes)
            admit_entries(*where, source, entries, owners, counts)
            self._note(counts)
        self._counters.add(records_restored=counts[ADMITTED], records_evicted=counts[EVICTED])

    def close(self) -> None:
        """Stop work in the background."""
        self._collapsing.stop()

    def settle(self) -> None:
        """Wait until work in the background is done; for benchmarks."""
        self._collapsing.wait()


class Collapsing:
    """Gathering a region in huge pages, once, in a thread that can be stopped."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._changing = threading.Lock()

    def start(self, region: Region) -> None:
        """Begin, unless it has begun or is just being stopped."""
        if self._thread is not None or not self._changing.acquire(blocking=False):
            return
        try:
            if self._thread is None:
                thread = threading.Thread(
                    target=region.collapse, args=(self._stop,), name="tierstore-huge-pages", daemon=True
                )
                thread.start()
                self._thread = thread  # only now: `wait` and `stop` join it
        finally:
            self._changing.release()

    def wait(self) -> None:
        if (thread := self._thread) is not None:
            thread.join()

    def stop(self) -> None:
        """Leave it as it is; it may be started again."""
        with self._changing:
            self._stop.set()
            self.wait()
            self._stop, self._thread = threading.Event(), None


class DramTier:
    """One arena for each record size."""

    def __init__(self, budget_bytes: int, weights: dict[int, int], counters: Counters) -> None:
        """`weights`: for each record size in bytes its weight in sharing the budget.

        A budget of 0 caches nothing. Raises ConfigError where not every size gets one set.
        """
        self._counters = counters
        self._changing = threading.Lock()
        self.weights = weights
        self.budget_bytes = budget_bytes
        self._shares = share_budget(budget_bytes, weights) if budget_bytes else {}
        self._arenas = {r: Arena(share, r, counters) for r, share in self._shares.items()}

    def arena(self, record_bytes: int) -> Arena | None:
        """Where records of this size are kept; None where nothing is."""
        return self._arenas.get(record_bytes)

    def resize(self, budget_bytes: int) -> None:
        """Grow or shrink the budget while look-ups go on; returns when it is done.

        Arenas that shrink go first, so the sum stays within the larger budget. Raises ConfigError where not
        every record size gets one set, or a budget of 0 is involved: that takes a restart.
        """
        if not budget_bytes or not self._arenas:
            raise ConfigError(
                f"$.dram.budget_bytes: cannot change from {self.budget_bytes} to {budget_bytes} while "
                "serving; a cache is made or removed only at a start"
            )
        with self._changing:
            shares = share_budget(budget_bytes, self.weights)
            self.budget_bytes = budget_bytes
            self._give(shares)

    def balance(self) -> bool:
        """Move some of the budget to the record size where it saves most, by what was read since.

        Whether anything moved. Look-ups go on meanwhile, as while the budget is changed.
        """
        with self._changing:
            shares = next_shares({r: a.take_tally(self._shares[r]) for r, a in self._arenas.items()})
            if shares is None:
                return False
            told = ", ".join(
                f"{self._shares[r]} -> {share} for records of {r}" for r, share in shares.items()
            )
            log.info("the DRAM budget moves to where it saves more reads (bytes): %s", told)
            self.weights = weights_of(shares)
            self._give(shares)
        self._counters.add(dram_balanced=1)
        return True

    def _give(self, shares: dict[int, int]) -> None:
        """Arenas that shrink go first."""
        self._shares, before = shares, self._shares
        for record_bytes in sorted(shares, key=lambda r: shares[r] - before[r]):
            self._arenas[record_bytes].resize(shares[record_bytes])

    def close(self) -> None:
        for arena in self._arenas.values():
            arena.close()

    def arenas(self) -> dict[int, Arena]:
        """Every arena by the bytes of its records."""
        return dict(self._arenas)

    @property
    def total_bytes(self) -> int:
        return sum(a.geometry.total_bytes for a in self._arenas.values())

    @property
    def capacity_records(self) -> int:
        return sum(a.geometry.capacity_records for a in self._arenas.values())
