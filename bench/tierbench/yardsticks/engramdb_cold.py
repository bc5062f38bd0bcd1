"""EngramDB's `Store.fetch` on rows that no cache holds.

Its package is `engramdb-python`. It reads through the page cache, which is emptied of its file before each
pass; what the kernel reads ahead of a row comes on top. It checks no checksum, and takes its ids as a list.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from tierbench.yardsticks.engramdb_fetch import MODULE, SHARD, write_shard
from tierbench.yardsticks.memmap import forget_cached_pages


class EngramDbFile:
    """A store of one shard in `folder`, of `rows` rows. Needs the package."""

    def __init__(self, folder: Path, parts: Iterable[np.ndarray], rows: int, row_bytes: int) -> None:
        """`parts` are the rows from number 0 on, each uint8 [n, row_bytes]."""
        self._folder = folder
        self._engramdb: Any = import_module(MODULE)
        self._shape = (rows, row_bytes)
        write_shard(folder, parts)

    def read(self, numbers: list[int], threads: int) -> np.ndarray:
        """Rows uint8 [n, row_bytes]; the file's cached pages are dropped first."""
        store = self._engramdb.Store(str(self._folder), 1, *self._shape, threads=threads)
        forget_cached_pages(self._folder / SHARD)
        return np.frombuffer(store.fetch(numbers), np.uint8).reshape(-1, self._shape[1])

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
