"""Rows through shared memory from a real daemon: hits, misses, and all that can go wrong between two."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_client import Client, connect, errors
from engram_client.arena.mailbox import (
    ADDRESS,
    AT,
    ENTRIES,
    HEADS,
    PENDING_AT,
    SLOTS,
    TABLE,
    TOUCH_HEAD_AT,
    TOUCHES_AT,
    WITHDRAWN,
)
from engram_client.transport import handoff, link
from engram_client.transport import mailbox as mailboxes
from tests.support.daemon import Daemon, environment, running, serve_command, simulated_command
from tests.support.oracle import Oracle
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
    repacked_v41,
)

SMALL: dict[str, Any] = {"dram_budget_bytes": "32MiB", "nvme_staging_bytes": "2MiB", "nvme_read_threads": 4}


@pytest.fixture(scope="module")
def roomy(packed: PackedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that tests leave as it was, with a mailbox of 1 MiB for each client."""
    folder = tmp_path_factory.mktemp("roomy")
    settings = {**SMALL, "serve_unix": folder / "s", "shm_response_bytes": "1MiB", "shm_clients_max": 6}
    with running(serve_command(packed.copy_to(folder), **settings), folder) as daemon:
        yield daemon


@pytest.fixture
def own(packed: PackedStore, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon of the test's own over a device that obeys it."""
    command = simulated_command(packed.copy_to(tmp_path), serve_unix=tmp_path / "s", **SMALL)
    with running(command, tmp_path) as daemon:
        yield daemon


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for a daemon that was gone without pauses."""
    monkeypatch.setattr(link, "BACKOFF_S", (0.01, 0.05))


def attached(client: Client) -> bool:
    return bool(client._transport.attached)  # type: ignore[attr-defined]


def mailbox_of(client: Client) -> Any:
    return client._transport._link.attachment.mailbox  # type: ignore[attr-defined]


def grown(client: Client, before: dict[str, int], *names: str) -> dict[str, int]:
    now = client.stats()
    return {name: now[name] - before[name] for name in names}


def rows_of(oracle: Oracle, ids: np.ndarray) -> np.ndarray:
    return np.where((ids >= 0)[:, None], oracle.rows[ids], 0)


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


def test_errors_of_the_daemon_arrive_as_they_are(packed: PackedStore, own: Daemon) -> None:
    with connect(own.unix) as client:
        table, keys = client.table(V41), random_keys(packed.oracles[V41], 4, seed=13)
        own.ask("hold")
        for _ in range(2):
            with pytest.raises(errors.DeadlineExceeded):
                table.lookup_ngrams(keys, timeout=0.05)
        own.ask("release")
        assert np.array_equal(table.lookup_ngrams(keys), packed.oracles[V41].lookup_ngrams(keys))
        for bad in (np.full((1, 3), -5), np.array([[3, 4, -2]])):
            with pytest.raises(errors.IdOutOfRange):
                table.lookup_ngrams(bad)
        with pytest.raises(errors.IdOutOfRange):
            client.table(PLAIN).lookup(np.array([10**9]))


def test_memory_of_a_request_that_was_given_up_is_not_used_again_too_early(
    packed: PackedStore, own: Daemon
) -> None:
    oracle = packed.oracles[V41]
    with connect(own.unix) as client:
        table, mailbox = client.table(V41), mailbox_of(client)
        own.ask("hold")
        for seed in range(3):
            with pytest.raises(errors.DeadlineExceeded):
                table.lookup_ngrams(random_keys(oracle, 5, seed=20 + seed), timeout=0.02)
        taken = bytes(mailbox._taken)
        given_up = len(mailbox._returned)
        assert given_up >= 1
        assert taken.count(1) >= given_up
        own.ask("release")
        keys = random_keys(oracle, 5, seed=30)
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        assert eventually(lambda: all(request.settled() for request in mailbox._returned))
        mailbox._reap()
        assert not mailbox._returned
        assert not any(mailbox._taken)
        assert len(mailbox._free_slots) == SLOTS


def test_two_clients_that_miss_the_same_records_cause_one_read(packed: PackedStore, own: Daemon) -> None:
    oracle = packed.oracles[V41]
    keys = random_keys(oracle, 20, seed=40)
    with connect(own.unix) as one, connect(own.unix) as other, ThreadPoolExecutor(2) as threads:
        tables = [one.table(V41), other.table(V41)]
        before = one.stats()
        own.ask("hold")
        reading = [threads.submit(table.lookup_ngrams, keys) for table in tables]
        own.ask("wait 1")
        assert eventually(lambda: grown(one, before, "shm_requests")["shm_requests"] == 2)
        own.ask("release")
        for rows in reading:
            assert np.array_equal(rows.result(30), oracle.lookup_ngrams(keys))
        assert grown(one, before, "records_read")["records_read"] == keys.size


def test_a_client_with_much_to_read_leaves_threads_to_others(packed: PackedStore, own: Daemon) -> None:
    oracle = packed.oracles[V41]
    with connect(own.unix) as greedy, connect(own.unix) as modest, ThreadPoolExecutor(7) as threads:
        before = greedy.stats()
        own.ask("hold")
        table = greedy.table(V41)
        many = [threads.submit(table.lookup_ngrams, random_keys(oracle, 3, seed=50 + i)) for i in range(6)]
        own.ask("wait 2")
        one = threads.submit(modest.table(V41).lookup_ngrams, random_keys(oracle, 3, seed=60))
        own.ask("wait 3")
        assert grown(greedy, before, "shm_requests")["shm_requests"] == 3
        own.ask("release")
        for reading in (*many, one):
            assert reading.result(30).any()


def test_resizing_while_reading(packed: PackedStore, tmp_path: Path) -> None:
    """Clients follow every change of the arenas; memory of old ones is let go of."""
    oracle = packed.oracles[V41]
    command = serve_command(packed.copy_to(tmp_path), serve_unix=tmp_path / "s", **SMALL)
    with running(command, tmp_path) as daemon, connect(daemon.unix) as client:
        table, keys = client.table(V41), random_keys(oracle, 200, seed=70)
        expected = oracle.lookup_ngrams(keys)
        with ThreadPoolExecutor(1) as threads:
            for size in (64, 4, 24, 8, 48) * 2:
                resizing = threads.submit(client.set_dram_budget, size << 20)
                while not resizing.done():
                    assert np.array_equal(table.lookup_ngrams(keys), expected)
        number = client._transport._link.attachment._tables[V41, table.spec.generation].number  # type: ignore[attr-defined]
        assert number > 0
        assert eventually(lambda: mapped_arenas() == len(client._transport._link.attachment._regions))  # type: ignore[attr-defined]
        table.lookup_ngrams(keys)
        before = client.stats()
        assert np.array_equal(table.lookup_ngrams(keys), expected)
        assert grown(client, before, "shm_requests", "dram_misses") == {"shm_requests": 0, "dram_misses": 0}


def mapped_arenas() -> int:
    """Read-only mappings of arenas in this process."""
    with open("/proc/self/maps") as maps:
        return sum("memfd:tierstore-arena" in line and " r--s " in line for line in maps)


def test_killed_and_started_again(packed: PackedStore, tmp_path: Path, impatient: None) -> None:
    """The same client reads on, and re-attaches; a table packed anew is a clear error, never other rows."""
    folder, oracle, path = packed.copy_to(tmp_path, own=(V41,)), packed.oracles[V41], tmp_path / "s"
    keys = random_keys(oracle, 20, seed=80)
    with running(serve_command(folder, serve_unix=path, **SMALL), tmp_path) as daemon:
        client = connect(daemon.unix)
        table, other = client.table(V41), client.table(PLAIN)
        table.lookup_ngrams(keys)
        daemon.kill()
    assert eventually(lambda: not attached(client))
    with running(serve_command(folder, serve_unix=path, **SMALL), tmp_path) as daemon:
        assert eventually(lambda: attached(client))
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        daemon.kill()
    anew = repacked_v41(tmp_path, folder)
    with running(serve_command(folder, serve_unix=path, **SMALL), tmp_path) as daemon:
        assert eventually(lambda: attached(client))
        for _ in range(2):
            with pytest.raises(errors.GenerationMismatch, match="packed again"):
                table.lookup_ngrams(keys)
        assert np.array_equal(client.table(V41).lookup_ngrams(keys), anew.lookup_ngrams(keys))
        assert np.array_equal(other.lookup(np.arange(9)), packed.oracles[PLAIN].rows[:9])
        client.close()
        assert daemon.stop() == 0
    assert not Path(f"{path}.shm").exists()


def test_killed_in_mid_request(packed: PackedStore, own: Daemon, impatient: None) -> None:
    with connect(own.unix) as client, ThreadPoolExecutor(1) as threads:
        table = client.table(V41)
        own.ask("hold")
        waiting = threads.submit(table.lookup_ngrams, random_keys(packed.oracles[V41], 5), timeout=None)
        own.ask("wait 1")
        own.kill()
        with pytest.raises(errors.Unavailable):
            waiting.result(30)


DOOMED = """
import sys, threading
import numpy as np
from engram_client import connect

client = connect(sys.argv[1])
table = client.table("v41")
random = np.random.default_rng(int(sys.argv[2]))
assert client._transport.attached
threading.Timer(60, sys.exit).start()
print("reading", flush=True)
while True:
    table.lookup_ngrams(random.integers(0, 2**63 - 1, (40, 3)))
"""


def doomed(daemon: Daemon, seed: int) -> subprocess.Popen[str]:
    """A client that reads until it is killed."""
    command = [sys.executable, "-c", DOOMED, daemon.unix, str(seed)]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
    assert client.stdout is not None
    assert client.stdout.readline() == "reading\n"
    return client


def test_clients_that_are_killed_cost_nothing(packed: PackedStore, own: Daemon) -> None:
    """At whatever instruction: with requests on the way, and in the middle of a read."""
    oracle = packed.oracles[V41]
    with connect(own.unix) as client:
        table, start = client.table(V41), open_files(own)
        victims = [doomed(own, seed) for seed in range(3)]
        assert open_files(own) > start
        before = client.stats()
        own.ask("hold")
        own.ask("wait 1")
        for victim in victims:
            victim.kill()
            victim.communicate()
        own.ask("release")
        keys = random_keys(oracle, 20, seed=90)
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        assert eventually(lambda: open_files(own) == start)
        assert eventually(lambda: mailboxes_of(own) == 1)
        assert grown(client, before, "shm_refused")["shm_refused"] == 0
        assert attached(client)


def open_files(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def mailboxes_of(daemon: Daemon) -> int:
    """Mailboxes the daemon has mapped."""
    return Path(f"/proc/{daemon.process.pid}/maps").read_text().count("memfd:tierstore-mailbox")


def test_a_hostile_client_harms_nobody_else(packed: PackedStore, roomy: Daemon) -> None:
    """Random words everywhere in its mailbox, again and again, while another client reads."""
    oracle, random = packed.oracles[V41], np.random.default_rng(4)
    keys = random_keys(oracle, 20, seed=100)
    with connect(roomy.unix) as hostile, connect(roomy.unix) as honest:
        table, mailbox = honest.table(V41), mailbox_of(hostile)
        words = mailbox._bytes.view(np.int64)
        slots = words[512 : 512 + SLOTS * 128].reshape(SLOTS, 128)
        table.lookup_ngrams(keys)
        before = honest.stats()
        for turn in range(60):
            for column in range(7):
                low, high = ((-3, 70), (-(2**63), 2**63 - 1))[int(random.integers(2))]
                slots[:, column] = random.integers(low, high, SLOTS)
            slots[:, WITHDRAWN] = random.integers(0, 2, SLOTS)
            if turn % 2:  # nearly right
                slots[:, TABLE], slots[:, ADDRESS], slots[:, HEADS] = random.integers(1, 9, SLOTS), 0, 0
                slots[:, ENTRIES] = random.integers(1, 400, SLOTS)
                slots[:, AT] = 64 * random.integers(0, 16384, SLOTS)
            words[TOUCHES_AT // 8 : TOUCHES_AT // 8 + 4096] = random.integers(-(2**63), 2**63 - 1, 4096)
            words[:4] = random.integers(-(2**63), 2**63 - 1, 4)
            words[TOUCH_HEAD_AT // 8] = random.integers(-(2**63), 2**63 - 1)
            words[PENDING_AT // 8] = random.integers(-(2**63), 2**63 - 1)
            os.eventfd_write(mailbox._doorbell, 1)
            assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
            fresh = random_keys(oracle, 2, seed=200 + turn)
            assert np.array_equal(table.lookup_ngrams(fresh), oracle.lookup_ngrams(fresh))
        assert eventually(lambda: grown(honest, before, "shm_refused")["shm_refused"] > 100)
        counted = grown(honest, before, "lookups", "dram_hits")
        assert 0 < counted["lookups"] < 2**45
    assert "failed unexpectedly" not in roomy.log


def test_whoever_is_no_client_gets_nothing(roomy: Daemon) -> None:
    path = roomy.unix.removeprefix("unix:") + handoff.SUFFIX
    for packet, told in (
        (b"GET / HTTP/1.1", "hands over shared memory"),
        (handoff.HELLO.pack(handoff.MAGIC, 99, 0), "version 99"),
        (b"", None),
    ):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(20)
            stranger.connect(path)
            if told is None:
                continue
            stranger.send(packet)
            answer, descriptors, _, _ = socket.recv_fds(stranger, 10_000, 10)
            assert told in answer.decode()
            assert descriptors == []
            assert stranger.recv(1) == b""


def test_no_more_clients_than_are_allowed(
    packed: PackedStore, roomy: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    """Who finds no place goes by gRPC, says so once, and attaches when there is one."""
    clients = [connect(roomy.unix) for _ in range(6)]
    try:
        assert all(map(attached, clients))
        with caplog.at_level(logging.WARNING, "engram_client"), connect(roomy.unix) as late:
            assert not attached(late)
            assert "shm.clients_max" in caplog.text
            keys = random_keys(packed.oracles[V41], 5, seed=110)
            assert np.array_equal(
                late.table(V41).lookup_ngrams(keys), packed.oracles[V41].lookup_ngrams(keys)
            )
            clients.pop().close()
            assert eventually(lambda: attached(late))
        assert caplog.text.count("no shared memory") == 1
    finally:
        for client in clients:
            client.close()


def test_a_daemon_that_offers_none(
    packed: PackedStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = serve_command(packed.copy_to(tmp_path), serve_unix=tmp_path / "s", shm_enabled="false", **SMALL)
    with running(command, tmp_path) as daemon, connect(daemon.unix) as client:
        assert not attached(client)
        assert "does not offer any" in caplog.text
        assert np.array_equal(client.table(PLAIN).lookup(np.arange(4)), packed.oracles[PLAIN].rows[:4])


def test_permission_follows_the_first_socket(packed: PackedStore, tmp_path: Path) -> None:
    with running(serve_command(packed.copy_to(tmp_path), serve_unix=tmp_path / "s", **SMALL), tmp_path):
        first, second = os.stat(tmp_path / "s"), os.stat(tmp_path / "s.shm")
        assert (first.st_mode, first.st_uid, first.st_gid) == (second.st_mode, second.st_uid, second.st_gid)


def test_a_thousand_connections_leave_nothing_behind(roomy: Daemon) -> None:
    path = roomy.unix.removeprefix("unix:")

    def come_and_go() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.settimeout(20)
            client.connect(path + handoff.SUFFIX)
            client.send(handoff.hello())
            received = handoff.receive_layout(client)
            assert received is not None
            handoff.close_all(received[1])

    come_and_go()
    assert eventually(lambda: mailboxes_of(roomy) == 0)
    ours, theirs = len(os.listdir("/proc/self/fd")), open_files(roomy)
    maps = Path(f"/proc/{roomy.process.pid}/maps").read_text().count("\n")
    for _ in range(1000):
        come_and_go()
        assert eventually(lambda: mailboxes_of(roomy) <= 3)
    assert eventually(lambda: mailboxes_of(roomy) == 0)
    assert eventually(lambda: open_files(roomy) == theirs)
    assert len(os.listdir("/proc/self/fd")) == ours
    assert Path(f"/proc/{roomy.process.pid}/maps").read_text().count("\n") <= maps + 20


def test_clients_leave_nothing_behind_in_their_own_process(roomy: Daemon) -> None:
    def visit() -> None:
        with connect(roomy.unix) as client:
            assert attached(client)
            client.table(V41).lookup_ngrams(np.ones((2, 3), np.int64))

    visit()
    assert eventually(lambda: mapped_arenas() == 0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        visit()
    assert eventually(lambda: mapped_arenas() == 0)
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 2), "gRPC closes in its own time"


FORK = """
import os, signal, sys, time
import numpy as np
from engram_client import connect

with connect(sys.argv[1]) as client:
    table, keys = client.table("v41"), np.arange(30).reshape(10, 3)
    rows = table.lookup_ngrams(keys)
    mailbox = client._transport._link.attachment.mailbox
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        assert client._transport._link.attachment is None
        ok = np.array_equal(table.lookup_ngrams(keys), rows)
        while not client._transport.attached:
            time.sleep(0.01)
        ok &= client._transport._link.attachment.mailbox.address != 0
        ok &= np.array_equal(table.lookup_ngrams(keys + 100), table.lookup_ngrams(keys + 100))
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert client._transport._link.attachment.mailbox is mailbox
    assert np.array_equal(table.lookup_ngrams(keys), rows)
"""


def test_a_forked_child_attaches_by_itself(roomy: Daemon) -> None:
    command = [sys.executable, "-c", FORK, roomy.unix]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_closed_client_waits_for_nothing(packed: PackedStore, own: Daemon) -> None:
    client = connect(own.unix)
    table = client.table(V41)
    own.ask("hold")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(table.lookup_ngrams, random_keys(packed.oracles[V41], 3), timeout=None)
        own.ask("wait 1")
        client.close()
        with pytest.raises((errors.Cancelled, errors.Unavailable)):
            waiting.result(20)
    own.ask("release")
    own.signal(signal.SIGTERM)
    assert own.wait() == 0


def test_a_request_takes_no_more_than_its_share(packed: PackedStore, roomy: Daemon) -> None:
    with connect(roomy.unix) as client:
        mailbox = mailbox_of(client)
        largest = mailbox.entries_max(2112)
        assert mailboxes.SHARE * largest * 2112 <= 1 << 20 < (mailboxes.SHARE + 1) * (largest + 1) * 2112


@pytest.mark.parametrize("entries", [2, 40, 300])
def test_prefetched_rows(packed: PackedStore, own: Daemon, entries: int) -> None:
    """Missing, mixed and cached; no thread of this process takes part."""
    oracle = packed.oracles[V41]
    with connect(own.unix) as client:
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
        own.ask("hold")
        late = table.prefetch_ngrams(random_keys(oracle, 3, seed=121))
        assert not late.done()
        with pytest.raises(errors.DeadlineExceeded):
            late.wait(0.01)
        own.ask("release")
        assert np.array_equal(late.wait(30), oracle.lookup_ngrams(random_keys(oracle, 3, seed=121)))


def test_prefetches_given_up(packed: PackedStore, own: Daemon) -> None:
    """Cancelled, dropped and overtaken by their own timeout: all memory comes back, later and not before."""
    oracle = packed.oracles[V41]
    with connect(own.unix, prefetch_handles_max=4) as client:
        table, mailbox = client.table(V41), mailbox_of(client)
        own.ask("hold")
        cancelled, dropped, hasty = (
            table.prefetch_ngrams(random_keys(oracle, 3, seed=130 + i), timeout=t)
            for i, t in enumerate((None, None, 0.02))
        )
        own.ask("wait 1")
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
        own.ask("release")
        for i, handle in enumerate(handles):
            keys = random_keys(oracle, 1, seed=140 + i)
            assert np.array_equal(handle.wait(30), oracle.lookup_ngrams(keys))
        assert eventually(lambda: all(request.settled() for request in mailbox._returned))
        mailbox._reap()
        assert not any(mailbox._taken)
        assert len(mailbox._free_slots) == SLOTS


def test_a_prefetch_outlives_its_daemon(packed: PackedStore, tmp_path: Path, impatient: None) -> None:
    folder, oracle, path = packed.copy_to(tmp_path), packed.oracles[V41], tmp_path / "s"
    keys = random_keys(oracle, 5, seed=150)
    with running(simulated_command(folder, serve_unix=path, **SMALL), tmp_path) as daemon:
        client = connect(daemon.unix)
        daemon.ask("hold")
        handle = client.table(V41).prefetch_ngrams(keys)
        daemon.ask("wait 1")
        daemon.kill()
    with pytest.raises(errors.Unavailable):
        handle.wait(30)
    client.close()
