"""Device memory that the daemon makes and hands to other processes, by one of two means.

    cuda    an allocation of its own, opened by others through its CUDA IPC handle; they could write it
    host    a sealed memfd, for tests on CPU tensors: the same tier, processes and sockets without a GPU

Memory that somebody has opened must not be freed at once: `RETIRE_S` after everybody was told that it is
not to be used any more. Its control word is cleared before, so who has not listened finds nothing in it.
"""

from __future__ import annotations

import mmap
import threading
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from engram_client.gpu.ipc import IpcDriver, NotShared, bytes_at, device_name
from tierstore.tiers.sealed import SealedMemory

RETIRE_S = 10.0
Kind = Literal["cuda", "host"]


class DeviceMemory(Protocol):
    """uint8 `tensor` on a device, zeros at first, and what others need to open it."""

    kind: Kind
    tensor: Tensor
    device: str  # as `device_name` names it
    handle: str  # hexadecimal; empty where a descriptor goes along

    def descriptor(self) -> int | None:
        """A descriptor for another process, the caller's to close."""

    def free(self) -> None:
        """Nobody uses it any more."""


def make_memory(device: torch.device, size_bytes: int) -> DeviceMemory:
    """Raises NotShared where the device has not so much, or cannot hand it over."""
    return CudaMemory(device, size_bytes) if device.type == "cuda" else HostMemory(device, size_bytes)


class CudaMemory:
    """See `DeviceMemory`."""

    kind: Kind = "cuda"

    def __init__(self, device: torch.device, size_bytes: int) -> None:
        self._driver, self._device = IpcDriver(), device
        self._address = self._driver.allocate(size_bytes, device)
        try:
            self.handle = self._driver.handle_of(self._address, device).hex()
            self.tensor = bytes_at(self._address, size_bytes, device).zero_()
        except (RuntimeError, NotShared) as error:
            self._driver.free(self._address, device)
            raise NotShared(str(error).partition("\n")[0]) from error
        self.device = device_name(device)

    def descriptor(self) -> None:
        return None

    def free(self) -> None:
        del self.tensor
        self._driver.free(self._address, self._device)


class HostMemory:
    """See `DeviceMemory`."""

    kind: Kind = "host"
    handle = ""

    def __init__(self, device: torch.device, size_bytes: int) -> None:
        if device.type != "cpu":
            raise NotShared(f"memory of {device} cannot be handed to other processes")
        try:
            self._memory = SealedMemory("tierstore-hbm", -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        except OSError as error:
            raise NotShared(f"{size_bytes} bytes cannot be had: {error.strerror}") from error
        self.tensor = torch.from_numpy(np.asarray(self._memory.mapping))
        self.device = device_name(device)

    def descriptor(self) -> int:
        return self._memory.descriptor(writable=False)

    def free(self) -> None:
        del self.tensor, self._memory


def free_later(memory: DeviceMemory, delay_s: float = RETIRE_S) -> None:
    """Free it once whoever was told to let go of it has had the time to."""
    timer = threading.Timer(delay_s, memory.free)
    timer.daemon = True
    timer.start()
