"""What every shorter way to rows has in common: which keys and buffers it takes, and in which shapes."""

from __future__ import annotations

import numpy as np

INT64, UINT8 = np.dtype(np.int64), np.dtype(np.uint8)


class ShortWay:
    """Call it with n-gram keys int64 [..., orders]: rows uint8 [..., H, row_bytes], or None.

    With `out` the rows go there, if it is such an array; its content is undefined after a None. For
    whatever a short way cannot answer whole, a wrong dtype as well as a miss, it returns None: the
    general way finds out what to do or say. Subclasses fill in the rows.
    """

    def __init__(self, orders: int, heads: int, row_bytes: int, entries_max: int | None = None) -> None:
        """`heads` are those of all orders; of more than `entries_max` lines of keys there is no short way."""
        self._orders = orders
        self._heads = heads
        self._row_bytes = row_bytes
        self._entries_max = entries_max

    def _fill(self, keys: np.ndarray, rows: np.ndarray) -> bool:
        """Whether all of `rows`, C-contiguous [n, H, row_bytes], is there; `keys` int64 [n, orders]."""
        raise NotImplementedError

    def __call__(self, keys: np.ndarray, out: np.ndarray | None = None) -> np.ndarray | None:
        if keys.ndim != 2:
            return self._reshaped(keys, out)
        entries, orders = keys.shape
        if orders != self._orders or entries == 0 or keys.dtype is not INT64:
            return None
        if self._entries_max is not None and entries > self._entries_max:
            return None
        shape = (entries, self._heads, self._row_bytes)
        if out is None:
            rows = np.empty(shape, np.uint8)
        elif out.shape == shape and out.dtype is UINT8 and out.flags.carray:
            rows = out
        else:
            return None
        return rows if self._fill(keys, rows) else None

    def _reshaped(self, keys: np.ndarray, out: np.ndarray | None) -> np.ndarray | None:
        """The same for keys of any other shape."""
        shape = (*keys.shape[:-1], self._heads, self._row_bytes)
        if keys.shape[-1:] != (self._orders,):
            return None
        if out is None:
            rows = self(keys.reshape(-1, self._orders))
            return None if rows is None else rows.reshape(shape)
        if out.shape != shape or not out.flags.carray:  # reshaping would copy it
            return None
        rows = self(keys.reshape(-1, self._orders), out.reshape(-1, self._heads, self._row_bytes))
        return None if rows is None else out
