"""Host memory that a device copies from without a detour, and a bounded ring of such buffers.

A copy from pinned memory goes on while the host does something else, so the host must not write there again
before it has ended: each buffer of a ring is guarded by the event behind its last copy. Who takes a buffer
waits for that, and never for another's.

    with ring.take(timeout_s=30) as buffer:
        fill(buffer.memory)                               # uint8, on the host
        side.run(lambda: there.copy_(buffer.memory[:size], non_blocking=True))
        buffer.busy_until(side.record())                  # else it is free as soon as the block is left

Where there is no CUDA, or it will not pin (locked memory is limited), the memory is plain and page-aligned:
the same bytes, but a copy from it makes the host wait.
"""

from __future__ import annotations

import logging
import mmap
import threading
from types import TracebackType

import torch
from torch import Tensor

from engram_client.deadline import Deadline
from engram_client.errors import BadRequest, DeadlineExceeded
from engram_client.gpu.streams import HOST_EVENT, Event

log = logging.getLogger(__name__)
_said = threading.Event()


def pinned_bytes(size_bytes: int, device: torch.device) -> Tensor:
    """uint8 [size_bytes] of host memory, page-aligned, pinned where `device` is CUDA and lets us.

    Raises BadRequest where there is no memory at all.
    """
    with torch.inference_mode(False):
        if device.type == "cuda":
            try:
                return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
            except RuntimeError as error:
                _say(size_bytes, error)
        try:
            memory = torch.empty(size_bytes + mmap.PAGESIZE, dtype=torch.uint8, device="cpu")
        except RuntimeError as error:
            raise BadRequest(f"no memory for a staging buffer of {size_bytes} bytes: {error}") from error
        start = -memory.data_ptr() % mmap.PAGESIZE
        return memory[start : start + size_bytes]


def _say(size_bytes: int, error: Exception) -> None:
    if not _said.is_set():
        _said.set()
        log.warning(
            "CUDA did not pin %d bytes of staging memory (%s): copies to the device make the host wait; is "
            "the limit on locked memory too low?",
            size_bytes, str(error).partition("\n")[0],
        )  # fmt: skip


class StagingBuffer:
    """One buffer of a ring, taken. A context manager; made by `PinnedRing.take`.

    memory: uint8 [buffer_bytes] on the host
    """

    def __init__(self, ring: PinnedRing, memory: Tensor) -> None:
        self.memory = memory
        self._ring = ring
        self._event: Event = HOST_EVENT

    def busy_until(self, event: Event) -> None:
        """Nobody gets it before `event`."""
        self._event = event

    def give_back(self) -> None:
        """Let the ring have it again; idempotent. Who holds `memory` must not touch it any more."""
        ring, self._ring = self._ring, None  # type: ignore[assignment]
        if ring is not None:
            ring._returned(self.memory, self._event)

    def __enter__(self) -> StagingBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()


class PinnedRing:
    """At most `buffers` buffers of `buffer_bytes`, made when they are first needed. Thread safe."""

    def __init__(self, device: torch.device, *, buffers: int, buffer_bytes: int) -> None:
        if buffers < 1 or buffer_bytes < 1:
            raise BadRequest(
                f"a staging ring needs buffers of at least a byte, got {buffers} of {buffer_bytes} bytes"
            )
        self.device, self.buffers, self.buffer_bytes = device, buffers, buffer_bytes
        self._made = 0
        self._free: list[tuple[Tensor, Event]] = []  # the longest given back first
        self._changed = threading.Condition()

    def take(self, timeout_s: float | None = None) -> StagingBuffer:
        """The buffer that was given back first, once its copy has ended.

        Raises DeadlineExceeded where others hold all of them for `timeout_s` seconds.
        """
        deadline = Deadline.after(timeout_s)
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._made < self.buffers, deadline.remaining_s())
            if self._free:
                memory, event = self._free.pop(0)
            elif self._made < self.buffers:
                memory, event = pinned_bytes(self.buffer_bytes, self.device), HOST_EVENT
                self._made += 1
            else:
                raise DeadlineExceeded(
                    f"all {self.buffers} staging buffers of {self.buffer_bytes} bytes were in use for "
                    f"{timeout_s:g} s; ask for less at a time, or make the ring larger"
                )
        try:
            event.synchronize()
        except BaseException:
            self._returned(memory, event)
            raise
        return StagingBuffer(self, memory)

    def _returned(self, memory: Tensor, event: Event) -> None:
        with self._changed:
            self._free.append((memory, event))
            self._changed.notify()
