"""How long callers wait: latency by percentile for each way to ask, and under load up to saturation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engram_client.errors import FormatError
from tierbench.records import Node, Record
from tierbench.report.bars import latest
from tierbench.report.charts import Chart, Mark, Series, log_axis, nines_axis
from tierbench.report.section import Figure, Section
from tierbench.report.shown import count, time_us

PERCENTILES = (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99), ("p99.9", 0.999), ("p99.99", 0.9999))
LOAD_PERCENTILES = ("p50", "p99", "p99.9")
TOLD = ("p50", "p90", "p99", "p99.9")
WAYS = (  # label, benchmark, place of a summary in microseconds
    ("in process", "lookup", ("records", "token", "ours")),
    ("another process, shared memory", "shm", ("token", "shm")),
    ("another process while the daemon writes", "shm", ("token_beside_evictions",)),
    ("gRPC, unix socket", "serve", ("unix", "token", "taken_us", "ours")),
    ("gRPC, TCP", "serve", ("tcp", "token", "taken_us", "ours")),
)
IN_WORDS = (
    ("in process", "in process"),
    ("another process, shared memory", "from another process of the machine"),
    ("gRPC, TCP", "over TCP"),
)
CURVES_MAX = 6


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


def curves_in(node: Node, label: str = "", depth: int = 0) -> Iterator[tuple[str, Node]]:
    """Every sweep over offered rates in a record, wherever it stands."""
    if depth > 5 or not isinstance(node.value, dict):
        return
    points = node.value.get("points")
    if isinstance(points, list) and points and isinstance(points[0], dict) and "offered_per_s" in points[0]:
        yield label.replace("_", " ").strip(", "), node
        return
    for name, member in node.members():
        yield from curves_in(member, f"{label}, {name}" if label else name, depth + 1)


def _under_load(records: Sequence[Record]) -> list[Figure]:
    record = next((r for r in reversed(records) if r.name == "serve" and any(curves_in(r.node))), None)
    if record is None:
        return []
    curves = list(curves_in(record.node))[:CURVES_MAX]
    figures = [_at_rest(record, curves)]
    for number, (label, node) in enumerate(curves):
        figures.append(_load_curve(record, number, label, node))
    return [figure for figure in figures if figure]


def _kept(node: Node) -> list[Node]:
    return [
        p for p in node.items("points") if p.text("verdict") in (None, "kept") and p.number("offered_per_s")
    ]


def _at_rest(record: Record, curves: Sequence[tuple[str, Node]]) -> Figure | None:
    """Latency by percentile of each way, at the highest rate up to seven tenths of its saturation."""
    series: list[Series] = []
    rows = []
    for label, node in curves:
        kept = _kept(node)
        most = max((p.number("offered_per_s") or 0.0 for p in kept), default=0.0)
        below = [p for p in kept if (p.number("offered_per_s") or 0.0) <= 0.7 * most] or kept[:1]
        summary = below[-1].at("latency_us") if below else None
        points = percentiles(summary) if summary else []
        if summary is None or len(points) < 2:
            continue
        rate = below[-1].number("offered_per_s") or 0.0
        name = f"{label}, {count(rate)} calls/s"
        series.append(Series(name, [q for q, _ in points], [v for _, v in points], len(series), markers=True))
        rows.append([name, *_told(summary)])
    if not series:
        return None
    note = "Open loop: calls are due at a constant rate, latency counts from then. Up to 0.7 of saturation."
    chart = _by_percentile("load-latency", "Latency under load", series)
    return Figure(chart, [record], note, "", ["way and load", *TOLD], rows)


def _load_curve(record: Record, number: int, label: str, node: Node) -> Figure | None:
    kept = _kept(node)
    rates = [p.number("offered_per_s") or 0.0 for p in kept]
    series = []
    for style, name in enumerate(LOAD_PERCENTILES):
        pairs = [
            (r, v) for r, p in zip(rates, kept, strict=True)
            if (s := p.at("latency_us")) is not None and (v := s.number(name)) is not None and v > 0
        ]  # fmt: skip
        if len(pairs) > 1:
            series.append(Series(name, [r for r, _ in pairs], [v for _, v in pairs], style, markers=True))
    if not series:
        return None
    saturation = node.number("saturation_per_s")
    found = node.value.get("saturation_found") is True
    words = "saturation" if found else "highest rate tried"
    chart = Chart(
        f"load-curve-{number}",
        f"Throughput against latency: {label or 'serve'}",
        f"Percentiles of latency over the rate of calls, up to {count(max(rates))} calls a second.",
        log_axis("calls a second, all callers", [*rates, saturation or rates[-1]], count),
        log_axis(
            "latency from when the call was due", [y for s in series for y in s.ys], time_us, whole=True
        ),
        series,
        [Mark(f"{words}: {count(saturation)}/s", x=saturation)] if saturation else [],
    )
    rows = [[count(r), *_told(s)] for r, p in zip(rates, kept, strict=True) if (s := p.at("latency_us"))]
    limit = node.text("limit")
    quoted = f"What ends it: {limit}." if limit else ""
    return Figure(chart, [record], "", quoted, ["calls a second", *TOLD], rows)
