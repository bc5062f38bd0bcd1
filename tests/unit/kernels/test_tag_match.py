"""Tag matching sixteen at a time, against a loop in Python; and the passes of a batch, whatever its size."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from engram_client.arena.atomics import equal_halves, lowest_bit
from engram_client.arena.layout import (
    KEY_AT,
    LINE_BYTES,
    OWNER_AT,
    TAGS_AT,
    WAYS,
    ArenaGeometry,
)
from engram_client.arena.read import BLOCK, copy_part, find_way, mix, tag_of
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import Arena

SLOT_BYTES = 48
OWNER = 1 << 8


@numba.njit
def matches(address: int, value: int) -> Any:
    return equal_halves(address, value)


@numba.njit
def lowest(bits: int) -> Any:
    return lowest_bit(bits)


def oracle_bits(tags: list[int], tag: int) -> int:
    return sum(1 << way for way, found in enumerate(tags) if found == tag)


def test_every_way_alone() -> None:
    for way in range(WAYS):
        tags = np.zeros(WAYS, np.uint16)
        tags[way] = 0xFFFF
        assert matches(tags.ctypes.data, 0xFFFF) == 1 << way
        assert matches(tags.ctypes.data, 0) == 0xFFFF ^ 1 << way
        assert matches(tags.ctypes.data, 0x7FFF) == 0
        assert lowest(1 << way) == way


@pytest.mark.parametrize("seed", range(5))
def test_bits_against_the_loop(seed: int) -> None:
    """Few values, so that tags collide and ways are empty; any address a uint16 may have."""
    random = np.random.default_rng(seed)
    memory = np.zeros(4 * WAYS, np.uint16)
    for _ in range(400):
        first = int(random.integers(0, 3 * WAYS))
        memory[:] = random.choice([0, 1, 2, 0x7FFF, 0x8000, 0xFFFF], memory.size)
        tags = memory[first : first + WAYS].tolist()
        for tag in {0, 1, 0x8000, 0xFFFF, tags[0], tags[-1]}:
            bits = matches(memory.ctypes.data + 2 * first, tag)
            assert bits == oracle_bits(tags, tag)
            if bits:
                assert lowest(bits) == tags.index(tag)


def test_the_way_of_a_record_among_equal_tags() -> None:
    """Keys, owners and tags out of few values: only a way with all three counts, and the first such."""
    random = np.random.default_rng(7)
    line, slots = np.zeros(LINE_BYTES, np.uint8), np.zeros((WAYS, SLOT_BYTES), np.uint8)
    tags = line[TAGS_AT : TAGS_AT + 2 * WAYS].view(np.uint16)
    found = numba.njit(lambda *args: find_way(*args))
    seen = set()
    for _ in range(2000):
        tags[:] = random.choice([0, 5, 9], WAYS)
        keys, owners = random.integers(0, 4, WAYS), random.integers(OWNER, OWNER + 2, WAYS)
        slots[:, KEY_AT : KEY_AT + 8] = keys.astype(np.int64)[:, None].view(np.uint8)
        slots[:, OWNER_AT : OWNER_AT + 8] = owners.astype(np.int64)[:, None].view(np.uint8)
        tag, key, owner = int(random.choice([5, 9])), int(keys[0]), int(owners[3])
        wanted = [(tag, key, owner) == each for each in zip(tags.tolist(), keys, owners, strict=True)]
        expected = wanted.index(True) if any(wanted) else -1
        assert found(line.ctypes.data, slots.ctypes.data, SLOT_BYTES, tag, key, owner) == expected
        seen.add(expected)
    assert seen >= set(range(-1, 8)), "the seed reaches few ways"


@pytest.mark.parametrize("count", [0, 1, 7, 31, 32, 33, 63, 64, 65, 84, 100, 160, 264, 2112])
def test_a_part_is_copied_and_nothing_else(count: int) -> None:
    source = np.random.default_rng(count).integers(0, 256, count + 16, np.uint8)
    target = np.full(count + 16, 0xEE, np.uint8)
    numba.njit(lambda *args: copy_part(*args))(target.ctypes.data + 3, source.ctypes.data + 5, count)
    assert np.array_equal(target[3 : 3 + count], source[5 : 5 + count])
    assert (np.delete(target, slice(3, 3 + count)) == 0xEE).all()


def test_records_of_one_set_and_one_tag_are_told_apart() -> None:
    """Keys that agree in set and tag: every look-up has to go through all ways of that tag."""
    record_bytes = 40
    arena = Arena(ArenaGeometry(1, record_bytes).total_bytes, record_bytes, Counters())
    keys = keys_of_one_tag(WAYS + 4)
    rows = np.repeat(keys, record_bytes // 8).reshape(keys.size, -1)
    kept = keys[:WAYS]
    arena.admit(kept, np.full(WAYS, OWNER), rows.ctypes.data, np.arange(WAYS), wanted_soon=False)
    tags = arena._region.index_line(0)[TAGS_AT : TAGS_AT + 2 * WAYS].view(np.uint16)
    assert len(set(tags.tolist())) == 1
    out = np.zeros((keys.size, record_bytes // 8), np.int64)
    misses, _ = arena.read(keys, OWNER, 1, (0, record_bytes), out.ctypes.data)
    assert misses.tolist() == list(range(WAYS, keys.size)), "the others have the tag, and are not there"
    assert np.array_equal(out[:WAYS], rows[:WAYS])


def keys_of_one_tag(count: int) -> np.ndarray:
    @numba.njit
    def tags(keys: np.ndarray) -> Any:
        found = np.empty(keys.size, np.int64)
        for i in range(keys.size):
            found[i] = tag_of(mix(keys[i], OWNER))
        return found

    candidates = np.arange(1, 3 << 20)
    of = tags(candidates)
    return candidates[of == of[0]][:count]


@pytest.mark.parametrize("n", [0, 1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 5, 9 * BLOCK])
@pytest.mark.parametrize("record_bytes", [24, 264, 1000])
def test_a_batch_of_any_size(n: int, record_bytes: int) -> None:
    """Found, missing and masked entries of several orders, in batches that end anywhere in a block."""
    orders = 3
    random = np.random.default_rng(n)
    arena = Arena(ArenaGeometry(64, record_bytes).total_bytes, record_bytes, Counters())
    keys = random.integers(0, 2**63 - 1, n)
    owners = OWNER + np.arange(n) % orders
    rows = random.integers(0, 256, (n, record_bytes), np.uint8)
    kept = np.flatnonzero(random.random(n) < 0.7)
    arena.admit(keys[kept], owners[kept], rows.ctypes.data, kept, wanted_soon=False)
    masked = random.random(n) < 0.1
    asked = np.where(masked, -1, keys)
    for at, length in ((0, record_bytes), (8, record_bytes - 8), (record_bytes - 1, 1)):
        out = np.full((n, length), 0xEE, np.uint8)
        misses, masked_count = arena.read(asked, OWNER, orders, (at, length), out.ctypes.data)
        there = np.isin(np.arange(n), kept) & ~masked
        assert misses.tolist() == np.flatnonzero(~there & ~masked).tolist()
        assert masked_count == masked.sum()
        assert np.array_equal(out[there], rows[there, at : at + length])
        assert not out[masked].any()
        assert (out[misses] == 0xEE).all()
