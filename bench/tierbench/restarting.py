"""Warm restarts of a daemon: hit rate before and after, what it reads to get there, and kill -9 on the way.

The same text is looked up twice. Once by a daemon that goes on: its hit rate for the tokens after the fill
is `undisturbed`. Once by a daemon that is stopped after the fill and started again: its rate for the
very same tokens, from the moment it has refilled, is `after_restart`. So nothing but the restart differs.
Then a start is killed in the middle of its refill, and the next must serve right rows and refill whole.
"""

from __future__ import annotations

import signal
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_client import Client, connect
from engram_client.errors import Unavailable
from engram_client.hashing import row_ids_from_keys
from tierbench.daemon import Daemon, running_daemon
from tierbench.prepared import PreparedTable
from tierbench.timed_store import linked_store

REFILL_TIMEOUT_S = 120.0
POLL_S = 0.005
ONLY_AT_THE_END_S = 86_400  # snapshot period: none but the last
SAMPLE_TOKENS = 64  # whose rows are compared with the row file's


@dataclass(frozen=True)
class Restarting:
    """`keys` int64 [tokens, orders]: the last `probe_tokens` of them come after the restart."""

    dram_bytes: int
    keys: np.ndarray
    probe_tokens: int
    batch_tokens: int

    @property
    def fill(self) -> np.ndarray:
        return self.keys[: -self.probe_tokens]

    @property
    def probe(self) -> np.ndarray:
        return self.keys[-self.probe_tokens :]


class _Started:
    """A daemon, a client of it, and how long both took."""

    def __init__(self, stack: ExitStack, store: Path, how: Restarting) -> None:
        started = time.perf_counter()
        self.started_s = started
        self.daemon: Daemon = stack.enter_context(
            running_daemon(
                store,
                dram_bytes=how.dram_bytes,
                settings={"dram.snapshot_period_s": ONLY_AT_THE_END_S, "dram.snapshot_close_timeout_s": 120},
            )
        )
        self.ready_s = time.perf_counter() - started
        self.client: Client = stack.enter_context(connect(self.daemon.unix))
        self.table = self.client.table(next(iter(self.client.tables())))
        self._batch_tokens = how.batch_tokens

    def hit_rate(self, keys: np.ndarray) -> float:
        """Look all keys up, batch by batch; the share of records that DRAM held."""
        before = self.client.stats()
        for start in range(0, len(keys), self._batch_tokens):
            self.table.lookup_ngrams(keys[start : start + self._batch_tokens])
        after = self.client.stats()
        hits, misses = (after[n] - before[n] for n in ("dram_hits", "dram_misses"))
        return hits / max(1, hits + misses)

    def wait_refilled(self) -> dict[str, int]:
        """Counters once the snapshot has been read. Raises Unavailable where that takes too long."""
        until = time.perf_counter() + REFILL_TIMEOUT_S
        while not (stats := self.client.stats())["snapshot_bytes_read"]:
            if time.perf_counter() > until:
                raise Unavailable(f"the cache was not refilled within {REFILL_TIMEOUT_S:g} s; is it there?")
            time.sleep(POLL_S)
        return stats

    def kill(self) -> None:
        self.daemon.process.send_signal(signal.SIGKILL)
        self.daemon.process.wait()

    def stop(self) -> tuple[int, float]:
        """SIGTERM: exit code, and seconds until it was gone."""
        started = time.perf_counter()
        self.daemon.process.send_signal(signal.SIGTERM)
        try:
            code = self.daemon.process.wait(REFILL_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"the daemon did not stop within {REFILL_TIMEOUT_S:g} s") from error
        return code, time.perf_counter() - started


def warm_restart(prepared: PreparedTable, folder: Path, how: Restarting) -> dict[str, Any]:
    """The figures of all starts; see the module's text."""
    with ExitStack() as stack:
        goes_on = _Started(stack, linked_store(prepared, folder / "goes-on"), how)
        goes_on.hit_rate(how.fill)
        undisturbed = goes_on.hit_rate(how.probe)
        stats = goes_on.client.stats()
        goes_on.kill()  # its snapshot is of no use
    store = linked_store(prepared, folder / "restarts")
    with ExitStack() as stack:
        first = _Started(stack, store, how)
        first.hit_rate(how.fill[: -len(how.probe)])
        before = first.hit_rate(how.fill[-len(how.probe) :])
        stop_code, stop_s = first.stop()
    after = _after_restart(store, how)
    return {
        "dram_budget_bytes": how.dram_bytes,
        "arena_taken": (stats["records_admitted"] - stats["records_evicted"])
        / stats["dram_capacity_records"],
        "hit_rate_just_before": before,
        "hit_rate_undisturbed": undisturbed,
        "points_lost": (undisturbed - after["hit_rate"]) * 100,
        "stop_s": stop_s,
        "stop_exit_code": stop_code,
        "snapshot_file_bytes": sum(path.stat().st_size for path in (store / "warm").iterdir()),
        "after_restart": after,
        "killed_while_refilling": _killed(store, how, after["records_restored"]),
    }


def _after_restart(store: Path, how: Restarting) -> dict[str, Any]:
    """The first start after the stop. It is killed at the end, so that the snapshot stays as it is."""
    with ExitStack() as stack:
        again = _Started(stack, store, how)
        again.table.lookup_ngrams(how.probe[:1])
        first_lookup_s = time.perf_counter() - again.started_s
        stats = again.wait_refilled()
        refilled_s = time.perf_counter() - again.started_s
        read = stats["snapshot_bytes_read"] + stats["nvme_bytes"]
        found = {
            "ready_s": again.ready_s,
            "first_lookup_s": first_lookup_s,
            "refilled_s": refilled_s,
            "bytes_read": read,
            "bytes_read_over_budget": read / how.dram_bytes,
            "records_restored": stats["records_restored"],
            "hit_rate": again.hit_rate(how.probe),
        }
        again.kill()
    return found


def _killed(store: Path, how: Restarting, records: int) -> dict[str, Any]:
    """Kill a start that has refilled a part, then start once more."""
    with ExitStack() as stack:
        killed = _Started(stack, store, how)
        restored = 0
        while not restored and not killed.client.stats()["snapshot_bytes_read"]:
            restored = killed.client.stats()["records_restored"]
        killed.kill()
    with ExitStack() as stack:
        last = _Started(stack, store, how)
        wrong = _wrong_rows(last, how.probe[:SAMPLE_TOKENS])
        stats = last.wait_refilled()
        wrong += _wrong_rows(last, how.fill[-SAMPLE_TOKENS:])
        code, _ = last.stop()
    return {
        "records_restored_when_killed": restored,
        "was_in_the_middle": 0 < restored < records,
        "records_restored_next": stats["records_restored"],
        "rows_compared": 2 * SAMPLE_TOKENS * (last.table.spec.record_rows * how.keys.shape[1]),
        "rows_wrong": wrong,
        "exit_code": code,
    }


def _wrong_rows(started: _Started, keys: np.ndarray) -> int:
    """Rows by n-gram that are not the row file's, which single rows are always read from."""
    spec = started.table.spec
    assert spec.scheme is not None
    rows = np.asarray(started.table.lookup_ngrams(keys))
    singly = np.asarray(started.table.lookup(row_ids_from_keys(spec.scheme, keys)))
    return int((rows != singly.reshape(rows.shape)).any(axis=-1).sum())
