"""Connecting to a memory service, and the object that comes of it."""

from __future__ import annotations

import logging
import os
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from engram_client.deadline import Deadline
from engram_client.errors import BadRequest, ConfigError, Unavailable
from engram_client.prefetch import Prefetcher
from engram_client.spec import TableSpec
from engram_client.table import Table
from engram_client.trained import Training
from engram_client.transport.base import RESIZE_TIMEOUT_S, Transport
from engram_client.transport.local import LocalTransport

if TYPE_CHECKING:
    from engram_client.hbm.hot_tables import HotTables

log = logging.getLogger(__name__)
SOCKET_PATH_BYTES_MAX = 107  # of sockaddr_un, without its final zero
PREFETCH_THREADS = 4


def _checked_bytes(budget_bytes: Any) -> int:
    """A budget that can be told to a service, which says whether it can be had."""
    if not isinstance(budget_bytes, int) or not 0 <= budget_bytes < 2**63:
        raise ConfigError(f"a budget is a whole number of bytes >= 0, got {budget_bytes!r}")
    return budget_bytes


def connect(
    target: str,
    *,
    prefetch_handles_max: int = 64,
    wait_s: float = 0.0,
    hbm_budget_bytes: int | None = None,
    device: Any = None,
) -> Client:
    """Connect to `target`: "local:DIR", "unix:PATH" or "tcp://HOST:PORT".

    "local:DIR" opens the store directory in this process; the others reach a daemon, which is
    asked for its tables at once. `prefetch_handles_max` bounds the handles open at a time. With
    `wait_s` a daemon that is not there yet is waited for that many seconds.

    With `hbm_budget_bytes` hot records of all tables are kept in that much memory of `device`, of torch
    (default: "cuda"), in this process, and look-ups by ids there are answered from it, there. Over
    "local:DIR" the store's configuration (`hbm.client_budget_bytes`, `hbm.device`) holds where they are not
    given; 0 keeps none.

    Raises BadRequest for a target of another form, Unavailable where no daemon answers, StoreLocked
    where another process has the directory.
    """
    client = Client(_transport(target), target, prefetch_handles_max)
    try:
        client._keep_hot(hbm_budget_bytes, device)
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
        self._hot: HotTables | None = None
        self._close = weakref.finalize(self, _close, transport, self._prefetcher)

    def _keep_hot(self, budget_bytes: int | None, device: Any) -> None:
        """Raises BadRequest for a device that somebody named and that is not there; else it is said."""
        asked = budget_bytes is not None
        if not asked and isinstance(self._transport, LocalTransport):
            budget_bytes, configured = self._transport.hbm_settings()
            device = configured if device is None else device
        if not budget_bytes:
            return
        from engram_client.hbm.hot_tables import HotTables

        try:
            self._hot = HotTables(budget_bytes, "cuda" if device is None else device)
        except BadRequest as error:
            if asked:
                raise
            log.warning(
                "no HBM tier: %s; rows of device tensors are copied from host memory each time", error
            )

    def tables(self) -> dict[str, TableSpec]:
        """Every table served, by name."""
        return self._transport.list_tables()

    def table(self, name: str) -> Table:
        """One table, at the generation that is served now. Raises UnknownTable."""
        spec = self._transport.describe_table(name)
        if self._hot is not None:
            return self._hot.table(spec, self._transport, self._prefetcher, self)
        return Table(spec, self._transport, self._prefetcher, self)

    def training(self, *, rank: int = 0, world: int = 1) -> Training:
        """The tables in training, for the trainer `rank` of `world`.

        "local:DIR" opens them in this process; a daemon must train them (`training.enabled`). Raises
        FormatError where there are none, StoreLocked where another process trains them.
        """
        return Training(self._transport, self._prefetcher, self, rank, world)

    def stats(self) -> dict[str, int]:
        """The service's counters; tierstore/tiers/counters.py says what each counts.

        Those of this client's HBM tier begin with `client_hbm_`; with one this waits for the device.
        """
        hot = self._hot.stats() if self._hot is not None else {}
        return {**self._transport.stats(), **{f"client_{name}": number for name, number in hot.items()}}

    def resize_hbm_tier(self, budget_bytes: int, *, graphs_are_gone: bool = False) -> None:
        """Change the budget of this client's HBM tier, in bytes, as `HbmTier.resize` does.

        Raises BadRequest where there is none, the budget is too small or not there, or graphs hold its
        memory.
        """
        if self._hot is None:
            raise BadRequest("this client keeps no hot records; connect with hbm_budget_bytes=")
        self._hot.resize(budget_bytes, graphs_are_gone=graphs_are_gone)

    def set_dram_budget(self, budget_bytes: int) -> int:
        """Change the service's DRAM budget, in bytes, while it serves; the budget then in force.

        Returns when records have moved and memory was given back. A daemon takes this over its unix socket
        only. Raises ConfigError for a budget it may not use, BadRequest over TCP.
        """
        return self._transport.set_dram_budget(_checked_bytes(budget_bytes))

    def set_hbm_budget(self, budget_bytes: int) -> int:
        """Change what the service takes of device memory, in bytes, 0 for none; the budget then in force.

        Its arena begins anew, empty, and is filled again in the background. Over a daemon's unix socket only.
        Raises ConfigError for a budget that cannot be had, BadRequest over TCP.
        """
        return self._transport.set_hbm_budget(_checked_bytes(budget_bytes))

    def set_training_budget(self, budget_bytes: int, *, timeout: float | None = RESIZE_TIMEOUT_S) -> int:
        """Change the DRAM budget of rows in training, in bytes, while they learn; the budget then in force.

        Dirty rows are written back first, for which updates wait as for a commit; none is lost, and training
        goes on as it would have, bit for bit. Over a daemon's unix socket only. Raises ConfigError for a
        budget that is too small or may not be used, BadRequest where nothing is in training, StorageError,
        Overloaded, DeadlineExceeded: the budget is what it was then.
        """
        return self._transport.set_training_budget(_checked_bytes(budget_bytes), timeout)

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
