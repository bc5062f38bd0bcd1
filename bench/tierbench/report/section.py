"""What every section of the report is made of: a finding, figures with their records, tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tierbench.records import Record
from tierbench.report.charts import Chart, RatioChart
from tierbench.report.markup import Child, Markup, join_with, prose, tag
from tierbench.report.svg import line_chart, ratio_chart

ROWS_MAX = 200  # of a table: a record that holds more costs its own figure, not the page
FILE_SHOWN_MAX = 44  # characters of a record's name, which is not broken over lines


@dataclass(frozen=True)
class Figure:
    """A chart, the numbers beside it (`columns`, `rows`) and their records."""

    chart: Chart | RatioChart | None
    records: Sequence[Record]
    note: str = ""  # ours, with `code`
    quoted: str = ""  # a record's own words
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    wide: bool = False  # takes the whole width
    title: str = ""  # of a table without a chart


@dataclass(frozen=True)
class Section:
    """`finding` says in a sentence what there is to see; `missing` what makes a record that is not there."""

    name: str
    title: str
    finding: Markup | str = ""
    parts: Sequence[Figure | Markup] = ()
    missing: Sequence[tuple[str, str]] = field(default=())  # what, and the command that makes it
    refused: Sequence[str] = ()

    @property
    def charts(self) -> list[Chart | RatioChart]:
        return [part.chart for part in self.parts if isinstance(part, Figure) and part.chart]


def drawn(section: Section) -> Markup:
    heading = f"{section.name}-heading"
    return tag(
        "section",
        tag("h2", section.title, id=heading),
        tag("p", section.finding, class_="finding") if section.finding else None,
        *(tag("p", tag("b", "Not drawn: "), words, class_="refused") for words in section.refused),
        tag(
            "div",
            *(_figure(part) if isinstance(part, Figure) else part for part in section.parts),
            class_="figures",
        )
        if section.parts
        else None,
        *(_missing(what, command) for what, command in section.missing),
        id=section.name,
        aria_labelledby=heading,
    )


def _figure(figure: Figure) -> Markup:
    chart, title = figure.chart, figure.chart.title if figure.chart else figure.title
    table = table_of(figure.columns, figure.rows, title) if figure.rows else None
    if chart is None:
        body, table = table, None
    else:
        body = line_chart(chart) if isinstance(chart, Chart) else ratio_chart(chart)
        table = tag("details", tag("summary", "The numbers"), table) if table else None
    note = tag("span", prose(figure.note + " ")) if figure.note else None
    kind = "wide-figure" if isinstance(chart, RatioChart) or figure.wide else None
    quoted = tag("span", figure.quoted, " ") if figure.quoted else None
    caption = tag("figcaption", note, quoted, cited(figure.records))
    return tag("figure", tag("h3", title), body, caption, table, class_=kind)


def _missing(what: str, command: str) -> Markup:
    return tag("p", tag("b", f"{what}: not measured yet. "), "This makes the record: ", tag("code", command),
               class_="missing")  # fmt: skip


def table_of(columns: Sequence[str], rows: Iterable[Sequence[Child]], caption: str) -> Markup:
    """The first column holds labels, the others numbers. On a narrow screen it scrolls by itself."""
    head = tag(
        "tr", *(tag("th", c, scope="col", class_="number" if i else None) for i, c in enumerate(columns))
    )
    body = (
        tag("tr", *(tag("td", cell, class_="number") if i else tag("th", cell, scope="row")
                    for i, cell in enumerate(row)))
        for row in list(rows)[:ROWS_MAX]
    )  # fmt: skip
    caption_ = tag("caption", caption, class_="unseen")
    table = tag("table", caption_, tag("thead", head), tag("tbody", *body), class_="numbers")
    return tag("div", table, class_="wide", tabindex=0, role="region", aria_label=caption)


def cited(records: Iterable[Record]) -> Markup:
    """Where figures come from, each record once, as a link into the list of records."""
    links = [reference(record) for record in {record.path: record for record in records}.values()]
    return tag("span", "From ", *join_with(", ", links), ".", class_="cited")


def reference(record: Record) -> Markup:
    name = record.file if len(record.file) <= FILE_SHOWN_MAX else record.file[: FILE_SHOWN_MAX - 1] + "…"
    return tag("a", name, href=f"#{anchor(record)}")


def anchor(record: Record) -> str:
    """Unique within a page and made of what the schema allows: the file name is only shown."""
    digest = sum(ord(c) * 31**i for i, c in enumerate(record.path)) % 16**8
    return f"r-{record.name}-{digest:08x}"
