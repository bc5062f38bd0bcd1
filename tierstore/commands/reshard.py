"""`tierstore reshard`: a committed step becomes the stores of another number of ranks."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tierstore.commands.pack_progress import progress_display
from tierstore.commands.readable import readable_bytes
from tierstore.commands.steps import add_step_arguments, step_rows
from tierstore.snapshots import reshard_step

EPILOG = """\
SOURCE is a store of whole tables, or all shares of a sharded training. OUT/0 to OUT/N-1 are then the stores
of N ranks: weights, optimizer state and step are there, and training goes on from them as it would have from
SOURCE. One store of whole tables is made by `tierstore snapshot SOURCE... OUT`. OUT appears when all of it is
on the disk.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_step_arguments(parser, tables=False)
    add = parser.add_argument
    add("--world", type=int, metavar="N", required=True, help="how many ranks will train")
    add("--out", type=Path, metavar="OUT", required=True, help="folder to make; it must not exist")


def run(args: argparse.Namespace) -> int:
    """Says what was made."""
    with progress_display(quiet=args.quiet) as (_, on_progress), step_rows(args) as rows:
        done = reshard_step(rows, args.out, args.world, on_progress=on_progress)
    if args.json:
        shares = [{"folder": str(share.folder), "bytes": share.file_bytes} for share in done]
        json.dump({"step": done[0].step, "world": args.world, "shares": shares}, sys.stdout, indent=2)
        print()
    else:
        total = readable_bytes(sum(share.file_bytes for share in done))
        print(f"step {done[0].step}: {total} in {args.world} shares, {done[0].folder} to {done[-1].folder}")
    return 0
