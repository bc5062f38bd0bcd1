"""Laying runs into a ring of slots: what may be read never lies where something not yet taken lies."""

import numpy as np
import pytest

from tierstore.kernels.runs import join_runs, sort_pages
from tierstore.kernels.stream import lay_out_ring, readable_runs


@pytest.mark.parametrize("seed", range(30))
def test_readable_runs_share_no_slot_with_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(4, 40))
    counts = rng.integers(1, capacity + 1 if seed % 2 else 4, 200)
    slots, starts = np.empty_like(counts), np.empty_like(counts)
    limit = lay_out_ring(counts, capacity, slots, starts)
    assert limit == readable_runs(counts, starts, capacity, 0, 0)
    for taken in range(counts.size):
        limit = readable_runs(counts, starts, capacity, taken, limit)
        assert limit > taken, "the next run can be read"
        used = np.concatenate([np.arange(slots[r], slots[r] + counts[r]) for r in range(taken, limit)])
        assert used.max() < capacity
        assert np.unique(used).size == used.size


def test_small_runs_fill_the_ring() -> None:
    counts = np.ones(100, np.int64)
    slots, starts = np.empty_like(counts), np.empty_like(counts)
    assert lay_out_ring(counts, 16, slots, starts) == 16
    assert readable_runs(counts, starts, 16, 10, 16) == 26
    assert readable_runs(counts, starts, 16, 100, 100) == 100


@pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 65, 5000])
@pytest.mark.parametrize("most", [0, 3, 2**11, 2**40])
def test_sorting_is_numpys(size: int, most: int) -> None:
    pages = np.random.default_rng(size).integers(7, 8 + most, size)
    order = np.empty_like(pages)
    sort_pages(pages, order)
    assert np.array_equal(order, np.argsort(pages, kind="stable"))


def test_runs_reach_over_gaps_and_not_too_far() -> None:
    entries = np.array([2, 2, 3, 5, 9, 10, 11, 12, 12])
    pages, page_of, firsts, counts = (np.empty_like(entries) for _ in range(4))
    found, runs = join_runs(entries, 1, 3, pages, page_of, firsts, counts)
    assert pages[:found].tolist() == [2, 3, 5, 9, 10, 11, 12]
    assert page_of.tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 6]
    assert list(zip(firsts[:runs].tolist(), counts[:runs].tolist(), strict=True)) == [
        (2, 2), (5, 1), (9, 3), (12, 1),
    ]  # fmt: skip
