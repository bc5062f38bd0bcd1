"""Measure look-ups while a trained generation is published, taken up by a daemon, and rolled back.

Two clients of one daemon, one in shared memory and one over TCP, call without a pause and move over to the
generation that is current now. What is told is the longest call of each phase; the first ones of a new
generation read it from NVMe, and count.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

from tierbench.delivery import add_delivery_arguments, deliver
from tierbench.options import byte_size, count, positive, whole
from tierbench.publishing import Publishing

BAR_MS = 100.0
COLUMNS = ("phase", "seconds", "calls p50", "p99", "longest", "bar")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_delivery_arguments(parser)
    add = parser.add_argument
    add("--rows", type=count, default=2_000_000, metavar="N", help="of the table (default: %(default)s)")
    add("--dim", type=count, default=64, metavar="N", help="default: %(default)s")
    add("--ids", type=count, default=48, metavar="N", help="of a call (default: %(default)s)")
    add("--rounds", type=count, default=3, metavar="N", help="of publishing (default: %(default)s)")
    add("--phase-s", type=positive, default=2.0, metavar="S", help="default: %(default)s")
    add("--dram-bytes", type=byte_size, default=256 << 20, metavar="BYTES", help="default: 256MiB")
    add("--seed", type=whole, default=0, help="of rows and ids (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    publishing = Publishing(args.dir / "publish", args.rows, args.dim, args.seed)
    with closing(publishing):
        results = {"phases": publishing.measure(args.rounds, args.phase_s, args.ids, args.dram_bytes)}
    results["longest_ms"] = max(p["longest_ms"][0] for k, p in results["phases"].items() if k != "quiet")
    return deliver("publish", args, results, _lines(results), COLUMNS)


def _lines(results: Mapping[str, Any]) -> Iterator[list[str]]:
    for kind, phase in results["phases"].items():
        took = phase["took_ms"]
        bar = "" if kind == "quiet" else f"<= {BAR_MS:.0f} ms"
        yield [
            kind, f"{sum(phase['phase_s']):.1f}", f"{took['p50']:.3f} ms", f"{took['p99']:.2f} ms",
            f"{phase['longest_ms'][0]:.1f} ms", bar,
        ]  # fmt: skip
