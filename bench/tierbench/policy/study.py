"""The study: every policy on every trace at every size, as shares of accesses that hit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from tierbench.policy.bounds import belady, pinned
from tierbench.policy.classical import clock, lru, sieve
from tierbench.policy.product import hinted, tierstore
from tierbench.policy.s3fifo import s3_fifo
from tierbench.policy.sets import set_clock, two_queues
from tierbench.policy.traces import RecordTrace
from tierbench.policy.wtinylfu import w_tinylfu

Policy = Callable[[RecordTrace, int, np.ndarray], None]


def _numbered(simulate: Any) -> Policy:
    return lambda trace, capacity, found: simulate(trace.ids, trace.distinct, capacity, found)


def _in_sets(simulate: Any, *choices: int) -> Policy:
    return lambda trace, capacity, found: simulate(
        trace.ids, trace.keys, trace.owners, capacity, found, *choices
    )


CLASSICAL: dict[str, Policy] = {
    "lru": _numbered(lru),
    "clock": _numbered(clock),
    "sieve": _numbered(sieve),
    "s3-fifo": _numbered(s3_fifo),
    "w-tinylfu": _numbered(w_tinylfu),
}
BOUNDS: dict[str, Policy] = {"pinned": _numbered(pinned), "belady": _numbered(belady)}
OURS: dict[str, Policy] = {"tierstore": tierstore}
# What else an arena could do: ways on trial, reads that pass, ghosts, bits of each, reads counted.
# The last three are the stances that duel, each alone.
CANDIDATES: dict[str, Policy] = {
    "set-clock": _in_sets(set_clock),
    "no-ghosts": _in_sets(two_queues, 3, 1, 0, 12, 4),
    "8-ghosts": _in_sets(two_queues, 3, 1, 8, 12, 4),
    "8-bit-ghosts": _in_sets(two_queues, 3, 1, 16, 8, 4),
    "neutral": _in_sets(two_queues, 3, 1, 16, 12, 4),
    "eager": _in_sets(two_queues, 1, 1, 16, 12, 4),
    "patient": _in_sets(two_queues, 4, 2, 16, 12, 4),
}
POLICIES = {**CLASSICAL, **BOUNDS, **OURS, **CANDIDATES}
DEFAULT_POLICIES = (*CLASSICAL, *BOUNDS, *OURS, "set-clock")


def sizes_for(trace: RecordTrace, shares: Iterable[float], sizes: Iterable[int]) -> list[int]:
    """Capacities in records: shares of the distinct ones, and absolute sizes that fill up."""
    wanted = {int(trace.distinct * share) for share in shares} | set(sizes)
    return sorted(size for size in wanted if 16 <= size <= trace.distinct // 2)


def judge(trace: RecordTrace, capacity: int, policies: Iterable[str]) -> dict[str, Any]:
    """Hit rates of the whole trace and of its second half; a pinned profile has the second alone."""
    whole: dict[str, float] = {}
    second: dict[str, float] = {}
    for name in policies:
        hits = np.zeros(trace.ids.size, np.uint8)
        POLICIES[name](trace, capacity, hits)
        whole[name] = float(hits.mean())
        second[name] = float(hits[trace.ids.size // 2 :].mean())
    rivals = {name: whole[name] for name in policies if name in CLASSICAL}
    found: dict[str, Any] = {"capacity_records": capacity, "whole": whole, "second_half": second}
    if rivals and "tierstore" in whole:
        best = max(rivals, key=lambda name: rivals[name])
        found |= {"best_classical": best, "ahead_points": 100 * (whole["tierstore"] - rivals[best])}
    return found


def judge_hints(trace: RecordTrace, capacity: int, window_accesses: int) -> dict[str, Any]:
    found, read = hinted(trace, capacity, window_accesses)
    return {
        "capacity_records": capacity,
        "window_accesses": window_accesses,
        "found": found,
        "disk_records_per_access": read,
    }


def trace_facts(trace: RecordTrace) -> dict[str, Any]:
    return {"name": trace.name, "accesses": int(trace.ids.size), "distinct": int(trace.distinct)}


def synthetic_traces(make: Any, length: int, population: int, seed: int) -> list[Callable[[], RecordTrace]]:
    """Zipf with and without drift, by `traces.zipf_trace`, each made when it is called."""
    found: list[Callable[[], RecordTrace]] = []
    for exponent in (0.8, 1.0, 1.2):
        for phases, suffix in ((1, ""), (8, "-drift")):
            name = f"zipf-{exponent}{suffix}"
            found.append(partial(make, name, exponent, length, population, seed=seed, phases=phases))
    return found
