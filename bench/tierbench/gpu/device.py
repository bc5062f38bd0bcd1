"""The device that is measured: finding it, describing it, waiting for it, timing what it does."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import torch

from engram_client.errors import BadRequest


def device_of(name: str) -> torch.device:
    """Raises BadRequest where torch has no such device."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadRequest(f"--device {name}: {error}") from error


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bytes_per_s(device: torch.device, count: int, copy: Callable[[], object], window_s: float) -> float:
    """`count` bytes a call of `copy`, called over and over for about `window_s`; the last one has ended."""
    copy()
    finish(device)
    calls, started = 0, time.perf_counter()
    while True:
        copy()
        calls += 1
        if time.perf_counter() - started >= window_s / 2 or calls >= 1000:
            finish(device)  # launches run ahead of the device
            return count * calls / (time.perf_counter() - started)


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, memory and versions of a GPU; of a CPU what says that it is none."""
    told = {"type": device.type, "torch": torch.__version__, "torch_cuda": torch.version.cuda}
    if device.type != "cuda":
        return told
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        **told,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": total,
        "free_bytes": free,
        "driver_cuda": _driver_cuda(),
    }


def _driver_cuda() -> str | None:
    """The newest CUDA that the driver serves, as libcuda says it."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except OSError:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
