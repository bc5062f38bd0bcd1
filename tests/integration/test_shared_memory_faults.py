"""Shared memory where things go wrong: kills, forks, strangers, hostile words, and what is left behind."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engram_client import connect, errors
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
from engram_client.transport import handoff
from tests.support.daemon import Daemon, environment, running, serve_command, simulated_command
from tests.support.shared_memory import (
    SMALL,
    attached,
    grown,
    mailbox_of,
    mailboxes_of,
    mapped_arenas,
    open_files,
)
from tests.support.stores import (
    PLAIN,
    V41,
    PackedStore,
    eventually,
    random_keys,
    repacked_v41,
)


def test_killed_and_started_again(packed: PackedStore, tmp_path: Path, reattaching_at_once: None) -> None:
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


def test_killed_in_mid_request(packed: PackedStore, obedient: Daemon, reattaching_at_once: None) -> None:
    with connect(obedient.unix) as client, ThreadPoolExecutor(1) as threads:
        table = client.table(V41)
        obedient.ask("hold")
        waiting = threads.submit(table.lookup_ngrams, random_keys(packed.oracles[V41], 5), timeout=None)
        obedient.ask("wait 1")
        obedient.kill()
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


def test_clients_that_are_killed_cost_nothing(packed: PackedStore, obedient: Daemon) -> None:
    """At whatever instruction: with requests on the way, and in the middle of a read."""
    oracle = packed.oracles[V41]
    with connect(obedient.unix) as client:
        table, start = client.table(V41), open_files(obedient)
        victims = [doomed(obedient, seed) for seed in range(3)]
        assert open_files(obedient) > start
        before = client.stats()
        obedient.ask("hold")
        obedient.ask("wait 1")
        for victim in victims:
            victim.kill()
            victim.communicate()
        obedient.ask("release")
        keys = random_keys(oracle, 20, seed=90)
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        assert eventually(lambda: open_files(obedient) <= start)
        assert eventually(lambda: mailboxes_of(obedient) == 1)
        assert grown(client, before, "shm_refused")["shm_refused"] == 0
        assert attached(client)


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
    assert eventually(lambda: open_files(roomy) <= theirs)
    assert len(os.listdir("/proc/self/fd")) <= ours
    assert Path(f"/proc/{roomy.process.pid}/maps").read_text().count("\n") <= maps + 20


def held(process: int | str) -> dict[str, int]:
    """Files, threads and shared memory that a process has open."""
    root = Path(f"/proc/{process}")
    return {
        "files": len(os.listdir(root / "fd")),
        "threads": len(os.listdir(root / "task")),
        "shared mappings": (root / "maps").read_text().count("memfd:tierstore"),
        "mappings": (root / "maps").read_text().count("\n"),
    }


def test_clients_leave_nothing_behind_on_either_side(roomy: Daemon) -> None:
    """The whole client, gRPC and all, 300 times over; a leak of one each would be 300."""
    slack = {"files": 4, "threads": 8, "shared mappings": 0, "mappings": 40}  # gRPC closes in its own time

    def visit() -> None:
        with connect(roomy.unix) as client:
            assert attached(client)
            client.table(V41).lookup_ngrams(np.ones((2, 3), np.int64))

    def no_more_than(before: dict[str, int], process: int | str) -> bool:
        gc.collect()
        now = held(process)
        return all(now[what] <= before[what] + slack[what] for what in slack)

    for _ in range(20):
        visit()
    assert eventually(lambda: gc.collect() >= 0 and mapped_arenas() == 0)
    assert eventually(lambda: mailboxes_of(roomy) == 0)
    ours, theirs = held("self"), held(roomy.process.pid)
    for _ in range(300):
        visit()
    assert eventually(lambda: no_more_than(ours, "self")), held("self")
    assert eventually(lambda: no_more_than(theirs, roomy.process.pid)), held(roomy.process.pid)


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


def test_a_closed_client_waits_for_nothing(packed: PackedStore, obedient: Daemon) -> None:
    client = connect(obedient.unix)
    table = client.table(V41)
    obedient.ask("hold")
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(table.lookup_ngrams, random_keys(packed.oracles[V41], 3), timeout=None)
        obedient.ask("wait 1")
        client.close()
        with pytest.raises((errors.Cancelled, errors.Unavailable)):
            waiting.result(20)
    obedient.ask("release")
    obedient.signal(signal.SIGTERM)
    assert obedient.wait() == 0


def test_a_prefetch_outlives_its_daemon(
    packed: PackedStore, tmp_path: Path, reattaching_at_once: None
) -> None:
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
