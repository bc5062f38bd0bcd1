"""Connecting to a memory service, and the object that comes of it."""

from __future__ import annotations

import os
import weakref
from types import TracebackType
from urllib.parse import quote, urlsplit

from engram_client.deadline import Deadline
from engram_client.errors import BadRequest, Unavailable
from engram_client.prefetch import Prefetcher
from engram_client.spec import TableSpec
from engram_client.table import Table
from engram_client.transport.base import Transport
from engram_client.transport.local import LocalTransport

SOCKET_PATH_BYTES_MAX = 107  # of sockaddr_un, without its final zero
PREFETCH_THREADS = 4


def connect(target: str, *, prefetch_handles_max: int = 64, wait_s: float = 0.0) -> Client:
    """Connect to `target`: "local:DIR", "unix:PATH" or "tcp://HOST:PORT".

    "local:DIR" opens the store directory in this process; the others reach a daemon, which is
    asked for its tables at once. `prefetch_handles_max` bounds the handles open at a time. With
    `wait_s` a daemon that is not there yet is waited for that many seconds.

    Raises BadRequest for a target of another form, Unavailable where no daemon answers, StoreLocked
    where another process has the directory.
    """
    client = Client(_transport(target), target, prefetch_handles_max)
    try:
        _await_tables(client, Deadline.after(wait_s))
    except BaseException:
        client.close()
        raise
    return client


def _await_tables(client: Client, deadline: Deadline) -> None:
    while True:
        try:
            client.tables()
            return
        except Unavailable:
            if not deadline.remaining_s():
                raise


class Client:
    """A connection to one service. Thread safe; use as a context manager or call `close`."""

    def __init__(self, transport: Transport, target: str, prefetch_handles_max: int) -> None:
        self.target = target
        self._transport = transport
        self._prefetcher = Prefetcher(PREFETCH_THREADS, prefetch_handles_max)
        self._close = weakref.finalize(self, _close, transport, self._prefetcher)

    def tables(self) -> dict[str, TableSpec]:
        """Every table served, by name."""
        return self._transport.list_tables()

    def table(self, name: str) -> Table:
        """One table, at the generation that is served now. Raises UnknownTable."""
        return Table(self._transport.describe_table(name), self._transport, self._prefetcher, self)

    def stats(self) -> dict[str, int]:
        """The service's counters; tierstore/tiers/counters.py says what each counts."""
        return self._transport.stats()

    def set_dram_budget(self, budget_bytes: int) -> int:
        """Change the service's DRAM budget, in bytes, while it serves; the budget then in force.

        Returns when records have moved and memory was given back. A daemon takes this over its unix socket
        only. Raises ConfigError for a budget it may not use, BadRequest over TCP.
        """
        return self._transport.set_dram_budget(budget_bytes)

    def close(self) -> None:
        """Cancel what has not begun, wait for the rest, disconnect; idempotent."""
        self._close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(transport: Transport, prefetcher: Prefetcher) -> None:
    prefetcher.close()
    transport.close()


def _transport(target: str) -> Transport:
    kind, _, rest = target.partition(":")
    if kind == "local" and rest:
        return LocalTransport(rest)
    if kind == "unix" and rest:
        return _unix(rest)
    if kind == "tcp":
        return _tcp(target)
    raise BadRequest(
        f'connect({target!r}): expected "local:DIR", "unix:PATH" or "tcp://HOST:PORT", for example '
        '"unix:/run/tierstore.sock"'
    )


def _unix(path: str) -> Transport:
    from engram_client.transport.grpc import GrpcTransport
    from engram_client.transport.shared import SharedTransport

    length = len(os.fsencode(os.path.abspath(path)))
    if length > SOCKET_PATH_BYTES_MAX:
        raise BadRequest(
            f"socket path {path!r} has {length} bytes; the system allows {SOCKET_PATH_BYTES_MAX}; "
            "choose a shorter one"
        )
    path = os.path.abspath(path)
    return SharedTransport(path, GrpcTransport(f"unix:{quote(path)}"))  # to gRPC it is a URI


def _tcp(target: str) -> Transport:
    from engram_client.transport.grpc import GrpcTransport

    try:
        parts = urlsplit(target)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    rest = "" if not host else f"{parts.path.strip('/')}{parts.query}{parts.fragment}{parts.username or ''}"
    if not host or not port or rest:
        raise BadRequest(
            f'connect({target!r}): expected "tcp://HOST:PORT", for example "tcp://127.0.0.1:7070"'
        )
    return GrpcTransport(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
