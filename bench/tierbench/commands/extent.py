"""Measure the record extent: reads and pages for a record that DRAM misses and that was seen before.

A real trace (the standard library's sources) is looked up in order in a packed table, with a DRAM budget
and an extent that are shares of the table, once with the extent and once without. What DRAM misses is looked
up in two calls, so that what is read for records that were seen before and for new ones is told apart.
*Reads* are read operations; a record whole in the extent is one, of one page or of two that lie side by
side. *Pages* are distinct 4096-byte pages. The bar is for reads.

How much a tenth of a table can hold depends on how long the trace is, so --tokens-per-row says it for
each row of a head: the default asks of a table of 250,000 rows a head what 24 M tokens would ask of the
real one with 16 M, and overwrites the extent nearly three times. What has been overwritten costs all its
pages again. So the figures are told by tenth of the trace, beside how often the ring had come round by
then, and until when the figure of all so far met the bar. *Clairvoyant* is what no extent of this
size could beat for these misses, whatever it keeps and drops: Belady's rule over DRAM and extent together.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np

from engram_client.deadline import Deadline
from engram_client.spec import TableSpec
from engram_client.transport.base import LookupRequest
from tierbench.delivery import add_delivery_arguments, deliver
from tierbench.options import count, fraction, positive
from tierbench.policy.bounds import belady
from tierbench.prepared import PreparedTable, prepared_table
from tierbench.progress import count_progress
from tierbench.text_keys import text_keys
from tierstore.config import Config, Dram, Extent
from tierstore.format.geometry import PAGE_BYTES
from tierstore.store import Store, open_store
from tierstore.tiers.extent_layout import ExtentGeometry

PARTS = 10  # of the trace, each with figures of its own
BAR = 1.3  # reads a missed record that was seen before


@dataclass(frozen=True)
class Spent:
    """Distinct records that DRAM missed, and what was spent on them."""

    missed: int = 0
    reads: int = 0
    pages: int = 0
    took_s: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Spent) -> Spent:
        return Spent(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def figures(self) -> dict[str, float]:
        each = max(1, self.missed)
        return {"reads": self.reads / each, "pages": self.pages / each, "us": self.took_s / each * 1e6}


@dataclass
class Tally:
    """What the trace cost so far."""

    seen: Spent = field(default_factory=Spent)
    new: Spent = field(default_factory=Spent)
    parts: list[dict[str, float]] = field(default_factory=list)  # of records seen before; times filled
    misses: list[np.ndarray] = field(default_factory=list)  # numbers of the records, in order
    bar_met_until: float = 0.0  # times filled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_delivery_arguments(parser)
    parser.set_defaults(seed=None)  # nothing is drawn: the trace is the text
    add = parser.add_argument
    add(
        "--rows-per-head",
        type=count,
        default=250_000,
        metavar="N",
        help="of the table (default: %(default)s)",
    )
    add("--tokens-per-row", type=positive, default=1.5, metavar="X",
        help="length of the trace, for each row of a head (default: %(default)s)")  # fmt: skip
    add("--dram-share", type=fraction, default=0.1, help="of the table's bytes (default: %(default)s)")
    add("--extent-share", type=fraction, default=0.2, help="of the table's bytes (default: %(default)s)")
    add("--batch-tokens", type=count, default=512, metavar="N", help="of one look-up (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    prepared = prepared_table(args.dir, args.rows_per_head)
    keys = text_keys(args.dir, prepared.spec, int(args.tokens_per_row * args.rows_per_head))
    results: dict[str, Any] = {"tokens": len(keys), "table_bytes": _table_bytes(prepared)}
    for name, share in (("with_extent", args.extent_share), ("without", 0.0)):
        shutil.rmtree(prepared.store / "extent", ignore_errors=True)
        results[name] = _measure(args, prepared, keys, share)
    shutil.rmtree(prepared.store / "extent", ignore_errors=True)
    columns = ("", "with extent", "without", "bar")
    return deliver("extent", args, results, _lines(results), columns)


def _table_bytes(prepared: PreparedTable) -> int:
    return prepared.spec.rows * prepared.spec.row_bytes


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
        **{f"{name}_per_seen_record": value for name, value in tally.seen.figures.items()},
        **{f"{name}_per_new_record": value for name, value in tally.new.figures.items()},
        "seen_missed": tally.seen.missed,
        "new_missed": tally.new.missed,
        "by_part": tally.parts,
        "bar_met_until_filled": tally.bar_met_until,
        "reads_per_seen_record_clairvoyant": _clairvoyant(tally, prepared.spec, stats),
        "extent_filled": _filled(prepared.spec, stats),
        **{name: stats[name] for name in (*chosen, *extents)},
    }


def _slots(spec: TableSpec, extent_bytes: int) -> int:
    return ExtentGeometry(spec.record_bytes, max(0, extent_bytes // PAGE_BYTES - 1)).slots


def _filled(spec: TableSpec, stats: dict[str, int]) -> float:
    """How often the ring has come round."""
    return float(stats["extent_written"] / max(1, _slots(spec, stats["extent_bytes"])))


def _clairvoyant(tally: Tally, spec: TableSpec, stats: dict[str, int]) -> float:
    """Reads for a missed record seen before, at one for each that could have been kept."""
    capacity = _slots(spec, stats["extent_bytes"]) + stats["dram_bytes"] // spec.record_bytes
    ids = np.unique(np.concatenate(tally.misses), return_inverse=True)[1].reshape(-1).astype(np.int32)
    found = np.zeros(ids.size, np.uint8)
    if stats["extent_bytes"]:
        belady(ids, int(ids.max()) + 1, capacity, found)
    hits = int(found.sum())
    lost = tally.seen.missed - hits
    return (hits + spec.record_rows * lost) / max(1, tally.seen.missed)


def _look_up_all(store: Store, spec: TableSpec, keys: np.ndarray, batch_tokens: int) -> Tally:
    tally, orders = Tally(), keys.shape[1]
    names = keys * orders + np.arange(orders)  # key and order; that it wraps around does not matter
    numbers = np.unique(names, return_inverse=True)[1].reshape(-1)
    seen = np.zeros(numbers.max() + 1, bool)
    out = np.empty(batch_tokens * orders * spec.record_bytes, np.uint8)
    last = Spent()
    with count_progress("looking up", len(keys)) as progress:
        for start in range(0, len(keys), batch_tokens):
            batch = keys[start : start + batch_tokens]
            request = LookupRequest(spec.name, spec.generation, "ngram", batch)
            _look_up(store, request, numbers[start * orders :][: batch.size], seen, out, tally)
            if tally.seen.figures["reads"] < BAR:
                tally.bar_met_until = _filled(spec, store.stats())
            if (start + batch_tokens) * PARTS // len(keys) > len(tally.parts):
                tally.parts.append({**(tally.seen - last).figures, "filled": _filled(spec, store.stats())})
                last = tally.seen
            progress(len(batch))
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
        then, started = store.counters.snapshot(), time.perf_counter()
        store.lookup_misses(request, access, chosen, rows, Deadline.after(None))
        took_s, now = time.perf_counter() - started, store.counters.snapshot()
        reads, pages = (
            sum(now[f"{file}_{what}"] - then[f"{file}_{what}"] for file in ("nvme", "extent"))
            for what in ("reads", "pages")
        )
        distinct = np.unique(numbers[chosen])
        tally.misses.append(distinct)
        spent = Spent(distinct.size, reads, pages, took_s)
        if known:
            tally.seen += spent
        else:
            tally.new += spent
    seen[numbers] = True


def _lines(results: dict[str, Any]) -> list[list[str]]:
    ours, bare = results["with_extent"], results["without"]

    def line(label: str, key: str, form: str = ",.2f", bar: str = "") -> list[str]:
        return [label, format(ours[key], form), format(bare[key], form), bar]

    return [
        line("reads a missed record, seen before", "reads_per_seen_record", bar=f"< {BAR}"),
        line("pages a missed record, seen before", "pages_per_seen_record"),
        line("reads, clairvoyant", "reads_per_seen_record_clairvoyant"),
        line("pages a missed record, new", "pages_per_new_record"),
        line("records missed, seen before", "seen_missed", ",d"),
        line("records missed, new", "new_missed", ",d"),
        line("microseconds a missed record, seen before", "us_per_seen_record", ",.0f"),
        line("times the extent was filled", "extent_filled"),
        ["the bar was met until, times filled", f"{ours['bar_met_until_filled']:.2f}", "", ""],
        line("dropped", "extent_dropped", ",d"),
        *([f"{what}, by tenth of the trace", _told(ours, what), _told(bare, what), ""]
          for what in ("reads", "pages", "filled")),
    ]  # fmt: skip


def _told(found: dict[str, Any], what: str) -> str:
    return " ".join(f"{part[what]:.2f}" for part in found["by_part"])
