"""Updates over gRPC: large ones in parts, repeated without being applied twice."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from engram_client.deadline import Deadline
from engram_client.transport.grpc_steps import GrpcStep
from engram_client.transport.training import OpenStep, TrainedDescription, UpdateRequest
from engram_client.wire import memory_pb2 as pb
from engram_client.wire.training import description_from_message, update_to_message

SERVICE = "/tierstore.v1.TrainingService/"
PARTS_AHEAD = 4  # of one push on the way at once
PART_BYTES = 4 << 20  # until the daemon has told what it takes


class Caller(Protocol):
    """What `GrpcTransport` offers here."""

    def start_training_call(self, name: str, message: Any, reply: Any, deadline: Deadline) -> Any: ...

    def result_of_call(self, start: Callable[[], Any], deadline: Deadline) -> Any: ...


class GrpcTraining:
    """See `TrainingTransport`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._part_bytes = PART_BYTES

    def _call(self, name: str, message: Any, reply: Any, timeout_s: float | None) -> Any:
        deadline = Deadline.after(timeout_s)
        return self._caller.result_of_call(
            lambda: self._caller.start_training_call(name, message, reply, deadline), deadline
        )

    def describe(self) -> list[TrainedDescription]:
        message = pb.DescribeTrainingRequest()
        reply = self._call("DescribeTraining", message, pb.DescribeTrainingResponse, 30.0)
        self._part_bytes = reply.update_bytes_max or PART_BYTES
        return [description_from_message(table) for table in reply.tables]

    def update(self, request: UpdateRequest, timeout_s: float | None) -> None:
        deadline = Deadline.after(timeout_s)
        waiting: deque[tuple[Callable[[], Any], Any]] = deque()
        *others, last = self._parts(request)
        try:
            for part in others:
                if len(waiting) == PARTS_AHEAD:
                    self._finish(*waiting.popleft(), deadline)
                start = self._starter(part, deadline)
                waiting.append((start, start()))
            while waiting:
                self._finish(*waiting.popleft(), deadline)
        finally:
            for _, call in waiting:
                call.cancel()
        self._caller.result_of_call(self._starter(last, deadline), deadline)

    def _starter(self, part: UpdateRequest, deadline: Deadline) -> Callable[[], Any]:
        message = update_to_message(part)
        return lambda: self._caller.start_training_call("Update", message, pb.UpdateResponse, deadline)

    def _finish(self, start: Callable[[], Any], call: Any, deadline: Deadline) -> None:
        """Wait for a call that was started; start others in its place where nobody was there."""
        first = [call]
        self._caller.result_of_call(lambda: first.pop() if first else start(), deadline)

    def _parts(self, request: UpdateRequest) -> Iterator[UpdateRequest]:
        entry_bytes = request.ids.itemsize + request.gradients.itemsize * request.gradients.shape[1]
        size = max(1, self._part_bytes // entry_bytes)
        parts = max(1, -(-request.ids.size // size))
        for number in range(parts):
            piece = slice(number * size, (number + 1) * size)
            yield replace(
                request, ids=request.ids[piece], gradients=np.ascontiguousarray(request.gradients[piece]),
                part=number, parts=parts,
            )  # fmt: skip

    def commit(self, step: int, timeout_s: float | None, training: str = "") -> None:
        message = pb.CommitRequest(step=step, training=training)
        self._call("Commit", message, pb.CommitResponse, timeout_s)

    def wait_durable(self, step: int, timeout_s: float | None) -> None:
        self._call("WaitDurable", pb.WaitDurableRequest(step=step), pb.WaitDurableResponse, timeout_s)

    def rollback(self, step: int, timeout_s: float | None) -> None:
        self._call("Rollback", pb.RollbackRequest(step=step), pb.RollbackResponse, timeout_s)

    def steps(self) -> list[int]:
        return list(self._call("Steps", pb.StepsRequest(), pb.StepsResponse, 30.0).steps)

    def open_step(self, step: int | None) -> OpenStep:
        return GrpcStep(self._call, step)
