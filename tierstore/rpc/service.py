"""The gRPC face of a store: parse, look up, frame.

A look-up that DRAM answers whole is served on the event loop: handing it to a thread would
cost more than the copy. One with misses goes to a bounded pool of threads, where the waiting
happens. Requests in work are bounded; what comes beyond is refused at once, not queued. A caller
who goes away leaves his read to its thread, and his place is taken until that is done: so the
bound holds for memory as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import grpc

from engram_client.deadline import Deadline
from engram_client.errors import BadRequest, BatchTooLarge, Overloaded, TierstoreError, Unavailable
from engram_client.transport.base import LookupRequest
from engram_client.wire import memory_pb2 as pb
from engram_client.wire.convert import request_from_message, spec_to_message
from engram_client.wire.framing import new_message
from tierstore.rpc.status import ERROR_KEY, status_of
from tierstore.store import Store
from tierstore.store.table import Access

log = logging.getLogger(__name__)
MESSAGE_CHARACTERS_MAX = 1000  # of an error; gRPC allows 8 KiB of metadata, and percent-encodes some
MESSAGE_BYTES_MAX = 16 << 20  # of a request: 2^20 ids and their envelope fit
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["MemoryService"].full_name


class MemoryService:
    """Handlers of `tierstore.v1.MemoryService`; `handlers()` gives them to a grpc.aio server."""

    def __init__(self, store: Store) -> None:
        self._store = store
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
        def method(handle: Callable[..., Awaitable[Any]], request: Any, serialize: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                self._guarded(handle), request_deserializer=request.FromString, response_serializer=serialize
            )

        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "ListTables": method(self.list_tables, pb.ListTablesRequest, _serialize),
                "DescribeTable": method(self.describe_table, pb.DescribeTableRequest, _serialize),
                "Lookup": method(self.lookup, pb.LookupRequest, None),
                "Prefetch": method(self.prefetch, pb.LookupRequest, _serialize),
                "Stats": method(self.stats, pb.StatsRequest, _serialize),
                "SetBudgets": method(self.set_budgets, pb.SetBudgetsRequest, _serialize),
            },
        )

    async def list_tables(self, _request: pb.ListTablesRequest, _context: Any) -> pb.ListTablesResponse:
        limits = pb.Limits(
            request_ids_max=self._limits.request_ids_max,
            reply_bytes_max=self._limits.request_reply_bytes_max,
            message_bytes_max=MESSAGE_BYTES_MAX,
            requests_max=self._requests_max,
        )
        tables = [spec_to_message(spec) for spec in self._store.tables().values()]
        return pb.ListTablesResponse(tables=tables, limits=limits)

    async def describe_table(
        self, request: pb.DescribeTableRequest, _context: Any
    ) -> pb.DescribeTableResponse:
        """An unknown name makes the store look into its catalog: in a thread, one at a time."""
        store, name = self._store, request.table
        if not store.knows(name):
            async with self._looking:
                await asyncio.to_thread(store.describe, name)
        return pb.DescribeTableResponse(table=spec_to_message(store.table(name).spec))

    async def stats(self, _request: pb.StatsRequest, _context: Any) -> pb.StatsResponse:
        return pb.StatsResponse(counters=self._store.stats())

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
        stats = self._store.stats()
        return pb.SetBudgetsResponse(
            dram_budget_bytes=stats["dram_budget_bytes"], hbm_budget_bytes=stats["hbm_budget_bytes"]
        )

    async def lookup(self, message: pb.LookupRequest, context: Any) -> bytes:
        deadline = Deadline.after(context.time_remaining())
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

    async def prefetch(self, message: pb.LookupRequest, _context: Any) -> pb.PrefetchResponse:
        self._refuse_while_draining()
        return pb.PrefetchResponse(accepted=self._store.prefetch(self._parse(message)))

    def _parse(self, message: pb.LookupRequest) -> LookupRequest:
        scheme = self._store.table(message.table, message.generation.hex()).spec.scheme
        request = request_from_message(message, scheme.orders if scheme else 1)
        self._store.check_size(request)
        return request

    def _reply_bytes(self, request: LookupRequest, access: Access) -> int:
        """How large the reply will be; refused here, before memory is taken for it."""
        wanted = request.ids.size * access.part[1]
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

    def _guarded(self, handle: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """Our errors become a status with the error's code; others are logged and stay vague."""

        async def guarded(request: Any, context: Any) -> Any:
            try:
                return await handle(request, context)
            except TierstoreError as error:
                await context.abort(status_of(error), _told(error), ((ERROR_KEY, error.code),))
            except Exception as error:
                log.exception("a request failed unexpectedly")
                text = f"internal error ({type(error).__name__}); the daemon's log has the details"
                await context.abort(grpc.StatusCode.INTERNAL, text, ((ERROR_KEY, TierstoreError.code),))

        return guarded

    def close(self) -> None:
        """Drop look-ups that have not begun; closing the store waits for those that have."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _told(error: TierstoreError) -> str:
    """The message, short enough for the metadata it travels in."""
    text = str(error)
    return text if len(text) <= MESSAGE_CHARACTERS_MAX else text[:MESSAGE_CHARACTERS_MAX] + " ..."


def _serialize(message: Any) -> bytes:
    packed: bytes = message.SerializeToString()
    return packed
