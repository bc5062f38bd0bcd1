"""DRAM hits in this process, beside gathers from a table that is wholly in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engram_client import Table, connect
from engram_client.errors import DataCorrupt
from tierbench.alternate import Step, against_best, alternate, latencies_us, rate_of_callers
from tierbench.filled_arena import FilledArena
from tierbench.record import compare, summarize
from tierbench.yardsticks.index_select import index_select_steps, with_threads
from tierstore.config import Config
from tierstore.config.schema import Dram
from tierstore.store import open_store

LATENCY_CALLS = 2000  # in one window
TORCH = "torch.index_select int64"
Contender = Callable[[], float]
Callers = Callable[[int], Step]  # number of the caller -> its step


def row_batches(table: np.ndarray, batches: int, rows: int, seed: int) -> np.ndarray:
    """Row ids int64 [batches, rows], anywhere in `table`."""
    return np.random.default_rng(seed).integers(0, len(table), (batches, rows), np.int64)


def gather_contenders(
    table: np.ndarray, ids: np.ndarray, threads: int, window_s: float
) -> dict[str, Contender]:
    """Every form in which torch can use `threads` threads."""
    half = len(ids) // 2
    callers = [index_select_steps(table, ids, half * t) for t in range(threads)]
    found: dict[str, Contender] = {}
    for name, step in callers[0].items():
        found[name] = partial(with_threads, threads, partial(rate_of_callers, [step], window_s))
    if threads > 1:
        for name in callers[0]:
            found[f"{name}, {threads} callers"] = _torch_callers([c[name] for c in callers], window_s)
    return found


def _torch_callers(steps: list[Step], window_s: float) -> Contender:
    return partial(with_threads, 1, partial(rate_of_callers, steps, window_s))


def throughput(
    ours: Callers,
    table: np.ndarray,
    ids: np.ndarray,
    *,
    beside: Callable[[int], Mapping[str, list[Step]]],
    threads: tuple[int, ...],
    windows: int,
    window_s: float,
    label: str,
) -> dict[str, Any]:
    """Rows/s by number of threads. The bar is set against torch; medians of those `beside` are told."""
    found = {}
    for count in threads:
        bars = gather_contenders(table, ids, count, window_s)
        others = {name: partial(rate_of_callers, steps, window_s) for name, steps in beside(count).items()}
        mine = {"ours": partial(rate_of_callers, [ours(t) for t in range(count)], window_s)}
        contenders: dict[str, Contender] = {**bars, **others, **mine}
        samples = alternate(windows, contenders, f"{label}, {count} threads")
        found[f"threads_{count}"] = against_best(
            samples["ours"], {name: samples[name] for name in bars}, {name: samples[name] for name in others}
        )
    return found


def scaling(
    ours: Callers,
    table: np.ndarray,
    ids: np.ndarray,
    *,
    threads: int,
    windows: int,
    window_s: float,
    label: str,
) -> dict[str, Any]:
    """Rows/s of several threads against those of one; torch's show what the machine can do."""
    half = len(ids) // 2
    gathers = [index_select_steps(table, ids, half * t)[TORCH] for t in range(threads)]
    mine = [ours(t) for t in range(threads)]
    contenders: dict[str, Contender] = {}
    for count in (1, threads):
        contenders[f"ours {count}"] = partial(rate_of_callers, mine[:count], window_s)
        contenders[f"{TORCH} {count}"] = _torch_callers(gathers[:count], window_s)
    samples = alternate(windows, contenders, f"{label}, {threads} threads against one")
    return {
        "threads": threads,
        "ours": compare(samples[f"ours {threads}"], samples["ours 1"]),
        TORCH: compare(samples[f"{TORCH} {threads}"], samples[f"{TORCH} 1"]),
    }


def latency(contenders: dict[str, Step], windows: int, label: str) -> dict[str, Any]:
    """Summaries in microseconds by contender; the windows of all of them put together."""
    calls: dict[str, Callable[[], np.ndarray]] = {
        name: partial(latencies_us, step, LATENCY_CALLS) for name, step in contenders.items()
    }
    samples = alternate(windows, calls, label)
    return {name: summarize(np.concatenate(parts)) for name, parts in samples.items()}


def arena_figures(filled: FilledArena) -> dict[str, Any]:
    """What the arena held when it was measured."""
    geometry = filled.arena.geometry
    return {
        "arena_bytes": geometry.total_bytes,
        "record_bytes": geometry.record_bytes,
        "capacity_records": geometry.capacity_records,
        "fill": filled.fill,
        "hit_rate": 1.0,  # any miss ends the run
        "index_and_slot_overhead": 1
        - geometry.capacity_records * geometry.record_bytes / geometry.total_bytes,
    }


class WarmTable:
    """A table of a `local:` store, and keys of which every record is in its DRAM tier."""

    def __init__(self, store: Path, dram_bytes: int, entries: int, seed: int) -> None:
        self._shared, self._release = open_store(store, Config(dram=Dram(budget_bytes=dram_bytes)))
        self.client = connect(f"local:{store}")
        self.table: Table = self.client.table(next(iter(self.client.tables())))
        assert self.table.spec.scheme is not None
        orders = self.table.spec.scheme.orders
        self.keys = np.random.default_rng(seed).integers(0, 2**63 - 1, (entries, orders), np.int64)
        self._warm()

    def _warm(self) -> None:
        """Read everything, then keep the keys whose records all stayed."""
        for start in range(0, len(self.keys), 4096):
            self.table.lookup_ngrams(self.keys[start : start + 4096])
        before = self.client.stats()["dram_misses"]
        self.table.lookup_ngrams(self.keys)
        misses = self.client.stats()["dram_misses"] - before
        if misses:
            raise DataCorrupt(
                f"{misses} of {self.keys.size} records did not stay in DRAM; raise --arena-bytes"
            )

    def step(self, entries: int, first: int = 0) -> Step:
        """A step that looks `entries` of the keys up into a buffer of its own."""
        scheme, spec = self.table.spec.scheme, self.table.spec
        assert scheme is not None
        parts = [self.keys[i : i + entries] for i in range(0, len(self.keys) - entries + 1, entries)]
        heads = scheme.orders * scheme.heads
        out = np.empty((entries, heads, spec.row_bytes), np.uint8)

        def step(call: int) -> int:
            self.table.lookup_ngrams_into(parts[(first + call) % len(parts)], out)
            return entries * heads

        return step

    def misses(self) -> int:
        return self.client.stats()["dram_misses"]

    def close(self) -> None:
        self.client.close()
        self._release()
