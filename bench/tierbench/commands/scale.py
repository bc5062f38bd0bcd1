"""Measure what a look-up costs in a table of 100 M rows against one of 1 M rows, at the same hit rate.

Both tables have V4.1's layout and are opened in this process with the same DRAM budget; the same random
keys are read into both until the same share of their arenas is taken. Then both are asked the same in turn:
only hits, one token a call and a batch a call; nine tenths hits and one tenth keys that nobody has asked
for; and nothing but such keys. The bar is 1.3 where records hit. Without hits what is compared is the disk:
on a small file the pages of a batch lie close together, and its host may have it cached.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from engram_client.errors import BadRequest
from tierbench.alternate import alternate
from tierbench.consumed import consumed_table
from tierbench.delivery import add_common_arguments, deliver
from tierbench.hits_beside import HotCalls
from tierbench.options import byte_size, count, fraction
from tierbench.progress import stage
from tierbench.record import compare, summarize
from tierbench.sharded import ShardedTable
from tierbench.timed_store import TimedStore, linked_store
from tierstore.config import Config, Dram

LARGE, SMALL = "large", "small"
BAR = 1.3
MIXES = {"hits": 1.0, "hits_and_misses": 0.9, "misses": 0.0}  # share of the tokens that are known


@dataclass(frozen=True)
class Cost:
    """One window."""

    us_per_token: float
    hit_rate: float  # of records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, windows=15, window_s=0.5)
    add = parser.add_argument
    add("--rows-per-head", type=count, default=4_760_000, metavar="N",
        help="of the large table, which has 24 heads (default: %(default)s)")  # fmt: skip
    add(
        "--shards", type=count, default=16, metavar="N", help="files of its checkpoint (default: %(default)s)"
    )
    add("--small-rows-per-head", type=count, default=41_667, metavar="N",
        help="of the small table (default: %(default)s, 1 M rows)")  # fmt: skip
    add("--dram-bytes", type=byte_size, default=1 << 30, metavar="BYTES", help="each (default: 1GiB)")
    add("--fill", type=fraction, default=0.8, help="share of the slots that is taken (default: %(default)s)")
    add("--batch-tokens", type=count, default=512, metavar="N", help="of one look-up (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    if not 0 < args.fill <= 1:
        raise BadRequest(f"--fill lies in (0, 1], got {args.fill}")
    tables = {
        LARGE: ShardedTable(args.rows_per_head, args.shards),
        SMALL: ShardedTable(args.small_rows_per_head, 1),
    }
    scratch = args.dir / "scale-scratch"
    config = Config(dram=Dram(budget_bytes=args.dram_bytes, snapshot_period_s=0))
    stores: dict[str, TimedStore] = {}
    try:
        for name, table in tables.items():
            folder = linked_store(consumed_table(args.dir, table)[0], scratch / name)
            stores[name] = TimedStore(folder, config, tokens_max=args.batch_tokens)
        results = _measure(args, stores)
    finally:
        for store in stores.values():
            store.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return deliver("scale", args, results, _lines(results), ("", LARGE, SMALL, "ratio", "spread", "bar"))


def _measure(args: argparse.Namespace, stores: dict[str, TimedStore]) -> dict[str, Any]:
    known = _warm(args, stores)
    results: dict[str, Any] = {
        "rows": {name: store.spec.rows for name, store in stores.items()},
        "fill": {name: _fill(store) for name, store in stores.items()},
        "known_tokens": len(known),
        "token": _token(args, stores, known),
    }
    seeds = itertools.count(1)
    for mix, share in MIXES.items():
        contenders: dict[str, Callable[[], Cost]] = {
            name: partial(_window, args, store, known, share, seeds) for name, store in stores.items()
        }
        results[mix] = _told(alternate(args.windows, contenders, mix.replace("_", " ")))
    return results


def _warm(args: argparse.Namespace, stores: dict[str, TimedStore]) -> np.ndarray:
    """Fill both arenas with the same records; int64 [n, orders], those that both hold whole."""
    capacity = min(store.store.stats()["dram_capacity_records"] for store in stores.values())
    orders = stores[LARGE].orders
    tokens = max(args.batch_tokens, int(capacity * args.fill) // orders)
    known = np.random.default_rng(args.seed).integers(0, 2**63 - 1, (tokens, orders), np.int64)
    with stage("filling DRAM"):
        for store in stores.values():
            store.make_warm(known)
        for store in stores.values():
            known = store.whole_tokens(known)
    if len(known) < args.batch_tokens:
        raise BadRequest(
            f"{len(known)} tokens stayed in DRAM, a batch has {args.batch_tokens}; raise --dram-bytes"
        )
    return known


def _fill(store: TimedStore) -> float:
    stats = store.store.stats()
    return (stats["records_admitted"] - stats["records_evicted"]) / stats["dram_capacity_records"]


def _token(args: argparse.Namespace, stores: dict[str, TimedStore], known: np.ndarray) -> dict[str, Any]:
    """One token a call, all of them hits."""
    calls = {name: HotCalls(store.store, known[: 1 << 14], 1) for name, store in stores.items()}
    contenders = {name: partial(found.taken_us, args.window_s) for name, found in calls.items()}
    samples = alternate(args.windows, contenders, "one token")
    p50s = {name: [float(np.median(w)) for w in windows] for name, windows in samples.items()}
    return {
        "us_per_token": compare(p50s[LARGE], p50s[SMALL]),
        "taken_us": {name: summarize(np.concatenate(windows)) for name, windows in samples.items()},
        "calls_that_were_no_hits": {name: found.no_hits for name, found in calls.items()},
    }


def _window(
    args: argparse.Namespace, store: TimedStore, known: np.ndarray, share: float, seeds: Iterator[int]
) -> Cost:
    """Batches of which so large a share is known; known tokens are taken in turn from a random place on."""
    random = np.random.default_rng([args.seed, next(seeds)])  # what is fresh must not have been seen
    hot = round(args.batch_tokens * share)
    at = int(random.integers(len(known)))
    took_s, tokens, missed = 0.0, 0, 0
    until = time.perf_counter() + args.window_s
    while not tokens or time.perf_counter() < until:
        chosen = known[(at + np.arange(hot)) % len(known)]
        fresh = random.integers(0, 2**63 - 1, (args.batch_tokens - hot, store.orders), np.int64)
        batch_s, misses = store.look_up(random.permutation(np.concatenate([chosen, fresh])))
        took_s, missed = took_s + batch_s, missed + misses.size
        tokens, at = tokens + args.batch_tokens, at + hot
    return Cost(took_s / tokens * 1e6, 1 - missed / (tokens * store.orders))


def _told(samples: dict[str, list[Cost]]) -> dict[str, Any]:
    costs = {name: [cost.us_per_token for cost in windows] for name, windows in samples.items()}
    return {
        "us_per_token": compare(costs[LARGE], costs[SMALL]),
        "hit_rate": {name: summarize([c.hit_rate for c in windows]) for name, windows in samples.items()},
    }


def _lines(results: dict[str, Any]) -> list[list[str]]:
    lines = [["rows", *(f"{rows:,}" for rows in results["rows"].values()), "", "", ""]]
    for kind in ("token", *MIXES):
        ratio = results[kind]["us_per_token"]
        large, small = (float(np.median(ratio[side])) for side in ("ours", "yardstick"))
        rate = results[kind]["hit_rate"][LARGE]["p50"] if kind in MIXES else 1.0
        lines.append(
            [
                f"{kind.replace('_', ' ')}, hit rate {rate:.3f}",
                f"{large:,.2f} us a token",
                f"{small:,.2f} us a token",
                f"{ratio['ratio_median']:.2f}",
                f"{ratio['ratio_min']:.2f} to {ratio['ratio_max']:.2f}",
                f"<= {BAR}" if kind != "misses" else "",
            ]
        )
    return lines
