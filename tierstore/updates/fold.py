"""Folding: the newest versions as of the oldest kept step go into pages, then the log before it goes.

1. The superblock says that no earlier step can be gone back to (`floor`): from here on pages may hold that
step's rows. 2. Batches of pages: the pages as they are (or initial rows), the log's rows over them; into
the journal, synced; in
   place, synced. A crash within leaves a page as it was, or as it is to be, or torn with its image in the
   journal. All its rows that the fold touches are in the log still, so that is enough.
3. When all are in: the side file of epochs, synced; the superblock names it and where the log starts now;
only then
   are segments unlinked.

A fold is a generator: it can stop between batches, for a rollback or at the end, and another begins anew.
Nothing pinned is passed: a snapshot keeps its step's pages as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from engram_client.deadline import Deadline
from tierstore.format.geometry import PAGE_BYTES
from tierstore.kernels.trained_pages import put_rows, seal_pages_of_epoch
from tierstore.updates.epochs import EpochsFile
from tierstore.updates.journal import Journal
from tierstore.updates.log import UpdateLog
from tierstore.updates.log_rows import LogRows, view_of
from tierstore.updates.pages import TablePages
from tierstore.updates.reading import PieceReader
from tierstore.updates.row_index import RowIndex
from tierstore.updates.scan import Committed
from tierstore.updates.segments import Segment
from tierstore.updates.superblock import Superblock


@dataclass(frozen=True)
class FoldParts:
    """What a fold works with."""

    log: UpdateLog
    log_rows: list[LogRows]
    pages: list[TablePages]
    reader: PieceReader
    journal: Journal
    epochs: EpochsFile
    superblock: Superblock
    index_of: Callable[[list[Segment], np.ndarray], list[RowIndex]]
    batch_bytes: int


def fold(parts: FoldParts, number: int, target: Committed, finish: Callable[[], None]) -> Iterator[int]:
    """Fold up to `target`; yields the pages of each batch. `finish` is called once the pages are the truth.

    `number` is larger than that of every attempt before, so that none overwrites what one of these, which
    the disk may have taken in spite of an error, says. Raises StorageError or OSError; the log then keeps
    everything.
    """
    parts.journal.replay(parts.superblock.folded.folds)  # what an attempt before could not bring home
    if target.start > parts.superblock.folded.floor:
        parts.superblock.change(floor=target.start)
    with parts.log.changed:
        live = parts.log.blocks.all()
        live = live[live["position"] < target.start]
        segments = parts.log.segments.pin(parts.log.start, target.start)
    try:
        indices = parts.index_of(segments, live)
    finally:
        parts.log.segments.unpin(segments)
    for table, index in enumerate(indices):
        rows, positions = index.entries()
        for start, stop in _batches(parts.pages[table], rows, parts.batch_bytes):
            yield _fold_batch(parts, table, number, rows[start:stop], positions[start:stop])
        del rows, positions
    size, checksum = parts.epochs.write(number, [p.epochs for p in parts.pages])
    parts.superblock.change(
        folds=number, start=target.start, step=target.step, epochs_bytes=size, epochs_sum=checksum
    )
    finish()
    parts.log.segments.drop_before(target.start)
    parts.epochs.remove_others(number)


def _batches(pages: TablePages, rows: np.ndarray, batch_bytes: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of ascending rows whose pages make up a batch; no page is in two."""
    units = pages.units(rows)
    firsts = np.flatnonzero(np.diff(units, prepend=-1))  # of each unit
    step = max(1, batch_bytes // (pages.geometry.pages_per_row * PAGE_BYTES))
    for unit in range(0, firsts.size, step):
        following = unit + step
        yield int(firsts[unit]), int(firsts[following]) if following < firsts.size else rows.size


def _fold_batch(parts: FoldParts, table: int, number: int, ids: np.ndarray, positions: np.ndarray) -> int:
    pages = parts.pages[table]
    g, units = pages.geometry, np.unique(pages.units(ids))
    images = np.zeros((units.size * g.pages_per_row, PAGE_BYTES // 8), np.uint64)
    pages.read_units(parts.reader, units, images)
    place = (units, g.rows_per_page, g.pages_per_row, g.room_bytes, images)
    fresh, initial = pages.initial_rows(parts.reader, units)
    put_rows(initial, fresh, *place)
    rows = np.empty((ids.size, g.row_bytes), np.uint8)
    with parts.log.changed:
        view = view_of(parts.log, table, positions)
    try:
        parts.log_rows[table].read(view, ids, positions, rows, Deadline.after(None))
    finally:
        parts.log.segments.unpin(view.segments)
    put_rows(rows, ids, *place)
    numbers = pages.pages_of(units)
    seal_pages_of_epoch(images, numbers, number, *pages.words)
    parts.journal.write(table, number, numbers, images)
    pages.rewrite(numbers, images, number)
    return int(numbers.size)
