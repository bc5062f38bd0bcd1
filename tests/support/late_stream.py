"""A side stream on a CPU that works as late as it may: only once somebody waits for it.

In place of `engram_client.gpu.streams.HostSideStream` it makes a wait that is missing visible without a GPU:
who reads what the side stream writes without waiting finds old bytes, and who writes again what it reads has
it copy the wrong ones. What a device only might do, this always does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from engram_client.gpu.streams import Event


class LateEvent:
    """See `Event`: has happened once the stream has been made to come that far."""

    def __init__(self, stream: LateSideStream, place: int) -> None:
        self._stream, self._place = stream, place

    def done(self) -> bool:
        return self._stream.finished >= self._place

    def synchronize(self) -> None:
        self._stream.catch_up(self._place)

    def block_current(self, device: torch.device) -> None:
        self.synchronize()


class LateSideStream:
    """See `SideStream`. finished: how many of the works it was given are done."""

    made: list[LateSideStream] = []

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.finished = 0
        self._given: list[Callable[[], None]] = []
        self._working = threading.RLock()
        LateSideStream.made.append(self)

    def wait_for(self, event: Event) -> None:
        self._given.append(event.synchronize)

    def run(self, work: Callable[[], None], uses: Iterable[Tensor] = ()) -> None:
        self._given.append(work)

    def record(self) -> LateEvent:
        return LateEvent(self, len(self._given))

    def catch_up(self, place: int | None = None) -> None:
        """Do what has been given, up to a place; whoever comes meanwhile waits for that."""
        with self._working:
            place = len(self._given) if place is None else place
            while self.finished < place:
                work = self._given[self.finished]
                with torch.inference_mode(False), torch.no_grad():
                    work()
                self.finished += 1
