"""Counters of what the tiers did; cheap to add to, read as a snapshot."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

# Record = what one key names (all heads of an n-gram, or one row). Every counter is a total since
# the store was opened; README, "Reading the numbers", says how to read them.
NAMES = (
    "lookups",  # requests answered
    "keys",  # keys or row ids asked for
    "masked",  # of these, -1
    "dram_hits",  # records a look-up found in DRAM
    "dram_misses",  # records a look-up did not find there, duplicates counted
    "hint_hits",  # records a prefetch hint found in DRAM
    "hint_misses",  # records a prefetch hint caused to be read
    "hints_accepted",
    "hints_dropped",  # the queue was full
    "hints_failed",
    "hints_done",  # worked off, failed ones included
    "hints_overtaken",  # records a look-up read itself because the hint that was reading them took long
    "in_flight_waits",  # records another request was already reading
    "records_read",  # records put together from rows on NVMe
    "records_admitted",  # into DRAM
    "records_evicted",
    "records_restored",  # from the snapshot of an earlier run
    "snapshot_bytes_read",
    "records_moved",  # kept while the DRAM budget was changed
    "dram_balanced",  # times that some of the budget went from one record size to another
    "extent_hits",  # records that came whole from the record extent
    "extent_misses",  # records that were looked for there and did not
    "extent_false",  # of these: another record lay there
    "extent_damaged",  # of these: a page failed its checksum
    "extent_read_errors",
    "extent_unwritten",  # records found in the write buffer: no read
    "extent_pages",  # distinct pages wanted
    "extent_reads",  # read operations
    "extent_written",  # records
    "extent_dropped",  # records not written: the buffer was full, or the allowance used up
    "extent_bytes_written",  # indices included
    "shm_clients",  # that were attached
    "shm_clients_refused",  # because there was no place for them; each counts again when it asks again
    "shm_requests",  # for rows that clients did not find in the arena themselves
    "shm_refused",  # of these: what no client of ours would ask for
    "shm_touches",  # reads of clients that were counted
    "shm_touches_lost",  # overwritten in the ring, or of records that are gone
    "hbm_promoted",  # records copied from DRAM into the daemon's HBM arena
    "hbm_evicted",  # of these, that left for others
    "nvme_rows",
    "nvme_pages",  # distinct pages wanted
    "nvme_reads",  # read operations
    "nvme_bytes",  # read, with the pages in gaps between joined reads
    "nvme_read_errors",
    "nvme_checksum_failures",
    "failed_lookups",
)

OF_REFILL = ("records_restored", "records_evicted", "snapshot_bytes_read")


class Counters:
    """Totals by name; `add` is one short lock, so it is called once a batch, never once a row."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = dict.fromkeys(NAMES, 0)
        self.hit_totals = np.zeros(3, np.int64)  # look-ups, keys, masked: kernels add to these without a lock
        self.collect: Callable[[], object] = lambda: None  # adds what others have counted until now

    def add(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._totals[name] += int(amount)

    def forget_lookups(self) -> None:
        """Begin anew, but for what the refill of the cache has counted, which goes on meanwhile."""
        with self._lock:
            self._totals = {name: self._totals[name] if name in OF_REFILL else 0 for name in NAMES}
            self.hit_totals[:] = 0

    def snapshot(self) -> dict[str, int]:
        self.collect()
        with self._lock:
            totals = dict(self._totals)
        lookups, keys, masked = self.hit_totals.tolist()
        totals["lookups"] += lookups
        totals["keys"] += keys
        totals["masked"] += masked
        totals["dram_hits"] += keys - masked
        return totals
