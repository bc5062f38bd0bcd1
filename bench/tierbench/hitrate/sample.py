"""The sampled part of a trace, and what other policies and sizes make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tierbench.hitrate.lookups import Lookups
from tierbench.hitrate.model import Model
from tierbench.policy.product import FOUND, READ, Replay, room_for
from tierbench.policy.sampling import (
    GROUPS,
    THRESHOLD_BITS,
    hash_records,
    merge_repeats,
    pick,
    pick_rows,
    reuse_distances,
)

ALL = 1 << THRESHOLD_BITS


@dataclass(frozen=True)
class Estimate:
    """Shares of all accesses; `error` is the hit rate's standard error by sampling, 0 without."""

    hit_rate: float
    error: float
    reads_per_access: float  # records, or rows, that a look-up has to read

    def told(self) -> dict[str, float]:
        return {"hit_rate": self.hit_rate, "error": self.error, "reads_per_access": self.reads_per_access}


class Sample:
    """Accesses to records whose hash lies below a threshold, collected stretch by stretch."""

    def __init__(self, rate: float) -> None:
        self._threshold = max(1, min(ALL, round(rate * ALL)))
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.accesses_there_were = 0

    @property
    def rate(self) -> float:
        return self._threshold / ALL

    def take(self, lookups: Lookups) -> None:
        """Keep what is in the sample of these look-ups."""
        keys = lookups.keys
        picked, numbers = np.empty(keys.size, np.int64), np.empty(keys.size, np.int64)
        count = pick(
            keys, lookups.owners, lookups.ends, lookups.first_lookup, self._threshold, picked, numbers
        )
        chosen = picked[:count]
        self._add(keys[chosen], lookups.owners[chosen], numbers[:count].copy(), keys.size)

    def _add(self, keys: np.ndarray, owners: np.ndarray, numbers: np.ndarray, accesses: int) -> None:
        self._parts.append((keys, owners, numbers))
        self.accesses_there_were += accesses

    @cached_property
    def trace(self) -> SampledTrace:
        """All that was taken; nothing may be taken after this."""
        keys, owners, numbers = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        self._parts.clear()
        return SampledTrace(keys, owners, numbers, self.rate, self.accesses_there_were)


class RowSample(Sample):
    """The same for single rows, as a table that is packed by rows is asked for them."""

    def __init__(self, rate: float, model: Model) -> None:
        super().__init__(rate)
        self._model = model

    def take(self, lookups: Lookups) -> None:
        model, n = self._model, lookups.keys.size * self._model.heads
        rows, owners, numbers = (np.empty(n, np.int64) for _ in range(3))
        count = pick_rows(
            lookups.keys, lookups.owners, lookups.ends, lookups.first_lookup, model.first_owners,
            model.orders, model.head_sizes, model.head_offsets, self._threshold, rows, owners, numbers,
        )  # fmt: skip
        self._add(rows[:count].copy(), owners[:count].copy(), numbers[:count].copy(), n)


class SampledTrace:
    """A sampled trace: keys, owners and look-up numbers, int64 [n], look-ups in their order."""

    def __init__(
        self, keys: np.ndarray, owners: np.ndarray, lookups: np.ndarray, rate: float, accesses: int
    ) -> None:
        self._keys, self._owners, self._lookups = keys, owners, lookups
        self.rate, self.accesses = rate, accesses
        hashes, self._groups = np.empty(keys.size, np.uint64), np.empty(keys.size, np.uint8)
        hash_records(keys, owners, hashes, self._groups)
        distinct, ids = np.unique(hashes, return_inverse=True)
        self.sampled_distinct = int(distinct.size)
        ids = ids.reshape(-1).astype(np.int32)
        merged, weights = np.empty(keys.size, np.int64), np.empty(keys.size, np.int64)
        count = merge_repeats(ids, lookups, distinct.size, merged, weights)
        self._merged, self._weights = merged[:count].copy(), weights[:count].copy()
        self._ids = ids[self._merged]

    @property
    def distinct(self) -> int:
        """Of the whole trace."""
        return round(self.sampled_distinct / self.rate)

    def _nothing_held(self) -> Estimate:
        """No cache at all: exact for the hit rate, sampled for how many a look-up reads."""
        return Estimate(0.0, 0.0, self._ids.size / max(1.0, self.rate * self.accesses))

    def scaled(self, capacity: int) -> int:
        """The capacity of a miniature cache, as far as the sample can use it."""
        return max(1, room_for(round(capacity * self.rate), self._keys.size))

    def product(self, capacity: int) -> Estimate:
        """The product's own arena, in miniature."""
        if not capacity:
            return self._nothing_held()
        outcome = np.full(self._keys.size, READ, np.uint8)
        if self._keys.size:
            ends = np.append(np.flatnonzero(np.diff(self._lookups)) + 1, self._keys.size)
            Replay(self.scaled(capacity)).look_up(self._keys, self._owners, ends, outcome)
        missed = outcome != FOUND
        return self._estimate(self._groups[missed], None, int(np.count_nonzero(outcome == READ)))

    def numbered(self, simulate: Callable[..., Any], capacity: int) -> Estimate:
        """A policy of `tierbench.policy` that takes numbered records: what it misses, look-up by look-up."""
        if not capacity:
            return self._nothing_held()
        found = np.zeros(self._ids.size, np.uint8)
        simulate(self._ids, self.sampled_distinct, self.scaled(capacity), found)
        return self._missed(found == 0)

    @cached_property
    def _distances(self) -> np.ndarray:
        distances = np.empty(self._ids.size, np.int64)
        reuse_distances(self._ids, self.sampled_distinct, distances)
        return distances

    def lru(self, capacity: int) -> Estimate:
        """LRU, for any number of capacities from one pass over the sample."""
        return self._missed(self._distances >= self.scaled(capacity)) if capacity else self._nothing_held()

    def lru_by_owner(self, capacities: Sequence[int], accesses: int) -> np.ndarray:
        """LRU's hit rates, float64 [owners, capacities], of an owner's own `accesses`; owners ascend."""
        owners, numbers = np.unique(self._owners[self._merged], return_inverse=True)
        expected = max(1.0, self.rate * accesses)
        found = np.empty((owners.size, len(capacities)))
        for i, capacity in enumerate(capacities):
            missed = self._distances >= self.scaled(capacity)
            found[:, i] = 1 - np.bincount(numbers[missed], self._weights[missed], owners.size) / expected
        return found

    def _missed(self, missed: np.ndarray) -> Estimate:
        groups = self._groups[self._merged[missed]]
        return self._estimate(groups, self._weights[missed], int(np.count_nonzero(missed)))

    def _estimate(self, groups: np.ndarray, weights: np.ndarray | None, reads: int) -> Estimate:
        misses = np.bincount(groups, weights, GROUPS)
        expected = max(1.0, self.rate * self.accesses)
        variance = GROUPS * misses.var(ddof=1) * (1 - self.rate)
        hit_rate = min(1.0, max(0.0, 1 - float(misses.sum()) / expected))
        return Estimate(hit_rate, float(variance**0.5) / expected, reads / expected)
