"""One packer at a time: an exclusive lock on a folder of DIR/packing, gone with the process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engram_client.errors import StorageError, StoreLocked
from tierstore.format.direct import make_folder


@contextmanager
def claim(folder: Path, what: str) -> Iterator[None]:
    """Hold `folder`, made where it is missing, for one process. Raises StoreLocked."""
    fd = _locked(folder, what)
    try:
        yield
    finally:
        with suppress(OSError):  # it stays where it holds something to go on from
            folder.rmdir()
        os.close(fd)


def _locked(folder: Path, what: str) -> int:
    while True:
        try:
            make_folder(folder)
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{folder} cannot be made: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise StoreLocked(
                f"{what} is being packed by another process, which holds {folder}; "
                "wait for it to end, then run this command again"
            ) from error
        if folder.exists() and os.path.samestat(os.fstat(fd), os.stat(folder)):
            return fd
        os.close(fd)  # its last owner removed the folder between our open and our lock
