"""The read plan: from row ids to runs of pages, and from pages back to rows. Pure.

Rows become *pieces* (a row, or one page's share of a row larger than a page), pieces are sorted by
page, and the distinct pages are joined into runs that one read each serves. The plan is worked off in
windows of whole runs; where a page lands in its window is its *slot*. The disk has nothing to do
while a plan is made, so its passes over the pieces are kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tierstore.format.geometry import Geometry
from tierstore.kernels.runs import cut_windows, join_runs, sort_pages


@dataclass(frozen=True)
class Pieces:
    """Where bytes lie and where they go; one entry a piece, int64 [n]."""

    pages: np.ndarray
    page_offsets: np.ndarray  # bytes from the start of the page
    lengths: np.ndarray | None  # bytes; None where every piece is a whole row
    targets: np.ndarray  # bytes from the start of the output

    def those(self, chosen: np.ndarray) -> Pieces:
        """The pieces of `chosen`, bool [n]."""
        lengths = None if self.lengths is None else self.lengths[chosen]
        return Pieces(self.pages[chosen], self.page_offsets[chosen], lengths, self.targets[chosen])

    def sorted_by_page(self) -> Pieces:
        order = np.empty_like(self.pages)
        sort_pages(self.pages, order)
        lengths = None if self.lengths is None else self.lengths[order]
        return Pieces(self.pages[order], self.page_offsets[order], lengths, self.targets[order])


@dataclass(frozen=True)
class Window:
    """As much of a plan as fits one window of a staging buffer. Slots count from its first page."""

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
        runs = self.run_first_pages.size
        assert not runs or self.run_page_counts.max() <= capacity_pages, "a run must fit a window"
        run_slots, starts = np.empty_like(self.run_first_pages), np.empty((runs + 1, 3), np.int64)
        page_slots, piece_slots = np.empty_like(self.pages), np.empty_like(self.piece_page)
        windows = cut_windows(
            self.run_first_pages, self.run_page_counts, self.pages, self.piece_page, capacity_pages,
            run_slots, page_slots, piece_slots, starts,
        )  # fmt: skip
        bounds = starts[: windows + 1].tolist()
        for (run, page, piece), (run_end, page_end, piece_end) in pairwise(bounds):
            runs_, pages, pieces = slice(run, run_end), slice(page, page_end), slice(piece, piece_end)
            yield Window(
                self.run_first_pages[runs_],
                self.run_page_counts[runs_],
                run_slots[runs_],
                self.pages[pages],
                page_slots[pages],
                pieces,
                piece_slots[pieces],
            )


def plan_reads(
    geometry: Geometry, row_ids: np.ndarray, targets: np.ndarray, *, gap_pages_max: int, run_pages_max: int
) -> ReadPlan:
    """Plan the reads for `row_ids` int64 [n], row i to go to byte `targets[i]` of the output."""
    return plan_pieces(row_pieces(geometry, row_ids, targets), gap_pages_max, run_pages_max)


def plan_pieces(unsorted: Pieces, gap_pages_max: int, run_pages_max: int) -> ReadPlan:
    """Plan the reads for pieces in any order."""
    pieces = unsorted.sorted_by_page()
    pages, page_of, firsts, counts = (np.empty_like(pieces.pages) for _ in range(4))
    found, runs = join_runs(pieces.pages, gap_pages_max, run_pages_max, pages, page_of, firsts, counts)
    return ReadPlan(pieces, pages[:found], page_of, firsts[:runs], counts[:runs])


def row_pieces(geometry: Geometry, row_ids: np.ndarray, targets: np.ndarray) -> Pieces:
    """Where rows lie and where they go, int64 [n]; a row that owns pages is a piece on each."""
    if geometry.rows_per_page:
        page, inside = np.divmod(row_ids, geometry.rows_per_page)
        return Pieces(page + geometry.first_page, inside * geometry.row_bytes, None, targets)
    part = np.arange(geometry.pages_per_row)
    pages = (row_ids * geometry.pages_per_row + geometry.first_page)[:, None] + part
    room = geometry.room_bytes
    lengths = np.minimum(room, geometry.row_bytes - part * room)
    spread = targets[:, None] + part * room
    return Pieces(
        pages.ravel(), np.zeros(pages.size, np.int64), np.tile(lengths, row_ids.size), spread.ravel()
    )
