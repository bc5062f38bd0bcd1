"""Changing the DRAM budget of training beside that of a store which serves in the same process."""

from __future__ import annotations

from msgspec import structs

from tierstore.config import check_config, memory_limit
from tierstore.store import Store
from tierstore.training.store import TrainingStore


def change_training_budget(
    serving: Store, training: TrainingStore, budget_bytes: int, timeout_s: float | None
) -> None:
    """See `TrainingStore.set_dram_budget`. Raises ConfigError also for more than the process may use."""
    changed = structs.replace(serving.config.training, enabled=True, dram_bytes=budget_bytes)
    wanted = structs.replace(serving.config, training=changed)
    check_config(wanted, memory_limit())
    training.set_dram_budget(budget_bytes, timeout_s)
    serving.config = structs.replace(serving.config, training=changed)  # its own may have changed meanwhile
