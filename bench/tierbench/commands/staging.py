"""Measure a staging ring: what starting a step costs, and until its rows are there, beside a look-up.

One client of a real daemon over shared memory, everything in DRAM; the look-up is `lookup_ngrams_into` the
ring's own memory. Also a caller who is busy in Python between asking and using, beside one that looks up
after being busy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from engram_client import StagingRing, Table, connect
from engram_client.errors import DataCorrupt
from tierbench.ahead.busy_caller import turns_for, work
from tierbench.alternate import alternate
from tierbench.daemon import running_daemon
from tierbench.delivery import add_common_arguments, deliver
from tierbench.options import byte_size, count, count_list, not_negative
from tierbench.prepared import prepared_table
from tierbench.record import compare, summarize

LAYERS = 2  # V4.1: a token is one n-gram of three orders at each of two layers
TOKENS_A_WINDOW, CALLS = 32768, (40, 2000)  # calls in a window, fewest and most
TOKENS_KEPT, BATCHES_MAX = 8192, 64  # different batches, all in DRAM
COLUMNS = ("tokens", "start", "there", "look-up", "there : look-up", "busy, ahead : not ahead", "spread")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, windows=10, window_s=None)
    add = parser.add_argument
    add("--rows-per-head", type=count, default=250_000, metavar="N", help="of the table")
    add("--dram-bytes", type=byte_size, default=1 << 30, metavar="BYTES", help="default: 1GiB")
    add("--sizes", type=count_list, default=(1, 16, 64, 512), metavar="N[,N]", help="tokens of a step")
    add("--busy-us", type=not_negative, default=1000.0, metavar="US", help="between asking and using")


def run(args: argparse.Namespace) -> int:
    prepared = prepared_table(args.dir, args.rows_per_head)
    turns, random = turns_for(args.busy_us), np.random.default_rng(args.seed)
    results: dict[str, Any] = {"busy_turns": turns}
    with running_daemon(prepared.store, dram_bytes=args.dram_bytes) as daemon, connect(daemon.unix) as client:
        table = client.table(prepared.spec.name)
        for tokens in args.sizes:
            steps = Steps(table, random, tokens, turns)
            before = client.stats()["dram_misses"]
            results[str(tokens)] = _measure(steps, tokens, args.windows)
            if missed := client.stats()["dram_misses"] - before:
                raise DataCorrupt(f"{missed} records did not stay in DRAM; give --dram-bytes more")
    return deliver("staging", args, results, _lines(results, args.sizes), COLUMNS)


class Steps:
    """Steps of so many tokens, and look-ups of the same rows into the same memory."""

    def __init__(self, table: Table, random: np.random.Generator, tokens: int, turns: int) -> None:
        assert table.spec.scheme is not None
        batches = min(BATCHES_MAX, max(2, TOKENS_KEPT // tokens))
        shape = (batches, LAYERS * tokens, table.spec.scheme.orders)
        self._keys = random.integers(0, 2**63 - 1, shape, np.int64)
        for _ in range(2):  # the second time whatever was on trial stays
            for keys in self._keys:
                table.lookup_ngrams(keys)
        self._table, self._turns = table, turns
        self._ring = StagingRing(table, entries=LAYERS * tokens)
        self._rows = self._ring.rows()
        self._step = 0

    def _next(self) -> np.ndarray:
        self._step += 1
        return self._keys[self._step % len(self._keys)]

    def staged(self) -> tuple[float, float]:
        """Microseconds until `start` returned, and until a `wait` right after it did."""
        keys = self._next()
        before = time.perf_counter_ns()
        staged = self._ring.start(self._step, keys)
        started = time.perf_counter_ns()
        staged.wait()
        there = time.perf_counter_ns()
        staged.release()
        return (started - before) / 1e3, (there - before) / 1e3

    def looked_up(self) -> tuple[float, float]:
        """Microseconds of a look-up into a slot, twice."""
        keys = self._next()
        out = self._rows[self._step % len(self._rows)]
        before = time.perf_counter_ns()
        self._table.lookup_ngrams_into(keys, out)
        taken = (time.perf_counter_ns() - before) / 1e3
        return taken, taken

    def busy_ahead(self) -> tuple[float, float]:
        """Start, be busy, wait, release: the whole in microseconds, twice."""
        keys = self._next()
        before = time.perf_counter_ns()
        staged = self._ring.start(self._step, keys)
        work(self._turns)
        staged.wait()
        staged.release()
        taken = (time.perf_counter_ns() - before) / 1e3
        return taken, taken

    def busy_then_looked_up(self) -> tuple[float, float]:
        """Be busy, look up."""
        before = time.perf_counter_ns()
        work(self._turns)
        busy = (time.perf_counter_ns() - before) / 1e3
        taken = busy + self.looked_up()[0]
        return taken, taken


def _window(call: Callable[[], tuple[float, float]], calls: int) -> np.ndarray:
    return np.array([call() for _ in range(calls)])


def _measure(steps: Steps, tokens: int, windows: int) -> dict[str, Any]:
    calls = min(CALLS[1], max(CALLS[0], TOKENS_A_WINDOW // tokens))
    busy_calls = min(calls, 60)
    contenders = {
        "staged": partial(_window, steps.staged, calls),
        "looked_up": partial(_window, steps.looked_up, calls),
        "busy_ahead": partial(_window, steps.busy_ahead, busy_calls),
        "busy_then_looked_up": partial(_window, steps.busy_then_looked_up, busy_calls),
    }
    alternate(1, contenders, f"{tokens} tokens, warming")
    found = alternate(windows, contenders, f"{tokens} tokens")
    all_of = {name: np.concatenate(parts) for name, parts in found.items()}
    medians = {name: [float(np.median(part[:, 1])) for part in parts] for name, parts in found.items()}
    return {
        "start_us": summarize(all_of["staged"][:, 0]),
        "there_us": summarize(all_of["staged"][:, 1]),
        "lookup_us": summarize(all_of["looked_up"][:, 1]),
        "there_to_lookup": compare(medians["staged"], medians["looked_up"]),
        "busy": compare(medians["busy_ahead"], medians["busy_then_looked_up"]),
    }


def _lines(results: dict[str, Any], sizes: tuple[int, ...]) -> list[list[str]]:
    def show(found: dict[str, Any]) -> str:
        return f"p50 {found['p50']:,.1f}  p99 {found['p99']:,.1f} us"

    lines = []
    for tokens in sizes:
        found = results[str(tokens)]
        busy = found["busy"]
        lines.append([
            f"{tokens}", show(found["start_us"]), show(found["there_us"]), show(found["lookup_us"]),
            f"{found['there_to_lookup']['ratio_median']:.2f}", f"{busy['ratio_median']:.3f}",
            f"{busy['ratio_min']:.3f} to {busy['ratio_max']:.3f}",
        ])  # fmt: skip
    return lines
