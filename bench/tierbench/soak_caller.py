"""One caller of a soak: a process that looks up text and cold keys without a pause, and checks samples."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from engram_client import Table, connect
from engram_client.errors import TierstoreError
from engram_client.hashing import row_ids_from_keys
from tierbench.sharded import ExpectedRows, ShardedTable

WAIT_S = 60.0  # for the daemon
TIMEOUT_S = 30.0  # of a call
PAUSE_S = 0.1  # after a call that failed


@dataclass(frozen=True)
class Caller:
    """What a caller does. `keys_file`: n-gram keys int64 [tokens, orders] of text, as numpy saves them."""

    target: str
    table: ShardedTable
    keys_file: Path
    first_token: int
    text_tokens: int  # of each call
    cold_tokens: int  # of each call: uniformly random keys, which nobody has asked for before
    duration_s: float
    check_period_s: float  # between two calls of which an n-gram is checked
    seed: int


@dataclass
class Calls:
    """What a caller saw. Times are in seconds from the start of the first call of this caller."""

    ended_s: list[float] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)
    rows_checked: int = 0
    rows_wrong: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # by kind of error


def run_caller(caller: Caller, report: Connection) -> None:
    """Call until the time is over, then send the `Calls`."""
    with connect(caller.target, wait_s=WAIT_S) as client:
        table = client.table(next(iter(client.tables())))
        report.send(_call(caller, table))


def _call(caller: Caller, table: Table) -> Calls:
    calls, batches = Calls(), _batches(caller, table)
    expected = ExpectedRows(caller.table, table.spec.rows)
    random = np.random.default_rng(caller.seed + 1)
    started = time.perf_counter()
    next_check_s = 0.0
    for batch in batches:
        before = time.perf_counter()
        if before - started >= caller.duration_s:
            break
        try:
            rows = np.asarray(table.lookup_ngrams(batch, timeout=TIMEOUT_S))
        except TierstoreError as error:
            calls.failures[type(error).__name__] += 1
            time.sleep(PAUSE_S)
            continue
        after = time.perf_counter()
        calls.ended_s.append(after - started)
        calls.took_s.append(after - before)
        if after - started >= next_check_s:
            next_check_s = after - started + caller.check_period_s
            which = int(random.integers(len(batch)))
            _check(table, batch[which], rows[which], expected, calls)
    return calls


def _batches(caller: Caller, table: Table) -> Iterator[np.ndarray]:
    """Keys int64 [text + cold tokens, orders], without end; the text begins anew where it is over."""
    text = np.load(caller.keys_file, mmap_mode="r")
    random = np.random.default_rng(caller.seed)
    orders = text.shape[1]
    for call in itertools.count():
        at = caller.first_token + call * caller.text_tokens + np.arange(caller.text_tokens)
        cold = random.integers(0, 2**63 - 1, (caller.cold_tokens, orders), np.int64)
        yield np.concatenate([text[at % len(text)], cold])


def _check(table: Table, keys: np.ndarray, rows: np.ndarray, expected: ExpectedRows, calls: Calls) -> None:
    """One n-gram's rows uint8 [H, row_bytes] against what they must be."""
    assert table.spec.scheme is not None
    row_ids = row_ids_from_keys(table.spec.scheme, keys[None]).reshape(-1)
    wrong = (rows != expected.rows(row_ids)).any(axis=1)
    calls.rows_checked += row_ids.size
    calls.rows_wrong += int(wrong.sum())
