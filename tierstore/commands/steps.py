"""What the commands that read a committed step have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from engram_client import connect
from engram_client.errors import BadRequest, StoreLocked
from tierstore.snapshots import Source, StepRows, described, open_storage, whole_step

SHARES = "Shares of sharded training are put together: give the directories of all ranks as SOURCE."


def add_step_arguments(parser: argparse.ArgumentParser, *, tables: bool) -> None:
    """The arguments whose values `step_rows` takes, and whether there is to be progress."""
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="+",
        help="directory of a training store that no process has open, or unix:PATH of a daemon that trains; "
        "several: all shares of a sharded training")  # fmt: skip
    add("--step", type=int, metavar="S",
        help="a committed step that is kept (default: the last; of shares, the last that all keep)"
        )  # fmt: skip
    if tables:
        add("--table", action="append", default=[], metavar="NAME",
            help="only this table; may be repeated (default: all)")  # fmt: skip
    add("--json", action="store_true", help="tell the result as JSON on stdout")
    add("--quiet", action="store_true", help="no progress on stderr")


@contextmanager
def step_rows(args: argparse.Namespace, *, lone_share: bool = False) -> Iterator[StepRows]:
    """The step that was asked for, shares put together; closed at the end. See `whole_step`."""
    _check_once(args.source)
    with ExitStack() as stack:
        sources = [_source(text, len(args.source), stack) for text in args.source]
        yield stack.enter_context(whole_step(sources, args.step, lone_share=lone_share))


def _check_once(texts: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for text in texts:
        place = str(Path(text.removeprefix("unix:")).resolve())
        if place in seen:
            raise BadRequest(f"{seen[place]} and {text} are one place; give each share once")
        seen[place] = text


def _source(text: str, together: int, stack: ExitStack) -> Source:
    if text.startswith("unix:"):
        training = stack.enter_context(connect(text)).training()
        partitions = {name: d.partition for name, d in training.tables().items()}
        return Source(text, partitions, training.steps, lambda step: described(training.open_step(step)))
    try:
        storage = stack.enter_context(open_storage(text, together))
    except StoreLocked as error:
        raise StoreLocked(
            f"{error}. To read a step meanwhile: unix:PATH instead of the directory where that is a daemon; "
            "where it trains itself, its training.export, .publish or .snapshot"
        ) from error
    partitions = {spec.name: spec.partition for spec in storage.tables}
    return Source(text, partitions, storage.steps, storage.snapshot)
