"""What a record measures, each figure with its spread, found by its shape and named by its place.

A comparison (`ours`, `yardstick`, `ratio_median`) is one figure, its ratio: what the machine does to both is
not in it. What ours and the yardstick did by themselves is told beside it and not judged. A summary of a few
windows spreads from its least to its greatest. A summary of many samples says nothing of how its percentiles
would come out in another run, a single number neither: their spread is assumed, wider for rarer samples
(`ASSUMED`), and told as assumed. A rate with a standard error spreads by three of them.

Whole numbers without a unit, texts and truths are facts, not figures: sizes, counts, names. They have no
spread, and where they differ the records may not have measured the same thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tierbench.records import Record

RUNS_MAX = 100  # a summary of more samples is one of calls, not of windows
ASSUMED = {"p50": 0.20, "p90": 0.25, "p95": 0.3, "p99": 0.40, "p99.9": 0.80}
ASSUMED_NUMBER, ASSUMED_SHARE = 0.20, 0.02
ERRORS = 3.0  # standard errors
MIDDLE = (10.0, 90.0)  # percentiles of samples that the spread is between
UNITS_LESS = ("_us", "_ms", "_ns", "_s", "_seconds", "_cores")
NAMES_LESS = (
    "cores",
    "bytes_per_row",
    "reads_per",
    "pages_per",
    "us_per",
    "missed",
    "overhead",
    "miss",
    "error",
    "longest",
    "beyond",
)
NAMES_MORE = ("hit_rate", "achieved", "saturation", "saved")
SELDOM = ("miss", "beyond")  # rates of what should not be
TIMES = ("_over_", "_to_", "over_resident", "busy")  # comparisons of times, in which less is better
IDENTITY = ("name", "kind", "table_rows", "hidden", "batch", "length", "threads", "hbm_bytes",
            "dram_bytes", "extent_bytes", "offered_per_s", "trace", "policy", "arrangement")  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """`better` is "more", "less" or "", not known; `judged` is False for what has a yardstick."""

    place: str
    value: float
    low: float
    high: float
    source: str  # of the spread: "runs", "error" or "assumed"
    better: str
    judged: bool = True


def figures_of(record: Record) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Figures and facts by their place."""
    figures: dict[str, Figure] = {}
    facts: dict[str, Any] = {}
    for found in _walk(record.results, ""):
        if isinstance(found, Figure):
            figures[found.place] = found
        else:
            facts[found[0]] = found[1]
    return figures, facts


Found = Figure | tuple[str, Any]


def _walk(value: Any, place: str) -> Iterator[Found]:
    if isinstance(value, dict):
        yield from _of_object(value, place)
    elif isinstance(value, list):
        yield from _of_list(value, place)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        if value is not None:
            yield place, value
    elif isinstance(value, int) and not _has_unit(place):
        yield place, value
    else:
        yield _number(place, float(value), ASSUMED_SHARE if _is_share(place, value) else ASSUMED_NUMBER)


def _of_object(value: Mapping[str, Any], place: str) -> Iterator[Found]:
    rest = dict(value)
    if _numeric(value, "ratio_median", "ratio_min", "ratio_max"):
        yield from _comparison(value, place)
        for name in ("ours", "yardstick", "ratio_median", "ratio_min", "ratio_max"):
            rest.pop(name, None)
    elif _numeric(value, "count", "p50", "min", "max"):
        yield from _summary(value, place)
        for name in [n for n in rest if n in ("count", "mean", "min", "max") or n.startswith("p")]:
            rest.pop(name)
    elif _numeric(value, "hit_rate", "error"):
        rate, error = float(value["hit_rate"]), ERRORS * float(value["error"])
        yield Figure(f"{place}.hit_rate", rate, rate - error, rate + error, "error", "more")
        rest.pop("hit_rate")
        rest.pop("error")
    for name, member in rest.items():
        yield from _walk(member, f"{place}.{name}" if place else name)


def _numeric(value: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(value.get(n), int | float) and not isinstance(value[n], bool) for n in names)


def _comparison(value: Mapping[str, Any], place: str) -> Iterator[Figure]:
    ours, yardstick = _samples(value.get("ours")), _samples(value.get("yardstick"))
    times = any(mark in f".{place}" for mark in TIMES)
    better = "less" if times else "more"
    if len(ours) == len(yardstick) >= 3 and min(yardstick) > 0:
        low, high = np.percentile(np.asarray(ours) / np.asarray(yardstick), MIDDLE)
    else:
        low, high = value["ratio_min"], value["ratio_max"]
    yield Figure(f"{place}.ratio", float(value["ratio_median"]), float(low), float(high), "runs", better)
    for name, samples in (("ours", ours), ("yardstick", yardstick)):
        if samples:
            yield _of_samples(f"{place}.{name}", samples, better, judged=False)


def _samples(value: Any) -> list[float]:
    """Numbers, or nothing where it is no list of numbers."""
    if isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
        return [float(v) for v in value]
    return []


def _of_samples(place: str, samples: list[float], better: str, *, judged: bool = True) -> Figure:
    low, high = np.percentile(samples, MIDDLE)
    return Figure(place, float(np.median(samples)), float(low), float(high), "runs", better, judged)


def _summary(value: Mapping[str, Any], place: str) -> Iterator[Figure]:
    better = direction(place)
    if value["count"] <= RUNS_MAX:
        yield Figure(place, float(value["p50"]), float(value["min"]), float(value["max"]), "runs", better)
        return
    for name, share in ASSUMED.items():
        if _numeric(value, name):
            yield _number(f"{place}.{name}", float(value[name]), share, better or "less")


def _of_list(value: list[Any], place: str) -> Iterator[Found]:
    samples = _samples(value)
    if len(samples) >= 3 and not place.endswith(("_until", "by_tenth", "by_part", "hit_rate")):
        yield _of_samples(place, samples, direction(place))
    elif samples or not all(isinstance(item, dict) for item in value):
        yield place, value
    else:
        for number, item in enumerate(value):
            names = [f"{n}={item[n]}" for n in IDENTITY if isinstance(item.get(n), int | float | str)]
            yield from _walk(item, f"{place}[{', '.join(names) or number}]")


def _number(place: str, value: float, share: float, better: str | None = None) -> Figure:
    """Half of the assumed spread lies with either of the two that are compared."""
    half = (1 + share) ** 0.5
    low, high = sorted((value / half, value * half))
    return Figure(place, value, low, high, "assumed", direction(place) if better is None else better)


def _has_unit(place: str) -> bool:
    return _last(place).endswith((*UNITS_LESS, "_per_s", "_memory_bytes"))


def _is_share(place: str, value: float) -> bool:
    return 0 <= value <= 1 and any(word in _last(place) for word in ("rate", "share", "fill"))


def _last(place: str) -> str:
    return place.rpartition(".")[2]


def direction(place: str) -> str:
    """Whether more or less is better, by the names on the way to a figure, the last first."""
    for name in reversed(place.split(".")):
        bare = name.partition("[")[0]
        if not any(word in bare for word in SELDOM) and (
            bare.endswith("_per_s") or any(word in bare for word in NAMES_MORE)
        ):
            return "more"
        if bare.endswith(UNITS_LESS) or any(word in bare for word in NAMES_LESS):
            return "less"
    return ""
