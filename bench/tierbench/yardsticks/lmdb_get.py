"""LMDB: one key a row, as a key-value store would hold them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path

import lmdb
import numpy as np

from tierbench.yardsticks.memmap import forget_cached_pages

MAP_BYTES = 1 << 34


class LmdbRows:
    """An environment in `folder` that holds rows under their numbers, big-endian."""

    def __init__(self, folder: Path, parts: Iterable[np.ndarray]) -> None:
        """`parts` are the rows from number 0 on, each uint8 [n, row_bytes]."""
        self._folder = folder
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

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
