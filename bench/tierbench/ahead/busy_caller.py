"""A caller that is busy in Python between asking for rows and using them, beside one that does not ask ahead.

Being busy is a fixed amount of work and not of time: a background thread that takes the interpreter away from
the caller then costs the caller as much as it takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from engram_client import Table
from tierbench.alternate import alternate
from tierbench.record import compare, summarize

CALLS = (6, 60)  # in a window, fewest and most
TOKENS_A_WINDOW = 8192
CALIBRATION_TURNS, CALIBRATIONS = 20_000, 40


def work(turns: int) -> int:
    """Something that only the interpreter does."""
    value = 1
    for _ in range(turns):
        value = value * 3 & 0xFFFF
    return value


def turns_for(busy_us: float) -> int:
    """How many turns take so long here, by the fastest of several tries."""
    fastest_s = float("inf")
    for _ in range(CALIBRATIONS):
        before = time.perf_counter()
        work(CALIBRATION_TURNS)
        fastest_s = min(fastest_s, time.perf_counter() - before)
    return max(1, round(busy_us * 1e-6 / fastest_s * CALIBRATION_TURNS))


class Caller:
    """Calls on one table, each with the next of `keys` [calls, tokens, orders], round and round."""

    def __init__(self, table: Table, keys: np.ndarray, turns: int) -> None:
        self._table, self._keys, self._turns = table, keys, turns
        self._calls = 0

    def _next(self) -> np.ndarray:
        self._calls += 1
        return self._keys[self._calls % len(self._keys)]

    def ahead(self) -> tuple[float, float]:
        """Ask, be busy, wait: the whole in microseconds, and the asking alone."""
        keys = self._next()
        before = time.perf_counter()
        handle = self._table.prefetch_ngrams(keys)
        asked = time.perf_counter()
        work(self._turns)
        handle.wait()
        return (time.perf_counter() - before) * 1e6, (asked - before) * 1e6

    def when_needed(self) -> tuple[float, float]:
        """Be busy, look up."""
        keys = self._next()
        before = time.perf_counter()
        work(self._turns)
        self._table.lookup_ngrams(keys)
        return (time.perf_counter() - before) * 1e6, 0.0


def _window(call: Callable[[], tuple[float, float]], calls: int) -> np.ndarray:
    return np.array([call() for _ in range(calls)])


def compare_callers(
    table: Table, make_keys: Callable[[int], np.ndarray], *, tokens: int, turns: int, windows: int, label: str
) -> dict[str, Any]:
    """Both callers in turn on batches of `tokens`; `make_keys(calls)` gives keys [calls, tokens, orders]."""
    calls = min(CALLS[1], max(CALLS[0], TOKENS_A_WINDOW // tokens))
    needed = (windows + 1) * calls
    callers = {name: Caller(table, make_keys(needed), turns) for name in ("ahead", "when_needed")}
    contenders = {name: partial(_window, getattr(caller, name), calls) for name, caller in callers.items()}
    alternate(1, contenders, f"{label}, warming")
    found = alternate(windows, contenders, label)
    ahead, needed_at = ([float(np.median(w[:, 0])) for w in found[name]] for name in contenders)
    told = {f"{name}_us": summarize(np.concatenate(found[name])[:, 0]) for name in contenders}
    asking = summarize(np.concatenate(found["ahead"])[:, 1])
    return {**told, "asking_us": asking, "ratio": compare(ahead, needed_at)}
