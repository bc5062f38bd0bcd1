"""LMDB: one key a row, as a key-value store would hold them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path

import lmdb
import numpy as np

from engram_client.errors import DataCorrupt
from tierbench.alternate import Step
from tierbench.yardsticks.memmap import forget_cached_pages

MAP_BYTES = 1 << 34
BATCHES_MAX = 8  # keys of a step are Python objects, made beforehand


class LmdbRows:
    """An environment in `folder` that holds rows under their numbers, big-endian."""

    def __init__(self, folder: Path, parts: Iterable[np.ndarray]) -> None:
        """`parts` are the rows from number 0 on, each uint8 [n, row_bytes]."""
        self._folder = folder
        self._env: lmdb.Environment | None = None
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        number = itertools.count()
        with lmdb.open(str(folder), map_size=MAP_BYTES, sync=False) as env:
            for part in parts:
                with env.begin(write=True) as txn, txn.cursor() as cursor:
                    pairs = [(next(number).to_bytes(8, "big"), row.tobytes()) for row in part]
                    cursor.putmulti(pairs, append=True)
            env.sync(True)

    def read(self, numbers: np.ndarray, row_bytes: int, *, cold: bool) -> np.ndarray:
        """Rows uint8 [n, row_bytes]; `cold` drops the file's cached pages first."""
        if cold:
            forget_cached_pages(self._folder / "data.mdb")
        out = np.empty((numbers.size, row_bytes), np.uint8)
        env = lmdb.open(str(self._folder), map_size=MAP_BYTES, readonly=True, lock=False, readahead=False)
        with env, env.begin(buffers=True) as txn:
            for i, number in enumerate(numbers.tolist()):
                found = txn.get(number.to_bytes(8, "big"))
                assert found is not None, f"row {number} was put in"
                out[i] = np.frombuffer(found, np.uint8)
        return out

    def step(self, table: np.ndarray, batches: np.ndarray, rows_per_record: int, first: int = 0) -> Step:
        """A step that gets the records of one batch, int64 [n, records], into one array.

        `table` uint8 [N, record_bytes] was put in; raises DataCorrupt where something else comes back.
        `read` is for environments that make no steps.
        """
        if self._env is None:
            self._env = lmdb.open(str(self._folder), map_size=MAP_BYTES, readonly=True, lock=False)
        env, out = self._env, np.empty((batches.shape[1], table.shape[1]), np.uint8)
        keys = [[n.to_bytes(8, "big") for n in batch.tolist()] for batch in batches[:BATCHES_MAX]]

        def step(call: int) -> int:
            with env.begin(buffers=True) as txn:
                for i, key in enumerate(keys[(first + call) % len(keys)]):
                    found = txn.get(key)
                    assert found is not None, "every row was put in"
                    out[i] = np.frombuffer(found, np.uint8)
            return len(out) * rows_per_record

        step(0)
        if not np.array_equal(out, table[batches[first % len(keys)]]):
            raise DataCorrupt(f"LMDB did not return the rows that were put into {self._folder}")
        return step

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)
