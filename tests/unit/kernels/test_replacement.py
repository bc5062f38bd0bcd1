"""The kernels against the same policy told with Python lists: the same records stay, step by step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest

from engram_client.arena.layout import (
    GHOST_BYTES,
    LINE_BYTES,
    MAIN_READ,
    STATES_AT,
    WAYS,
    ArenaGeometry,
)
from tierstore.kernels.dueling import CLEAR, EAGER, EARLY_CLEAR, NEUTRAL, PATIENT, STANCE, new_duel, verdict
from tierstore.kernels.replacement import PATIENCE
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
    awaited: set[int] = field(default_factory=set)
    arrivals: list[int] = field(default_factory=list)  # both queues, oldest first
    ghosts: deque[int | None] = field(default_factory=lambda: deque(maxlen=16))
    admitted: int = 0
    trial: int = 3  # ways
    passing: int = 1  # reads

    def read(self, key: int, hint: bool) -> bool:
        if key not in self.reads:
            return False
        if hint or key not in self.awaited:
            self.reads[key] = min(2 if key in self.small else 4, self.reads[key] + 1)
        if hint:
            self.awaited.add(key)
        else:
            self.awaited.discard(key)
        return True

    def admit(self, key: int, fingerprint: dict[int, int], hint: bool) -> bool:
        """Whether another record had to leave."""
        if key in self.reads:
            return False
        known = fingerprint[key] in self.ghosts
        if known:  # the newest of equal fingerprints is forgotten
            place = len(self.ghosts) - 1 - list(self.ghosts)[::-1].index(fingerprint[key])
            self.ghosts[place] = None
        evicts = len(self.reads) == 16
        if evicts:
            victim = self.victim()
            for where in (self.small, self.main, self.arrivals):
                if victim in where:
                    where.remove(victim)
            del self.reads[victim]
            self.awaited.discard(victim)
            self.ghosts.append(fingerprint[victim])
        (self.main if known else self.small).append(key)
        self.arrivals.append(key)
        self.reads[key] = 0
        self.admitted += 1
        if hint:
            self.awaited.add(key)
        return evicts

    def victim(self) -> int:
        if self.awaited and self.admitted % (32 if len(self.awaited) >= 8 else 256) == 0:
            self.awaited.remove(next(key for key in self.arrivals if key in self.awaited))
        while True:
            small = [key for key in self.small if key not in self.awaited]
            main = [key for key in self.main if key not in self.awaited]
            if not small and not main:
                return self.arrivals[-1]
            trial = len(small) >= self.trial or not main
            oldest = small[0] if trial else main[0]
            if self.reads[oldest] < (self.passing if trial else 1):
                return oldest
            (self.small if trial else self.main).remove(oldest)
            self.reads[oldest] = 0 if trial else self.reads[oldest] - 1
            self.main.append(oldest)
            self.arrivals.remove(oldest)
            self.arrivals.append(oldest)


TRIALS = {NEUTRAL: (3, 1), EAGER: (1, 1), PATIENT: (4, 2)}  # ways, reads


class Model:
    """An arena. From 64 sets on, one in 16 plays eager and one in 16 patient, in turn."""

    def __init__(self, sets: int) -> None:
        self.sets = [ModelSet() for _ in range(sets)]
        self.fingerprint: dict[int, int] = {}
        self.sides: dict[int, list[ModelSet]] = {EAGER: [], PATIENT: []}
        self.evictions: list[ModelSet] = []
        self.rates = {EAGER: Fraction(0), PATIENT: Fraction(0)}
        self.verdicts, self.stance = 0, NEUTRAL
        self.take_sides()

    def take_sides(self) -> None:
        sided = 16 * (len(self.sets) // 16) if len(self.sets) >= 64 else 0
        turn = self.verdicts // 32
        self.sides = {
            EAGER: self.sets[-turn % 16 : sided : 16],
            PATIENT: self.sets[(8 - turn) % 16 : sided : 16],
        }
        for where in self.sets:
            where.trial, where.passing = TRIALS[self.stance]
        for side, members in self.sides.items():
            for where in members:
                where.trial, where.passing = TRIALS[side]

    def set_of(self, key: int) -> ModelSet:
        h = mixed(key, OWNER)
        self.fingerprint[key] = max(1, max(1, h & 0xFFFF) >> 4)
        return self.sets[(h >> 32) * len(self.sets) >> 32]

    def read(self, key: int, hint: bool) -> bool:
        return self.set_of(key).read(key, hint)

    def admit(self, key: int, hint: bool) -> None:
        where = self.set_of(key)
        if where.admit(key, self.fingerprint, hint) and self.sides[EAGER]:
            self.evictions.append(where)
            if len(self.evictions) == 8 * len(self.sets):
                self.judge()

    def judge(self) -> None:
        """A quarter is forgotten each time at first, then so much that 65,536 evictions weigh."""
        early = self.verdicts < 12
        if self.verdicts < 32 or self.verdicts % 32 >= 4:
            for side, members in self.sides.items():
                lost = sum(any(where is member for member in members) for where in self.evictions)
                forgotten = Fraction(1, 4) if early else Fraction(8 * len(members), 65_536)
                self.rates[side] = self.rates[side] * (1 - forgotten) + Fraction(lost, len(members))
            difference = (self.rates[PATIENT] - self.rates[EAGER]) * 2 / sum(self.rates.values())
            better = EAGER if difference > 0 else PATIENT
            if abs(difference) <= Fraction(225 if early else 75, 10_000):
                unsure = abs(difference) < Fraction(25, 10_000) or self.stance != better
                better = NEUTRAL if unsure else self.stance
            self.stance = better
        self.verdicts += 1
        self.evictions.clear()
        self.take_sides()


def make_arena(sets: int) -> Arena:
    return Arena(ArenaGeometry(sets, 8).total_bytes, 8, Counters())


def read(arena: Arena, keys: np.ndarray, *, hint: bool = False) -> set[int]:
    out = np.empty((keys.size, 8), np.uint8)
    misses, _ = arena.read(keys, OWNER, 1, (0, 0 if hint else 8), out.ctypes.data)
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


@pytest.mark.parametrize("hinted_share", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("batch", [1, 7])
def test_the_arena_keeps_what_the_model_keeps(batch: int, hinted_share: float) -> None:
    arena, model = make_arena(5), Model(5)
    random = np.random.default_rng(batch)
    for keys in np.array_split(zipf_keys(batch, 6000, 600), 6000 // batch):
        hint = bool(random.random() < hinted_share)
        missing = read(arena, keys, hint=hint)
        assert missing == {i for i, key in enumerate(keys.tolist()) if not model.read(key, hint)}
        wanted = keys[sorted(missing)]
        admit(arena, wanted, wanted_soon=hint)
        for key in wanted.tolist():
            model.admit(key, hint)


def test_the_duel_goes_as_the_model_says() -> None:
    """First records that mostly come twice and never again, then independent draws."""
    arena, model = make_arena(70), Model(70)
    random, stances = np.random.default_rng(9), set()
    for i, keys in enumerate(np.array_split(zipf_keys(3, 56_000, 6000), 400)):
        passing = random.integers(0, 2**63 - 1, 100) if i < 60 else keys[:0]
        for batch in (passing, passing, keys):
            missing = read(arena, batch)
            assert missing == {i for i, key in enumerate(batch.tolist()) if not model.read(key, False)}
            wanted = batch[sorted(missing)]
            admit(arena, wanted)
            for key in wanted.tolist():
                model.admit(key, False)
            assert arena._duel[STANCE] == model.stance
        stances.add(model.stance)
    assert model.verdicts > 40
    assert len(stances) > 1


def test_a_verdict_wants_a_clear_difference_and_keeps_it_until_it_is_gone() -> None:
    even = 1_000_000
    assert verdict(even, even + 7_000, NEUTRAL, CLEAR) == NEUTRAL
    assert verdict(even, even + 8_000, NEUTRAL, CLEAR) == EAGER
    assert verdict(even, even + 8_000, NEUTRAL, EARLY_CLEAR) == NEUTRAL
    assert verdict(even, even + 3_000, EAGER, CLEAR) == EAGER
    assert verdict(even, even + 2_000, EAGER, CLEAR) == NEUTRAL
    assert verdict(even, even + 3_000, PATIENT, CLEAR) == NEUTRAL
    assert verdict(even + 8_000, even, EAGER, CLEAR) == PATIENT
    assert verdict(0, 0, EAGER, CLEAR) == NEUTRAL


def test_few_sets_stay_neutral_and_a_change_of_size_keeps_the_verdict() -> None:
    arena = make_arena(100)
    arena._duel[STANCE] = EAGER
    arena.resize(ArenaGeometry(200, 8).total_bytes)
    assert arena._duel[STANCE] == EAGER
    arena.resize(ArenaGeometry(20, 8).total_bytes)
    assert arena._duel[STANCE] == NEUTRAL
    assert new_duel(63).sum() < new_duel(64).sum()


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
    """Both one that the hint brought in and one that it found."""
    arena, hinted = make_arena(1), np.array([5, 6])
    admit(arena, hinted[:1], wanted_soon=True)
    admit(arena, hinted[1:])
    read(arena, hinted[1:], hint=True)
    admit(arena, np.arange(100, 100 + PATIENCE - 2))
    assert not read(arena, hinted)
    admit(arena, np.arange(300, 300 + 10 * WAYS))
    assert read(arena, hinted[:1])


def test_more_hints_than_fit_keep_the_first() -> None:
    arena, keys = make_arena(1), np.arange(1, 25)
    admit(arena, keys, wanted_soon=True)
    assert len(read(arena, keys[: WAYS - 1])) == 0


def test_hints_without_readers_do_not_fill_the_arena() -> None:
    arena, stale = make_arena(4), np.arange(1, 60)
    admit(arena, stale, wanted_soon=True)
    admit(arena, np.random.default_rng(6).integers(0, 2**63 - 1, 4 * WAYS * PATIENCE * 3))
    assert len(read(arena, stale)) == stale.size


def test_any_state_a_late_reader_leaves_is_survived() -> None:
    """Random states and ghosts: records are still admitted and read back, one for each slot."""
    arena = make_arena(6)
    random = np.random.default_rng(5)
    g = arena.geometry
    memory = arena._region._bytes
    index = memory[: g.index_bytes].reshape(-1, LINE_BYTES)
    ghosts = memory[g.ghosts_at : g.ghosts_at + g.sets * GHOST_BYTES]
    for keys in random.integers(0, 2**63 - 1, (300, 4)):
        index[:, STATES_AT : STATES_AT + WAYS] = random.integers(0, 256, (g.sets, WAYS))
        ghosts[:] = random.integers(0, 256, ghosts.size)
        admit(arena, keys[:1])
        assert not read(arena, keys[:1])
    index[:, STATES_AT : STATES_AT + WAYS] = MAIN_READ  # all read, all in one place
    admit(arena, keys)
    assert 3 not in read(arena, keys)


def test_a_record_read_often_leaves_its_line_clean() -> None:
    arena, keys = make_arena(1), np.arange(1, 60)
    index = arena._region._bytes[: arena.geometry.index_bytes]
    for key in keys:  # some of them reach the main queue
        admit(arena, keys[sorted(read(arena, keys[:key]))])
    for _ in range(6):
        read(arena, keys)
    before = index.copy()
    read(arena, keys)
    np.testing.assert_array_equal(index, before)


def test_bookkeeping_stays_below_its_share() -> None:
    """At rows of 264 bytes: index, ghosts and the key and owner in the slot."""
    geometry = ArenaGeometry(1000, 264)
    rows = geometry.capacity_records * 264
    padding = geometry.capacity_records * (geometry.slot_bytes - 16 - 264)
    assert geometry.total_bytes - rows - padding <= 0.08 * rows


def test_records_keep_their_queue_when_the_budget_changes() -> None:
    """What was read before the move outlives a scan after it."""
    arena = make_arena(8)
    loved = np.random.default_rng(7).integers(0, 2**63 - 1, 40)
    for _ in range(6):
        admit(arena, loved[sorted(read(arena, loved))])
    kept = sorted(set(range(loved.size)) - read(arena, loved))
    admit(arena, np.random.default_rng(8).integers(0, 2**63 - 1, 60))  # those on trial for now pass or go
    kept = sorted(set(kept) - {kept[i] for i in read(arena, loved[kept])})
    arena.resize(ArenaGeometry(12, 8).total_bytes)
    admit(arena, np.random.default_rng(9).integers(0, 2**63 - 1, 12 * WAYS * 10))
    assert len(kept) > 30
    assert len(read(arena, loved[kept])) < 4  # a set of the old may have met a full one of the new
