"""System calls from kernels, without the GIL.

`ExternalFunction` is looked up by name when machine code is loaded, so kernels that use it can be
cached. A failed call returns minus errno, as the kernel itself does.
"""

from __future__ import annotations

import platform
from typing import Any

from numba import types

from engram_client.arena.atomics import load_int
from engram_client.jit import inline_kernel

WRITE = {"x86_64": 1, "aarch64": 64}[platform.machine()]
_errno_location: Any = types.ExternalFunction("__errno_location", types.int64())
_syscall: Any = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))


@inline_kernel
def last_errno():
    """Of this thread."""
    return load_int(_errno_location())


@inline_kernel
def system_call(number, a, b, c, d, e, f):
    """syscall(2); minus errno where it failed."""
    result = _syscall(number, a, b, c, d, e, f)
    return result if result != -1 else -last_errno()
