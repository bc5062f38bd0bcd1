"""Sleeping until a word in memory changes, and waking who sleeps (futex(2), within one process)."""

from __future__ import annotations

import platform

from engram_client.arena.atomics import store_word
from engram_client.jit import inline_kernel
from tierstore.kernels.libc import system_call

FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]
WAIT_PRIVATE, WAKE_PRIVATE = 128, 129
EVERYBODY = 2**31 - 1
NANOSECONDS = 1_000_000_000


@inline_kernel
def sleep_while(address, value, timeout_ns, timespec):
    """Sleep while the low 32 bits at `address` are those of `value`, `timeout_ns` at most.

    May wake early for no reason. `timespec` is the address of 16 bytes of scratch.
    """
    store_word(timespec, timeout_ns // NANOSECONDS)
    store_word(timespec + 8, timeout_ns % NANOSECONDS)
    system_call(FUTEX, address, WAIT_PRIVATE, value & 0xFFFFFFFF, timespec, 0, 0)


@inline_kernel
def wake(address, sleepers):
    """Wake up to `sleepers` threads that sleep on `address`."""
    system_call(FUTEX, address, WAKE_PRIVATE, sleepers, 0, 0, 0)
