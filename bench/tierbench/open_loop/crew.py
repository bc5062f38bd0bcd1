"""Callers in processes of their own, which begin a window together and send home what they counted."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from engram_client import Client, Table, connect
from engram_client.errors import TierstoreError, Unavailable
from engram_client.transport.base import LookupRequest
from engram_client.transport.grpc import GrpcTransport
from engram_client.wire.convert import request_to_message
from tierbench.histogram import merged
from tierbench.open_loop.sweep import LAG_SHARE, verdict
from tierbench.open_loop.window import Call, ask_for_exact_timers, due_times, run_window, sleeper
from tierbench.signals import deaf
from tierbench.yardsticks.empty_service import EmptyClient, EmptyService

START_S = 0.05  # between an order and its window, so that all begin together
LEAD_SHARE = 0.1  # of the window goes by before anything counts
WARM_CALLS = 20
WARM_ENTRIES = 2048  # n-grams of one look-up while warming
SHARED, UNIX, TCP = "shared memory", "unix", "tcp"
EMPTY = EMPTY_UNIX, EMPTY_TCP = "empty, unix", "empty, tcp"


@dataclass(frozen=True)
class Targets:
    """Where the daemon and the empty service are, and the keys to ask for: int64 [calls, entries, orders]."""

    unix: str
    tcp: str
    daemon_pid: int
    empty: EmptyService
    keys: Path


@dataclass(frozen=True)
class Offered:
    """One window: which way, how many calls a second by all callers together, for how long."""

    way: str
    rate_per_s: float
    window_s: float
    arrivals: str
    spin_us: float
    seed: int


class Caller:
    """One process."""

    def __init__(self, targets: Targets, number: int, callers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_obey, args=(theirs, targets, number, callers), daemon=True)
        resource_tracker.ensure_running()  # which, when it starts, makes this thread hear Ctrl-C
        with deaf():  # the parent's to act on; its end of the pipe goes away
            self.process.start()
        theirs.close()

    def order(self, what: str, *arguments: Any) -> None:
        self._pipe.send((what, *arguments))

    def answer(self) -> Any:
        """What came of the last order. Raises what it raised, Unavailable where the process has died."""
        try:
            found = self._pipe.recv()
        except EOFError:
            raise Unavailable("a client process has died; see above") from None
        if isinstance(found, TierstoreError):
            raise found
        return found

    def close(self) -> None:
        self._pipe.close()
        self.process.join()


class Crew:
    """All callers of one daemon and one empty service."""

    def __init__(self, callers: list[Caller], targets: Targets) -> None:
        self._callers = callers
        self._clients = [psutil.Process(caller.process.pid) for caller in callers]
        pids = {True: targets.empty.pid, False: targets.daemon_pid}
        self._services = {is_empty: psutil.Process(pid) for is_empty, pid in pids.items()}

    def all(self, what: str, *arguments: Any) -> list[Any]:
        for caller in self._callers:
            caller.order(what, *arguments)
        return [caller.answer() for caller in self._callers]

    def offer(self, offered: Offered) -> dict[str, Any]:
        """One point of the curve."""
        begin_ns = time.monotonic_ns() + int(START_S * 1e9)
        watched = [self._services[offered.way in EMPTY], *self._clients]
        before, busy_before = _used_s(watched), psutil.cpu_times()
        started = time.monotonic()
        told = self.all("window", offered, begin_ns)
        wall_s = time.monotonic() - started
        service_s, *clients_s = (b - a for a, b in zip(before, _used_s(watched), strict=True))
        counted_s = offered.window_s * (1 - LEAD_SHARE)
        due, done, ended = (sum(t[name] for t in told) for name in ("due", "done", "ended"))
        in_call = sum(t["in_call_ns"] for t in told) / 1e9 / offered.window_s / len(told)
        found = {n: merged(t[n] for t in told).summary_us() for n in ("latency", "service", "lag")}
        return {
            "window_s": round(offered.window_s, 3),
            "offered_per_s": round(offered.rate_per_s, 1),
            "achieved_per_s": round(ended / counted_s, 1),
            "due": due,
            "done": done,
            "verdict": verdict(due, done, len(told), in_call),
            "latency_us": _rounded(found["latency"]),
            "service_us": _rounded(_few(found["service"])),
            "lag_us": _rounded(_few(found["lag"])),
            "lag_dominates": _dominates(found["lag"], found["latency"]),
            "in_call_share": round(min(1.0, in_call), 4),
            "service_cores": round(service_s / wall_s, 3),
            "client_cores": round(sum(clients_s) / wall_s, 3),
            "processors_busy_share": round(_busy_share(busy_before, psutil.cpu_times()), 3),
        }

    def capacity_per_s(self, offered: Offered) -> float:
        """What all callers get done when every call is due at once: a closed loop, as a place to begin."""
        begin_ns = time.monotonic_ns() + int(START_S * 1e9)
        told = self.all("window", replace(offered, rate_per_s=math.inf), begin_ns)
        return max(1, sum(t["ended"] for t in told)) / (offered.window_s * (1 - LEAD_SHARE))

    def stats(self) -> dict[str, int]:
        self._callers[0].order("stats")
        return dict(self._callers[0].answer())


def _used_s(processes: list[psutil.Process]) -> list[float]:
    return [sum(process.cpu_times()[:2]) for process in processes]


@contextmanager
def running_crew(targets: Targets, callers: int) -> Iterator[Crew]:
    """So many callers, connected and with everything in DRAM that fits there."""
    with ExitStack() as stack:
        crew = []
        for number in range(callers):
            crew.append(Caller(targets, number, callers))
            stack.callback(crew[-1].close)
        for caller in crew:
            caller.answer()
        yield Crew(crew, targets)


def _few(found: dict[str, float | int]) -> dict[str, float | int]:
    return {name: found[name] for name in ("count", "p50", "p99", "max") if name in found}


def _rounded(found: dict[str, float | int]) -> dict[str, float | int]:
    """Three decimals of a microsecond: clocks have no more."""
    return {name: round(value, 3) for name, value in found.items()}


def _dominates(lag: dict[str, Any], latency: dict[str, Any]) -> bool:
    return bool(lag["count"] and latency["count"] and lag["p99"] > LAG_SHARE * latency["p99"])


def _busy_share(before: Any, after: Any) -> float:
    spent = [b - a for a, b in zip(before, after, strict=True)]
    names = before._fields
    total = sum(s for s, n in zip(spent, names, strict=True) if n not in ("guest", "guest_nice"))
    idle = sum(s for s, n in zip(spent, names, strict=True) if n in ("idle", "iowait"))
    return 1 - idle / total if total > 0 else 1.0


def _obey(pipe: Connection, targets: Targets, number: int, callers: int) -> None:
    """The process: connect every way there is, then do what is ordered until the pipe ends."""
    try:
        ask_for_exact_timers()
        keys = np.load(targets.keys)
        with ExitStack() as stack:
            hand = _Hand(stack, targets, keys, number, callers)
            pipe.send(True)
            while True:
                try:
                    what, *arguments = pipe.recv()
                except EOFError:
                    return
                pipe.send(getattr(hand, what)(*arguments))
    except ConnectionError:  # the parent was interrupted
        return
    except TierstoreError as error:
        with suppress(ConnectionError):
            pipe.send(error)


class _Hand:
    """What a caller does; its public methods are what can be ordered."""

    def __init__(
        self, stack: ExitStack, targets: Targets, keys: np.ndarray, number: int, callers: int
    ) -> None:
        self._number, self._callers = number, callers
        self._keys = np.roll(keys, -(number * len(keys) // callers), axis=0)  # each begins elsewhere
        client = stack.enter_context(connect(targets.unix))
        self._client = client
        clients = {
            SHARED: client,
            UNIX: stack.enter_context(_grpc_client(targets.unix)),
            TCP: stack.enter_context(connect(targets.tcp)),
        }
        self._tables = {way: c.table(next(iter(c.tables()))) for way, c in clients.items()}
        self._calls = {way: self._lookup(table) for way, table in self._tables.items()}
        for way, transport in ((EMPTY_UNIX, "unix"), (EMPTY_TCP, "tcp")):
            empty = EmptyClient(targets.empty.targets[transport])
            stack.callback(empty.close)
            self._calls[way] = self._empty(empty)

    def _lookup(self, table: Table) -> Call:
        keys, count = self._keys, len(self._keys)
        scheme = table.spec.scheme
        assert scheme is not None
        out = np.empty((keys.shape[1], scheme.orders * scheme.heads, table.spec.row_bytes), np.uint8)
        look_up = table.lookup_ngrams_into

        def call(number: int) -> None:
            look_up(keys[number % count], out)

        return call

    def _empty(self, empty: EmptyClient) -> Call:
        spec = self._tables[TCP].spec
        request = LookupRequest(spec.name, spec.generation, "ngram", np.ascontiguousarray(self._keys[0]))
        message = request_to_message(request).SerializeToString()
        reply = self._keys[0].size * spec.record_bytes
        ask: Callable[[bytes], bytes] = empty.caller(reply)
        return lambda number: ask(message)

    def warm(self) -> None:
        """Look up this caller's share of all keys twice: the second time, whatever was on trial stays."""
        share = self._keys[: -(-len(self._keys) // self._callers)].reshape(-1, self._keys.shape[2])
        for _ in range(2):
            for start in range(0, len(share), WARM_ENTRIES):
                self._tables[SHARED].lookup_ngrams(share[start : start + WARM_ENTRIES])
        for call in self._calls.values():
            for number in range(WARM_CALLS):
                call(number)

    def stats(self) -> dict[str, int]:
        return self._client.stats()

    def window(self, offered: Offered, begin_ns: int) -> dict[str, Any]:
        """Calls of one window, without its lead."""
        due = due_times(
            offered.arrivals, offered.rate_per_s, offered.window_s, self._number, self._callers, offered.seed
        )
        end_ns = begin_ns + int(offered.window_s * 1e9)
        wait = sleeper(int(offered.spin_us * 1e3))
        wait(begin_ns)
        found = run_window(
            self._calls[offered.way], due + begin_ns, end_ns, clock=time.monotonic_ns, wait=wait
        )
        return found.told(begin_ns + int(LEAD_SHARE * offered.window_s * 1e9))


def _grpc_client(target: str) -> Client:
    """A client of a unix socket that leaves shared memory alone."""
    return Client(GrpcTransport(target), target, prefetch_handles_max=1)
