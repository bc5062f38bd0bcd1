"""Bounded memory for reads in flight: a fixed set of page-aligned buffers, taken and given back.

A staging whose reader gave up at its deadline may still be written to by reads under way. It is
set aside and comes back once they have ended, so memory stays bounded and nobody reads into a buffer
that another request already uses.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import ConfigError
from tierstore.devices.base import PageRead
from tierstore.format.direct import aligned_bytes
from tierstore.format.geometry import PAGE_BYTES

PAGES_BYTES_MAX = 8 << 20
PAGES_MIN = 4  # one for each half, two for the ring
BUFFERS_MAX = 4  # concurrent readers; more share the disk no better
LOOK_AGAIN_S = 0.05  # for set-aside buffers, while all others are taken


@dataclass
class Staging:
    """Room for one reader: pages as they land, and records as they are put together.

    Rows are streamed through the ring (nvme.py); records from the extent land in the halves, window by
    window (windows.py). A batch that needs both reads both at a time.
    """

    ring: np.ndarray  # uint64 [capacity, 512], page aligned
    halves: tuple[np.ndarray, np.ndarray]  # uint64 [capacity, 512] each, page aligned
    records: np.ndarray  # uint8 [bytes]
    reads: list[PageRead] = field(default_factory=list)  # that were started into the pages

    @property
    def capacity_pages(self) -> int:
        """Of one half."""
        return self.halves[0].shape[0]

    def at_rest(self) -> bool:
        """Whether nothing is being read into it."""
        self.reads = [read for read in self.reads if not read.ended()]
        return not self.reads


class StagingPool:
    """`BUFFERS_MAX` stagings that together take `budget_bytes`.

    Pages get half of it, at most `PAGES_BYTES_MAX` each: enough to keep a disk busy. Records get the
    rest: the more of them are put together at once, the closer together the pages they need.
    """

    def __init__(self, budget_bytes: int, record_bytes_max: int) -> None:
        """Raises ConfigError where a buffer could not hold the largest record and its pages."""
        share = budget_bytes // BUFFERS_MAX // PAGE_BYTES * PAGE_BYTES
        pages = min(share // 2, PAGES_BYTES_MAX) // PAGE_BYTES
        half = max(1, pages // 8)
        self.record_bytes = share - pages * PAGE_BYTES
        if pages < PAGES_MIN or self.record_bytes < record_bytes_max:
            enough = 2 * BUFFERS_MAX * (record_bytes_max + PAGES_MIN * PAGE_BYTES)
            raise ConfigError(
                f"$.nvme.staging_bytes: {budget_bytes} leaves {self.record_bytes} bytes a buffer for "
                f"records, the largest has {record_bytes_max}; give at least {enough}"
            )
        self._free = [_staging(pages, half, self.record_bytes) for _ in range(BUFFERS_MAX)]
        self._set_aside: list[Staging] = []
        self._changed = threading.Condition()

    @contextmanager
    def take(self, deadline: Deadline) -> Iterator[Staging]:
        """Wait for a free staging. Raises DeadlineExceeded."""
        with self._changed:
            while not self._free:
                left_s = deadline.remaining_s()
                if left_s == 0:
                    raise deadline.exceeded("waiting for a free staging buffer")
                self._changed.wait(LOOK_AGAIN_S if left_s is None else min(LOOK_AGAIN_S, left_s))
                self._recover()
            staging = self._free.pop()
        try:
            yield staging
        finally:
            for read in staging.reads:
                read.withdraw()  # most have ended; a stream left alone never would
            with self._changed:
                (self._free if staging.at_rest() else self._set_aside).append(staging)
                self._changed.notify()

    def _recover(self) -> None:
        rested = [s for s in self._set_aside if s.at_rest()]
        self._set_aside = [s for s in self._set_aside if s.reads]
        self._free += rested

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is being read into any buffer; False where that takes too long."""
        give_up = time.monotonic() + timeout_s
        with self._changed:
            while self._set_aside and time.monotonic() < give_up:
                self._changed.wait(LOOK_AGAIN_S)
                self._recover()
            return not self._set_aside


def _staging(pages: int, half_pages: int, record_bytes: int) -> Staging:
    memory = aligned_bytes(pages * PAGE_BYTES + record_bytes)
    slots = memory[: pages * PAGE_BYTES].view(np.uint64).reshape(pages, PAGE_BYTES // 8)
    first, second, ring = np.split(slots, (half_pages, 2 * half_pages))
    return Staging(ring, (first, second), memory[pages * PAGE_BYTES :])
