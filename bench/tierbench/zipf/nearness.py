"""How near a made-up trace comes to the one it was fitted to: curves of both, by the model's own keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tierbench.corpus import Ids, Offsets
from tierbench.hitrate.lookups import lookups_of
from tierbench.hitrate.mix import Mix, token_stream
from tierbench.hitrate.model import Model
from tierbench.hitrate.sample import Sample, SampledTrace
from tierstore.kernels.dueling import SETS_MIN

SAMPLED_ACCESSES = 2_000_000
POINTS = 12
SMALLEST, LARGEST = 1 / 1000, 1.0  # of the distinct records
WAYS = 16


def sampled_trace(model: Model, ids: Ids, off: Offsets, progress: Callable[[int], None]) -> SampledTrace:
    """A sample of what a trace asks of a model. `progress` is told of tokens."""
    stream = token_stream(ids, off, Mix())
    sample = Sample(min(1.0, SAMPLED_ACCESSES / (stream.tokens * model.entries_per_token)))
    for lookups in lookups_of(model, stream):
        sample.take(lookups)
        progress(lookups.keys.size // model.entries_per_token)
    return sample.trace


def nearness(model: Model, original: SampledTrace, made: SampledTrace) -> dict[str, Any]:
    """Hit rates of the product and of LRU on both by size, and how far they are apart in points."""
    chunks = 2 * Mix().prefill_chunk * model.entries_per_token  # a cache that holds no two steps is no cache
    smallest = max(SMALLEST * original.distinct, SETS_MIN * WAYS / original.rate, chunks)
    sizes = np.geomspace(smallest, max(2 * smallest, LARGEST * original.distinct), POINTS)
    slot_bytes = (1 << 30) / model.capacity_records(1 << 30)
    points = []
    for capacity in sizes.round().astype(int).tolist():
        point: dict[str, Any] = {"capacity_records": capacity, "dram_bytes": round(capacity * slot_bytes)}
        for name, rate in (("tierstore", SampledTrace.product), ("lru", SampledTrace.lru)):
            both = [rate(trace, capacity).hit_rate for trace in (original, made)]
            point[name] = {"original": both[0], "made": both[1], "points_apart": 100 * (both[1] - both[0])}
        points.append(point)
    told = {
        f"{name}_points_apart_max": max(abs(p[name]["points_apart"]) for p in points)
        for name in ("tierstore", "lru")
    }
    return {"original": traits(original), "made": traits(made), "points": points, **told}


def traits(trace: SampledTrace) -> dict[str, float]:
    """What can be said of a trace in a few numbers, as shares of its accesses."""
    return {
        "accesses": trace.accesses,
        "cold_share": trace.distinct / trace.accesses,
        "repeated_within_chunk_share": trace.repeated_share,
        "sampling_rate": trace.rate,
    }
