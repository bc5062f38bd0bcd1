"""A page reader that goes wrong on purpose: late, unreadable, short, or with flipped bits.

It stands in front of a real reader and obeys `PageReader`, so everything above it runs as it does in
production. What goes wrong is either ordered for single pages (`fail`, `flip`, `cut_short`) or drawn
at random with the rates of `Faults`. A draw depends on the seed, the page and how often that page
has been read, never on which thread came first, so a run can be repeated. `held` keeps every read
from starting until the block is left, which lets a test arrange what happens meanwhile without sleeping.

Pages are counted from the start of whatever file is read; a store with several tables shares one
reader among them.
"""

from __future__ import annotations

import ctypes
import errno
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from engram_client.deadline import Deadline
from tierstore.devices.base import PageRead, PageReader, PageReadFailed
from tierstore.kernels import jobs

PAGE_BYTES = 4096
FOREVER = 1 << 62  # times


@dataclass(frozen=True)
class Faults:
    """Rates are probabilities for each page read; latency is uniform between its bounds, for each call."""

    latency_s: tuple[float, float] = (0.0, 0.0)
    error_rate: float = 0.0
    flip_rate: float = 0.0
    short_rate: float = 0.0


class SimulatedDevice:
    """See `PageReader`. `reads` and `pages` count what was asked of the device."""

    def __init__(self, inner: PageReader, faults: Faults | None = None, seed: int = 0) -> None:
        self._inner = inner
        self._faults = faults or Faults()
        self._seed = seed
        self._ordered: dict[int, tuple[str, int]] = {}  # page -> what, how many times more
        self._times_read: Counter[int] = Counter()
        self._changing = threading.Condition()
        self._held = False
        self.reads = 0
        self.pages = 0
        self.waiting = 0

    def fail(self, pages: Iterable[int], times: int = FOREVER) -> None:
        """EIO for each of these pages, the next `times` times it is read."""
        self._order("error", pages, times)

    def flip(self, pages: Iterable[int], times: int = FOREVER) -> None:
        """One bit of each of these pages comes back wrong."""
        self._order("flip", pages, times)

    def cut_short(self, pages: Iterable[int], times: int = FOREVER) -> None:
        """The file seems to end in the middle of each of these pages."""
        self._order("short", pages, times)

    def heal(self) -> None:
        """Nothing that was ordered goes wrong any more."""
        with self._changing:
            self._ordered.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """No read starts before this block is left; those that come wait, up to their deadline."""
        self.hold()
        try:
            yield
        finally:
            self.let_go()

    def hold(self) -> None:
        """Let no read start until `let_go`."""
        with self._changing:
            self._held = True

    def let_go(self) -> None:
        """Let the reads that were held back start."""
        with self._changing:
            self._held = False
            self._changing.notify_all()

    def wait_for_readers(self, count: int, timeout_s: float = 30.0) -> None:
        """Return once so many reads are held back."""
        with self._changing:
            if not self._changing.wait_for(lambda: self.waiting >= count, timeout_s):
                raise TimeoutError(f"{self.waiting} reads wait after {timeout_s:g} s, expected {count}")

    def start(
        self,
        fd: int,
        first_pages: np.ndarray,
        page_counts: np.ndarray,
        slots: np.ndarray,
        buffer: int,
        *,
        hint: bool,
        reads: list[PageRead],
    ) -> SimulatedRead:
        def start_inner() -> PageRead:
            return self._inner.start(fd, first_pages, page_counts, slots, buffer, hint=hint, reads=reads)

        runs = list(zip(first_pages.tolist(), page_counts.tolist(), slots.tolist(), strict=True))
        read = SimulatedRead(self, runs, buffer, start_inner)
        reads.append(read)
        return read

    def stream(
        self,
        fd: int,
        first_pages: np.ndarray,
        page_counts: np.ndarray,
        slots: np.ndarray,
        buffer: int,
        *,
        hint: bool,
        reads: list[PageRead],
        limit: int,
        fates: np.ndarray,
    ) -> SimulatedStream:
        """As `PageReader.stream`; the runs below the limit are one call to the device."""

        def start(runs: slice) -> SimulatedRead:
            part = (first_pages[runs], page_counts[runs], slots[runs])
            return self.start(fd, *part, buffer, hint=hint, reads=reads)

        stream = SimulatedStream(self, start, limit, fates)
        reads.append(stream)
        return stream

    def close(self) -> None:
        self._inner.close()

    def flip_one_bit(self, page: int, address: int) -> None:
        """Which bit of a page is flipped depends on the seed and the page alone."""
        bit = random.Random(f"{self._seed} {page} bit").randrange(8 * PAGE_BYTES)
        ctypes.c_ubyte.from_address(address + bit // 8).value ^= 1 << bit % 8

    def _order(self, fate: str, pages: Iterable[int], times: int) -> None:
        with self._changing:
            self._ordered.update((int(page), (fate, times)) for page in pages)

    def let_pass(self, deadline: Deadline) -> None:
        """The device's latency, and the time it is held; DeadlineExceeded where that is too long."""
        with self._changing:
            self.reads += 1
            low, high = self._faults.latency_s
            if high > 0:
                self._sleep(random.Random(f"{self._seed} {self.reads} late").uniform(low, high), deadline)
            self.waiting += 1
            self._changing.notify_all()
            let_go = self._changing.wait_for(lambda: not self._held, deadline.remaining_s())
            self.waiting -= 1
        if not let_go:
            raise deadline.exceeded("waiting for the simulated device")

    def _sleep(self, duration_s: float, deadline: Deadline) -> None:
        left_s = deadline.remaining_s()
        self._changing.wait_for(lambda: False, duration_s if left_s is None else min(duration_s, left_s))
        deadline.check("waiting for the simulated device")

    def fate_of(self, page: int) -> str:
        with self._changing:
            self.pages += 1
            self._times_read[page] += 1
            what, times = self._ordered.get(page, ("", 0))
            if times > 0:
                self._ordered[page] = (what, times - 1)
                return what
            draw = random.Random(f"{self._seed} {page} {self._times_read[page]}").random()
        for what, rate in (
            ("error", self._faults.error_rate),
            ("flip", self._faults.flip_rate),
            ("short", self._faults.short_rate),
        ):
            if draw < rate:
                return what
            draw -= rate
        return ""


class SimulatedRead:
    """See `PageRead`. The real read begins once the device has let it pass, inside `wait`."""

    def __init__(
        self,
        device: SimulatedDevice,
        runs: list[tuple[int, int, int]],
        buffer: int,
        start_inner: Callable[[], PageRead],
    ) -> None:
        self._device = device
        self._runs = runs
        self._buffer = buffer
        self._start_inner = start_inner
        self._inner: PageRead | None = None

    def wait(self, deadline: Deadline) -> None:
        self._device.let_pass(deadline)
        self.read(deadline)

    def read(self, deadline: Deadline) -> None:
        """What `wait` does once the device has let it pass."""
        pages = [(first + i, slot + i) for first, count, slot in self._runs for i in range(count)]
        fates = [self._device.fate_of(page) for page, _ in pages]
        for (page, _), fate in zip(pages, fates, strict=True):
            if fate in ("error", "short"):
                raise PageReadFailed(page, errno.EIO)  # a short read is EIO to a reader of whole pages
        self._inner = self._start_inner()
        self._inner.wait(deadline)
        for (page, slot), fate in zip(pages, fates, strict=True):
            if fate == "flip":
                self._device.flip_one_bit(page, self._buffer + slot * PAGE_BYTES)

    def withdraw(self) -> None:
        if self._inner:
            self._inner.withdraw()

    def ended(self) -> bool:
        return self._inner is None or self._inner.ended()


class SimulatedStream:
    """See `PageStream`. A job without workers: its runs are read one after another, inside `advance`."""

    def __init__(
        self,
        device: SimulatedDevice,
        start: Callable[[slice], SimulatedRead],
        limit: int,
        fates: np.ndarray,
    ) -> None:
        self._device = device
        self._start = start
        self._fates = fates
        self._done = 0
        self._read: SimulatedRead | None = None
        self._table = np.zeros(jobs.HEADER_WORDS + jobs.JOB_WORDS, np.int64)
        self._limit = self._table[jobs.HEADER_WORDS + jobs.LIMIT // 8 :][:1]
        self._limit[0] = limit
        address = int(self._table.ctypes.data)
        self.words = (address, address + 8 * jobs.HEADER_WORDS, 0)

    def advance(self, deadline: Deadline) -> float:
        limit = int(self._limit[0])
        if self._done < limit:
            self._device.let_pass(deadline)
        for run in range(self._done, limit):
            self._read = self._start(slice(run, run + 1))
            try:
                self._read.read(deadline)
                self._fates[run] = jobs.LANDED
            except PageReadFailed:
                self._fates[run] = jobs.FAILED
            self._done = run + 1
        return 0.0

    def wait(self, deadline: Deadline) -> None:
        while self._done < int(self._limit[0]):
            self.advance(deadline)

    def withdraw(self) -> None:
        if self._read:
            self._read.withdraw()

    def ended(self) -> bool:
        return self._read is None or self._read.ended()
