"""Measure a daemon under a load that does not wait for it: latency by throughput, up to saturation.

Client processes make calls at a constant rate, or by Poisson's law, whether or not earlier ones were
answered, and a call's latency counts from when it was due. Rates rise until one is not kept: through shared
memory, over gRPC on the unix socket and over loopback TCP, gRPC beside an empty service of the same API and
sizes in the same run. Keys are those of real text, or drawn by Zipf's law, made beforehand.

A rate is kept when all but 1 % of the calls due in its window had ended with it; the highest that was kept is
called saturation. How late clients began that had nothing else to do is told as their lag. A rate that they
could not generate is told as that, and nothing is claimed about it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engram_client.errors import BadRequest, Unavailable
from tierbench.daemon import Daemon, running_daemon
from tierbench.delivery import Grid, add_delivery_arguments, deliver
from tierbench.open_loop.crew import (
    EMPTY_TCP,
    EMPTY_UNIX,
    SHARED,
    TCP,
    UNIX,
    Crew,
    Offered,
    Targets,
    running_crew,
)
from tierbench.open_loop.sweep import KEPT, Sweep
from tierbench.open_loop.window import ARRIVALS, CONSTANT
from tierbench.options import byte_size, count, not_negative, positive, whole
from tierbench.policy.traces import zipf_trace
from tierbench.prepared import PreparedTable, prepared_table
from tierbench.progress import count_progress
from tierbench.text_keys import text_keys
from tierbench.yardsticks.empty_service import running_empty_service

WAYS = {SHARED: None, UNIX: EMPTY_UNIX, TCP: EMPTY_TCP}  # and what stands beside each
COLUMNS = ("offered /s", "done /s", "latency p50", "p99", "p99.9", "in the call p50", "lag p99", "cores", "")
PROBE_S = 0.3
ATTACH_S = 10.0
SHM_CLIENTS_MAX = 1024  # that a daemon can be asked for
CALLS_WANTED, LONGER_MAX = 200, 2  # a slow rate's window is longer for so many calls
CALLS_MIN = 20  # in the longest window; no slower rate is tried


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_delivery_arguments(parser)
    add = parser.add_argument
    add("--clients", type=count, default=4, metavar="N", help="client processes (default: %(default)s)")
    add("--entries", type=count, default=2, metavar="N",
        help="n-grams of a call (default: %(default)s, as a token of V4.1 in two layers)")  # fmt: skip
    add("--ways", type=_ways, default=tuple(WAYS), metavar="WAY[,WAY]", help=f"of {', '.join(WAYS)}")
    add("--arrivals", choices=ARRIVALS, default=CONSTANT, help="default: %(default)s")
    add("--window-s", type=positive, default=1.0, metavar="S", help="for each rate (default: %(default)s)")
    add("--first-share", type=positive, default=1 / 16, metavar="X",
        help="first rate, of what callers get done that wait for answers (default: 1/16)")  # fmt: skip
    add("--factor", type=positive, default=2**0.5, metavar="X", help="from rate to rate (default: 1.41)")
    add("--halvings", type=whole, default=2, metavar="N", help="near saturation (default: %(default)s)")
    add("--points-max", type=count, default=16, metavar="N", help="of a curve (default: %(default)s)")
    add("--spin-us", type=not_negative, default=50.0, metavar="US",
        help="clients wake so long before a call is due, and spin (default: %(default)s)")  # fmt: skip
    add("--keys", choices=("text", "zipf"), default="text", help="default: the standard library's sources")
    add("--tokens", type=count, default=20_000, metavar="N", help="of the keys (default: %(default)s)")
    add("--zipf-exponent", type=positive, default=1.0, metavar="X", help="default: %(default)s")
    add("--population", type=count, default=100_000, metavar="N",
        help="different n-grams of an order that --keys zipf draws from (default: %(default)s)")  # fmt: skip
    add("--dram-bytes", type=byte_size, default=1 << 30, metavar="BYTES",
        help="the daemon's DRAM budget (default: 1GiB, where everything hits)")  # fmt: skip
    add("--rows-per-head", type=count, default=250_000, metavar="N", help="of the table")
    add("--seed", type=whole, default=0, help="of drawn keys and arrivals (default: %(default)s)")


def _ways(text: str) -> tuple[str, ...]:
    names = {way.replace("shared memory", "shm"): way for way in WAYS}
    chosen = tuple(names.get(part.strip(), part.strip()) for part in text.split(","))
    if unknown := [way for way in chosen if way not in WAYS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected some of {', '.join(names)}")
    return chosen


def run(args: argparse.Namespace) -> int:
    if args.factor <= 1:
        raise BadRequest(f"--factor {args.factor}: rates rise by it, so it is more than 1")
    prepared = prepared_table(args.dir, args.rows_per_head)
    with _measured(args, prepared) as (daemon, crew):
        crew.all("warm")
        if SHARED in args.ways:
            _await_attached(crew, args.clients)
        groups = {way: _curves(args, crew, way) for way in args.ways}
        memory_bytes = daemon.memory_bytes()
    spec = prepared.spec
    assert spec.scheme is not None
    rows = args.entries * spec.scheme.orders * spec.scheme.heads
    results = {
        "clients": args.clients,
        "rows_a_call": rows,
        "reply_bytes": rows * spec.row_bytes,
        "arrivals": args.arrivals,
        "ways": groups,
        "daemon_memory_bytes": memory_bytes,
    }
    grids = _grids(results)
    if not args.json and any("lag *" in line for grid in grids for line in grid.rows):
        print("* the clients' own lag is most of the p99: too few processors for so many clients")
    return deliver("serve", args, results, grids=grids)


def _await_attached(crew: Crew, clients: int) -> None:
    """Raises Unavailable where some would go by gRPC and be taken for shared memory."""
    end = time.monotonic() + ATTACH_S
    while (attached := crew.stats()["shm_clients"]) < clients:
        if time.monotonic() > end:
            raise Unavailable(
                f"{attached} of {clients} clients found a place in shared memory; choose other --ways"
            )
        time.sleep(0.1)


@contextmanager
def _measured(args: argparse.Namespace, prepared: PreparedTable) -> Iterator[tuple[Daemon, Crew]]:
    keys = _keys(args, prepared)
    settings = {
        "shm.clients_max": min(SHM_CLIENTS_MAX, max(32, 2 * args.clients)),
        "shm.user_clients_percent": 100,
        "serve.concurrent_requests_max": 64 + 2 * args.clients,
    }
    with (
        tempfile.TemporaryDirectory(prefix="tierbench-") as folder,
        running_daemon(prepared.store, dram_bytes=args.dram_bytes, settings=settings) as daemon,
        running_empty_service() as empty,
    ):
        path = Path(folder) / "keys.npy"
        np.save(path, keys)
        targets = Targets(daemon.unix, daemon.tcp, daemon.process.pid, empty, path)
        with running_crew(targets, args.clients) as crew:
            yield daemon, crew


def _keys(args: argparse.Namespace, prepared: PreparedTable) -> np.ndarray:
    """int64 [calls, entries, orders]"""
    scheme = prepared.spec.scheme
    assert scheme is not None
    calls = args.tokens // args.entries
    if calls < args.clients:
        raise BadRequest(
            f"--tokens {args.tokens} make {calls} calls, fewer than --clients {args.clients}; give more"
        )
    if args.keys == "text":
        keys = text_keys(args.dir, prepared.spec, args.tokens)
    else:
        orders = range(scheme.orders)
        drawn = [
            zipf_trace("zipf", args.zipf_exponent, args.tokens, args.population, seed=args.seed + order)
            for order in orders
        ]
        keys = np.stack([trace.keys[trace.ids] for trace in drawn], axis=1)
    shape = (calls, args.entries, scheme.orders)
    return np.ascontiguousarray(keys[: calls * args.entries].reshape(shape))


def _curves(args: argparse.Namespace, crew: Crew, way: str) -> dict[str, Any]:
    """Ours and what stands beside it, rate by rate in turn, each until it has found its saturation."""
    names = {"ours": way, **({"empty": beside} if (beside := WAYS[way]) else {})}
    capacities, sweeps = {}, {}
    for name, target in names.items():
        probe = Offered(target, 1.0, PROBE_S, args.arrivals, args.spin_us, args.seed)
        capacities[name] = crew.capacity_per_s(probe)
    for name in names:
        first = max(args.first_share * capacities["ours"], CALLS_MIN / (LONGER_MAX * args.window_s))
        sweeps[name] = Sweep(first, args.factor, args.halvings, args.points_max)
    before = crew.stats()
    with count_progress(way, len(names) * args.points_max) as progress:
        while any(sweep.rate for sweep in sweeps.values()):
            for name, sweep in sweeps.items():
                if rate := sweep.rate:
                    sweep.note(crew.offer(_offered(args, names[name], rate)))
                    progress(1)
    after = crew.stats()
    hits, misses = (after[name] - before[name] for name in ("dram_hits", "dram_misses"))
    told = {name: {"closed_loop_per_s": round(capacities[name], 1), **s.told()} for name, s in sweeps.items()}
    return {"hit_rate": hits / max(1, hits + misses), **told}


def _offered(args: argparse.Namespace, way: str, rate_per_s: float) -> Offered:
    longer_s = min(LONGER_MAX * args.window_s, CALLS_WANTED / rate_per_s)
    return Offered(way, rate_per_s, max(args.window_s, longer_s), args.arrivals, args.spin_us, args.seed)


def _grids(results: dict[str, Any]) -> list[Grid]:
    grids = []
    for way, found in results["ways"].items():
        for name in [name for name in ("ours", "empty") if name in found]:
            curve = found[name]
            hits = f"; {found['hit_rate']:.1%} of records were in DRAM"
            at_least = "" if curve["saturation_found"] else "at least "
            rate = f"{at_least}{curve['saturation_per_s']:,.0f} calls/s of {results['rows_a_call']} rows"
            title = (
                f"{way if name == 'ours' else WAYS[way]}: {rate} by {results['clients']} clients, "
                f"then {curve['limit']}{hits if name == 'ours' else ''}"
            )
            grids.append(Grid(title, COLUMNS, [_line(point) for point in curve["points"]]))
    return grids


def _line(point: dict[str, Any]) -> list[str]:
    latency = point["latency_us"]
    kept = point["verdict"] == KEPT
    said = "" if kept else point["verdict"]
    if kept and point["lag_dominates"]:
        said = "lag *"
    more = "" if kept else ">"
    return [
        f"{point['offered_per_s']:,.0f}",
        f"{point['achieved_per_s']:,.0f}",
        *(f"{more}{_us(latency.get(p))}" for p in ("p50", "p99", "p99.9")),
        _us(point["service_us"].get("p50")),
        _us(point["lag_us"].get("p99")),
        f"{point['service_cores']:.2f}",
        said,
    ]


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f} us" if value < 1e4 else f"{value / 1e3:,.1f} ms"
