"""EngramDB's `Store.fetch`: rows of fixed width by number, from a file that the page cache holds.

Its package is `engramdb-python`. A fetch reads each row from the file, with several threads if the store
was opened with more than one, and returns new bytes: it takes no buffer of the caller's and no table in
memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from engram_client.errors import DataCorrupt
from tierbench.alternate import Step

PACKAGE, MODULE, SHARD = "engramdb-python", "engramdb", "shard_000.bin"
BATCHES_MAX = 8  # its ids are lists of Python's numbers, made beforehand


def installed_version() -> str | None:
    """The installed EngramDB's version, or None."""
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


def write_shard(folder: Path, parts: Iterable[np.ndarray]) -> None:
    """Make `folder` anew, a store of one shard; `parts` are its rows in order, each uint8 [n, row_bytes]."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with open(folder / SHARD, "wb") as shard:
        for part in parts:
            part.tofile(shard)
        os.fsync(shard.fileno())  # or it is written out while others are measured


class EngramDbRows:
    """A store of one shard, with the bytes of `table` uint8 [N, row_bytes]. Needs the package."""

    def __init__(self, folder: Path, table: np.ndarray) -> None:
        self._folder = folder
        self._engramdb: Any = import_module(MODULE)
        write_shard(folder, [table])  # and so into the page cache

    def step(
        self, table: np.ndarray, batches: np.ndarray, rows_per_record: int, threads: int, first: int = 0
    ) -> Step:
        """A step that fetches the records of one batch, `batches` int64 [n, records].

        `table` is the store's, or a view of it whose rows are records. Raises DataCorrupt unless the first
        batch is what was put in.
        """
        store = self._engramdb.Store(str(self._folder), 1, *table.shape, threads=threads)
        wanted = batches[:BATCHES_MAX].tolist()
        if store.fetch(wanted[0]) != table[batches[0]].tobytes():
            raise DataCorrupt(f"EngramDB did not return the rows that were put into {self._folder}")

        def step(call: int) -> int:
            ids = wanted[(first + call) % len(wanted)]
            store.fetch(ids)
            return len(ids) * rows_per_record

        return step

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
