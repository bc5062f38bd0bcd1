"""Whether two records differ by more than their spread, and in what else they differ that could be why.

A figure has changed when the spreads of both records do not meet. That is strict on purpose: a record has
dozens of figures, and a verdict that cries on every tenth of them is soon read by nobody.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from engram_client.errors import BadRequest
from tierbench.comparison.figures import Figure, figures_of
from tierbench.records import Record

BETTER, WORSE, CHANGED, WITHIN, BESIDE = "better", "worse", "changed", "within spread", "not judged"
MACHINE = (
    "cpu",
    "cores_usable",
    "cores_quota",
    "memory_bytes",
    "memory_limit_bytes",
    "kernel",
    "python",
    "gpus",
)


@dataclass(frozen=True)
class Change:
    """One figure in both records. `ratio` is the second over the first, `low` and `high` its spread."""

    place: str
    first: float
    second: float
    ratio: float | None
    low: float | None
    high: float | None
    spread: str
    verdict: str

    @property
    def size_percent(self) -> float:
        """How far the ratio is from 1, alike for 2 and for 1/2."""
        if self.ratio is None or self.ratio <= 0:
            return math.inf if self.first != self.second else 0.0
        return 100 * (max(self.ratio, 1 / self.ratio) - 1)


@dataclass(frozen=True)
class Comparison:
    first: Record
    second: Record
    changes: list[Change]
    warnings: list[str]  # what else differs
    only: dict[str, list[str]]  # figures that one of them has: "first", "second"

    def count(self, verdict: str) -> int:
        return sum(change.verdict == verdict for change in self.changes)


def compare_records(first: Record, second: Record) -> Comparison:
    """Raises BadRequest for records of different benchmarks."""
    if first.name != second.name:
        raise BadRequest(
            f"{first.path} is a record of {first.name!r}, {second.path} of {second.name!r}; "
            "only records of one benchmark can be compared"
        )
    (ours, facts), (theirs, other_facts) = figures_of(first), figures_of(second)
    common = [place for place in ours if place in theirs]
    only = {
        "first": [place for place in ours if place not in theirs],
        "second": [place for place in theirs if place not in ours],
    }
    changes = [_change(ours[place], theirs[place]) for place in common]
    warnings = _warnings(first, second)
    differing = [p for p in facts if p in other_facts and facts[p] != other_facts[p]]
    warnings += [f"{p}: {_told(facts[p])} and {_told(other_facts[p])}" for p in differing]
    return Comparison(first, second, changes, warnings, only)


def _change(first: Figure, second: Figure) -> Change:
    positive = min(first.value, second.value, first.low, second.low) > 0
    ratio = second.value / first.value if positive else None
    low, high = (second.low / first.high, second.high / first.low) if positive else (None, None)
    source = first.source if first.source == second.source else "assumed"
    return Change(first.place, first.value, second.value, ratio, low, high, source, _verdict(first, second))


def _verdict(first: Figure, second: Figure) -> str:
    if not first.judged:
        return BESIDE
    rose, fell = second.low > first.high, second.high < first.low
    if not rose and not fell:
        return WITHIN
    if not first.better:
        return CHANGED
    return BETTER if rose == (first.better == "more") else WORSE


def _warnings(first: Record, second: Record) -> list[str]:
    found = []
    for name in MACHINE:
        ours, theirs = getattr(first.machine, name), getattr(second.machine, name)
        if ours != theirs:
            found.append(f"machine.{name}: {_told(ours)} and {_told(theirs)}")
    for part in sorted({*first.machine.disk, *second.machine.disk}):
        ours, theirs = first.machine.disk.get(part), second.machine.disk.get(part)
        if (ours or None) != (theirs or None):
            found.append(f"machine.disk.{part}: {_told(ours)} and {_told(theirs)}")
    if first.commit != second.commit:
        found.append(f"commit: {(first.commit or 'none')[:10]} and {(second.commit or 'none')[:10]}")
    for record in (first, second):
        if record.dirty:
            found.append(f"{record.file} was made from a source with changes that were not committed")
    if first.seed != second.seed:
        found.append(f"seed: {first.seed} and {second.seed}")
    for label, ours, theirs in (("parameters", first.parameters, second.parameters),
                                ("packages", first.packages, second.packages)):  # fmt: skip
        for name in sorted({*ours, *theirs}):
            if ours.get(name) != theirs.get(name):
                found.append(f"{label}.{name}: {_told(ours.get(name))} and {_told(theirs.get(name))}")
    return found


def _told(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
