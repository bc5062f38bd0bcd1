"""`RowStorage`: the durable half of a training store. Bytes in, bytes out; it knows no optimizer.

The newest version of a row is looked for in the log (queue, then segments), then in the pages, else it is
what rows are initially. What was spilled or committed last is read first, by whoever asks. A crash, or a
rollback, goes back to what a commit had closed.

Locks, in this order: `_appending` (one spill, commit or rollback at a time, held while it waits), then the
log's `changed` (the queue, lists and indices; nothing is read or written under it).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import StorageError, Unavailable
from tierstore.config import Training
from tierstore.updates.blocks import (
    ALIGN,
    BLOCK_BYTES_MAX,
    HEADER_BYTES,
    STATE_BYTES_MAX,
    block_bytes,
    rows_of_block,
    stride_of,
)
from tierstore.updates.checks import check_rows, check_step, log_is_full
from tierstore.updates.disk import REAL_DISK, Disk
from tierstore.updates.fold import FoldParts
from tierstore.updates.folding import Folding
from tierstore.updates.identity import create_store
from tierstore.updates.log import Commit, UpdateLog
from tierstore.updates.log_rows import LogRows, LogView, view_of
from tierstore.updates.opening import Opened, index_of
from tierstore.updates.reading import PieceReader
from tierstore.updates.row_index import RowIndex, move_in_slices
from tierstore.updates.scan import Committed
from tierstore.updates.snapshot import Snapshot
from tierstore.updates.spec import TrainedSpec
from tierstore.updates.steps import Steps
from tierstore.updates.warm import warm_up

log = logging.getLogger(__name__)
NEVER = Deadline.after(None)


class RowStorage:
    """A training store's rows on disk. Thread safe; one process owns it."""

    def __init__(self, disk: Disk, folder: Path, config: Training, background: bool) -> None:
        """Use `open`. Recovers: afterwards the rows are those of the last committed step, exactly."""
        warm_up()
        self._folder, self._config, self._pid = folder, config, os.getpid()
        self._changed = threading.Condition()
        self._appending = threading.RLock()
        self._unfinished: tuple[Commit, Callable[[], None]] | None = None  # a rollback on its way
        self._closed = False
        self._opened = opened = Opened(disk, folder, config, self._changed)
        try:
            self._reader = PieceReader(disk.open_reader(config.read_depth), config.read_buffer_bytes)
        except BaseException:
            opened.close()
            raise
        self._scan, self._segments = opened.scan, opened.segments
        self._indices = opened.indices
        self.tables = list(opened.identity.tables)
        words = opened.identity.words
        self._block_bytes = min(BLOCK_BYTES_MAX, config.segment_bytes - ALIGN)
        self._log = UpdateLog(
            disk, self._segments, opened.identity.uuid, words, opened.superblock.folded.start, opened.scanned,
            queue_bytes=config.queue_bytes, changed=self._changed, background=background,
        )  # fmt: skip
        self._log_rows = [
            LogRows(self._log, self._reader, t.row_bytes, w) for t, w in zip(self.tables, words, strict=True)
        ]
        self._steps = Steps(self._log, opened.superblock, opened.steps, opened.indexed, config.keep_steps)
        parts = self._fold_parts()
        self._folding = Folding(
            parts, self._steps, self._folded, fold_bytes=config.fold_bytes, background=background
        )
        self._log.on_durable = self._note_step
        self._log.on_idle = self._folding.step

    def _fold_parts(self) -> FoldParts:
        o = self._opened
        return FoldParts(
            self._log, self._log_rows, o.pages, self._reader, o.journal, o.epochs, o.superblock,
            self._scan, self._config.fold_batch_bytes, self._config.fold_rows_bytes,
        )  # fmt: skip

    @classmethod
    def create(cls, folder: Path | str, tables: Sequence[TrainedSpec], *, disk: Disk = REAL_DISK) -> None:
        """Make an empty store of `tables` in `folder` (DIR/training).

        Raises BadRequest where there is one, StorageError.
        """
        try:
            create_store(disk, Path(folder), tables)
        except OSError as error:
            raise StorageError(
                f"{folder}: a training store cannot be made there: {error.strerror}"
            ) from error

    @classmethod
    def open(
        cls, folder: Path | str, config: Training, *, disk: Disk = REAL_DISK, background: bool = True
    ) -> RowStorage:
        """Open and recover the store in `folder`.

        `background=False` starts no threads: waiting writes and folds (tests). Raises FormatError where
        there is none, StoreLocked where another process owns it, DataCorrupt where what had been committed
        is damaged.
        """
        try:
            return cls(disk, Path(folder), config, background)
        except OSError as error:
            raise StorageError(f"{folder}: the training store cannot be opened: {error}") from error

    def step(self) -> int | None:
        """The last committed step, or None before the first."""
        with self._changed:
            return self._steps.last.step if self._steps.last else None

    def steps(self) -> list[int]:
        """Committed steps that can be gone back to, oldest first."""
        with self._changed:
            return [c.step for c in self._steps.kept()]

    def state(self) -> bytes:
        """What the last commit was given to keep; empty before the first."""
        self._check_open()
        with self._changed:
            last = self._steps.last
            segments = self._segments.pin(last.start, last.end) if last else []
        try:
            return self._scan.state(last, segments) if last else b""
        finally:
            self._segments.unpin(segments)

    def read(self, table: int, ids: np.ndarray, out: np.ndarray, deadline: Deadline = NEVER) -> None:
        """The newest version of rows `ids` int64 [n] into `out` uint8 [n, row_bytes].

        Raises IdOutOfRange, StorageError, DataCorrupt, DeadlineExceeded; `out` is undefined then.
        """
        check_rows(self.tables, table, ids, out)
        self._check_open()
        with self._changed:
            positions = self._indices[table].find(ids)
            view = view_of(self._log, table, positions)
        try:
            self._log_rows[table].read(view, ids, positions, out, deadline)
        finally:
            self._segments.unpin(view.segments)
        missing = np.flatnonzero(positions < 0)
        self._opened.pages[table].read(self._reader, ids[missing], missing, out, deadline)

    def spill(self, table: int, ids: np.ndarray, rows: np.ndarray, deadline: Deadline = NEVER) -> None:
        """Rows uint8 [n, row_bytes] with distinct `ids` int64 [n], newer than what there was.

        Takes the arrays: they must not change any more. `read` gives them from here on; they are durable with
        the next commit. Waits where the queue or the log is full. Raises StorageError where the disk is,
        Overloaded where the log is full of steps that are kept, DeadlineExceeded.
        """
        check_rows(self.tables, table, ids, rows)
        self._check_open()
        with self._appending:
            self._finish_rollback()
            self._queue(table, ids, rows, deadline, for_commit=False)

    def commit(
        self,
        step: int,
        dirty: Sequence[tuple[int, np.ndarray, np.ndarray]],
        state: bytes = b"",
        deadline: Deadline = NEVER,
    ) -> Commit:
        """Close a step: all that was spilled and (table, ids, rows) of `dirty` belong to it, or nothing does.

        Takes the arrays of `dirty`: they must not change any more. Returns once they are queued; the result's
        `wait` returns once the step is durable. `state` (up to 1 MiB) comes back with recovery and rollback.
        Raises BadRequest for a step that is not later than the last, StorageError, DeadlineExceeded.
        """
        check_step(step, state, min(STATE_BYTES_MAX, self._block_bytes - HEADER_BYTES))
        for table, ids, rows in dirty:
            check_rows(self.tables, table, ids, rows)
        self._check_open()
        with self._appending:
            self._finish_rollback()
            with self._changed:
                self._log.check()
                self._log.check_step(step)
            for table, ids, rows in dirty:
                self._queue(table, ids, rows, deadline, for_commit=True)
            self._wait_for_room(HEADER_BYTES + len(state), deadline, for_commit=True)
            with self._changed:
                return self._log.queue_commit(step, state)

    def rollback(self, step: int, deadline: Deadline = NEVER) -> bytes:
        """Go back to a committed step of `steps`; what came after is gone, durably. Returns its state.

        What was spilled since the last commit is gone too, also where `step` is the last one.
        """
        self._check_open()
        with self._appending:
            self._finish_rollback()
            drained = "writing what is queued"
            self._log.wait_until(lambda: self._log.written == self._log.end, deadline, drained)
            with self._folding.paused():
                with self._changed:
                    target = self._steps.find(step)
                    blocks = self._log.blocks.all()
                state = self._scan.state(target)
                live = blocks[blocks["position"] < target.start]
                indices = index_of(self._scan, self.tables, self._segments.all, live)
                with self._changed:
                    self._steps.going_back = True
                    commit = self._log.queue_rollback(target)
                self._unfinished = commit, lambda: self._go_back(target, indices)
                self._finish_rollback(deadline)
            return state

    def snapshot(self, step: int | None = None) -> Snapshot:
        """All rows as of a kept step (None: the last), to be read while training goes on; close it.

        Raises BadRequest where the step is not kept.
        """
        self._check_open()
        with self._changed:
            last = self._steps.last.step if self._steps.last else -1
            target = self._steps.find(last if step is None else step)
            blocks, salts = self._log.blocks.all(), self._log.blocks.salts()
            segments = self._segments.pin(self._log.start, target.end)
            self._steps.pins.append(target.start)
        view = LogView(segments, *salts, [], target.end)
        try:
            state = self._scan.state(target, segments)
            live = blocks[blocks["position"] < target.start]
            indices = index_of(self._scan, self.tables, segments, live)
        except BaseException:
            self._unpin(target, view)
            raise
        return Snapshot(
            target, state, self.tables, indices, view, self._log_rows, self._opened.pages, self._reader,
            self._check_open, lambda: self._unpin(target, view),
        )  # fmt: skip

    def fold(self) -> bool:
        """Fold what can be folded into pages now; False where there was nothing to do.

        Raises StorageError; everything is in the log still then.
        """
        self._check_open()
        return self._folding.run()

    def fold_batch(self) -> bool:
        """One batch of pages of a fold, begun where none is under way; False where there is nothing to do."""
        return self._folding.step()

    def write_block(self) -> bool:
        """Without threads: write the oldest block that is queued; False where none is."""
        return self._log.write_next()

    def counters(self) -> dict[str, int]:
        """What this opening has done, and what it holds now: bytes, rows, pages, times."""
        with self._changed:
            return {
                "log_bytes": self._log.end - self._log.start,
                "queue_bytes": self._log.queued_bytes,
                "index_bytes": sum(index.bytes for index in self._indices),
                "rows_in_log": sum(index.rows for index in self._indices),
                "appended_bytes": self._log.written_bytes,
                "commits": self._log.committed_count,
                "waits_for_room": self._log.waits,
                "folds": self._folding.folds,
                "folded_pages": self._folding.pages_written,
                "folding": int(self._folding.under_way),
                "fold_failing": int(self._folding.failure is not None),
                "steps_read": len(self._steps.pins),
            }

    def close(self) -> None:
        """Wait for commits on their way, then let go. What was spilled and not committed is gone.

        Nobody may be reading any more: files are closed.
        """
        if self._closed or self._pid != os.getpid():  # a child lets go of nothing: it is its parent's
            return
        try:
            if not self._log.broken:
                self._log.wait_until(lambda: self._log.committed, NEVER, "closing")
        except StorageError as error:
            log.warning("%s: a commit on its way at closing is not durable: %s", self._folder, error)
        self._closed = True
        self._folding.stop()
        self._log.stop()
        self._reader.close()
        self._opened.close()

    def __enter__(self) -> RowStorage:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed or self._pid != os.getpid():
            how = "is closed" if self._closed else "belongs to the process that opened it, not to its child"
            raise Unavailable(f"training store {self._folder} {how}")

    # Appending. The caller holds `_appending`.

    def _queue(
        self, table: int, ids: np.ndarray, rows: np.ndarray, deadline: Deadline, *, for_commit: bool
    ) -> None:
        row_bytes = self.tables[table].row_bytes
        size = rows_of_block(row_bytes, self._block_bytes)
        if not for_commit:  # in the order of pages: who reads many of them again reads the log in a row
            order = np.argsort(ids)
            ids, rows = ids[order], rows[order]
        for start in range(0, ids.size, size):
            part_ids, part = ids[start : start + size], rows[start : start + size]
            self._wait_for_room(block_bytes(part_ids.size, row_bytes), deadline, for_commit=for_commit)
            with self._changed:
                self._log.check()
                last = self._steps.last.step if self._steps.last else -1
                queued = self._log.queue_rows(table, last, part_ids, part)
                self._indices[table].put(part_ids, queued.first_entry, stride_of(row_bytes))

    def _wait_for_room(self, count: int, deadline: Deadline, *, for_commit: bool) -> None:
        """In the queue, and in the log, where folding may make it."""

        def has_room() -> bool:
            if not self._log.has_room(count):
                return False
            log_bytes = self._log.end - self._log.start + count
            if log_bytes <= self._config.log_bytes_max:
                return True
            if self._folding.can_help():
                return False
            if self._folding.failure:
                raise self._folding.failure
            if for_commit and not self._steps.pins:
                return True  # the commits after this one let it be folded
            kept = [c.step for c in self._steps.kept()]
            raise log_is_full(self._folder, log_bytes, self._config, kept, len(self._steps.pins))

        with self._changed:
            self._folding.try_again()
        self._log.wait_until(has_room, deadline, "waiting for room in the update log")

    def _finish_rollback(self, deadline: Deadline = NEVER) -> None:
        if self._unfinished:
            commit, go_back = self._unfinished
            self._log.wait_until(lambda: commit.durable, deadline, f"rolling back to step {commit.step}")
            go_back()
            self._unfinished = None

    def _go_back(self, target: Committed, indices: list[RowIndex]) -> None:
        """The rollback is durable: forget what it dropped."""
        with self._changed:
            dropped = self._steps.cut(0, target.start)
            self._log.blocks.cut(0, target.start)
            self._indices = indices
            self._steps.going_back = False
        self._steps.change_index({}, dropped)

    # Called by log and folding. `_changed` is not held.

    def _note_step(self, committed: Committed) -> None:
        with self._changed:
            self._folding.try_again()
        self._steps.note(committed)

    def _folded(self, target: Committed) -> None:
        """Pages and superblock say so: forget what they stand for, and let nobody wait long for it."""
        move_in_slices(self._indices, self._changed)  # what grows just now; then what is forgotten
        with self._changed:
            left = [self._log.rows_left(table, target.start) for table in range(len(self.tables))]
        maps = [index.map_for(count) for index, count in zip(self._indices, left, strict=True)]
        with self._changed:
            dropped = self._steps.cut(target.start, self._log.end)
            self._log.start = target.start
            self._log.blocks.cut(target.start, self._log.end)
            for index, made in zip(self._indices, maps, strict=True):
                index.forget_before(target.start, made)
            self._changed.notify_all()
        self._steps.change_index({}, dropped)
        move_in_slices(self._indices, self._changed)

    def _unpin(self, target: Committed, view: LogView) -> None:
        with self._changed:
            self._steps.pins.remove(target.start)
            self._changed.notify_all()
        self._segments.unpin(view.segments)
