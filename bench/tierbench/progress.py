"""Progress on stderr for terminals, of what lasts; silent where stderr is not a terminal."""

from __future__ import annotations

import sys
import threading
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
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import TransferSpeedColumn as SpeedColumn

PATIENCE_S = 2.0  # what is done sooner shows nothing
LOOK_S = 0.25  # between looks at the clock
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
def stage(label: str) -> Iterator[None]:
    """Something that lasts and cannot say how far it is: its name, and for how long it has been at it."""
    with _shown(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()) as bar:
        bar.add_task(label, total=None)
        yield


@contextmanager
def clock(label: str, lasts_s: float) -> Iterator[None]:
    """Something of which only the time is known that it takes: a bar that follows the clock."""
    with _shown(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(label, total=lasts_s)
        bar.follow(lambda elapsed_s: bar.update(task, completed=min(elapsed_s, lasts_s)))
        yield


@contextmanager
def _progress(label: str, total: int | None, *shown: ProgressColumn) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), *shown, TimeRemainingColumn())
    with _shown(*columns) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


class _Bar(Progress):
    """Shows itself when patience is over, by a thread of its own: the caller may be in a long call."""

    _told: Callable[[float], None] | None = None

    def follow(self, told: Callable[[float], None]) -> None:
        """`told` hears now and then for how many seconds this has been going on."""
        self._told = told

    def show_later(self) -> None:
        self._ended, self._started = threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)
        self._thread.start()

    def _show(self) -> None:
        if self._ended.wait(PATIENCE_S):
            return
        self.start()
        while self._told is not None and not self._ended.wait(LOOK_S):
            self._told(time.monotonic() - self._started)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        self.stop()


@contextmanager
def _shown(*columns: ProgressColumn) -> Iterator[_Bar]:
    told = sys.stderr.isatty()
    bar = _Bar(*columns, console=Console(stderr=True), transient=True, disable=not told)
    if not told:
        yield bar
        return
    bar.show_later()
    try:
        yield bar
    finally:
        bar.end()
