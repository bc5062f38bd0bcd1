"""What a durable commit costs beside writing and syncing as many bytes in a row, and reading rows back."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engram_client.spec import Field, RowLayout
from tierstore.config import Training
from tierstore.format.direct import aligned_bytes
from tierstore.updates import RowStorage, TrainedSpec

CHUNK_BYTES = 8 << 20
TABLE_TIMES = 10  # rows of the table for each row of a commit
NEVER_FOLD = 1 << 40


class CommitCost:
    """A store with one table, and files beside it on the same disk."""

    def __init__(self, folder: Path, rows: int, row_bytes: int, seed: int) -> None:
        self._base = folder / "commit"
        shutil.rmtree(self._base, ignore_errors=True)
        self._base.mkdir(parents=True)
        self._random = np.random.default_rng(seed)
        self.rows, self._step = rows, 0
        layout = RowLayout((Field("weight", "uint8", row_bytes),))
        self._table_rows = rows * TABLE_TIMES
        self._config = Training(keep_steps=1, fold_bytes=NEVER_FOLD, log_bytes_max=NEVER_FOLD)
        RowStorage.create(self._base / "training", [TrainedSpec("table", self._table_rows, layout)])
        self._storage = RowStorage.open(self._base / "training", self._config)
        self._rows = self._random.integers(0, 256, (rows, row_bytes), dtype=np.uint8)
        self._aligned = aligned_bytes(self._rows.nbytes // 4096 * 4096)
        self._aligned[:] = self._rows.reshape(-1)[: self._aligned.size]
        self.queued_s: list[float] = []
        self.commit()  # compiles and makes the first segment
        self.queued_s = []

    @property
    def bytes(self) -> int:
        """Of the rows of one commit."""
        return self._rows.nbytes

    def commit(self) -> float:
        """Seconds until a commit is durable."""
        ids = self._random.choice(self._table_rows, self.rows, replace=False).astype(np.int64)
        dirty = [(0, ids, self._rows.copy())]
        self._step += 1
        started = time.perf_counter()
        commit = self._storage.commit(self._step, dirty)
        self.queued_s.append(time.perf_counter() - started)
        commit.wait()
        return time.perf_counter() - started

    def write(self) -> float:
        """Seconds to write the rows to a new file and fsync it."""
        return self._timed(os.O_CREAT, self._rows.reshape(-1), os.fsync, reserve=False)

    def write_reserved(self) -> float:
        """As `write`, with room set aside first, as the log has."""
        return self._timed(os.O_CREAT, self._rows.reshape(-1), os.fdatasync, reserve=True)

    def write_direct(self) -> float:
        """As `write`, past the page cache."""
        return self._timed(os.O_CREAT | os.O_DIRECT, self._aligned, os.fdatasync, reserve=False)

    def _timed(self, flags: int, data: np.ndarray, sync: Callable[[int], None], *, reserve: bool) -> float:
        path = self._base / "yardstick"
        path.unlink(missing_ok=True)
        os.sync()
        fd = os.open(path, os.O_WRONLY | flags, 0o644)
        try:
            if reserve:
                os.posix_fallocate(fd, 0, data.size)
            started, view = time.perf_counter(), data.data
            for at in range(0, len(view), CHUNK_BYTES):
                os.pwrite(fd, view[at : at + CHUNK_BYTES], at)
            sync(fd)
            return time.perf_counter() - started
        finally:
            os.close(fd)

    def read_rate(self, batch: int) -> float:
        """Rows read per second, at random among all rows of the table."""
        ids = self._random.integers(0, self._table_rows, batch, np.int64)
        out = np.empty((batch, self._rows.shape[1]), np.uint8)
        started = time.perf_counter()
        self._storage.read(0, ids, out)
        return batch / (time.perf_counter() - started)

    def fold(self) -> dict[str, float]:
        """Fold what can be folded; how long it took and what it wrote."""
        self._storage.commit(self._step + 1, []).wait()
        self._step += 1
        before, started = self._storage.counters(), time.perf_counter()
        self._storage.fold()
        taken_s = time.perf_counter() - started
        pages = self._storage.counters()["folded_pages"] - before["folded_pages"]
        return {
            "rows": before["rows_in_log"],
            "pages": pages,
            "seconds": taken_s,
            "pages_per_s": pages / taken_s,
        }

    def close(self) -> None:
        self._storage.close()
        shutil.rmtree(self._base, ignore_errors=True)
