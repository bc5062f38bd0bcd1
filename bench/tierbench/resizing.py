"""Growing and shrinking the DRAM budget while look-ups go on: in this process, and through a daemon.

A small table is enough: what moves are records, and any number of n-grams can be asked of any table. The
arena of the larger budget is filled first; what is looked up meanwhile is a small part of it that both
budgets hold. Every round has four phases: quiet; busy, where a thread copies memory as a resize does; shrink;
grow. What a resize adds to the gaps of a busy machine is what it has to answer for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_client import Client, connect
from engram_client.transport.base import LookupRequest
from tierbench.daemon import running_daemon
from tierbench.pauses import Call, Phases, copy_memory, looking
from tierbench.prepared import PreparedTable
from tierbench.process_memory import ProcessMemory
from tierbench.timed_store import TimedStore, linked_store, look_up
from tierstore.config import Config, Dram
from tierstore.store import Store

QUIET, BUSY, SHRINK, GROW = "quiet", "busy", "shrink", "grow"
FILL = 0.85  # of the slots of the larger budget
FILL_TOKENS = 1024  # of one call while filling
LOOK_S = 0.05  # between two looks at the daemon's memory


@dataclass(frozen=True)
class Resizing:
    """How it is measured."""

    small_bytes: int
    large_bytes: int
    hot_tokens: int  # that are looked up meanwhile
    call_tokens: int
    rounds: int
    phase_s: float  # of the quiet and the busy phases
    threads: int
    seed: int

    def keys(self, capacity_records: int, orders: int) -> tuple[np.ndarray, np.ndarray]:
        """N-gram keys int64 [n, orders]: the hot ones, and all others that fill the arena."""
        random = np.random.default_rng(self.seed)
        tokens = max(1, int(capacity_records * FILL) // orders - self.hot_tokens)
        hot, others = (
            random.integers(0, 2**63 - 1, (n, orders), np.int64) for n in (self.hot_tokens, tokens)
        )
        return hot, others

    def rounds_of(self, phases: Phases, resize: Callable[[int], Any]) -> None:
        for _ in range(self.rounds):
            with phases.phase(QUIET):
                threading.Event().wait(self.phase_s)
            with phases.phase(BUSY):
                copy_memory(self.phase_s)
            with phases.phase(SHRINK):
                resize(self.small_bytes)
            with phases.phase(GROW):
                resize(self.large_bytes)


def resize_in_process(prepared: PreparedTable, folder: Path, how: Resizing) -> dict[str, Any]:
    """The pauses of threads of this process."""
    config = Config(dram=Dram(budget_bytes=how.large_bytes, snapshot_period_s=0))
    timed = TimedStore(linked_store(prepared, folder), config, tokens_max=FILL_TOKENS)
    try:
        stats = timed.store.stats()
        hot, others = how.keys(stats["dram_capacity_records"], timed.orders)
        timed.make_warm(others)
        timed.make_warm(hot)
        before = timed.store.stats()
        phases = Phases()
        calls = [store_call(timed.store, hot, how.call_tokens) for _ in range(how.threads)]
        with looking(calls) as lookers:
            how.rounds_of(phases, timed.store.set_dram_budget)
        return {**_told(before, timed.store.stats()), "phases": phases.told(lookers)}
    finally:
        timed.close()


def store_call(store: Store, hot: np.ndarray, tokens: int) -> Call:
    """Calls of so many tokens as `local:` makes them: the short way, else the general one."""
    (spec,) = store.tables().values()
    path = store.hit_path(spec.name, spec.generation)
    assert path is not None and spec.scheme is not None
    parts = [hot[i : i + tokens] for i in range(0, len(hot) - tokens + 1, tokens)]
    out = np.empty((tokens, spec.scheme.orders * spec.scheme.heads, spec.row_bytes), np.uint8)

    def call(number: int) -> bool:
        keys = parts[number % len(parts)]
        if path(keys, out) is not None:
            return False
        request = LookupRequest(spec.name, spec.generation, "ngram", keys)
        return look_up(store, request, out.reshape(-1)).size > 0

    return call


def resize_daemon(prepared: PreparedTable, folder: Path, how: Resizing) -> dict[str, Any]:
    """The pauses of clients of a daemon, and its memory meanwhile. Here a call does not know if it read."""
    store = linked_store(prepared, folder)
    with ExitStack() as stack:
        daemon = stack.enter_context(running_daemon(store, dram_bytes=how.large_bytes))
        client = stack.enter_context(connect(daemon.unix))
        orders = prepared.spec.scheme.orders if prepared.spec.scheme else 1
        hot, others = how.keys(client.stats()["dram_capacity_records"], orders)
        table = client.table(prepared.spec.name)
        for keys in (others, hot):
            for start in range(0, len(keys), FILL_TOKENS):
                table.lookup_ngrams(keys[start : start + FILL_TOKENS])
        clients = [stack.enter_context(connect(daemon.unix)) for _ in range(how.threads)]
        before, phases = client.stats(), Phases()
        with (
            _most_resident(daemon.process.pid) as most,
            looking([_remote_call(c, prepared.spec.name, hot, how.call_tokens) for c in clients]) as lookers,
        ):
            how.rounds_of(phases, client.set_dram_budget)
        memory = {"resident_bytes_max": most[0], "larger_budget_bytes": how.large_bytes}
        return {**_told(before, client.stats()), **memory, "phases": phases.told(lookers)}


def _remote_call(client: Client, name: str, hot: np.ndarray, tokens: int) -> Call:
    table = client.table(name)
    parts = [hot[i : i + tokens] for i in range(0, len(hot) - tokens + 1, tokens)]

    def call(number: int) -> bool:
        table.lookup_ngrams(parts[number % len(parts)])
        return False

    return call


@contextmanager
def _most_resident(pid: int) -> Iterator[list[int]]:
    """One number that rises to the most resident memory of a process meanwhile."""
    most, done = [ProcessMemory.of(pid).resident], threading.Event()

    def watch() -> None:
        while not done.wait(LOOK_S):
            most[0] = max(most[0], ProcessMemory.of(pid).resident)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def _told(before: dict[str, int], after: dict[str, int]) -> dict[str, Any]:
    names = ("dram_hits", "dram_misses", "records_moved", "records_evicted", "records_read")
    return {
        "records_before": before["records_admitted"] - before["records_evicted"],
        **{name: after[name] - before[name] for name in names},
    }
