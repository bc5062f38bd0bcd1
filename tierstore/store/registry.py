"""Opening one directory twice in a process gives the same store; the last to close it closes it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from engram_client.errors import ConfigError, StorageError
from tierstore.config import Config, check_config, load_config, memory_limit
from tierstore.store.store import MakeReader, Store, configured_reader


class Closable(Protocol):
    """What can be opened once."""

    def close(self) -> None: ...


T = TypeVar("T", bound=Closable)


@dataclass
class _Shared(Generic[T]):
    store: T
    config: Config  # it was opened with; budgets may have changed since
    users: int


class OpenStores(Generic[T]):
    """The stores of one kind that this process has open, by their directories."""

    def __init__(self, kind: str, disown: Callable[[T], None] = lambda store: None) -> None:
        """`kind` is for errors; `disown` is told in a forked child of each store that stays its parent's."""
        self._kind, self._disown = kind, disown
        self._forget()
        os.register_at_fork(after_in_child=self._disown_after_fork)

    def open(
        self, path: Path, config: Config | None, make: Callable[[Config], T]
    ) -> tuple[T, Callable[[], None]]:
        """The store of `path`, and the function that lets go of it (idempotent).

        Where it is not open, `make` opens it, with the defaults and the environment where there is no
        `config`. Raises ConfigError where it is open with another one, and what `make` raises.
        """
        with self._changing:
            shared = self._shared.get(path)
            if shared is None:
                given = config or load_config(file=None, environ=os.environ, flags={}).config
                shared = self._shared[path] = _Shared(make(given), given, 0)
            elif config is not None and config != shared.config:
                raise ConfigError(
                    f"{self._kind} {path} is already open in this process with another configuration; "
                    "close it first, or open it without a configuration to share it"
                )
            shared.users += 1
        return shared.store, self._releaser(path, shared)

    def _releaser(self, path: Path, shared: _Shared[T]) -> Callable[[], None]:
        released, opener = False, os.getpid()

        def release() -> None:
            nonlocal released
            if os.getpid() != opener:
                return
            with self._changing:
                if released:
                    return
                released = True
                shared.users -= 1
                if shared.users == 0:
                    del self._shared[path]
                    shared.store.close()

        return release

    def _forget(self) -> None:
        self._shared: dict[Path, _Shared[T]] = {}
        self._changing = threading.Lock()

    def _disown_after_fork(self) -> None:
        """The parent's stores stay the parent's; its lock on them must not live on in a child."""
        stores = [shared.store for shared in self._shared.values()]
        self._forget()
        for store in stores:
            self._disown(store)


_stores = OpenStores("store", Store.disown_after_fork)


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

    def make(given: Config) -> Store:
        check_config(given, memory_limit())
        return Store(path, given, make_reader)

    return _stores.open(path, config, make)
