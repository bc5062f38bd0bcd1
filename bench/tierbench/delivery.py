"""What every benchmark command shares: its options, its table or JSON on stdout, its record."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tierbench.options import count, positive, whole
from tierbench.record import write_record
from tierbench.records import printable

DEFAULT_COLUMNS = ("", "tierstore", "yardstick", "ratio", "spread", "bar")
DATA_FOLDER = Path(".bench")
NOT_PARAMETERS = ("json", "record", "dir", "out")


def add_delivery_arguments(parser: argparse.ArgumentParser) -> None:
    """`--dir`, `--json` and `--record`."""
    add = parser.add_argument
    add("--dir", type=Path, default=DATA_FOLDER, help="data, made once and kept (default: %(default)s)")
    add("--json", action="store_true", help="the figures as JSON on stdout")
    add("--record", type=Path, metavar="DIR", help="write a record into this folder")


def add_common_arguments(parser: argparse.ArgumentParser, *, windows: int, window_s: float | None) -> None:
    """`--dir`, `--windows`, `--window-s` where there is one, `--seed`, `--json` and `--record`."""
    add_delivery_arguments(parser)
    add = parser.add_argument
    add("--windows", type=count, default=windows, metavar="N",
        help="alternated windows (default: %(default)s)")  # fmt: skip
    if window_s is not None:
        add("--window-s", type=positive, default=window_s, metavar="S",
            help="length of one window in seconds (default: %(default)s)")  # fmt: skip
    add("--seed", type=whole, default=0, help="of keys and row ids (default: %(default)s)")


@dataclass(frozen=True)
class Grid:
    """A table for people; the first column holds labels."""

    title: str
    columns: Sequence[str]
    rows: Iterable[Sequence[str]]


def deliver(
    name: str,
    args: argparse.Namespace,
    results: Mapping[str, Any],
    rows: Iterable[Sequence[str]] = (),
    columns: Sequence[str] = DEFAULT_COLUMNS,
    *,
    grids: Sequence[Grid] = (),
) -> int:
    """Print the figures, write the record if one is wanted; returns the exit code.

    They are printed as one table of `rows`, or as `grids`.
    """
    if args.json:
        json.dump(results, sys.stdout, indent=2)
        print()
    else:
        for shown in grids or (Grid(f"tierbench {name}", columns, rows),):
            print_grid(shown)
    if args.record:
        parameters = {k: v for k, v in vars(args).items() if k not in (*NOT_PARAMETERS, "seed")}
        args.dir.mkdir(parents=True, exist_ok=True)
        path = write_record(
            name, results, args.record, seed=args.seed, parameters=parameters, data_path=args.dir
        )
        print(f"record: {path}", file=sys.stderr)
    return 0


def print_grid(shown: Grid) -> None:
    """A table on stdout, wide where that is no terminal. Texts are shown as they are, markup and all."""
    rows = [[Text(printable(cell)) for cell in row] for row in shown.rows]
    grid = Table(title=Text(printable(shown.title)) if shown.title else None, title_justify="left")
    for i, column in enumerate(shown.columns):
        grid.add_column(Text(printable(column)), justify="right" if i else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(grid)


def rate_row(
    label: str, found: Mapping[str, Any], bar: str = "", scale: float = 1e6, unit: str = "M rows/s"
) -> list[str]:
    """One line of the table for what `record.compare` or `alternate.against_best` returned."""
    ours, yardstick = (sorted(found[side])[len(found[side]) // 2] for side in ("ours", "yardstick"))
    name = found.get("yardstick_name", "")
    return [
        label,
        f"{ours / scale:,.2f} {unit}",
        f"{yardstick / scale:,.2f} {unit}\n{name}",
        f"{found['ratio_median']:.2f}",
        f"{found['ratio_min']:.2f} to {found['ratio_max']:.2f}",
        bar,
    ]


def latency_row(
    label: str, ours: Mapping[str, Any], yardstick: Mapping[str, Any] | None, bar: str = ""
) -> list[str]:
    """One line for two summaries of latencies in microseconds."""

    def show(found: Mapping[str, Any]) -> str:
        return f"p50 {found['p50']:,.1f}  p99 {found['p99']:,.1f} us"

    if yardstick is None:
        return [label, show(ours), "", "", "", bar]
    ratio = f"{ours['p50'] / yardstick['p50']:.2f} (p50)"
    return [label, show(ours), show(yardstick), ratio, "", bar]
