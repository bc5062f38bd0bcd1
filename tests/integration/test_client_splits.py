"""Look-ups larger than a daemon takes in one request: the client knows its limits and splits by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_client import connect
from engram_client.transport.base import LookupRequest
from engram_client.transport.splitting import (
    CALL_BYTES_MAX,
    Limits,
    entries_per_call,
    entries_per_hint,
    limits_told,
)
from engram_client.wire import memory_pb2 as pb
from tests.support.daemon import Daemon, running, serve_command
from tests.support.shared_memory import SMALL, attached, grown, rows_of
from tests.support.stores import LARGE, PLAIN, V41, PackedStore, random_keys, random_rows

STRICT: dict[str, Any] = {
    **SMALL,
    "serve_tcp": "127.0.0.1:0",
    "limits_request_ids_max": 50,
    "limits_request_reply_bytes_max": "64KiB",
    "serve_concurrent_requests_max": 1,
}


def strict_command(folder: Path, packed: PackedStore, **settings: Any) -> list[str]:
    store = folder / "store"
    directory = store if store.exists() else packed.copy_to(folder)
    return serve_command(directory, serve_unix=folder / "s", **{**STRICT, **settings})


@pytest.fixture(scope="module")
def strict(packed: PackedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that takes 50 ids, and 64 KiB of rows, in one request, and one request at a time."""
    folder = tmp_path_factory.mktemp("strict")
    with running(strict_command(folder, packed), folder) as daemon:
        yield daemon


@pytest.mark.parametrize("way", ["tcp", "unix"])
def test_a_daemon_that_takes_little_at_once(packed: PackedStore, strict: Daemon, way: str) -> None:
    with connect(getattr(strict, way)) as client:
        assert way == "tcp" or attached(client)
        for name, count in ((PLAIN, 700), (LARGE, 60), (V41, 120)):
            oracle, table = packed.oracles[name], client.table(name)
            ids = random_rows(oracle, count, seed=1, masked=0.1)
            assert np.array_equal(table.lookup(ids), rows_of(oracle, ids))
            assert np.array_equal(table.prefetch(ids).wait(30), rows_of(oracle, ids))
        oracle, table, keys = packed.oracles[V41], client.table(V41), random_keys(packed.oracles[V41], 400)
        for _ in range(2):
            assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        assert np.array_equal(table.prefetch_ngrams(keys).wait(30), oracle.lookup_ngrams(keys))
        before = client.stats()
        table.warm_ngrams(keys)
        hints = grown(client, before, "hints_accepted", "hints_dropped")
        assert sum(hints.values()) == 1200 // 48, "16 lines of three keys each"


def test_a_daemon_with_lower_limits_takes_over(packed: PackedStore, tmp_path: Path) -> None:
    """At the same address; a client that knows the old one's limits learns the new one's from a refusal."""
    oracle, keys = packed.oracles[V41], random_keys(packed.oracles[V41], 100)
    loose = {"limits_request_ids_max": 1 << 20, "limits_request_reply_bytes_max": "8MiB", "shm_enabled": "no"}
    with running(strict_command(tmp_path, packed, **loose), tmp_path) as daemon:
        client = connect(daemon.unix)
        table = client.table(V41)
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
    with client, running(strict_command(tmp_path, packed, shm_enabled="no"), tmp_path):
        assert np.array_equal(table.prefetch_ngrams(keys).wait(30), oracle.lookup_ngrams(keys))
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))


def request_of(entries: int, orders: int) -> LookupRequest:
    return LookupRequest("t", "0" * 32, "ngram", np.zeros((entries, orders), np.int64))


@pytest.mark.parametrize(("limits", "expected"), [
    (Limits(), 100),
    (Limits(request_ids_max=299), 50),
    (Limits(request_ids_max=2), 1),
    (Limits(reply_bytes_max=10_000), 10),
    (Limits(reply_bytes_max=999), 1),
    (Limits(message_bytes_max=4096 + 8 * 3 * 30), 25),
])  # fmt: skip
def test_equal_parts_within_every_limit(limits: Limits, expected: int) -> None:
    assert entries_per_call(request_of(100, 3), 1000, limits) == expected


def test_a_daemon_that_tells_nothing_has_no_limits() -> None:
    assert limits_told(pb.ListTablesResponse().limits) == Limits()
    assert limits_told(pb.Limits(reply_bytes_max=5)) == Limits(reply_bytes_max=5)


def test_parts_near_a_mebibyte_where_nothing_is_limited() -> None:
    entries, entry_bytes = 10_000, 6336
    per_call = entries_per_call(request_of(entries, 3), entry_bytes, Limits())
    assert CALL_BYTES_MAX / 2 < per_call * entry_bytes <= CALL_BYTES_MAX
    assert entries_per_hint(request_of(entries, 3), Limits(request_ids_max=9)) == 3
