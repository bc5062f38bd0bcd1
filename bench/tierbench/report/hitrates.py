"""What a budget buys: miss ratios over budgets, hit rates at those asked for, and how a cache warms up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engram_client.errors import FormatError
from tierbench.records import Node, Record
from tierbench.report.bars import latest
from tierbench.report.charts import Chart, Mark, Series, linear_axis, log_axis
from tierbench.report.section import Figure, Section
from tierbench.report.shown import count, percent, size, three_digits, whole_percent

POLICIES = (("tierstore", "tierstore", 0), ("lru", "LRU", 1), ("sieve", "SIEVE", 2),
            ("clairvoyant", "clairvoyant bound", 3))  # fmt: skip
BUDGETS_MAX = 200  # of one record
CURVE_COMMAND = "tierbench hitrate TEXT --model deepseek-v4.1 --dram 10% --curve --record bench/results"
COMMAND = "tierbench hitrate TEXT --model deepseek-v4.1 --dram 10% --record bench/results"


@dataclass(frozen=True)
class Budget:
    """One budget of a hit-rate record."""

    dram_bytes: float
    share: float
    hit_rate: float
    node: Node
    hbm_bytes: float = 0.0
    extent_bytes: float = 0.0

    @property
    def key(self) -> tuple[float, float, float]:
        return self.dram_bytes, self.hbm_bytes, self.extent_bytes

    @property
    def name(self) -> str:
        """What it is: DRAM unless something else stands with it."""
        others = ((self.hbm_bytes, "HBM"), (self.extent_bytes, "extent"))
        more = [f"{size(held)} {tier}" for held, tier in others if held]
        return " + ".join([size(self.dram_bytes) + (" DRAM" if more else ""), *more])

    @property
    def label(self) -> str:
        return f"{self.name}, {percent(self.share)} of the tables"


def budgets_of(record: Record) -> list[Budget]:
    found = []
    for node in record.node.items("budgets")[:BUDGETS_MAX]:
        size_bytes, share, rate = (node.number(n) for n in ("dram_bytes", "share_of_tables", "hit_rate"))
        if size_bytes is not None and share is not None and rate is not None:
            others = (node.number(name) or 0.0 for name in ("hbm_bytes", "extent_bytes"))
            found.append(Budget(size_bytes, share, rate, node, *others))
    return sorted(found, key=lambda budget: budget.key)


def kin(records: Sequence[Record]) -> list[tuple[Record, Budget]]:
    """Budgets of the latest hit-rate record, and others of earlier ones on the same trace and traffic."""
    found: dict[tuple[float, float, float], tuple[Record, Budget]] = {}
    of: tuple[Any, ...] | None = None
    for record in reversed(records):
        if record.name != "hitrate" or not (budgets := budgets_of(record)):
            continue
        parameters = [
            str(record.parameters.get(n))
            for n in ("order", "sessions", "prefill_chunk", "step", "prompt_share")
        ]
        numbers = [
            record.node.number("trace", n) for n in ("documents", "tokens", "tokens_looked_up", "batches")
        ]
        this = (record.node.text("model", "name"), record.node.number("model", "rows"), *numbers, *parameters)
        of = of or this
        if this == of:
            found |= {b.key: (record, b) for b in budgets if b.key not in found}
    return sorted(found.values(), key=lambda pair: pair[1].key)


def nearest_tenth(records: Sequence[Record]) -> tuple[Record, Budget] | None:
    """The budget nearest to a tenth of the tables, and of those as near the latest."""
    found = [
        (abs(b.share - 0.1), record, b)
        for record in records
        if record.name == "hitrate"
        for b in budgets_of(record)
    ]
    if not found:
        return None
    least = min(distance for distance, _, _ in found)
    near = [
        (record.date_utc, -distance, record, b) for distance, record, b in found if distance <= least + 0.005
    ]
    _, _, record, budget = max(near, key=lambda one: one[:2])
    return record, budget


def hit_rate_section(records: Sequence[Record]) -> Section:
    parts: list[Figure] = []
    missing, refused = [], []
    for make, what, command in (
        (_curve, "Miss ratios over all budgets", CURVE_COMMAND),
        (_warm_up, "Hit rate over time", COMMAND),
        (_by_order, "Hit rates at a budget", COMMAND),
    ):
        try:
            figure = make(records)
        except FormatError as error:
            refused.append(str(error))
            continue
        if figure is None:
            missing.append((what, command))
        else:
            parts.append(figure)
    return Section("hit-rates", "What a DRAM budget buys", _finding(records), parts, missing, refused)


def _finding(records: Sequence[Record]) -> str:
    try:
        found = nearest_tenth(records)
        if found is None:
            return ""
        _, budget = found
        share = whole_percent(round(budget.share, 3))
        memory = f"{size(budget.dram_bytes)} of DRAM"
        memory += f" and {size(budget.hbm_bytes)} of HBM" if budget.hbm_bytes else ""
        words = f"{memory}, {share} of the tables, answers {percent(budget.hit_rate)} of look-ups"
        bound = budget.node.number("beside", "clairvoyant", "hit_rate")
        if bound is not None and bound > 0:
            words += f"; a cache that knew the future would answer {percent(bound)}"
        return words + "."
    except FormatError:
        return ""


def _curve(records: Sequence[Record]) -> Figure | None:
    record = latest(records, "hitrate", "curve", "points")
    if record is None:
        return _sparse_curve(records)
    points = record.node.items("curve", "points")
    series, rows = [], []
    for key, name, style in POLICIES:
        pairs = [
            (b, 1 - r)
            for p in points
            if (b := p.number("dram_bytes")) is not None and (r := p.number(key, "hit_rate")) is not None
        ]
        if len(pairs) > 1:
            pairs.sort()
            series.append(Series(name, [b for b, _ in pairs], [r for _, r in pairs], style))
    if not series:
        return None
    for p in points:
        told = [p.number(key, "hit_rate") for key, _, _ in POLICIES]
        rows.append([size(p.number("dram_bytes") or 0), percent(p.number("share_of_tables") or 0),
                     *("" if r is None else percent(1 - r) for r in told)])  # fmt: skip
    return _miss_chart([record], series, rows, [b.dram_bytes for b in budgets_of(record)])


def _sparse_curve(records: Sequence[Record]) -> Figure | None:
    """Without a curve: the budgets that were asked for, joined, where there are two or more."""
    pairs = [(record, b) for record, b in kin(records) if b.dram_bytes > 0 and b.key[1:] == (0.0, 0.0)]
    if len(pairs) < 2:
        return None
    budgets = [budget for _, budget in pairs]
    series, rows = [], [[size(b.dram_bytes), percent(b.share)] for b in budgets]
    for key, name, style in POLICIES:
        rates = [
            b.hit_rate if key == "tierstore" else b.node.number("beside", key, "hit_rate") for b in budgets
        ]
        told = [r for r in rates if r is not None]
        for row, rate in zip(rows, rates, strict=True):
            row.append("" if rate is None else percent(1 - rate))
        if len(told) == len(budgets):
            series.append(Series(name, [b.dram_bytes for b in budgets], [1 - r for r in told], style, True))
    return _miss_chart([record for record, _ in pairs], series, rows, [], few=True)


def _miss_chart(
    used: list[Record], series: list[Series], rows: list[list[str]], marked: list[float], few: bool = False
) -> Figure:
    bytes_ = [x for s in series for x in s.xs]
    inside = [b for b in marked if min(bytes_) <= b <= max(bytes_)]
    budget = min(inside, key=lambda b: abs(b - inside[len(inside) // 2])) if inside else None
    chart = Chart(
        "miss-ratio-curve",
        "Miss ratio by DRAM budget",
        f"Share of look-ups that DRAM cannot answer, for {', '.join(s.name for s in series)}, "
        f"over DRAM budgets from {size(min(bytes_))} to {size(max(bytes_))}. Less is better.",
        log_axis("DRAM budget", bytes_, size, base=4.0, ticks_max=5),
        linear_axis("look-ups that miss DRAM", [y for s in series for y in s.ys], whole_percent, low=0.0),
        series,
        [Mark(f"budget: {size(budget)}", x=budget)] if budget else [],
    )
    note = "Lower is better."
    rate = used[0].node.number("curve", "sampling_rate")
    if rate is not None:
        note += f" Drawn from {three_digits(100 * rate)} % of the records, chosen by hash (SHARDS)."
    if few:
        note = "Only the budgets that were asked for; `--curve` draws all between them. " + note
    columns = ["budget", "of the tables", *(name for _, name, _ in POLICIES)]
    return Figure(chart, used, note, "", columns, rows)


def _by_order(records: Sequence[Record]) -> Figure | None:
    pairs = kin(records)
    orders = [name for name, _ in pairs[-1][1].node.members("hit_rate_by_order")] if pairs else []
    if not orders:
        return None
    rows = []
    for _, budget in pairs:
        rates = [budget.node.number("hit_rate_by_order", order) for order in orders]
        read = budget.node.number("disk_bytes_per_token")
        rows.append([budget.name, percent(budget.share), percent(budget.hit_rate),
                     *("" if r is None else percent(r) for r in rates),
                     "" if read is None else size(read)])  # fmt: skip
    columns = ["budget", "of the tables", "all", *(f"{order}-grams" for order in orders), "disk a token"]
    note = "Longer n-grams repeat less, so they decide what is read from disk."
    return Figure(None, [record for record, _ in pairs], note, "", columns, rows, wide=True,
                  title="Hit rate by order of n-gram")  # fmt: skip


def _warm_up(records: Sequence[Record]) -> Figure | None:
    """Hit rates by part of the trace; the first part starts with an empty cache."""
    pairs = [(record, budget) for record, budget in kin(records) if budget.dram_bytes > 0][:4]
    series: list[Series] = []
    rows, used = [], []
    for record, budget in pairs:
        tokens = record.node.number("trace", "tokens_looked_up") or record.node.number("trace", "tokens")
        xs, ys = _over_time(budget.node, tokens or 0.0)
        if len(ys) > 1:
            series.append(Series(budget.label, xs, ys, len(series), markers=len(xs) <= 12))
            rows.append([budget.label, *(percent(y) for y in _tenths(ys))])
            used.append(record)
    if not series:
        return None
    longest = [x for s in series for x in s.xs]
    chart = Chart(
        "warm-up",
        "Hit rate over time, from an empty cache",
        f"Hit rate in DRAM in each part of {count(max(longest))} tokens, starting empty; it rises while the "
        "cache fills and then follows the text.",
        linear_axis("tokens looked up", [0.0, *longest], count, tight=True),
        linear_axis("hit rate within the part", [0.0, *(y for s in series for y in s.ys)], whole_percent),
        series,
    )
    columns = ["budget", *(f"{i}/{len(rows[0]) - 1}" for i in range(1, len(rows[0])))]
    note = "The cache starts empty; each point is the rate within its part of the text."
    return Figure(chart, used, note, "", columns, [(row + [""] * 10)[: len(columns)] for row in rows])


def _over_time(budget: Node, tokens: float) -> tuple[list[float], list[float]]:
    """Tokens looked up so far and the rate since the point before."""
    until, rates = budget.numbers("warm_up", "tokens_until"), budget.numbers("warm_up", "hit_rate")
    if until and len(until) == len(rates):
        return until, rates
    tenths = budget.numbers("hit_rate_by_tenth")
    return [tokens * (i + 1) / len(tenths) for i in range(len(tenths))], tenths


def _tenths(values: Sequence[float]) -> list[float]:
    stride = max(1, len(values) // 10)
    return list(values[stride - 1 :: stride])[:10]
