"""Progress on stderr for terminals, of what lasts; silent where stderr is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import TransferSpeedColumn as SpeedColumn

PATIENCE_S = 2.0  # what is done sooner shows nothing
Advance = Callable[[int], None]


@contextmanager
def byte_progress(label: str, total_bytes: int | None = None) -> Iterator[Advance]:
    """Yields a function that is told of further bytes done; shows rate and time left."""
    with _progress(label, total_bytes, DownloadColumn(), SpeedColumn()) as advance:
        yield advance


@contextmanager
def count_progress(label: str, total: int) -> Iterator[Advance]:
    """Yields a function that is told of further things done; shows their share and the time left."""
    with _progress(label, total, TaskProgressColumn()) as advance:
        yield advance


@contextmanager
def _progress(label: str, total: int | None, *shown: ProgressColumn) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), *shown, TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
    task = bar.add_task(label, total=total)
    started, running = time.monotonic(), False

    def advance(count: int) -> None:
        nonlocal running
        bar.advance(task, count)
        if not running and time.monotonic() - started >= PATIENCE_S:
            bar.start()
            running = True

    try:
        yield advance
    finally:
        bar.stop()
