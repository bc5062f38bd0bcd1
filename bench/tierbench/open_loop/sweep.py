"""Which rates are tried, and what became of each: throughput against latency, up to saturation.

Rates rise by a constant factor until one is not kept; then the gap between the last that was kept and the
first that was not is halved a few times. A rate is kept when all but 1 % of the calls that were due in the
window had ended with it (each caller may have one on its way). The highest rate that was kept is what is
called saturation.

A rate that was not kept is blamed on the service only if callers spent their time in calls. Where they spent
it between calls, the generator was too slow: such a rate was never offered, and nothing is claimed about it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

UNDONE_SHARE_MAX = 0.01
OWN_SHARE_MAX = 0.3  # of a caller's time outside of calls, when it is behind
LAG_SHARE = 0.5  # of the latency's p99: what is told as the generator's doing
BUSY = 0.9  # of the processors: what is told as all of them
KEPT, SATURATED, NOT_GENERATED = "kept", "saturated", "not generated"


def verdict(due: int, done: int, callers: int, in_call_share: float) -> str:
    """What became of a rate."""
    if due - done <= max(callers, UNDONE_SHARE_MAX * due):
        return KEPT
    return SATURATED if in_call_share >= 1 - OWN_SHARE_MAX else NOT_GENERATED


def limit(point: dict[str, Any]) -> str:
    """What stood in the way: the generator, the processors, or one call at a time for each caller."""
    if point["verdict"] == NOT_GENERATED:
        return "the clients could not generate it; give more --clients or more processors"
    if point["processors_busy_share"] >= BUSY:
        return "all processors were busy"
    return "each client has one call on its way; more --clients may reach more"


@dataclass
class Sweep:
    """The rates of one curve. Ask for `rate`, try it, `note` what came of it, until there is none."""

    first_per_s: float
    factor: float
    halvings: int
    points_max: int
    points: list[dict[str, Any]] = field(default_factory=list)
    _kept: float = 0.0
    _lost: float = math.inf
    _halved: int = 0

    @property
    def rate(self) -> float | None:
        """The next rate to try, calls/s."""
        if len(self.points) >= self.points_max:
            return None
        if math.isinf(self._lost):
            return self.first_per_s if not self._kept else self._kept * self.factor
        if self._halved >= self.halvings:
            return None
        return math.sqrt(self._kept * self._lost) if self._kept else self._lost / self.factor

    def note(self, point: dict[str, Any]) -> None:
        """`point` has "offered_per_s" and "verdict"."""
        self._halved += not math.isinf(self._lost)
        if point["verdict"] == KEPT:
            self._kept = max(self._kept, point["offered_per_s"])
        else:
            self._lost = min(self._lost, point["offered_per_s"])
        self.points.append(point)

    def told(self) -> dict[str, Any]:
        """The curve by rising rates; `saturation_per_s` is 0 where no rate was kept."""
        points = sorted(self.points, key=lambda point: point["offered_per_s"])
        lost = [point for point in points if point["verdict"] != KEPT]
        return {
            "saturation_per_s": self._kept,
            "saturation_found": bool(lost) and lost[0]["verdict"] == SATURATED,
            "limit": limit(lost[0]) if lost else "every rate that was tried was kept",
            "points": points,
        }
