"""Checking keys and row ids: -1 asks for no row, any other negative number is a mistake."""

from __future__ import annotations

import numpy as np

from engram_client.errors import IdOutOfRange

KEY_MAX = int(np.iinfo(np.int64).max)  # n-gram keys are 63-bit numbers
FEW = 32


def check_keys(keys: np.ndarray, table: str) -> None:
    """Raises IdOutOfRange naming the first n-gram key below -1. `keys` int64 of any shape."""
    if keys.size and _lowest(keys) < -1:  # none can be too large
        raise _refused(keys, KEY_MAX, "n-gram key", table)


def check_row_ids(row_ids: np.ndarray, rows: int, table: str) -> None:
    """Raises IdOutOfRange naming the first row id outside [-1, rows). int64 of any shape."""
    if row_ids.size and (_lowest(row_ids) < -1 or _highest(row_ids) >= rows):
        raise _refused(row_ids, rows - 1, "row id", table)


def _lowest(ids: np.ndarray) -> int:
    """Of a few numbers as Python's: numpy takes 2 us before it begins."""
    return min(ids.reshape(-1).tolist()) if ids.size <= FEW else int(ids.min())


def _highest(ids: np.ndarray) -> int:
    return max(ids.reshape(-1).tolist()) if ids.size <= FEW else int(ids.max())


def _refused(ids: np.ndarray, last: int, what: str, table: str) -> IdOutOfRange:
    at = int(np.flatnonzero((ids < -1) | (ids > last))[0])
    place = [int(i) for i in np.unravel_index(at, ids.shape)]
    return IdOutOfRange(
        f"table {table!r}: {what} {ids.reshape(-1)[at]} at position {place} is neither -1 (no row) nor in "
        f"[0, {last}]; nothing was read; hash with the mapping made from this table's scheme"
    )
