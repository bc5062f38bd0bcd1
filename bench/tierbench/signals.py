"""Signals and processes: a command that is ended unwinds, and takes with it whatever it has started.

SIGTERM and SIGHUP end a Python process where it stands: daemons of a benchmark would go on, holding their
memory and ports, and folders would stay. Here they are raised as Ctrl-C is, so that every `with` has its end.

A terminal sends Ctrl-C to all processes of a group. Those that are started `deaf` never see it, wherever
they are in their start: whoever started them is told as well, and ends them in order.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = signal.SIGTERM, signal.SIGHUP


class Ended(KeyboardInterrupt):
    """A signal that ends; `number` is its."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def ending_signals_raised() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Ended meanwhile, unless they were being ignored, as under nohup."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:
            signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, _frame: FrameType | None) -> None:
    raise Ended(number)


@contextmanager
def deaf() -> Iterator[None]:
    """Processes started meanwhile by this thread never see Ctrl-C. One that comes meanwhile comes after."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
