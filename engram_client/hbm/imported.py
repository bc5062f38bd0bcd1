"""A daemon's device memory in this process: opened by its CUDA IPC handle, or mapped where it is a file's."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_client.arena.mapping import SharedMapping
from engram_client.gpu.ipc import IpcDriver, NotShared, bytes_at, device_name
from engram_client.hbm.mirror import Mirror, mirror_bytes
from engram_client.transport.attachment import OfferedHbm
from engram_client.transport.handoff import HbmNote


def open_mirror(offered: OfferedHbm, device: torch.device) -> Mirror:
    """What a daemon's arena holds; closed with the object.

    Raises NotShared where it lies on another device, or cannot be opened from here.
    """
    note, here = offered.note, device_name(device)
    if note.device != here:
        raise NotShared(f"the daemon's HBM arena lies on {note.device}, and rows are wanted on {here}")
    size_bytes = mirror_bytes(note.sets, note.record_bytes)
    if note.kind == "cuda":
        memory, close = _opened(note, size_bytes, device)
    else:
        memory, close = _mapped(offered.descriptor, size_bytes), None
    mirror = Mirror(memory, note.sets, note.record_bytes)
    if close is not None:
        weakref.finalize(mirror, *close).atexit = False
    return mirror


def _opened(note: HbmNote, size_bytes: int, device: torch.device) -> tuple[Tensor, tuple[Any, ...]]:
    driver = IpcDriver()
    address = driver.open(bytes.fromhex(note.handle), device)
    return bytes_at(address, size_bytes, device), (_close, driver, address, device)


def _close(driver: IpcDriver, address: int, device: torch.device) -> None:
    """Once nothing on the device reads it any more."""
    torch.cuda.synchronize(device)
    driver.close(address, device)


def _mapped(descriptor: int | None, size_bytes: int) -> Tensor:
    if descriptor is None:
        raise NotShared("the descriptor of the daemon's HBM arena did not come along")
    if os.fstat(descriptor).st_size < size_bytes:
        raise NotShared(f"the daemon's HBM arena was announced with {size_bytes} bytes, and has fewer")
    try:
        mapping = SharedMapping(descriptor, -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE, writable=False)
    except OSError as error:
        raise NotShared(f"the daemon's HBM arena cannot be mapped: {error.strerror}") from error
    # torch has no tensors that are only read, and says so of arrays that are; nobody writes here.
    raw = (ctypes.c_uint8 * size_bytes).from_address(mapping.address)
    raw.mapping = mapping  # type: ignore[attr-defined]
    return torch.from_numpy(np.frombuffer(memoryview(raw), np.uint8))
