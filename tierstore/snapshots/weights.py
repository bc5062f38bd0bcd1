"""A table's weights, as they are kept or in another precision."""

from __future__ import annotations

import numpy as np

from engram_client.errors import BadRequest
from engram_client.spec import Field, RowLayout
from tierstore.format.decode import bfloat16_of, column, float32_of

DTYPES = ("float32", "bfloat16")


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
            return bfloat16_of(column(rows, self._layout, "weight").view(np.float32)).view(np.uint8)
        if self._has_master:
            return column(rows, self._layout, "master")
        return float32_of(column(rows, self._layout, "weight").view(np.uint16)).view(np.uint8)
