"""What there is now in a training store, beside what its counters have counted."""

from __future__ import annotations

from tierstore.config import Training
from tierstore.training.arenas import Arenas
from tierstore.training.steps import Steps
from tierstore.updates import RowStorage


def stats_of(storage: RowStorage, steps: Steps, arenas: Arenas, config: Training) -> dict[str, int]:
    """Numbers by name; README, "Reading the numbers", explains them. What is not known has no name."""
    durable = storage.step()
    age_s = None if durable is None else steps.age_s(durable)
    known = {
        "committed_step": durable,
        "commit_age_ms": None if age_s is None else int(1000 * age_s),
        "log_bytes_max": config.log_bytes_max,
        "queue_bytes_max": config.queue_bytes,
        "dram_bytes": arenas.budget_bytes,
        "capacity_rows": sum(a.capacity_rows for a in arenas),
        "dirty_rows": sum(a.dirty_rows() for a in arenas),
        **storage.counters(),
    }
    return {f"training_{name}": number for name, number in known.items() if number is not None}
