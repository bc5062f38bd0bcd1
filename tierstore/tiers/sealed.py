"""Memory that other processes may map and nobody can shrink under us.

A memfd is born with mode 0777, and who has it open in any way can open it anew through /proc for
writing. So it is made the owner's alone, and its size is sealed: truncating it would kill every process
that has it mapped. Writing is not sealed, because that would forbid to give memory back as well; what
this means for a process of the same user tells docs/decisions/0016-shared-memory.md.
"""

from __future__ import annotations

import fcntl
import os
import weakref

from engram_client.arena.mapping import SharedMapping

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SealedMemory:
    """Zeroed memory of a fixed size, mapped here for reading and writing. `mapping` outlives this object."""

    def __init__(self, name: str, size_bytes: int) -> None:
        """`size_bytes` is a multiple of the page size. Raises OSError."""
        self._fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self._fd).atexit = False
        os.fchmod(self._fd, 0o600)
        os.ftruncate(self._fd, size_bytes)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
        self.mapping = SharedMapping(self._fd, size_bytes)

    def descriptor(self, *, writable: bool) -> int:
        """A descriptor for another process, the caller's to close. Raises OSError."""
        if writable:
            return os.dup(self._fd)
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
