"""Memory of this process that CUDA is told of, so that a device reads it in place.

    held = Registered(mapping, device)        # its pages are pinned from here on
    held.device_address                       # what kernels read

The daemon's arenas are mapped read-only, and CUDA takes such pages only as read-only
(CU_MEMHOSTREGISTER_READ_ONLY), which not every system can. libcuda is asked by ctypes, because torch's own
`cudart()` neither tells what a device can do nor where it sees registered memory.

Registering pins every page, also those that the daemon has not written yet: the arena's whole budget is
resident from then on, and what the daemon gives back while it shrinks is free only once it is
unregistered here. One piece of memory is registered once a process, however many readers it has.

Never run with a driver yet; tests put a double in the place of libcuda.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from engram_client.errors import TierstoreError

log = logging.getLogger(__name__)

PORTABLE, MAPPED, READ_ONLY = 1, 2, 8  # flags of cuMemHostRegister
READ_ONLY_SUPPORTED = 113  # attribute of a device: CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED
SUCCESS = 0


class NotRegistered(TierstoreError):
    """A device cannot read this memory in place, and why; internal: rows are staged by the CPU."""


class Mapping(Protocol):
    """A piece of memory that stays where it is as long as this object lives."""

    address: int
    size_bytes: int


class Registered:
    """A reader's hold on memory that CUDA knows; the last hold to go has it forgotten.

    device_address: where the device sees what lies at `host_address`
    """

    def __init__(self, mapping: Mapping, device: torch.device, driver: Driver | None = None) -> None:
        """Raises NotRegistered."""
        self.host_address, self.size_bytes = mapping.address, mapping.size_bytes
        self._mapping = mapping  # let go of only after it was unregistered
        with _registering:
            held = _held.get(mapping.address)
            if held is None:
                driver = driver or find_driver()
                driver.register(mapping.address, mapping.size_bytes, device)
                held = _held[mapping.address] = _Held(driver, device)
            held.holds += 1
            weakref.finalize(self, _let_go, mapping.address, os.getpid()).atexit = False
            self.device_address = held.driver.seen_at(mapping.address, device)


class _Held:
    """How often a piece of memory is held, and through what."""

    def __init__(self, driver: Driver, device: torch.device) -> None:
        self.driver, self.device, self.holds = driver, device, 0


_held: dict[int, _Held] = {}
_registering = threading.RLock()  # the collector may drop a hold inside of a change


def _let_go(address: int, pid: int) -> None:
    if pid != os.getpid():
        return  # a forked child has registered nothing
    with _registering:
        held = _held[address]
        held.holds -= 1
        if not held.holds:
            del _held[address]
            held.driver.unregister(address, held.device)


class Driver:
    """libcuda, as far as it is needed here. Thread safe."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def register(self, address: int, size_bytes: int, device: torch.device) -> None:
        """Have devices see this read-only memory. Raises NotRegistered."""
        with self.context_of(device):
            if not self._can_register_read_only(device):
                raise NotRegistered(f"{device} cannot register memory that is mapped read-only")
            status = self._library.cuMemHostRegister_v2(
                ctypes.c_void_p(address),
                ctypes.c_size_t(size_bytes),
                ctypes.c_uint(PORTABLE | MAPPED | READ_ONLY),
            )
        if status != SUCCESS:
            raise NotRegistered(f"CUDA did not register {size_bytes} bytes ({self._text(status)})")

    def seen_at(self, address: int, device: torch.device) -> int:
        """Where `device` sees registered memory. Raises NotRegistered."""
        seen = ctypes.c_uint64()
        with self.context_of(device):
            status = self._library.cuMemHostGetDevicePointer_v2(
                ctypes.byref(seen), ctypes.c_void_p(address), ctypes.c_uint(0)
            )
        if status != SUCCESS:
            raise NotRegistered(f"{device} does not see registered memory ({self._text(status)})")
        return seen.value

    def unregister(self, address: int, device: torch.device) -> None:
        """Nothing on a device may read it any more; waits for what the device was given."""
        with self.context_of(device):
            self._library.cuCtxSynchronize()
            status = self._library.cuMemHostUnregister(ctypes.c_void_p(address))
        if status != SUCCESS:
            log.warning("CUDA did not unregister memory of the arena (%s)", self._text(status))

    @contextmanager
    def context_of(self, device: torch.device) -> Iterator[None]:
        """Have this thread's calls mean `device`.

        A thread that has not used CUDA yet has no current context, and libcuda refuses it; a call of the
        runtime gives it torch's. This one waits for nothing, and may stand beside a capture.
        """
        with torch.cuda.device(device):
            torch.cuda.mem_get_info(device)
            yield

    def _can_register_read_only(self, device: torch.device) -> bool:
        found = ctypes.c_int()
        index = device.index or 0
        status = self._library.cuDeviceGetAttribute(ctypes.byref(found), READ_ONLY_SUPPORTED, index)
        return bool(status == SUCCESS and found.value)

    def _text(self, status: int) -> str:
        text = ctypes.c_char_p()
        if self._library.cuGetErrorString(status, ctypes.byref(text)) or text.value is None:
            return f"error {status}"
        return f"error {status}: {text.value.decode()}"


def find_driver() -> Driver:
    """Raises NotRegistered where this system has no libcuda."""
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except OSError as error:
        raise NotRegistered(f"there is no CUDA driver ({error})") from error
