"""The histogram of latencies against exact percentiles of the same values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tierbench.histogram import (
    CELLS,
    LINEAR,
    PERCENTILES,
    PRECISION_BITS,
    VALUE_MAX_NS,
    Histogram,
    cells_of,
    merged,
    upper_edges,
)

from engram_client.errors import BadRequest

DRAWN = {
    "log-normal": lambda random: random.lognormal(10, 2, 50_000),
    "two humps": lambda random: np.concatenate(
        [random.normal(6e3, 300, 30_000), random.normal(4e7, 1e6, 600)]
    ),
    "uniform, small": lambda random: random.integers(0, 300, 5_000),
    "one value": lambda random: np.full(3, 123_456_789),
}


def exact(values: np.ndarray, percent: float) -> int:
    """The smallest value that so many per cent do not exceed, without any cells."""
    return int(np.sort(values)[max(0, int(np.ceil(values.size * percent / 100 - 1e-9)) - 1)])


@pytest.mark.parametrize("name", DRAWN)
def test_percentiles_beside_exact_ones(name: str) -> None:
    values = DRAWN[name](np.random.default_rng(5)).astype(np.int64)
    found = Histogram()
    found.add_values(values)
    for percent, told in zip(PERCENTILES, found.percentiles_ns(PERCENTILES), strict=True):
        right = exact(values, percent)
        assert right <= told <= right * (1 + 2**-PRECISION_BITS)
    told_us = found.summary_us()
    assert told_us["count"] == values.size
    assert told_us["mean"] == pytest.approx(values.mean() / 1e3)
    assert (told_us["min"], told_us["max"]) == (values.min() / 1e3, values.max() / 1e3)


@given(st.lists(st.integers(-10, VALUE_MAX_NS + 10), min_size=1, max_size=30), st.integers(0, 30))
def test_parts_that_are_merged_are_the_whole(values: list[int], cut: int) -> None:
    whole, first, second = (Histogram() for _ in range(3))
    whole.add_values(np.array(values))
    first.add_values(np.array(values[:cut], np.int64))
    second.add_values(np.array(values[cut:], np.int64))
    together = merged([first.packed(), second.packed()])
    assert (together.counts == whole.counts).all()
    assert together.summary_us() == whole.summary_us()
    clipped = np.clip(np.array(values), 0, VALUE_MAX_NS)
    assert whole.percentile_ns(100) == clipped.max()
    right = exact(clipped, 50)
    assert right <= whole.percentile_ns(50) <= right * (1 + 2**-PRECISION_BITS)


def test_cells_are_in_order_without_gaps() -> None:
    edges = upper_edges()
    assert edges.size == CELLS < 5_000
    assert edges[-1] == VALUE_MAX_NS
    assert (np.diff(edges) > 0).all()
    assert (cells_of(edges) == np.arange(CELLS)).all()
    assert (cells_of(edges[:-1] + 1) == np.arange(1, CELLS)).all()
    assert (edges[:LINEAR] == np.arange(LINEAR)).all()


def test_nothing_has_no_percentiles() -> None:
    assert Histogram().summary_us() == {"count": 0}
    assert merged([]).count == 0
    with pytest.raises(BadRequest, match="at least one value"):
        Histogram().percentile_ns(50)
