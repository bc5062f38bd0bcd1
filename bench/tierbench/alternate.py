"""Alternated windows: ours and its yardsticks in turn, so that a machine's drift meets them all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from tierbench.progress import count_progress
from tierbench.record import compare

Sample = TypeVar("Sample")
Step = Callable[[int], int]  # number of the call -> how much it did


def alternate(
    windows: int, contenders: Mapping[str, Callable[[], Sample]], label: str
) -> dict[str, list[Sample]]:
    """Call every contender once a window, in turned order; samples by name, window after window."""
    names = list(contenders)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    with count_progress(label, windows * len(names)) as progress:
        for window in range(windows):
            turn = window % len(names)
            for name in names[turn:] + names[:turn]:
                samples[name].append(contenders[name]())
                progress(1)
    return samples


def rate(step: Step, window_s: float) -> float:
    """What `step` does in a second, called over and over for `window_s` by this thread."""
    done, calls = 0, 0
    started = time.perf_counter()
    until = started + window_s
    while True:
        done += step(calls)
        calls += 1
        now = time.perf_counter()
        if now >= until:
            return done / (now - started)


def rate_of_callers(steps: list[Step], window_s: float) -> float:
    """The summed rate of steps that run at the same time, each in a thread of its own."""
    if len(steps) == 1:
        return rate(steps[0], window_s)
    with ThreadPoolExecutor(len(steps)) as pool:
        return sum(pool.map(lambda step: rate(step, window_s), steps))


def latencies_us(step: Step, count: int) -> np.ndarray:
    """How long each of `count` calls took, float64 microseconds, after a tenth as many unmeasured."""
    taken_ns = np.empty(count, np.int64)
    for call in range(count // 10):
        step(call)
    clock = time.perf_counter_ns
    for call in range(count):
        before = clock()
        step(call)
        taken_ns[call] = clock() - before
    return taken_ns / 1e3


def against_best(
    ours: list[float], yardsticks: Mapping[str, list[float]], beside: Mapping[str, list[float]] | None = None
) -> dict[str, Any]:
    """`compare` with the yardstick of the highest median, and all medians, also of those `beside`."""
    medians = {name: float(np.median(rates)) for name, rates in yardsticks.items()}
    best = max(medians, key=lambda name: medians[name])
    others = {name: float(np.median(rates)) for name, rates in (beside or {}).items()}
    return {"yardstick_name": best, "medians": {**medians, **others}, **compare(ours, yardsticks[best])}
