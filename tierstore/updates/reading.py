"""Reading scattered pieces of files: planned, joined into runs, many at a time, in bounded buffers.

A buffer is used in two halves: what has landed in one is taken while the other is read into.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import StorageError
from tierstore.devices.base import PageRead, PageReadFailed, RunReader
from tierstore.format.direct import aligned_bytes
from tierstore.format.geometry import PAGE_BYTES
from tierstore.kernels.log_entries import plan_entries
from tierstore.kernels.update_log import copy_pieces
from tierstore.tiers.plan import Pieces, Window, plan_pieces

BUFFERS_MAX = 4
GAP_PAGES_MAX, RUN_PAGES_MAX = 3, 16
ENTRY_RUN_PAGES_MAX = 64  # entries lie close together
ENTRY_PAGES_MAX = 18  # of the largest row
SLICE_S = 0.05


@dataclass(frozen=True)
class Runs:
    """Runs of pages, and where they land: page-aligned memory, slots of 4096 bytes."""

    first_pages: np.ndarray  # int64 [n]
    page_counts: np.ndarray
    slots: np.ndarray
    buffer: int  # address


@dataclass(frozen=True)
class LandedEntries:
    """Entries [start, stop) of those that were asked for, in memory; see `take_entries`."""

    start: int
    stop: int
    run_of: np.ndarray
    first_run: int
    runs: Runs


Check = Callable[[Window, np.ndarray], None]  # pages uint64 [slots, 512] have landed; raises what is wrong


class PieceReader:
    """Thread safe; up to four readers at a time, others wait for a buffer."""

    def __init__(self, reader: RunReader, buffer_bytes: int) -> None:
        self._reader = reader
        self._half_pages = max(ENTRY_PAGES_MAX, buffer_bytes // PAGE_BYTES // 2)
        self._free: list[np.ndarray] = []
        self._made: list[np.ndarray] = []
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
        windows = list(plan.windows(self._half_pages))

        def take(number: int, runs: Runs) -> None:
            w, p = windows[number], windows[number].pieces
            if check:
                check(w, self._slots(buffer, number))
            copy_pieces(runs.buffer, w.piece_slots, offsets[p], lengths[p], targets[p], int(out.ctypes.data))

        with self._buffer(deadline) as buffer:
            landings = [
                Runs(w.run_first_pages, w.run_page_counts, w.run_slots, self._half(buffer, number))
                for number, w in enumerate(windows)
            ]
            self._land(fd, path, landings, buffer, deadline, take)

    def read_entries(
        self,
        fd: int,
        path: Path,
        starts: np.ndarray,
        length: int,
        take: Callable[[LandedEntries], None],
        deadline: Deadline,
    ) -> None:
        """Bring `length` bytes from each of the bytes `starts` int64 [n], ascending, of a file into memory.

        `take` is given them some at a time, in order; it may raise. Raises as `read` does.
        """
        firsts, counts, run_of = (np.empty_like(starts) for _ in range(3))
        most = min(ENTRY_RUN_PAGES_MAX, self._half_pages)
        found = plan_entries(starts, length, GAP_PAGES_MAX, most, firsts, counts, run_of)
        firsts, counts = firsts[:found], counts[:found]
        ends, bounds = np.cumsum(counts), [0]
        while bounds[-1] < found:
            used = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
            bounds.append(int(np.searchsorted(ends, used + self._half_pages, side="right")))
        entries = np.searchsorted(run_of, bounds).tolist()
        with self._buffer(deadline) as buffer:
            landings = []
            for number, (low, high) in enumerate(pairwise(bounds)):
                slots = ends[low:high] - counts[low:high]
                slots -= slots[0]
                landings.append(Runs(firsts[low:high], counts[low:high], slots, self._half(buffer, number)))
            self._land(
                fd, path, landings, buffer, deadline,
                lambda n, runs: take(LandedEntries(entries[n], entries[n + 1], run_of, bounds[n], runs)),
            )  # fmt: skip

    def read_pages(self, fd: int, path: Path, runs: Runs, memory: np.ndarray) -> None:
        """Runs of pages straight into the caller's `memory`, which `runs` names. Raises as `read` does."""
        self._land(fd, path, [runs], memory, Deadline.after(None), lambda number, landed: None)

    def close(self) -> None:
        self._reader.close()

    def _half(self, buffer: np.ndarray, number: int) -> int:
        return int(buffer.ctypes.data) + number % 2 * self._half_pages * PAGE_BYTES

    def _slots(self, buffer: np.ndarray, number: int) -> np.ndarray:
        """The same half, as pages uint64 [n, 512]."""
        start = number % 2 * self._half_pages
        return buffer.view(np.uint64).reshape(-1, PAGE_BYTES // 8)[start : start + self._half_pages]

    def _land(
        self,
        fd: int,
        path: Path,
        landings: list[Runs],
        buffer: np.ndarray,
        deadline: Deadline,
        take: Callable[[int, Runs], None],
    ) -> None:
        """`take` each of these when its pages have landed, while the next is being read."""
        reads: list[PageRead] = []
        try:
            for number in range(len(landings) + 1):
                if number < len(landings):
                    r = landings[number]
                    self._reader.start(
                        fd, r.first_pages, r.page_counts, r.slots, r.buffer, hint=False, reads=reads
                    )
                if number:
                    reads[0].wait(deadline)
                    del reads[0]
                    take(number - 1, landings[number - 1])
        except PageReadFailed as failure:
            name = errno.errorcode.get(failure.errno, str(failure.errno))
            raise StorageError(
                f"{path}: page {failure.page} could not be read: {name}, {os.strerror(failure.errno)}; "
                "check the disk"
            ) from failure
        finally:
            for read in reads:
                read.withdraw()
                with self._changed:
                    self._abandoned.append((buffer, read))

    @contextmanager
    def _buffer(self, deadline: Deadline) -> Iterator[np.ndarray]:
        with self._changed:
            self._recover()
            while not self._free and len(self._made) == BUFFERS_MAX:
                left_s = deadline.remaining_s()
                if left_s == 0:
                    raise deadline.exceeded("waiting for a free page buffer")
                self._changed.wait(SLICE_S if left_s is None else min(SLICE_S, left_s))
                self._recover()
            if self._free:
                buffer = self._free.pop()
            else:
                buffer = aligned_bytes(2 * self._half_pages * PAGE_BYTES)
                self._made.append(buffer)
        try:
            yield buffer
        finally:
            with self._changed:
                if not any(b is buffer for b, _ in self._abandoned):
                    self._free.append(buffer)
                self._changed.notify()

    def _recover(self) -> None:
        """Have buffers back that nothing is read into any more."""
        before = self._abandoned
        self._abandoned = [(b, r) for b, r in before if not r.ended()]
        for buffer in self._made:
            busy = any(b is buffer for b, _ in self._abandoned)
            if any(b is buffer for b, _ in before) and not busy:
                self._free.append(buffer)
