"""What the commands that read a committed step have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from engram_client import connect
from tierstore.snapshots import StepRows, described, open_step


def add_step_arguments(parser: argparse.ArgumentParser, *, tables: bool) -> None:
    """The arguments whose values `step_rows` takes, and whether there is to be progress."""
    add = parser.add_argument
    add("source", metavar="SOURCE",
        help="directory of a training store that no process has open, or unix:PATH of a daemon that trains"
        )  # fmt: skip
    add("--step", type=int, metavar="S", help="a committed step that is kept (default: the last)")
    if tables:
        add("--table", action="append", default=[], metavar="NAME",
            help="only this table; may be repeated (default: all)")  # fmt: skip
    add("--json", action="store_true", help="tell the result as JSON on stdout")
    add("--quiet", action="store_true", help="no progress on stderr")


@contextmanager
def step_rows(args: argparse.Namespace) -> Iterator[StepRows]:
    """The step that was asked for; closed at the end."""
    if not args.source.startswith("unix:"):
        with open_step(Path(args.source), args.step) as rows:
            yield rows
        return
    with connect(args.source) as client, closing(client.training().open_step(args.step)) as opened:
        yield described(opened)
