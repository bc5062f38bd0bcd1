"""How long a step waits for its rows: counts from the replay, prices from the machine, nothing else.

A step asks each layer's table, one after another, and needs the rows before it goes on:

    calls         look-ups x what one costs that finds everything
    copying       every record x what one takes to copy
    first reads   look-ups that must read x what the first read costs, drawn from what was measured
    reads         pages x 1 / (pages a second, sustained)
    device        copies of rows to a GPU, where there is one

What is left of their sum after the time that rows are asked for ahead is waiting. It is all added up, as if
nothing overlapped; a caller who asks for all layers at once (`StepPrefetcher`) waits less.

Only full steps are judged, as a server at its target has all its sessions: at the end of a text one document
after the other runs out, and thousands of steps of a single session would hide what the full ones wait. They
are replayed like all others, and hit rates count them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tierbench.plan.figures import Figures

TERMS = ("calls", "copying", "first reads", "reads", "device")
PERCENTILES = (50, 90, 99, 99.9)


@dataclass(frozen=True)
class Target:
    """`waiting_share` of the time may go by waiting for rows, and `disk_share` of the disk may be used.

    A full step has `step_tokens` tokens.
    """

    tokens_per_s: float
    step_tokens: int
    waiting_share: float
    ahead_us: float = 0.0
    disk_share: float = 0.7
    disks: int = 1

    def periods_us(self, tokens: np.ndarray) -> np.ndarray:
        """How long steps of so many tokens last, float64 microseconds."""
        return np.maximum(tokens, self.step_tokens) / self.tokens_per_s * 1e6


@dataclass(frozen=True)
class Steps:
    """What steps ask for, all int64 [steps]: tokens, look-ups, records that memory lacked, pages read,
    records that HBM held."""

    tokens: np.ndarray
    lookups: np.ndarray
    missed: np.ndarray
    pages: np.ndarray
    held: np.ndarray

    def full(self, step_tokens: int) -> Steps:
        """Those of so many tokens or more."""
        chosen = self.tokens >= step_tokens
        return Steps(*(part[chosen] for part in vars(self).values()))

    def between(self, first: int, end: int) -> Steps:
        """Some consecutive ones."""
        return Steps(*(part[first:end] for part in vars(self).values()))


@dataclass(frozen=True)
class Shape:
    """Of a model: records of each token in all tables, and bytes of each."""

    records_per_token: int
    record_bytes: int


class Timing:
    """Steps on a machine at a pace. Times float64 [steps], microseconds."""

    def __init__(self, steps: Steps, shape: Shape, figures: Figures, target: Target, seed: int = 0) -> None:
        priced = figures.for_records_of(shape.record_bytes)
        self.period_us = target.periods_us(steps.tokens)
        self.reads_per_s = priced.reads_per_s * target.disks
        self._pages, self._target = steps.pages, target
        from_service = steps.tokens * shape.records_per_token - steps.held
        reading = np.minimum(steps.lookups, steps.missed)
        self.terms = {
            "calls": steps.lookups * priced.call_us,
            "copying": from_service * priced.record_us + steps.held * (priced.hbm_record_us or 0.0),
            "first reads": priced.draw_first_reads(reading, np.random.default_rng(seed)),
            "reads": steps.pages / self.reads_per_s * 1e6,
            "device": _to_device(steps.lookups, from_service, shape, priced),
        }
        self.fetch_us = np.sum(list(self.terms.values()), axis=0)
        self.waiting_us = np.maximum(0.0, self.fetch_us - target.ahead_us)

    @property
    def waiting_share(self) -> float:
        return float(self.waiting_us.sum() / self.period_us.sum())

    @property
    def disk_share(self) -> float:
        return float(self._pages.sum() / self.reads_per_s / self.period_us.sum() * 1e6)

    @property
    def meets(self) -> bool:
        return self.waiting_share <= self._target.waiting_share and self.disk_share <= self._target.disk_share

    def from_due_us(self) -> np.ndarray:
        """From when each step was due, if none begins before the last has its rows."""
        due = np.cumsum(self.period_us) - self.period_us
        ended, found = 0.0, np.empty(due.size)
        for i, (at, takes) in enumerate(zip(due.tolist(), self.fetch_us.tolist(), strict=True)):
            ended = max(at, ended) + takes
            found[i] = ended - at
        return found

    def shares_by_term(self) -> dict[str, float]:
        """Of the time, by term; together more than is waited where rows are asked for ahead."""
        return {name: float(self.terms[name].sum() / self.period_us.sum()) for name in TERMS}

    def told(self) -> dict[str, Any]:
        return {
            "waiting_share": self.waiting_share,
            "fetch_share_by_term": self.shares_by_term(),
            "disk_share": self.disk_share,
            "fetch_us": spread(self.fetch_us),
            "meets": self.meets,
        }


def _to_device(lookups: np.ndarray, records: np.ndarray, shape: Shape, figures: Figures) -> np.ndarray:
    if figures.to_device_us is None:
        return np.zeros(records.size)
    bytes_us = records * shape.record_bytes / (figures.to_device_bytes_per_s or np.inf) * 1e6
    return lookups * figures.to_device_us + bytes_us


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean and percentiles."""
    found = zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
    return {"mean": float(values.mean()), **{f"p{p:g}": float(value) for p, value in found}}


def in_the_way(timing: Timing, target: Target, compulsory_share: float) -> list[str]:
    """Which terms keep this budget from meeting the target, in words; [] where it is met."""
    said = []
    if timing.disk_share > target.disk_share:
        disks = timing.disk_share / target.disk_share * target.disks
        said.append(
            f"the disk: busy {timing.disk_share:.0%} of the time, and {target.disk_share:.0%} are allowed; "
            f"{disks:.1f} such disks would do"
        )
    if timing.waiting_share > target.waiting_share:
        shares = timing.shares_by_term()
        largest = sorted(TERMS, key=lambda name: -shares[name])
        shown = ", ".join(f"{name} {shares[name]:.2%}" for name in largest if shares[name] >= 5e-5)
        behind = ": it does not keep up" if timing.waiting_share >= 1 else ""
        said.append(
            f"waiting: {timing.waiting_share:.2%} of the time{behind}; {target.waiting_share:.2%} are "
            f"allowed. Fetching is {shown}"
        )
        if largest[0] in ("reads", "first reads"):
            said.append(
                f"{compulsory_share:.1%} of accesses are the first to their record, which no budget holds: "
                "asking ahead (--ahead-us) or a faster disk helps with those, memory does not"
            )
    return said
