"""One process owns a store directory; another is told who."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import weakref
from pathlib import Path
from typing import IO

from engram_client.errors import StorageError, StoreLocked


def acquire_store_lock(directory: Path) -> IO[str]:
    """Lock `directory` for this process; close the returned file to let go.

    The lock is the kernel's (flock), so it goes with the process however that ends. Raises
    StoreLocked naming the owner.
    """
    return acquire_lock(
        directory / "store.lock",
        f"store {directory}",
        'connect to that process with "unix:PATH" or "tcp://HOST:PORT", or stop it first',
    )


def acquire_lock(path: Path, what: str, advice: str) -> IO[str]:
    """Lock the file `path` for this process; it then says whose it is.

    A child that is forked meanwhile drops its copy, so that it cannot keep the lock from whoever comes next.
    Raises StoreLocked, which names the owner of `what`.
    """
    try:
        file = path.open("a+")
    except OSError as error:
        raise StorageError(f"cannot open {path}: {error.strerror}; is it a store directory?") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _describe_owner(file)
        file.close()
        raise StoreLocked(f"{what} is open in another process ({owner}); {advice}") from None
    _held.add(file)
    file.truncate(0)
    json.dump({"pid": os.getpid(), "command": " ".join(sys.argv)[:200]}, file)
    file.flush()
    return file


def _describe_owner(file: IO[str]) -> str:
    file.seek(0)
    try:
        owner = json.load(file)
        return f"pid {owner['pid']}: {owner['command']}"
    except (ValueError, KeyError, TypeError):
        return "it has not written who it is yet"


_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def _let_go_after_fork() -> None:
    """The lock stays the parent's, whose descriptor is still open."""
    for file in list(_held):
        file.close()


os.register_at_fork(after_in_child=_let_go_after_fork)
