"""Measure updates of rows in DRAM beside torch's sparse optimizers on a resident table.

`kernel` is the arena and the kernel alone, one thread: rows are found, updated under their set's sequence and
marked dirty. `store` is the whole of an update as a trainer in the same process calls it: gradients checked,
duplicates looked for, what is too dirty written back to the log. torch gets its best form: distinct rows,
gradients that are coalesced already, one thread.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from tierbench.alternate import alternate, rate
from tierbench.delivery import add_common_arguments, deliver, rate_row
from tierbench.optimizing import OPTIMIZERS, TORCH, ArenaUpdates, StoreUpdates, TorchUpdates
from tierbench.options import count
from tierbench.record import compare, summarize

BARS = {("adam", "kernel"): ">= 1.0, >= 2 M rows/s"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, windows=10, window_s=0.5)
    add = parser.add_argument
    add("--rows", type=count, default=1_000_000, metavar="N", help="of the table (default: %(default)s)")
    add("--dim", type=count, default=64, metavar="N", help="elements of a row (default: %(default)s)")
    add("--batch", type=count, default=50_000, metavar="N", help="rows an update (default: %(default)s)")
    add("--optimizers", default=",".join(OPTIMIZERS), metavar="NAME,...", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    results: dict[str, Any] = {}
    lines = []
    args.dir.mkdir(parents=True, exist_ok=True)
    for name in args.optimizers.split(","):
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            results[name] = _measure(args, name, Path(folder))
        for what in ("kernel", "store"):
            lines.append(_line(name, what, results[name]))
    return deliver("optimizer", args, results, lines)


def _measure(args: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    sizes = (args.rows, args.dim, args.batch, args.seed)
    store = StoreUpdates(folder, name, *sizes)
    contenders = {"kernel": ArenaUpdates(name, *sizes).step, "store": store.step}
    if name in TORCH:
        contenders["torch"] = TorchUpdates(name, *sizes).step
    try:
        timed = {key: partial(rate, step, args.window_s) for key, step in contenders.items()}
        rates = alternate(args.windows, timed, name)
    finally:
        store.close()
    found: dict[str, Any] = {key: summarize(samples) for key, samples in rates.items()}
    if "torch" in rates:
        for what in ("kernel", "store"):
            found[f"{what}_beside_torch"] = compare(rates[what], rates["torch"])
    return found


def _line(name: str, what: str, found: dict[str, Any]) -> list[str]:
    label, bar = f"{name}, {what}", BARS.get((name, what), "")
    if f"{what}_beside_torch" in found:
        return rate_row(label, found[f"{what}_beside_torch"], bar)
    return [label, f"{found[what]['p50'] / 1e6:.2f} M/s", "", "", "", bar]
