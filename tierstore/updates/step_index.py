"""Which step ends where in the log: an LMDB environment, DIR/training/index.

It is an index. The log is the truth: recovery writes the index anew where it lags, and takes from it only one
thing that the log itself may not tell, that a commit had been there: a log that ends before it is damaged.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import lmdb

from engram_client.errors import StorageError

MAP_BYTES = 64 << 20  # address space; an entry takes some 60 bytes
KEY, VALUE = struct.Struct(">Q"), struct.Struct("<qqQQ")


@dataclass(frozen=True)
class StepPlace:
    """Where a step's commit block lies: positions in the log, the segment, and the block's checksum."""

    start: int
    end: int
    segment: int
    digest: int


class StepIndex(Protocol):
    """Steps that were committed, as far as the index knows."""

    def load(self) -> dict[int, StepPlace]: ...

    def change(self, put: Mapping[int, StepPlace], drop: list[int]) -> None:
        """In one durable transaction. Raises StorageError."""

    def close(self) -> None: ...


class LmdbSteps:
    """See `StepIndex`. The folder's owner alone opens it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "index"
        self._pid = os.getpid()
        try:
            self._path.mkdir(exist_ok=True)
            self._env = lmdb.open(os.fsencode(self._path), map_size=MAP_BYTES, max_readers=8)
        except (OSError, lmdb.Error) as error:
            raise StorageError(
                f"step index {self._path} cannot be opened: {error}; it is made again from the log: move the "
                "folder away and open the store once more"
            ) from error

    def load(self) -> dict[int, StepPlace]:
        try:
            with self._env.begin() as txn:
                return {KEY.unpack(k)[0]: StepPlace(*VALUE.unpack(v)) for k, v in txn.cursor()}
        except (lmdb.Error, struct.error) as error:
            raise StorageError(
                f"step index {self._path} cannot be read: {error}; it is made again from the log: move the "
                "folder away and open the store once more"
            ) from error

    def change(self, put: Mapping[int, StepPlace], drop: list[int]) -> None:
        try:
            with self._env.begin(write=True) as txn:
                for step in drop:
                    txn.delete(KEY.pack(step))
                for step, place in put.items():
                    value = VALUE.pack(place.start, place.end, place.segment, place.digest)
                    txn.put(KEY.pack(step), value)
        except lmdb.Error as error:
            raise StorageError(f"step index {self._path} cannot be written: {error}") from error

    def close(self) -> None:
        if self._pid == os.getpid():  # a forked child's copy is the parent's to close
            self._env.close()
