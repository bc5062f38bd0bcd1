"""Cold rows at distinct pages through a store that caches nothing."""

from __future__ import annotations

import itertools
import math
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engram_client import connect
from tierbench.prepared import PreparedTable
from tierstore.config import Config
from tierstore.config.schema import Dram, Nvme
from tierstore.format.geometry import Geometry
from tierstore.format.rowfile import RowFile
from tierstore.store import open_store

ROWS_PER_S_MAX = 500_000  # a faster disk reads a window's pages more than once


@dataclass(frozen=True)
class ColdSample:
    """One window: rows/s, cores of this process, and what was read for it."""

    rows_per_s: float
    cores: float
    bytes_per_row: float
    reads_per_row: float


class DistinctPages:
    """Rows of which no two lie on one page, drawn anew for every batch."""

    def __init__(self, geometry: Geometry, seed: int) -> None:
        self._geometry = geometry
        self._random = np.random.default_rng(seed)

    def batch(self, rows: int) -> np.ndarray:
        """Row ids int64 [at most rows], in random order."""
        g = self._geometry
        full_pages = g.rows // g.rows_per_page
        pages = np.unique(self._random.integers(0, full_pages, rows, np.int64))
        self._random.shuffle(pages)
        return pages * g.rows_per_page + self._random.integers(0, g.rows_per_page, pages.size, np.int64)


class ColdTable:
    """The prepared table, opened with a DRAM budget of 0."""

    def __init__(self, prepared: PreparedTable, engine: Literal["pread", "io_uring"], depth: int) -> None:
        """`depth` reads are under way at a time. Raises StorageError where the system refuses `engine`."""
        config = Config(
            dram=Dram(budget_bytes=0), nvme=Nvme(engine=engine, read_threads=depth, queue_depth=depth)
        )
        _, self._release = open_store(prepared.store, config)
        self._client = connect(f"local:{prepared.store}")
        self._table = self._client.table(prepared.spec.name)
        self.geometry = RowFile.open(prepared.row_file).geometry
        self._row_bytes = prepared.spec.row_bytes
        self._table.lookup([0], timeout=None)  # kernels may have to be compiled, however long it takes

    def lookup(self, row_ids: np.ndarray) -> np.ndarray:
        return np.asarray(self._table.lookup(row_ids))

    def window(self, callers: int, batch_rows: int, window_s: float, seed: int) -> ColdSample:
        """Look up batch after batch for `window_s`, `callers` at a time; ids are drawn before."""
        wanted = math.ceil(ROWS_PER_S_MAX * window_s / batch_rows / callers)
        pages = [DistinctPages(self.geometry, seed * 1000 + caller) for caller in range(callers)]
        prepared = [itertools.cycle([p.batch(batch_rows) for _ in range(wanted)]) for p in pages]
        before, cpu_before, started = self._client.stats(), _cpu_s(), time.perf_counter()
        until = started + window_s

        def call_on(batches: Iterator[np.ndarray]) -> None:
            out = np.empty((batch_rows, self._row_bytes), np.uint8)
            for ids in batches:
                self._table.lookup_into(ids, out[: ids.size])
                if time.perf_counter() >= until:
                    break

        with ThreadPoolExecutor(callers) as pool:
            list(pool.map(call_on, prepared))
        wall_s, cpu_s = time.perf_counter() - started, _cpu_s() - cpu_before
        d = {name: value - before[name] for name, value in self._client.stats().items()}
        rows = d["nvme_rows"]
        return ColdSample(rows / wall_s, cpu_s / wall_s, d["nvme_bytes"] / rows, d["nvme_reads"] / rows)

    def close(self) -> None:
        self._client.close()
        self._release()


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
