"""Working off read plans, window by window, several of them on their way at a time.

Each goes into its part of the staging buffer: while one is checked and copied out, the disk works on the
others. Their reads are begun in order, so the oldest window is complete first and its part of the buffer
takes the next one while all the others still keep the disk's queue full. Several plans can go through in
one sweep, so a batch that needs two files waits once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tierstore.devices.base import PageRead
from tierstore.tiers.plan import ReadPlan, Window
from tierstore.tiers.staging import Staging


@dataclass(frozen=True)
class Landing:
    """A window on its way into its part of the staging buffer."""

    window: Window
    pages: np.ndarray
    read: PageRead


class Sweep(Protocol):
    """A plan and what is done with its windows."""

    @property
    def plan(self) -> ReadPlan: ...

    def start(self, window: Window, pages: np.ndarray) -> Landing:
        """Begin to read a window into `pages`; the staging buffer must know of it."""

    def finish(self, landing: Landing) -> None:
        """Wait for a window and use it; what it raises ends everything."""


def read_windows(sweeps: Sequence[Sweep], staging: Staging) -> None:
    """Work off all plans; when one raises, what is under way is withdrawn."""
    work = ((sweep, window) for sweep in sweeps for window in sweep.plan.windows(staging.capacity_pages))
    on_its_way: deque[tuple[Sweep, Landing]] = deque()
    parts = len(staging.windows)

    def finish_first() -> None:
        sweep, landing = on_its_way.popleft()
        sweep.finish(landing)

    try:
        for number, (sweep, window) in enumerate(work):
            if len(on_its_way) == parts:
                finish_first()
            on_its_way.append((sweep, sweep.start(window, staging.windows[number % parts])))
        while on_its_way:
            finish_first()
    finally:
        for _, landing in on_its_way:
            landing.read.withdraw()
