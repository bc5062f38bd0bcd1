"""How long callers wait: latency by percentile for each way to ask, and under load up to saturation."""

from __future__ import annotations

from collections.abc import Sequence

from engram_client.errors import FormatError
from tierbench.records import Node, Record
from tierbench.report.bars import latest
from tierbench.report.charts import Chart, Mark, Series, log_axis, nines_axis
from tierbench.report.section import Figure, Section
from tierbench.report.shown import count, tidy, time_us

PERCENTILES = (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99), ("p99.9", 0.999), ("p99.99", 0.9999))
LOAD_PERCENTILES = ("p50", "p99", "p99.9")
TOLD = ("p50", "p90", "p99", "p99.9")
WAYS = (  # label, benchmark, place of a summary in microseconds
    ("in process", "lookup", ("records", "token", "ours")),
    ("another process, shared memory", "shm", ("token", "shm")),
    ("another process while the daemon writes", "shm", ("token_beside_evictions",)),
    ("gRPC, unix socket", "remote", ("unix", "token", "taken_us", "ours")),
    ("gRPC, TCP", "remote", ("tcp", "token", "taken_us", "ours")),
)
IN_WORDS = (
    ("in process", "in process"),
    ("another process, shared memory", "from another process of the machine"),
    ("gRPC, TCP", "over TCP"),
)
WAYS_MAX = 6


def latency_section(records: Sequence[Record]) -> Section:
    parts: list[Figure] = []
    missing, refused = [], []
    try:
        if token := _one_token(records):
            parts.append(token)
        else:
            missing.append(("Latency of one token", "tierbench shm --record bench/results"))
    except FormatError as error:
        refused.append(str(error))
    finding = _finding(parts)
    try:
        loaded = _under_load(records)
        parts += loaded
        if not loaded:
            missing.append(("Throughput against latency", "tierbench serve --record bench/results"))
    except FormatError as error:
        refused.append(str(error))
    return Section("latency", "How long callers wait", finding, parts, missing, refused)


def _finding(parts: Sequence[Figure]) -> str:
    if not parts or not isinstance(parts[0].chart, Chart):
        return ""
    medians = {s.name: time_us(s.ys[0]) for s in parts[0].chart.series}
    told = [f"{medians[name]} {words}" for name, words in IN_WORDS if name in medians]
    return f"One token’s 48 rows take {', '.join(told)} (medians)." if told else ""


def _one_token(records: Sequence[Record]) -> Figure | None:
    series, used, rows = [], [], []
    for style, (label, benchmark, place) in enumerate(WAYS):
        record = latest(records, benchmark, *place)
        summary = record.node.at(*place) if record else None
        points = percentiles(summary) if summary else []
        if record is None or summary is None or len(points) < 2:
            continue
        series.append(Series(label, [q for q, _ in points], [v for _, v in points], style, markers=True))
        rows.append([label, *_told(summary)])
        used.append(record)
    if not series:
        return None
    note = "Closed loop, one caller. Each decade to the right is a tenth as many calls."
    chart = _by_percentile("token-latency", "One token, 48 rows, all in DRAM", series)
    return Figure(chart, used, note, "", ["way", *TOLD], rows)


def _by_percentile(name: str, title: str, series: Sequence[Series]) -> Chart:
    return Chart(
        name,
        title,
        f"Latency by percentile for {', '.join(s.name for s in series)}; the scale spreads the slowest.",
        nines_axis("share of calls that were at least as fast", [x for s in series for x in s.xs]),
        log_axis("latency of a call", [y for s in series for y in s.ys], time_us, whole=True),
        series,
    )


def _told(summary: Node) -> list[str]:
    return ["" if (v := summary.number(name)) is None else time_us(v) for name in TOLD]


def percentiles(summary: Node) -> list[tuple[float, float]]:
    """(share, value) of a summary, all above 0."""
    return [(q, v) for name, q in PERCENTILES if (v := summary.number(name)) is not None and v > 0]


def _under_load(records: Sequence[Record]) -> list[Figure]:
    record = latest(records, "serve", "ways")
    if record is None:
        return []
    ways = [
        (way, ours, node.at("empty"))
        for way, node in record.node.members("ways")
        if (ours := node.at("ours"))
    ]
    figures = [_load_curve(record, number, *way) for number, way in enumerate(ways[:WAYS_MAX])]
    return [figure for figure in (_at_seven_tenths(record, ways[:WAYS_MAX]), *figures) if figure]


def _kept(curve: Node) -> list[tuple[float, Node]]:
    """Rates that were kept, calls/s, and the latencies at each."""
    found = []
    for point in curve.items("points"):
        rate, latency = point.number("offered_per_s"), point.at("latency_us")
        if rate is not None and rate > 0 and latency is not None and point.text("verdict") == "kept":
            found.append((rate, latency))
    return found


def _at_seven_tenths(record: Record, ways: Sequence[tuple[str, Node, Node | None]]) -> Figure | None:
    """Latency by percentile of each way, at the highest rate up to seven tenths of its saturation."""
    series: list[Series] = []
    rows = []
    for way, ours, _ in ways:
        kept = _kept(ours)
        most = max((rate for rate, _ in kept), default=0.0)
        below = [found for found in kept if found[0] <= 0.7 * most] or kept[:1]
        points = percentiles(below[-1][1]) if below else []
        if len(points) < 2:
            continue
        name = f"{way}, {tidy(count(below[-1][0]))} calls/s"
        series.append(Series(name, [q for q, _ in points], [v for _, v in points], len(series), markers=True))
        rows.append([name, *_told(below[-1][1])])
    if not series:
        return None
    note = "Open loop: calls are due at a constant rate, latency counts from then. Up to 0.7 of saturation."
    chart = _by_percentile("load-latency", "Latency under load", series)
    return Figure(chart, [record], note, "", ["way and load", *TOLD], rows)


def _load_curve(record: Record, number: int, way: str, ours: Node, empty: Node | None) -> Figure | None:
    kept = _kept(ours)
    series = [_series(name, kept, name, style) for style, name in enumerate(LOAD_PERCENTILES)]
    if empty is not None:
        series.append(_series("an empty service, p99", _kept(empty), "p99", len(LOAD_PERCENTILES)))
    drawn = [s for s in series if s]
    if not drawn or not kept:
        return None
    rates = [x for s in drawn for x in s.xs]
    saturation = ours.number("saturation_per_s")
    found = ours.value.get("saturation_found") is True
    words = "saturation" if found else "at least"
    chart = Chart(
        f"load-curve-{number}",
        f"Throughput against latency, {way}",
        f"Percentiles of latency over the rate of calls, up to {count(max(rates))} calls a second.",
        log_axis("calls a second, all callers", rates, count),
        log_axis("latency from when the call was due", [y for s in drawn for y in s.ys], time_us, whole=True),
        drawn,
        [Mark(f"{words} {tidy(count(saturation))}/s", x=saturation)] if saturation else [],
    )
    limit = ours.text("limit")
    quoted = f"What ends it: {limit}." if limit else ""
    rows = [[count(rate), *_told(latency)] for rate, latency in kept]
    return Figure(chart, [record], "", quoted, ["calls a second", *TOLD], rows)


def _series(label: str, kept: Sequence[tuple[float, Node]], percentile: str, style: int) -> Series | None:
    pairs = sorted((r, v) for r, latency in kept if (v := latency.number(percentile)) is not None and v > 0)
    if len(pairs) < 2:
        return None
    return Series(label, [r for r, _ in pairs], [v for _, v in pairs], style, markers=True)
