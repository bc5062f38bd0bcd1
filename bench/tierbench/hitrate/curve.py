"""The miss-ratio curve: hit rates over all budgets, from one pass and a sample of the records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from engram_client.arena.layout import WAYS
from engram_client.errors import BadRequest
from tierbench.hitrate.model import Model
from tierbench.hitrate.sample import SampledTrace
from tierbench.policy.bounds import belady
from tierbench.policy.classical import sieve
from tierstore.kernels.dueling import SETS_MIN

POINTS = 24
SPAN_MIN = 4  # between the first budget and the last
BEYOND = 1.25  # times the distinct records there are: from there on, only first accesses miss


def budgets_of_curve(model: Model, trace: SampledTrace) -> list[int]:
    """Bytes, each a constant factor more than the one before it.

    The first is the smallest whose miniature has the sets that the policy's duel takes, the last the whole of
    the tables or of what the trace asks for. Raises BadRequest where there is nothing between the two.
    """
    slot_bytes = (1 << 30) / model.capacity_records(1 << 30)
    smallest = slot_bytes * SETS_MIN * WAYS / trace.rate
    largest = min(model.table_bytes, BEYOND * trace.distinct * slot_bytes)
    if largest < SPAN_MIN * smallest:
        needed = trace.rate * SPAN_MIN * smallest / largest
        way_out = f"take a larger --sample, {needed:.2g} at least, or more text"
        if needed > 1:
            times = np.ceil(10 * needed) / 10
            way_out = f"give {times:g} times as much text, or ask for single budgets with --dram"
        raise BadRequest(
            f"--curve: a sample of {trace.rate:.4g} of the records tells of budgets from {smallest:,.0f} "
            f"bytes on; this text, or its table, needs no more than {largest:,.0f}: {way_out}"
        )
    return [round(b) for b in np.geomspace(smallest, largest, POINTS)]


def miss_ratio_curve(
    model: Model, trace: SampledTrace, rows: SampledTrace | None, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Hit rates by budget of DRAM: the product, LRU, SIEVE and the clairvoyant bound; single rows, if given.

    `progress` is told of points.
    """
    points: list[dict[str, Any]] = []
    for budget_bytes in budgets_of_curve(model, trace):
        capacity = model.capacity_records(budget_bytes)
        points.append(
            {
                "dram_bytes": budget_bytes,
                "share_of_tables": budget_bytes / model.table_bytes,
                "tierstore": trace.product(capacity).told(),
                "lru": trace.lru(capacity).told(),
                "sieve": trace.numbered(sieve, capacity).told(),
                "clairvoyant": trace.numbered(belady, capacity).told(),
            }
        )
        if rows:
            points[-1]["single_rows"] = rows.product(model.capacity_records(budget_bytes, rows=True)).told()
        progress(1)
    return {
        "sampling_rate": trace.rate,
        "single_rows_sampling_rate": rows.rate if rows else None,
        "sampled_records": trace.sampled_distinct,
        "error": "standard error of sampling alone, as a share of accesses",
        "points": points,
    }
