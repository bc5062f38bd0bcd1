"""Latencies in bounded memory: a histogram whose cells grow with what they count.

A value v in nanoseconds below 2^(PRECISION_BITS + 1) has a cell of its own. Above, each power of two is cut
into 2^PRECISION_BITS cells of equal width:

    cells     0 .. 255     one nanosecond each
            256 .. 383     2 ns each, from 256 on
            384 .. 511     4 ns each, from 512 on
            ...            up to VALUE_MAX_NS, more than an hour

so a cell is never wider than 1/128 of what it counts, and 42 bits of range take 4,608 cells: the same for
a thousand values and for a billion. Histograms of several processes are added cell by cell, which
percentiles cannot be. A percentile is told as the upper edge of its cell, never as more than the largest
value there was: at most 0.8 % above the exact one and not below it. Count, mean and extremes are exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from engram_client.errors import BadRequest

PRECISION_BITS = 7
RANGE_BITS = 42
VALUE_MAX_NS = (1 << RANGE_BITS) - 1
LINEAR = 1 << (PRECISION_BITS + 1)  # values with a cell of their own
CELLS = (RANGE_BITS - PRECISION_BITS + 1) << PRECISION_BITS
PERCENTILES = (10.0, 50.0, 90.0, 95.0, 99.0, 99.9, 99.99)


class Histogram:
    """`counts` by cell, int64 [CELLS]; `total_ns`, `min_ns`, `max_ns` are of values, not of cells."""

    def __init__(self) -> None:
        self.counts = np.zeros(CELLS, np.int64)
        self.total_ns = 0
        self.min_ns = VALUE_MAX_NS
        self.max_ns = 0

    def add_values(self, values_ns: np.ndarray) -> None:
        """Count values int64 [n] in nanoseconds; one below 0 counts as 0, one above VALUE_MAX_NS as that."""
        if not values_ns.size:
            return
        values = np.clip(values_ns, 0, VALUE_MAX_NS)
        self.counts += np.bincount(cells_of(values), minlength=CELLS)
        self.total_ns += int(values.sum())
        self.min_ns = min(self.min_ns, int(values.min()))
        self.max_ns = max(self.max_ns, int(values.max()))

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def percentile_ns(self, percent: float) -> int:
        """The smallest cell's upper edge that so many per cent of the values do not exceed."""
        return self.percentiles_ns([percent])[0]

    def percentiles_ns(self, percents: Iterable[float]) -> list[int]:
        """Likewise, all from one pass. Raises BadRequest where nothing was counted."""
        below = np.cumsum(self.counts)
        if not below[-1]:
            raise BadRequest("percentiles need at least one value; none was counted")
        wanted = [max(1, int(np.ceil(below[-1] * p / 100 - 1e-9))) for p in percents]
        edges = upper_edges()[np.searchsorted(below, wanted)]
        return [max(self.min_ns, min(self.max_ns, int(edge))) for edge in edges]

    def summary_us(self) -> dict[str, float | int]:
        """Count, mean, extremes and percentiles in microseconds; only the count where nothing was counted."""
        count = self.count
        if not count:
            return {"count": 0}
        percentiles = self.percentiles_ns(PERCENTILES)
        return {
            "count": count,
            "mean": self.total_ns / count / 1e3,
            "min": self.min_ns / 1e3,
            "max": self.max_ns / 1e3,
            **{f"p{p:g}": ns / 1e3 for p, ns in zip(PERCENTILES, percentiles, strict=True)},
        }

    def packed(self) -> tuple[Any, ...]:
        """What another process can make the same histogram of: cells and counts that are not 0, extremes."""
        cells = np.flatnonzero(self.counts)
        return cells, self.counts[cells], self.total_ns, self.min_ns, self.max_ns


def merged(packed: Iterable[tuple[Any, ...]]) -> Histogram:
    """One histogram of several processes' `Histogram.packed`."""
    found = Histogram()
    for cells, counts, total_ns, min_ns, max_ns in packed:
        found.counts[cells] += counts
        found.total_ns += total_ns
        found.min_ns = min(found.min_ns, min_ns)
        found.max_ns = max(found.max_ns, max_ns)
    return found


def cells_of(values_ns: np.ndarray) -> np.ndarray:
    """The cell of each value, int64 [n], all within 0..VALUE_MAX_NS."""
    values = values_ns.astype(np.int64)
    _, exponents = np.frexp(values.astype(np.float64))  # exact below 2^53: the number of bits
    shifts = np.maximum(exponents.astype(np.int64) - PRECISION_BITS - 1, 0)
    return (shifts << PRECISION_BITS) + (values >> shifts)


def upper_edges() -> np.ndarray:
    """The largest value that each cell counts, int64 [CELLS]."""
    cells = np.arange(CELLS)
    shifts = np.maximum((cells >> PRECISION_BITS) - 1, 0)
    return (((cells - (shifts << PRECISION_BITS)) + 1) << shifts) - 1
