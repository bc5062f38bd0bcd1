"""Reading a committed step from a daemon that trains: opened, read in parts, closed, over its unix socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc
import numpy as np

from engram_client.errors import BadRequest, BatchTooLarge
from engram_client.wire import memory_pb2 as pb
from engram_client.wire.convert import WIRE_INT64
from tierstore.config import Training
from tierstore.rpc.handling import method, serialized
from tierstore.training import TrainingStore
from tierstore.training.open_snapshots import OpenSnapshots

REPLY_BYTES_MAX = 4 << 20
LOOKS_PER_IDLE = 4  # how often idle ones are looked for
InThread = Callable[[Callable[[], Any]], Awaitable[Any]]


class StepReading:
    """Handlers of those methods; `in_thread` runs a function beside the event loop, and bounds how many."""

    def __init__(self, store: TrainingStore, config: Training, in_thread: InThread) -> None:
        self._store, self._in_thread, self._idle_s = store, in_thread, config.snapshot_idle_s
        self._open = OpenSnapshots(config.snapshots_max, config.snapshot_idle_s)
        self._expiring: asyncio.Task[None] | None = None

    def methods(self) -> dict[str, grpc.RpcMethodHandler]:
        return {
            "OpenStep": method(self.open, pb.OpenStepRequest, serialized),
            "ReadStep": method(self.read, pb.ReadStepRequest, serialized),
            "TouchedRows": method(self.touched, pb.TouchedRowsRequest, serialized),
            "CloseStep": method(self.close_step, pb.CloseStepRequest, serialized),
        }

    async def open(self, message: pb.OpenStepRequest, context: Any) -> Any:
        if not context.peer().startswith("unix:"):
            raise BadRequest(
                "steps are read over the daemon's unix socket only; this call came from "
                f"{context.peer()}: run the command on the daemon's machine"
            )
        step = message.step if message.HasField("step") else None
        if self._expiring is None:  # before: who opens one may be gone before it is open
            self._expiring = asyncio.create_task(self._expire())
        number, snapshot = await self._in_thread(lambda: self._open.open(lambda: self._store.snapshot(step)))
        tables = json.dumps([spec.to_json() for spec in snapshot.tables])
        return pb.OpenStepResponse(
            number=number, step=snapshot.step, state=snapshot.state, tables_json=tables
        )

    async def read(self, message: pb.ReadStepRequest, _context: Any) -> Any:
        ids = np.frombuffer(message.row_ids, WIRE_INT64).astype(np.int64)

        def rows() -> bytes:
            with self._open.reading(message.number) as snapshot:
                row_bytes = snapshot.tables[_table(message.table, snapshot)].row_bytes
                if ids.size * row_bytes > REPLY_BYTES_MAX and ids.size > 1:
                    raise BatchTooLarge(
                        f"{ids.size} rows of {row_bytes} bytes; a reply has {REPLY_BYTES_MAX} bytes at most"
                    )
                out = np.empty((ids.size, row_bytes), np.uint8)
                snapshot.read(message.table, ids, out)
                return out.tobytes()

        return pb.ReadStepResponse(rows=await self._in_thread(rows))

    async def touched(self, message: pb.TouchedRowsRequest, _context: Any) -> Any:
        if not 0 <= message.first <= message.last <= message.first + REPLY_BYTES_MAX // WIRE_INT64.itemsize:
            raise BadRequest(f"rows {message.first} to {message.last}: give a range, and a smaller one")

        def ids() -> bytes:
            with self._open.reading(message.number) as snapshot:
                rows = snapshot.tables[_table(message.table, snapshot)].rows
                found = snapshot.touched(message.table, message.first, min(message.last, rows))
                return found.astype(WIRE_INT64, copy=False).tobytes()

        return pb.TouchedRowsResponse(row_ids=await self._in_thread(ids))

    async def close_step(self, message: pb.CloseStepRequest, _context: Any) -> Any:
        await self._in_thread(lambda: self._open.close(message.number))
        return pb.CloseStepResponse()

    async def _expire(self) -> None:
        with suppress(asyncio.CancelledError):
            while True:
                await asyncio.sleep(self._idle_s / LOOKS_PER_IDLE)
                self._open.expire()

    def close(self) -> None:
        """Nobody reads any more."""
        if self._expiring:
            self._expiring.cancel()
        self._open.close_all()


def _table(number: int, snapshot: Any) -> int:
    if not 0 <= number < len(snapshot.tables):
        raise BadRequest(f"table {number}: the store has {len(snapshot.tables)} tables, numbered from 0")
    return number
