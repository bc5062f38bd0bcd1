"""Joining wanted pages into runs that one read serves."""

from __future__ import annotations

from engram_client.jit import kernel


@kernel
def coalesce(pages, gap_pages_max, run_pages_max, first_pages, page_counts):
    """Runs that cover `pages` (int64, ascending, distinct).

    Two pages share a run when at most `gap_pages_max` unwanted pages lie between them and the run
    stays within `run_pages_max`. Writes `first_pages` and `page_counts` int64 [n]; returns the
    number of runs.
    """
    runs = 0
    for i in range(pages.size):
        if runs:
            first = first_pages[runs - 1]
            gap = pages[i] - (first + page_counts[runs - 1])
            if gap <= gap_pages_max and pages[i] - first + 1 <= run_pages_max:
                page_counts[runs - 1] = pages[i] - first + 1
                continue
        first_pages[runs] = pages[i]
        page_counts[runs] = 1
        runs += 1
    return runs
