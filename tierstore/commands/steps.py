"""What the commands that read a committed step have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tierstore.snapshots import StepRows, open_step


def add_step_arguments(parser: argparse.ArgumentParser, *, tables: bool) -> None:
    """The arguments whose values `step_rows` takes, and whether there is to be progress."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="directory with a training store that no process has open")
    add("--step", type=int, metavar="S", help="a committed step that is kept (default: the last)")
    if tables:
        add("--table", action="append", default=[], metavar="NAME",
            help="only this table; may be repeated (default: all)")  # fmt: skip
    add("--json", action="store_true", help="tell the result as JSON on stdout")
    add("--quiet", action="store_true", help="no progress on stderr")


@contextmanager
def step_rows(args: argparse.Namespace) -> Iterator[StepRows]:
    """The step that was asked for; closed at the end."""
    with open_step(Path(args.source), args.step) as rows:
        yield rows
