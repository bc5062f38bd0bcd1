"""`tierstore snapshot`: a committed step becomes a training store of its own."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tierstore.commands.pack_progress import progress_display
from tierstore.commands.readable import readable_bytes
from tierstore.commands.steps import SHARES, add_step_arguments, step_rows
from tierstore.snapshots import copy_step

EPILOG = f"""\
Training goes on from OUT as it would have from SOURCE at that step, bit for bit: weights, optimizer state and
step are there, under the same names. Rows that were never changed take no room. OUT appears when all of it is
on the disk. One share of a sharded training is copied as a share. {SHARES}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_step_arguments(parser, tables=False)
    parser.add_argument("out", type=Path, metavar="OUT", help="store directory to make; it must not exist")


def run(args: argparse.Namespace) -> int:
    """Says what was made."""
    with progress_display(quiet=args.quiet) as (_, on_progress), step_rows(args, lone_share=True) as rows:
        done = copy_step(rows, args.out, on_progress=on_progress)
    if args.json:
        json.dump({"folder": str(done.folder), "step": done.step, "bytes": done.file_bytes}, sys.stdout)
        print()
    else:
        print(f"step {done.step}: {readable_bytes(done.file_bytes)} in {done.folder}")
    return 0
