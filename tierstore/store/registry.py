"""Opening one directory twice in a process gives the same store; the last to close it closes it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engram_client.errors import ConfigError, StorageError
from tierstore.config import Config, check_config, load_config, memory_limit
from tierstore.store.store import MakeReader, Store, configured_reader


@dataclass
class _Shared:
    store: Store
    config: Config  # it was opened with; budgets may have changed since
    users: int
    pid: int


_shared: dict[Path, _Shared] = {}
_changing = threading.Lock()


def open_store(
    directory: str | os.PathLike[str],
    config: Config | None = None,
    *,
    make_reader: MakeReader = configured_reader,
) -> tuple[Store, Callable[[], None]]:
    """The store of `directory`, and the function that lets go of it (idempotent).

    Without `config` the defaults and the environment (TIERSTORE_DRAM_BUDGET_BYTES and so on) hold. A
    second open in this process shares the first one's store; a configuration given then must be
    the same. A forked child does not share its parent's. Raises StorageError where there is no such
    directory, StoreLocked where another process has it, ConfigError for a different
    configuration or one that asks for more memory than this process may use.
    """
    path = Path(directory).resolve()
    if not path.is_dir():
        raise StorageError(f"no store directory {path}; make one with `tierstore pack SOURCE {path}`")
    with _changing:
        shared = _shared.get(path)
        if shared is None:
            checked = _checked(config)
            shared = _shared[path] = _Shared(Store(path, checked, make_reader), checked, 0, os.getpid())
        elif config is not None and config != shared.config:
            raise ConfigError(
                f"store {path} is already open in this process with another configuration; "
                "close it first, or open it without a configuration to share it"
            )
        shared.users += 1
    return shared.store, _releaser(path, shared)


def _checked(config: Config | None) -> Config:
    if config is None:
        return load_config(file=None, environ=os.environ, flags={}).config
    check_config(config, memory_limit())
    return config


def _releaser(path: Path, shared: _Shared) -> Callable[[], None]:
    released = False

    def release() -> None:
        nonlocal released
        if shared.pid != os.getpid():
            return
        with _changing:
            if released:
                return
            released = True
            shared.users -= 1
            if shared.users == 0:
                del _shared[path]
                shared.store.close()

    return release


def _disown_after_fork() -> None:
    """The parent's stores stay the parent's; its lock on them must not live on in a child."""
    global _changing
    _changing = threading.Lock()
    for shared in _shared.values():
        shared.store.disown_after_fork()
    _shared.clear()


os.register_at_fork(after_in_child=_disown_after_fork)
