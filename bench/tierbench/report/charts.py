"""What is drawn, apart from how: charts as data, which `svg` draws for the page and `png` with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tierbench.report.shown import NBSP

STYLES = 6  # ways that a series can look: colour, dash and marker together


@dataclass(frozen=True)
class Axis:
    """`kind` is "linear", "log" or "nines": the last spreads 99, 99.9 and 99.99 per cent evenly."""

    label: str
    kind: str
    show: Callable[[float], str]
    ticks: Sequence[float]
    low: float
    high: float

    def place(self, value: float) -> float:
        """Where a value lies, 0 to 1, held inside."""
        low, high, at = (self._straight(v) for v in (self.low, self.high, value))
        return min(1.0, max(0.0, (at - low) / (high - low)))

    def _straight(self, value: float) -> float:
        if self.kind == "log":
            return math.log(max(value, 1e-300))
        if self.kind == "nines":
            return -math.log10(max(1 - value, 1e-9))
        return value


@dataclass(frozen=True)
class Series:
    """`style` chooses among STYLES; 0 is the product's."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: int
    markers: bool = False


@dataclass(frozen=True)
class Mark:
    """A line across the chart at x, or at y, with words to it."""

    words: str
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class Chart:
    """`name` is short and unique; `description` says what there is to see for those who do not see it."""

    name: str
    title: str
    description: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    marks: Sequence[Mark] = field(default=())


@dataclass(frozen=True)
class Ratio:
    """Ours over a yardstick's of the same run, its spread, and what the bar asks for."""

    label: str
    against: str
    median: float
    low: float
    high: float
    bar: float | None
    larger_is_better: bool
    source: str

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.median >= self.bar if self.larger_is_better else self.median <= self.bar


@dataclass(frozen=True)
class RatioChart:
    name: str
    title: str
    description: str
    rows: Sequence[Ratio]


def linear_axis(
    label: str,
    values: Sequence[float],
    show: Callable[[float], str],
    *,
    low: float | None = None,
    tight: bool = False,
) -> Axis:
    """Four to six round ticks around the values; `tight` ends with the last value and not with a tick."""
    least, most = (min(values) if low is None else low), max(values)
    span = most - least or abs(most) or 1.0
    step = next(
        s * 10.0**e
        for e in [math.floor(math.log10(span / 5))]
        for s in (1, 2, 2.5, 5, 10, 20)
        if span / (s * 10.0**e) <= 5
    )
    first = math.floor(least / step + 1e-9)
    last = max(first + 1, math.ceil(most / step - 1e-9))
    ticks = [step * i for i in range(first, last + 1)]
    inside = [t for t in ticks if t <= most]
    if tight and len(inside) > 1:
        return Axis(label, "linear", show, inside, inside[0], most)
    return Axis(label, "linear", show, ticks, ticks[0], ticks[-1])


def log_axis(
    label: str,
    values: Sequence[float],
    show: Callable[[float], str],
    *,
    base: float = 10.0,
    ticks_max: int = 6,
    whole: bool = False,
) -> Axis:
    """Powers of `base`, every other one where they are many, the values themselves where they are too few.

    The ends are the values', a bit wider; with `whole` the powers around them.
    """
    positive = [v for v in values if v > 0] or [1.0]
    low, high = min(positive), max(positive)
    if low == high:
        low, high = low / base, high * base
    margin = (high / low) ** 0.02
    low, high = low / margin, high * margin
    if whole:
        low = base ** math.floor(math.log(low, base))
    first, last = math.ceil(math.log(low, base) - 1e-9), math.floor(math.log(high, base) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / ticks_max))
    ticks = [base**e for e in range(first, last + 1, stride)]
    if len(ticks) < 3:
        told = sorted(set(positive))
        ticks = told if 2 <= len(told) <= ticks_max else [low, math.sqrt(low * high), high]
    return Axis(label, "log", show, ticks, low, high)


def nines_axis(label: str, values: Sequence[float]) -> Axis:
    shown = [0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999]
    low, high = min(0.4, *values), max(0.9, *values)
    ticks = [t for t in shown if t <= high]
    return Axis(label, "nines", lambda q: f"{100 * q:.10g}{NBSP}%", ticks, low, high)


def thinned(count: int, most: int = 7) -> list[int]:
    """Which of `count` points carry a marker: all, or some at even distances with both ends."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
