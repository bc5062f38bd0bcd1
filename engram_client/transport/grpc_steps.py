"""A committed step that a daemon holds open, read over gRPC."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from engram_client.errors import Unavailable
from engram_client.wire import memory_pb2 as pb
from engram_client.wire.convert import WIRE_INT64

READ_BYTES = 1 << 20  # of rows, of one call
TIMEOUT_S = 60.0

Call = Callable[[str, Any, Any, float | None], Any]


class GrpcStep:
    """See `OpenStep`."""

    def __init__(self, call: Call, step: int | None) -> None:
        self._call = call
        reply = call("OpenStep", pb.OpenStepRequest(step=step), pb.OpenStepResponse, TIMEOUT_S)
        self._number = reply.number
        self.step, self.state = int(reply.step), bytes(reply.state)
        self.tables: list[dict[str, Any]] = json.loads(reply.tables_json)

    def read(self, table: int, ids: np.ndarray, out: np.ndarray) -> None:
        size = max(1, READ_BYTES // out.shape[1])
        for start in range(0, ids.size, size):
            part = ids[start : start + size]
            message = pb.ReadStepRequest(
                number=self._number, table=table, row_ids=part.astype(WIRE_INT64, copy=False).tobytes()
            )
            rows = self._call("ReadStep", message, pb.ReadStepResponse, TIMEOUT_S).rows
            if len(rows) != part.size * out.shape[1]:
                raise Unavailable(
                    f"the daemon sent {len(rows)} bytes for {part.size} rows of {out.shape[1]} bytes; "
                    "install the same release here and there"
                )
            out[start : start + size] = np.frombuffer(rows, np.uint8).reshape(part.size, -1)

    def touched(self, table: int, first: int, last: int) -> np.ndarray:
        message = pb.TouchedRowsRequest(number=self._number, table=table, first=first, last=last)
        reply = self._call("TouchedRows", message, pb.TouchedRowsResponse, TIMEOUT_S)
        return np.frombuffer(reply.row_ids, WIRE_INT64).astype(np.int64)

    def close(self) -> None:
        self._call("CloseStep", pb.CloseStepRequest(number=self._number), pb.CloseStepResponse, TIMEOUT_S)
