"""Reading scattered pieces of files: planned, joined into runs, many at a time, in bounded buffers."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import StorageError
from tierstore.devices.base import PageRead, PageReadFailed, RunReader
from tierstore.format.direct import aligned_bytes
from tierstore.format.geometry import PAGE_BYTES
from tierstore.kernels.update_log import copy_pieces
from tierstore.tiers.plan import Pieces, Window, plan_pieces

BUFFERS_MAX = 4
GAP_PAGES_MAX, RUN_PAGES_MAX = 3, 16
SLICE_S = 0.05

Check = Callable[[Window, np.ndarray], None]  # pages uint64 [slots, 512] have landed; raises what is wrong


class PieceReader:
    """Thread safe; up to four readers at a time, others wait for a buffer."""

    def __init__(self, reader: RunReader, buffer_bytes: int) -> None:
        self._reader = reader
        self._pages = max(RUN_PAGES_MAX, buffer_bytes // PAGE_BYTES)
        self._free: list[np.ndarray] = []
        self._made = 0
        self._changed = threading.Condition()
        self._abandoned: list[tuple[np.ndarray, PageRead]] = []  # at their deadline, still read into

    def read(
        self,
        fd: int,
        path: Path,
        pieces: Pieces,
        out: np.ndarray,
        deadline: Deadline,
        check: Check | None = None,
    ) -> None:
        """Bring each piece to its target byte of `out`, uint8; lengths must be given.

        `check` sees every window's pages before anything is copied from them. Raises StorageError naming the
        file, or DeadlineExceeded; what `out` holds is undefined then.
        """
        if pieces.pages.size == 0:
            return
        plan = plan_pieces(pieces, GAP_PAGES_MAX, RUN_PAGES_MAX)
        lengths, offsets, targets = plan.pieces.lengths, plan.pieces.page_offsets, plan.pieces.targets
        assert lengths is not None
        with self._buffer(deadline) as buffer:
            slots = buffer.view(np.uint64).reshape(-1, PAGE_BYTES // 8)
            for window in plan.windows(self._pages):
                self._land(fd, path, window, buffer, deadline)
                if check:
                    check(window, slots)
                p = window.pieces
                copy_pieces(int(buffer.ctypes.data), window.piece_slots, offsets[p], lengths[p], targets[p],
                            int(out.ctypes.data))  # fmt: skip

    def close(self) -> None:
        self._reader.close()

    def _land(self, fd: int, path: Path, window: Window, buffer: np.ndarray, deadline: Deadline) -> None:
        reads: list[PageRead] = []
        try:
            read = self._reader.start(
                fd, window.run_first_pages, window.run_page_counts, window.run_slots, int(buffer.ctypes.data),
                hint=False, reads=reads,
            )  # fmt: skip
            read.wait(deadline)
        except PageReadFailed as failure:
            name = errno.errorcode.get(failure.errno, str(failure.errno))
            raise StorageError(
                f"{path}: page {failure.page} could not be read: {name}, {os.strerror(failure.errno)}; "
                "check the disk"
            ) from failure
        except BaseException:
            for read in reads:
                read.withdraw()
                with self._changed:
                    self._abandoned.append((buffer, read))
            raise

    @contextmanager
    def _buffer(self, deadline: Deadline) -> Iterator[np.ndarray]:
        with self._changed:
            while not self._free and self._made == BUFFERS_MAX:
                left_s = deadline.remaining_s()
                if left_s == 0:
                    raise deadline.exceeded("waiting for a free page buffer")
                self._changed.wait(SLICE_S if left_s is None else min(SLICE_S, left_s))
                self._recover()
            if self._free:
                buffer = self._free.pop()
            else:
                self._made += 1
                buffer = aligned_bytes(self._pages * PAGE_BYTES)
        try:
            yield buffer
        finally:
            with self._changed:
                if not any(b is buffer for b, _ in self._abandoned):
                    self._free.append(buffer)
                self._changed.notify()

    def _recover(self) -> None:
        for buffer, read in list(self._abandoned):
            if read.ended():
                self._abandoned = [(b, r) for b, r in self._abandoned if r is not read]
                self._free.append(buffer)


def spans(starts: np.ndarray, length: int, targets: np.ndarray) -> Pieces:
    """Pieces of `length` bytes at bytes `starts` int64 [n] of a file, cut at page ends."""
    parts = np.arange((length + 2 * PAGE_BYTES - 2) // PAGE_BYTES)
    pages = starts[:, None] // PAGE_BYTES + parts
    begins = np.maximum(pages * PAGE_BYTES, starts[:, None])
    ends = np.minimum((pages + 1) * PAGE_BYTES, starts[:, None] + length)
    real = ends > begins
    goes = targets[:, None] + begins - starts[:, None]
    begins, ends = begins[real], ends[real]
    return Pieces(pages[real], begins % PAGE_BYTES, ends - begins, goes[real])
