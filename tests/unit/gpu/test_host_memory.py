"""Memory that CUDA is told of, with a double in the place of libcuda: holds, failures, and what is said."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from engram_client.gpu import host_memory
from engram_client.gpu.host_memory import Driver, NotRegistered, Registered, find_driver

CPU = torch.device("cpu")
OFFSET = 1 << 40  # from the host's addresses to those of the device


@dataclass
class Libcuda:
    """What `Driver` calls, without a device."""

    read_only: int = 1
    register_status: int = 0
    pointer_status: int = 0
    calls: list[str] = field(default_factory=list)

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value._obj.value = self.read_only if attribute == host_memory.READ_ONLY_SUPPORTED else 0
        return 0

    def cuMemHostRegister_v2(self, address: Any, size: Any, flags: Any) -> int:
        assert flags.value == 1 | 2 | 8
        self.calls.append(f"register {address.value} {size.value}")
        return self.register_status

    def cuMemHostGetDevicePointer_v2(self, found: Any, address: Any, flags: Any) -> int:
        found._obj.value = address.value + OFFSET
        return self.pointer_status

    def cuMemHostUnregister(self, address: Any) -> int:
        self.calls.append(f"unregister {address.value}")
        return 0

    def cuCtxSynchronize(self) -> int:
        self.calls.append("synchronize")
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> int:
        text._obj.value = b"out of memory" if status == 2 else None
        return 0


class AnyDevice(Driver):
    @contextmanager
    def context_of(self, device: torch.device) -> Iterator[None]:
        yield


@dataclass
class Piece:
    address: int = 0x7000_0000
    size_bytes: int = 4096


def test_memory_is_registered_once_and_forgotten_by_the_last() -> None:
    library = Libcuda()
    driver, piece = AnyDevice(library), Piece()
    first, second = (Registered(piece, CPU, driver) for _ in range(2))
    assert library.calls == [f"register {piece.address} 4096"]
    assert second.device_address == piece.address + OFFSET
    del first
    assert len(library.calls) == 1
    del second
    assert library.calls[1:] == ["synchronize", f"unregister {piece.address}"]
    again = Registered(piece, CPU, driver)
    assert library.calls[3:] == [f"register {piece.address} 4096"]
    del again


@pytest.mark.parametrize(
    ("library", "said"),
    [
        (Libcuda(read_only=0), "cannot register memory that is mapped read-only"),
        (Libcuda(register_status=2), "did not register 4096 bytes .error 2: out of memory"),
        (Libcuda(register_status=801), "error 801"),
        (Libcuda(pointer_status=1), "does not see registered memory"),
    ],
)
def test_what_goes_wrong_is_said_and_leaves_nothing(library: Libcuda, said: str) -> None:
    with pytest.raises(NotRegistered, match=said):
        Registered(Piece(), CPU, AnyDevice(library))
    registered = [c for c in library.calls if c.startswith("register") and not library.register_status]
    assert len([c for c in library.calls if c.startswith("unregister")]) == len(registered)
    assert not host_memory._held or library.register_status == 0
    fine = Libcuda()
    Registered(Piece(), CPU, AnyDevice(fine))  # dropped at once
    assert len(fine.calls) == 3


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(NotRegistered, match=r"no CUDA driver .libcuda"):
        find_driver()
