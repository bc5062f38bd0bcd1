"""What `pack` shows on stderr: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tierstore.commands.readable import readable_bytes
from tierstore.packing import Progress

LINE_INTERVAL_S = 5.0

Display = tuple[Callable[[str], None], Callable[[Progress], None]]


@contextmanager
def progress_display(*, quiet: bool) -> Iterator[Display]:
    """Two functions: one says a sentence, one shows how far the pack is."""
    if quiet:
        yield (lambda sentence: None), (lambda progress: None)
    elif sys.stderr.isatty():
        with _bars() as display:
            yield display
    else:
        yield (lambda sentence: print(f"tierstore: {sentence}", file=sys.stderr)), _Lines().show


@contextmanager
def _bars() -> Iterator[Display]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
        TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    tasks = {}
    with Bars(*columns, console=console) as bars:

        def show(progress: Progress) -> None:
            if progress.table not in tasks:
                tasks[progress.table] = bars.add_task(
                    progress.table, total=progress.total_bytes, completed=progress.resumed_bytes
                )
            bars.update(tasks[progress.table], completed=progress.done_bytes)

        yield (lambda sentence: console.print(sentence, highlight=False, markup=False)), show


class _Lines:
    """Progress for logs: at most one line every few seconds, with rate and time left."""

    def __init__(self) -> None:
        self._table = ""
        self._began_s = self._said_s = 0.0

    def show(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if progress.table != self._table:
            self._table, self._began_s, self._said_s = progress.table, now_s, now_s
        if now_s - self._said_s < LINE_INTERVAL_S:
            return
        self._said_s = now_s
        print(f"tierstore: {progress_line(progress, now_s - self._began_s)}", file=sys.stderr)


def progress_line(progress: Progress, elapsed_s: float) -> str:
    """One line: how much of how much, how fast, how long still."""
    rate = max(1.0, (progress.done_bytes - progress.resumed_bytes) / max(elapsed_s, 1e-3))
    left_s = (progress.total_bytes - progress.done_bytes) / rate
    return (
        f"{progress.table}: {readable_bytes(progress.done_bytes)} of {readable_bytes(progress.total_bytes)}, "
        f"{readable_bytes(int(rate))}/s, {left_s:.0f} s left"
    )
