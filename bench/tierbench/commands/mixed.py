"""Measure a mixed run against its hits and its misses alone, and hits beside misses on a slow disk.

First: a real trace (the standard library's sources) in a store with a DRAM budget that is a share of the
table. bench/tierbench/separate_costs.py says how hits and misses are timed apart. The bar is 1.15.

Second: one thread looks up what is in DRAM, one token or one batch a call, while another thread of the same
store misses without a pause. The disk is the real one, or one where every read begins so many milliseconds
late. The bar is that the slow disk does not slow the hits; `quiet` is the same without the second thread.
A call that finds one of its records evicted is no hit: it is left out and counted.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from engram_client.errors import BadRequest
from tierbench.alternate import alternate
from tierbench.delivery import add_common_arguments, deliver
from tierbench.hits_beside import HotCalls, meanwhile
from tierbench.late_reader import late
from tierbench.options import byte_size, count, fraction, not_negative
from tierbench.prepared import PreparedTable, prepared_table
from tierbench.record import compare, summarize
from tierbench.separate_costs import Separated, separate
from tierbench.text_keys import text_keys
from tierbench.timed_store import TimedStore, linked_store
from tierstore.config import Config, Dram
from tierstore.devices.base import PageReader
from tierstore.store.store import MakeReader, configured_reader

ROLES = ("mixed", "hits", "misses")
QUIET, FAST, SLOW = "quiet", "fast", "slow"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, windows=20, window_s=0.5)
    add = parser.add_argument
    add(
        "--rows-per-head",
        type=count,
        default=250_000,
        metavar="N",
        help="of the table (default: %(default)s)",
    )
    add("--tokens", type=count, default=100_000, metavar="N", help="of the trace (default: %(default)s)")
    add("--warm-share", type=fraction, default=0.4,
        help="of the trace, looked up before anything is timed (default: %(default)s)")  # fmt: skip
    add("--dram-share", type=fraction, default=0.1, help="of the table's bytes (default: %(default)s)")
    add("--batch-tokens", type=count, default=512, metavar="N", help="of one look-up (default: %(default)s)")
    add("--hot-bytes", type=byte_size, default=256 << 20, metavar="BYTES",
        help="DRAM budget of the second part (default: 256MiB)")  # fmt: skip
    add("--miss-tokens", type=count, default=64, metavar="N",
        help="of one look-up of the thread that misses (default: %(default)s)")  # fmt: skip
    add(
        "--latency-ms",
        type=not_negative,
        default=20.0,
        metavar="MS",
        help="of the slow disk (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    prepared = prepared_table(args.dir, args.rows_per_head)
    if int(args.tokens * (1 - args.warm_share)) // args.batch_tokens < args.windows:
        raise BadRequest("--tokens leaves less than a batch for each window; raise it or lower --windows")
    scratch = args.dir / "mixed-scratch"
    try:
        windows = _separated(args, prepared, scratch)
        results = {"trace": _told(windows), "beside_misses": _beside_misses(args, prepared, scratch)}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return deliver("mixed", args, results, _lines(results), ("", "found", "yardstick", "ratio", "bar"))


def _separated(args: argparse.Namespace, prepared: PreparedTable, scratch: Path) -> list[Separated]:
    keys = text_keys(args.dir, prepared.spec, args.tokens)
    budget = int(args.dram_share * prepared.spec.rows * prepared.spec.row_bytes)
    config = Config(dram=Dram(budget_bytes=budget, snapshot_period_s=0))
    stores = {
        role: TimedStore(linked_store(prepared, scratch / role), config, tokens_max=args.batch_tokens)
        for role in ROLES
    }
    try:
        warm = int(args.tokens * args.warm_share)
        for store in stores.values():
            store.make_warm(keys[:warm])
        batches = [
            keys[start : start + args.batch_tokens]
            for start in range(warm, len(keys) - args.batch_tokens + 1, args.batch_tokens)
        ]
        edges = np.linspace(0, len(batches), args.windows + 1).astype(int)
        return [
            separate(**stores, batches=batches[a:b], seed=args.seed * 1000 + i)
            for i, (a, b) in enumerate(pairwise(edges.tolist()))
        ]
    finally:
        for store in stores.values():
            store.close()


def _told(windows: list[Separated]) -> dict[str, Any]:
    hits, misses = sum(w.hits for w in windows), sum(w.misses for w in windows)
    return {
        "mixed_over_separate": compare([w.mixed_s for w in windows], [w.separate_s for w in windows]),
        "mixed_over_separate_in_all": sum(w.mixed_s for w in windows) / sum(w.separate_s for w in windows),
        "hit_entries": hits,
        "missing_records": misses,
        "us_per_hit_alone": sum(w.hits_s for w in windows) / max(1, hits) * 1e6,
        "us_per_miss_alone": sum(w.misses_s for w in windows) / max(1, misses) * 1e6,
        "hit_rate_of_hits_alone": float(np.median([w.hit_again for w in windows])),
    }


def _late(latency_s: float, config: Config) -> PageReader:
    return late(configured_reader(config), latency_s)


def _beside_misses(args: argparse.Namespace, prepared: PreparedTable, scratch: Path) -> dict[str, Any]:
    config = Config(dram=Dram(budget_bytes=args.hot_bytes, snapshot_period_s=0))
    makers: dict[str, MakeReader] = {FAST: configured_reader, SLOW: partial(_late, args.latency_ms / 1e3)}
    tokens = max(args.batch_tokens, args.miss_tokens)
    stores = {
        disk: TimedStore(
            linked_store(prepared, scratch / disk), config, tokens_max=tokens, make_reader=make_reader
        )
        for disk, make_reader in makers.items()
    }
    try:
        hot = _random_keys(stores[FAST], 4 * args.batch_tokens, args.seed)
        for store in stores.values():
            store.make_warm(hot)
        return {
            kind: _hits(args, stores, hot, tokens_a_call)
            for kind, tokens_a_call in (("token", 1), ("batch", args.batch_tokens))
        }
    finally:
        for store in stores.values():
            store.close()


def _random_keys(store: TimedStore, tokens: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**63 - 1, (tokens, store.orders), np.int64)


def _hits(
    args: argparse.Namespace, stores: dict[str, TimedStore], hot: np.ndarray, tokens: int
) -> dict[str, Any]:
    """Hits with nothing beside them, with misses on the fast disk and on the slow one, in turn."""
    calls = {disk: HotCalls(store.store, hot, tokens) for disk, store in stores.items()}
    random = np.random.default_rng(args.seed + tokens)
    missed = dict.fromkeys(stores, 0)

    def beside(disk: str) -> np.ndarray:
        store = stores[disk]
        store.make_warm(hot)

        def miss() -> None:
            cold = random.integers(0, 2**63 - 1, (args.miss_tokens, store.orders), np.int64)
            store.look_up(cold)
            missed[disk] += cold.size

        with meanwhile(miss):
            return calls[disk].taken_us(args.window_s)

    def quiet() -> np.ndarray:
        stores[FAST].make_warm(hot)
        return calls[FAST].taken_us(args.window_s)

    contenders: dict[str, Callable[[], np.ndarray]] = {
        QUIET: quiet,
        FAST: partial(beside, FAST),
        SLOW: partial(beside, SLOW),
    }
    samples = alternate(args.windows, contenders, f"hits beside misses, {tokens} tokens a call")
    p50, p99 = (
        {name: [float(np.percentile(w, p)) for w in windows] for name, windows in samples.items()}
        for p in (50, 99)
    )
    return {
        "tokens_a_call": tokens,
        "p50_slow_over_fast": compare(p50[SLOW], p50[FAST]),
        "p99_slow_over_fast": compare(p99[SLOW], p99[FAST]),
        "taken_us": {name: summarize(np.concatenate(windows)) for name, windows in samples.items()},
        "calls_that_were_no_hits": {disk: found.no_hits for disk, found in calls.items()},
        "records_missed_beside": missed,
    }


def _lines(results: dict[str, Any]) -> list[list[str]]:
    trace = results["trace"]
    ratio = trace["mixed_over_separate"]
    ours, separate_s = sum(ratio["ours"]), sum(ratio["yardstick"])
    spread = f"{ratio['ratio_min']:.2f} to {ratio['ratio_max']:.2f}"
    each_hit, each_miss = trace["us_per_hit_alone"], trace["us_per_miss_alone"]
    shown = f"{ratio['ratio_median']:.2f}\n{spread}"
    lines = [
        ["mixed, hits and misses apart", f"{ours:.2f} s", f"{separate_s:.2f} s", shown, "<= 1.15"],
        ["  entries that hit", f"{trace['hit_entries']:,}", f"{each_hit:.2f} us each", "", ""],
        ["  records missed", f"{trace['missing_records']:,}", f"{each_miss:.1f} us each", "", ""],
    ]
    for found in results["beside_misses"].values():
        for p in ("p50", "p99"):
            slow, fast, quiet = (found["taken_us"][name][p] for name in (SLOW, FAST, QUIET))
            lines.append(
                [
                    f"hits of {found['tokens_a_call']} tokens, {p}, slow disk",
                    f"{slow:,.1f} us",
                    f"fast {fast:,.1f} us\nquiet {quiet:,.1f} us",
                    f"{found[f'{p}_slow_over_fast']['ratio_median']:.2f}",
                    "no slower",
                ]
            )
    return lines
