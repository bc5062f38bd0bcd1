"""`tierstore publish`: the weights of a committed step become a generation that is served."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tierstore.commands.pack_progress import progress_display
from tierstore.commands.readable import readable_bytes
from tierstore.commands.steps import SHARES, add_step_arguments, step_rows
from tierstore.snapshots import Published, publish_step
from tierstore.snapshots.weights import DTYPES

EPILOG = f"""\
All tables become current together, when all of them are safe on disk. The generations they replace are kept:
a daemon that serves STORE takes the new ones up on SIGHUP and answers for both while clients move over;
`tierstore rollback STORE TABLE` and SIGHUP go back. Weights of float32 are the master copies, where rows have
them. {SHARES}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_step_arguments(parser, tables=True)
    add = parser.add_argument
    add("store", type=Path, metavar="STORE", help="store directory to publish in; made where there is none")
    add("--as", dest="name", metavar="NAME", help="what one table is called there (default: as here)")
    add("--dtype", choices=DTYPES, help="of the weights (default: as they are trained)")
    add("--addressing", choices=("auto", "record", "row"), default="auto",
        help="what a key names: an n-gram's rows, or one row (default: the former where it can)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Says what is current now, and how daemons hear of it."""
    with progress_display(quiet=args.quiet) as (_, on_progress), step_rows(args) as rows:
        done = publish_step(
            rows, args.store, tables=args.table, name=args.name, dtype=args.dtype,
            addressing=args.addressing, on_progress=on_progress,
        )  # fmt: skip
    if args.json:
        json.dump(_as_json(done), sys.stdout, indent=2)
        print()
    else:
        print("\n".join(_sentences(done)))
    return 0


def _as_json(done: Published) -> dict[str, Any]:
    tables = [
        {
            "name": t.spec.name,
            "generation": t.spec.generation,
            "replaced": done.replaced.get(t.spec.name),
            "addressing": t.spec.addressing,
            "path": str(t.path),
            "file_bytes": t.file_bytes,
        }
        for t in done.tables
    ]
    return {"step": done.step, "tables": tables}


def _sentences(done: Published) -> list[str]:
    lines = [f"step {done.step} is published"]
    for t in done.tables:
        before = done.replaced.get(t.spec.name)
        kept = f"; {before} is kept" if before else ""
        lines.append(
            f"  {t.spec.name}: {readable_bytes(t.file_bytes)} in {t.duration_s:.1f} s, served by "
            f"{t.spec.addressing}s, generation {t.spec.generation}{kept}"
        )
    if done.replaced:
        lines.append("daemons that serve it follow on SIGHUP: kill -HUP PID")
    return lines
