"""The daemon's life: how it starts, what it refuses to start with, how it drains, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engram_client import connect, errors
from engram_client.transport import grpc as transport
from engram_client.transport.base import LookupRequest
from engram_client.wire.convert import request_to_message
from tests.support.daemon import Daemon, environment, running, serve_command, serve_once, simulated_command
from tests.support.stores import (
    ALL_TABLES,
    PLAIN,
    V41,
    PackedStore,
    eventually,
    random_keys,
    row_file,
)
from tierstore.cli import main

SMALL = {"dram_budget_bytes": "2MiB", "nvme_staging_bytes": "2MiB", "nvme_read_threads": 4, "shm_workers": 8}
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that tells at once when nobody answers."""
    monkeypatch.setattr(transport, "RECONNECT_S", 0.05)


def rows_of(packed: PackedStore) -> np.ndarray:
    return packed.oracles[PLAIN].rows[:5]


@pytest.fixture
def serve_here(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str]]]:
    """`tierstore serve` in this process, where it refuses to start: exit code and stderr."""
    interval = sys.getswitchinterval()

    def serve(directory: Path, **settings: Any) -> tuple[int, str]:
        accepted = threading.Timer(20, os.kill, (os.getpid(), signal.SIGTERM))  # then it would serve on
        accepted.start()
        code = main(serve_command(directory, **settings)[3:])
        accepted.cancel()
        out, err = capfd.readouterr()
        assert out == ""
        return code, err

    yield serve
    sys.setswitchinterval(interval)


@pytest.mark.parametrize(("settings", "what"), [
    ({}, "$.serve: neither serve.unix nor serve.tcp is set"),
    ({"serve_tcp": "127.0.0.1:{taken}"}, "cannot serve on 127.0.0.1:{taken}: Address already in use; choose"),
    ({"serve_unix": "{live}"}, "$.serve.unix: another process serves on {live}; stop it"),
    ({"serve_unix": "{tmp}/file"}, "$.serve.unix: {tmp}/file exists and is not a socket"),
    ({"serve_unix": "{tmp}/" + "x" * 108}, "expected a path of at most 107 bytes"),
    ({"serve_unix": "{tmp}/nosuch/x"}, "$.serve.unix: there is no directory {tmp}/nosuch"),
    ({"serve_tcp": "0.0.0.0:0"}, "0.0.0.0 can be reached from other machines"),
    ({"serve_tcp": "[::]:0"}, "[::] can be reached from other machines"),
    ({"serve_tcp": "localhost"}, "expected HOST:PORT"),
    ({"serve_tcp": "127.0.0.1:0", "dram_budget_bytes": -1}, "$.dram.budget_bytes"),
    ({"serve_tcp": "127.0.0.1:0", "dram_budget_bytes": "900TiB"}, "more than this process may use"),
    ({"serve_tcp": "127.0.0.1:0", "dram_budget_bytes": 100}, "$.dram.budget_bytes: expected at least"),
    ({"serve_tcp": "127.0.0.1:0", "nvme_staging_bytes": "64KiB"}, "$.nvme.staging_bytes"),
    ({"dram_budgetbytes": 100}, "dram.budgetbytes"),
])  # fmt: skip
def test_a_bad_configuration_ends_the_start_with_one_line(
    packed: PackedStore, tmp_path: Path, daemon: Daemon, serve_here: Any, settings: dict[str, Any], what: str
) -> None:
    (tmp_path / "file").write_text("precious")
    live = daemon.unix.removeprefix("unix:")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"taken": taken.getsockname()[1], "live": live, "tmp": tmp_path}
        settings = {k: v.format(**names) if isinstance(v, str) else v for k, v in settings.items()}
        code, said = serve_here(packed.copy_to(tmp_path), **settings)
    ours = [line for line in said.splitlines() if not re.match(r"\d{4}-\d\d-\d\d ", line)]  # less the log
    assert (code, len(ours)) == (2, 1), said
    message = json.loads(ours[0])
    assert message["error"] == "config_error"
    assert what.format(**names).replace("{", "") in message["message"]
    assert (tmp_path / "file").read_text() == "precious"
    with connect(daemon.unix) as client:  # the live socket was not touched
        assert np.array_equal(client.table(PLAIN).lookup(np.arange(5)), rows_of(packed))


def test_a_store_that_cannot_be_served_is_exit_code_3_or_4(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path, own=ALL_TABLES)
    for name in ALL_TABLES:
        os.truncate(row_file(folder, name), 5000)
    done = serve_once(folder, serve_tcp="127.0.0.1:0", **SMALL)
    assert (done.returncode, "is truncated" in done.stderr.splitlines()[-1]) == (3, True), done.stderr
    healthy = packed.copy_to(tmp_path / "healthy")
    with connect(f"local:{healthy}"):
        done = serve_once(healthy, serve_tcp="127.0.0.1:0", **SMALL)
    assert (done.returncode, f"pid {os.getpid()}" in done.stderr) == (4, True), done.stderr


def test_a_damaged_table_does_not_stop_the_daemon(packed: PackedStore, tmp_path: Path) -> None:
    folder = packed.copy_to(tmp_path, own=(V41, PLAIN))
    os.truncate(row_file(folder, V41), 5000)
    with row_file(folder, PLAIN).open("r+b") as file:  # the page that warming up reads first
        file.seek(2 * 4096 + 100)
        file.write(b"\xff\x00\xff")
    with running(serve_command(folder, serve_unix=tmp_path / "s", **SMALL), tmp_path) as daemon:
        assert "'v41' is not served" in daemon.log
        assert "'plain' is damaged" in daemon.log
        with connect(daemon.unix) as client:
            assert set(client.tables()) == set(ALL_TABLES) - {V41}
            with pytest.raises(errors.FormatError, match=r"'v41' is not served: .*truncated"):
                client.table(V41)
            table, rows = client.table(PLAIN), packed.oracles[PLAIN].rows
            with pytest.raises(errors.DataCorrupt, match=r"page 2 of .*rows 0 to 169"):
                table.lookup(np.arange(3))
            assert np.array_equal(table.lookup(np.arange(170, 400)), rows[170:400])
        assert daemon.stop() == 0


def test_killed_in_mid_request_and_started_again(
    packed: PackedStore, tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting calls end with Unavailable; the same client works again once a daemon is back."""
    folder, oracle, path = packed.copy_to(tmp_path), packed.oracles[V41], tmp_path / "s"
    keys = random_keys(oracle, 10)
    with running(simulated_command(folder, serve_unix=path, **SMALL), tmp_path) as daemon:
        client = connect(daemon.unix)
        table = client.table(V41)
        daemon.ask("hold")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(table.lookup_ngrams, keys, timeout=None)
            handle = table.prefetch_ngrams(random_keys(oracle, 10, seed=1), timeout=None)
            daemon.ask("wait 2")
            daemon.kill()
            for wait in (waiting.result, handle.wait):
                with pytest.raises(ConnectionError) as caught:
                    wait(20)
                assert type(caught.value) is errors.Unavailable
        with pytest.raises(errors.Unavailable, match="no daemon answers"):
            table.lookup_ngrams(keys)
    assert path.exists()  # a killed daemon cannot clean up; the next one replaces it
    monkeypatch.setattr(transport, "RECONNECT_S", 60)
    with ThreadPoolExecutor(1) as threads:
        patient = threads.submit(table.lookup_ngrams, keys)  # repeated until somebody answers
        with running(serve_command(folder, serve_unix=path, **SMALL), tmp_path) as daemon:
            assert np.array_equal(patient.result(60), oracle.lookup_ngrams(keys))
            assert client.stats()["tables_served"] == len(ALL_TABLES)
            client.close()
            assert daemon.stop() == 0
    assert not path.exists()


def test_sigterm_drains(packed: PackedStore, tmp_path: Path, impatient: None) -> None:
    """Running requests finish, new ones are refused, health says so, and the exit code is 0."""
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    batches, cached = [random_keys(oracle, 10, seed=i) for i in range(3)], random_keys(oracle, 4, seed=9)
    with running(simulated_command(folder, serve_unix=tmp_path / "s", **SMALL), tmp_path) as daemon:
        client = connect(daemon.unix)
        table = client.table(V41)
        table.lookup_ngrams(cached)
        channel = grpc.insecure_channel(daemon.unix)
        health = health_pb2_grpc.HealthStub(channel)
        watching = health.Watch(health_pb2.HealthCheckRequest(service="tierstore.v1.MemoryService"))
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        daemon.ask("hold")
        with ThreadPoolExecutor(3) as threads:
            waiting = [threads.submit(table.lookup_ngrams, keys) for keys in batches]
            daemon.ask("wait 3")
            daemon.signal(signal.SIGTERM)
            assert next(watching).status == NOT_SERVING
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=20).status == NOT_SERVING
            for ask in (table.lookup_ngrams, table.warm_ngrams):
                assert eventually(lambda ask=ask: is_refused(ask, cached))  # health changes first
            assert daemon.process.poll() is None
            daemon.ask("release")
            for rows, keys in zip(waiting, batches, strict=True):
                assert np.array_equal(rows.result(30), oracle.lookup_ngrams(keys))
        assert daemon.wait() == 0  # though somebody still watches the health
        assert "stopped" in daemon.log
        client.close()
        channel.close()


def test_draining_ends_at_its_timeout_and_leaves_a_hanging_disk(
    packed: PackedStore, tmp_path: Path, impatient: None
) -> None:
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    settings = {**SMALL, "serve_drain_timeout_s": 0.1, "dram_snapshot_close_timeout_s": 0}
    with running(simulated_command(folder, serve_unix=tmp_path / "s", **settings), tmp_path) as daemon:
        with connect(daemon.unix) as client, ThreadPoolExecutor(1) as threads:
            table = client.table(V41)
            daemon.ask("hold")
            waiting = threads.submit(table.lookup_ngrams, random_keys(oracle, 10), timeout=None)
            daemon.ask("wait 1")
            daemon.signal(signal.SIGTERM)
            with pytest.raises((errors.Unavailable, errors.Cancelled)):
                waiting.result(20)
        assert daemon.wait() == 130
        assert "reads still hang in the disk" in daemon.log


def is_refused(ask: Any, keys: np.ndarray) -> bool:
    try:
        ask(keys)
    except errors.Unavailable as error:
        return "shutting down" in str(error)
    return False


def test_a_second_signal_ends_it_at_once(packed: PackedStore, tmp_path: Path, impatient: None) -> None:
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    with running(simulated_command(folder, serve_unix=tmp_path / "s", **SMALL), tmp_path) as daemon:
        with connect(daemon.unix) as client, ThreadPoolExecutor(1) as threads:
            table = client.table(V41)
            daemon.ask("hold")
            waiting = threads.submit(table.lookup_ngrams, random_keys(oracle, 10), timeout=None)
            daemon.ask("wait 1")
            daemon.signal(signal.SIGTERM)
            assert eventually(lambda: "draining" in daemon.log)
            daemon.signal(signal.SIGINT)
            assert daemon.wait() == 130
            with pytest.raises(errors.Unavailable):
                waiting.result(20)
        assert "second signal" in daemon.log


def test_overload_is_refused(packed: PackedStore, tmp_path: Path) -> None:
    """With every place taken by reads that hang, nothing piles up behind them."""
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    settings = {**SMALL, "serve_concurrent_requests_max": 3, "serve_workers": 2, "shm_enabled": "false"}
    with running(simulated_command(folder, serve_unix=tmp_path / "s", **settings), tmp_path) as daemon:
        with connect(daemon.unix) as client, grpc.insecure_channel(daemon.unix) as channel:
            table, cached = client.table(V41), random_keys(oracle, 4, seed=9)
            table.lookup_ngrams(cached)

            daemon.ask("hold")
            batches = [random_keys(oracle, 2, seed=20 + i) for i in range(3)]
            patient = [table.prefetch_ngrams(keys, timeout=None) for keys in batches]
            daemon.ask("wait 2")  # the third waits for a thread
            assert eventually(lambda: is_overloaded(table, cached))
            with pytest.raises(errors.Overloaded, match=r"3 look-ups are in work.*concurrent_requests_max"):
                table.lookup_ngrams(cached)
            assert client.stats()["lookups"] > 0  # the daemon itself is well
            daemon.ask("release")
            for keys, handle in zip(batches, patient, strict=True):
                assert np.array_equal(handle.wait(30), oracle.lookup_ngrams(keys))
            assert eventually(lambda: not is_overloaded(table, cached))

            daemon.ask("hold")  # callers whose time is up give their places back at once
            for handle in [
                table.prefetch_ngrams(random_keys(oracle, 2, seed=i), timeout=0.3) for i in range(3)
            ]:
                with pytest.raises((errors.DeadlineExceeded, errors.Overloaded)):
                    handle.wait(20)
            assert eventually(lambda: not is_overloaded(table, cached))

            daemon.ask("release")  # what a thread has begun for them ends before what is asked for now
            for handle in [table.prefetch_ngrams(random_keys(oracle, 2, seed=40 + i)) for i in range(2)]:
                handle.wait(20)
            daemon.ask("hold")
            lookup = channel.unary_unary("/tierstore.v1.MemoryService/Lookup", bytes, bytes)
            gone = [lookup.future(a_request(table, random_keys(oracle, 2, seed=30 + i))) for i in range(3)]
            daemon.ask("wait 2")
            assert eventually(lambda: is_overloaded(table, cached))
            for call in gone:  # callers who go away leave a read behind, and it keeps its place
                call.cancel()
            assert all(is_overloaded(table, cached) for _ in range(100))
            daemon.ask("release")
            assert eventually(lambda: not is_overloaded(table, cached))
            assert np.array_equal(table.lookup_ngrams(cached), oracle.lookup_ngrams(cached))
        assert "never retrieved" not in daemon.log


def a_request(table: Any, keys: np.ndarray) -> bytes:
    request = LookupRequest(table.spec.name, table.spec.generation, "ngram", keys)
    return request_to_message(request).SerializeToString()


def is_overloaded(table: Any, keys: np.ndarray) -> bool:
    try:
        table.lookup_ngrams(keys)
    except errors.Overloaded:
        return True
    return False


def test_closing_a_client_ends_its_calls(packed: PackedStore, tmp_path: Path) -> None:
    folder, oracle = packed.copy_to(tmp_path), packed.oracles[V41]
    with running(simulated_command(folder, serve_unix=tmp_path / "s", **SMALL), tmp_path) as daemon:
        client = connect(daemon.unix)
        table = client.table(V41)
        daemon.ask("hold")
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(table.lookup_ngrams, random_keys(oracle, 3))
            daemon.ask("wait 1")
            client.close()
            with pytest.raises((errors.Cancelled, errors.Unavailable)):
                waiting.result(20)
        for call in (client.tables, client.stats, lambda: table.lookup_ngrams(random_keys(oracle, 3))):
            with pytest.raises(errors.Cancelled, match="closed"):
                call()
        daemon.ask("release")
        assert daemon.stop() == 0


FORK = """
import os, signal, sys
import numpy as np
from engram_client import connect

with connect(sys.argv[1]) as client:
    table = client.table("plain")
    rows = table.lookup(np.arange(5))
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        ok = np.array_equal(table.lookup(np.arange(5)), rows)
        ok &= np.array_equal(table.prefetch(np.arange(5)).wait(20), rows)
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(table.lookup(np.arange(5)), rows)
"""


def test_a_forked_child_makes_its_own_connection(daemon: Daemon) -> None:
    """In a process of its own: gRPC allows a fork only while no other thread is inside it."""
    command = [sys.executable, "-c", FORK, daemon.unix]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0, done.stderr
