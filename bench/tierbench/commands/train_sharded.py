"""Measure sharded training: ranks that keep a share of a table each, beside one process that keeps it all.

Both train on the same global batches of row ids (gloo, one thread a process, a model of nothing), in turn. A
step's time is told by where it goes: the exchange, with waiting for other ranks; look-ups and updates of the
rank's own store; the rest is sums, gathering and autograd.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from engram_client.errors import BadRequest
from tierbench.alternate import alternate
from tierbench.delivery import Grid, add_common_arguments, deliver, rate_row
from tierbench.options import byte_size, count
from tierbench.ranks import Trainers, Workload
from tierbench.record import compare, summarize

PARTS = ("exchange", "lookup", "update", "rest", "step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, windows=10, window_s=None)
    add = parser.add_argument
    add("--world", type=count, default=2, metavar="N", help="ranks (default: %(default)s)")
    add("--rows", type=count, default=500_000, metavar="N", help="of the table (default: %(default)s)")
    add("--dim", type=count, default=64, metavar="N", help="elements of a row (default: %(default)s)")
    add("--batch", type=count, default=16_384, metavar="N", help="row ids a step, of all ranks together")
    add("--steps", type=count, default=20, metavar="N", help="of a window (default: %(default)s)")
    add("--dram-bytes", type=byte_size, default=512 << 20, metavar="SIZE", help="of all ranks together")


def run(args: argparse.Namespace) -> int:
    if args.world < 2 or args.batch < args.world:
        raise BadRequest(
            f"ranks are two and more, each with a row at least, got {args.world} for {args.batch}"
        )
    work = Workload(args.rows, args.dim, args.batch, args.dram_bytes, args.seed)
    args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="train-sharded-", dir=args.dir) as folder, ExitStack() as stack:
        place = Path(folder).resolve()
        ranks = stack.enter_context(Trainers(place / "ranks", work, args.world))
        alone = stack.enter_context(Trainers(place / "alone", work, 1))
        windows = alternate(
            args.windows,
            {"ranks": lambda: ranks.steps(args.steps), "alone": lambda: alone.steps(args.steps)},
            "training",
        )
    rates = {name: [w["rows_per_s"] for w in found] for name, found in windows.items()}
    results: dict[str, Any] = {
        "ranks_beside_one_process": compare(rates["ranks"], rates["alone"]),
        "step_parts": {name: _parts(found) for name, found in windows.items()},
        "exchanges_per_step": windows["ranks"][0].get("sharded_exchanges", 0.0),
        "bytes_sent_per_step": windows["ranks"][-1].get("sharded_bytes_sent", 0.0),
    }
    rate = rate_row(f"{args.world} ranks, beside 1 process", results["ranks_beside_one_process"])
    first = Grid("tierbench train-sharded", ("", "ranks", "one process", "ratio", "spread", "bar"), [rate])
    parts = Grid("one step, median of windows", ("", *PARTS), _lines(results["step_parts"]))
    return deliver("train-sharded", args, results, grids=(first, parts))


def _parts(windows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    found = {}
    for part in PARTS:
        name = f"{part}_us" if part in ("rest", "step") else f"sharded_{part}_us"
        if name in windows[0]:
            found[f"{part}_us"] = summarize([window[name] for window in windows])
    return found


def _lines(parts: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, found in parts.items():
        told = [found.get(f"{part}_us") for part in PARTS]
        yield [name, *(f"{summary['p50'] / 1e3:.2f} ms" if summary else "" for summary in told)]
