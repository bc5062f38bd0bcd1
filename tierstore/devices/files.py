"""Opening row files for reading past the page cache, where the filesystem allows it."""

from __future__ import annotations

import errno
import logging
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engram_client.errors import StorageError

log = logging.getLogger(__name__)
Direct = Literal["auto", "on", "off"]


@dataclass
class OpenFile:
    """A file descriptor and how it reads."""

    path: Path
    fd: int
    direct: bool

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_for_reads(path: Path, direct: Direct) -> OpenFile:
    """Open with O_DIRECT; with "auto", fall back to the page cache and say so.

    Raises StorageError where the file cannot be opened, or with "on" where O_DIRECT is refused.
    """
    if direct == "off":
        return OpenFile(path, _open(path, 0), False)
    try:
        return OpenFile(path, _open_direct(path), True)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise StorageError(f"cannot open {path}: {error.strerror}") from error
        if direct == "on":
            raise StorageError(
                f"the filesystem of {path} refuses O_DIRECT, and nvme.direct is 'on'; "
                "use 'auto' or move the store to a local disk"
            ) from error
    log.warning(
        "the filesystem of %s refuses O_DIRECT: reads go through the page cache, which takes memory "
        "outside the budgets and may hold every page twice",
        path,
    )
    return OpenFile(path, _open(path, 0), False)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error.strerror}") from error


def _open_direct(path: Path) -> int:
    """Some filesystems refuse O_DIRECT at open, some only at the first read: try both."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            os.preadv(fd, [page], 0)
    except OSError:
        os.close(fd)
        raise
    return fd
