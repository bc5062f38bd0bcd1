"""Measure a durable commit of updated rows beside writing and syncing as many bytes in a row.

Each window commits as many random rows (the default: 200,000 of 264 bytes) and writes the same bytes to a
new file, to a preallocated one and past the page cache; the fastest of these is the yardstick. Rows are
read back from the log, then folded into pages, then read from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from tierbench.alternate import against_best, alternate
from tierbench.commit_cost import CommitCost
from tierbench.delivery import add_common_arguments, deliver, rate_row
from tierbench.options import count
from tierbench.record import summarize

MB = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, windows=10, window_s=None)
    add = parser.add_argument
    add("--rows", type=count, default=200_000, metavar="N", help="of a commit (default: %(default)s)")
    add("--row-bytes", type=count, default=264, metavar="N", help="default: %(default)s")
    add("--read-rows", type=count, default=20_000, metavar="N", help="read at once (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    cost = CommitCost(args.dir, args.rows, args.row_bytes, args.seed)
    try:
        seconds = alternate(
            args.windows,
            {
                "commit": cost.commit,
                "write, fsync": cost.write,
                "preallocated write, fdatasync": cost.write_reserved,
                "direct write, fdatasync": cost.write_direct,
            },
            "committing",
        )
        rates = {name: [cost.bytes / s for s in taken] for name, taken in seconds.items()}
        ours = rates.pop("commit")
        from_log = [cost.read_rate(args.read_rows) for _ in range(args.windows)]
        folded = cost.fold()
        from_pages = [cost.read_rate(args.read_rows) for _ in range(args.windows)]
        results = {
            "bytes": cost.bytes,
            "durable": against_best(ours, rates),
            "commit_s": summarize(seconds["commit"]),
            "queued_s": summarize(cost.queued_s),
            "read_log_rows_per_s": summarize(from_log),
            "read_page_rows_per_s": summarize(from_pages),
            "fold": folded,
        }
    finally:
        cost.close()
    return deliver("commit", args, results, _lines(results))


def _lines(results: Mapping[str, Any]) -> Iterator[list[str]]:
    yield rate_row("durable commit", results["durable"], ">= 0.67", scale=MB, unit="MB/s")
    yield ["handed over after", f"{results['queued_s']['p50'] * 1e3:.1f} ms", "", "", "", ""]
    for where in ("log", "page"):
        rate = results[f"read_{where}_rows_per_s"]["p50"]
        yield [f"rows read from {where}s", f"{rate / 1e3:,.0f} k rows/s", "", "", "", ""]
    fold = results["fold"]
    yield ["folded", f"{fold['pages']:,} pages in {fold['seconds']:.1f} s", "", "", "", ""]
