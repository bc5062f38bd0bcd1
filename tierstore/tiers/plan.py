"""The read plan: from row ids to runs of pages, and from pages back to rows. Pure.

Rows become *pieces* (a row, or one page's share of a row larger than a page), pieces are sorted by
page, and the distinct pages are joined into runs that one read each serves. Pages of all runs
are numbered through; that number is a page's *slot*. A plan larger than the staging buffer is
worked off in windows of whole runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tierstore.format.geometry import PAYLOAD_BYTES, Geometry
from tierstore.kernels.runs import coalesce


@dataclass(frozen=True)
class Pieces:
    """Where bytes lie and where they go; one entry a piece, int64 [n]."""

    pages: np.ndarray
    page_offsets: np.ndarray  # bytes from the start of the page
    lengths: np.ndarray | None  # bytes; None where every piece is a whole row
    targets: np.ndarray  # bytes from the start of the output

    def sorted_by_page(self) -> Pieces:
        order = np.argsort(self.pages, kind="stable")
        lengths = None if self.lengths is None else self.lengths[order]
        return Pieces(self.pages[order], self.page_offsets[order], lengths, self.targets[order])


@dataclass(frozen=True)
class Window:
    """As much of a plan as fits the staging buffer. Slots count from the window's first page."""

    run_first_pages: np.ndarray
    run_page_counts: np.ndarray
    run_slots: np.ndarray
    pages: np.ndarray  # wanted pages, ascending
    page_slots: np.ndarray  # where each lands
    pieces: slice  # of the plan's pieces
    piece_slots: np.ndarray

    @property
    def pages_read(self) -> int:
        return int(self.run_page_counts.sum())


@dataclass(frozen=True)
class ReadPlan:
    pieces: Pieces  # sorted by page
    pages: np.ndarray  # distinct, ascending
    piece_page: np.ndarray  # index into `pages` of each piece
    run_first_pages: np.ndarray
    run_page_counts: np.ndarray

    def windows(self, capacity_pages: int) -> Iterator[Window]:
        """Split at run boundaries so that each part fits `capacity_pages` slots."""
        ends = np.cumsum(self.run_page_counts)
        starts = ends - self.run_page_counts
        run = 0
        while run < ends.size:
            stop = int(np.searchsorted(ends, starts[run] + capacity_pages, side="right"))
            assert stop > run, "a run must fit the staging buffer"
            yield self._window(run, stop, starts)
            run = stop

    def _window(self, run: int, stop: int, starts: np.ndarray) -> Window:
        firsts, counts = self.run_first_pages[run:stop], self.run_page_counts[run:stop]
        run_slots = starts[run:stop] - starts[run]
        low, high = np.searchsorted(self.pages, (firsts[0], firsts[-1] + counts[-1]))
        pages = self.pages[low:high]
        of_run = np.searchsorted(firsts, pages, side="right") - 1
        page_slots = run_slots[of_run] + pages - firsts[of_run]
        first, last = np.searchsorted(self.piece_page, (low, high))
        piece_slots = page_slots[self.piece_page[first:last] - low]
        return Window(firsts, counts, run_slots, pages, page_slots, slice(first, last), piece_slots)


def plan_reads(
    geometry: Geometry, row_ids: np.ndarray, targets: np.ndarray, *, gap_pages_max: int, run_pages_max: int
) -> ReadPlan:
    """Plan the reads for `row_ids` int64 [n], row i to go to byte `targets[i]` of the output."""
    return plan_pieces(_pieces(geometry, row_ids, targets), gap_pages_max, run_pages_max)


def plan_pieces(unsorted: Pieces, gap_pages_max: int, run_pages_max: int) -> ReadPlan:
    """Plan the reads for pieces in any order."""
    pieces = unsorted.sorted_by_page()
    is_new = np.empty(pieces.pages.size, bool)
    is_new[:1] = True
    np.not_equal(pieces.pages[1:], pieces.pages[:-1], out=is_new[1:])
    pages = pieces.pages[is_new]
    firsts, counts = np.empty_like(pages), np.empty_like(pages)
    runs = coalesce(pages, gap_pages_max, run_pages_max, firsts, counts)
    return ReadPlan(pieces, pages, np.cumsum(is_new) - 1, firsts[:runs], counts[:runs])


def _pieces(geometry: Geometry, row_ids: np.ndarray, targets: np.ndarray) -> Pieces:
    if geometry.rows_per_page:
        page, inside = np.divmod(row_ids, geometry.rows_per_page)
        return Pieces(page + geometry.first_page, inside * geometry.row_bytes, None, targets)
    part = np.arange(geometry.pages_per_row)
    pages = (row_ids * geometry.pages_per_row + geometry.first_page)[:, None] + part
    lengths = np.minimum(PAYLOAD_BYTES, geometry.row_bytes - part * PAYLOAD_BYTES)
    spread = targets[:, None] + part * PAYLOAD_BYTES
    return Pieces(
        pages.ravel(), np.zeros(pages.size, np.int64), np.tile(lengths, row_ids.size), spread.ravel()
    )
