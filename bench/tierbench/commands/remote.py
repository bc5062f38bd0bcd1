"""Measure look-ups over gRPC, unix socket and loopback TCP, beside an empty gRPC service.

A real daemon in a process of its own, everything warm in DRAM, one caller in a closed loop: the next
call starts when the last one has ended (`tierbench serve` has open loops and many callers). Other
services stand beside it where their packages are installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from engram_client import connect
from tierbench.alternate import alternate
from tierbench.daemon import running_daemon
from tierbench.delivery import add_common_arguments, deliver, latency_row, rate_row
from tierbench.options import byte_size, count
from tierbench.prepared import prepared_table
from tierbench.record import compare, summarize
from tierbench.remote_calls import CallSample, RemoteCalls, closed_loop
from tierbench.yardsticks.empty_service import EmptyClient, running_empty_service
from tierbench.yardsticks.served_peers import running_peers

TRANSPORTS = ("tcp", "unix")
TOKEN_ENTRIES = 2  # n-grams of one token at two layers: 48 rows
TOKENS_A_CALL = 64  # different one-token calls for each different large call


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, windows=10, window_s=1.0)
    add = parser.add_argument
    add(
        "--rows-per-head",
        type=count,
        default=1_000_000,
        metavar="N",
        help="of the table (default: %(default)s)",
    )
    add("--dram-bytes", type=byte_size, default=1 << 30, metavar="BYTES",
        help="the daemon's DRAM budget (default: 1GiB)")  # fmt: skip
    add("--batch-rows", type=count, default=4096, metavar="N",
        help="rows of a large call, rounded to whole n-grams (default: %(default)s)")  # fmt: skip
    add("--peer-rows-per-head", type=count, default=100_000, metavar="N",
        help="of the table that other services hold in memory (default: %(default)s)")  # fmt: skip
    add(
        "--different",
        type=count,
        default=64,
        metavar="N",
        help="different large calls (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    prepared = prepared_table(args.dir, args.rows_per_head)
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        grpc_alone = {"shm.enabled": False}
        daemon = stack.enter_context(
            running_daemon(prepared.store, dram_bytes=args.dram_bytes, settings=grpc_alone)
        )
        empty = stack.enter_context(running_empty_service())
        for transport in TRANSPORTS:
            client = stack.enter_context(connect(getattr(daemon, transport)))
            plain = EmptyClient(empty.targets[transport])
            stack.callback(plain.close)
            scheme = prepared.spec.scheme
            assert scheme is not None
            entries = max(1, round(args.batch_rows / (scheme.orders * scheme.heads)))
            batch = RemoteCalls(client, entries, args.different, args.seed)
            token = RemoteCalls(client, TOKEN_ENTRIES, TOKENS_A_CALL * args.different, args.seed + 1)
            batch.check_warm()
            token.check_warm()
            results[transport] = {
                "batch": _measure(args, batch, plain, f"{transport}, large calls"),
                "token": _measure(args, token, plain, f"{transport}, one token"),
            }
            if transport == "tcp":
                results["peers"] = _peers(args, batch)
        results["daemon_memory_bytes"] = daemon.memory_bytes()
    return deliver("remote", args, results, _lines(results))


def _measure(args: argparse.Namespace, calls: RemoteCalls, empty: EmptyClient, label: str) -> dict[str, Any]:
    """Ours and the empty service in turn; the empty one also with the reply in two calls at once."""
    steps = {"ours": calls.step(), "empty": calls.empty_step(empty)}
    if calls.keys.shape[1] > TOKEN_ENTRIES:
        steps["empty, two calls"] = calls.empty_step(empty, 2)
    contenders: dict[str, Callable[[], CallSample]] = {
        name: partial(closed_loop, step, args.window_s) for name, step in steps.items()
    }
    samples = alternate(args.windows, contenders, label)
    rates = {name: [s.rows_per_s for s in found] for name, found in samples.items()}
    best = max((name for name in rates if name != "ours"), key=lambda name: float(np.median(rates[name])))
    taken = {name: np.concatenate([s.taken_us for s in found]) for name, found in samples.items()}
    return {
        "rows_a_call": calls.keys.shape[1] * calls.heads,
        "rows_per_s": {"yardstick_name": best, **compare(rates["ours"], rates[best])},
        "taken_us": {name: summarize(found) for name, found in taken.items()},
    }


def _peers(args: argparse.Namespace, calls: RemoteCalls) -> dict[str, Any]:
    """Ours over TCP and other services, a large call each; rows/s and microseconds a call."""
    spec = calls.table.spec
    steps = {"ours": calls.step()}
    with running_peers(calls.heads, args.peer_rows_per_head, spec.row_bytes) as peers:
        for name, fetch in peers.items():
            steps[name] = calls.peer_step(fetch, args.peer_rows_per_head, args.seed)
        contenders = {name: partial(closed_loop, step, args.window_s) for name, step in steps.items()}
        samples = alternate(args.windows, contenders, "other services")
    ours = samples.pop("ours")
    return {
        name: {
            "rows_per_s": {
                "yardstick_name": name,
                **compare([s.rows_per_s for s in ours], [s.rows_per_s for s in found]),
            },
            "taken_us": summarize(np.concatenate([s.taken_us for s in found])),
        }
        for name, found in samples.items()
    }


def _lines(results: dict[str, Any]) -> list[list[str]]:
    lines = []
    for transport in TRANSPORTS:
        for kind, bar in (("batch", ">= 0.9"), ("token", "")):
            found = results[transport][kind]
            label = f"{transport}, {found['rows_a_call']} rows a call"
            lines.append(rate_row(label, found["rows_per_s"], bar))
            best = found["taken_us"][found["rows_per_s"]["yardstick_name"]]
            lines.append(latency_row("  a call", found["taken_us"]["ours"], best))
    lines += [rate_row("tcp, beside a peer", found["rows_per_s"]) for found in results["peers"].values()]
    return lines
