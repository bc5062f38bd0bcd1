"""An empty gRPC service: grpc.aio as ours is, in a process of its own, that looks nothing up.

`/tierbench.Empty/N` answers any request with N bytes that were there before it came. The client
below sends and returns plain bytes, without a protobuf object on either side.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from engram_client.errors import Unavailable
from engram_client.transport.grpc import OPTIONS
from tierbench.signals import deaf

SERVICE = "/tierbench.Empty/"
MESSAGE_BYTES_MAX = 64 << 20


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self) -> None:
        self._methods: dict[str, Any] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        name = handler_call_details.method
        if name not in self._methods:
            reply = bytes(int(name.removeprefix(SERVICE)))

            async def answer(_request: bytes, _context: Any) -> bytes:
                return reply

            self._methods[name] = grpc.unary_unary_rpc_method_handler(answer)
        return self._methods[name]


async def _serve(socket_path: str) -> None:
    options = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX), ("grpc.max_send_message_length", -1)]
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((_Handlers(),))
    server.add_insecure_port(f"unix:{socket_path}")
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


@dataclass(frozen=True)
class EmptyService:
    """A running one; `targets` are gRPC's, by transport: "unix" and "tcp"."""

    pid: int
    targets: dict[str, str]


@contextmanager
def running_empty_service() -> Iterator[EmptyService]:
    """Raises Unavailable where it does not start."""
    with tempfile.TemporaryDirectory(prefix="tierbench-") as folder:
        path = f"{folder}/socket"
        command = [sys.executable, "-m", "tierbench.yardsticks.empty_service", path]
        with deaf():
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                raise Unavailable("the empty gRPC service did not start; see above")
            yield EmptyService(process.pid, {"unix": f"unix:{path}", "tcp": f"127.0.0.1:{port}"})
        finally:
            process.terminate()
            process.wait()


class EmptyClient:
    """Calls of fixed sizes over one channel, with the options our own client has."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, options=OPTIONS)

    def caller(self, reply_bytes: int) -> Any:
        """A multicallable: bytes in, `reply_bytes` bytes out."""
        return self._channel.unary_unary(f"{SERVICE}{reply_bytes}")

    def close(self) -> None:
        self._channel.close()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
