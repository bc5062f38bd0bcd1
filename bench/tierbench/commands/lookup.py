"""Measure DRAM hits in this process beside torch.index_select on a resident table.

Records of 8 x 264 B and single rows of 264 B, through the arena itself and through the public API; what two
threads do against one; and beside them numpy, also from a mapped file, LMDB and EngramDB. Every record that
is asked for is there; a miss ends the run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from engram_client.errors import BadRequest
from tierbench.beside import ENGRAMDB, Beside
from tierbench.delivery import (
    add_common_arguments,
    deliver,
    latency_row,
    rate_row,
)
from tierbench.filled_arena import FilledArena, filled_arena
from tierbench.hits import Callers, WarmTable, arena_figures, latency, row_batches, scaling, throughput
from tierbench.options import byte_size, count, count_list, fraction
from tierbench.prepared import prepared_table
from tierbench.progress import stage
from tierbench.resident import HugePageBytes, huge_page_bytes, resident_rows
from tierbench.yardsticks.index_select import index_select_steps

ROW_BYTES, HEADS, ORDERS, LAYERS = 264, 8, 3, 2  # V4.1: a token has 2 x 3 records of 8 rows
RECORDS_A_TOKEN = ORDERS * LAYERS
ROWS_A_TOKEN = RECORDS_A_TOKEN * HEADS
BATCHES_MAX = 64
UNLIKE_PAGES = 0.1  # difference in the share of huge pages that is worth a word
BESIDE = ("numpy", "LMDB", "EngramDB")
BARS = {"records": ">= 1.8", "rows": ">= 0.9", "token": "p50 <= 5 us"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, windows=10, window_s=0.3)
    add = parser.add_argument
    add("--arena-bytes", type=byte_size, default=4 << 30, metavar="BYTES",
        help="of each arena, and of the resident table (default: 4GiB)")  # fmt: skip
    add("--fill", type=fraction, default=0.8, help="share of the slots that is taken (default: %(default)s)")
    add("--threads", type=count_list, default=(1, 2), metavar="N[,N]", help="default: 1,2")
    add("--tokens", type=count, default=512, metavar="N", help="tokens in a batch (default: %(default)s)")
    add("--warm-tokens", type=count, default=8192, metavar="N",
        help="tokens that are warm in the store behind the API (default: %(default)s)")  # fmt: skip
    add("--engramdb-bytes", type=byte_size, default=1 << 30, metavar="BYTES",
        help="of the resident table in files, for numpy.memmap and EngramDB (default: 1GiB)")  # fmt: skip
    add(
        "--lmdb-rows",
        type=count,
        default=200_000,
        metavar="N",
        help="of it that LMDB holds (default: 200000)",
    )
    add("--rows-per-head", type=count, default=1_000_000, metavar="N", help="of that store's table")


def run(args: argparse.Namespace) -> int:
    if not 0 < args.fill <= 1 or args.warm_tokens < args.tokens:
        raise BadRequest("--fill lies in (0, 1], and --warm-tokens is at least --tokens")
    prepared = prepared_table(args.dir, args.rows_per_head)
    rows = max(1, int(args.arena_bytes * args.fill) // ROW_BYTES)
    with stage("filling memory with the resident table"):
        resident = resident_rows(rows, ROW_BYTES, args.seed)
    ids = row_batches(resident, BATCHES_MAX, args.tokens * ROWS_A_TOKEN, args.seed)
    beside = Beside(resident, ids, args.dir / "beside-scratch", args.engramdb_bytes, args.lmdb_rows)
    try:
        results: dict[str, Any] = {
            "resident_bytes": resident.nbytes,
            "resident_huge_page_bytes": huge_page_bytes().anonymous,
            "rows_a_batch": args.tokens * ROWS_A_TOKEN,
            "engramdb": beside.told(),
            "records": _arena(args, resident, ids, beside, HEADS * ROW_BYTES, RECORDS_A_TOKEN, HEADS),
            "rows": _arena(args, resident, ids, beside, ROW_BYTES, 1, 1),
        }
        results["api"] = _api(args, resident, ids, beside, prepared.store)
    finally:
        beside.close()
    return deliver("lookup", args, results, _lines(results))


def _batch(
    args: argparse.Namespace,
    ours: Callers,
    resident: np.ndarray,
    ids: np.ndarray,
    beside: Beside,
    rows_per_record: int,
    label: str,
) -> dict[str, Any]:
    """Rates by number of threads, and how they scale with it."""
    pace = {"windows": args.windows, "window_s": args.window_s, "label": label}
    found = {
        "batch": throughput(
            ours,
            resident,
            ids,
            beside=lambda count: beside.contenders(count, rows_per_record),
            threads=args.threads,
            **pace,
        )
    }
    if max(args.threads) > 1:
        found["scaling"] = scaling(ours, resident, ids, threads=max(args.threads), **pace)
    return found


def _arena(
    args: argparse.Namespace,
    resident: np.ndarray,
    ids: np.ndarray,
    beside: Beside,
    record_bytes: int,
    orders: int,
    rows_per_record: int,
) -> dict[str, Any]:
    """Throughput of a batch and latency of one token, straight from an arena."""
    with stage("filling an arena"):
        filled = filled_arena(args.arena_bytes, record_bytes, orders, args.fill, args.seed)
    records = args.tokens * ROWS_A_TOKEN // rows_per_record
    batches = filled.batches(records // orders, BATCHES_MAX)
    filled.check(batches[0])
    found = _batch(
        args,
        lambda caller: filled.step(batches, rows_per_record, caller * len(batches) // 2),
        resident,
        ids,
        beside,
        rows_per_record,
        f"records of {record_bytes} bytes",
    )
    token = _token(args, resident, filled, rows_per_record)
    huge = huge_page_bytes()
    filled.arena.close()
    _say_unlike_pages(huge, resident.nbytes, filled.arena.geometry.total_bytes)
    return {**arena_figures(filled), "huge_page_bytes": huge.shared, **found, "token": token}


def _say_unlike_pages(huge: HugePageBytes, resident_bytes: int, arena_bytes: int) -> None:
    """The bars hold for one page size on both sides."""
    table, arena = huge.anonymous / resident_bytes, huge.shared / arena_bytes
    if abs(table - arena) > UNLIKE_PAGES:
        print(
            f"page sizes differ: huge pages hold {arena:.0%} of the arena and {table:.0%} of the resident "
            "table, so the ratios tell of pages as well; run it where memory is not in pieces",
            file=sys.stderr,
        )


def _token(
    args: argparse.Namespace, resident: np.ndarray, filled: FilledArena, rows_per_record: int
) -> dict[str, Any]:
    tokens = filled.batches(ROWS_A_TOKEN // rows_per_record // filled.orders, 1 << 16)
    ids = row_batches(resident, len(tokens), ROWS_A_TOKEN, args.seed)
    contenders = {"ours": filled.step(tokens, rows_per_record), **index_select_steps(resident, ids)}
    return latency(contenders, args.windows, "one token")


def _api(
    args: argparse.Namespace, resident: np.ndarray, ids: np.ndarray, beside: Beside, store: Path
) -> dict[str, Any]:
    """The same through `Table.lookup_ngrams_into`: checks, counters and all."""
    entries = args.tokens * LAYERS
    warm = WarmTable(store, args.arena_bytes, args.warm_tokens * LAYERS, args.seed)
    try:
        before, batches = warm.misses(), len(warm.keys) // entries
        found = _batch(
            args,
            lambda caller: warm.step(entries, caller * batches // 2),
            resident,
            ids,
            beside,
            HEADS,
            "the API",
        )
        token_ids = row_batches(resident, len(warm.keys), ROWS_A_TOKEN, args.seed)
        contenders = {"ours": warm.step(LAYERS), **index_select_steps(resident, token_ids)}
        token = latency(contenders, args.windows, "one token through the API")
        misses, huge = warm.misses() - before, huge_page_bytes()
    finally:
        warm.close()
    return {
        "warm_records": int(warm.keys.size),
        "misses": misses,
        "huge_page_bytes": huge.shared,
        **found,
        "token": token,
    }


def _lines(results: dict[str, Any]) -> list[list[str]]:
    lines = []
    for kind, label in (
        ("records", "records of 8 x 264 B"),
        ("rows", "rows of 264 B"),
        ("api", "records, API"),
    ):
        told = results[kind]
        for threads, found in told["batch"].items():
            name = f"{label}, {threads.replace('_', ' ')}"
            lines.append(rate_row(name, found, BARS["rows" if kind == "rows" else "records"]))
            lines += [_beside_line(found, name) for name in found["medians"] if name.startswith(BESIDE)]
        if "scaling" in told:
            scaled = told["scaling"]
            lines.append(
                rate_row(f"{label}, {scaled['threads']} threads against one", scaled["ours"], _bar(scaled))
            )
        ours, *others = told["token"].values()
        best = min(others, key=lambda found: found["p50"])
        lines.append(latency_row(f"{label}, one token", ours, best, BARS["token"]))
    if results["engramdb"]["version"] is None:
        lines.append([ENGRAMDB, "", results["engramdb"]["note"], "", "", ""])
    return lines


def _beside_line(found: dict[str, Any], name: str) -> list[str]:
    ours, other = float(np.median(found["ours"])), found["medians"][name]
    return ["", "", f"{other / 1e6:,.2f} M rows/s\n{name}", f"{ours / other:.2f}", "", ""]


def _bar(scaled: dict[str, Any]) -> str:
    """Within 20 % of as many times one thread's rate."""
    return f">= {0.8 * scaled['threads']:.1f}"
