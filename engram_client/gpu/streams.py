"""Work beside the caller's stream, and the events that put the two in order.

    side = side_stream(device)
    side.wait_for(record_current(device))        # not before what the caller's stream has been given so far
    side.run(lambda: there.copy_(here, non_blocking=True), uses=(here, there))
    landed = side.record()
    landed.block_current(device)                 # the caller's stream waits for it, not the host
    landed.synchronize()                         # the host waits

Four rules hold everything together, and each has cost somebody rows:

 * what a side stream reads was written before it: `wait_for` first;
 * what the caller's stream reads of a side stream's work: `block_current` first;
 * memory that two streams use belongs to one stream's allocator, which hands it out again as soon as *that*
   stream has been told to forget it. `uses` tells it of the other (record_stream);
 * host memory is nobody's allocator's: whoever reuses it waits for the event behind its last copy
   (`PinnedRing` does).

On CPU tensors there is one order, that of the calls: `run` runs at once, every event has happened. Tests
put a double in place of `HostSideStream` that runs its work as late as the events allow
(tests/support/late_stream.py), so that a wait which is missing gives wrong bytes on a CPU, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a stream's order."""

    def done(self) -> bool:
        """Whether it has been passed; never waits."""
        ...

    def synchronize(self) -> None:
        """Have the host wait for it."""
        ...

    def block_current(self, device: torch.device) -> None:
        """Have the current stream of `device` wait for it; the host goes on."""
        ...


class SideStream(Protocol):
    """A stream of its own. One thread at a time may give it work."""

    device: torch.device

    def wait_for(self, event: Event) -> None:
        """What is given from now on starts after `event`."""
        ...

    def run(self, work: Callable[[], None], uses: Iterable[Tensor] = ()) -> None:
        """Give it the operations that `work` starts; `uses` are device tensors of other streams in it."""
        ...

    def record(self) -> Event:
        """The point behind all that it has been given."""
        ...


def side_stream(device: torch.device) -> SideStream:
    """A new stream beside the others of `device`; on a device without streams one that is in order."""
    return CudaSideStream(device) if device.type == "cuda" else HostSideStream(device)


def record_current(device: torch.device) -> Event:
    """The point behind all that the current stream of `device` has been given."""
    if device.type != "cuda":
        return HOST_EVENT
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return CudaEvent(event)


class HostEvent:
    """See `Event`: it has happened."""

    def done(self) -> bool:
        return True

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def block_current(self, device: torch.device) -> None:
        """There is nothing to wait for."""


HOST_EVENT = HostEvent()


class HostSideStream:
    """See `SideStream`: everything happens at once, in the order of the calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_for(self, event: Event) -> None:
        event.synchronize()

    def run(self, work: Callable[[], None], uses: Iterable[Tensor] = ()) -> None:
        work()

    def record(self) -> Event:
        return HOST_EVENT


class CudaEvent:
    """See `Event`."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())

    def synchronize(self) -> None:
        self.event.synchronize()

    def block_current(self, device: torch.device) -> None:
        torch.cuda.current_stream(device).wait_event(self.event)


class CudaSideStream:
    """See `SideStream`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def wait_for(self, event: Event) -> None:
        if isinstance(event, CudaEvent):
            self.stream.wait_event(event.event)
        else:
            event.synchronize()

    def run(self, work: Callable[[], None], uses: Iterable[Tensor] = ()) -> None:
        with torch.cuda.stream(self.stream):
            work()
        for tensor in uses:
            if tensor.device.type == "cuda":
                tensor.record_stream(self.stream)

    def record(self) -> Event:
        event = torch.cuda.Event()
        event.record(self.stream)
        return CudaEvent(event)
