"""Opening one training store twice in a process gives the same one; the last to let go closes it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msgspec import structs

from engram_client.errors import ConfigError
from tierstore.config import Config, check_config, load_config, memory_limit
from tierstore.training.store import TrainingStore


@dataclass
class _Shared:
    store: TrainingStore
    config: Config
    users: int
    pid: int


_shared: dict[Path, _Shared] = {}
_changing = threading.Lock()


def open_training(
    directory: str | os.PathLike[str], config: Config | None = None
) -> tuple[TrainingStore, Callable[[], None]]:
    """The training store of `directory`, and the function that lets go of it (idempotent).

    Without `config` the defaults and the environment (TIERSTORE_TRAINING_BUDGET_BYTES and so on) hold; a
    configuration given to a second open must be the first one's. A forked child does not share its parent's.
    Raises FormatError where there is none, StoreLocked where another process has it, ConfigError, and what
    opening raises.
    """
    path = Path(directory).resolve()
    with _changing:
        shared = _shared.get(path)
        if shared is None:
            checked = config or load_config(file=None, environ=os.environ, flags={}).config
            training = structs.replace(checked.training, enabled=True)  # so that its memory is counted
            check_config(structs.replace(checked, training=training), memory_limit())
            store = TrainingStore.open(path, checked.training)
            shared = _shared[path] = _Shared(store, checked, 0, os.getpid())
        elif config is not None and config != shared.config:
            raise ConfigError(
                f"training store {path} is already open in this process with another configuration; "
                "close it first, or open it without a configuration to share it"
            )
        shared.users += 1
    return shared.store, _releaser(path, shared)


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
    """The parent's stores stay the parent's."""
    global _changing
    _changing = threading.Lock()
    _shared.clear()


os.register_at_fork(after_in_child=_disown_after_fork)
