"""The gRPC face of a training store: updates, commits, rollbacks.

An update that waits for other trainers holds no thread: the one whose contribution completes the step applies
it in a thread, and the others' calls end with that. Calls in work are bounded, and so is the memory of
gradients that wait (training.pending_bytes_max). What has begun to be applied is applied to its end, also
where its caller goes away: he repeats the push and is told that it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc

from engram_client.deadline import Deadline
from engram_client.errors import Overloaded, Unavailable
from engram_client.wire import memory_pb2 as pb
from engram_client.wire.training import description_to_message, update_from_message
from tierstore.config import Config
from tierstore.rpc.handling import method, serialized
from tierstore.rpc.steps import StepReading
from tierstore.training import TrainingStore

TRAINING_NAME = pb.DESCRIPTOR.services_by_name["TrainingService"].full_name
UPDATE_BYTES_MAX = 4 << 20  # of one part of a push; a message may have four times that


class TrainingService:
    """Handlers of `tierstore.v1.TrainingService`; `handlers()` gives them to a grpc.aio server."""

    def __init__(self, store: TrainingStore, config: Config) -> None:
        self._store = store
        self._requests_max = max(config.serve.concurrent_requests_max, 2 * config.training.world)
        self._threads = ThreadPoolExecutor(config.serve.workers, thread_name_prefix="tierstore-training")
        self._steps = StepReading(store, config.training, self._in_work_in_thread)
        self._requests = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            TRAINING_NAME,
            {
                "DescribeTraining": method(self.describe, pb.DescribeTrainingRequest, serialized),
                "Update": method(self.update, pb.UpdateRequest, serialized),
                "Commit": method(self.commit, pb.CommitRequest, serialized),
                "WaitDurable": method(self.wait_durable, pb.WaitDurableRequest, serialized),
                "Rollback": method(self.rollback, pb.RollbackRequest, serialized),
                "Steps": method(self.steps, pb.StepsRequest, serialized),
                **self._steps.methods(),
            },
        )

    async def describe(self, _request: pb.DescribeTrainingRequest, _context: Any) -> Any:
        tables = [description_to_message(d) for d in self._store.describe()]
        return pb.DescribeTrainingResponse(tables=tables, update_bytes_max=UPDATE_BYTES_MAX)

    async def update(self, message: pb.UpdateRequest, context: Any) -> pb.UpdateResponse:
        deadline = _deadline_of(message, context)
        await self._in_work(self._update(message, deadline))
        return pb.UpdateResponse()

    async def _update(self, message: pb.UpdateRequest, deadline: Deadline) -> None:
        contribution = self._store.offer(update_from_message(message))
        if contribution is None:
            return
        ready = asyncio.wrap_future(contribution.ready)
        await asyncio.wait({ready}, timeout=deadline.remaining_s())
        self._store.withdraw(contribution)  # does nothing to what is being applied, or was
        contributions = await ready
        if contributions is not None:
            await self._in_thread(lambda: self._store.apply(contributions, deadline))

    async def commit(self, message: pb.CommitRequest, context: Any) -> pb.CommitResponse:
        deadline = _deadline_of(message, context)
        await self._in_work(
            self._in_thread(
                lambda: self._store.commit(message.step, deadline.remaining_s(), message.training)
            )
        )
        return pb.CommitResponse()

    async def wait_durable(self, message: pb.WaitDurableRequest, context: Any) -> pb.WaitDurableResponse:
        deadline = _deadline_of(message, context)
        await self._in_work(
            self._in_thread(lambda: self._store.wait_durable(message.step, deadline.remaining_s()))
        )
        return pb.WaitDurableResponse()

    async def rollback(self, message: pb.RollbackRequest, context: Any) -> pb.RollbackResponse:
        deadline = _deadline_of(message, context)
        await self._in_work(
            self._in_thread(lambda: self._store.rollback(message.step, deadline.remaining_s()))
        )
        return pb.RollbackResponse()

    async def steps(self, _request: pb.StepsRequest, _context: Any) -> pb.StepsResponse:
        return pb.StepsResponse(steps=self._store.steps())

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _in_work_in_thread(self, work: Callable[[], Any]) -> Any:
        return await self._in_work(self._in_thread(work))

    async def _in_work(self, work: Any) -> Any:
        """One of the calls in work; it goes on where its caller has gone away."""
        if self._draining or self._requests >= self._requests_max:
            work.close()
            if self._draining:
                raise Unavailable("the daemon is shutting down and takes no new requests; try again soon")
            raise Overloaded(
                f"{self._requests} training calls are in work, the most there may be "
                "(serve.concurrent_requests_max); try again"
            )
        self._requests += 1
        self._idle.clear()
        task = asyncio.ensure_future(work)
        task.add_done_callback(self._leave)
        return await asyncio.shield(task)

    def _leave(self, task: asyncio.Future[Any]) -> None:
        self._requests -= 1
        if not self._requests:
            self._idle.set()
        if not task.cancelled():
            task.exception()  # seen here, as the caller may be gone

    async def drain(self, timeout_s: float) -> None:
        """Refuse new calls; return once none is in work, or after so many seconds."""
        self._draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)

    def close(self) -> None:
        """Drop what has not begun; closing the store waits for the rest."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._steps.close()


def _deadline_of(message: Any, context: Any) -> Deadline:
    if message.HasField("timeout_s"):
        return Deadline.after(message.timeout_s)
    return Deadline.after(context.time_remaining())
