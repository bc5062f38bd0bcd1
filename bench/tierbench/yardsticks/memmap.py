"""`numpy.memmap` of the row file, as one would serve rows without a service."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np


def forget_cached_pages(path: Path) -> None:
    """Have the kernel drop what it keeps of a file in its page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def mapped_rows(path: Path, rows: np.ndarray) -> np.ndarray:
    """`rows` uint8 [N, row_bytes] in a file of their own that the page cache holds, mapped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        rows.tofile(file)
        file.flush()
        os.fsync(file.fileno())  # or it is written out while others are measured
    mapped = np.memmap(path, np.uint8, "r", shape=rows.shape)
    mapped._mmap.madvise(mmap.MADV_WILLNEED)  # type: ignore[attr-defined]
    return mapped


def memmap_rows(path: Path, offsets: np.ndarray, row_bytes: int) -> np.ndarray:
    """The rows at byte `offsets` int64 [n], uint8 [n, row_bytes], gathered from a mapping.

    The mapping is told that access is random, else each fault reads pages nobody wants.
    """
    mapped = np.memmap(path, np.uint8, "r")
    mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    windows = np.lib.stride_tricks.sliding_window_view(mapped, row_bytes)
    return np.asarray(windows[offsets])
