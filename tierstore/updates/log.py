"""The update log: one queue that everything passes through in order, and one thread that writes it.

A position is given when rows are queued, so what was spilled can be read at once (from the queue until it
is written), and spills of later steps lie behind the commit of an earlier one. The queue is bounded: who
finds no room waits, up to a deadline. A commit is acknowledged when it and all before it are on the disk.

A full disk is told to whoever waits, and kept in the queue: the next spill, commit or wait tries again. Any
other failure of a write, and every failure of fdatasync, is final, since nobody knows what the disk holds
then: the log takes nothing more, and opening the store again finds the last committed step.

Without a thread (`background=False`) whoever waits does the writing: tests run everything in one thread,
from a seed.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import BadRequest, StorageError, Unavailable
from tierstore.format.direct import OUT_OF_SPACE, aligned_bytes
from tierstore.kernels.update_log import pack_entries
from tierstore.updates.blocks import (
    BLOCK_BYTES_MAX,
    COMMIT,
    HEADER_BYTES,
    ROLLBACK,
    ROWS,
    STATE_BYTES_MAX,
    BlockTable,
    Header,
    block_bytes,
    checksum_of,
    padded,
    stride_of,
)
from tierstore.updates.disk import Disk
from tierstore.updates.scan import Committed, Scanned
from tierstore.updates.segments import Segments, SyncFailed

log = logging.getLogger(__name__)
SLICE_S = 0.1  # of a wait, so that signals are noticed


class Commit:
    """A commit on its way to the disk."""

    def __init__(self, step: int, update_log: UpdateLog) -> None:
        self.step = step
        self.durable = False
        self._log = update_log

    def wait(self, timeout_s: float | None = None) -> None:
        """Return once the step is durable.

        Raises StorageError where the disk refuses: after a full disk the commit stays queued, and waiting
        again, or the next spill or commit, tries again. Raises DeadlineExceeded; it goes on then.
        """
        self._log.wait_until(lambda: self.durable, Deadline.after(timeout_s), f"committing step {self.step}")


@dataclass
class Queued:
    """A block that waits to be written. Its rows are read from here until then."""

    kind: int
    position: int
    size: int  # bytes in the log
    step: int
    table: int = 0
    ids: np.ndarray | None = None
    rows: np.ndarray | None = None
    body: bytes = b""
    target: int = 0
    commit: Commit | None = None

    @property
    def count(self) -> int:
        return len(self.body) if self.ids is None else self.ids.size

    @property
    def first_entry(self) -> int:
        return self.position + HEADER_BYTES + 8 * self.count


class UpdateLog:
    """Thread safe. `changed` guards the queue, the positions and the lists of blocks and commits."""

    def __init__(
        self,
        disk: Disk,
        segments: Segments,
        uuid: bytes,
        table_words: list[tuple[np.uint64, np.uint64]],
        start: int,
        scanned: Scanned,
        *,
        queue_bytes: int,
        changed: threading.Condition,
        background: bool,
    ) -> None:
        self.changed, self.segments, self._disk, self._uuid = changed, segments, disk, uuid
        self._words, self._queue_bytes = table_words, queue_bytes
        self.blocks = BlockTable()
        for header in scanned.rows:
            self.blocks.add(header)
        self.commits = list(scanned.commits)
        self.start, self.end = start, scanned.end
        self.written = self.durable = scanned.end
        self._number, self._previous = scanned.number, scanned.previous
        self._nonce = int.from_bytes(os.urandom(8), "little")
        self._queue: deque[Queued] = deque()
        self._queued_bytes = 0
        self.written_bytes = self.committed_count = self.waits = 0
        self._buffer = aligned_bytes(max(BLOCK_BYTES_MAX, padded(HEADER_BYTES + STATE_BYTES_MAX)))
        self._failure: StorageError | None = None  # that may pass: no room
        self.broken: StorageError | None = None
        self._stopping = False
        self.on_durable: Callable[[Committed], None] = lambda committed: None
        self.on_idle: Callable[[], bool] = lambda: False  # without a thread: do something else that helps
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, name="tierstore-update-log", daemon=True)
            self._thread.start()

    # What is queued. The caller holds `changed`.

    def waiting(self, table: int) -> list[Queued]:
        """Blocks of rows of a table that are not written yet, ascending."""
        return [q for q in self._queue if q.kind == ROWS and q.table == table]

    def rows_left(self, table: int, start: int) -> int:
        """Of a table, in blocks from `start` on, written or not; a row counts as often as it is there."""
        blocks = self.blocks.all()
        written = int(blocks["count"][(blocks["table"] == table) & (blocks["position"] >= start)].sum())
        return written + sum(q.count for q in self.waiting(table))

    def has_room(self, count: int) -> bool:
        """Whether so many bytes of rows fit; into an empty queue anything does."""
        return self._queued_bytes + count <= self._queue_bytes or not self._queue

    @property
    def committed(self) -> bool:
        """Whether no commit is on its way."""
        return not any(q.commit for q in self._queue)

    @property
    def queued_bytes(self) -> int:
        return self._queued_bytes

    def queue_rows(self, table: int, step: int, ids: np.ndarray, rows: np.ndarray) -> Queued:
        """Rows uint8 [n, row_bytes], few enough for a block; both arrays are the log's from here on."""
        size = block_bytes(ids.size, rows.shape[1])
        return self._put(Queued(ROWS, self.end, size, step, table, ids, rows))

    def queue_commit(self, step: int, state: bytes) -> Commit:
        commit = Commit(step, self)
        size = padded(HEADER_BYTES + len(state))
        self._put(Queued(COMMIT, self.end, size, step, body=state, commit=commit))
        return commit

    def queue_rollback(self, target: Committed) -> Commit:
        commit = Commit(target.step, self)
        size = padded(HEADER_BYTES)
        self._put(Queued(ROLLBACK, self.end, size, target.step, target=target.start, commit=commit))
        return commit

    def _put(self, queued: Queued) -> Queued:
        self._queue.append(queued)
        self._queued_bytes += queued.size
        self.end += queued.size
        self.changed.notify_all()
        return queued

    # Waiting and failing.

    def wait_until(self, ready: Callable[[], bool], deadline: Deadline, doing: str) -> None:
        """Wait for `ready`, called with `changed` held, while the queue is written.

        Raises StorageError where the disk refuses, DeadlineExceeded.
        """
        with self.changed:
            self._failure = None  # room may have been made
            self.changed.notify_all()
            waited = False
            while not ready():
                self.waits += not waited
                waited = True
                self.check()
                if self._failure:
                    raise self._failure
                left_s = deadline.remaining_s()
                if left_s == 0:
                    raise deadline.exceeded(doing)
                if self._thread:
                    self.changed.wait(SLICE_S if left_s is None else min(SLICE_S, left_s))
                else:
                    self._write_here()

    def _write_here(self) -> None:
        self.changed.release()
        try:
            assert self.write_next() or self.on_idle(), "without a thread there is nothing to wait for"
        finally:
            self.changed.acquire()

    def check(self) -> None:
        """Raise what keeps the log from taking anything more."""
        if self.broken:
            raise self.broken
        if self._stopping:
            raise Unavailable(f"training store {self.segments.folder.parent} is closed")

    # The writer.

    def write_next(self) -> bool:
        """Write the oldest block of the queue; False where there is none. For one thread at a time."""
        with self.changed:
            if not self._queue or self.broken:
                return False
            queued = self._queue[0]
        try:
            committed = self._write(queued)
        except OSError as error:
            self._fail(error, queued)
            return True
        with self.changed:
            self._queue.popleft()
            self._queued_bytes -= queued.size
            self.written_bytes += queued.size
            self.written = queued.position + queued.size
            if queued.kind == COMMIT:
                self.commits.append(committed)
                self.committed_count += 1
            if queued.commit:
                self.durable = self.written
                queued.commit.durable = True
            self.changed.notify_all()
        if queued.kind == COMMIT:
            self.on_durable(committed)
            self.segments.tidy()
        return True

    def _write(self, queued: Queued) -> Committed:
        header, body_sum = self._header(queued), 0
        block = self._buffer[: queued.size]
        filled = HEADER_BYTES + len(queued.body)
        if queued.ids is not None and queued.rows is not None:
            stride, row_bytes = stride_of(queued.rows.shape[1]), queued.rows.shape[1]
            first = HEADER_BYTES + 8 * queued.count
            block[HEADER_BYTES:first].view(np.int64)[:] = queued.ids
            body_sum = checksum_of(queued.ids)
            pack_entries(queued.rows, row_bytes, stride, queued.ids, *self._words[queued.table],
                         np.uint64(header.salt), int(block.ctypes.data) + first)  # fmt: skip
            filled = first + queued.count * stride
        else:
            block[HEADER_BYTES:filled] = np.frombuffer(queued.body, np.uint8)
            body_sum = checksum_of(queued.body)
        block[filled:] = 0
        header = replace(header, body_sum=body_sum)
        raw, own = header.encode(self._uuid)
        block[:HEADER_BYTES] = np.frombuffer(raw, np.uint8)
        segment = self.segments.append(block, queued.position)
        if queued.commit:
            self.segments.sync()
        self._number, self._previous = self._number + 1, own
        if queued.kind == ROWS:
            with self.changed:
                self.blocks.add(header)
        return Committed(queued.step, queued.position, header.end, segment.number, own, len(queued.body))

    def _header(self, queued: Queued) -> Header:
        row_bytes = 0 if queued.rows is None else queued.rows.shape[1]
        return Header(
            queued.kind, queued.table, queued.position, self._number, queued.step, queued.count, row_bytes,
            queued.size, 0, self._previous, self.durable, self._nonce, queued.target,
        )  # fmt: skip

    def _fail(self, error: OSError, queued: Queued) -> None:
        folder = self.segments.folder
        with self.changed:
            if error.errno in OUT_OF_SPACE and not isinstance(error, SyncFailed):
                self._failure = StorageError(
                    f"{folder}: the disk is full ({error.strerror}): {self._queued_bytes} bytes wait to be "
                    f"written, {self._disk.free_bytes(folder)} are free; nothing that was committed is lost: "
                    "make room, and the next commit, spill or wait tries again"
                )
            else:
                what = f"writing {queued.size} bytes at position {queued.position}"
                self._break(f"{what} failed: {error.strerror}")
            self.changed.notify_all()

    def _break(self, what: str) -> None:
        with self.changed:
            self.broken = StorageError(
                f"{self.segments.folder}: {what}; what the disk holds is not known any more, so this store "
                "takes no further updates: check the disk and open the store again, which finds the last "
                "committed step"
            )
            log.error("%s", self.broken)
            self.changed.notify_all()

    def _run(self) -> None:
        while True:
            with self.changed:
                while not self._stopping and (not self._queue or self._failure or self.broken):
                    self.changed.wait()
                if self._stopping:
                    return
            try:
                self.write_next()
            except Exception as error:  # nobody waits for a thread that has died
                self._break(f"writing the log failed: {error!r}")

    def stop(self) -> None:
        """Leave what is still queued; it was never acknowledged."""
        with self.changed:
            self._stopping = True
            self.changed.notify_all()
        if self._thread:
            self._thread.join()

    def check_step(self, step: int) -> None:
        """Raise BadRequest unless `step` is later than all committed or queued; `changed` is held."""
        queued = [q.step for q in self._queue if q.kind == COMMIT]
        last = queued[-1] if queued else self.commits[-1].step if self.commits else -1
        if step <= last:
            raise BadRequest(
                f"commit of step {step}: step {last} has been committed already and steps ascend; go on with "
                f"{last + 1}, or roll back first"
            )
