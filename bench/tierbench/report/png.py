"""The same charts as images, drawn by matplotlib without a display."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot, which would look for a display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from engram_client.errors import StorageError
from tierbench.report.charts import STYLES, Axis, Chart, RatioChart, thinned
from tierbench.report.shown import tidy
from tierbench.report.svg import ratio_told

COLOURS = ("#0b6e69", "#a1521a", "#5a4ba8", "#4a515a", "#a02f6b", "#2f6f9f")  # the style sheet's, on white
DASHES = ("-", "--", ":", "-.", (0, (8, 3)), (0, (3, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P")
DPI = 144


def write_png(chart: Chart | RatioChart, folder: Path) -> Path:
    """`folder/NAME.png`. Raises StorageError where it cannot be written."""
    path = folder / f"{chart.name}.png"
    tall = 4.6 if isinstance(chart, Chart) else 1.6 + 0.42 * len(chart.rows)
    figure, axes = plt.subplots(figsize=(9, tall), layout="constrained")
    try:
        axes.set_title(_plain(chart.title), loc="left", fontweight="bold")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        if isinstance(chart, Chart):
            _lines(axes, chart)
        else:
            _ratios(axes, chart)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise StorageError(f"{path}: image cannot be written: {error.strerror or error}") from error
    finally:
        plt.close(figure)
    return path


def _plain(text: str) -> str:
    """Text of a record is no formula, and no glyph is looked for that cannot be printed."""
    return "".join(c if c.isprintable() else "?" for c in text[:120]).replace("$", r"\$")


def _lines(axes: Axes, chart: Chart) -> None:
    for series in chart.series:
        style = series.style % STYLES
        axes.plot(
            [chart.x.place(x) for x in series.xs],
            [chart.y.place(y) for y in series.ys],
            color=COLOURS[style], linestyle=DASHES[style], linewidth=2.4 if style == 0 else 1.6,
            marker=MARKERS[style], markersize=5, label=_plain(series.name),
            markevery=None if series.markers else thinned(len(series.xs)), zorder=3 - 0.1 * style,
        )  # fmt: skip
    for mark in chart.marks:
        if mark.x is not None:
            at = chart.x.place(mark.x)
            axes.axvline(at, color="#1c1f23", linestyle=":", linewidth=1.4)
            side = "left" if at < 0.5 else "right"
            axes.annotate(_plain(f" {mark.words} "), (at, 1.0), ha=side, va="bottom", fontsize=9)
    _scale(axes, chart.x, "x")
    _scale(axes, chart.y, "y")
    axes.grid(axis="y", color="#e3e0d8")
    if len(chart.series) > 1:
        axes.legend(frameon=False, fontsize=9)


def _scale(axes: Axes, axis: Axis, which: str) -> None:
    """Places are shares of the axis already, as in the page, so that both show the same."""
    drawn = axes.xaxis if which == "x" else axes.yaxis
    places = [axis.place(tick) for tick in axis.ticks]
    told = {place: tidy(axis.show(tick)) for place, tick in zip(places, axis.ticks, strict=True)}
    drawn.set_major_locator(FixedLocator(places))
    drawn.set_major_formatter(FuncFormatter(lambda place, _: told.get(place, "")))
    drawn.set_label_text(_plain(axis.label))
    (axes.set_xlim if which == "x" else axes.set_ylim)(-0.02, 1.02)


def _ratios(axes: Axes, chart: RatioChart) -> None:
    axes.set_xscale("log")
    labels = []
    for line, row in enumerate(chart.rows):
        colour = {None: "#5d6470", True: "#0b6e69", False: "#b3361e"}[row.met]
        axes.plot([row.low, row.high], [line, line], color="#1c1f23", linewidth=1.4)
        axes.plot([row.median], [line], marker="o", color=colour, markersize=7)
        if row.bar is not None:
            axes.plot([row.bar, row.bar], [line - 0.35, line + 0.35], color=colour, linestyle="--")
        verdict = {None: "", True: " met", False: " missed"}[row.met]
        labels.append(_plain(f"{row.label} / {row.against}: {ratio_told(row.median)}{verdict}"))
    axes.axvline(1.0, color="#565d66", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if _inside(chart, t)]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.set_xlabel("ratio; the dashed line is the bar, the whisker the spread of the runs")


def _inside(chart: RatioChart, ratio: float) -> bool:
    low = min(min(r.low, r.bar or 1.0) for r in chart.rows)
    high = max(max(r.high, r.bar or 1.0) for r in chart.rows)
    return low / 1.3 <= ratio <= high * 1.3
