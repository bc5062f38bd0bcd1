"""A grpc.aio server around a store: addresses, health, reflection, shared memory beside it, draining."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from pathlib import Path
from urllib.parse import quote

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from engram_client.client import SOCKET_PATH_BYTES_MAX
from engram_client.errors import ConfigError
from tierstore.config import Config
from tierstore.rpc.service import MESSAGE_BYTES_MAX, SERVICE_NAME, MemoryService
from tierstore.rpc.training import TRAINING_NAME, TrainingService
from tierstore.shm import SharedMemory, offer_shared_memory
from tierstore.store import Store
from tierstore.training import TrainingStore

log = logging.getLogger(__name__)

DELIVERY_S = 1.0
OPTIONS_FIXED = [
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a shared port
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", -1),  # replies are bounded by limits.request_reply_bytes_max
]


class Server:
    """Serves one store until `stop`. Use from one event loop."""

    def __init__(self, store: Store, training: TrainingStore | None = None) -> None:
        self._store = store
        self._config: Config = store.config
        self._shared: SharedMemory | None = None
        self._service = MemoryService(store, training)
        self._training = TrainingService(training, store.config) if training is not None else None
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(options=OPTIONS_FIXED)
        self._server.add_generic_rpc_handlers((self._service.handlers(),))
        if self._training is not None:
            self._server.add_generic_rpc_handlers((self._training.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        ours = (SERVICE_NAME, TRAINING_NAME) if self._training is not None else (SERVICE_NAME,)
        names = (*ours, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.addresses: list[str] = []

    async def start(self) -> None:
        """Bind and serve. Raises ConfigError naming the address that cannot be had."""
        serve = self._config.serve
        if serve.unix:
            self._bind_unix(serve.unix)
        if serve.tcp:
            self._bind_tcp(serve.tcp)
        if not self.addresses:
            raise ConfigError(
                "$.serve: neither serve.unix nor serve.tcp is set, so nobody could connect; "
                "for example --unix /run/tierstore.sock, or --tcp 127.0.0.1:7070"
            )
        await self._server.start()
        if serve.unix:
            self._shared = offer_shared_memory(self._store, os.path.abspath(serve.unix))
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def _bind_unix(self, path: str) -> None:
        path = os.path.abspath(path)
        length = len(os.fsencode(path))
        if length > SOCKET_PATH_BYTES_MAX:
            raise ConfigError(
                f"$.serve.unix: {path!r} has {length} bytes; a socket path may have {SOCKET_PATH_BYTES_MAX}; "
                "choose a shorter one"
            )
        if not Path(path).parent.is_dir():
            raise ConfigError(f"$.serve.unix: there is no directory {Path(path).parent}; create it first")
        if Path(path).exists() and not Path(path).is_socket():
            raise ConfigError(f"$.serve.unix: {path} exists and is not a socket; choose another path")
        if _somebody_listens(path):
            raise ConfigError(
                f"$.serve.unix: another process serves on {path}; stop it, or choose another path"
            )
        try:
            self._server.add_insecure_port(f"unix:{quote(path)}")  # to gRPC it is a URI
        except RuntimeError as error:
            raise ConfigError(f"$.serve.unix: cannot serve on {path}: {error}") from error
        self.addresses.append(f"unix:{path}")

    def _bind_tcp(self, address: str) -> None:
        host, _, number = address.rpartition(":")
        try:
            _try_to_bind(host.strip("[]"), int(number))
            port = self._server.add_insecure_port(address)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"$.serve.tcp: cannot serve on {address}: {reason}; choose another address, "
                "or port 0 for any free port"
            ) from error
        self.addresses.append(f"tcp://{host}:{port}")

    async def stop(self, drain_timeout_s: float) -> None:
        """Say not serving, refuse new look-ups, let running ones finish for so long, then cancel.

        Who watches the health does not hold this up: once look-ups are done, their answers get
        `DELIVERY_S` to leave, and open streams end.
        """
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        drains = [self._service.drain(drain_timeout_s)]
        if self._training is not None:
            drains.append(self._training.drain(drain_timeout_s))
        if self._shared is not None:
            drains.append(asyncio.to_thread(self._shared.drain, drain_timeout_s))
        await asyncio.gather(*drains)
        await self._server.stop(min(drain_timeout_s, DELIVERY_S))
        if self._shared is not None:
            await asyncio.to_thread(self._shared.close)
        self._service.close()
        if self._training is not None:
            self._training.close()

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)


def _somebody_listens(path: str) -> bool:
    """Whether the socket file belongs to a living server; a dead one's is left for gRPC to replace."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def _try_to_bind(host: str, port: int) -> None:
    """Raises OSError where nobody could listen there; gRPC would write its own lines about that."""
    failures = []
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
                return
            except OSError as error:
                failures.append(error)
    raise failures[0]
