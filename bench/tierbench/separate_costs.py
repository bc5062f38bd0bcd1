"""What a mixed run costs, against its hits alone and its misses alone.

A trace is looked up in batches; DRAM holds a part of its records. For every window of batches three
times are taken, one after the other, each in a store with a cache of its own and the same history:

    mixed    the batches as they come: h entries hit; d distinct records are missing
    hits     the same batches with each missing entry replaced by one of the same order that hit in this
             window: all of them hit, as hot as the real ones. The time of an entry, times h.
    misses   for each batch d/orders tokens of keys that nobody has asked for before, so that a call reads
             as many records as the mixed one had to. The time of a record, times d.

The mixed time over the sum of the other two is the figure: 1 where neither disturbs the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tierbench.timed_store import TimedStore

NOBODY = -1  # no row here


@dataclass(frozen=True)
class Separated:
    """One window, in seconds."""

    mixed_s: float
    hits_s: float
    misses_s: float
    hits: int  # entries
    misses: int  # distinct records, batch by batch
    hit_again: float  # share of the entries of the second time that did hit

    @property
    def separate_s(self) -> float:
        return self.hits_s + self.misses_s


def separate(
    mixed: TimedStore, hits: TimedStore, misses: TimedStore, batches: list[np.ndarray], seed: int
) -> Separated:
    """Measure one window of batches int64 [tokens, orders]."""
    mixed_s, hit_counts, missing = 0.0, [], []
    hit_masks = []
    for batch in batches:
        took_s, missed = mixed.look_up(batch)
        mask = np.ones(batch.size, bool)
        mask[missed] = False
        mixed_s += took_s
        hit_masks.append(mask.reshape(batch.shape))
        hit_counts.append(int(mask.sum()))
        missing.append(_distinct(batch, missed))
    hits_s, again = _hits_alone(hits, batches, hit_masks)
    misses_s = _misses_alone(misses, missing, np.random.default_rng(seed))
    return Separated(mixed_s, hits_s, misses_s, sum(hit_counts), sum(missing), again)


def _distinct(batch: np.ndarray, missed: np.ndarray) -> int:
    """How many different records the missing entries name."""
    orders = batch.shape[1]
    names = np.stack([batch.reshape(-1)[missed], missed % orders])
    return int(np.unique(names, axis=1).shape[1])


def _hits_alone(
    store: TimedStore, batches: list[np.ndarray], hit_masks: list[np.ndarray]
) -> tuple[float, float]:
    """Seconds for as many hits as the masks say, and which share of what was looked up did hit."""
    known = [
        np.concatenate([batch[mask[:, order], order] for batch, mask in zip(batches, hit_masks, strict=True)])
        for order in range(store.orders)
    ]
    filled = [_only_hits(batch, mask, known) for batch, mask in zip(batches, hit_masks, strict=True)]
    for batch in filled:
        store.look_up(batch)
    cost_s, entries, hit = 0.0, 0, 0
    for batch, mask in zip(filled, hit_masks, strict=True):
        present = int((batch != NOBODY).sum())
        took_s, missed = store.look_up(batch)
        cost_s += took_s * int(mask.sum()) / max(1, present)
        entries, hit = entries + present, hit + present - missed.size
    return cost_s, hit / max(1, entries)


def _only_hits(batch: np.ndarray, mask: np.ndarray, known: list[np.ndarray]) -> np.ndarray:
    """The batch with missing entries replaced by known ones of their order, NOBODY where none is known."""
    filled = batch.copy()
    for order, keys in enumerate(known):
        missing = ~mask[:, order]
        filled[missing, order] = np.resize(keys, int(missing.sum())) if keys.size else NOBODY
    return filled


def _misses_alone(store: TimedStore, missing: list[int], random: np.random.Generator) -> float:
    """Seconds for so many missing records, batch by batch."""
    cost_s = 0.0
    for records in missing:
        tokens = -(-records // store.orders)
        if tokens:
            took_s, missed = store.look_up(random.integers(0, 2**63 - 1, (tokens, store.orders), np.int64))
            cost_s += took_s * records / max(1, missed.size)
    return cost_s
