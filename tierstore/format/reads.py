"""Which bytes of which files hold rows [a, b) of a table (pure), and reading them (thin)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from engram_client.errors import FormatError, StorageError
from tierstore.format.source import TableRows, TableSource

OPEN_FILES_MAX = 8


@dataclass(frozen=True)
class Read:
    """`count` bytes at `offset` of a file go to byte `at` of the staging buffer."""

    path: Path
    offset: int
    count: int
    at: int


def staging_starts(source: TableRows, batch_rows: int) -> np.ndarray:
    """Where each field's dense run starts in a staging buffer of `batch_rows` rows; int64."""
    sizes = [field.bytes for field in source.layout.fields]
    return np.array([batch_rows * sum(sizes[:f]) for f in range(len(sizes))], dtype=np.int64)


def plan_reads(source: TableSource, first_row: int, last_row: int, batch_rows: int) -> list[Read]:
    """Reads that bring rows [first_row, last_row) of all fields into staging."""
    reads = []
    starts = staging_starts(source, batch_rows)
    for field, extents, start in zip(source.layout.fields, source.fields, starts, strict=True):
        for extent in extents:
            first = max(first_row, extent.first_row)
            last = min(last_row, extent.first_row + extent.rows)
            if first < last:
                offset = extent.offset + (first - extent.first_row) * field.bytes
                at = int(start) + (first - first_row) * field.bytes
                reads.append(Read(extent.path, offset, (last - first) * field.bytes, at))
    return reads


class RowReader(Protocol):
    """Where the rows of a table come from; used by one thread."""

    def read(self, first_row: int, last_row: int, batch_rows: int, staging: np.ndarray) -> None:
        """Rows [first_row, last_row) into `staging`, field by field at `staging_starts(..., batch_rows)`."""

    def close(self) -> None: ...


class FileRows:
    """Rows out of the files of a checkpoint."""

    def __init__(self, source: TableSource) -> None:
        self._source, self._files = source, SourceFiles()

    def read(self, first_row: int, last_row: int, batch_rows: int, staging: np.ndarray) -> None:
        self._files.read_all(plan_reads(self._source, first_row, last_row, batch_rows), staging)

    def close(self) -> None:
        self._files.close()


class SourceFiles:
    """The source files that are being read; used by one thread.

    Open are at most a few, and only such as the last call wanted: a file that `--consume` removed gives
    its space back only once it is closed as well.
    """

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def read_all(self, reads: Sequence[Read], staging: np.ndarray) -> None:
        """Fill each read's part of `staging`. Raises FormatError where a file ends early."""
        self._close_all_but({read.path for read in reads})
        for read in reads:
            self._read(read, staging)

    def _read(self, read: Read, staging: np.ndarray) -> None:
        fd = self._fd(read.path)
        view = staging.data[read.at : read.at + read.count]
        done = 0
        while done < read.count:
            try:
                count = os.preadv(fd, [view[done:]], read.offset + done)
            except OSError as error:
                raise StorageError(f"{read.path} cannot be read: {error.strerror}; check the disk") from error
            if count == 0:
                raise FormatError(
                    f"{read.path} is truncated: its rows reach byte {read.offset + read.count}, "
                    f"the file ends at byte {read.offset + done}; fetch it again"
                )
            done += count
        # Every byte is wanted once; left in the page cache they would push out what is wanted again.
        os.posix_fadvise(fd, read.offset, read.count, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self._close_all_but(set())

    def _close_all_but(self, wanted: set[Path]) -> None:
        for path in self._open.keys() - wanted:
            os.close(self._open.pop(path))

    def _fd(self, path: Path) -> int:
        if path in self._open:
            return self._open[path]
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise FormatError(f"{path} is missing: the checkpoint is not complete; fetch it again") from error
        except OSError as error:
            raise StorageError(f"{path} cannot be opened: {error.strerror}") from error
        while len(self._open) >= OPEN_FILES_MAX:
            os.close(self._open.pop(next(iter(self._open))))
        self._open[path] = fd
        return fd
