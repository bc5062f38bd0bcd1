"""Sleeping until a word in memory changes, and waking who sleeps (futex(2)).

Within one process, or with `SHARED` between processes that map the same memory.
"""

from __future__ import annotations

import platform

from engram_client.arena.atomics import store_word
from engram_client.arena.system_call import system_call
from engram_client.jit import inline_kernel

FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]
WAITV = 449  # on either
WAIT, WAKE = 0, 1
SHARED, PRIVATE = 0, 128
EVERYBODY = 2**31 - 1
NANOSECONDS = 1_000_000_000

WAITERS_MAX = 128  # of one futex_waitv
WAITER_WORDS = 3  # the value's low 32 bits, the word's address, flags
WORD_OF_32_BITS = 2  # in these flags, with PRIVATE or SHARED
EINTR, EAGAIN = 4, 11


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


@inline_kernel
def futex_wait_for_any(waiters, count):
    """Sleep until one of the first `count` words in `waiters` changes; False where the system cannot.

    `waiters` int64 [n, WAITER_WORDS] (futex_waitv(2), Linux 5.16). May wake early for no reason.
    """
    result = system_call(WAITV, waiters.ctypes.data, count, 0, 0, 0, 0)
    return result >= 0 or result == -EAGAIN or result == -EINTR
