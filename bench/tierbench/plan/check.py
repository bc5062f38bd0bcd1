"""A plan beside a daemon: the same text at the target's pace, and how far off each prediction was.

The daemon serves a copy of the store that shares its row files by links, with the planned budgets and an
empty cache. Steps before and after the paced ones are looked up as fast as it goes, in the same order, so
that the cache is where the replay has it. Counts are of the whole text. Times are of the paced steps, each
due when the target's pace has it: the last ones that are full, as those at the end of a text are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from engram_client import Client
from engram_client.errors import BadRequest
from tierbench.hitrate.live import settled
from tierbench.hitrate.lookups import lookups_of
from tierbench.hitrate.mix import TokenStream
from tierbench.hitrate.model import Model
from tierbench.hitrate.tiers import Budgets
from tierbench.open_loop.window import run_paced
from tierbench.plan.candidates import Work
from tierbench.plan.measure import Asker, served
from tierbench.plan.timing import PERCENTILES, Steps, Target, Timing

PACED_MIN = 25  # fewer steps say nothing of a 99th percentile, and little of a mean
Step = list[tuple[int, np.ndarray]]  # number of the table, keys int64 [tokens, columns]


@dataclass(frozen=True)
class Pace:
    """Which steps are paced, and when each of them is due, int64 ns from the first."""

    first: int
    end: int
    due_ns: np.ndarray


def pace_of(work: Work, target: Target, check_s: float) -> Pace:
    """As many steps as fit into `check_s`. Raises BadRequest for fewer than mean anything."""
    full = np.flatnonzero(work.step_tokens >= target.step_tokens)
    end = int(full[-1]) + 1 if full.size >= PACED_MIN else work.step_ends.size
    periods_s = target.periods_us(work.step_tokens[:end]) / 1e6
    lasting = np.cumsum(periods_s[::-1])
    steps = int(np.searchsorted(lasting, check_s, "right"))
    if steps < PACED_MIN:
        enough_s = math.ceil(lasting[min(PACED_MIN, lasting.size) - 1])
        remedy = "give more text" if lasting.size < PACED_MIN else f"give --check-s {enough_s}"
        raise BadRequest(
            f"--check: {steps} of {periods_s.size} steps fit into --check-s {check_s:g}, and fewer than "
            f"{PACED_MIN} say nothing; {remedy}"
        )
    chosen = periods_s[-steps:]
    return Pace(end - steps, end, ((np.cumsum(chosen) - chosen) * 1e9).astype(np.int64))


@dataclass(frozen=True)
class Seen:
    """What the daemon counted over the whole text, and how long paced steps took, float64 microseconds."""

    counts: dict[str, int]
    service_us: np.ndarray
    from_due_us: np.ndarray
    lag_us: np.ndarray


def run_check(
    store: Path,
    model: Model,
    work: Work,
    budgets: Budgets,
    pace: Pace,
    transport: str,
    progress: Callable[[int], None],
) -> Seen:
    """Serve `store`, which is a copy of the caller's own, and ask it for everything."""
    with served(store, transport, budgets.dram_bytes, budgets.extent_bytes) as client:
        before, caller, steps = client.stats(), _Caller(client, model, work), _steps(model, work)
        caller.ask_all(islice(steps, pace.first), progress)
        paced = list(islice(steps, pace.end - pace.first))
        window = run_paced(lambda number: caller.ask(paced[number]), pace.due_ns)
        caller.ask_all(steps, progress)
        counts = settled(client, before, work.stream.tokens * model.entries_per_token)
    return Seen(counts, *(ns / 1e3 for ns in (window.service_ns(), window.latency_ns(), window.lag_ns())))


class _Caller:
    """Asks for the tables of a step one after another, as the timing has it."""

    def __init__(self, client: Client, model: Model, work: Work) -> None:
        largest = int(np.diff(work.stream.batch_ends, prepend=0).max())
        self._askers = [Asker(client, model, largest, number) for number in range(len(model.tables))]

    def ask_all(self, steps: Iterable[Step], progress: Callable[[int], None]) -> None:
        for step in steps:
            self.ask(step)
            progress(1)

    def ask(self, step: Step) -> None:
        for table, keys in step:
            self._askers[table].ask(keys)


def _steps(model: Model, work: Work) -> Iterator[Step]:
    """The look-ups of each step."""
    lookups = _single_lookups(model, work.stream)
    for parts in work.step_parts.tolist():
        yield list(islice(lookups, parts * len(model.tables)))


def _single_lookups(model: Model, stream: TokenStream) -> Iterator[tuple[int, np.ndarray]]:
    layers = len(model.tables)
    for lookups in lookups_of(model, stream):
        start = 0
        for number, end in enumerate(lookups.ends.tolist()):
            yield number % layers, np.ascontiguousarray(lookups.keys[start:end].reshape(-1, model.columns))
            start = end


def compared(
    seen: Seen, steps: Steps, model: Model, timing: Timing, target: Target, told: dict[str, Any]
) -> list[dict[str, Any]]:
    """Each figure, predicted and seen: counts of the whole text, times of the paced steps."""
    tokens = int(steps.tokens.sum())
    accesses = tokens * model.entries_per_token
    pages = seen.counts["nvme_pages"] + seen.counts["extent_pages"]
    waited = np.maximum(0.0, seen.service_us - target.ahead_us).sum() / timing.period_us.sum()
    lines = [
        beside("hit rate", 1 - steps.missed.sum() / accesses, seen.counts["dram_hits"] / accesses, "points"),
        beside(
            "records read a token",
            told["records_read_per_access"] * model.entries_per_token,
            seen.counts["records_read"] / tokens,
        ),
        beside("pages read a token", steps.pages.sum() / tokens, pages / tokens),
        beside("share of the time spent waiting", timing.waiting_share, waited, "points"),
    ]
    for name, predicted, found in (
        ("a step's rows", timing.fetch_us, seen.service_us),
        ("from when it was due", timing.from_due_us(), seen.from_due_us),
    ):
        for p in PERCENTILES[:3]:
            lines.append(
                beside(f"{name}, p{p} us", float(np.percentile(predicted, p)), float(np.percentile(found, p)))
            )
    return lines


def beside(name: str, predicted: float, seen: float, unit: str = "") -> dict[str, Any]:
    """`error` in points, or as a share of what was seen; None where nothing was seen to compare with."""
    predicted, seen = float(predicted), float(seen)
    if unit == "points":
        error: float | None = 100 * (predicted - seen)
    else:
        error = (predicted - seen) / seen if seen else (0.0 if not predicted else None)
    return {"what": name, "predicted": predicted, "seen": seen, "error": error, "unit": unit or "share"}
