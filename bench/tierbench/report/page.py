"""The page: a first screen for those who have a minute, the sections, and the records that all stands on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import groupby

from engram_client.errors import FormatError
from tierbench.records import Record
from tierbench.report.bars import MET, MISSED, NOT_JUDGED, NOT_MEASURED, Judged, judge_all, latest
from tierbench.report.hitrates import hit_rate_section, nearest_tenth
from tierbench.report.latency import latency_section
from tierbench.report.markup import Markup, join_with, prose, tag
from tierbench.report.plan import plan_section
from tierbench.report.ratios import path_section
from tierbench.report.section import Section, anchor, drawn, reference
from tierbench.report.shown import NBSP, count, percent, size, time_us

CHIPS = {MET: ("good", "✓ met"), MISSED: ("bad", "✗ missed"), NOT_JUDGED: ("none", "○ not judged"),
         NOT_MEASURED: ("none", "– not measured")}  # fmt: skip


def sections_of(records: Sequence[Record]) -> list[Section]:
    return [hit_rate_section(records), latency_section(records), path_section(records), plan_section(records)]


def page(records: Sequence[Record], refused: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole document. `refused` are the files that are no records, and why."""
    judged = judge_all(records)
    title = "tierstore: state of the deployment"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'",
        ),
        tag("title", title),
        tag("style", Markup(resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8"))),
    )
    body = tag(
        "body",
        tag("a", "Skip to the figures", href="#hit-rates", class_="skip"),
        _header(records),
        tag("main", _state(records, judged), _bars(judged), *(drawn(s) for s in sections),
            _sources(records, refused)),
        _footer(),
    )  # fmt: skip
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _header(records: Sequence[Record]) -> Markup:
    model = next((t for r in reversed(records) if r.name == "hitrate" if (t := _model(r))), None)
    machines = Counter(r.machine.told() for r in records)
    where = f"{machines.most_common(1)[0][0]}" if machines else ""
    if len(machines) > 1:
        where += f" and {len(machines) - 1} other machine{'s' if len(machines) > 2 else ''}"
    dates = f"records of {_days(records)}" if records else "no records"
    about = [tag("span", text) for text in (model, where, dates) if text]
    nav = tag("nav", *(tag("a", words, href=f"#{name}") for name, words in NAVIGATION), aria_label="Sections")
    return tag("header", tag("p", "tierstore", class_="brand"), tag("h1", "State of the deployment"),
               tag("p", *about, class_="about"), nav)  # fmt: skip


NAVIGATION = (("bars", "Bars"), ("hit-rates", "Budget"), ("latency", "Latency"), ("paths", "Yardsticks"),
              ("plan", "Plan"), ("records", "Records"))  # fmt: skip


def _model(record: Record) -> str | None:
    try:
        name, of = record.node.text("model", "name"), record.node.number("model", "bytes_of_rows")
        rows = record.node.number("model", "rows")
    except FormatError:
        return None
    return f"{name}, {count(rows)} rows, {size(of)}" if name and of and rows else None


def _days(records: Sequence[Record]) -> str:
    first, last = records[0].date_utc[:10], records[-1].date_utc[:10]
    return first if first == last else f"{first} to {last}"


def _state(records: Sequence[Record], judged: Sequence[Judged]) -> Markup:
    """What a person who has a minute reads."""
    missed = [j for j in judged if j.status == MISSED]
    tiles = [tile for make in (_hit_rate_tile, _wait_tile, _disk_tile) if (tile := _safe(make, records))]
    slow = tag("p", "Nothing that was measured misses its bar.", class_="slow")
    if missed:
        slow = tag("ul", *(_missed_line(j) for j in missed), class_="slow")
    return tag(
        "section",
        tag("h2", "In a minute", id="state-heading"),
        tag("div", *tiles, _bars_tile(judged), class_="tiles"),
        tag("h3", "What misses its bar") if judged else None,
        slow,
        id="state",
        aria_labelledby="state-heading",
    )


def _missed_line(judged: Judged) -> Markup:
    figure = tag("span", judged.figure, class_="bad-figure")
    return tag("li", tag("b", f"{judged.group}: "), judged.what, " ", figure, f", asked {judged.asked}")


def _safe(make: Callable[[Sequence[Record]], Markup | None], records: Sequence[Record]) -> Markup | None:
    try:
        return make(records)
    except FormatError:
        return None  # its own section says so


def _tile(
    figure: str, unit: str, words: str, more: Markup | str, *cited: Record, extra: Markup | None = None
) -> Markup:
    return tag(
        "div",
        tag("p", tag("b", figure), tag("span", unit) if unit else None, class_="big"),
        extra,
        tag("p", words, class_="what"),
        tag("p", more, class_="more") if more else None,
        tag("p", *(reference(record) for record in cited), class_="cited") if cited else None,
        class_="tile",
    )


def _hit_rate_tile(records: Sequence[Record]) -> Markup | None:
    found = nearest_tenth(records)
    if found is None:
        return None
    record, budget = found
    bound = budget.node.number("beside", "clairvoyant", "hit_rate")
    lru = budget.node.number("beside", "lru", "hit_rate")
    beside = [f"{name} {percent(r)}" for name, r in (("LRU", lru), ("clairvoyant", bound)) if r is not None]
    return _tile(f"{100 * budget.hit_rate:.1f}", "%", f"of look-ups hit DRAM at {budget.label}",
                 "; ".join(beside), record, extra=_meter(budget.hit_rate, bound))  # fmt: skip


def _meter(rate: float, bound: float | None) -> Markup:
    parts = [tag("rect", x=0, y=0, width="100%", height=8, rx=4, class_="rest"),
             tag("rect", x=0, y=0, width=f"{100 * rate:.1f}%", height=8, rx=4, class_="had")]  # fmt: skip
    if bound is not None:
        at = f"{100 * bound:.1f}%"
        parts.append(tag("line", x1=at, x2=at, y1=-3, y2=11, class_="bound"))
    return tag("svg", *parts, width="100%", height=8, overflow="visible", aria_hidden="true", class_="meter")


def _wait_tile(records: Sequence[Record]) -> Markup | None:
    record = latest(records, "shm", "token", "shm", "p50")
    if record is None:
        return None
    p50, p99 = (record.node.number("token", "shm", p) for p in ("p50", "p99"))
    afar = latest(records, "remote", "tcp", "token", "taken_us", "ours", "p50")
    more = f"p99 {time_us(p99)}" if p99 else ""
    if afar is not None:
        more += f"; over TCP {time_us(afar.node.number('tcp', 'token', 'taken_us', 'ours', 'p50') or 0)}"
    value, _, unit = time_us(p50 or 0).partition(NBSP)
    return _tile(value, unit, "for a token’s 48 rows in DRAM, from another process, median", more,
                 *(r for r in (record, afar) if r))  # fmt: skip


def _disk_tile(records: Sequence[Record]) -> Markup | None:
    found = nearest_tenth(records)
    read = found[1].node.number("disk_bytes_per_token") if found else None
    if found is None or read is None:
        return None
    missed = found[1].node.number("missed_records_per_token", "mean")
    value, _, unit = size(read).partition(NBSP)
    more = f"{missed:.2f} records missed a token" if missed is not None else ""
    return _tile(value, unit, "read from disk a token, at the same budget", more, found[0])


def _bars_tile(judged: Sequence[Judged]) -> Markup:
    met = sum(j.status == MET for j in judged)
    missed = sum(j.status == MISSED for j in judged)
    rest = len(judged) - met - missed
    more = f"{missed} missed" + (f", {rest} without a verdict" if rest else "")
    strip = tag(
        "p", *(tag("i", class_=CHIPS[j.status][0]) for j in judged), class_="strip", aria_hidden="true"
    )
    return _tile(str(met), f"of {len(judged)}", "bars met", more, extra=strip)


def _bars(judged: Sequence[Judged]) -> Markup:
    groups = (list(rows) for _, rows in groupby(judged, key=lambda j: j.group))
    return tag(
        "section",
        tag("h2", "Every bar", id="bars-heading"),
        tag("p", "× is ours over the yardstick’s: the median of alternated pairs of runs, in small "
            "print the least and the greatest. A verdict is that of the median.", class_="finding small"),
        tag("div", *(_bar_group(rows) for rows in groups), class_="bars"),
        id="bars",
        aria_labelledby="bars-heading",
    )  # fmt: skip


def _bar_group(rows: Sequence[Judged]) -> Markup:
    used = {j.record.path: j.record for j in rows if j.record}
    cites = tag("small", *join_with(", ", [reference(r) for r in used.values()])) if used else None
    head = tag("thead", tag("tr", *(tag("th", words, scope="col", class_="unseen") for words in
                                    ("what", "found and asked", "verdict"))), class_="unseen")  # fmt: skip
    body = tag("tbody", *(_bar_row(j) for j in rows))
    return tag("table", tag("caption", rows[0].group, cites), head, body)


def _bar_row(judged: Judged) -> Markup:
    kind, words = CHIPS[judged.status]
    more = [tag("small", judged.words)] if judged.words else []
    if judged.command:
        more.append(tag("small", tag("code", judged.command)))
    figure = [tag("b", judged.figure)] if judged.figure else []
    if judged.spread:
        figure.append(tag("small", judged.spread))
    return tag(
        "tr",
        tag("th", judged.what, *more, scope="row"),
        tag("td", *figure, class_="number"),
        tag(
            "td",
            tag("span", words, class_=f"chip {kind}"),
            tag("small", judged.asked),
            class_="number verdict",
        ),
    )


def _sources(records: Sequence[Record], refused: Sequence[str]) -> Markup:
    rows = [
        tag("tr", tag("th", record.file, scope="row"),
            tag("td", record.date_utc.replace("T", " ").rstrip("Z")),
            tag("td", tag("code", (record.commit or "none")[:10]), " and changes" if record.dirty else None),
            tag("td", record.machine.told()), tag("td", "" if record.seed is None else str(record.seed)),
            id=anchor(record))
        for record in reversed(records)
    ]  # fmt: skip
    columns = ("record", "date, UTC", "commit", "machine", "seed")
    table = tag("table", tag("caption", "Records", class_="unseen"),
                tag("thead", tag("tr", *(tag("th", c, scope="col") for c in columns))), tag("tbody", *rows),
                class_="numbers sources")  # fmt: skip
    problems = [tag("li", words) for words in refused]
    return tag(
        "section",
        tag("h2", "Records", id="records-heading"),
        tag("p", "Each figure comes from the latest record that holds it.", class_="finding small"),
        tag("div", table, class_="wide", tabindex=0, role="region", aria_label="Records") if rows else None,
        tag("div", tag("h3", "Files that were refused"), tag("ul", *problems), class_="refused")
        if problems
        else None,
        id="records",
        aria_labelledby="records-heading",
    )


def _footer() -> Markup:
    return tag("footer", tag("p", prose("Made by `tierbench report`. No script, nothing from elsewhere.")))
