"""The longest gaps of look-ups while something else goes on, phase by phase.

A looker calls without a pause and notes when each call began, how long it took, whether a record had to be
read from NVMe, and whether its thread gave up the core meanwhile to wait for something, a lock or memory. A
call that took long without such a wait was only taken off the core, by whatever else the machine had to do.

The main thread notes when each phase began and ended. A call belongs to every phase that it overlaps, so
one that a phase held up is that phase's also where it ends after it.
"""

from __future__ import annotations

import gc
import resource
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tierbench.record import summarize

BAR_MS = 50.0  # no pause beyond it may be a resize's doing
LONGEST = 10  # calls that are told one by one
Call = Callable[[int], bool]  # number of the call -> whether something had to be read


@dataclass
class Looker:
    """Times in nanoseconds of time.perf_counter_ns."""

    call: Call
    began_ns: array[int] = field(default_factory=lambda: array("q"))
    took_ns: array[int] = field(default_factory=lambda: array("q"))
    read: array[int] = field(default_factory=lambda: array("b"))
    waits: array[int] = field(default_factory=lambda: array("q"))

    def run(self, done: threading.Event) -> None:
        clock, number, waited = time.perf_counter_ns, 0, _waits_of_this_thread()
        while not done.is_set():
            before = clock()
            read = self.call(number)
            self.took_ns.append(clock() - before)
            self.began_ns.append(before)
            self.read.append(read)
            waited_before, waited = waited, _waits_of_this_thread()
            self.waits.append(waited - waited_before)
            number += 1


def _waits_of_this_thread() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


@dataclass
class Phases:
    """Phases by kind: when each began and ended, in nanoseconds."""

    spans_ns: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    @contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        began = time.perf_counter_ns()
        try:
            yield
        finally:
            self.spans_ns.setdefault(kind, []).append((began, time.perf_counter_ns()))

    def told(self, lookers: Sequence[Looker]) -> dict[str, Any]:
        """By kind of phase: seconds of each phase, and what calls took, in milliseconds."""
        began, took, read, waits = (
            np.concatenate([np.array(getattr(looker, name)) for looker in lookers])
            for name in ("began_ns", "took_ns", "read", "waits")
        )
        told = {}
        for kind, spans in self.spans_ns.items():
            chosen = _overlapping(began, took, spans)
            phase_s = [(b - a) / 1e9 for a, b in spans]
            calls = _calls_told(took[chosen] / 1e6, read[chosen] != 0, waits[chosen] != 0, sum(phase_s))
            told[kind] = {"phase_s": phase_s, **calls}
        return told


def _overlapping(began: np.ndarray, took: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    chosen = np.zeros(began.size, bool)
    for a, b in spans:
        chosen |= (began <= b) & (began + took >= a)
    return chosen


def _calls_told(took_ms: np.ndarray, read: np.ndarray, waited: np.ndarray, phase_s: float) -> dict[str, Any]:
    """Calls of which every record was there, and those that had to read one, apart."""
    hits, others = took_ms[~read], took_ms[read]
    return {
        "took_ms": summarize(hits) if hits.size else None,
        "longest_ms": _longest(hits),
        "longest_ms_that_waited": _longest(took_ms[~read & waited]),
        "calls_beyond_bar_per_s": int((hits > BAR_MS).sum()) / phase_s,
        "calls_beyond_bar_that_waited_per_s": int((took_ms[~read & waited] > BAR_MS).sum()) / phase_s,
        "calls_that_read": int(others.size),
        "took_ms_of_those": summarize(others) if others.size else None,
    }


def _longest(took_ms: np.ndarray) -> list[float]:
    return [float(ms) for ms in np.sort(took_ms)[::-1][:LONGEST]]


@contextmanager
def looking(calls: Sequence[Call]) -> Iterator[list[Looker]]:
    """Every call over and over in a thread of its own, until the block is left.

    An error in one of them is raised then. What the process has loaded is kept from the garbage collector: a
    full collection holds the GIL for some 90 ms, and would be told as a pause of what is called.
    """
    done, failed = threading.Event(), list[BaseException]()
    lookers = [Looker(call) for call in calls]

    def run(looker: Looker) -> None:
        try:
            looker.run(done)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(looker,), daemon=True) for looker in lookers]
    gc.collect()
    gc.freeze()
    for thread in threads:
        thread.start()
    try:
        yield lookers
    finally:
        gc.unfreeze()
        done.set()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]


def copy_memory(duration_s: float) -> None:
    """Copy memory to and fro without the GIL: the load of a resize without one."""
    source = np.zeros(16 << 20, np.uint8)
    target = np.empty_like(source)
    until = time.perf_counter() + duration_s
    while time.perf_counter() < until:
        np.copyto(target, source)
