"""Ids from a device to the host, and rows from the host to a device, by way of bounded pinned memory.

**Ids** that lie on a device are copied to pinned memory on a side stream behind an event of the caller's
stream. Who looks them up has to wait for that copy: it is the one place where a look-up of ids on a device
makes the host wait, and it waits for the ids alone, not for what the caller's stream was given after them. A
prefetch leaves this wait to the thread that reads.

**Rows** are read into a buffer of a ring and copied from there, buffer after buffer, so that the next is
being read while the last is on its way. The ring bounds what is pinned, however large a look-up is. For a
look-up into a caller's tensor the copies go on the caller's own stream: what was to happen to that memory
before and after it stays in order, and nobody waits. For a prefetch they go on a side stream into memory
that nobody else knows yet; `wait` makes the stream that is current then wait for them, and not the host.

There is one carrier a device and process; a forked child makes its own. Checked on CPU tensors, with a double
in the place of the side streams that works as late as it may; not yet run on a GPU.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engram_client.errors import BadRequest
from engram_client.gpu.pinned import PinnedRing, StagingBuffer, pinned_bytes
from engram_client.gpu.streams import Event, SideStream, record_current, side_stream

ROWS_BUFFERS, ROWS_BUFFER_BYTES = 4, 8 << 20
BUFFER_TIMEOUT_S = 60.0  # that a copy waits for others to end
ID_DTYPES = (torch.int64, torch.int32, torch.bool)

Fill = Callable[[slice, np.ndarray], None]  # entries [start, stop) into uint8 [stop - start, entry_bytes]


class PendingIds:
    """Ids on their way to the host."""

    def __init__(self, memory: Tensor, landed: Event) -> None:
        self._memory, self._landed = memory, landed

    def wait(self) -> np.ndarray:
        """The ids, of the shape and dtype they had."""
        self._landed.synchronize()
        return self._memory.numpy()


class Landed:
    """Rows that are copied to a device on a side stream. `take` hands them to the current stream."""

    def __init__(self, rows: Tensor, event: Event) -> None:
        self._rows, self._event = rows, event

    def take(self) -> Tensor:
        """The rows; what the current stream is given from now on comes after their copy."""
        self._event.block_current(self._rows.device)
        if self._rows.device.type == "cuda":
            self._rows.record_stream(torch.cuda.current_stream(self._rows.device))
        return self._rows


class Carrier:
    """Copies between the host and `device`. Thread safe."""

    def __init__(self, device: torch.device, *, rows_buffer_bytes: int = ROWS_BUFFER_BYTES) -> None:
        self.device = device
        self._rows = PinnedRing(device, buffers=ROWS_BUFFERS, buffer_bytes=rows_buffer_bytes)
        self._down: SideStream = side_stream(device)
        self._up: SideStream = side_stream(device)
        self._downwards, self._upwards = threading.Lock(), threading.Lock()

    def start_ids(self, ids: Tensor) -> PendingIds:
        """Begin to bring ids, or a mask, of any shape to the host; does not wait for them.

        What is pinned for them is bounded by the number of open handles. Raises BadRequest for other dtypes.
        """
        if ids.dtype not in ID_DTYPES:
            raise BadRequest(f"ids must be int64 or int32, got a tensor of {ids.dtype}")
        source = ids.detach()
        memory = pinned_bytes(source.numel() * source.dtype.itemsize, self.device)
        memory = memory.view(source.dtype).view(source.shape)
        ready = record_current(self.device)
        with self._downwards:
            self._down.wait_for(ready)
            self._down.run(lambda: _copy(source, memory), uses=(source,))
            return PendingIds(memory, self._down.record())

    def ids(self, ids: Tensor) -> np.ndarray:
        """Ids on the host; waits for the stream that makes them, and for nothing behind them."""
        return self.start_ids(ids).wait()

    def fill(self, out: Tensor, entries: int, fill: Fill) -> None:
        """Have `fill` make the rows of `entries`, and copy them into uint8 `out` on the current stream."""
        if not entries:
            return
        flat = out.view(entries, -1)
        for part, buffer, rows in self._parts(entries, flat.shape[1]):
            with buffer:
                fill(part, rows.numpy())
                _copy(rows, flat[part])
                buffer.busy_until(record_current(self.device))

    def bring(self, shape: tuple[int, ...], entries: int, fill: Fill) -> Landed:
        """As `fill`, into a new uint8 tensor of `shape` on a side stream."""
        made: list[Tensor] = []
        with self._upwards:
            self._up.run(lambda: made.append(self.empty(shape)))
            made_at = self._up.record()
        if not made:  # a side stream that works later than it is told to
            made_at.synchronize()
        out = made[0]
        if entries:
            flat = out.view(entries, -1)
            for part, buffer, rows in self._parts(entries, flat.shape[1]):
                with buffer:
                    fill(part, rows.numpy())
                    with self._upwards:
                        self._up.run(partial(_copy, rows, flat[part]))
                        buffer.busy_until(self._up.record())
        with self._upwards:
            return Landed(out, self._up.record())

    def send(self, rows: np.ndarray) -> Tensor:
        """Rows uint8 of the host as a tensor on the device, in the order of the current stream."""
        out = self.empty(rows.shape)
        self.send_into(rows, out)
        return out

    def send_into(self, rows: np.ndarray, out: Tensor, index: np.ndarray | None = None) -> None:
        """Copy rows uint8 [n, ...] into `out`, in the order of the current stream.

        With `index` int64 [m] these are `rows[index]`, picked while they are copied to pinned memory.
        """
        entries = len(rows) if index is None else len(index)
        if not entries:
            return
        lines = rows.reshape(len(rows), -1)

        def fill(part: slice, buffer: np.ndarray) -> None:
            if index is None:
                np.copyto(buffer, lines[part])
            else:
                np.take(lines, index[part], axis=0, out=buffer, mode="clip")

        self.fill(out, entries, fill)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Memory for rows, uint8, in the order of the current stream. Raises BadRequest."""
        try:
            with torch.inference_mode(False):  # may be filled elsewhere than where it was asked for
                return torch.empty(shape, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:
            raise BadRequest(
                f"{self.device} has no {math.prod(shape)} bytes for the rows of this look-up; ask for less "
                f"at a time, or free some: {error}"
            ) from error

    def _parts(self, entries: int, entry_bytes: int) -> Iterator[tuple[slice, StagingBuffer, Tensor]]:
        """(entries, buffer, uint8 [so many, entry_bytes] of it) until all entries have had their turn."""
        at_once = self._rows.buffer_bytes // entry_bytes
        ring = self._rows
        if not at_once:  # one entry is larger than a buffer
            ring, at_once = PinnedRing(self.device, buffers=1, buffer_bytes=entry_bytes), 1
        for start in range(0, entries, at_once):
            part = slice(start, min(entries, start + at_once))
            buffer = ring.take(BUFFER_TIMEOUT_S)
            count = part.stop - part.start
            yield part, buffer, buffer.memory[: count * entry_bytes].view(count, entry_bytes)


def _copy(source: Tensor, target: Tensor) -> None:
    on_cuda = "cuda" in (source.device.type, target.device.type)  # whose streams the events are of
    target.copy_(source, non_blocking=on_cuda)


_carriers: dict[tuple[int, torch.device], Carrier] = {}


def carrier_of(device: torch.device) -> Carrier:
    """The carrier of this process for a device."""
    key = (os.getpid(), device)
    return _carriers.get(key) or _carriers.setdefault(key, Carrier(device))
