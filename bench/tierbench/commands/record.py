"""Run every benchmark at its committed size and write the records.

Takes an hour and a half on two cores, 24 GB of disk and 12 GiB of memory with the defaults. The data are
made under --dir once and kept. The ones with a table larger than memory run only where --only names them:
they take 35 GB of disk and another quarter of an hour.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from tierbench.delivery import DATA_FOLDER
from tierbench.record import RESULTS

BENCHMARKS = (
    "lookup",
    "cold",
    "remote",
    "serve",
    "pack",
    "extent",
    "mixed",
    "live",
    "overlap",
    "ahead",
    "optimizer",
    "commit",
    "publish",
    "train-rate",
    "train-sharded",
    "learn",
)
LARGE = ("soak", "scale")
QUICK = {
    "lookup": "--arena-bytes 64MiB --tokens 64 --warm-tokens 256 --windows 3 --window-s 0.05",
    "cold": "--windows 3 --window-s 0.3 --sample-rows 500 --lmdb-rows 20000 --batch-rows 1024",
    "remote": "--windows 3 --window-s 0.2 --dram-bytes 64MiB --different 4",
    "serve": "--clients 2 --window-s 0.1 --tokens 400 --factor 4 --halvings 0 --points-max 2 --keys zipf"
    " --dram-bytes 64MiB",
    "extent": "--tokens-per-row 0.4",
    "overlap": "--windows 2 --hidden 64 --batches 2 --chunks 32 --steps 8 --tokens 30000 --warm-tokens 2000",
    "ahead": "--windows 2 --sizes 1,64 --steps 4x1,1x128 --tokens 30000 --dram-bytes 256MiB",
    "optimizer": "--windows 2 --window-s 0.05 --rows 5000 --batch 1000 --optimizers adam",
    "commit": "--windows 2 --rows 2000 --read-rows 500",
    "publish": "--rows 20000 --rounds 1 --phase-s 0.2 --dram-bytes 64MiB",
    "train-rate": "--windows 2 --steps 2 --training-batches 20 --batch 2 --context 32 --hidden 32 --layers 2"
    " --vocab-size 300 --rows-per-head 1000",
    "train-sharded": "--windows 2 --steps 2 --rows 5000 --batch 512 --dram-bytes 16MiB",
    "learn": "--steps 20 --seeds 1 --batch 2 --context 32 --hidden 32 --layers 2 --vocab-size 300"
    " --validation-tokens 500 --rows-per-head 500,1000 --commit-steps 10",
    "pack": "--windows 2 --source-bytes 16MiB",
    "mixed": "--windows 3 --window-s 0.2 --tokens 10000 --hot-bytes 64MiB",
    "live": "--small-bytes 32MiB --large-bytes 96MiB --rounds 1 --phase-s 0.5 --hot-tokens 1024"
    " --dram-bytes 64MiB --tokens 20000 --probe-tokens 2000",
    "soak": "--shards 4 --dram-bytes 64MiB --duration-s 10 --tokens 20000",
    "scale": "--shards 4 --small-rows-per-head 1000 --dram-bytes 64MiB --windows 3 --window-s 0.2",
}
QUICK_ROWS_PER_HEAD = 20_000
OWN_SIZES = ("pack", "optimizer", "commit", "publish", "train-rate", "train-sharded", "learn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="where the records go (default: bench/results)",
    )
    add("--dir", type=Path, default=DATA_FOLDER, help="data, made once and kept (default: %(default)s)")
    add("--only", choices=(*BENCHMARKS, *LARGE), action="append", help="only this one; may be repeated")
    add(
        "--quick",
        action="store_true",
        help="tiny sizes, in seconds: shows that it works, says nothing of speed",
    )


def run(args: argparse.Namespace) -> int:
    for name in args.only or BENCHMARKS:
        module = importlib.import_module(f"tierbench.commands.{name.replace('-', '_')}")
        parser = argparse.ArgumentParser(prog=f"tierbench {name}")
        module.add_arguments(parser)
        options = ["--dir", str(args.dir), "--record", str(args.out)]
        if code := int(module.run(parser.parse_args(options + quick_options(name, args.quick)))):
            return code
        sys.stdout.flush()
    return 0


def quick_options(name: str, quick: bool = True) -> list[str]:
    """Of the benchmark, for a run in seconds."""
    if not quick:
        return []
    rows = [] if name in OWN_SIZES else ["--rows-per-head", str(QUICK_ROWS_PER_HEAD)]
    return [*QUICK[name].split(), *rows]
