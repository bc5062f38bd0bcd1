"""Bounded memory for reads in flight: a fixed set of page-aligned buffers, taken and given back."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import ConfigError
from tierstore.format.direct import aligned_bytes
from tierstore.format.geometry import PAGE_BYTES

PAGES_BYTES_MAX = 8 << 20
BUFFERS_MAX = 4  # concurrent readers; more share the disk no better


@dataclass(frozen=True)
class Staging:
    """Room for one reader: pages as they land, and whole records as they are put together."""

    pages: np.ndarray  # uint64 [capacity, 512], page aligned
    records: np.ndarray  # uint8 [bytes]

    @property
    def capacity_pages(self) -> int:
        return self.pages.shape[0]


class StagingPool:
    """`BUFFERS_MAX` stagings that together take `budget_bytes`.

    Pages get half of it, at most `PAGES_BYTES_MAX` each: enough to keep a disk busy. Records get the
    rest: the more of them are put together at once, the closer together the pages they need.
    """

    def __init__(self, budget_bytes: int, record_bytes_max: int) -> None:
        """Raises ConfigError where a buffer could not hold the largest record and its pages."""
        share = budget_bytes // BUFFERS_MAX // PAGE_BYTES * PAGE_BYTES
        pages_bytes = min(share // 2 // PAGE_BYTES * PAGE_BYTES, PAGES_BYTES_MAX)
        if pages_bytes < PAGE_BYTES or share - pages_bytes < record_bytes_max:
            raise ConfigError(
                f"$.nvme.staging_bytes: {budget_bytes} leaves {share} bytes a buffer, the largest record has "
                f"{record_bytes_max}; give at least {2 * BUFFERS_MAX * (record_bytes_max + PAGE_BYTES)}"
            )
        self.record_bytes = share - pages_bytes
        self._free: queue.LifoQueue[Staging] = queue.LifoQueue()
        for _ in range(BUFFERS_MAX):
            memory = aligned_bytes(share)
            pages = memory[:pages_bytes].view(np.uint64).reshape(-1, PAGE_BYTES // 8)
            self._free.put(Staging(pages, memory[pages_bytes:]))

    @contextmanager
    def take(self, deadline: Deadline) -> Iterator[Staging]:
        """Wait for a free staging. Raises DeadlineExceeded."""
        try:
            staging = self._free.get(timeout=deadline.remaining_s())
        except queue.Empty:
            raise deadline.exceeded("waiting for a free staging buffer") from None
        try:
            yield staging
        finally:
            self._free.put(staging)
