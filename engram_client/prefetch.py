"""Rows asked for before they are needed: handles, and a bound on how many are open.

A handle reads in the background into memory of its own, and hands it over whole: `wait` returns
rows that are all there or raises. The number of open handles is bounded, so a caller that
prefetches and forgets is told instead of filling memory; a handle stops counting once it
has been waited for, cancelled or dropped.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING

import numpy as np

from engram_client.errors import Cancelled, DeadlineExceeded, Overloaded

if TYPE_CHECKING:
    from engram_client.arrays import Array


class Handle:
    """Rows on their way. Made by `Table.prefetch` and `Table.prefetch_ngrams`."""

    def __init__(
        self, reading: Future[np.ndarray], finish: Callable[[np.ndarray], Array], free: Callable[[], None]
    ) -> None:
        self._reading = reading
        self._finish = finish
        self._free = weakref.finalize(self, _give_up, reading, free)

    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._reading.done()

    def wait(self, timeout: float | None = None) -> Array:
        """The rows, as the look-up of the same name returns them; may be called again.

        `timeout` in seconds. Raises DeadlineExceeded (the handle stays valid), Cancelled, or
        what the look-up raised.
        """
        try:
            rows = self._reading.result(timeout)
        except CancelledError:
            raise Cancelled("this prefetch was cancelled, or its client closed") from None
        except FutureTimeout as error:
            if self._reading.done():  # the look-up's own DeadlineExceeded is a TimeoutError too
                self._free()
                raise
            raise DeadlineExceeded(
                f"prefetched rows were not there after {timeout:g} s; wait again, or prefetch earlier"
            ) from error
        except BaseException:
            self._free()
            raise
        self._free()
        return self._finish(rows)

    def cancel(self) -> None:
        """Give the rows up. A read that has begun ends in the background; its rows are dropped."""
        self._free()


def _give_up(reading: Future[np.ndarray], free: Callable[[], None]) -> None:
    reading.cancel()  # does nothing to a read that has ended
    free()


class Prefetcher:
    """Runs look-ups in the background, at most `open_handles_max` unclaimed at a time."""

    def __init__(self, threads: int, open_handles_max: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="engram-prefetch")
        self._open_handles_max = open_handles_max
        self._open = 0
        self._lock = threading.Lock()

    def start(self, read: Callable[[], np.ndarray], finish: Callable[[np.ndarray], Array]) -> Handle:
        """Begin `read`; its result passes through `finish` when it is waited for.

        Raises Overloaded where too many handles are open, Cancelled once closed.
        """
        with self._lock:
            if self._open >= self._open_handles_max:
                raise Overloaded(
                    f"{self._open} prefetch handles are open, the most there may be; wait for some, cancel "
                    "or drop them, or connect with a larger prefetch_handles_max"
                )
            self._open += 1
        try:
            return Handle(self._pool.submit(read), finish, self._free_one)
        except RuntimeError:
            self._free_one()
            raise Cancelled("the client is closed") from None

    def _free_one(self) -> None:
        with self._lock:
            self._open -= 1

    def close(self) -> None:
        """Cancel what has not begun and wait for the rest."""
        self._pool.shutdown(wait=True, cancel_futures=True)
