"""One caller's window of calls, each due at a time that was fixed beforehand.

A closed loop waits for an answer before it asks again: while the service stalls it asks nothing, and the
stall is one slow call among thousands (coordinated omission). Here the times at which calls are due do not
depend on any answer. A call that cannot begin because the one before it is still on its way begins late, and
its latency counts from when it was due; so a stall of 10 ms at a thousand calls a second is ten late calls.

What the generator itself is late by is kept apart: a caller that had nothing to do and still began late was
woken late. That is the lag, and a window says how much of it there was.
"""

from __future__ import annotations

import ctypes
import math
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from engram_client.errors import BadRequest
from tierbench.histogram import Histogram

CONSTANT, POISSON = "constant", "poisson"
ARRIVALS = (CONSTANT, POISSON)
CALLS_MAX = 1 << 20  # of one caller in one window: 24 MiB
PR_SET_TIMERSLACK = 29
NEVER, FOREVER = -(1 << 62), 1 << 62
SPIN_NS = 50_000
Call = Callable[[int], Any]  # number of the call
Clock = Callable[[], int]
Wait = Callable[[int], int]  # a time in ns -> the time when it returned, not before


def due_times(
    kind: str, rate_per_s: float, window_s: float, caller: int, callers: int, seed: int
) -> np.ndarray:
    """When one of so many callers' calls are due, int64 [n] ns from the window's start, ascending.

    Together they make `rate_per_s` calls: at equal distances, or by Poisson's law, whose sum is one again. An
    infinite rate has all calls due at once. Raises BadRequest for more calls than a window holds.
    """
    if math.isinf(rate_per_s):
        return np.zeros(CALLS_MAX, np.int64)
    expected = rate_per_s * window_s / callers
    if expected > 0.9 * CALLS_MAX:
        raise BadRequest(
            f"{rate_per_s:,.0f} calls/s for {window_s} s by {callers} callers are more than {CALLS_MAX} a "
            "caller; take a shorter window or more clients"
        )
    if kind == CONSTANT:
        numbers = np.arange(math.ceil(expected) + 1, dtype=np.float64) * callers + caller
        times = numbers / rate_per_s
    else:
        random = np.random.default_rng([seed, caller])
        drawn = math.ceil(expected + 8 * math.sqrt(expected) + 16)
        times = np.cumsum(random.exponential(callers / rate_per_s, drawn))
    return (times[times < window_s] * 1e9).astype(np.int64)


def sleeper(spin_ns: int) -> Wait:
    """Waits for a time of `time.monotonic_ns`, awake for the last `spin_ns`, as waking takes time."""
    clock, sleep = time.monotonic_ns, time.sleep

    def wait(until_ns: int) -> int:
        now = clock()
        if until_ns - now > spin_ns:
            sleep((until_ns - now - spin_ns) / 1e9)
            now = clock()
        while now < until_ns:
            now = clock()
        return now

    return wait


def ask_for_exact_timers() -> None:
    """Have the kernel wake this thread when it said, not up to 50 us later to save power."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)


@dataclass
class Window:
    """When calls were due, int64 [n] ns; `started` and `ended` are of the first, the others never began."""

    due: np.ndarray
    started: np.ndarray
    ended: np.ndarray
    end_ns: int

    def latency_ns(self) -> np.ndarray:
        """From when each call was due, int64 [n]; of those that never began, how long they had waited."""
        begun = self.ended.size
        return np.concatenate([self.ended - self.due[:begun], self.end_ns - self.due[begun:]])

    def service_ns(self) -> np.ndarray:
        """From when each call began."""
        return self.ended - self.started

    def lag_ns(self) -> np.ndarray:
        """How late those calls began whose caller had nothing else to do: the generator's own lateness."""
        due = self.due[: self.started.size]
        before = np.concatenate([[NEVER], self.ended[:-1]])
        return (self.started - due)[before <= due]

    def told(self, first_ns: int) -> dict[str, Any]:
        """What the parent adds up over callers.

        Calls that were due before `first_ns`, when things are cold, are left out; but `ended` counts calls by
        when they ended, and `in_call_ns` is of all.
        """
        first = int(np.searchsorted(self.due, first_ns))
        counted = Window(self.due[first:], self.started[first:], self.ended[first:], self.end_ns)
        histograms = {}
        for name in ("latency", "service", "lag"):
            histograms[name] = Histogram()
            histograms[name].add_values(getattr(counted, f"{name}_ns")())
        return {
            "due": int(counted.due.size),
            "done": int(np.count_nonzero(counted.ended <= self.end_ns)),
            "ended": int(np.count_nonzero((self.ended >= first_ns) & (self.ended <= self.end_ns))),
            "in_call_ns": int(self.service_ns().sum()),
            **{name: found.packed() for name, found in histograms.items()},
        }


def run_window(call: Call, due_ns: np.ndarray, end_ns: int, *, clock: Clock, wait: Wait) -> Window:
    """Make the calls that are due in their order, each when due or as soon after; none after the end."""
    started, ended = array("q", bytes(8 * due_ns.size)), array("q", bytes(8 * due_ns.size))
    number = 0
    for due in due_ns.tolist():
        now = clock()
        if now < due:
            now = wait(due)
        if now >= end_ns:
            break
        started[number] = now
        call(number)
        ended[number] = clock()
        number += 1
    begun, over = np.frombuffer(started, np.int64), np.frombuffer(ended, np.int64)
    return Window(due_ns, begun[:number], over[:number], end_ns)


def run_paced(call: Call, due_ns: np.ndarray) -> Window:
    """All of the calls in this thread, due int64 [n] ns after now, however late they get."""
    ask_for_exact_timers()
    due = due_ns + time.monotonic_ns()
    return run_window(call, due, FOREVER, clock=time.monotonic_ns, wait=sleeper(SPIN_NS))
