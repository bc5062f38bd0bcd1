"""Charts as SVG that is as wide as its column while its letters keep their size.

An SVG that is scaled as a whole has letters of 6 px on a telephone. Here nothing is scaled but the curves:
texts and markers are placed in per cent of the width and in px of the height, and the curves lie in an
inner SVG that is stretched, with strokes that are not. Scale labels stand on their grid lines, so no margin
depends on them.

Colours are the style sheet's, by class; each series differs in dash and marker too: nothing is told by colour
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tierbench.report.charts import STYLES, Chart, Mark, Ratio, RatioChart, Series, thinned
from tierbench.report.markup import Markup, join, tag
from tierbench.report.shown import tidy

HEIGHT_PX, TOP_PX, BOTTOM_PX = 300, 26, 28
LEFT, RIGHT = 11.0, 98.0  # per cent of the width that data take
INNER = 1000  # units of the stretched part, across and down
SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",  # circle
    "M-3.5-3.5h7v7h-7z",  # square
    "M0-4.6L4.4 3.4H-4.4z",  # triangle
    "M0-5L4.5 0 0 5-4.5 0z",  # diamond
    "M-4.4-3.4H4.4L0 4.6z",  # triangle on its head
    "M-4-1.3h2.7V-4h2.6v2.7H4v2.6H1.3V4h-2.6V1.3H-4z",  # cross
)
POINTS_MAX, MARKERS_MAX, RATIOS_MAX = 400, 40, 100  # drawn, of as many as there are
RATIO_TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def line_chart(chart: Chart) -> Markup:
    """The chart with its legend and caption of axes."""
    drawn = tag(
        "svg",
        tag("title", chart.title, id=f"{chart.name}-title"),
        tag("desc", chart.description, id=f"{chart.name}-desc"),
        *_grid(chart),
        *(_mark(chart, mark) for mark in chart.marks),
        _curves(chart),
        *(_markers(chart, series) for series in chart.series),
        *(_mark_words(chart, mark) for mark in chart.marks),
        class_="chart",
        role="img",
        width="100%",
        height=HEIGHT_PX,
        aria_labelledby=f"{chart.name}-title {chart.name}-desc",
    )
    return join(_legend(chart), tag("p", chart.y.label, class_="axis"), drawn,
                tag("p", chart.x.label, class_="axis below"))  # fmt: skip


def _legend(chart: Chart) -> Markup | None:
    if len(chart.series) < 2:
        return None
    keys = (tag("li", swatch(series.style), series.name) for series in chart.series)
    return tag("ul", *keys, class_="legend")


def swatch(style: int) -> Markup:
    style %= STYLES
    return tag(
        "svg",
        tag("path", d="M1 7H31", class_=f"line s{style}"),
        tag("g", tag("path", d=SHAPES[style]), transform="translate(16 7)", class_=f"dot s{style}"),
        width=32, height=14, aria_hidden="true", focusable="false",
    )  # fmt: skip


def _x(chart: Chart, value: float) -> float:
    return LEFT + (RIGHT - LEFT) * chart.x.place(value)


def _y(chart: Chart, value: float) -> float:
    """In px from the top."""
    return TOP_PX + (HEIGHT_PX - TOP_PX - BOTTOM_PX) * (1 - chart.y.place(value))


def _grid(chart: Chart) -> list[Markup]:
    foot = HEIGHT_PX - BOTTOM_PX
    drawn = []
    for tick in chart.y.ticks:
        y = _y(chart, tick)
        drawn.append(tag("line", x1="0", x2="100%", y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        drawn.append(tag("text", tidy(chart.y.show(tick)), x="0", y=f"{y - 4:.1f}", class_="tick"))
    drawn.append(tag("line", x1="0", x2="100%", y1=foot, y2=foot, class_="foot"))
    for tick in chart.x.ticks:
        x = f"{_x(chart, tick):.2f}%"
        anchor = "end" if chart.x.place(tick) > 0.93 else "middle"
        drawn.append(tag("line", x1=x, x2=x, y1=foot, y2=foot + 5, class_="foot"))
        drawn.append(
            tag("text", tidy(chart.x.show(tick)), x=x, y=foot + 19, text_anchor=anchor, class_="tick")
        )  # fmt: skip
    return drawn


def _curves(chart: Chart) -> Markup:
    height = HEIGHT_PX - TOP_PX - BOTTOM_PX
    paths = []
    for series in reversed(chart.series):  # the product's lies on top
        points = " ".join(
            f"{INNER * _x(chart, series.xs[i]) / 100:.1f} "
            f"{(_y(chart, series.ys[i]) - TOP_PX) / height * INNER:.1f}"
            for i in thinned(len(series.xs), POINTS_MAX)
        )
        paths.append(tag("path", d=f"M{points}", class_=f"line s{series.style % STYLES}"))
    return tag(
        "svg", *paths, x="0", y=TOP_PX, width="100%", height=height,
        viewBox=f"0 0 {INNER} {INNER}", preserveAspectRatio="none", overflow="visible",
    )  # fmt: skip


def _markers(chart: Chart, series: Series) -> Markup:
    style = series.style % STYLES
    which = thinned(len(series.xs), MARKERS_MAX if series.markers else 7)
    dots = (
        tag("svg", tag("path", d=SHAPES[style]), x=f"{_x(chart, series.xs[i]):.2f}%",
            y=f"{_y(chart, series.ys[i]):.1f}", overflow="visible")
        for i in which
    )  # fmt: skip
    return tag("g", *dots, class_=f"dot s{style}")


def _mark(chart: Chart, mark: Mark) -> Markup:
    if mark.x is not None:
        x = f"{_x(chart, mark.x):.2f}%"
        return tag("line", x1=x, x2=x, y1=TOP_PX - 8, y2=HEIGHT_PX - BOTTOM_PX, class_="mark")
    y = f"{_y(chart, mark.y or 0.0):.1f}"
    return tag("line", x1="0", x2="100%", y1=y, y2=y, class_="mark")


def _mark_words(chart: Chart, mark: Mark) -> Markup:
    if mark.x is not None:
        at = _x(chart, mark.x)
        anchor = "start" if at < 30 else "end" if at > 70 else "middle"
        return tag("text", mark.words, x=f"{at:.2f}%", y=TOP_PX - 13, text_anchor=anchor, class_="mark-words")
    y = f"{_y(chart, mark.y or 0.0) - 5:.1f}"
    return tag("text", mark.words, x=f"{RIGHT}%", y=y, text_anchor="end", class_="mark-words")


def ratio_chart(chart: RatioChart) -> Markup:
    """A table in which each line draws its ratio: a bar from 1, where both are equal, and its spread."""
    scale = RatioScale(chart.rows)
    head = tag(
        "thead",
        tag("tr", tag("th", "path", scope="col"), tag("th", scale.ticks(), scope="col", class_="drawn"),
            tag("th", "ratio", scope="col", class_="number"), tag("th", "bar", scope="col", class_="number")),
    )  # fmt: skip
    rows = (
        tag(
            "tr",
            tag("th", row.label, tag("small", f"against {row.against}"), scope="row"),
            tag("td", scale.drawn(row), class_="drawn"),
            tag("td", tag("b", ratio_told(row.median)), tag("small", _spread(row)), class_="number"),
            tag("td", *_verdict(row), class_="number"),
        )
        for row in chart.rows[:RATIOS_MAX]
    )  # fmt: skip
    caption = tag("caption", chart.description, class_="unseen")
    return tag("table", caption, head, tag("tbody", *rows), class_="ratios")


def _spread(row: Ratio) -> str:
    return "no spread kept" if row.low == row.high else f"{ratio_told(row.low)} to {ratio_told(row.high)}"


def _verdict(row: Ratio) -> list[Markup | str]:
    if row.bar is None:
        return [tag("small", "none set")]
    sign = "≥" if row.larger_is_better else "≤"
    chip = tag("span", "✓ met" if row.met else "✗ missed", class_="chip good" if row.met else "chip bad")
    return [chip, tag("small", f"{sign} {row.bar:g}")]


def ratio_told(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}"


class RatioScale:
    """A logarithmic scale over all ratios of a chart, their spreads and bars, and 1."""

    def __init__(self, rows: Sequence[Ratio]) -> None:

        values = [v for row in rows for v in (row.low, row.high, row.median, row.bar or 1.0)]
        low, high = min([*values, 0.8]), max([*values, 1.25])
        self._low, self._high = low / 1.12, high * 1.12

    def at(self, ratio: float) -> float:
        """Per cent of the width."""

        low, high = math.log(self._low), math.log(self._high)
        return 100 * (math.log(max(ratio, 1e-9)) - low) / (high - low)

    def ticks(self) -> Markup:
        inside = [t for t in RATIO_TICKS if self._low * 1.05 <= t <= self._high / 1.05]
        while len(inside) > 5:
            inside = [t for i, t in enumerate(inside) if t == 1 or i % 2 == inside.index(1) % 2]
        texts = (
            tag("text", f"{t:g}", x=f"{self.at(t):.2f}%", y=13, text_anchor="middle", class_="tick")
            for t in inside
        )
        return tag("svg", *texts, width="100%", height=18, aria_hidden="true")

    def drawn(self, row: Ratio) -> Markup:
        one, median = self.at(1.0), self.at(row.median)
        kind = "none" if row.met is None else "good" if row.met else "bad"
        x = {name: f"{self.at(v):.2f}%" for name, v in (("low", row.low), ("high", row.high))}
        parts = [
            tag("line", x1=f"{one:.2f}%", x2=f"{one:.2f}%", y1=0, y2=30, class_="one"),
            tag("rect", x=f"{min(one, median):.2f}%", y=9, width=f"{abs(median - one):.2f}%", height=12,
                class_=f"bar {kind}"),
            tag("line", x1=x["low"], x2=x["high"], y1=15, y2=15, class_="spread"),
            tag("line", x1=x["low"], x2=x["low"], y1=11, y2=19, class_="spread"),
            tag("line", x1=x["high"], x2=x["high"], y1=11, y2=19, class_="spread"),
            tag("svg", tag("path", d=SHAPES[0]), x=f"{median:.2f}%", y=15, overflow="visible",
                class_="median"),
        ]  # fmt: skip
        if row.bar is not None:
            bar = f"{self.at(row.bar):.2f}%"
            parts.append(tag("line", x1=bar, x2=bar, y1=3, y2=27, class_="threshold"))
        return tag("svg", *parts, width="100%", height=30, aria_hidden="true", focusable="false")
