"""The miss-ratio curve: hit rates over all budgets, from one pass and a sample of the records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from engram_client.arena.layout import WAYS
from tierbench.hitrate.model import Model
from tierbench.hitrate.sample import SampledTrace
from tierbench.policy.bounds import belady
from tierstore.kernels.dueling import SETS_MIN

POINTS = 24
BEYOND = 1.25  # times the distinct records there are: from there on, only first accesses miss


def budgets_of_curve(model: Model, trace: SampledTrace) -> list[int]:
    """Bytes, each a constant factor more than the one before it.

    The first is the smallest whose miniature has the sets that the policy's duel takes, the last the whole of
    the tables or of what the trace asks for.
    """
    slot_bytes = (1 << 30) / model.capacity_records(1 << 30)
    smallest = slot_bytes * SETS_MIN * WAYS / trace.rate
    largest = min(model.table_bytes, BEYOND * trace.distinct * slot_bytes)
    if largest <= smallest:  # so little text: all of it fits the smallest miniature
        smallest = largest / SETS_MIN
    return [max(1, round(b)) for b in np.geomspace(smallest, largest, POINTS)]


def miss_ratio_curve(model: Model, trace: SampledTrace, progress: Callable[[int], None]) -> dict[str, Any]:
    """Hit rates by budget: the product, LRU and the clairvoyant bound. `progress` is told of points."""
    points = []
    for budget_bytes in budgets_of_curve(model, trace):
        capacity = model.capacity_records(budget_bytes)
        points.append(
            {
                "dram_bytes": budget_bytes,
                "share_of_tables": budget_bytes / model.table_bytes,
                "tierstore": trace.product(capacity).told(),
                "lru": trace.lru(capacity).told(),
                "clairvoyant": trace.numbered(belady, capacity).told(),
            }
        )
        progress(1)
    return {"sampling_rate": trace.rate, "sampled_records": trace.sampled_distinct, "points": points}
