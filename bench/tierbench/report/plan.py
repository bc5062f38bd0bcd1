"""The plan: which budgets meet a target, which of them is cheapest, and how far the prediction was off."""

from __future__ import annotations

from collections.abc import Sequence

from engram_client.errors import FormatError
from tierbench.records import Node, Record
from tierbench.report.bars import latest
from tierbench.report.charts import Chart, Mark, Series, linear_axis, log_axis
from tierbench.report.section import Figure, Section
from tierbench.report.shown import count, percent, size, three_digits, tidy, time_us, whole_percent

COMMAND = "tierbench plan TEXT --model deepseek-v4.1 --record bench/results"
SHARE = " of the time waiting"
CHECK_COMMAND = "tierbench plan TEXT --table STORE --check --record bench/results"
PLANS_MAX = 200
SERIES_MAX = 6


def plan_section(records: Sequence[Record]) -> Section:
    record = latest(records, "plan", "plans")
    title = "The plan"
    if record is None:
        return Section("plan", title, missing=[("Budgets against a target", COMMAND)])
    try:
        plans = record.node.items("plans")[:PLANS_MAX]
        parts = [f for f in (_waiting(record, plans), _budgets(record, plans), _assumptions(record)) if f]
        check = _check(record)
        missing = [] if check else [("The plan beside a running daemon", CHECK_COMMAND)]
        return Section("plan", title, _finding(record, plans), [*parts, *([check] if check else [])], missing)
    except FormatError as error:
        return Section("plan", title, missing=[("Budgets against a target", COMMAND)], refused=[str(error)])


def _named(plan: Node) -> str:
    """Budgets in words."""
    tiers = ((plan.number(f"{tier}_bytes") or 0.0, name) for tier, name in TIERS)
    return ", ".join(f"{size(held)} of {name}" for held, name in tiers if held or name == "DRAM")


TIERS = (("dram", "DRAM"), ("hbm", "HBM"), ("extent", "record extent"))


def _chosen(record: Record) -> int | None:
    best = record.node.number("cheapest")
    return None if best is None else int(best)


def _finding(record: Record, plans: Sequence[Node]) -> str:
    node, best = record.node, _chosen(record)
    rate, waiting = node.number("target", "tokens_per_s"), node.number("target", "waiting_share")
    if rate is None or waiting is None:
        return ""
    asked = f"{tidy(count(rate))} tokens a second with at most {whole_percent(waiting)}{SHARE}"
    if best is None or not 0 <= best < len(plans):
        found = [item.value for item in node.items("in_the_way") if isinstance(item.value, str)][:3]
        return f"None of {len(plans)} budgets gives {asked}. " + " ".join(found)
    price, whole = plans[best].number("price"), node.number("price_all_in_dram")
    words = f"{_named(plans[best])} is the cheapest of {len(plans)} budgets that gives {asked}"
    if price is not None and whole is not None:
        words += f": it costs {three_digits(price)}, all rows in DRAM {three_digits(whole)}"
    return words + "."


def _waiting(record: Record, plans: Sequence[Node]) -> Figure | None:
    """Share of the time spent waiting over DRAM, one curve for each budget of the other tiers."""
    families: dict[str, list[tuple[float, float]]] = {}
    for plan in plans:
        dram, waiting = plan.number("dram_bytes"), plan.number("waiting_share")
        others = [(plan.number(f"{tier}_bytes") or 0.0, name) for tier, name in TIERS[1:]]
        label = " + ".join(f"{size(held)} of {name}" for held, name in others if held) or "DRAM alone"
        if dram and waiting is not None and waiting >= 0:
            families.setdefault(label, []).append((dram, waiting))
    series = [
        Series(label, [x for x, _ in sorted(pairs)], [y for _, y in sorted(pairs)], style, markers=True)
        for style, (label, pairs) in enumerate(list(families.items())[:SERIES_MAX])
    ]
    if not any(len(s.xs) > 1 for s in series):
        return None
    target = record.node.number("target", "waiting_share")
    ys = [y for s in series for y in s.ys]
    marks = [Mark(f"target {whole_percent(target)}", y=target)] if target is not None else []
    best = _chosen(record)
    if best is not None and 0 <= best < len(plans) and (dram := plans[best].number("dram_bytes")):
        marks.append(Mark(f"cheapest: {size(dram)}", x=dram))
    chart = Chart(
        "plan-waiting",
        "Time spent waiting for rows, by DRAM budget",
        "Share of the time that goes by waiting, predicted for each budget; the target is a line across.",
        log_axis("DRAM budget", [x for s in series for x in s.xs], size, base=4.0, ticks_max=5),
        linear_axis("share of the time", [*ys, target or 0.0], whole_percent, low=0.0),
        series,
        marks,
    )
    rows = [[s.name, size(x), percent(y)] for s in series for x, y in zip(s.xs, s.ys, strict=True)]
    note = "Predicted from the machine’s measured figures."
    return Figure(chart, [record], note, "", ["tiers", "DRAM", "waiting"], rows, wide=True)


def _budgets(record: Record, plans: Sequence[Node]) -> Figure | None:
    best, rows = _chosen(record), []
    for number, plan in enumerate(plans):
        share = [plan.number(name) for name in ("hit_rate", "waiting_share", "disk_share")]
        price, p99 = plan.number("price"), plan.number("fetch_us", "p99")
        meets = plan.at("meets")
        verdict = "✓ cheapest" if number == best else "✓ meets" if meets and meets.value is True else "✗ no"
        rows.append([_named(plan), "" if price is None else three_digits(price),
                     *("" if s is None else percent(s) for s in share), "" if p99 is None else time_us(p99),
                     verdict])  # fmt: skip
    columns = ["budget", "price", "hit rate", "waiting", "disk busy", "a step’s rows, p99", "target"]
    return Figure(None, [record], "", "", columns, rows, wide=True, title="Budgets") if rows else None


def _assumptions(record: Record) -> Figure | None:
    rows = [[item.text("what") or "", item.text("value") or "", item.text("from") or ""]
            for item in record.node.items("assumptions")]  # fmt: skip
    if not rows:
        return None
    columns = ["assumed", "value", "from"]
    return Figure(None, [record], "", "", columns, rows, wide=True, title="What the plan assumes")


def _check(record: Record) -> Figure | None:
    rows = []
    for line in record.node.items("check", "lines"):
        points = line.text("unit") == "points"
        told = [line.number(name) for name in ("predicted", "seen")]
        values = ["" if v is None else percent(v) if points else tidy(three_digits(v)) for v in told]
        error = line.number("error")
        off = "none was seen"
        if error is not None:
            off = f"{error:+.2f} points" if points else f"{100 * error:+.1f} %"
        rows.append([line.text("what") or "", *values, off])
    if not rows:
        return None
    dram = record.node.number("check", "dram_bytes")
    note = f"A daemon of its own with {size(dram)} of DRAM, at the target’s pace." if dram is not None else ""
    columns = ["figure", "predicted", "seen", "error"]
    return Figure(None, [record], note, "", columns, rows, wide=True, title="Predicted and seen")
