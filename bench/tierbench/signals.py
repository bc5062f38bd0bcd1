"""Signals and processes: a command that is ended unwinds, and takes with it whatever it has started.

SIGTERM and SIGHUP end a Python process where it stands: daemons of a benchmark would go on, holding their
memory and ports, and folders would stay. Here they are raised as Ctrl-C is, so that every `with` has its end.

A terminal sends Ctrl-C to all processes of a group. Those that are started `deaf` never see it, wherever
they are in their start: whoever started them is told as well, and ends them in order.

Python drops what is raised in a callback out of C or in a destructor, with a line on stderr: a compiler that
is at work calls back for a good part of its time. A signal that was dropped so comes again a little later.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = signal.SIGTERM, signal.SIGHUP
AGAIN_S = 0.1  # after one was dropped


class Ended(KeyboardInterrupt):
    """A signal that ends; `number` is its."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def ending_signals_raised() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Ended meanwhile, unless they were being ignored, as under nohup.

    Neither they nor Ctrl-C are lost where Python drops exceptions.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler == signal.SIG_DFL:
            signal.signal(number, _raise)
    shown = sys.unraisablehook

    def dropped(lost: sys.UnraisableHookArgs) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            _send_again(getattr(lost.exc_value, "number", signal.SIGINT))
        else:
            shown(lost)

    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = shown
        for number, handler in before.items():
            signal.signal(number, handler)


def _send_again(number: int) -> None:
    timer = threading.Timer(AGAIN_S, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


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
