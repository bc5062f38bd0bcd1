"""Parameters of a workload whose n-grams come again as those of a given trace do.

What is compared is LRU's hit rate, for each length of n-gram, over sizes from a thousandth of what is asked
for to all of it; LRU's rates of every size are the distribution of reuse distances, so a workload that has
them repeats itself as the trace does. Every guess is made into a trace of the same length, from the same
seed, and judged by a sample of its records. How near the product's own policy comes then, which nobody
fitted, is told by `nearness`, on a trace from another seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engram_client.errors import BadRequest
from tierbench.corpus import Ids, Offsets
from tierbench.hitrate.mix import Mix
from tierbench.hitrate.sample import ALL as ALL_RECORDS
from tierbench.hitrate.sample import SampledTrace
from tierbench.policy.phrases import pick_ngrams
from tierbench.zipf.search import least
from tierbench.zipf.workload import ALL, CHOICES, Workload, length_quantiles

SAMPLED_ACCESSES = 150_000
TOKENS_MIN = 2_000
SIZES = 12
SMALLEST, LARGEST = 1 / 2000, 0.8  # of the distinct records
SAMPLED_SLOTS_MIN = 100  # a smaller miniature tells little
GOOD_ENOUGH = 0.25  # points
FAR = 100.0  # points: what cannot be
START = {
    "exponent": 0.8, "population": 2e5, "drift": 1.0, "cold": 0.06, "session": 0.5, "session_exponent": 0.5,
    "recent": 0.15, "recent_exponent": 1.1, "follow": 0.35, "phrase_tokens": 2.6, "openers": 60,
    "opener_exponent": 0.65,
}  # fmt: skip
# Where a knob's range has no lower end on a logarithmic scale, or a wider one than is worth a look.
SEARCHED = {"drift": (1e-3, 1e4), "population": (1e2, 1e8), "phrase_tokens": (1.2, 60), "openers": (2, 5e4)}


@dataclass(frozen=True)
class Target:
    """What a trace is like: as many tokens, documents and foldings, and LRU's hit rates by order and size."""

    tokens: int
    document_tokens: tuple[int, ...]
    fold: np.ndarray  # uint32 [vocabulary]
    orders: int
    vocabulary: int
    rate: float
    capacities: list[int]
    hit_rates: np.ndarray  # float64 [orders, SIZES + 1]; the last of a cache that never drops anything


def target_of(ids: Ids, off: Offsets, fold: np.ndarray, orders: int, vocabulary: int) -> Target:
    """Raises BadRequest for a trace too short to tell anything."""
    if ids.size < TOKENS_MIN:
        raise BadRequest(f"{ids.size} tokens are too few to fit a workload to; give {TOKENS_MIN} or more")
    rate = min(1.0, SAMPLED_ACCESSES / (ids.size * orders))
    sampled = ngram_sample(ids, off, fold, orders, rate)
    chunks = 2 * Mix().prefill_chunk * orders  # a cache that holds no two look-ups is no cache
    smallest = max(SMALLEST * sampled.distinct, SAMPLED_SLOTS_MIN / rate, chunks)
    sizes = np.geomspace(smallest, max(2 * smallest, LARGEST * sampled.distinct), SIZES)
    capacities = [*(round(size) for size in sizes), 1 << 60]
    rates = sampled.lru_by_owner(capacities, ids.size)
    return Target(ids.size, length_quantiles(off), fold, orders, vocabulary, rate, capacities, rates)


def ngram_sample(ids: Ids, off: Offsets, fold: np.ndarray, orders: int, rate: float) -> SampledTrace:
    """The sampled n-grams of a trace, in look-ups of a default prefill chunk."""
    accesses = ids.size * orders
    room = min(accesses, int(accesses * (2 * rate + 0.02)) + 100_000)
    hashes, owners, lookups = (np.empty(room, np.int64) for _ in range(3))
    threshold = max(1, round(rate * ALL_RECORDS))
    count = pick_ngrams(
        ids, off, fold, orders, Mix().prefill_chunk, threshold, hashes, owners, lookups
    )  # fmt: skip
    return SampledTrace(hashes[:count], owners[:count], lookups[:count], threshold / ALL_RECORDS, accesses)


def fit(
    target: Target, *, evaluations: int, seed: int, progress: Callable[[int], None]
) -> tuple[Workload, float]:
    """The workload found, and how far its hit rates are from the target's, in points."""

    def distance(point: np.ndarray) -> float:
        knobs = _knobs(point)
        if sum(knobs[name] for name in CHOICES) > 1:
            return FAR
        return _distance(target, _workload(target, knobs), seed)

    found, value = least(
        distance, _point(START), evaluations=evaluations, good_enough=GOOD_ENOUGH, seed=seed,
        progress=progress,
    )  # fmt: skip
    return _workload(target, _knobs(found)), value


def _workload(target: Target, knobs: dict[str, float]) -> Workload:
    return Workload(knobs, target.document_tokens, target.tokens, target.vocabulary)


def _distance(target: Target, workload: Workload, seed: int) -> float:
    """In points, root mean square over sizes: of all orders together and, counting a third, of each."""
    sampled = ngram_sample(*workload.make(seed), target.fold, target.orders, target.rate)
    rates = sampled.lru_by_owner(target.capacities, target.tokens)
    if rates.shape != target.hit_rates.shape:
        return FAR
    off_by = rates - target.hit_rates
    together, apart = (off_by.mean(axis=0) ** 2).mean(), (off_by**2).mean()
    return float(100 * np.sqrt(0.75 * together + 0.25 * apart))


def _ranges() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lowest and highest of each knob as they are looked for, and whether on a logarithmic scale."""
    ranges = np.array([SEARCHED.get(knob.name, (knob.low, knob.high)) for knob in ALL])
    by_factors = np.array([knob.by_factors for knob in ALL])
    ranges[by_factors] = np.log(ranges[by_factors])
    return ranges[:, 0], ranges[:, 1], by_factors


def _point(knobs: dict[str, float]) -> np.ndarray:
    low, high, by_factors = _ranges()
    values = np.array([knobs[knob.name] for knob in ALL], np.float64)
    values[by_factors] = np.log(values[by_factors])
    return (values - low) / (high - low)


def _knobs(point: np.ndarray) -> dict[str, float]:
    low, high, by_factors = _ranges()
    values = low + np.clip(point, 0, 1) * (high - low)
    values[by_factors] = np.exp(values[by_factors])
    return {
        knob.name: min(knob.high, max(knob.low, float(f"{value:.6g}")))
        for knob, value in zip(ALL, values, strict=True)
    }
