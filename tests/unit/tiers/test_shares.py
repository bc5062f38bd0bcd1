"""One budget, several record sizes: where it goes, how fast, and what it never exceeds."""

from __future__ import annotations

import numpy as np

from engram_client.arena.layout import ArenaGeometry
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena, DramTier
from tierstore.tiers.shares import Tally, next_shares, share_budget, weights_of

MIB = 1 << 20
ROW, RECORD = 256, 2048  # bytes
PAGES = {ROW: 1, RECORD: 8}  # read for one
OWNER = 1 << 8


def tally(share: int, returned: int, admitted: int = 100_000, pages: int = 100_000) -> Tally:
    return Tally(share, returned, admitted, pages)


def test_the_budget_goes_where_a_byte_saves_more_pages() -> None:
    """The same hits missed, but one record is eight pages: eight times the worth."""
    shares = next_shares(
        {ROW: tally(50 * MIB, 20_000), RECORD: tally(50 * MIB, 20_000, pages=800_000)},
    )
    assert shares == {ROW: 40 * MIB, RECORD: 60 * MIB}


def test_what_is_worth_the_same_stays() -> None:
    assert next_shares({ROW: tally(30 * MIB, 9_000), RECORD: tally(70 * MIB, 21_000)}) is None
    assert next_shares({ROW: tally(30 * MIB, 9_000), RECORD: tally(70 * MIB, 28_000)}) is None


def test_nothing_moves_without_evidence_or_gain() -> None:
    assert next_shares({ROW: tally(50 * MIB, 200, 300, 300), RECORD: tally(50 * MIB, 0, 0, 0)}) is None
    assert next_shares({ROW: tally(50 * MIB, 300), RECORD: tally(50 * MIB, 0)}) is None
    assert next_shares({ROW: tally(50 * MIB, 0, 0, 0), RECORD: tally(50 * MIB, 0, 0, 0)}) is None
    assert next_shares({ROW: tally(50 * MIB, 9_000)}) is None


def test_a_step_is_bounded_and_leaves_everybody_something() -> None:
    """No more than doubles the taker or halves the giver, a hundredth of the budget stays."""
    shares = next_shares({ROW: tally(2 * MIB, 90_000), RECORD: tally(98 * MIB, 10)})
    assert shares == {ROW: 4 * MIB, RECORD: 96 * MIB}
    shares = next_shares({ROW: tally(94 * MIB, 90_000), RECORD: tally(6 * MIB, 0)})
    assert shares == {ROW: 97 * MIB, RECORD: 3 * MIB}
    third = {64: tally(193 * MIB // 2, 90_000, 90_000, 90_000)}
    shares = next_shares({ROW: tally(2 * MIB, 90_000), RECORD: tally(3 * MIB // 2, 0), **third})
    assert shares == {ROW: 5 * MIB // 2, RECORD: MIB, 64: 193 * MIB // 2}
    assert next_shares({ROW: tally(99 * MIB, 90_000), RECORD: tally(1 * MIB, 0)}) is None


def test_shares_survive_as_weights_and_scale_with_the_budget() -> None:
    shares = {ROW: 12_345_678, RECORD: 87_654_321}
    budget = sum(shares.values())
    again = share_budget(budget, weights_of(shares))
    assert all(abs(again[size] - shares[size]) <= 1 for size in shares)
    assert sum(again.values()) <= budget
    half = share_budget(budget // 2, weights_of(shares))
    assert all(abs(half[size] - shares[size] / 2) < ArenaGeometry(1, size).total_bytes for size in shares)


def ask(arena: Arena, size: int, keys: np.ndarray) -> int:
    """Look up, read what is missing, admit it; how many pages that took."""
    out = np.empty((keys.size, size), np.uint8)
    misses, _ = arena.read(keys, OWNER, 1, (0, size), out.ctypes.data)
    pages = misses.size * PAGES[size]
    arena.note_pages(pages)
    places = np.arange(misses.size)
    arena.admit(keys[misses], np.full(misses.size, OWNER), out.ctypes.data, places, wanted_soon=False)
    return pages


def pages_of(tier: DramTier, rounds: int, steps_between: int, seed: int) -> tuple[int, int]:
    """Drive both record sizes by Zipf draws; pages read in the last rounds, and most bytes held."""
    random = np.random.default_rng(seed)
    weights = np.cumsum(np.arange(1, 20_001) ** -0.9)
    names = {size: random.integers(0, 2**63 - 1, 20_000) for size in PAGES}
    last = most = 0
    for i in range(rounds):
        for size, draws in ((ROW, 4_000), (RECORD, 12_000)):
            ranks = np.searchsorted(weights, random.random(draws) * weights[-1])
            for keys in np.array_split(names[size][ranks], draws // 50):
                pages = ask(tier.arenas()[size], size, np.unique(keys))
                last += pages if i >= rounds - 4 else 0
        if steps_between and i % steps_between == 0:
            tier.balance()
            most = max(most, tier.total_bytes)
    return last, most


def test_moving_by_worth_saves_reads_and_keeps_the_budget() -> None:
    """Tables of equal bytes, but records are asked for three times as often and cost eight pages."""
    budget, by_bytes = 4 * MIB, {ROW: 1, RECORD: 1}
    fixed, counters = DramTier(budget, by_bytes, Counters()), Counters()
    moving = DramTier(budget, by_bytes, counters)
    before, _ = pages_of(fixed, 14, 0, seed=1)
    after, most = pages_of(moving, 14, 1, seed=1)
    assert after < 0.95 * before
    assert most <= budget
    assert counters.snapshot()["dram_balanced"] > 1
    assert moving.arenas()[RECORD].geometry.total_bytes > 0.6 * budget


def test_a_changed_budget_keeps_the_shares_that_were_found() -> None:
    tier = DramTier(8 * MIB, {ROW: 1, RECORD: 3}, Counters())
    tier.resize(16 * MIB)
    row, record = (tier.arenas()[size].geometry.total_bytes for size in (ROW, RECORD))
    assert 2.8 < record / row < 3.2
    assert tier.total_bytes <= 16 * MIB
