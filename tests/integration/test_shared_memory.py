"""Rows through shared memory from a real daemon: found, missing, mixed, prefetched, and while arenas move."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engram_client import connect, errors
from engram_client.arena.mailbox import (
    SLOTS,
)
from engram_client.transport import mailbox as mailboxes
from tests.support.daemon import Daemon, running, serve_command
from tests.support.shared_memory import (
    SMALL,
    attached,
    grown,
    mailbox_of,
    mapped_arenas,
    rows_of,
)
from tests.support.stores import (
    ALL_TABLES,
    LARGE,
    PLAIN,
    SCHEME_TABLES,
    V41,
    PackedStore,
    eventually,
    random_keys,
    random_rows,
)


@pytest.mark.parametrize("name", ALL_TABLES)
def test_every_table_every_way(packed: PackedStore, roomy: Daemon, name: str) -> None:
    """Missing, mixed and cached; whole and in part; -1 among them."""
    oracle = packed.oracles[name]
    with connect(roomy.unix) as client:
        assert attached(client)
        table = client.table(name)
        for seed in (1, 1, 2):
            ids = random_rows(oracle, 200, seed=seed, masked=0.1)
            assert np.array_equal(table.lookup(ids), rows_of(oracle, ids))
        if name not in SCHEME_TABLES:
            return
        keys = random_keys(oracle, 60, seed=3, masked=0.2)
        for part in (keys[:40], keys, keys, keys.reshape(2, 30, -1)):
            assert np.array_equal(table.lookup_ngrams(part), oracle.lookup_ngrams(part))
        heads = keys.shape[1]
        whole = oracle.lookup_ngrams(keys).reshape(60, heads, -1, table.spec.row_bytes)
        for chosen in (slice(0, 3), slice(2, 5), slice(-1, None)):
            found = table.lookup_ngrams(keys, heads=chosen)
            assert np.array_equal(found, whole[:, :, chosen].reshape(found.shape))
            assert np.array_equal(table.lookup_ngrams(keys + 1 - 1, heads=chosen), found)


def test_hits_ask_nobody_and_are_counted(packed: PackedStore, roomy: Daemon) -> None:
    oracle = packed.oracles[V41]
    with connect(roomy.unix) as client:
        table, keys = client.table(V41), random_keys(oracle, 50, seed=10, masked=0.2)
        present = int((keys >= 0).sum())
        before = client.stats()
        table.lookup_ngrams(keys)
        names = ("lookups", "keys", "masked", "dram_hits", "dram_misses", "shm_requests", "records_read")
        expected = [1, keys.size, keys.size - present, 0, present, 1, present]
        assert list(grown(client, before, *names).values()) == expected
        before = client.stats()
        for _ in range(3):
            table.lookup_ngrams(keys)
        table.lookup_ngrams(keys, heads=slice(0, 2))
        expected = [4, 4 * keys.size, 4 * (keys.size - present), 4 * present, 0, 0, 0]
        assert list(grown(client, before, *names).values()) == expected
        assert eventually(lambda: grown(client, before, "shm_touches")["shm_touches"] >= present)


def test_a_batch_larger_than_the_response_memory(packed: PackedStore, roomy: Daemon) -> None:
    oracle = packed.oracles[V41]
    with connect(roomy.unix) as client:
        table, keys = client.table(V41), random_keys(oracle, 500, seed=11)
        before = client.stats()
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        assert grown(client, before, "shm_requests")["shm_requests"] > 8
        large = packed.oracles[LARGE]
        ids = random_rows(large, 300)
        assert np.array_equal(client.table(LARGE).lookup(ids), large.rows[ids])


def test_a_full_mailbox_goes_by_grpc(
    packed: PackedStore, roomy: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = packed.oracles[V41]
    with connect(roomy.unix) as client:
        table, keys = client.table(V41), random_keys(oracle, 30, seed=12)
        mailbox = mailbox_of(client)
        mailbox._taken[:] = b"\1" * len(mailbox._taken)
        before = client.stats()
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        assert grown(client, before, "shm_requests", "lookups") == {"shm_requests": 0, "lookups": 1}


def test_errors_of_the_daemon_arrive_as_they_are(packed: PackedStore, obedient: Daemon) -> None:
    with connect(obedient.unix) as client:
        table, keys = client.table(V41), random_keys(packed.oracles[V41], 4, seed=13)
        obedient.ask("hold")
        for _ in range(2):
            with pytest.raises(errors.DeadlineExceeded):
                table.lookup_ngrams(keys, timeout=0.05)
        obedient.ask("release")
        assert np.array_equal(table.lookup_ngrams(keys), packed.oracles[V41].lookup_ngrams(keys))
        for bad in (np.full((1, 3), -5), np.array([[3, 4, -2]])):
            with pytest.raises(errors.IdOutOfRange):
                table.lookup_ngrams(bad)
        with pytest.raises(errors.IdOutOfRange):
            client.table(PLAIN).lookup(np.array([10**9]))


def test_memory_of_a_request_that_was_given_up_is_not_used_again_too_early(
    packed: PackedStore, obedient: Daemon
) -> None:
    oracle = packed.oracles[V41]
    with connect(obedient.unix) as client:
        table, mailbox = client.table(V41), mailbox_of(client)
        obedient.ask("hold")
        for seed in range(3):
            with pytest.raises(errors.DeadlineExceeded):
                table.lookup_ngrams(random_keys(oracle, 5, seed=20 + seed), timeout=0.02)
        taken = bytes(mailbox._taken)
        given_up = len(mailbox._returned)
        assert given_up >= 1
        assert taken.count(1) >= given_up
        obedient.ask("release")
        keys = random_keys(oracle, 5, seed=30)
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        assert eventually(lambda: all(request.settled() for request in mailbox._returned))
        mailbox._reap()
        assert not mailbox._returned
        assert not any(mailbox._taken)
        assert len(mailbox._free_slots) == SLOTS


def test_two_clients_that_miss_the_same_records_cause_one_read(packed: PackedStore, obedient: Daemon) -> None:
    oracle = packed.oracles[V41]
    keys = random_keys(oracle, 20, seed=40)
    with connect(obedient.unix) as one, connect(obedient.unix) as other, ThreadPoolExecutor(2) as threads:
        tables = [one.table(V41), other.table(V41)]
        before = one.stats()
        obedient.ask("hold")
        reading = [threads.submit(table.lookup_ngrams, keys) for table in tables]
        obedient.ask("wait 1")
        assert eventually(lambda: grown(one, before, "shm_requests")["shm_requests"] == 2)
        obedient.ask("release")
        for rows in reading:
            assert np.array_equal(rows.result(30), oracle.lookup_ngrams(keys))
        assert grown(one, before, "records_read")["records_read"] == keys.size


def test_a_client_with_much_to_read_leaves_threads_to_others(packed: PackedStore, obedient: Daemon) -> None:
    oracle = packed.oracles[V41]
    with connect(obedient.unix) as greedy, connect(obedient.unix) as modest, ThreadPoolExecutor(7) as threads:
        before = greedy.stats()
        obedient.ask("hold")
        table = greedy.table(V41)
        many = [threads.submit(table.lookup_ngrams, random_keys(oracle, 3, seed=50 + i)) for i in range(6)]
        obedient.ask("wait 2")
        one = threads.submit(modest.table(V41).lookup_ngrams, random_keys(oracle, 3, seed=60))
        obedient.ask("wait 3")
        assert grown(greedy, before, "shm_requests")["shm_requests"] == 3
        obedient.ask("release")
        for reading in (*many, one):
            assert reading.result(30).any()


def test_resizing_while_reading(
    packed: PackedStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients follow every change of the arenas, never without shared memory; old memory is let go of."""
    oracle = packed.oracles[V41]
    command = serve_command(packed.copy_to(tmp_path), serve_unix=tmp_path / "s", **SMALL)
    with running(command, tmp_path) as daemon, connect(daemon.unix) as client:
        table, keys = client.table(V41), random_keys(oracle, 200, seed=70)
        expected = oracle.lookup_ngrams(keys)
        assert attached(client)
        before = client.stats()
        with ThreadPoolExecutor(1) as threads:
            for size in (64, 4, 24, 8, 48) * 2:
                resizing = threads.submit(client.set_dram_budget, size << 20)
                while not resizing.done():
                    assert np.array_equal(table.lookup_ngrams(keys), expected)
                    assert attached(client)
        assert grown(client, before, "shm_clients") == {"shm_clients": 0}
        assert "shared memory" not in caplog.text
        number = client._transport._link.attachment._tables[V41, table.spec.generation].number  # type: ignore[attr-defined]
        assert number > 0
        assert eventually(lambda: mapped_arenas() == len(client._transport._link.attachment._regions))  # type: ignore[attr-defined]
        table.lookup_ngrams(keys)
        before = client.stats()
        assert np.array_equal(table.lookup_ngrams(keys), expected)
        assert grown(client, before, "shm_requests", "dram_misses") == {"shm_requests": 0, "dram_misses": 0}


def test_a_request_takes_no_more_than_its_share(packed: PackedStore, roomy: Daemon) -> None:
    with connect(roomy.unix) as client:
        mailbox = mailbox_of(client)
        largest = mailbox.entries_max(2112)
        assert mailboxes.SHARE * largest * 2112 <= 1 << 20 < (mailboxes.SHARE + 1) * (largest + 1) * 2112


@pytest.mark.parametrize("entries", [2, 40, 300])
def test_prefetched_rows(packed: PackedStore, obedient: Daemon, entries: int) -> None:
    """Missing, mixed and cached; no thread of this process takes part."""
    oracle = packed.oracles[V41]
    with connect(obedient.unix) as client:
        table, keys = client.table(V41), random_keys(oracle, entries, seed=120, masked=0.2)
        before = client.stats()
        expected = oracle.lookup_ngrams(keys)
        for wanted in (keys[: entries // 2], keys, keys):
            handle = table.prefetch_ngrams(wanted)
            wanted = wanted.copy()
            assert np.array_equal(handle.wait(30), expected[: len(wanted)])
            assert np.array_equal(handle.wait(0), expected[: len(wanted)]), "again"
        heads = table.prefetch_ngrams(keys, heads=slice(1, 4)).wait(30)
        assert np.array_equal(heads, table.lookup_ngrams(keys, heads=slice(1, 4)))
        counted = grown(client, before, "keys", "masked", "dram_hits", "dram_misses")
        assert counted["keys"] == counted["masked"] + counted["dram_hits"] + counted["dram_misses"]
        rows = random_rows(oracle, 50, masked=0.1)
        assert np.array_equal(table.prefetch(rows).wait(30), rows_of(oracle, rows))
        assert not client._prefetcher._threads
        obedient.ask("hold")
        late = table.prefetch_ngrams(random_keys(oracle, 3, seed=121))
        assert not late.done()
        with pytest.raises(errors.DeadlineExceeded):
            late.wait(0.01)
        obedient.ask("release")
        assert np.array_equal(late.wait(30), oracle.lookup_ngrams(random_keys(oracle, 3, seed=121)))


def test_prefetches_given_up(packed: PackedStore, obedient: Daemon) -> None:
    """Cancelled, dropped and overtaken by their own timeout: all memory comes back, later and not before."""
    oracle = packed.oracles[V41]
    with connect(obedient.unix, prefetch_handles_max=4) as client:
        table, mailbox = client.table(V41), mailbox_of(client)
        obedient.ask("hold")
        cancelled, dropped, hasty = (
            table.prefetch_ngrams(random_keys(oracle, 3, seed=130 + i), timeout=t)
            for i, t in enumerate((None, None, 0.02))
        )
        obedient.ask("wait 1")
        cancelled.cancel()
        with pytest.raises(errors.Cancelled):
            cancelled.wait(0)
        del dropped
        for _ in range(2):
            with pytest.raises(errors.DeadlineExceeded):
                hasty.wait(30)
        handles = [table.prefetch_ngrams(random_keys(oracle, 1, seed=140 + i)) for i in range(4)]
        with pytest.raises(errors.Overloaded, match="4 prefetch handles"):
            table.prefetch_ngrams(random_keys(oracle, 1))
        obedient.ask("release")
        for i, handle in enumerate(handles):
            keys = random_keys(oracle, 1, seed=140 + i)
            assert np.array_equal(handle.wait(30), oracle.lookup_ngrams(keys))
        assert eventually(lambda: all(request.settled() for request in mailbox._returned))
        mailbox._reap()
        assert not any(mailbox._taken)
        assert len(mailbox._free_slots) == SLOTS
