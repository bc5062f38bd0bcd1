"""The kernels against the same policy told with Python lists: the same records stay, step by step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest

from engram_client.arena.layout import (
    GHOST_BYTES,
    LINE_BYTES,
    MAIN,
    STATES_AT,
    WAYS,
    ArenaGeometry,
)
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena

OWNER = 1 << 8
MASK = 2**64 - 1


def mixed(key: int, owner: int) -> int:
    h = key ^ (owner * 0x9E3779B97F4A7C15 & MASK)
    h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & MASK
    h = (h ^ h >> 27) * 0x94D049BB133111EB & MASK
    return h ^ h >> 31


@dataclass
class ModelSet:
    """One set: two queues, oldest first, and the fingerprints of the last 16 that went."""

    small: list[int] = field(default_factory=list)
    main: list[int] = field(default_factory=list)
    reads: dict[int, int] = field(default_factory=dict)
    ghosts: deque[int | None] = field(default_factory=lambda: deque(maxlen=16))

    def read(self, key: int) -> bool:
        if key in self.reads:
            self.reads[key] = min(7, self.reads[key] + 1)
        return key in self.reads

    def admit(self, key: int, fingerprint: dict[int, int], wanted_soon: bool) -> None:
        if key in self.reads:
            return
        known = fingerprint[key] in self.ghosts
        if known:
            # the newest of equal fingerprints is forgotten
            place = len(self.ghosts) - 1 - list(self.ghosts)[::-1].index(fingerprint[key])
            self.ghosts[place] = None
        if len(self.reads) == 16:
            victim = self.victim()
            del self.reads[victim]
            self.ghosts.append(fingerprint[victim])
        (self.main if known or wanted_soon else self.small).append(key)
        self.reads[key] = int(wanted_soon)

    def victim(self) -> int:
        while True:
            trial = len(self.small) >= 3 or not self.main
            oldest = (self.small if trial else self.main).pop(0)
            if self.reads[oldest] == 0:
                return oldest
            self.reads[oldest] = 0 if trial else self.reads[oldest] - 1
            self.main.append(oldest)


class Model:
    def __init__(self, sets: int) -> None:
        self.sets = [ModelSet() for _ in range(sets)]
        self.fingerprint: dict[int, int] = {}

    def set_of(self, key: int) -> ModelSet:
        h = mixed(key, OWNER)
        self.fingerprint[key] = max(1, max(1, h & 0xFFFF) >> 4)
        return self.sets[(h >> 32) * len(self.sets) >> 32]

    def read(self, key: int) -> bool:
        return self.set_of(key).read(key)

    def admit(self, key: int, wanted_soon: bool) -> None:
        self.set_of(key).admit(key, self.fingerprint, wanted_soon)


def make_arena(sets: int) -> Arena:
    return Arena(ArenaGeometry(sets, 8).total_bytes, 8, Counters())


def read(arena: Arena, keys: np.ndarray) -> set[int]:
    out = np.empty((keys.size, 8), np.uint8)
    misses, _ = arena.read(keys, OWNER, 1, (0, 8), out.ctypes.data)
    return set(misses.tolist())


def admit(arena: Arena, keys: np.ndarray, *, wanted_soon: bool = False) -> None:
    arena.admit(
        keys, np.full(keys.size, OWNER), keys.ctypes.data, np.arange(keys.size), wanted_soon=wanted_soon
    )


def zipf_keys(seed: int, count: int, population: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    weights = np.cumsum(np.arange(1, population + 1) ** -0.9)
    names = random.integers(0, 2**63 - 1, population)
    return names[np.searchsorted(weights, random.random(count) * weights[-1])]


@pytest.mark.parametrize("hinted_share", [0.0, 0.2])
@pytest.mark.parametrize("batch", [1, 7])
def test_the_arena_keeps_what_the_model_keeps(batch: int, hinted_share: float) -> None:
    arena, model = make_arena(5), Model(5)
    random = np.random.default_rng(batch)
    for keys in np.array_split(zipf_keys(batch, 6000, 600), 6000 // batch):
        missing = read(arena, keys)
        assert missing == {i for i, key in enumerate(keys.tolist()) if not model.read(key)}
        wanted = keys[sorted(missing)]
        hint = bool(random.random() < hinted_share)
        admit(arena, wanted, wanted_soon=hint)
        for key in wanted.tolist():
            model.admit(key, hint)


def test_a_scan_leaves_what_is_read_again() -> None:
    """Records that were read stay through a hundred times the arena's size of others."""
    arena = make_arena(8)
    loved = np.random.default_rng(3).integers(0, 2**63 - 1, 40)
    for _ in range(6):
        admit(arena, loved[sorted(read(arena, loved))])
    kept = set(range(loved.size)) - read(arena, loved)
    assert len(kept) > 30
    for chunk in np.random.default_rng(4).integers(0, 2**63 - 1, (100, 8 * WAYS)):
        admit(arena, chunk)
        read(arena, loved)
    assert set(range(loved.size)) - read(arena, loved) >= kept


def test_what_went_too_early_comes_back_to_stay() -> None:
    """A record that returns while its set remembers it outlives newcomers without being read."""
    arena = make_arena(1)
    keys = np.arange(1, 40)
    for key in keys[:20]:
        admit(arena, keys[key - 1 : key])
    assert 0 in read(arena, keys[:1])
    admit(arena, keys[:1])
    admit(arena, keys[20:])
    assert not read(arena, keys[:1])


def test_a_hinted_record_waits_for_its_reader() -> None:
    arena = make_arena(1)
    hinted = np.array([5])
    admit(arena, hinted, wanted_soon=True)
    admit(arena, np.arange(100, 100 + 10 * WAYS))
    assert not read(arena, hinted)


def test_any_state_a_late_reader_leaves_is_survived() -> None:
    """Random states and ghosts: records are still admitted and read back, one for each slot."""
    arena = make_arena(6)
    random = np.random.default_rng(5)
    g = arena.geometry
    index = arena._memory[: g.index_bytes].reshape(-1, LINE_BYTES)
    ghosts = arena._memory[g.ghosts_at : g.ghosts_at + g.sets * GHOST_BYTES]
    for keys in random.integers(0, 2**63 - 1, (300, 4)):
        index[:, STATES_AT : STATES_AT + WAYS] = random.integers(0, 256, (g.sets, WAYS))
        ghosts[:] = random.integers(0, 256, ghosts.size)
        admit(arena, keys[:1])
        assert not read(arena, keys[:1])
    index[:, STATES_AT : STATES_AT + WAYS] = MAIN | 7  # all in the main queue, all read, one place
    admit(arena, keys)
    assert 3 not in read(arena, keys)


def test_a_record_read_often_leaves_its_line_clean() -> None:
    arena, key = make_arena(1), np.array([9])
    admit(arena, key)
    index = arena._memory[: arena.geometry.index_bytes]
    for _ in range(7):
        before = index.copy()
        read(arena, key)
        assert not np.array_equal(index, before)
    before = index.copy()
    read(arena, key)
    np.testing.assert_array_equal(index, before)


def test_bookkeeping_stays_below_its_share() -> None:
    """At rows of 264 bytes: index, ghosts and the key and owner in the slot."""
    geometry = ArenaGeometry(1000, 264)
    rows = geometry.capacity_records * 264
    padding = geometry.capacity_records * (geometry.slot_bytes - 16 - 264)
    assert geometry.total_bytes - rows - padding <= 0.08 * rows
