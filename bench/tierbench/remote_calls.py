"""Look-ups in a closed loop against a real daemon, and the same sizes against an empty gRPC service."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from engram_client import Client
from engram_client.errors import DataCorrupt
from engram_client.transport.base import LookupRequest
from engram_client.wire.convert import request_to_message
from tierbench.alternate import Step
from tierbench.yardsticks.empty_service import EmptyClient
from tierbench.yardsticks.served_peers import Fetch

WARM_ENTRIES = 2048  # n-grams of one look-up while warming


@dataclass(frozen=True)
class CallSample:
    """One window of calls by one caller."""

    rows_per_s: float
    taken_us: np.ndarray


def closed_loop(step: Step, window_s: float) -> CallSample:
    """Call after call for `window_s`; `step` returns rows."""
    taken_ns: list[int] = []
    clock = time.perf_counter_ns
    rows, started = 0, clock()
    until = started + int(window_s * 1e9)
    now = started
    while now < until:
        rows += step(len(taken_ns))
        before, now = now, clock()
        taken_ns.append(now - before)
    return CallSample(rows / (now - started) * 1e9, np.array(taken_ns) / 1e3)


class RemoteCalls:
    """Calls of `entries` n-grams each on one table; every record is made warm first."""

    def __init__(self, client: Client, entries: int, different: int, seed: int) -> None:
        self._client = client
        self.table = client.table(next(iter(client.tables())))
        scheme = self.table.spec.scheme
        assert scheme is not None
        self.heads = scheme.orders * scheme.heads
        random = np.random.default_rng(seed)
        self.keys = random.integers(0, 2**63 - 1, (different, entries, scheme.orders), np.int64)
        self._read_all()

    def _read_all(self) -> None:
        flat = self.keys.reshape(-1, self.keys.shape[-1])
        for start in range(0, len(flat), WARM_ENTRIES):
            self.table.lookup_ngrams(flat[start : start + WARM_ENTRIES])

    def step(self) -> Step:
        def step(call: int) -> int:
            rows = self.table.lookup_ngrams(self.keys[call % len(self.keys)])
            return rows.shape[0] * self.heads

        return step

    def peer_step(self, fetch: Fetch, rows_per_head: int, seed: int) -> Step:
        """As many rows by row ids, from another service."""
        shape = (*self.keys.shape[:2], self.heads)
        ids = np.random.default_rng(seed).integers(0, rows_per_head, shape, np.int64)

        def step(call: int) -> int:
            fetch(ids[call % len(ids)])
            return ids.shape[1] * self.heads

        return step

    def check_warm(self) -> None:
        """Raises DataCorrupt where the service has to read any of the records from disk."""
        before = self._client.stats()["dram_misses"]
        self._read_all()
        if missed := self._client.stats()["dram_misses"] - before:
            raise DataCorrupt(f"{missed} of {self.keys.size} records are not in DRAM; give --dram-bytes more")

    def empty_step(self, empty: EmptyClient, calls: int = 1) -> Step:
        """The same bytes there and back without a look-up, in so many calls that are sent at once."""
        entries = self.keys.shape[1] // calls
        spec = self.table.spec
        request = LookupRequest(spec.name, spec.generation, "ngram", self.keys[0][:entries])
        message = request_to_message(request).SerializeToString()
        call_empty = empty.caller(entries * self.heads * spec.row_bytes)
        rows = calls * entries * self.heads

        def one(_call: int) -> int:
            call_empty(message)
            return rows

        def several(_call: int) -> int:
            for reply in [call_empty.future(message) for _ in range(calls)]:
                reply.result()
            return rows

        return one if calls == 1 else several
