"""Working off a read plan, window by window, two of them on their way at a time.

Each goes into its half of the staging buffer: while one is checked and copied out, the disk works on the
other.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tierstore.devices.base import PageRead
from tierstore.tiers.plan import ReadPlan, Window
from tierstore.tiers.staging import Staging


@dataclass(frozen=True)
class Landing:
    """A window on its way into one half of the staging buffer."""

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


def read_windows(sweep: Sweep, staging: Staging) -> None:
    """Work off a plan; when something raises, what is under way is withdrawn."""
    on_its_way: deque[Landing] = deque()
    try:
        for number, window in enumerate(sweep.plan.windows(staging.capacity_pages)):
            if len(on_its_way) == 2:
                sweep.finish(on_its_way.popleft())
            on_its_way.append(sweep.start(window, staging.halves[number % 2]))
        while on_its_way:
            sweep.finish(on_its_way.popleft())
    finally:
        for landing in on_its_way:
            landing.read.withdraw()
