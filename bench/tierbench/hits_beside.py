"""How long hits take while something else goes on: nothing, or misses on a disk of some kind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from tierstore.store import Store


class HotCalls:
    """Calls for keys that are meant to be in DRAM, the shortest way there is.

    `no_hits` counts calls that found a record gone.
    """

    def __init__(self, store: Store, keys: np.ndarray, tokens: int) -> None:
        """`keys` int64 [n, orders], so many `tokens` of them in one call."""
        (spec,) = store.tables().values()
        path = store.hit_path(spec.name, spec.generation)
        assert path is not None, "a store that caches records of one table"
        self._path = path
        self._calls = [keys[i : i + tokens] for i in range(0, len(keys) - tokens + 1, tokens)]
        assert spec.scheme is not None
        self._out = np.empty((tokens, spec.scheme.orders * spec.scheme.heads, spec.row_bytes), np.uint8)
        self.no_hits = 0

    def taken_us(self, window_s: float) -> np.ndarray:
        """How long each hit took, float64 microseconds, call after call for `window_s`."""
        taken_ns: list[int] = []
        clock, path, calls, out = time.perf_counter_ns, self._path, self._calls, self._out
        until = clock() + int(window_s * 1e9)
        number, before = 0, clock()
        while before < until or not taken_ns:
            hit = path(calls[number % len(calls)], out) is not None
            now = clock()
            number += 1
            if hit:
                taken_ns.append(now - before)
            else:
                self.no_hits += 1
            before = now
        return np.array(taken_ns) / 1e3


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[list[int]]:
    """Have `work` called over and over by another thread; yields a list with how often it was, so far.

    An error of `work` is raised when the block is left.
    """
    done, calls, failed = threading.Event(), [0], list[BaseException]()

    def call() -> None:
        try:
            while not done.is_set():
                work()
                calls[0] += 1
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call, name="tierbench-meanwhile", daemon=True)
    thread.start()
    try:
        yield calls
    finally:
        done.set()
        thread.join()
    if failed:
        raise failed[0]
