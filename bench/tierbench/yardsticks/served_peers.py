"""Other services that serve such rows to another process: EngramDB's server and Mooncake's EngramStore.

Each runs in a process of its own, holds a table of the same shape in memory, and is asked by its own
client for row ids; a service whose package is not installed is left out. Neither checks what it
returns, evicts, or reads n-gram keys, so they are given row ids that were hashed beforehand.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engram_client.errors import DataCorrupt, Unavailable
from tierbench.yardsticks.engramdb_fetch import write_shard

Fetch = Callable[[np.ndarray], np.ndarray]  # row ids int64 [tokens, H] of head-wise ids -> rows
PATIENCE_S = 60.0


def peer_row(rows_per_head: int, head: int, row_bytes: int) -> np.ndarray:
    """What a head's table holds in every peer, uint8 [rows_per_head, row_bytes]."""
    return np.random.default_rng(head).integers(0, 256, (rows_per_head, row_bytes), np.uint8)


@contextmanager
def running_peers(heads: int, rows_per_head: int, row_bytes: int) -> Iterator[dict[str, Fetch]]:
    """A fetch by name of each peer that is installed, checked against what was put in.

    Raises Unavailable where one does not start, DataCorrupt where its rows are wrong.
    """
    with ExitStack() as stack:
        peers: dict[str, Fetch] = {}
        for name, package, start in (
            ("EngramDB server", "engramdb", running_engramdb),
            ("Mooncake EngramStore", "mooncake", running_mooncake),
        ):
            if importlib.util.find_spec(package):
                fetch = stack.enter_context(start(heads, rows_per_head, row_bytes))
                _check(name, fetch, heads, rows_per_head, row_bytes)
                peers[name] = fetch
        yield peers


def _check(name: str, fetch: Fetch, heads: int, rows_per_head: int, row_bytes: int) -> None:
    ids = np.random.default_rng(1).integers(0, rows_per_head, (4, heads), np.int64)
    found = fetch(ids).reshape(4, heads, row_bytes)
    for head in range(heads):
        if (found[:, head] != peer_row(rows_per_head, head, row_bytes)[ids[:, head]]).any():
            raise DataCorrupt(f"{name} returned other rows than were put in; its figures would mean nothing")


@contextmanager
def running_engramdb(heads: int, rows_per_head: int, row_bytes: int) -> Iterator[Fetch]:
    """EngramDB's binary server over loopback TCP; its files stay in the page cache."""
    from engramdb.service_client import EngramDBClient

    with tempfile.TemporaryDirectory(prefix="tierbench-") as folder:
        write_shard(Path(folder) / "rows", (peer_row(rows_per_head, h, row_bytes) for h in range(heads)))
        with _process("engramdb", folder) as port, EngramDBClient("127.0.0.1", port, PATIENCE_S) as client:
            base = np.arange(heads, dtype=np.int64) * rows_per_head
            sizes = {"shards": 1, "rows_per_shard": heads * rows_per_head, "width": row_bytes}

            def fetch(ids: np.ndarray) -> np.ndarray:
                numbers = (ids + base).reshape(-1).tolist()
                return np.frombuffer(client.fetch_raw("rows", numbers, **sizes), np.uint8)

            yield fetch


@contextmanager
def running_mooncake(heads: int, rows_per_head: int, row_bytes: int) -> Iterator[Fetch]:
    """Mooncake's EngramStore over TCP: a master, a process that holds the table, and this client."""
    with ExitStack() as stack:
        master, metrics = _free_port(), _free_port()
        binary = Path(_location("mooncake")) / "mooncake_master"
        command = [str(binary), "-rpc_port", str(master), "-metrics_port", str(metrics)]
        stack.enter_context(_running(subprocess.Popen(command, stderr=subprocess.DEVNULL)))
        _await_port(master)
        sizes = [str(n) for n in (master, heads, rows_per_head, row_bytes)]
        stack.enter_context(_process("mooncake", *sizes))
        store = _mooncake_store(master, 0)
        stack.callback(store.close)
        engram = _mooncake_engram(store, heads, rows_per_head, row_bytes)

        def fetch(ids: np.ndarray) -> np.ndarray:
            return np.asarray(engram.lookup(ids[:, None, :])).view(np.uint8)

        yield fetch


def _mooncake_store(master: int, segment_bytes: int) -> Any:
    os.environ.setdefault("GLOG_minloglevel", "2")
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    address, here = f"127.0.0.1:{master}", f"127.0.0.1:{_free_port()}"
    if code := store.setup(here, "P2PHANDSHAKE", segment_bytes, 256 << 20, "tcp", "", address):
        raise Unavailable(f"Mooncake's client did not start: setup returned {code}")
    return store


def _mooncake_engram(store: Any, heads: int, rows_per_head: int, row_bytes: int) -> Any:
    from mooncake.store import EngramStore, EngramStoreConfig

    config = EngramStoreConfig()
    config.embedding_dim = row_bytes // 4  # it knows float32 alone, and does not look at them
    config.table_vocab_sizes = [rows_per_head] * heads
    return EngramStore(1, config, store)


def _serve_mooncake(master: int, heads: int, rows_per_head: int, row_bytes: int) -> None:
    store = _mooncake_store(master, max(64 << 20, 2 * heads * rows_per_head * row_bytes))
    engram = _mooncake_engram(store, heads, rows_per_head, row_bytes)
    engram.populate([peer_row(rows_per_head, h, row_bytes).view(np.float32) for h in range(heads)])
    print("ready 0", flush=True)
    signal.pause()


def _serve_engramdb(folder: str) -> None:
    from engramdb.server import EngramDBBinaryServer
    from engramdb.tables import Database

    with EngramDBBinaryServer(Database(folder), "127.0.0.1", 0) as server:
        print("ready", server.server_address[1], flush=True)
        server.serve_forever()


@contextmanager
def _process(*arguments: str) -> Iterator[int]:
    """This module in a process of its own; the number it says it is ready with."""
    command = [sys.executable, "-m", "tierbench.yardsticks.served_peers", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with _running(process):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready "):
                yield int(line.split()[1])
                return
        raise Unavailable(f"the yardstick {arguments[0]} did not start")


@contextmanager
def _running(process: subprocess.Popen[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _location(package: str) -> str:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, "asked only where it is installed"
    return os.path.dirname(spec.origin)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_port(port: int) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise Unavailable(f"nobody listens on port {port}")


if __name__ == "__main__":
    if sys.argv[1] == "engramdb":
        _serve_engramdb(sys.argv[2])
    else:
        _serve_mooncake(*map(int, sys.argv[2:]))
