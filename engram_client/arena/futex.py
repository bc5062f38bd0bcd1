"""Sleeping until a word in memory changes, and waking who sleeps (futex(2)).

Within one process, or with `SHARED` between processes that map the same memory.
"""

from __future__ import annotations

import platform

from engram_client.arena.atomics import store_word
from engram_client.arena.system_call import system_call
from engram_client.jit import inline_kernel

FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]
WAIT, WAKE = 0, 1
SHARED, PRIVATE = 0, 128
EVERYBODY = 2**31 - 1
NANOSECONDS = 1_000_000_000


@inline_kernel
def futex_wait(address, value, timeout_ns, timespec, scope):
    """Sleep while the low 32 bits at `address` are those of `value`, `timeout_ns` at most.

    May wake early for no reason. `timespec` is the address of 16 bytes of scratch.
    """
    store_word(timespec, timeout_ns // NANOSECONDS)
    store_word(timespec + 8, timeout_ns % NANOSECONDS)
    system_call(FUTEX, address, WAIT | scope, value & 0xFFFFFFFF, timespec, 0, 0)


@inline_kernel
def futex_wake(address, sleepers, scope):
    """Wake up to `sleepers` threads that sleep on `address`."""
    system_call(FUTEX, address, WAKE | scope, sleepers, 0, 0, 0)
