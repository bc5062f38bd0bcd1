"""What kvikio does of a file, on the host: tests hand it to `GdsReader` in kvikio's place."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any


class HostCuFile:
    """As kvikio.CuFile, but that "device memory" is the host's. `short` bytes at most come at once."""

    opened: list[HostCuFile] = []

    def __init__(self, path: str, short: int = 1 << 30) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        self._short = short
        self.closed = False
        HostCuFile.opened.append(self)

    def raw_read(self, buf: Any, size: int, file_offset: int, dev_offset: int) -> int:
        told = buf.__cuda_array_interface__
        assert told["typestr"] == "|u1" and 0 <= dev_offset <= dev_offset + size <= told["shape"][0]
        data = os.pread(self._fd, min(size, self._short), file_offset)
        ctypes.memmove(told["data"][0] + dev_offset, data, len(data))
        return len(data)

    def close(self) -> None:
        self.closed = True
        os.close(self._fd)


class HangingCuFile(HostCuFile):
    """A driver that never answers, until `let_go` is set."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.let_go = threading.Event()

    def raw_read(self, buf: Any, size: int, file_offset: int, dev_offset: int) -> int:
        self.let_go.wait()
        return super().raw_read(buf, size, file_offset, dev_offset)


class FailingCuFile(HostCuFile):
    """A driver whose reads fail."""

    def raw_read(self, buf: Any, size: int, file_offset: int, dev_offset: int) -> int:
        raise RuntimeError("cuFile error: GPUDirect Storage is not happy")
