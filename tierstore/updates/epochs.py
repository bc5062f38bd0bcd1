"""Expected page epochs on disk: DIR/training/pages/epochs-N, written whole by fold N.

    for each table: int64 m, then m int64 numbers of chunks that are not all zeros, then these: uint32
    [1024] each

Its size and XXH64 (seed 0) lie in the superblock, which is written once the file is synced: it is the one
that was meant, whole, or an error. Four bytes for a page are little beside the eight thousand that a fold
writes for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engram_client.errors import DataCorrupt
from tierstore.updates.blocks import checksum_of
from tierstore.updates.disk import Disk
from tierstore.updates.superblock import Folded

CHUNK = 1024


class EpochsFile:
    """Writes and reads the side file of a fold."""

    def __init__(self, disk: Disk, folder: Path) -> None:
        self._disk, self._folder = disk, folder / "pages"

    def write(self, fold: int, tables: Sequence[np.ndarray]) -> tuple[int, int]:
        """Make epochs uint32 [pages] of every table durable; bytes and checksum of the file."""
        data = np.concatenate([_packed(epochs) for epochs in tables])
        path = self._path(fold)
        fd = self._disk.open(path, create=True)
        try:
            self._disk.truncate(fd, 0)
            self._disk.write(fd, data, 0)
            self._disk.sync(fd)
        finally:
            self._disk.close(fd)
        self._disk.sync_folder(self._folder)
        return data.size, checksum_of(data)

    def load(self, folded: Folded, tables: Sequence[np.ndarray]) -> None:
        """Fill the epochs of every table. Raises DataCorrupt."""
        if folded.folds == 0:
            return
        path = self._path(folded.folds)
        data = np.zeros(folded.epochs_bytes, np.uint8)
        try:
            fd = self._disk.open(path)
        except FileNotFoundError:
            raise self._damaged(path, "is missing") from None
        try:
            self._disk.read(fd, data, 0)
        finally:
            self._disk.close(fd)
        if checksum_of(data) != folded.epochs_sum:
            raise self._damaged(path, "fails its checksum")
        at = 0
        for epochs in tables:
            at = _unpack(data, at, epochs)

    def remove_others(self, fold: int) -> None:
        """Of folds before, or of one that was not completed."""
        for name in self._disk.names(self._folder):
            if name.startswith("epochs-") and name != self._path(fold).name:
                self._disk.unlink(self._folder / name)

    def _path(self, fold: int) -> Path:
        return self._folder / f"epochs-{fold}"

    def _damaged(self, path: Path, how: str) -> DataCorrupt:
        return DataCorrupt(
            f"{path} {how}: it is not known which pages are current; restore the training folder from a copy"
        )


def _packed(epochs: np.ndarray) -> np.ndarray:
    whole = epochs.size // CHUNK
    chunks = epochs[: whole * CHUNK].reshape(whole, CHUNK)
    used = np.flatnonzero(chunks.any(axis=1))
    parts, rest = [chunks[used].reshape(-1)], epochs[whole * CHUNK :]
    if rest.any():
        used = np.append(used, whole)
        parts.append(np.pad(rest, (0, CHUNK - rest.size)))
    numbers = np.concatenate([np.array([used.size]), used]).astype(np.int64)
    return np.concatenate([numbers.view(np.uint8), *(part.view(np.uint8) for part in parts)])


def _unpack(data: np.ndarray, at: int, epochs: np.ndarray) -> int:
    count = int(data[at : at + 8].view(np.int64)[0])
    numbers = data[at + 8 : at + 8 + 8 * count].view(np.int64)
    at += 8 + 8 * count
    for number in numbers.tolist():
        into = epochs[number * CHUNK : (number + 1) * CHUNK]
        into[:] = data[at : at + 4 * CHUNK].view(np.uint32)[: into.size]
        at += 4 * CHUNK
    return at
