"""Folding: the newest versions as of the oldest kept step go into pages, then the log before it goes.

1. The superblock says that no earlier step can be gone back to (`floor`): from here on pages may hold that
   step's rows.
2. Batches of pages: the pages as they are (or initial rows), the log's rows over them; into the journal,
   synced; in place, synced. A crash within leaves a page as it was, or as it is to be, or torn with its image
   in the journal. All its rows that the fold touches are in the log still, so that is enough.
3. When all are in: the side file of epochs, synced; the superblock names it and where the log starts now;
   only then are segments unlinked.

Rows are taken out of the log many batches at a time, in the order of the log, as much as `rows_bytes` holds:
reading them page by page would read the log anew for each batch. While a batch is written the next is made.

A fold is a generator: it can stop between batches, for a rollback or at the end, and another begins anew.
Nothing pinned is passed: a snapshot keeps its step's pages as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from engram_client.deadline import Deadline
from tierstore.format.geometry import PAGE_BYTES
from tierstore.kernels.log_entries import newest_rows
from tierstore.kernels.trained_pages import put_rows, seal_pages_of_epoch
from tierstore.updates.blocks import stride_of
from tierstore.updates.epochs import EpochsFile
from tierstore.updates.journal import Journal
from tierstore.updates.log import UpdateLog
from tierstore.updates.log_rows import LogRows, view_of
from tierstore.updates.pages import TablePages
from tierstore.updates.reading import PieceReader
from tierstore.updates.scan import Committed, Scan
from tierstore.updates.superblock import Superblock

Beside = Callable[[Callable[[], None], Callable[[], "FoldBatch | None"]], "FoldBatch | None"]


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
    scan: Scan
    batch_bytes: int  # of pages
    rows_bytes: int


@dataclass(frozen=True)
class FoldBatch:
    """Pages as they are to be, sealed."""

    table: int
    numbers: np.ndarray  # int64 [n], ascending
    images: np.ndarray  # uint64 [n, 512]


def fold(
    parts: FoldParts, number: int, target: Committed, finish: Callable[[], None], beside: Beside
) -> Iterator[int]:
    """Fold up to `target`; yields the pages of each batch. `finish` is called once the pages are the truth.

    `number` is larger than that of every attempt before, so that none overwrites what one of these, which
    the disk may have taken in spite of an error, says. `beside(a, b)` calls both, at a time or one after the
    other, and gives what b does. Nothing is under way where this yields. Raises StorageError or OSError; the
    log then keeps everything.
    """
    parts.journal.replay(parts.superblock.folded.folds)  # what an attempt before could not bring home
    if target.start > parts.superblock.folded.floor:
        parts.superblock.change(floor=target.start)
    batches = _batches(parts, number, target)
    batch = next(batches, None)
    while batch is not None:
        following = beside(partial(_write, parts, number, batch), partial(next, batches, None))
        yield int(batch.numbers.size)
        batch = following
    size, checksum = parts.epochs.write(number, [p.epochs for p in parts.pages])
    parts.superblock.change(
        folds=number, start=target.start, step=target.step, epochs_bytes=size, epochs_sum=checksum
    )
    finish()
    parts.log.segments.drop_before(target.start)
    parts.epochs.remove_others(number)


def _write(parts: FoldParts, number: int, batch: FoldBatch) -> None:
    parts.journal.write(batch.table, number, batch.numbers, batch.images)
    parts.pages[batch.table].rewrite(batch.numbers, batch.images, number)


def _batches(parts: FoldParts, number: int, target: Committed) -> Iterator[FoldBatch]:
    with parts.log.changed:
        live = parts.log.blocks.all()
        live = live[live["position"] < target.start]
    for table, pages in enumerate(parts.pages):
        ids, positions = _newest(parts, table, live[live["table"] == table], target)
        units = pages.units(ids)
        starts = np.append(np.flatnonzero(np.diff(units, prepend=-1)), ids.size)  # of each unit's rows
        units = units[starts[:-1]]
        k = pages.geometry.pages_per_row
        batch_units = max(1, parts.batch_bytes // (k * PAGE_BYTES))
        low = 0
        while low < units.size:
            high = _units_that_fit(starts, low, batch_units, parts.rows_bytes // pages.geometry.row_bytes)
            part = slice(starts[low], starts[high])
            rows = _rows_of_log(parts, table, ids[part], positions[part])
            for first in range(low, high, batch_units):
                last = min(high, first + batch_units)
                mine = slice(starts[first], starts[last])
                fresh = rows[starts[first] - starts[low] : starts[last] - starts[low]]
                yield _batch(parts, table, number, units[first:last], ids[mine], fresh)
            del rows, fresh
            low = high


def _units_that_fit(starts: np.ndarray, low: int, batch_units: int, rows_max: int) -> int:
    """Where to end what begins at unit `low`: whole batches of at most so many rows, at least one batch."""
    high = int(np.searchsorted(starts, starts[low] + rows_max, side="right")) - 1
    whole = (high - low) // batch_units * batch_units
    return min(starts.size - 1, low + max(batch_units, whole) if high < starts.size - 1 else high)


def _newest(
    parts: FoldParts, table: int, blocks: np.ndarray, target: Committed
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 [n], ascending, of these blocks of a table, and the positions of their last versions."""
    log, counts = parts.log, blocks["count"].astype(np.int64)
    ids = np.empty(int(counts.sum()), np.int64)
    with log.changed:
        segments = log.segments.pin(log.start, target.start)
    try:
        parts.scan.all_ids(segments, blocks, ids)
    finally:
        log.segments.unpin(segments)
    order, rows, positions = (np.empty_like(ids) for _ in range(3))
    stride = stride_of(parts.pages[table].geometry.row_bytes)
    firsts = blocks["first_entry"].astype(np.int64)
    found = newest_rows(ids, counts, firsts, stride, order, rows, positions)
    return rows[:found], positions[:found]


def _rows_of_log(parts: FoldParts, table: int, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    rows = np.empty((ids.size, parts.pages[table].geometry.row_bytes), np.uint8)
    with parts.log.changed:
        view = view_of(parts.log, table, positions)
    try:
        parts.log_rows[table].read(view, ids, positions, rows, Deadline.after(None))
    finally:
        parts.log.segments.unpin(view.segments)
    return rows


def _batch(
    parts: FoldParts, table: int, number: int, units: np.ndarray, ids: np.ndarray, rows: np.ndarray
) -> FoldBatch:
    pages = parts.pages[table]
    g, images = pages.geometry, pages.images_of(parts.reader, units)
    place = (units, g.rows_per_page, g.pages_per_row, g.room_bytes, images)
    fresh, initial = pages.initial_rows(parts.reader, units, ids)
    put_rows(initial, fresh, *place)
    put_rows(rows, ids, *place)
    numbers = pages.pages_of(units)
    seal_pages_of_epoch(images, numbers, number, *pages.words)
    return FoldBatch(table, numbers, images)
