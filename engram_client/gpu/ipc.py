"""Device memory of one process in another, by CUDA IPC: libcuda through ctypes.

torch hands its own tensors over as well, but with helper files and reference counts of its own, from the
pool it allocates out of. What is handed over here is an allocation by itself, named by 64 bytes.

Not yet run with a driver; tests put a double in the place of libcuda.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from engram_client.errors import TierstoreError

HANDLE_BYTES = 64
LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class NotShared(TierstoreError):
    """Device memory cannot be made or handed over, and why; internal: the next way serves."""


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


class AddressedBytes:
    """Memory of a device by its address, as torch takes it in."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip


class IpcDriver:
    """What of libcuda is needed. Raises NotShared in all its methods. Thread safe."""

    def __init__(self, library: Any = None) -> None:
        try:
            self._library = library or ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NotShared("there is no CUDA driver (libcuda.so.1)") from error

    def allocate(self, size_bytes: int, device: torch.device) -> int:
        """The address of memory of its own."""
        address = ctypes.c_uint64()
        with self._context(device):
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        return address.value

    def free(self, address: int, device: torch.device) -> None:
        with self._context(device):
            self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def handle_of(self, address: int, device: torch.device) -> bytes:
        """What other processes open memory of `allocate` by."""
        handle = IpcHandle()
        with self._context(device):
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle.reserved)

    def open(self, handle: bytes, device: torch.device) -> int:
        """The address of another process's memory here."""
        address, packed = ctypes.c_uint64(), IpcHandle()
        packed.reserved[:] = handle
        with self._context(device):
            self._call(
                "cuIpcOpenMemHandle_v2", ctypes.byref(address), packed, ctypes.c_uint(LAZY_PEER_ACCESS)
            )
        return address.value

    def close(self, address: int, device: torch.device) -> None:
        with self._context(device):
            self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise NotShared(f"{name} failed: {(text.value or b'').decode()} (error {status})")

    @contextmanager
    def _context(self, device: torch.device) -> Iterator[None]:
        """Calls of this thread mean `device`, in the context that torch uses."""
        try:
            with torch.cuda.device(device):
                torch.cuda.current_stream(device).synchronize()
                yield
        except (RuntimeError, AssertionError) as error:
            raise NotShared(f"{device} cannot be used: {str(error).partition(chr(10))[0]}") from error


def bytes_at(address: int, size_bytes: int, device: torch.device) -> Tensor:
    """uint8 [size_bytes] over memory of a CUDA device; whoever made it keeps it."""
    return torch.as_tensor(AddressedBytes(address, size_bytes), device=device)


def device_name(device: torch.device) -> str:
    """What two processes mean by one GPU: its UUID; of a CPU "cpu"."""
    if device.type != "cuda":
        return device.type
    return str(torch.cuda.get_device_properties(device).uuid)
