"""Counters of training; README, "Reading the numbers", says how to read them."""

from __future__ import annotations

import threading

NAMES = (
    "training_updates",  # applied, of all tables; in parts or by several ranks together counts once
    "training_rows_updated",
    "training_gradients",  # entries received, duplicates and padding included
    "training_rows_not_finite",  # refused or skipped, as training.not_finite says
    "training_pushes_repeated",  # that had been applied, and were not again
    "training_update_misses",  # rows updated that DRAM did not hold
    "training_read_hits",  # rows that look-ups found in DRAM
    "training_read_misses",
    "training_reads_again",  # rows looked up once more, as they were written back meanwhile
    "training_rows_admitted",  # into DRAM
    "training_rows_evicted",
    "training_rows_written_back",
    "training_rows_moved",  # as the DRAM budget changed
    "training_commits",
    "training_rollbacks",
    "training_waits_us",  # time that updates and commits spent waiting for their turn, the log or the disk
)


class TrainingCounters:
    """Totals by name; `add` is one short lock, called once a batch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = dict.fromkeys(NAMES, 0)

    def add(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._totals["training_" + name] += int(amount)

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._totals)
