"""Set two records of a benchmark side by side, or a folder of records beside another.

Each figure's ratio, second over first, stands with its spread; a figure has changed only where the spreads of
both do not meet. A path that has a yardstick is judged by its ratio to it, so that a faster machine does not
count. Of folders the latest record of each benchmark is taken. What else differs (machine, commit, seed,
options) is told first. With --fail-above P the exit code is 1 where a figure whose spread the records hold
got worse by more than P per cent; --strict counts those as well whose spread is only assumed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engram_client.errors import BadRequest
from tierbench.comparison.verdict import (
    BESIDE,
    BETTER,
    CHANGED,
    WITHIN,
    WORSE,
    Change,
    Comparison,
    compare_records,
)
from tierbench.delivery import Grid, print_grid
from tierbench.options import not_negative
from tierbench.records import Record, find_records, load_all, load_record, printable
from tierstore.cli import FOUND_PROBLEM, OK

SIGNS = {BETTER: "+ better", WORSE: "- worse", CHANGED: "! changed", WITHIN: "within", BESIDE: "beside"}
COLUMNS = ("figure", "first", "second", "ratio", "its spread", "")
MARKED = (BETTER, WORSE, CHANGED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("first", type=Path, metavar="A", help="record or folder")
    add("second", type=Path, metavar="B", help="record or folder")
    add("--changed", action="store_true", help="only figures that changed by more than their spread")
    add("--fail-above", type=not_negative, metavar="PERCENT",
        help="exit code 1 where a figure got worse by more than its spread and this")  # fmt: skip
    add("--strict", action="store_true", help="with --fail-above: figures of an assumed spread count, too")
    add("--json", action="store_true", help="everything as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    comparisons = [compare_records(*pair) for pair in _pairs(args.first, args.second)]
    if args.json:
        json.dump([_told(c) for c in comparisons], sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        for found in comparisons:
            _print(found, args.changed)
    if args.fail_above is None:
        return OK
    failed = [
        change for found in comparisons for change in found.changes
        if change.verdict == WORSE and change.size_percent > args.fail_above
        and (args.strict or change.spread != "assumed")
    ]  # fmt: skip
    for change in failed:
        words = f"{change.place} got worse by {change.size_percent:.1f} %, more than {args.fail_above:g} %"
        print(f"tierbench: {printable(words)}", file=sys.stderr)
    return FOUND_PROBLEM if failed else OK


def _pairs(first: Path, second: Path) -> list[tuple[Record, Record]]:
    """Raises BadRequest where the two have no benchmark in common."""
    if first.is_file() and second.is_file():
        return [(load_record(first), load_record(second))]
    sides = (_latest(first), _latest(second))
    common = sorted(set(sides[0]) & set(sides[1]))
    if not common:
        raise BadRequest(
            f"{first} holds records of {', '.join(sorted(sides[0])) or 'nothing'}, {second} of "
            f"{', '.join(sorted(sides[1])) or 'nothing'}; only records of one benchmark can be compared"
        )
    for side, other, path in ((*sides, first), (*sides[::-1], second)):
        if alone := sorted(set(side) - set(other)):
            print(f"tierbench: only {path} has records of {', '.join(alone)}", file=sys.stderr)
    return [(sides[0][name], sides[1][name]) for name in common]


def _latest(place: Path) -> dict[str, Record]:
    records, refused = load_all(find_records([place]))
    for words in refused:
        print(f"tierbench: refused {printable(words)}", file=sys.stderr)
    return {record.name: record for record in records}


def _print(found: Comparison, only_changed: bool) -> None:
    title = printable(f"{found.first.name}: {found.first.file} and {found.second.file}")
    print(title)
    for words in found.warnings:
        print(f"differs: {printable(words)}")
    for side, file in (("first", found.first.file), ("second", found.second.file)):
        if found.only[side]:
            print(f"only in {printable(file)}: {len(found.only[side])} figures")
    if lines := list(_lines(found, only_changed)):
        print_grid(Grid("", COLUMNS, lines))
    counts = ", ".join(f"{found.count(v)} {v}" for v in (WORSE, BETTER, CHANGED, WITHIN))
    print(f"{counts}; spreads marked ~ are assumed, the records keep none")


def _lines(found: Comparison, only_changed: bool) -> Iterator[list[str]]:
    for change in found.changes:
        if only_changed and change.verdict not in MARKED:
            continue
        ratio = "" if change.ratio is None else f"{change.ratio:.3f}"
        spread = ""
        if change.low is not None and change.high is not None:
            mark = "~ " if change.spread == "assumed" else ""
            spread = f"{mark}{change.low:.3f} to {change.high:.3f}"
        first, second = (f"{value:,.6g}" for value in (change.first, change.second))
        yield [change.place, first, second, ratio, spread, SIGNS[change.verdict]]


def _told(found: Comparison) -> dict[str, Any]:
    return {
        "name": found.first.name,
        "first": found.first.path,
        "second": found.second.path,
        "differs": found.warnings,
        "only": found.only,
        "figures": [_change_told(change) for change in found.changes],
    }


def _change_told(change: Change) -> dict[str, Any]:
    size = change.size_percent
    return {
        "place": change.place, "first": change.first, "second": change.second, "verdict": change.verdict,
        "ratio": change.ratio, "ratio_low": change.low, "ratio_high": change.high, "spread": change.spread,
        "size_percent": size if math.isfinite(size) else None,
    }  # fmt: skip
