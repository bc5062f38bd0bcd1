"""Soak a daemon: a table larger than this machine's memory, a small DRAM budget, minutes of look-ups.

The table (V4.1's layout, made in shards and packed with --consume, so that it never lies on the disk twice)
is served by `tierstore serve`. Callers in processes of their own look up the n-grams of real text, with
uniformly random ones among them that nobody has asked for before, as fast as they are answered. Once a second
the daemon's memory is noted: resident pages, which include the whole arena; the kernel's own record of
the peak is in it too. The bar is the DRAM budget and 300 MiB. Rows of a sample of calls are compared with
what they must be.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from engram_client import Client, connect
from engram_client.errors import Unavailable
from tierbench.consumed import consumed_table
from tierbench.daemon import Daemon, running_daemon
from tierbench.delivery import add_delivery_arguments, deliver
from tierbench.machine import describe_machine
from tierbench.options import byte_size, count, not_negative, positive, whole
from tierbench.prepared import PreparedTable
from tierbench.process_memory import ProcessMemory, maps_library, proportional_bytes
from tierbench.progress import clock
from tierbench.record import summarize
from tierbench.sharded import ShardedTable
from tierbench.soak_caller import WAIT_S, Caller, Calls, run_caller
from tierbench.text_keys import text_keys
from tierbench.yardsticks.memmap import forget_cached_pages
from tierstore.format.rowfile import RowFile

PARTS = 10  # of the run, each with figures of its own
SPARE_BYTES = 300 << 20  # beyond the DRAM budget: the interpreter, staging, indices of everything else
MIB = 1 << 20


@dataclass(frozen=True)
class Look:
    """The daemon at one moment, `at_s` seconds after the callers were started."""

    at_s: float
    memory: ProcessMemory
    stats: dict[str, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_delivery_arguments(parser)
    add = parser.add_argument
    add("--rows-per-head", type=count, default=4_760_000, metavar="N",
        help="of the table, which has 24 heads (default: %(default)s, 28 GiB)")  # fmt: skip
    add(
        "--shards", type=count, default=16, metavar="N", help="files of the checkpoint (default: %(default)s)"
    )
    add("--dram-bytes", type=byte_size, default=1 << 30, metavar="BYTES", help="budget (default: 1GiB)")
    add("--duration-s", type=positive, default=600.0, metavar="S", help="of the calls (default: %(default)s)")
    add("--callers", type=count, default=2, metavar="N", help="processes that call (default: %(default)s)")
    add("--text-tokens", type=count, default=448, metavar="N", help="of one call (default: %(default)s)")
    add("--tokens", type=count, metavar="N", help="of all text, which begins anew after them (default: all)")
    add("--cold-tokens", type=whole, default=64, metavar="N", help="random ones more (default: %(default)s)")
    add("--check-period-s", type=positive, default=2.0, metavar="S",
        help="between two calls of which a token's rows are checked (default: %(default)s)")  # fmt: skip
    add("--look-period-s", type=positive, default=1.0, metavar="S",
        help="between two looks at the daemon's memory (default: %(default)s)")  # fmt: skip
    add("--snapshot-period-s", type=not_negative, default=120.0, metavar="S",
        help="the daemon's dram.snapshot_period_s (default: %(default)s)")  # fmt: skip
    add("--seed", type=whole, default=0, help="of the random keys (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    table = ShardedTable(args.rows_per_head, args.shards)
    prepared, packing = consumed_table(args.dir, table)
    keys_file = args.dir / f"text-keys-{args.rows_per_head}-{args.tokens or 'all'}.npy"
    if not keys_file.exists():
        np.save(keys_file, text_keys(args.dir, prepared.spec, args.tokens))
    shutil.rmtree(prepared.store / "warm", ignore_errors=True)  # of an earlier run: this one starts cold
    results: dict[str, Any] = {
        "table": _table_told(prepared),
        "packing": packing,
        "row_file_open_s": _row_file_open_s(prepared),
    }
    settings = {"dram.snapshot_period_s": args.snapshot_period_s}
    started = time.perf_counter()
    with running_daemon(prepared.store, dram_bytes=args.dram_bytes, settings=settings) as daemon:
        results["daemon_ready_s"] = time.perf_counter() - started
        with connect(daemon.unix, wait_s=WAIT_S) as client:
            looks, calls = _soak(args, table, keys_file, daemon, client)
        results["memory"] = _memory_told(args.dram_bytes, daemon, looks)
    results |= _calls_told(args, calls, looks)
    code = deliver("soak", args, results, _lines(results), ("", "found", "bar"))
    return 1 if results["rows_wrong"] or not results["memory"]["within"] else code


def _table_told(prepared: PreparedTable) -> dict[str, Any]:
    spec, machine_bytes = prepared.spec, describe_machine(prepared.store)["memory_bytes"]
    row_bytes = spec.rows * spec.row_bytes
    return {
        "rows": spec.rows,
        "row_bytes": spec.row_bytes,
        "bytes_of_rows": row_bytes,
        "row_file_bytes": prepared.row_file.stat().st_size,
        "times_machine_memory": row_bytes / machine_bytes,
    }


def _row_file_open_s(prepared: PreparedTable) -> float:
    """How long it takes to open and check the row file when nothing of it is in memory."""
    forget_cached_pages(prepared.row_file)
    started = time.perf_counter()
    RowFile.open(prepared.row_file)
    return time.perf_counter() - started


def _soak(
    args: argparse.Namespace, table: ShardedTable, keys_file: Path, daemon: Daemon, client: Client
) -> tuple[list[Look], list[Calls]]:
    """Start the callers, look at the daemon until they are done."""
    spawn = multiprocessing.get_context("spawn")
    tokens = len(np.load(keys_file, mmap_mode="r"))
    running = []
    for i in range(args.callers):
        caller = Caller(
            daemon.unix, table, keys_file, tokens * i // args.callers, args.text_tokens, args.cold_tokens,
            args.duration_s, args.check_period_s, args.seed * 1000 + i,
        )  # fmt: skip
        ours, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(target=run_caller, args=(caller, theirs), daemon=True)
        process.start()
        theirs.close()  # so that a caller that dies is noticed
        running.append((process, ours))
    started, looks = time.perf_counter(), []
    with clock(f"{args.callers} callers look up", args.duration_s):
        while any(process.is_alive() and not ours.poll() for process, ours in running):
            at_s = time.perf_counter() - started
            looks.append(Look(at_s, ProcessMemory.of(daemon.process.pid), client.stats()))
            time.sleep(max(0.0, args.look_period_s - (time.perf_counter() - started - at_s)))
    return looks, [_received(process, ours) for process, ours in running]


def _received(process: Any, ours: Any) -> Calls:
    try:
        calls: Calls = ours.recv()
    except EOFError as error:
        raise Unavailable(f"a caller died with exit code {process.exitcode}; see above") from error
    process.join()
    return calls


def _memory_told(dram_bytes: int, daemon: Daemon, looks: list[Look]) -> dict[str, Any]:
    pid, bound = daemon.process.pid, dram_bytes + SPARE_BYTES
    # The kernel notes the peak now and then only, so a look can see a little more.
    peak = max(ProcessMemory.of(pid).peak, *(look.memory.resident for look in looks))
    return {
        "bound_bytes": bound,
        "peak_bytes": peak,
        "within": peak <= bound,
        "resident_bytes": summarize([look.memory.resident for look in looks]),
        "private_bytes_max": max(look.memory.private for look in looks),
        "shared_bytes_max": max(look.memory.shared for look in looks),
        "private_bytes_by_part": [max(k.memory.private for k in part) for part in _parts(looks)],
        "resident_bytes_by_part": [max(k.memory.resident for k in part) for part in _parts(looks)],
        "proportional_bytes_at_end": proportional_bytes(pid),
        "has_torch": maps_library(pid, "libtorch"),
        "looks": len(looks),
    }


def _parts(looks: list[Look]) -> list[list[Look]]:
    """Consecutive looks in at most PARTS parts, none of them empty."""
    edges = np.linspace(0, len(looks), min(PARTS, len(looks)) + 1).astype(int).tolist()
    return [looks[a:b] for a, b in pairwise(edges)]


def _calls_told(args: argparse.Namespace, calls: list[Calls], looks: list[Look]) -> dict[str, Any]:
    ended_s = np.concatenate([c.ended_s for c in calls])
    took_ms = np.concatenate([c.took_s for c in calls]) * 1e3
    tokens = args.text_tokens + args.cold_tokens
    edges = np.linspace(0, args.duration_s, PARTS + 1)
    parts = []
    for a, b in pairwise(edges.tolist()):
        chosen = took_ms[(ended_s >= a) & (ended_s < b)]
        if chosen.size:
            parts.append({"tokens_per_s": chosen.size * tokens / (b - a), "took_ms": summarize(chosen)})
    failures = sum((c.failures for c in calls), start=Counter[str]())
    return {
        "tokens_a_call": tokens,
        "tokens": int(took_ms.size * tokens),
        "took_ms": summarize(took_ms),
        "by_part": parts,
        "reading_by_part": [_reading(*pair) for pair in pairwise(_edges(looks))],
        "reading": _reading(looks[0], looks[-1]),
        "rows_checked": sum(c.rows_checked for c in calls),
        "rows_wrong": sum(c.rows_wrong for c in calls),
        "failures": dict(failures),
        "stats_at_end": looks[-1].stats,
    }


def _edges(looks: list[Look]) -> list[Look]:
    """The first look, and the last of every part."""
    return [looks[0], *(part[-1] for part in _parts(looks))]


def _reading(a: Look, b: Look) -> dict[str, float]:
    """What the daemon did between two looks."""
    took_s = max(1e-9, b.at_s - a.at_s)
    hits, misses, read, nvme, evicted = (
        b.stats[name] - a.stats[name]
        for name in ("dram_hits", "dram_misses", "records_read", "nvme_bytes", "records_evicted")
    )
    return {
        "hit_rate": hits / max(1, hits + misses),
        "records_per_s": (hits + misses) / took_s,
        "records_read_per_s": read / took_s,
        "nvme_bytes_per_s": nvme / took_s,
        "records_evicted_per_s": evicted / took_s,
    }


def _lines(results: dict[str, Any]) -> list[list[str]]:
    table, memory, reading = results["table"], results["memory"], results["reading"]
    packing = results["packing"]
    beyond = packing["disk_bytes_taken_beyond_source_max"]
    peak, bound = memory["peak_bytes"] / MIB, memory["bound_bytes"] / MIB
    p50s = [part["took_ms"]["p50"] for part in results["by_part"]]
    return [
        ["rows, of machine memory", f"{table['rows']:,}, {table['times_machine_memory']:.2f} x", "> 1"],
        ["packed", f"{packing['duration_s']:,.0f} s, {beyond / 1e9:,.1f} GB beside the source", ""],
        ["opening the row file, cold", f"{results['row_file_open_s'] * 1e3:,.1f} ms", "< 2000 ms"],
        ["starting the daemon", f"{results['daemon_ready_s']:,.2f} s", ""],
        ["peak memory", f"{peak:,.0f} MiB", f"<= {bound:,.0f} MiB"],
        ["tokens looked up", f"{results['tokens']:,}", ""],
        ["hit rate", f"{reading['hit_rate']:.3f}", ""],
        ["records read from NVMe", f"{reading['records_read_per_s']:,.0f} /s", ""],
        ["a call", f"p50 {results['took_ms']['p50']:,.1f}  p99 {results['took_ms']['p99']:,.1f} ms", ""],
        ["p50 of a call by part", " ".join(f"{p50:,.0f}" for p50 in p50s) + " ms", ""],
        ["rows checked, wrong", f"{results['rows_checked']:,}, {results['rows_wrong']}", "0 wrong"],
        ["failed calls", f"{sum(results['failures'].values())}", "0"],
    ]
