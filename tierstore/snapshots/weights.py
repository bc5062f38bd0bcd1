"""A table's weights, as they are kept or in another precision."""

from __future__ import annotations

import numpy as np

from engram_client.errors import BadRequest
from engram_client.spec import Field, RowLayout

DTYPES = ("float32", "bfloat16")
LOW_HALF = 16  # bits of a float32 that a bfloat16 lacks


def column(rows: np.ndarray, layout: RowLayout, name: str) -> np.ndarray:
    """One field of rows uint8 [n, row_bytes]: uint8 [n, field bytes], C-contiguous."""
    start = layout.offset_bytes(name)
    return np.ascontiguousarray(rows[:, start : start + layout.field(name).bytes])


class Weights:
    """Rows of a trained table to weights of `dtype`; None: as they are kept.

    float32 is taken from the master copy where rows have one: it is what bfloat16 weights were rounded from.
    bfloat16 is rounded to the nearest, ties to even.
    """

    def __init__(self, layout: RowLayout, dtype: str | None) -> None:
        kept = layout.field("weight")
        if dtype is not None and dtype not in DTYPES:
            raise BadRequest(f"weights can be had as {' or '.join(DTYPES)}, got {dtype!r}")
        self._layout, self._kept = layout, kept.dtype
        self.field = Field("weight", dtype or kept.dtype, kept.count)
        self._has_master = any(f.name == "master" for f in layout.fields)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [n, field bytes] of rows uint8 [n, row_bytes]."""
        if self.field.dtype == self._kept:
            return column(rows, self._layout, "weight")
        if self.field.dtype == "bfloat16":
            return _rounded(column(rows, self._layout, "weight").view(np.uint32)).view(np.uint8)
        if self._has_master:
            return column(rows, self._layout, "master")
        halves = column(rows, self._layout, "weight").view(np.uint16)
        return (halves.astype(np.uint32) << LOW_HALF).view(np.uint8)


def _rounded(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 of the bits of float32, uint32."""
    even = (bits >> LOW_HALF) & 1
    rounded = ((bits + (np.uint32(0x7FFF) + even)) >> LOW_HALF).astype(np.uint16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if is_nan.any():
        rounded[is_nan] = ((bits[is_nan] >> LOW_HALF) | 0x40).astype(np.uint16)
    return rounded
