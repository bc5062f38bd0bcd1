"""Measure what a running daemon goes through: resized budgets under look-ups, warm restarts, kill -9.

Resizing: the DRAM budget shrinks and grows by GiBs while threads look up records that stay, in this process
and through a daemon. The bar: no pause beyond 50 ms that is the resize's doing. The longest gaps of the same
run without a resize stand beside it, on a quiet machine and with a thread that copies memory, as a
resize does. bench/tierbench/resizing.py says more.

Restarting: the hit rate of a GiB of cache is back within 1 point after reading at most 1.1 times the budget.
bench/tierbench/restarting.py says how both are found.
"""

from __future__ import annotations

import argparse
import shutil
from typing import Any

from tierbench.delivery import add_delivery_arguments, deliver
from tierbench.options import byte_size, count, count_list, positive, whole
from tierbench.prepared import prepared_table
from tierbench.progress import stage
from tierbench.resizing import BUSY, GROW, QUIET, SHRINK, Resizing, resize_daemon, resize_in_process
from tierbench.restarting import Restarting, warm_restart
from tierbench.text_keys import text_keys

PARTS = ("resize", "restart")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_delivery_arguments(parser)
    add = parser.add_argument
    add("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    add("--small-bytes", type=byte_size, default=1 << 30, metavar="BYTES", help="default: 1GiB")
    add("--large-bytes", type=byte_size, default=3 << 30, metavar="BYTES", help="default: 3GiB")
    add("--hot-tokens", type=count, default=16_384, metavar="N",
        help="tokens that are looked up while budgets change (default: %(default)s)")  # fmt: skip
    add("--call-tokens", type=count, default=16, metavar="N", help="of one call (default: %(default)s)")
    add(
        "--rounds", type=count, default=3, metavar="N", help="of shrinking and growing (default: %(default)s)"
    )
    add("--phase-s", type=positive, default=3.0, metavar="S", help="of a phase without a resize (default: 3)")
    add("--threads", type=count_list, default=(1, 2), metavar="N[,N]", help="that look up (default: 1,2)")
    add("--resize-rows-per-head", type=count, default=300, metavar="N",
        help="of the table behind it; small ones fill an arena sooner (default: %(default)s)")  # fmt: skip
    add("--dram-bytes", type=byte_size, default=1 << 30, metavar="BYTES",
        help="budget of the daemon that is restarted (default: 1GiB)")  # fmt: skip
    add("--rows-per-head", type=count, default=250_000, metavar="N", help="of its table (default: 250000)")
    add("--tokens", type=count, default=550_000, metavar="N",
        help="of text, the last ones after the restart (default: %(default)s)")  # fmt: skip
    add("--probe-tokens", type=count, default=50_000, metavar="N", help="those (default: %(default)s)")
    add("--batch-tokens", type=count, default=512, metavar="N", help="of one look-up (default: %(default)s)")
    add("--seed", type=whole, default=0, help="of random keys (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    scratch = args.dir / "live-scratch"
    results: dict[str, Any] = {}
    try:
        if "resize" in (args.part or PARTS):
            prepared = prepared_table(args.dir, args.resize_rows_per_head)
            for threads in args.threads:
                how = _resizing(args, threads)
                with stage(f"resizing in this process under {threads} threads"):
                    found = resize_in_process(prepared, scratch / "local", how)
                results[f"in_process_threads_{threads}"] = found
                with stage(f"resizing a daemon under {threads} threads"):
                    results[f"daemon_threads_{threads}"] = resize_daemon(prepared, scratch / "daemon", how)
        if "restart" in (args.part or PARTS):
            prepared = prepared_table(args.dir, args.rows_per_head)
            keys = text_keys(args.dir, prepared.spec, args.tokens)
            how_restarted = Restarting(args.dram_bytes, keys, args.probe_tokens, args.batch_tokens)
            with stage("restarting daemons"):
                results["restart"] = warm_restart(prepared, scratch, how_restarted)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return deliver("live", args, results, _lines(results), ("", "found", "without a resize", "bar"))


def _resizing(args: argparse.Namespace, threads: int) -> Resizing:
    return Resizing(
        args.small_bytes, args.large_bytes, args.hot_tokens, args.call_tokens, args.rounds, args.phase_s,
        threads, args.seed,
    )  # fmt: skip


def _lines(results: dict[str, Any]) -> list[list[str]]:
    lines = []
    for name, found in results.items():
        if name != "restart":
            lines += _resize_lines(name.replace("_", " "), found)
    if "restart" in results:
        lines += _restart_lines(results["restart"])
    return lines


def _resize_lines(label: str, found: dict[str, Any]) -> list[list[str]]:
    phases = found["phases"]

    def longest(*kinds: str) -> str:
        return "  ".join(f"{kind} {phases[kind]['took_ms']['max']:.1f}" for kind in kinds) + " ms"

    def usual(*kinds: str) -> str:
        return "  ".join(f"{kind} {phases[kind]['took_ms']['p99.9']:.2f}" for kind in kinds) + " ms"

    def beyond(*kinds: str) -> str:
        return "  ".join(f"{kind} {phases[kind]['calls_beyond_bar_per_s']:.2f}" for kind in kinds)

    return [
        [f"{label}: longest call", longest(SHRINK, GROW), longest(QUIET, BUSY), "<= 50 ms"],
        ["  p99.9", usual(SHRINK, GROW), usual(QUIET, BUSY), ""],
        ["  longer than 50 ms, in a second", beyond(SHRINK, GROW), beyond(QUIET, BUSY), ""],
        ["  records moved, and read anew", f"{found['records_moved']:,}, {found['records_read']:,}", "", ""],
    ]


def _restart_lines(found: dict[str, Any]) -> list[list[str]]:
    after, killed = found["after_restart"], found["killed_while_refilling"]
    return [
        ["hit rate after a restart", f"{after['hit_rate']:.4f}", f"{found['hit_rate_undisturbed']:.4f}",
         "within 0.01"],
        ["read to get there, of the budget", f"{after['bytes_read_over_budget']:.3f}", "", "<= 1.1"],
        ["first look-up after", f"{after['first_lookup_s']:.2f} s", "", ""],
        ["refilled after", f"{after['refilled_s']:.2f} s", "", ""],
        ["kill -9 at, of records", f"{killed['records_restored_when_killed']:,}",
         f"{after['records_restored']:,}", ""],
        ["records at the next start", f"{killed['records_restored_next']:,}", "", "all"],
        ["rows compared, wrong", f"{killed['rows_compared']:,}, {killed['rows_wrong']}", "", "0 wrong"],
    ]  # fmt: skip
