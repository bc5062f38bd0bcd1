"""Measure cold rows at distinct pages beside fio's random 4 KiB reads of the same file.

The store has a DRAM budget of 0, so every row is a page read past the page cache, checked and copied.
Once with pread and as many threads as fio's psync, once with io_uring and a queue as deep as fio's.
numpy.memmap, LMDB and EngramDB serve a smaller sample of the same rows, LMDB and EngramDB from files of their
own that hold fewer. These three read through the page cache, which is emptied of their file first, and
check nothing: that could not be made equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import numpy as np

from engram_client.errors import DataCorrupt, StorageError, Unavailable
from tierbench.alternate import alternate
from tierbench.cold_reads import ColdSample, ColdTable, DistinctPages
from tierbench.delivery import add_common_arguments, deliver, rate_row
from tierbench.options import count, count_list
from tierbench.prepared import PreparedTable, prepared_table
from tierbench.record import compare, summarize
from tierbench.yardsticks.engramdb_cold import EngramDbFile
from tierbench.yardsticks.engramdb_fetch import installed_version
from tierbench.yardsticks.fio import FioSample, fio_random_reads, fio_version
from tierbench.yardsticks.lmdb_get import LmdbRows
from tierbench.yardsticks.memmap import forget_cached_pages, memmap_rows

ENGINES: tuple[Literal["pread", "io_uring"], ...] = ("pread", "io_uring")
PART_ROWS = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, windows=10, window_s=3.0)
    add = parser.add_argument
    add(
        "--rows-per-head",
        type=count,
        default=1_000_000,
        metavar="N",
        help="of the table (default: %(default)s)",
    )
    add(
        "--read-threads",
        type=count,
        default=32,
        metavar="N",
        help="of pread, ours and fio's (default: %(default)s)",
    )
    add(
        "--queue-depth",
        type=count,
        default=64,
        metavar="N",
        help="of io_uring, ours and fio's (default: %(default)s)",
    )
    add(
        "--batch-rows",
        type=count,
        default=8192,
        metavar="N",
        help="rows of one look-up (default: %(default)s)",
    )
    add("--callers", type=count_list, default=(1, 2), metavar="N[,N]",
        help="look-ups at a time (default: 1,2)")  # fmt: skip
    add("--sample-rows", type=count, default=5_000, metavar="N", help="for the other ways")
    add("--lmdb-rows", type=count, default=500_000, metavar="N",
        help="rows that LMDB and EngramDB hold; all samples lie among them")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    prepared = prepared_table(args.dir, args.rows_per_head)
    results: dict[str, Any] = {"file_bytes": prepared.row_file.stat().st_size, "fio": fio_version()}
    for engine in ENGINES:
        depth = args.read_threads if engine == "pread" else args.queue_depth
        try:
            cold = ColdTable(prepared, engine, depth)
        except StorageError:
            results[engine] = None  # the system refuses it
            continue
        try:
            results[engine] = {"depth": depth, **_beside_fio(args, prepared, cold, engine, depth)}
            if engine == "pread":
                results["other_ways"] = _other_ways(args, prepared, cold)
        finally:
            cold.close()
    return deliver("cold", args, results, _lines(results))


def _beside_fio(
    args: argparse.Namespace, prepared: PreparedTable, cold: ColdTable, engine: str, depth: int
) -> dict[str, Any]:
    """Every window draws pages of its own, not another engine's or run's: those the host may have cached."""
    first_window = random.randrange(1 << 30)
    windows = itertools.count(first_window)

    def ours(callers: int) -> ColdSample:
        return cold.window(callers, args.batch_rows, args.window_s, next(windows))

    def fio() -> FioSample:
        first_byte = cold.geometry.first_page * 4096
        return fio_random_reads(prepared.row_file, engine, depth, args.window_s, first_byte, next(windows))

    ours(1)  # kernels are loaded, threads are there
    contenders: dict[str, Callable[[], Any]] = {f"callers_{n}": partial(ours, n) for n in args.callers}
    if _answers(fio):
        contenders["fio"] = fio
    samples = alternate(args.windows, contenders, f"cold rows, {engine}")
    yardstick = samples.pop("fio", [])
    found: dict[str, Any] = {name: _told(windows, yardstick) for name, windows in samples.items()}
    return {**found, "fio": _fio_told(yardstick) if yardstick else None, "first_window": first_window}


def _answers(fio: Callable[[], FioSample]) -> bool:
    """Whether fio is there and this engine works; containers often refuse io_uring."""
    try:
        return fio_version() is not None and fio().reads_per_s > 0
    except Unavailable:
        return False


def _told(ours: list[ColdSample], yardstick: list[FioSample]) -> dict[str, Any]:
    rates = [s.rows_per_s for s in ours]
    return {
        "rows_per_s": summarize(rates),
        "cores": summarize([s.cores for s in ours]),
        "bytes_per_row": summarize([s.bytes_per_row for s in ours]),
        "reads_per_row": summarize([s.reads_per_row for s in ours]),
        "beside_fio": compare(rates, [s.reads_per_s for s in yardstick]) if yardstick else None,
    }


def _fio_told(found: list[FioSample]) -> dict[str, Any]:
    return {
        "reads_per_s": summarize([s.reads_per_s for s in found]),
        "cores": summarize([s.cores for s in found]),
    }


def _other_ways(args: argparse.Namespace, prepared: PreparedTable, cold: ColdTable) -> dict[str, Any]:
    """One caller, one pass over the same cold rows: ours and every other way. Their rows must agree."""
    geometry, row_bytes = cold.geometry, prepared.spec.row_bytes
    held = min(args.lmdb_rows, geometry.rows)
    ids = DistinctPages(dataclasses.replace(geometry, rows=held), args.seed).batch(args.sample_rows)
    rows = cold.lookup(ids)
    pages, inside = np.divmod(ids, geometry.rows_per_page)
    offsets = (pages + geometry.first_page) * 4096 + inside * row_bytes
    forget_cached_pages(prepared.row_file)
    ways: dict[str, Any] = {
        "tierstore": _rate(lambda: cold.lookup(ids), rows),
        "memmap": _rate(lambda: memmap_rows(prepared.row_file, offsets, row_bytes), rows),
    }
    lmdb = LmdbRows(args.dir / "lmdb-scratch", _parts(cold, held))
    try:
        ways["lmdb_cold"] = _rate(lambda: lmdb.read(ids, row_bytes, cold=True), rows)
        ways["lmdb_warm"] = _rate(lambda: lmdb.read(ids, row_bytes, cold=False), rows)
    finally:
        lmdb.remove()
    ways |= _engramdb_ways(args, cold, held, ids, rows)
    return {"rows": int(ids.size), "rows_held": held, "engramdb": installed_version(), "rows_per_s": ways}


def _engramdb_ways(
    args: argparse.Namespace, cold: ColdTable, held: int, ids: np.ndarray, rows: np.ndarray
) -> dict[str, float | None]:
    """With one thread, and with as many as pread has; None where it is not installed."""
    names = {"engramdb_1_thread": 1, f"engramdb_{args.read_threads}_threads": args.read_threads}
    if installed_version() is None:
        return dict.fromkeys(names)
    file = EngramDbFile(args.dir / "engramdb-scratch", _parts(cold, held), held, rows.shape[1])
    numbers = ids.tolist()
    try:
        return {name: _rate(partial(file.read, numbers, threads), rows) for name, threads in names.items()}
    finally:
        file.remove()


def _parts(cold: ColdTable, held: int) -> Iterator[np.ndarray]:
    """The first rows of the table, some at a time."""
    return (cold.lookup(np.arange(i, min(held, i + PART_ROWS))) for i in range(0, held, PART_ROWS))


def _rate(read: Callable[[], np.ndarray], expected: np.ndarray) -> float:
    started = time.perf_counter()
    rows = read()
    elapsed_s = time.perf_counter() - started
    if not np.array_equal(rows, expected):
        raise DataCorrupt("a yardstick and the store disagree about the rows")
    return len(rows) / elapsed_s


def _lines(results: dict[str, Any]) -> list[list[str]]:
    lines = []
    for engine in ENGINES:
        if results[engine] is None:
            lines.append([f"{engine}: the system refuses it"])
            continue
        lines += _engine_lines(engine, results[engine])
    rates = results["other_ways"]["rows_per_s"]
    ours = f"{rates['tierstore'] / 1e3:,.1f} k rows/s"
    for way in [name for name in rates if name != "tierstore"]:
        rate = rates[way]
        shown = "not installed" if rate is None else f"{rate / 1e3:,.1f} k rows/s"
        lines.append([f"one pass, {way.replace('_', ' ')}", ours, shown])
    return lines


def _engine_lines(engine: str, results: dict[str, Any]) -> list[list[str]]:
    fio, lines = results["fio"], []
    fio_cores = f"{fio['cores']['p50']:.2f}" if fio else ""
    for name, found in results.items():
        if not name.startswith("callers_"):
            continue
        label = f"{engine}, {results['depth']} deep, {name.removeprefix('callers_')} callers"
        if found["beside_fio"]:
            pairs = {**found["beside_fio"], "yardstick_name": f"fio {engine}"}
            lines.append(rate_row(label, pairs, ">= 0.9", 1e3, "k/s"))
        else:
            lines.append([label, f"{found['rows_per_s']['p50'] / 1e3:,.2f} k/s", "no fio here"])
        lines.append(["  processor cores", f"{found['cores']['p50']:.2f}", fio_cores, "", "", "<= 0.5"])
        lines.append(
            ["  bytes read for a row", f"{found['bytes_per_row']['p50']:,.0f}", "", "", "", "<= 4301"]
        )
    return lines
