"""Opening one training store twice in a process gives the same one; the last to let go closes it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from msgspec import structs

from tierstore.config import Config, check_config, memory_limit
from tierstore.store.registry import OpenStores
from tierstore.training.store import TrainingStore

_stores: OpenStores[TrainingStore] = OpenStores("training store")


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

    def make(given: Config) -> TrainingStore:
        training = structs.replace(given.training, enabled=True)  # so that its memory is counted
        check_config(structs.replace(given, training=training), memory_limit())
        return TrainingStore.open(path, given.training)

    return _stores.open(path, config, make)
