"""Measure look-ups of other processes through shared memory, beside the same in one process and gRPC.

A real daemon, and clients in processes of their own. One token: alone with a quiet daemon, and while
another client has the daemon evict and refill (so its own records may go too; what it then reads from
disk is in the figures). Batches beside `local:` on the same rows. Several clients at once. Last, reads
against a writer that never rests, checked by content.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engram_client.errors import DataCorrupt
from tierbench.alternate import alternate, rate_of_callers
from tierbench.client_processes import ClientProcess, client_process, rates_together
from tierbench.daemon import running_daemon
from tierbench.delivery import add_common_arguments, deliver, latency_row, rate_row
from tierbench.hits import LATENCY_CALLS, WarmTable
from tierbench.one_sided import stress
from tierbench.options import byte_size, count
from tierbench.prepared import prepared_table
from tierbench.progress import count_progress, stage
from tierbench.record import compare, summarize

LAYERS = 2  # V4.1: a token is one n-gram of three orders at each of two layers
DIFFERENT = 1024  # different one-token calls of each client; a 64th as many batches
FAMILIAR = 16  # of the client beside which the daemon evicts
STRESS_TIMEOUT_S = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, windows=10, window_s=0.5)
    add = parser.add_argument
    add("--rows-per-head", type=count, default=1_000_000, metavar="N", help="of the table")
    add("--dram-bytes", type=byte_size, default=1 << 30, metavar="BYTES",
        help="the daemon's DRAM budget (default: 1GiB)")  # fmt: skip
    add("--small-dram-bytes", type=byte_size, default=64 << 20, metavar="BYTES",
        help="of the daemon that evicts and refills (default: 64MiB)")  # fmt: skip
    add("--tokens", type=count, default=512, metavar="N", help="tokens in a batch (default: %(default)s)")
    add("--clients", type=count, default=4, metavar="N", help="at once (default: %(default)s)")
    add("--stress-reads", type=count, default=10_000_000, metavar="N", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    prepared = prepared_table(args.dir, args.rows_per_head)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="tierbench-", dir=args.dir) as folder:
        copies = [_linked_copy(prepared.store, Path(folder) / str(i)) for i in range(2)]
        with running_daemon(prepared.store, dram_bytes=args.dram_bytes) as daemon:
            results |= _quiet(args, daemon.unix, daemon.tcp, copies[0])
            results["daemon_memory_bytes"] = daemon.memory_bytes()
        with running_daemon(copies[1], dram_bytes=args.small_dram_bytes) as daemon:
            results["token_beside_evictions"] = _beside_evictions(args, daemon.unix)
    with stage("reading while another thread writes"):
        results["stress"] = asdict(stress(args.stress_reads, STRESS_TIMEOUT_S))
    if results["stress"]["wrong"]:
        raise DataCorrupt(f"one-sided reads went wrong: {results['stress']}")
    return deliver("shm", args, results, _lines(results))


def _linked_copy(store: Path, copy: Path) -> Path:
    """The same store under another name: one process each may open one; row files are links."""

    def link_rows(source: str, target: str) -> None:
        (os.link if source.endswith(".rows") else shutil.copyfile)(source, target)

    shutil.copytree(store, copy, copy_function=link_rows, ignore=shutil.ignore_patterns("warm", "extent"))
    return copy


def _quiet(args: argparse.Namespace, unix: str, tcp: str, copy: Path) -> dict[str, Any]:
    sizes = (LAYERS, LAYERS * args.tokens, DIFFERENT)
    with ExitStack() as stack:
        clients = [  # which read the same rows, as ranks of one engine do
            stack.enter_context(client_process(unix, *sizes, args.seed)) for _ in range(args.clients)
        ]
        remote = stack.enter_context(client_process(tcp, *sizes, args.seed))
        local = WarmTable(copy, args.dram_bytes, sizes[1] * max(1, DIFFERENT // 64), args.seed)
        stack.callback(local.close)
        first, before = clients[0], clients[0].ask("misses")
        found = {
            "token": _token(args, {"shm": first, "grpc": remote}),
            "batch": _batch(args, first, local),
            "clients": _together(args, clients),
        }
        if missed := first.ask("misses") - before:
            raise DataCorrupt(f"{missed} records did not stay in DRAM; give --dram-bytes more")
        return found


def _token(args: argparse.Namespace, clients: dict[str, ClientProcess]) -> dict[str, Any]:
    contenders = {name: partial(client.ask, "latency", LATENCY_CALLS) for name, client in clients.items()}
    samples = alternate(args.windows, contenders, "one token")
    return {name: summarize(np.concatenate(parts)) for name, parts in samples.items()}


def _batch(args: argparse.Namespace, client: ClientProcess, local: WarmTable) -> dict[str, Any]:
    step = local.step(LAYERS * args.tokens)
    contenders: dict[str, Callable[[], float]] = {
        "shm": lambda: rates_together([client], args.window_s)[0],
        "local": partial(rate_of_callers, [step], args.window_s),
    }
    samples = alternate(args.windows, contenders, f"{args.tokens} tokens a batch")
    return {"yardstick_name": "the same in one process", **compare(samples["shm"], samples["local"])}


def _together(args: argparse.Namespace, clients: list[ClientProcess]) -> dict[str, Any]:
    contenders = {
        "one": lambda: rates_together(clients[:1], args.window_s),
        "all": lambda: rates_together(clients, args.window_s),
    }
    samples = alternate(args.windows, contenders, f"{len(clients)} clients at once")
    totals = [sum(rates) for rates in samples["all"]]
    shares = np.sum(samples["all"], axis=0) / sum(totals)
    return {
        "clients": len(clients),
        "total": {"yardstick_name": "one client", **compare(totals, [rates[0] for rates in samples["one"]])},
        "share_of_total": {"min": float(shares.min()), "max": float(shares.max())},
    }


def _beside_evictions(args: argparse.Namespace, unix: str) -> dict[str, Any]:
    sizes = (LAYERS, LAYERS, FAMILIAR)
    with ExitStack() as stack:
        client, other = (stack.enter_context(client_process(unix, *sizes, args.seed + i)) for i in (0, 9))
        parts, read = [], 0
        progress = stack.enter_context(count_progress("tokens beside evictions", args.windows))
        for _ in range(args.windows):
            other.order("read strangers")
            parts.append(client.ask("latency", LATENCY_CALLS))
            read += other.ask("enough")
            progress(1)
    return {**summarize(np.concatenate(parts)), "ngrams_read_meanwhile": read}


def _lines(results: dict[str, Any]) -> list[list[str]]:
    clients, beside = results["clients"], results["token_beside_evictions"]
    token, written = results["token"], results["stress"]
    return [
        latency_row("one token, gRPC beside", token["shm"], token["grpc"], "p50 <= 6, p99 <= 20 us"),
        latency_row("one token while the daemon evicts", beside, None, "p99 <= 56 us"),
        rate_row("a batch", results["batch"], ">= 0.9"),
        rate_row(f"{clients['clients']} clients at once", clients["total"], ">= 1"),
        [
            "share of each of them",
            f"{clients['share_of_total']['min']:.2f} to {clients['share_of_total']['max']:.2f}",
            "", "", "", "nobody starves",
        ],
        [
            "reads against a writer",
            f"{written['reads']:,}, {written['hits']:,} found, {written['wrong']} wrong",
            f"{written['written']:,} written", "", "", "0 wrong",
        ],
    ]  # fmt: skip
