"""Sleeping until a word in memory changes, and waking who sleeps, within this process."""

from __future__ import annotations

from engram_client.arena.futex import EVERYBODY, NANOSECONDS, PRIVATE, futex_wait, futex_wake
from engram_client.jit import inline_kernel

__all__ = ["EVERYBODY", "NANOSECONDS", "sleep_while", "wake"]


@inline_kernel
def sleep_while(address, value, timeout_ns, timespec):
    """Sleep while the low 32 bits at `address` are those of `value`, `timeout_ns` at most.

    May wake early for no reason. `timespec` is the address of 16 bytes of scratch.
    """
    futex_wait(address, value, timeout_ns, timespec, PRIVATE)


@inline_kernel
def wake(address, sleepers):
    """Wake up to `sleepers` threads that sleep on `address`."""
    futex_wake(address, sleepers, PRIVATE)
