"""How near a made-up trace comes to the one it was fitted to: curves of both, by the model's own keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tierbench.corpus import Ids, Offsets
from tierbench.hitrate.lookups import lookups_of
from tierbench.hitrate.mix import Mix, token_stream
from tierbench.hitrate.model import Model
from tierbench.hitrate.sample import Sample, SampledTrace
from tierbench.policy.lookups import count_repeats
from tierstore.kernels.dueling import SETS_MIN

SAMPLED_ACCESSES = 2_000_000
POINTS = 12
SMALLEST, LARGEST = 1 / 1000, 1.0  # of the distinct records
WAYS = 16


@dataclass(frozen=True)
class Asked:
    """A sample of what a trace asks of a model, and of all of it what a look-up asked for more than once."""

    sample: SampledTrace
    repeats: int

    @property
    def traits(self) -> dict[str, float]:
        """What can be said in a few numbers, as shares of accesses."""
        trace = self.sample
        return {
            "accesses": trace.accesses,
            "cold_share": trace.distinct / trace.accesses,
            "repeated_within_chunk_share": self.repeats / trace.accesses,
            "sampling_rate": trace.rate,
        }


def asked_of(model: Model, ids: Ids, off: Offsets, progress: Callable[[int], None]) -> Asked:
    """`progress` is told of tokens."""
    stream = token_stream(ids, off, Mix())
    sample = Sample(min(1.0, SAMPLED_ACCESSES / (stream.tokens * model.entries_per_token)))
    repeats = 0
    for lookups in lookups_of(model, stream):
        sample.take(lookups)
        repeats += int(count_repeats(lookups.keys, lookups.owners, lookups.ends))
        progress(lookups.keys.size // model.entries_per_token)
    return Asked(sample.trace, repeats)


def nearness(model: Model, original: Asked, made: Asked) -> dict[str, Any]:
    """Hit rates of the product and of LRU on both by size, and how far they are apart in points."""
    chunks = 2 * Mix().prefill_chunk * model.entries_per_token  # a cache that holds no two steps is no cache
    smallest = max(SMALLEST * original.sample.distinct, SETS_MIN * WAYS / original.sample.rate, chunks)
    sizes = np.geomspace(smallest, max(2 * smallest, LARGEST * original.sample.distinct), POINTS)
    slot_bytes = (1 << 30) / model.capacity_records(1 << 30)
    points = []
    for capacity in sizes.round().astype(int).tolist():
        point: dict[str, Any] = {"capacity_records": capacity, "dram_bytes": round(capacity * slot_bytes)}
        for name, rate in (("tierstore", SampledTrace.product), ("lru", SampledTrace.lru)):
            both = [rate(each.sample, capacity).hit_rate for each in (original, made)]
            point[name] = {"original": both[0], "made": both[1], "points_apart": 100 * (both[1] - both[0])}
        points.append(point)
    told = {
        f"{name}_points_apart_max": max(abs(p[name]["points_apart"]) for p in points)
        for name in ("tierstore", "lru")
    }
    return {"original": original.traits, "made": made.traits, "points": points, **told}
