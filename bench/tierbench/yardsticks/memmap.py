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


def memmap_rows(path: Path, offsets: np.ndarray, row_bytes: int) -> np.ndarray:
    """The rows at byte `offsets` int64 [n], uint8 [n, row_bytes], gathered from a mapping.

    The mapping is told that access is random, else each fault reads pages nobody wants.
    """
    mapped = np.memmap(path, np.uint8, "r")
    mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    windows = np.lib.stride_tricks.sliding_window_view(mapped, row_bytes)
    return np.asarray(windows[offsets])
