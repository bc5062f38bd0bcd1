"""`tierstore export`: a committed step of a training store becomes a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tierstore.commands.pack_progress import progress_display
from tierstore.commands.readable import readable_bytes
from tierstore.commands.steps import SHARES, add_step_arguments, step_rows
from tierstore.snapshots import export_step

EPILOG = f"""\
OUT/model.safetensors holds the weights under the model's own names, config.json what the Engram demo has
there, layout.json all tables: `tierstore pack OUT DIR` reads the former, with `--model plain --layout
OUT/layout.json` the latter. OUT appears when all of it is on the disk.
{SHARES}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_step_arguments(parser, tables=True)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to write; it must not exist")
    add("--with-optimizer", action="store_true", help="the optimizer's state and master weights as well")


def run(args: argparse.Namespace) -> int:
    """Says what was written."""
    with progress_display(quiet=args.quiet) as (_, on_progress), step_rows(args) as rows:
        done = export_step(
            rows, args.out, tables=args.table, with_optimizer=args.with_optimizer, on_progress=on_progress
        )
    if args.json:
        found = {"folder": str(done.folder), "step": done.step, "tables": done.tables}
        found["bytes"] = done.file_bytes
        json.dump(found, sys.stdout, indent=2)
        print()
    else:
        print(f"step {done.step}: {readable_bytes(done.file_bytes)} in {done.folder}")
        for name, weight in done.tables.items():
            print(f"  {name}: {weight}")
    return 0
