"""Opening one directory twice in a process gives the same store; the last to close it closes it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engram_client.errors import ConfigError, StorageError
from tierstore.config import Config
from tierstore.store.store import Store


@dataclass
class _Shared:
    store: Store
    users: int
    pid: int


_shared: dict[Path, _Shared] = {}
_changing = threading.Lock()


def open_store(
    directory: str | os.PathLike[str], config: Config | None = None
) -> tuple[Store, Callable[[], None]]:
    """The store of `directory`, and the function that lets go of it (idempotent).

    A second open in this process shares the first one's store; a configuration given then must be
    the same. In a forked child the store is opened anew. Raises StorageError where there is no such
    directory, StoreLocked where another process has it, ConfigError for a different configuration.
    """
    path = Path(directory).resolve()
    if not path.is_dir():
        raise StorageError(f"no store directory {path}; make one with `tierstore pack SOURCE {path}`")
    with _changing:
        shared = _shared.get(path)
        if shared is None or shared.pid != os.getpid():
            shared = _shared[path] = _Shared(Store(path, config or Config()), 0, os.getpid())
        elif config is not None and config != shared.store.config:
            raise ConfigError(
                f"store {path} is already open in this process with another configuration; "
                "close it first, or open it without a configuration to share it"
            )
        shared.users += 1
    return shared.store, _releaser(path, shared)


def _releaser(path: Path, shared: _Shared) -> Callable[[], None]:
    released = False

    def release() -> None:
        nonlocal released
        with _changing:
            if released or shared.pid != os.getpid():
                return
            released = True
            shared.users -= 1
            if shared.users == 0:
                del _shared[path]
                shared.store.close()

    return release
