"""Rows over gRPC: unary calls, replies near 1 MiB, several of them on the way at once.

gRPC reconnects by itself, with backoff, when a daemon comes back. A call that finds nobody there
is repeated for `RECONNECT_S` (look-ups change nothing, so repeating is safe) and then raises
Unavailable. A channel does not survive a fork, so a child process makes its own. What the daemon takes in
one request it says with its tables; where it refuses by other limits, it was started anew and is asked again.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import grpc
import numpy as np

from engram_client.deadline import Deadline
from engram_client.errors import (
    BY_CODE,
    BadRequest,
    BatchTooLarge,
    Cancelled,
    DeadlineExceeded,
    Overloaded,
    TierstoreError,
    Unavailable,
)
from engram_client.spec import TableSpec
from engram_client.transport.base import RESIZE_TIMEOUT_S, LookupRequest, PendingRows
from engram_client.transport.grpc_training import SERVICE as TRAINING
from engram_client.transport.grpc_training import GrpcTraining
from engram_client.transport.landing import Landing
from engram_client.transport.splitting import (
    Limits,
    entries_per_call,
    entries_per_hint,
    limits_told,
    split,
)
from engram_client.transport.training import TrainingTransport
from engram_client.wire import memory_pb2 as pb
from engram_client.wire.convert import request_to_message, spec_from_message
from engram_client.wire.framing import decode_rows

SERVICE = "/tierstore.v1.MemoryService/"
ERROR_KEY = "tierstore-error"
CALLS_AHEAD = 4  # calls of one look-up on the way at once
PREFETCHES_AHEAD = 8  # calls of prefetches on the way at once; the daemon bounds what it has in work
RECONNECT_S = 2.0
BACKOFF_S = (0.01, 0.25)  # first and longest pause before trying again
CONTROL_TIMEOUT_S = 10.0
GRACE_S = 5.0

OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1000),  # how long a busy daemon may take to shake hands
    ("grpc.max_reconnect_backoff_ms", 1000),  # within RECONNECT_S, or a call after an outage finds nobody
    ("grpc.use_local_subchannel_pool", 1),
]
_STATUS_ERRORS: dict[grpc.StatusCode, type[TierstoreError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
}
_Reply = TypeVar("_Reply")


class _Calls:
    """One channel and its methods, made by and for one process."""

    def __init__(self, target: str) -> None:
        self.pid = os.getpid()
        self.channel = grpc.insecure_channel(target, options=OPTIONS)

        def method(name: str, request: Any, reply: Callable[[bytes], Any]) -> Any:
            return self.channel.unary_unary(
                SERVICE + name, request_serializer=request.SerializeToString, response_deserializer=reply
            )

        self.list_tables = method("ListTables", pb.ListTablesRequest, pb.ListTablesResponse.FromString)
        self.describe = method("DescribeTable", pb.DescribeTableRequest, pb.DescribeTableResponse.FromString)
        self.lookup = method("Lookup", pb.LookupRequest, decode_rows)
        self.prefetch = method("Prefetch", pb.LookupRequest, pb.PrefetchResponse.FromString)
        self.stats = method("Stats", pb.StatsRequest, pb.StatsResponse.FromString)
        self.set_budgets = method("SetBudgets", pb.SetBudgetsRequest, pb.SetBudgetsResponse.FromString)
        self.training: dict[str, Any] = {}  # methods of TrainingService, made when first called


class GrpcTransport:
    """See `Transport`. `target` in gRPC's form: "unix:PATH" or "HOST:PORT"."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._closed = False
        self._limits = Limits()
        self._ahead = threading.BoundedSemaphore(PREFETCHES_AHEAD)
        self._made = _Calls(target)

    @property
    def _calls(self) -> _Calls:
        if self._closed:
            raise Cancelled(f"the client of {self._target} is closed")
        if self._made.pid != os.getpid():
            self._made = _Calls(self._target)
            self._ahead = threading.BoundedSemaphore(PREFETCHES_AHEAD)
        return self._made

    def list_tables(self) -> dict[str, TableSpec]:
        reply = self._control(lambda calls: calls.list_tables, pb.ListTablesRequest())
        self._limits = limits_told(reply.limits)
        return {t.name: spec_from_message(t) for t in reply.tables}

    def describe_table(self, name: str) -> TableSpec:
        reply = self._control(lambda calls: calls.describe, pb.DescribeTableRequest(table=name))
        return spec_from_message(reply.table)

    def stats(self) -> dict[str, int]:
        return dict(self._control(lambda calls: calls.stats, pb.StatsRequest()).counters)

    def set_dram_budget(self, budget_bytes: int) -> int:
        message = pb.SetBudgetsRequest(dram_budget_bytes=budget_bytes)
        reply = self._control(lambda calls: calls.set_budgets, message, RESIZE_TIMEOUT_S)
        return int(reply.dram_budget_bytes)

    def shared_view(self, spec: TableSpec, heads: tuple[int, int] | None = None) -> None:
        return None

    def set_hbm_budget(self, budget_bytes: int) -> int:
        message = pb.SetBudgetsRequest(hbm_budget_bytes=budget_bytes)
        reply = self._control(lambda calls: calls.set_budgets, message, RESIZE_TIMEOUT_S)
        if not reply.HasField("hbm_budget_bytes"):
            raise BadRequest("the daemon is older than its HBM tier; restart it with this release")
        return int(reply.hbm_budget_bytes)

    def set_training_budget(self, budget_bytes: int, timeout_s: float | None) -> int:
        message = pb.SetBudgetsRequest(training_dram_bytes=budget_bytes, timeout_s=timeout_s)
        call_s = RESIZE_TIMEOUT_S if timeout_s is None else timeout_s + GRACE_S
        reply = self._control(lambda calls: calls.set_budgets, message, call_s)
        if not reply.HasField("training_dram_bytes"):
            raise BadRequest("the daemon is older than this change of budgets; restart it with this release")
        return int(reply.training_dram_bytes)

    def training(self) -> TrainingTransport:
        return GrpcTraining(self)

    def start_training_call(self, name: str, message: Any, reply: Any, deadline: Deadline) -> Any:
        """A call of TrainingService, on its way."""
        calls = self._calls
        if name not in calls.training:
            calls.training[name] = calls.channel.unary_unary(
                TRAINING + name,
                request_serializer=type(message).SerializeToString,
                response_deserializer=reply.FromString,
            )
        left_s = deadline.remaining_s()
        if left_s is not None and "timeout_s" in message.DESCRIPTOR.fields_by_name:
            message.timeout_s = left_s  # so that the daemon's words arrive: it knows what was waited for
            left_s += GRACE_S
        try:
            return calls.training[name].future(message, timeout=left_s)
        except ValueError:
            raise self._closed_meanwhile() from None

    def result_of_call(self, start: Callable[[], Any], deadline: Deadline) -> Any:
        """Of a call that may be repeated while nobody is there."""
        return self._repeat_while_unavailable(lambda: start().result(), deadline)

    def hit_path(self, spec: TableSpec, heads: tuple[int, int] | None = None) -> None:
        """Every look-up is a call."""

    def start_lookup(
        self, request: LookupRequest, entry_bytes: int, timeout_s: float | None
    ) -> PendingRows | None:
        """One call that gRPC's own threads see to; None for more than one, or while many are on the way."""
        entries = request.ids.shape[0]
        if entries_per_call(request, entry_bytes, self._limits) < entries:
            return None
        if not self._ahead.acquire(blocking=False):
            return None
        message, deadline = request_to_message(request), Deadline.after(timeout_s)
        try:
            call = self._start(message, deadline)
        except BaseException:
            self._ahead.release()
            raise
        call.add_done_callback(lambda _call: self._ahead.release())

        def take() -> np.ndarray:
            try:
                return self._result(message, entries, entry_bytes, call, deadline)
            except BatchTooLarge:
                return self.fetch(request, entry_bytes, deadline.remaining_s())

        return PendingCall(call, take)

    def prepare_filling(self) -> None:
        """There is nothing to prepare."""

    def start_filling(self, request: LookupRequest, landing: Landing, timeout_s: float | None) -> None:
        """gRPC's threads run Python; any other will do."""

    def prefetch(self, request: LookupRequest) -> bool:
        return self._by_the_limits(lambda: self._hint(request))

    def _hint(self, request: LookupRequest) -> bool:
        accepted = True
        for part in split(request, entries_per_hint(request, self._limits)):
            message = request_to_message(part)
            accepted &= self._control(lambda calls: calls.prefetch, message).accepted
        return accepted

    def lookup(self, request: LookupRequest, out: np.ndarray, timeout_s: float | None) -> None:
        entries = request.ids.shape[0]
        if not entries:
            return
        flat, deadline = out.reshape(entries, -1), Deadline.after(timeout_s)
        self._by_the_limits(lambda: self._fill(request, flat, deadline))

    def _fill(self, request: LookupRequest, flat: np.ndarray, deadline: Deadline) -> None:
        entries, entry_bytes = flat.shape
        if (per_call := entries_per_call(request, entry_bytes, self._limits)) == entries:
            flat[:] = self._lookup_in_one(request, entry_bytes, deadline)
        else:
            self._lookup_in_several(request, flat, per_call, deadline)

    def fetch(self, request: LookupRequest, entry_bytes: int, timeout_s: float | None) -> np.ndarray:
        """One reply is handed over as it came; several are put together."""
        deadline = Deadline.after(timeout_s)
        return self._by_the_limits(lambda: self._fetch(request, entry_bytes, deadline))

    def _fetch(self, request: LookupRequest, entry_bytes: int, deadline: Deadline) -> np.ndarray:
        entries = request.ids.shape[0]
        if entries and entries_per_call(request, entry_bytes, self._limits) == entries:
            return self._lookup_in_one(request, entry_bytes, deadline)
        out = np.empty((entries, entry_bytes), np.uint8)
        if entries:
            self._fill(request, out, deadline)
        return out

    def _by_the_limits(self, look_up: Callable[[], _Reply]) -> _Reply:
        """Once more where the daemon refuses by other limits than it told: it was started anew."""
        known = self._limits
        try:
            return look_up()
        except BatchTooLarge:
            self.list_tables()
            if self._limits == known:
                raise
            return look_up()

    def _lookup_in_one(self, request: LookupRequest, entry_bytes: int, deadline: Deadline) -> np.ndarray:
        """The caller's thread does the waiting: a future would be two wake-ups slower."""
        message = request_to_message(request)
        reply = self._repeat_while_unavailable(
            lambda: self._calls.lookup(message, timeout=deadline.remaining_s()), deadline
        )
        return self._checked(message, reply, request.ids.shape[0], entry_bytes)

    def _lookup_in_several(
        self, request: LookupRequest, flat: np.ndarray, per_call: int, deadline: Deadline
    ) -> None:
        waiting: deque[tuple[pb.LookupRequest, np.ndarray, Any]] = deque()

        def finish(message: pb.LookupRequest, rows: np.ndarray, call: Any) -> None:
            entries, entry_bytes = rows.shape
            rows[:] = self._result(message, entries, entry_bytes, call, deadline)

        try:
            for start, part in enumerate(split(request, per_call)):
                if len(waiting) >= min(CALLS_AHEAD, self._limits.requests_max):
                    finish(*waiting.popleft())
                message, rows = request_to_message(part), flat[start * per_call :][: part.ids.shape[0]]
                waiting.append((message, rows, self._start(message, deadline)))
            while waiting:
                finish(*waiting.popleft())
        finally:
            for _, _, call in waiting:
                call.cancel()

    def _start(self, message: pb.LookupRequest, deadline: Deadline) -> Any:
        try:
            return self._calls.lookup.future(message, timeout=deadline.remaining_s())
        except ValueError:
            raise self._closed_meanwhile() from None

    def _result(
        self, message: pb.LookupRequest, entries: int, entry_bytes: int, call: Any, deadline: Deadline
    ) -> np.ndarray:
        """Wait for a call and, where nobody was there, for others in its place."""
        first = [call]

        def attempt() -> np.ndarray:
            again = first.pop() if first else self._start(message, deadline)
            reply: np.ndarray = again.result()
            return reply

        reply = self._repeat_while_unavailable(attempt, deadline)
        return self._checked(message, reply, entries, entry_bytes)

    def _checked(
        self, message: pb.LookupRequest, reply: np.ndarray, entries: int, entry_bytes: int
    ) -> np.ndarray:
        """A reply as uint8 [entries, entry_bytes]."""
        if reply.nbytes != entries * entry_bytes:
            raise TierstoreError(
                f"{self._target} answered {reply.nbytes} bytes for table {message.table!r}, expected "
                f"{entries * entry_bytes}: client and daemon disagree about the wire contract; use one "
                "version for both"
            )
        return reply.reshape(entries, entry_bytes)

    def _control(
        self,
        method: Callable[[_Calls], Callable[..., _Reply]],
        message: Any,
        timeout_s: float = CONTROL_TIMEOUT_S,
    ) -> _Reply:
        deadline = Deadline.after(timeout_s)
        return self._repeat_while_unavailable(
            lambda: method(self._calls)(message, timeout=deadline.remaining_s()), deadline
        )

    def _repeat_while_unavailable(self, attempt: Callable[[], _Reply], deadline: Deadline) -> _Reply:
        give_up = time.monotonic() + RECONNECT_S
        pause_s, pause_max_s = BACKOFF_S
        while True:
            try:
                return attempt()
            except grpc.FutureCancelledError:
                raise Cancelled(f"the call to {self._target} was cancelled") from None
            except ValueError:
                raise self._closed_meanwhile() from None
            except grpc.RpcError as error:
                failure = _to_error(self._target, error)
            left_s = deadline.remaining_s()
            too_late = time.monotonic() + pause_s > give_up or (left_s is not None and left_s <= pause_s)
            if not isinstance(failure, Unavailable) or too_late:
                raise failure
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, pause_max_s)

    def _closed_meanwhile(self) -> Cancelled:
        """What a ValueError of gRPC means: the channel was closed after this call had looked."""
        return Cancelled(f"the client of {self._target} was closed")

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._made.pid == os.getpid():
                self._made.channel.close()


class PendingCall:
    """A call on its way. See `PendingRows`."""

    def __init__(self, call: Any, take: Callable[[], np.ndarray]) -> None:
        self._call = call
        self._take = take

    def done(self) -> bool:
        return bool(self._call.done())

    def result(self, timeout_s: float | None) -> np.ndarray:
        with suppress(grpc.RpcError, grpc.FutureCancelledError):  # `take` tells what became of it
            try:
                self._call.result(timeout_s)
            except grpc.FutureTimeoutError:
                raise TimeoutError from None
        return self._take()

    def cancel(self) -> bool:
        return bool(self._call.cancel())


def _to_error(target: str, error: grpc.RpcError) -> TierstoreError:
    """The class the daemon raised, or what the status code means."""
    code, details = error.code(), error.details() or ""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_KEY and value in BY_CODE:
            return BY_CODE[value](details)
    if code == grpc.StatusCode.UNAVAILABLE:
        return Unavailable(
            f"no daemon answers at {target} ({details}); is it running? start one with `tierstore serve`"
        )
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{target} did not answer in time; allow more time, or prefetch earlier")
    return _STATUS_ERRORS.get(code, TierstoreError)(f"{target}: {code.name}: {details}")
