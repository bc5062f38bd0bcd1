"""Rows asked for before they are needed: handles, and a bound on how many are open.

A handle reads in the background into memory of its own, and hands it over whole: `wait` returns
rows that are all there or raises. The number of open handles is bounded, so a caller that
prefetches and forgets is told instead of filling memory; a handle stops counting once it
has been waited for, cancelled or dropped. What was given up before it began leaves the queue at
once, so that giving up and asking again piles nothing up behind a slow service.

A handle may be dropped by the garbage collector in the middle of anything, also of a change in
here. So the lock is one that its own thread may take again, and what it guards is right
between any two statements.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING

import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import Cancelled, DeadlineExceeded, Overloaded, TierstoreError
from engram_client.transport.base import PendingRows

if TYPE_CHECKING:
    from engram_client.arrays import Array

Read = Callable[[], np.ndarray]


class Handle:
    """Rows on their way. Made by `Table.prefetch` and `Table.prefetch_ngrams`."""

    def __init__(
        self, reading: PendingRows, finish: Callable[[np.ndarray], Array], free: Callable[[], None]
    ) -> None:
        self._reading: PendingRows = reading
        self._finish = finish
        self._free = weakref.finalize(self, free)
        self._free.atexit = False

    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._reading.done()

    def wait(self, timeout: float | None = None) -> Array:
        """The rows, as the look-up of the same name returns them; may be called again.

        `timeout` in seconds. Raises DeadlineExceeded (the handle stays valid), Cancelled, or
        what the look-up raised.
        """
        left_s = Deadline.after(timeout).remaining_s()
        try:
            rows = self._reading.result(left_s)
        except CancelledError:
            raise Cancelled("this prefetch was cancelled, or its client closed") from None
        except TierstoreError:  # before FutureTimeout: the look-up's DeadlineExceeded is one as well
            self._free()
            raise
        except FutureTimeout as error:
            raise DeadlineExceeded(
                f"prefetched rows were not there after {timeout:g} s; wait again, or prefetch earlier"
            ) from error
        except Exception:
            self._free()
            raise
        self._free()
        return self._finish(rows)

    def cancel(self) -> None:
        """Give the rows up. A read that has begun ends in the background; its rows are dropped."""
        self._free()
        self._reading = _cancelled()


def _cancelled() -> Future[np.ndarray]:
    future: Future[np.ndarray] = Future()
    future.cancel()
    return future


class Prefetcher:
    """Runs look-ups in the background, at most `open_handles_max` unclaimed at a time."""

    def __init__(self, threads: int, open_handles_max: int) -> None:
        self._threads_max = threads
        self._open_handles_max = open_handles_max
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._open: set[PendingRows] = set()
        self._closed = False
        self._waiting: OrderedDict[Future[np.ndarray], Read] = OrderedDict()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._changed = threading.Condition(threading.RLock())

    def start(self, read: Read, finish: Callable[[np.ndarray], Array]) -> Handle:
        """Begin `read`; its result passes through `finish` when it is waited for.

        Raises Overloaded where too many handles are open, Cancelled once closed.
        """
        if self._pid != os.getpid():
            self._begin()  # a forked child has none of its parent's threads
        reading: Future[np.ndarray] = Future()
        with self._changed:
            self._check()
            self._open.add(reading)
            self._waiting[reading] = read
            if len(self._waiting) > self._idle and len(self._threads) < self._threads_max:
                self._start_thread()
            self._changed.notify()
        return Handle(reading, finish, lambda: self._give_up(reading))

    def ready(self, rows: np.ndarray) -> Handle:
        """A handle of rows that are there already; raises as `start`, since it counts like the others."""
        reading: Future[np.ndarray] = Future()
        reading.set_result(rows)
        handle = self.follow(lambda: reading, lambda rows: rows)
        assert handle is not None, "it was begun"
        return handle

    def follow(
        self, begin: Callable[[], PendingRows | None], finish: Callable[[np.ndarray], Array]
    ) -> Handle | None:
        """A handle of what `begin` has started elsewhere, None where it has not; else as `start`."""
        if self._pid != os.getpid():
            self._begin()
        with self._changed:
            self._check()
            reading = begin()
            if reading is None:
                return None
            self._open.add(reading)
        return Handle(reading, finish, lambda: self._give_up(reading))

    def _check(self) -> None:
        if self._closed:
            raise Cancelled("the client is closed")
        if len(self._open) >= self._open_handles_max:
            raise Overloaded(
                f"{len(self._open)} prefetch handles are open, the most there may be; wait for some, cancel "
                "or drop them, or connect with a larger prefetch_handles_max"
            )

    def _start_thread(self) -> None:
        thread = threading.Thread(
            target=self._work, name=f"engram-prefetch-{len(self._threads)}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _give_up(self, reading: PendingRows) -> None:
        if self._pid != os.getpid():
            return  # a handle that a forked child inherited
        with self._changed:
            self._open.discard(reading)
            if isinstance(reading, Future):
                self._waiting.pop(reading, None)
        reading.cancel()  # does nothing to a read that has begun or ended

    def _work(self) -> None:
        while (work := self._next()) is not None:
            reading, read = work
            if reading.set_running_or_notify_cancel():
                try:
                    reading.set_result(read())
                except BaseException as error:
                    reading.set_exception(error)
            del work, reading, read  # nothing is kept alive while this thread has nothing to do

    def _next(self) -> tuple[Future[np.ndarray], Read] | None:
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._waiting or self._closed)
            self._idle -= 1
            return self._waiting.popitem(last=False) if self._waiting else None

    def close(self) -> None:
        """Cancel what has not begun and wait for the rest."""
        if self._pid != os.getpid():
            return
        with self._changed:
            self._closed = True
            given_up = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for reading in given_up:
            reading.cancel()
        for thread in self._threads:
            if thread is not threading.current_thread():  # the last user of a client may be a read of it
                thread.join()
