"""The gRPC face of a store: parse, look up, frame.

A look-up that DRAM answers whole is served on the event loop: handing it to a thread would
cost more than the copy. One with misses goes to a bounded pool of threads, where the waiting
happens. Requests in work are bounded; what comes beyond is refused at once, not queued. A caller
who goes away leaves his read to its thread, and his place is taken until that is done: so the
bound holds for memory as well.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import grpc

from engram_client.deadline import Deadline
from engram_client.errors import BadRequest, BatchTooLarge, Overloaded, Unavailable
from engram_client.transport.base import LookupRequest
from engram_client.wire import memory_pb2 as pb
from engram_client.wire.convert import request_from_message, spec_to_message
from engram_client.wire.framing import new_message
from tierstore.rpc.handling import method, serialized
from tierstore.store import Store
from tierstore.store.table import Access
from tierstore.training import TrainingStore, change_training_budget

MESSAGE_BYTES_MAX = 16 << 20  # of a request: 2^20 ids and their envelope fit
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["MemoryService"].full_name


class MemoryService:
    """Handlers of `tierstore.v1.MemoryService`; `handlers()` gives them to a grpc.aio server."""

    def __init__(self, store: Store, training: TrainingStore | None = None) -> None:
        self._store = store
        self._training = training
        self._limits = store.config.limits
        serve = store.config.serve
        self._threads = ThreadPoolExecutor(serve.workers, thread_name_prefix="tierstore-serve")
        self._requests_max = serve.concurrent_requests_max
        self._requests = 0
        self._draining = False
        self._looking = asyncio.Lock()
        self._idle = asyncio.Event()
        self._idle.set()

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "ListTables": method(self.list_tables, pb.ListTablesRequest, serialized),
                "DescribeTable": method(self.describe_table, pb.DescribeTableRequest, serialized),
                "Lookup": method(self.lookup, pb.LookupRequest, None),
                "Prefetch": method(self.prefetch, pb.LookupRequest, serialized),
                "Stats": method(self.stats, pb.StatsRequest, serialized),
                "SetBudgets": method(self.set_budgets, pb.SetBudgetsRequest, serialized),
            },
        )

    async def list_tables(self, _request: pb.ListTablesRequest, _context: Any) -> pb.ListTablesResponse:
        limits = pb.Limits(
            request_ids_max=self._limits.request_ids_max,
            reply_bytes_max=self._limits.request_reply_bytes_max,
            message_bytes_max=MESSAGE_BYTES_MAX,
            requests_max=self._requests_max,
        )
        served = {**self._store.tables(), **(self._training.tables() if self._training else {})}
        tables = [spec_to_message(spec) for spec in served.values()]
        return pb.ListTablesResponse(tables=tables, limits=limits)

    async def describe_table(
        self, request: pb.DescribeTableRequest, _context: Any
    ) -> pb.DescribeTableResponse:
        """An unknown name makes the store look into its catalog: in a thread, one at a time."""
        store, name = self._store, request.table
        if (training := self._trains(name)) is not None:
            return pb.DescribeTableResponse(table=spec_to_message(training.table(name).spec))
        if not store.knows(name):
            async with self._looking:
                await asyncio.to_thread(store.describe, name)
        return pb.DescribeTableResponse(table=spec_to_message(store.table(name).spec))

    async def stats(self, _request: pb.StatsRequest, _context: Any) -> pb.StatsResponse:
        training = await asyncio.to_thread(self._training.stats) if self._training else {}
        return pb.StatsResponse(counters={**self._store.stats(), **training})

    async def set_budgets(self, request: pb.SetBudgetsRequest, context: Any) -> pb.SetBudgetsResponse:
        """In a thread of its own: moving records takes a while, and nobody else should wait for it."""
        if not context.peer().startswith("unix:"):
            raise BadRequest(
                "budgets are changed over the daemon's unix socket only; this call came from "
                f"{context.peer()}"
            )
        if request.HasField("dram_budget_bytes"):
            await asyncio.to_thread(self._store.set_dram_budget, request.dram_budget_bytes)
        if request.HasField("hbm_budget_bytes"):
            await asyncio.to_thread(self._store.promotion.resize, request.hbm_budget_bytes)
        if request.HasField("training_dram_bytes"):
            timeout_s = request.timeout_s if request.HasField("timeout_s") else context.time_remaining()
            where = (self._store, self._in_training())
            await asyncio.to_thread(change_training_budget, *where, request.training_dram_bytes, timeout_s)
        stats = self._store.stats()
        return pb.SetBudgetsResponse(
            dram_budget_bytes=stats["dram_budget_bytes"],
            hbm_budget_bytes=stats["hbm_budget_bytes"],
            training_dram_bytes=self._training.stats()["training_dram_bytes"] if self._training else None,
        )

    def _in_training(self) -> TrainingStore:
        if self._training is None:
            raise BadRequest(
                "nothing is in training in this daemon; start it with --train where tables are to be trained"
            )
        return self._training

    async def lookup(self, message: pb.LookupRequest, context: Any) -> bytes:
        deadline = Deadline.after(context.time_remaining())
        if (training := self._trains(message.table)) is not None:
            return await self._look_up_trained(training, message, deadline)
        request = self._parse(message)
        access = self._store.access(request)
        wanted_bytes = self._reply_bytes(request, access)
        self._enter()
        reading = None
        try:
            reply, rows = new_message(wanted_bytes)
            misses = self._store.lookup_hits(request, access, rows)
            if misses.size:
                read = partial(self._store.lookup_misses, request, access, misses, rows, deadline)
                reading = asyncio.get_running_loop().run_in_executor(self._threads, read)
                reading.add_done_callback(self._leave_after)
                await asyncio.shield(reading)
            return reply
        finally:
            if reading is None:
                self._leave()

    def _trains(self, name: str) -> TrainingStore | None:
        """The training store, if the table is one of its."""
        training = self._training
        return training if training is not None and training.knows(name) else None

    async def _look_up_trained(
        self, training: TrainingStore, message: pb.LookupRequest, deadline: Deadline
    ) -> bytes:
        """In a thread: any row of a table in training may have to come from the log."""
        request = request_from_message(message, 1)
        self._store.check_size(request)
        row_bytes = training.table(request.table).part[1]
        self._check_reply(request, request.ids.size * row_bytes)
        reply, rows = new_message(request.ids.size * row_bytes)
        self._enter()
        read = partial(training.lookup, request, rows, deadline.remaining_s())
        reading = asyncio.get_running_loop().run_in_executor(self._threads, read)
        reading.add_done_callback(self._leave_after)
        await asyncio.shield(reading)
        return reply

    async def prefetch(self, message: pb.LookupRequest, _context: Any) -> pb.PrefetchResponse:
        self._refuse_while_draining()
        if self._trains(message.table) is not None:
            return pb.PrefetchResponse(accepted=False)
        return pb.PrefetchResponse(accepted=self._store.prefetch(self._parse(message)))

    def _parse(self, message: pb.LookupRequest) -> LookupRequest:
        scheme = self._store.table(message.table, message.generation.hex()).spec.scheme
        request = request_from_message(message, scheme.orders if scheme else 1)
        self._store.check_size(request)
        return request

    def _reply_bytes(self, request: LookupRequest, access: Access) -> int:
        """How large the reply will be; refused here, before memory is taken for it."""
        return self._check_reply(request, request.ids.size * access.part[1])

    def _check_reply(self, request: LookupRequest, wanted: int) -> int:
        if wanted > self._limits.request_reply_bytes_max:
            raise BatchTooLarge(
                f"table {request.table!r}: {request.ids.size} ids ask for {wanted} bytes in one reply; the "
                f"limit is {self._limits.request_reply_bytes_max} (limits.request_reply_bytes_max); "
                "split the batch"
            )
        return wanted

    def _enter(self) -> None:
        """Take one of the places for requests in work."""
        self._refuse_while_draining()
        if self._requests >= self._requests_max:
            raise Overloaded(
                f"{self._requests} look-ups are in work, the most there may be "
                "(serve.concurrent_requests_max); try again"
            )
        self._requests += 1
        self._idle.clear()

    def _leave(self) -> None:
        self._requests -= 1
        if not self._requests:
            self._idle.set()

    def _leave_after(self, reading: asyncio.Future[None]) -> None:
        self._leave()
        if not reading.cancelled():
            reading.exception()  # seen here, as the caller may be gone

    def _refuse_while_draining(self) -> None:
        if self._draining:
            raise Unavailable("the daemon is shutting down and takes no new requests; try again soon")

    async def drain(self, timeout_s: float) -> None:
        """Refuse new look-ups; return once none is in work, or after so many seconds."""
        self._draining = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)

    def close(self) -> None:
        """Drop look-ups that have not begun; closing the store waits for those that have."""
        self._threads.shutdown(wait=False, cancel_futures=True)
