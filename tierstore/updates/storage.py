"""`RowStorage`: the durable half of a training store. Bytes in, bytes out; it knows no optimizer.

The newest version of a row is looked for in the log (queue, then segments), then in the pages, else it is
what rows are initially. What was spilled or committed last is read first, by whoever asks. A crash, or a
rollback, goes back to what a commit had closed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import BadRequest, IdOutOfRange, StorageError
from tierstore.config import Training
from tierstore.updates.blocks import BLOCK_BYTES_MAX, STATE_BYTES_MAX, block_bytes, rows_of_block, stride_of
from tierstore.updates.disk import REAL_DISK, Disk
from tierstore.updates.identity import create_store, write_identity
from tierstore.updates.initial import InitialRows
from tierstore.updates.log import Commit, UpdateLog
from tierstore.updates.log_rows import LogRows, view_of
from tierstore.updates.opening import Opened, index_of
from tierstore.updates.reading import PieceReader
from tierstore.updates.row_index import RowIndex
from tierstore.updates.scan import Committed
from tierstore.updates.spec import TrainedSpec
from tierstore.updates.step_index import StepPlace

log = logging.getLogger(__name__)

NEVER = Deadline.after(None)


class RowStorage:
    """A training store's rows on disk. Thread safe; one process owns it."""

    def __init__(self, disk: Disk, folder: Path, config: Training, background: bool) -> None:
        """Use `open`. Recovers: afterwards the rows are those of the last committed step, exactly."""
        self._disk, self._folder, self._config = disk, folder, config
        self._changed = threading.Condition()  # of the log: its queue, positions, lists; and the indices
        self._appending = threading.RLock()  # one spill, commit or rollback at a time
        self._unfinished: tuple[Commit, Callable[[], None]] | None = None  # a rollback on its way
        self._closed = False
        opened = Opened(disk, folder, config, self._changed)
        identity, self._superblock, self._scan = opened.identity, opened.superblock, opened.scan
        self.tables = list(identity.tables)
        self._segments, self._steps, self._indices = opened.segments, opened.steps, opened.indices
        self._owner = opened.owner
        self._reader = PieceReader(disk.open_reader(config.read_depth), config.read_buffer_bytes)
        self._log = UpdateLog(
            disk, self._segments, identity.uuid, identity.words, opened.scanned,
            queue_bytes=config.queue_bytes, changed=self._changed, background=background,
        )  # fmt: skip
        self._indexed = set(opened.indexed)
        self._log.on_durable = self._note_step
        self._log_rows = [
            LogRows(self._log, self._reader, t.row_bytes, w)
            for t, w in zip(self.tables, identity.words, strict=True)
        ]
        self._initial = [InitialRows(t) for t in self.tables]

    @classmethod
    def create(cls, folder: Path | str, tables: Sequence[TrainedSpec], *, disk: Disk = REAL_DISK) -> None:
        """Make an empty store of `tables` in `folder` (DIR/training). Raises BadRequest, StorageError."""
        folder = Path(folder)
        try:
            write_identity(disk, folder, create_store(disk, folder, tables))
        except OSError as error:
            raise StorageError(
                f"{folder}: a training store cannot be made there: {error.strerror}"
            ) from error

    @classmethod
    def open(
        cls, folder: Path | str, config: Training, *, disk: Disk = REAL_DISK, background: bool = True
    ) -> RowStorage:
        """Open and recover the store in `folder`.

        `background=False` starts no threads: waiting writes (tests). Raises FormatError where there is none,
        StoreLocked where another process owns it, DataCorrupt where what had been committed is damaged.
        """
        try:
            return cls(disk, Path(folder), config, background)
        except OSError as error:
            raise StorageError(f"{folder}: the training store cannot be opened: {error}") from error

    def step(self) -> int | None:
        """The last committed step, or None before the first."""
        with self._changed:
            return self._log.commits[-1].step if self._log.commits else None

    def steps(self) -> list[int]:
        """Committed steps that can be gone back to, oldest first."""
        with self._changed:
            return [c.step for c in self._kept()]

    def state(self) -> bytes:
        """What the last commit was given to keep; empty before the first."""
        with self._changed:
            last = self._log.commits[-1] if self._log.commits else None
        return self._scan.state(last) if last else b""

    def read(self, table: int, ids: np.ndarray, out: np.ndarray, deadline: Deadline = NEVER) -> None:
        """The newest version of rows `ids` int64 [n] into `out` uint8 [n, row_bytes].

        Raises IdOutOfRange, StorageError, DataCorrupt, DeadlineExceeded; `out` is undefined then.
        """
        self._check_rows(table, ids, out)
        with self._changed:
            positions = self._indices[table].find(ids)
            view = view_of(self._log, table, self._superblock.folded.start, self._log.end)
        try:
            self._log_rows[table].read(view, ids, positions, out, deadline)
        finally:
            self._segments.unpin(view.segments)
        self._read_folded(table, ids, np.flatnonzero(positions < 0), out, deadline)

    def _read_folded(
        self, table: int, ids: np.ndarray, missing: np.ndarray, out: np.ndarray, deadline: Deadline
    ) -> None:
        self._initial[table].fill(ids[missing], missing, out)

    def spill(self, table: int, ids: np.ndarray, rows: np.ndarray, deadline: Deadline = NEVER) -> None:
        """Rows uint8 [n, row_bytes] with distinct `ids` int64 [n], newer than what there was; copied.

        `read` gives them from here on; they are durable with the next commit. Waits where the queue or the
        log is full. Raises StorageError where the disk is, DeadlineExceeded.
        """
        self._check_rows(table, ids, rows)
        with self._appending:
            self._finish_rollback()
            self._queue(table, ids, rows, deadline, copied=True)

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
        if not isinstance(step, int) or not 0 <= step < 2**63:
            raise BadRequest(f"a step is a whole number >= 0, got {step!r}")
        if len(state) > STATE_BYTES_MAX:
            raise BadRequest(f"the state of a step may take {STATE_BYTES_MAX} bytes, got {len(state)}")
        for table, ids, rows in dirty:
            self._check_rows(table, ids, rows)
        with self._appending:
            self._finish_rollback()
            with self._changed:
                self._log.check()
                self._log.check_step(step)
            for table, ids, rows in dirty:
                self._queue(table, ids, rows, deadline, copied=False)
            with self._changed:
                return self._log.queue_commit(step, state)

    def rollback(self, step: int, deadline: Deadline = NEVER) -> bytes:
        """Go back to a committed step of `steps`; what came after is gone, durably. Returns its state.

        What was spilled since the last commit is gone too, also where `step` is the last one.
        """
        with self._appending:
            self._finish_rollback()
            self._log.wait_until(
                lambda: self._log.written == self._log.end, deadline, "writing what is queued"
            )
            with self._changed:
                target = self._kept_step(step)
                blocks = self._log.blocks.all()
            state = self._scan.state(target)
            indices = index_of(
                self._scan, self._segments, self.tables, blocks[blocks["position"] < target.start]
            )
            with self._changed:
                commit = self._log.queue_rollback(target)
            self._unfinished = commit, lambda: self._go_back(target, indices)
            self._finish_rollback(deadline)
            return state

    def close(self) -> None:
        """Wait for commits on their way, then let go. What was spilled and not committed is gone."""
        if self._closed:
            return
        self._closed = True
        try:
            self._log.wait_until(lambda: self._log.committed, NEVER, "closing")
        except StorageError as error:
            log.warning(
                "%s: a commit on its way when the store was closed is not durable: %s", self._folder, error
            )
        self._log.stop()
        self._reader.close()
        self._segments.close()
        self._steps.close()
        self._owner.close()

    def __enter__(self) -> RowStorage:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Appending. The caller holds `_appending`.

    def _queue(
        self, table: int, ids: np.ndarray, rows: np.ndarray, deadline: Deadline, *, copied: bool
    ) -> None:
        row_bytes = self.tables[table].row_bytes
        size = rows_of_block(row_bytes, BLOCK_BYTES_MAX)
        for start in range(0, ids.size, size):
            part_ids, part = ids[start : start + size], rows[start : start + size]
            if copied:
                part_ids, part = part_ids.copy(), part.copy()
            self._wait_for_room(block_bytes(part_ids.size, row_bytes), deadline)
            with self._changed:
                self._log.check()
                last = self._log.commits[-1].step if self._log.commits else -1
                queued = self._log.queue_rows(table, last, part_ids, part)
                self._indices[table].put(part_ids, queued.first_entry, stride_of(row_bytes))

    def _wait_for_room(self, count: int, deadline: Deadline) -> None:
        self._log.wait_until(
            lambda: self._log.has_room(count), deadline, "waiting for room in the update queue"
        )

    def _finish_rollback(self, deadline: Deadline = NEVER) -> None:
        if self._unfinished:
            commit, go_back = self._unfinished
            self._log.wait_until(lambda: commit.durable, deadline, f"rolling back to step {commit.step}")
            go_back()
            self._unfinished = None

    def _go_back(self, target: Committed, indices: list[RowIndex]) -> None:
        """The rollback is durable: forget what it dropped."""
        with self._changed:
            dropped = [c.step for c in self._log.commits if c.start > target.start]
            self._log.commits = [c for c in self._log.commits if c.start <= target.start]
            self._log.blocks.cut(0, target.start)
            self._indices = indices
        self._index_steps({}, dropped)

    # Steps.

    def _kept(self) -> list[Committed]:
        """`_changed` is held."""
        return kept_commits(self._log.commits, self._superblock.folded.floor, self._config.keep_steps)

    def _kept_step(self, step: int) -> Committed:
        for committed in self._kept():
            if committed.step == step:
                return committed
        have = ", ".join(str(c.step) for c in self._kept()) or "none"
        raise BadRequest(
            f"step {step} is not kept; steps that can be gone back to: {have} (training.keep_steps = "
            f"{self._config.keep_steps})"
        )

    def _note_step(self, committed: Committed) -> None:
        """A commit is durable: tell the index, which may lag."""
        with self._changed:
            kept = {c.step for c in self._kept()}
        place = StepPlace(committed.start, committed.end, committed.segment, committed.digest)
        self._index_steps({committed.step: place}, sorted(self._indexed - kept))

    def _index_steps(self, put: dict[int, StepPlace], drop: list[int]) -> None:
        try:
            self._steps.change(put, drop)
            self._indexed = (self._indexed | put.keys()) - set(drop)
        except StorageError as error:
            log.warning("%s; the log holds every commit, the index is made again when the store opens", error)

    def _check_rows(self, table: int, ids: np.ndarray, rows: np.ndarray) -> None:
        if not 0 <= table < len(self.tables):
            raise BadRequest(f"table {table}: the store has {len(self.tables)} tables, numbered from 0")
        spec = self.tables[table]
        if ids.dtype != np.int64 or ids.ndim != 1 or not ids.flags.c_contiguous:
            raise BadRequest(
                f"{spec.name}: row ids must be contiguous int64 [n], got {ids.dtype} {ids.shape}"
            )
        shape = (ids.size, spec.row_bytes)
        if rows.dtype != np.uint8 or rows.shape != shape or not rows.flags.c_contiguous:
            raise BadRequest(
                f"{spec.name}: rows must be contiguous uint8 {shape}, got {rows.dtype} {rows.shape}"
            )
        if ids.size and (ids.min() < 0 or ids.max() >= spec.rows):
            raise IdOutOfRange(
                f"{spec.name}: row ids must lie in [0, {spec.rows}), got {ids.min()} to {ids.max()}"
            )


def kept_commits(commits: list[Committed], floor: int, keep_steps: int) -> list[Committed]:
    """Those that can be gone back to, oldest first."""
    return [c for c in commits[-keep_steps:] if c.start >= floor]
